// @ts-check
/**
 * One question with its answer: streamed in, rated, corrected, asked again.
 *
 * @typedef {{delta?: {content?: string}, finish_reason?: string | null}} Choice
 * @typedef {{id: string, model: string, choices?: Choice[], error?: {message: string}}} Chunk
 * @typedef {{kind: 'thumb', value: number} | {kind: 'correction', text: string}
 *   | import('./reasons.js').Said} Feedback
 * @typedef {object} Page What a turn needs of the page around it.
 * @property {string} user
 * @property {() => boolean} isBusy
 * @property {(control: AbortController) => void} begin An answer is on its way.
 * @property {() => void} answered Its first word has come.
 * @property {(control: AbortController) => void} end
 * @property {(turn: Turn) => boolean} shows Whether it is on the screen.
 * @property {(text: string) => void} announce
 * @property {(prompt: string, fork: Fork<Turn>) => void} ask
 * @property {(turn: Turn) => void} edit Have its question in the composer, to be asked another way.
 * @property {(fork: Fork<Turn>, step: number) => void} show Another version.
 * @property {(turn: Turn) => void} takeBack Put an unanswered question back into the composer.
 * @property {() => void} letGo Stop following new text.
 */
import { Fork } from './branches.js';
import { showChanges } from './changes.js';
import { Invitation } from './invitation.js';
import { Markdown } from './markdown.js';
import { Reasons } from './reasons.js';
import { call, find, Problem, uuid } from './server.js';

/** The data of each event, which the server puts on one line. @param {Response} response */
async function* events(response) {
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (let part = await reader?.read(); part && !part.done; part = await reader?.read()) {
    const lines = (rest + part.value).split('\n');
    rest = lines.pop() ?? '';
    for (const line of lines) if (line.startsWith('data:')) yield line.slice(5).trim();
  }
}

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
function copy(id) {
  const { content } = find(document, id, HTMLTemplateElement);
  return find(document.importNode(content, true), '.message', HTMLElement);
}

/** One question with its answer, on the page and in memory. */
export class Turn {
  answer = '';
  episode = ''; // The server's name for this answer; feedback refers to it.
  thumb = 0; // The person's choice: -1, 0 (none) or 1.
  correction = ''; // The last one handed to save().
  queue = Promise.resolve();
  /** What did not arrive, by place and kind. @type {Map<string, {place: string, message: string, again: () => void}>} */
  unsaved = new Map();
  question = copy('#user-template');
  view = copy('#assistant-template');
  part = (/** @type {string} */ selector) => find(this.view, selector, HTMLElement);
  invitation = new Invitation(this.part('.invite'), this.part('.dismiss'), this.part('[data-thumb="1"]'));

  /** @param {string} prompt @param {Fork<Turn>} fork Its place. @param {Page} page */
  constructor(prompt, fork, page) {
    this.prompt = prompt;
    this.fork = fork;
    /** @type {Fork<Turn>} */
    this.next = new Fork(this);
    this.page = page;
    this.part('.regenerate').onclick = () => page.isBusy() || this.again('regenerated', () => page.ask(prompt, fork));
    find(this.question, '.resend', HTMLElement).onclick = () => page.edit(this);
    this.part('.earlier').onclick = () => page.show(fork, -1);
    this.part('.later').onclick = () => page.show(fork, 1);
    find(this.question, '.text', HTMLElement).textContent = prompt;
    this.shown = new Markdown(this.part('.text'));
    this.reasons = new Reasons(this.part('.reasons'), (said, done) => {
      this.save('.meta', said, () => (this.say('.meta', 'Saved'), done()));
    });
    this.part('.actions .copy').onclick = () => this.copy();
    this.part('.retry').onclick = () => page.isBusy() || this.run();
    this.part('.edit').onclick = () => page.takeBack(this);
    this.part('[data-thumb="1"]').onclick = () => this.toggleThumb(1);
    this.part('[data-thumb="-1"]').onclick = () => this.toggleThumb(-1);
    this.part('.correct').onclick = () => this.openEditor(this.part('.editor').hidden);
    this.part('.cancel').onclick = () => this.openEditor(false);
    this.part('.send-correction').onclick = () => this.sendCorrection();
    this.field = find(this.view, 'textarea', HTMLTextAreaElement);
    this.field.oninput = () => {
      this.correction = '';
      this.say('.editor', ''); // A Retry shown there would send the older text.
      void this.compare();
    };
  }

  /** Asks for the answer, the first time or again. */
  async run() {
    const control = new AbortController();
    this.page.begin(control);
    this.invitation.end();
    this.answer = this.episode = '';
    for (const line of ['.release', '.problem p']) this.part(line).textContent = '';
    this.shown.finish('');
    this.view.setAttribute('aria-busy', 'true');
    try {
      this.settle(await this.receive(control.signal));
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

  /** Streams the answer in; returns why it ended. @param {AbortSignal} signal */
  async receive(signal) {
    const options = { model: 'everloop', stream: true, stream_options: { include_usage: true } };
    const body = { ...options, user: this.page.user, messages: this.history() };
    let reason = '';
    for await (const data of events(await call('/v1/chat/completions', { method: 'POST', body, signal }))) {
      if (data === '[DONE]') return reason;
      const { id, model, choices, error } = /** @type {Chunk} */ (JSON.parse(data));
      if (error) throw new Problem(error.message);
      if (!this.episode) this.page.answered();
      this.episode = id;
      this.part('.release').textContent ||= `Answered by release ${model}`;
      const piece = choices?.[0]?.delta?.content ?? '';
      this.answer += piece;
      if (piece) this.shown.grow(this.answer);
      reason = choices?.[0]?.finish_reason ?? reason;
    }
    if (!reason) throw new Problem('The connection closed before the answer was complete.');
    return reason;
  }

  /** What led here, except questions without any answer: they would put two in a row. */
  history() {
    const earlier = this.fork.before().filter((turn) => turn.answer);
    const said = earlier.flatMap(({ prompt, answer }) => [
      { role: 'user', content: prompt },
      { role: 'assistant', content: answer },
    ]);
    return [...said, { role: 'user', content: this.prompt }];
  }

  /** @param {string} reason */
  settle(reason) {
    let note = this.answer ? '' : 'The answer came back empty.';
    if (reason === 'stopped') note = 'You stopped this answer.';
    if (reason === 'length') note = 'This answer reached its length limit.';
    this.part('.note').textContent = note;
    this.part('.actions').hidden = !this.episode;
    if (!this.page.shows(this)) return;
    this.page.announce(`Everloop: ${this.answer} ${note}`);
    if (this.episode) this.invitation.begin(this.episode, this.page.user);
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
    this.part('.problem p').textContent = known ? error.message : 'The answer broke off.';
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

  /** @param {number} value */
  toggleThumb(value) {
    this.thumb = this.thumb === value ? 0 : value;
    for (const each of [1, -1]) {
      this.part(`[data-thumb="${each}"]`).setAttribute('aria-pressed', `${each === this.thumb}`);
    }
    this.reasons.ask(this.thumb);
    const done = this.thumb ? 'Saved' : 'Withdrawn';
    this.save('.meta', { kind: 'thumb', value: this.thumb }, () => this.say('.meta', done));
  }

  /** @param {string} place @param {Feedback} feedback @param {() => void} done */
  save(place, feedback, done) {
    this.invitation.end();
    const key = uuid(); // One key for all tries: a lost reply must not make feedback count twice.
    const body = { episode_id: this.episode, user: this.page.user, ...feedback, idempotency_key: key };
    const attempt = async () => {
      this.say(place, 'Saving…');
      const request = { method: 'POST', body, signal: AbortSignal.timeout(20_000) };
      await call('/v1/feedback', request).then(
        () => {
          this.unsaved.delete(slot);
          done();
        },
        (error) => this.unsaved.set(slot, { place, message: error.message, again }),
      );
      this.sayUnsaved(place);
    };
    // In a queue, so that quick clicks cannot overtake each other on the way.
    const again = () => void (this.queue = this.queue.then(attempt));
    const slot = `${place} ${feedback.kind}`;
    this.unsaved.delete(slot); // What is said now takes its place.
    again();
  }

  /** Offers to try again what did not arrive, whatever else did. @param {string} place */
  sayUnsaved(place) {
    const left = [...this.unsaved.values()].filter((each) => each.place === place);
    if (!left.length) return;
    this.say(place, `Not saved. ${left[0].message}`, () => left.forEach(({ again }) => again()));
  }

  /** @param {string} place @param {string} line @param {() => void} [again] Offered as Retry. */
  say(place, line, again) {
    this.part(`${place} .state`).textContent = line;
    this.part(`${place} .again`).hidden = !again;
    this.part(`${place} .again`).onclick = again ?? null;
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
    if (!text || text === this.answer.trim()) return this.say('.editor', 'Change the text first.');
    if (text === this.correction) return this.part('.editor .again').click(); // Not a second one.
    this.correction = text;
    this.save('.editor', { kind: 'correction', text }, () => {
      this.say('.editor', 'Sent. Thank you.');
      this.part('.correct span').textContent = 'Corrected';
      if (this.field.value.trim() !== text) return; // Somebody goes on improving it.
      const isThere = this.part('.editor').contains(document.activeElement);
      this.openEditor(false, isThere);
    });
  }
}
