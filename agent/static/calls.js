// @ts-check
/**
 * What tools did for an answer: quiet lines to be opened, and a card where a call waits for a yes. All of it is words of
 * models and of strangers' programs: it enters the page as text nodes only.
 *
 * @typedef {object} ToolCall As the server tells it.
 * @property {string} id
 * @property {string} tool
 * @property {string} source
 * @property {unknown} arguments
 * @property {string} status
 * @property {string | null} result
 * @property {string | null} error
 * @property {number | null} ms
 * @property {string} [expires_at]
 *
 * @typedef {{step?: number, text?: string, calls?: ToolCall[], continues?: string, stop?: string}} Step
 */
import { call, copyOf, find, Problem } from './server.js';

const SAYS = /** @type {Record<string, string>} */ ({
  waiting: 'to be called',
  running: 'working …',
  pending: 'waits for your yes',
  denied: 'not allowed',
  off: 'turned off',
  timed_out: 'took too long',
  skipped: 'not made',
  handed_over: 'handed over',
  interrupted: 'given up',
  invalid: 'could not be made',
  unknown: 'there is no such tool',
  error: 'failed',
});

/** @param {unknown} value */
const written = (value) => (typeof value === 'string' ? value : JSON.stringify(value, null, 2));

/** @param {ToolCall} made */
function outcome({ status, ms }) {
  const took = ms === null ? '' : ms < 1000 ? `${Math.max(1, Math.round(ms))} ms` : `${(ms / 1000).toFixed(1)} s`;
  return [SAYS[status] ?? '', took].filter(Boolean).join(', ');
}

/** Whether somebody can still say yes to it. @param {ToolCall} made */
const waits = ({ status, expires_at: until }) => status === 'pending' && (!until || new Date(until) > new Date());

export class Calls {
  /** Those that wait for a yes, by id. @type {Map<string, HTMLElement>} */
  asking = new Map();
  /** By step. @type {Map<number, HTMLElement>} */
  shown = new Map();

  /**
   * @param {HTMLElement} place
   * @param {() => string} user
   * @param {() => boolean} isBusy Whether an answer is on its way: then none can go on.
   * @param {() => void} goOn Every call is decided.
   */
  constructor(place, user, isBusy, goOn) {
    this.place = place;
    this.user = user;
    this.isBusy = isBusy;
    this.goOn = goOn;
  }

  get isAsking() {
    return this.asking.size > 0;
  }

  clear() {
    this.asking.clear();
    this.shown.clear();
    this.place.replaceChildren();
    this.place.hidden = true;
  }

  /** Shows a step, or what has become of it. @param {Step} step */
  show(step) {
    if (!step.calls) return;
    const number = step.step ?? 0;
    const block = document.createElement('div');
    block.append(...step.calls.map((made) => this.line(made)));
    const before = this.shown.get(number);
    if (before) before.replaceWith(block);
    else this.place.append(block);
    this.shown.set(number, block);
    this.place.hidden = false;
  }

  /** Shows what the model said beside the calls of a step. @param {Step} step */
  tell(step) {
    const block = this.shown.get(step.step ?? 0);
    if (!block || !step.text?.trim()) return;
    const said = document.createElement('p');
    said.textContent = step.text.trim();
    block.prepend(said);
  }

  /** @param {ToolCall} made */
  line(made) {
    const view = find(copyOf('#call-template'), '.call', HTMLElement);
    find(view, '.tool', HTMLElement).textContent = made.tool || 'a call';
    find(view, '.outcome', HTMLElement).textContent = outcome(made);
    find(view, '.asked', HTMLElement).textContent = written(made.arguments);
    const said = find(view, '.returned', HTMLElement);
    const text = made.error === null ? made.result : `Error: ${made.error}`;
    said.textContent = text;
    for (const each of view.querySelectorAll('.of-result')) each.toggleAttribute('hidden', text === null);
    if (!waits(made)) return view;
    const card = find(copyOf('#ask-template'), '.ask', HTMLElement);
    find(card, '.tool', HTMLElement).textContent = made.tool;
    find(card, '.source', HTMLElement).textContent = made.source;
    find(card, '.asked', HTMLElement).textContent = written(made.arguments);
    find(card, '.approve', HTMLElement).onclick = () => void this.decide(made, card, 'approve');
    find(card, '.deny', HTMLElement).onclick = () => void this.decide(made, card, 'deny');
    this.asking.set(made.id, card);
    return card;
  }

  /** @param {ToolCall} made @param {HTMLElement} card @param {'approve' | 'deny'} decision */
  async decide(made, card, decision) {
    const state = find(card, '.state', HTMLElement);
    const buttons = find(card, '.buttons', HTMLElement);
    if (this.isBusy()) return void (state.textContent = 'Another answer is on its way; say it when that has ended.');
    buttons.hidden = true;
    state.textContent = '';
    try {
      const path = `/v1/tool_calls/${encodeURIComponent(made.id)}`;
      await call(path, { method: 'POST', body: { decision }, user: this.user() });
    } catch (error) {
      state.textContent = error instanceof Problem ? error.message : 'That could not be saved.';
      // Given up, or decided elsewhere: asking again changes nothing.
      buttons.hidden = error instanceof Problem && error.code.startsWith('tool_call_');
      return;
    }
    state.textContent = decision === 'approve' ? 'Allowed' : 'Not allowed';
    this.asking.delete(made.id);
    if (!this.isAsking) this.goOn();
  }
}
