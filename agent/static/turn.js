// @ts-check
/**
 * One question with its answer: streamed in, rated, corrected, asked again.
 *
 * @typedef {{delta?: {content?: string}, finish_reason?: string | null}} Choice
 * @typedef {{id: string, model: string, choices?: Choice[], error?: {message: string}, step?: Step}} Chunk
 * @typedef {import('./calls.js').Step} Step
 * @typedef {object} Page What a turn needs of the page around it.
 * @property {string} user
 * @property {() => boolean} isBusy
 * @property {(control: AbortController) => void} begin An answer is on its way.
 * @property {(turn: Turn) => Promise<{conversation?: string, parent?: string} | null>} place Where it is kept; null: nowhere.
 * @property {() => void} answered Its first word has come.
 * @property {(control: AbortController) => void} end
 * @property {(turn: Turn) => boolean} shows Whether it is on the screen.
 * @property {(text: string) => void} announce
 * @property {(prompt: string, fork: import('./rest.js').Place) => void} ask
 * @property {(turn: Turn) => void} edit Have its question in the composer, to be asked another way.
 * @property {(fork: import('./rest.js').Place, step: number) => void} show Another version.
 * @property {(turn: Turn) => void} offer Another answer beside it, to choose from.
 * @property {(turn: Turn) => void} takeBack Put an unanswered question back into the composer.
 * @property {() => void} letGo Stop following new text.
 */
import { Fork } from './branches.js';
import { Calls } from './calls.js';
import { showChanges } from './changes.js';
import { Countdown } from './countdown.js';
import { Invitation } from './invitation.js';
import { Markdown } from './markdown.js';
import { Reasons } from './reasons.js';
import { Recall, usedIn } from './recall.js';
import { Saving } from './saving.js';
import { call, copyOf, events, find, Problem, unless, uuid } from './server.js';

const MAX_EARLIER = 250; // Two messages each; the server takes 512.
const BUSY = 'Too many questions just now.';

/**
 * Copies a text and has its button say so for a while; whether it reached the clipboard, which insecure origins lack.
 *
 * @param {Element} button @param {string} text @param {(text: string) => void} announce
 */
export async function copied(button, text, announce) {
  const isCopied = (await navigator.clipboard?.writeText(text).then(() => true, () => false)) ?? false;
  button.textContent = isCopied ? 'Copied' : 'Not copied';
  announce(button.textContent);
  setTimeout(() => (button.textContent = 'Copy'), 2000);
  return isCopied;
}

/** A new message from its template. @param {string} id */
const copy = (id) => find(copyOf(id), '.message', HTMLElement);

/** One question with its answer, on the page and in memory. */
export class Turn {
  answer = '';
  episode = ''; // The server's name for this answer; feedback refers to it.
  conversation = ''; // In which it is kept, if it is.
  isUnkept = false; // The server could not keep it.
  thumb = 0; // The person's choice: -1, 0 (none) or 1.
  correction = ''; // The last one handed to save().
  question = copy('#user-template');
  view = copy('#assistant-template');
  part = (/** @type {string} */ selector) => find(this.view, selector, HTMLElement);
  saving = new Saving(this.view, () => ({ episode_id: this.episode, user: this.page.user }));
  countdown = new Countdown(this.part('.wait'), () => this.runIfPossible());
  invitation = new Invitation(
    this.part('.invite'), this.part('.another'), this.part('.dismiss'), this.part('[data-thumb="1"]'),
  );
  recall = new Recall(
    this.part('.recall'), this.part('.pin'),
    () => ({ episode: this.episode, conversation: this.conversation, user: this.page.user }),
    (text) => (this.saving.say('.meta', text), this.page.announce(text)),
  );
  pair = /** @type {import('./pair.js').Pair | null} */ (null); // While it is to be chosen from two.
  row = /** @type {import('./conversation.js').Row | null} */ (null); // As the server told of it, while that is all.

  /** @param {string} prompt @param {import('./rest.js').Place} fork Its place. @param {Page} page */
  constructor(prompt, fork, page) {
    this.prompt = prompt;
    this.fork = fork;
    /** @type {import('./rest.js').Place} */
    this.next = new Fork(this);
    this.page = page;
    this.part('.regenerate').onclick = () => page.isBusy() || this.again('regenerated', () => page.ask(prompt, fork));
    find(this.question, '.resend', HTMLElement).onclick = () => page.edit(this);
    this.part('.earlier').onclick = () => page.show(fork, -1);
    this.part('.later').onclick = () => page.show(fork, 1);
    find(this.question, '.text', HTMLElement).textContent = prompt;
    this.shown = new Markdown(this.part('.text'));
    this.calls = new Calls(this.part('.calls'), () => page.user, page.isBusy, () => void this.run(this.episode));
    this.reasons = new Reasons(this.part('.reasons'), (said, done) => {
      this.save('.meta', said, () => (this.saving.say('.meta', 'Saved'), done()));
    });
    this.part('.another').onclick = () => page.isBusy() || page.offer(this);
    this.part('.actions .copy').onclick = () => this.copy();
    this.part('.retry').onclick = () => this.runIfPossible();
    this.part('.leave').onclick = () => this.giveUp();
    this.part('.edit').onclick = () => page.takeBack(this);
    this.part('[data-thumb="1"]').onclick = () => this.toggleThumb(1);
    this.part('[data-thumb="-1"]').onclick = () => this.toggleThumb(-1);
    this.part('.correct').onclick = () => this.openEditor(this.part('.editor').hidden);
  }

  /** Where a correction is written; on the page from its first use on. */
  get field() {
    const editor = this.part('.editor');
    if (!editor.firstElementChild) this.fillEditor(editor);
    return find(editor, 'textarea', HTMLTextAreaElement);
  }

  /** @param {HTMLElement} editor */
  fillEditor(editor) {
    editor.append(copyOf('#editor-template'));
    this.part('.cancel').onclick = () => this.openEditor(false);
    this.part('.send-correction').onclick = () => this.sendCorrection();
    this.field.oninput = () => {
      this.correction = '';
      this.saving.say('.editor', ''); // A Retry shown there would send the older text.
      void this.compare();
    };
  }

  /** Asks for the answer, the first time or again. @param {string} from The episode that it goes on from, if it does. */
  async run(from = '') {
    const control = new AbortController();
    this.page.begin(control);
    this.leave();
    this.view.classList.remove('waits');
    this.answer = this.episode = '';
    if (!from) {
      this.calls.clear();
      this.recall.show(null);
    }
    for (const line of ['.release', '.problem p']) this.part(line).textContent = '';
    this.shown.finish('');
    this.view.setAttribute('aria-busy', 'true');
    try {
      this.settle(await this.receive(control.signal, from));
    } catch (error) {
      if (!control.signal.aborted) this.fail(error);
      else if (this.answer) this.settle('stopped');
      else this.fail(new Problem('Stopped before the answer began.'));
      control.abort(); // Lets go of a stream that was not read to its end.
    }
    try {
      this.shown.finish(this.answer);
    } finally {
      this.view.removeAttribute('aria-busy');
      this.page.end(control);
    }
  }

  /** Streams the answer in; returns why it ended. @param {AbortSignal} signal @param {string} from */
  async receive(signal, from) {
    let reason = '';
    let step = /** @type {Step | null} */ (null); // The last one, of which nothing followed yet.
    const response = await (from ? this.goOn(from, signal) : this.begin(signal));
    if (!from) this.recall.show(usedIn(response));
    for await (const data of events(response)) {
      if (data === '[DONE]') return reason;
      const { id, model, choices, error, step: news } = /** @type {Chunk} */ (JSON.parse(data));
      if (news) this.calls.show((step = news));
      if (error) throw new Problem(error.message);
      if (!this.episode) this.page.answered();
      this.episode = id;
      this.part('.release').textContent ||= `Answered by release ${model}`;
      const piece = choices?.[0]?.delta?.content ?? '';
      if (piece && step) { // What was said before belongs to the step.
        this.calls.tell(step);
        this.answer = '';
        step = null;
      }
      this.answer += piece;
      if (piece) this.shown.grow(this.answer);
      reason = choices?.[0]?.finish_reason ?? reason;
    }
    if (!reason) throw new Problem('The connection closed before the answer was complete.');
    return reason;
  }

  /** @param {AbortSignal} signal */
  async begin(signal) {
    const options = { model: 'everloop', stream: true, stream_options: { include_usage: true, include_steps: true } };
    const place = await unless(signal, this.page.place(this));
    this.conversation = place?.conversation ?? '';
    this.isUnkept = place === null;
    const body = { ...options, user: this.page.user, messages: this.history(), ...place };
    return call('/v1/chat/completions', { method: 'POST', body, signal });
  }

  /** @param {string} from @param {AbortSignal} signal */
  goOn(from, signal) {
    const body = { stream: true, stream_options: { include_steps: true } };
    const path = `/v1/chat/completions/${encodeURIComponent(from)}/continue`;
    return call(path, { method: 'POST', body, signal, user: this.page.user });
  }

  /** What led here and the server does not have, except questions without any answer: they would put two in a row. */
  history() {
    const led = this.fork.before().filter((turn) => turn.answer);
    const isKept = led.every(({ conversation, episode }) => episode && this.conversation && conversation === this.conversation);
    const earlier = isKept ? [] : led.slice(-MAX_EARLIER);
    const said = earlier.flatMap(({ prompt, answer }) => [
      { role: 'user', content: prompt },
      { role: 'assistant', content: answer },
    ]);
    return [...said, { role: 'user', content: this.prompt }];
  }

  /** @param {string} reason */
  settle(reason) {
    const note = this.close(reason);
    if (!this.page.shows(this)) return;
    this.page.announce(`Everloop: ${this.answer} ${note}`);
    if (this.episode && !this.pair && !this.calls.isAsking) this.invitation.begin(this.episode, this.page.user);
  }

  /** Says how the answer ended, and offers what can be done with it. @param {string} reason */
  close(reason) {
    let note = this.answer ? '' : 'The answer came back empty.';
    if (reason === 'stopped') note = 'You stopped this answer.';
    if (reason === 'tool_calls') note = this.calls.isAsking ? 'It waits for your yes.' : 'Nobody said yes in time.';
    if (reason === 'length') note = 'This answer reached its length limit.';
    if (this.isUnkept) note = `${note} It is not in the list: chats could not be kept just then.`.trim();
    this.part('.note').textContent = note;
    this.part('.actions').hidden = !this.episode || this.calls.isAsking;
    this.recall.press(false);
    return note;
  }

  /** Becomes a turn of before, as the server tells it. @param {import('./conversation.js').Row} row */
  restore(row) {
    this.row = row;
    [this.answer, this.episode] = [row.answer, row.id];
    for (const step of row.steps) {
      this.calls.show(step);
      if (step.text !== row.answer || row.finish_reason !== 'tool_calls') this.calls.tell(step);
    }
    this.shown.finish(row.answer);
    this.part('.release').textContent = `Answered by release ${row.release}`;
    this.close(row.status === 'interrupted' ? 'stopped' : row.finish_reason ?? '');
    if (row.status === 'failed') {
      this.part('.note').textContent = '';
      this.part('.problem p').textContent = 'The answer broke off.';
    }
    this.recall.show(row.used);
    void this.recall.look();
    this.thumb = row.thumb;
    this.showThumb();
    if (row.reasons.length) this.reasons.show(row.thumb, row.reasons);
    if (row.correction === null) return;
    this.correction = this.field.value = row.correction;
    this.part('.correct span').textContent = 'Corrected';
  }

  /** Stops waiting for anything. */
  leave() {
    this.invitation.end();
    this.countdown.stop();
  }

  runIfPossible() {
    if (this.page.isBusy() || !this.page.shows(this)) return false;
    void this.run();
    return true;
  }

  giveUp() {
    this.countdown.stop();
    this.view.classList.remove('waits');
    this.part('.retry').focus(); // The button that was pressed is gone.
  }

  async copy() {
    if (await copied(this.part('.actions .copy'), this.answer, this.page.announce)) this.hint('copied');
  }

  /** Tells what a person did with the answer; nobody misses it where it is lost. @param {string} name */
  hint(name) {
    const body = { episode_id: this.episode, user: this.page.user, kind: 'implicit', name, idempotency_key: uuid() };
    call('/v1/feedback', { method: 'POST', body }).catch(() => {});
  }

  /** @param {unknown} error */
  fail(error) {
    const known = error instanceof Problem;
    if (!known) console.error(error); // A lost connection or an unreadable chunk: keep the cause.
    const wait = known ? error.wait : 0;
    const busy = known && wait ? (error.isBusy ? BUSY : error.plain) : '';
    this.part('.problem p').textContent = busy || (known ? error.message : 'The answer broke off.');
    this.view.classList.toggle('waits', wait > 0);
    if (wait) this.countdown.start(wait);
  }

  /** Asks another way; what it says of this answer is told. @param {string} act @param {() => void} ask */
  again(act, ask) {
    if (this.episode) this.hint(act);
    ask();
  }

  /** Says which of how many versions this is. */
  count() {
    const { turns } = this.fork;
    this.part('.versions').hidden = turns.length < 2;
    this.part('.versions span').textContent = `${turns.indexOf(this) + 1}/${turns.length}`;
  }

  /** Says that this answer is better than another one to the same question. @param {Turn} other */
  prefer(other) {
    this.save('.meta', { kind: 'preference', over: other.episode }, () => this.saving.say('.meta', 'Saved'));
  }

  /** @param {number} value */
  toggleThumb(value) {
    this.thumb = this.thumb === value ? 0 : value;
    this.showThumb();
    this.reasons.ask(this.thumb);
    const done = this.thumb ? 'Saved' : 'Withdrawn';
    this.save('.meta', { kind: 'thumb', value: this.thumb }, () => this.saving.say('.meta', done));
  }

  showThumb() {
    for (const each of [1, -1]) {
      this.part(`[data-thumb="${each}"]`).setAttribute('aria-pressed', `${each === this.thumb}`);
    }
  }

  /** @param {string} place @param {import('./saving.js').Feedback} feedback @param {() => void} done */
  save(place, feedback, done) {
    this.invitation.end();
    this.saving.save(place, feedback, done);
  }

  /** @param {boolean} open @param {boolean} takesFocus Back to its button, when it closes. */
  openEditor(open, takesFocus = true) {
    this.part('.editor').hidden = !open;
    this.part('.correct').setAttribute('aria-expanded', `${open}`);
    if (!open && takesFocus) this.part('.correct').focus();
    if (!open) return;
    this.page.letGo(); // Growing the page below must not push the editor out of sight.
    this.field.value ||= this.answer; // A correction left half-written is still there.
    void this.compare();
    this.field.focus();
    this.part('.editor').scrollIntoView({ block: 'nearest' });
  }

  /** Shows what the correction changes; it can be sent without. */
  compare() {
    return showChanges(this.part('.changes'), this.answer, this.field.value).catch((error) => console.error(error));
  }

  sendCorrection() {
    const text = this.field.value.trim();
    if (!text || text === this.answer.trim()) return this.saving.say('.editor', 'Change the text first.');
    if (text === this.correction) return this.openEditor(false); // Not a second one.
    this.correction = text;
    this.save('.editor', { kind: 'correction', text }, () => {
      this.saving.say('.editor', 'Sent. Thank you.');
      this.part('.correct span').textContent = 'Corrected';
      if (this.field.value.trim() !== text) return; // Somebody goes on improving it.
      const isThere = this.part('.editor').contains(document.activeElement);
      this.openEditor(false, isThere);
    });
  }
}
