// @ts-check
/**
 * A conversation: its turns as a tree of versions, of which the server tells the newest first.
 *
 * @typedef {object} Row A turn as the server tells it.
 * @property {string} id
 * @property {string | null} parent_id
 * @property {string} question
 * @property {string} answer
 * @property {'complete' | 'interrupted' | 'failed'} status
 * @property {string | null} finish_reason
 * @property {string} release
 * @property {import('./recall.js').Used | null} used
 * @property {number} thumb
 * @property {string[]} reasons
 * @property {string | null} comment
 * @property {string | null} correction
 * @property {import('./calls.js').Step[]} steps
 */
import { Fork } from './branches.js';
import { Rest } from './rest.js';
import { call } from './server.js';

const PAGE_TURNS = 30;

export class Conversation {
  /** Where what is shown begins: the first turns, or the earliest that are here. @type {import('./rest.js').Place} */
  root = /** @type {import('./rest.js').Place} */ (new Fork());
  /** Places by the episode that leads there. @type {Map<string, import('./rest.js').Place>} */
  forks = new Map();
  before = ''; // The earliest turn that is here, where there are earlier ones.

  /** @param {string} id Empty before the first message. @param {import('./turn.js').Page} page */
  constructor(id, page) {
    this.id = id;
    this.page = page;
    this.user = page.user;
  }

  /** Reads the next earlier turns, the newest first. @returns {Promise<Row[]>} */
  async read() {
    const query = new URLSearchParams({ limit: `${PAGE_TURNS}`, ...(this.before && { before: this.before }) });
    const response = await call(`/v1/conversations/${encodeURIComponent(this.id)}/turns?${query}`, { user: this.user });
    const { data, next_before: before } = await response.json();
    this.before = before ?? '';
    return data;
  }

  /** Takes in turns that are earlier than all that are here, the newest of them first. @param {Row[]} rows */
  add(rows) {
    const isFirst = this.root.turns.length === 0;
    for (const row of rows) {
      const fork = this.forkAfter(row.parent_id ?? '');
      // What broke off and was tried again in its place is no version that anybody asked for.
      const isAgain = fork.turns.some(({ prompt }) => prompt === row.question);
      if (row.status === 'failed' && isAgain && !this.forks.has(row.id)) continue;
      const turn = new Rest(row, fork, this.page, this.id);
      const next = this.forks.get(row.id); // What follows came before it.
      if (next) [turn.next, next.after] = [next, turn];
      // The newest version is shown, until another is chosen.
      if (fork.turns.unshift(turn) > 1) fork.shown += 1;
      for (const each of fork.turns.length > 1 ? fork.turns : []) each.count();
    }
    if (isFirst && rows.length) this.root = this.forkAfter(rows[0].parent_id ?? '');
    while (this.root.after) {
      const { after } = this.root;
      this.root = after.fork;
      this.root.shown = this.root.turns.indexOf(after);
    }
  }

  /** @param {string} episode */
  forkAfter(episode) {
    const fork = this.forks.get(episode) ?? /** @type {import('./rest.js').Place} */ (new Fork());
    fork.follows = episode;
    this.forks.set(episode, fork);
    return fork;
  }

  /** Has the conversation begin, where it has not. Whoever is somebody new since has a new one. */
  async begin() {
    if (this.id && this.user === this.page.user) return;
    this.user = this.page.user;
    const response = await call('/v1/conversations', { method: 'POST', body: {}, user: this.user });
    this.id = (await response.json()).id;
  }

  /** Where a turn stands, as the server is told. @param {import('./turn.js').Turn} turn */
  place(turn) {
    let { fork } = turn;
    while (fork.after && (fork.after.conversation !== this.id || !fork.after.episode)) fork = fork.after.fork;
    const parent = fork.after?.episode ?? fork.follows;
    return { conversation: this.id, ...(parent && { parent }) };
  }
}
