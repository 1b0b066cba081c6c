// @ts-check
/** A turn of before that is not on the page: what the server told of it, in its place among the versions. */
import { Fork } from './branches.js';
import { Turn } from './turn.js';

/** @typedef {Fork<Turn | Rest>} Place */

export class Rest {
  view = null;
  pair = null;

  /**
   * @param {import('./conversation.js').Row} row @param {Place} fork @param {import('./turn.js').Page} page
   * @param {string} conversation
   */
  constructor(row, fork, page, conversation) {
    this.row = row;
    this.fork = fork;
    this.page = page;
    this.conversation = conversation;
    this.prompt = row.question;
    this.answer = row.answer;
    this.episode = row.id;
    /** @type {Place} */
    this.next = new Fork(this);
  }

  /** Whether the server's word is all there is to a turn. @param {Turn} turn */
  static canBe(turn) {
    return turn.row !== null && turn.pair === null;
  }

  /** Takes the place of a turn that can rest. @param {Turn} turn */
  static of(turn) {
    if (!turn.row) throw new Error('Of this turn the server has not told.');
    turn.leave();
    const rest = new Rest(turn.row, turn.fork, turn.page, turn.conversation);
    takePlace(rest, turn);
    return rest;
  }

  /** Becomes a turn that can be shown. */
  wake() {
    const turn = new Turn(this.prompt, this.fork, this.page);
    turn.conversation = this.conversation;
    turn.restore(this.row);
    takePlace(turn, this);
    turn.count();
    return turn;
  }

  /** Nothing is being waited for. */
  leave() {}

  /** It says so when it is shown. */
  count() {}
}

/** @param {Turn | Rest} turn @param {Turn | Rest} other Whose place it takes. */
function takePlace(turn, other) {
  const { fork, next } = other;
  fork.turns[fork.turns.indexOf(other)] = turn;
  [turn.next, next.after] = [next, turn];
}
