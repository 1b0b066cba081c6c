// @ts-check
/** The versions of a conversation: at each place one or more turns, of which one is shown, each with what follows it. */

/**
 * @template {{fork: Fork<any>, next: Fork<any>}} T
 */
export class Fork {
  turns = /** @type {T[]} */ ([]);
  shown = 0;
  follows = ''; // The episode that leads here, where its turn is not here (yet).

  /** @param {T | null} after The turn that leads here; null where the conversation begins. */
  constructor(after = null) {
    this.after = after;
  }

  /** The turns that lead here, the first of them first. @returns {T[]} */
  before() {
    const found = [];
    for (let turn = this.after; turn; turn = turn.fork.after) found.push(turn);
    return found.reverse();
  }

  /** The turns on the screen from here on. @returns {T[]} */
  path() {
    const found = [];
    for (let turn = this.turns[this.shown]; turn; turn = turn.next.turns[turn.next.shown]) found.push(turn);
    return found;
  }

  /** Adds a version, and shows it. @param {T} turn */
  add(turn) {
    this.shown = this.turns.push(turn) - 1;
  }

  /** @param {T} turn */
  remove(turn) {
    this.turns = this.turns.filter((each) => each !== turn);
    this.shown = Math.max(0, Math.min(this.shown, this.turns.length - 1));
  }

  /** Shows the version before or after. @param {number} step */
  step(step) {
    this.shown = Math.max(0, Math.min(this.shown + step, this.turns.length - 1));
  }
}
