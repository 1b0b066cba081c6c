// @ts-check
/**
 * The chat page: one conversation, kept in memory; thumbs and corrections go to the server.
 * What people write enters the page only as text nodes; what models write is Markdown, sanitised.
 *
 * @typedef {{delta?: {content?: string}, finish_reason?: string | null}} Choice
 * @typedef {{id: string, model: string, choices?: Choice[], error?: {message: string}}} Chunk
 * @typedef {{kind: 'thumb', value: number} | {kind: 'correction', text: string}
 *   | import('./reasons.js').Said} Feedback
 */
import { Invitation } from './invitation.js';
import { Markdown } from './markdown.js';
import { Reasons } from './reasons.js';
import { call, find, Problem, uuid, whoAsks } from './server.js';

const [scroller, empty, messages, live, latest, stopButton, newChat] = [
  '#scroller', '#empty', '#messages', '#live', '#latest', '#stop', '#new-chat',
].map((selector) => find(document, selector, HTMLElement));
const draft = find(document, '#prompt', HTMLTextAreaElement);
const sendButton = find(document, '#send', HTMLButtonElement);

let turns = /** @type {Turn[]} */ ([]);
let active = /** @type {AbortController | null} */ (null); // Ends the answer being streamed.
let stuck = true; // Follow new text until the person scrolls up.
let lastTop = 0;
const user = whoAsks();

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

/** Whether a text reached the clipboard; insecure origins have none. @param {string} text */
const copied = (text) => navigator.clipboard?.writeText(text).then(() => true, () => false) ?? Promise.resolve(false);

/** A new message from its template. @param {string} id */
function copy(id) {
  const { content } = find(document, id, HTMLTemplateElement);
  return find(document.importNode(content, true), '.message', HTMLElement);
}

/** One question with its answer, on the page and in memory. */
class Turn {
  answer = '';
  episode = ''; // The server's name for this answer; feedback refers to it.
  thumb = 0; // The person's choice: -1, 0 (none) or 1.
  correction = ''; // The last one handed to save().
  queue = Promise.resolve();
  question = copy('#user-template');
  view = copy('#assistant-template');
  part = (/** @type {string} */ selector) => find(this.view, selector, HTMLElement);
  invitation = new Invitation(this.part('.invite'), this.part('.dismiss'), this.part('[data-thumb="1"]'));

  /** @param {string} prompt */
  constructor(prompt) {
    this.prompt = prompt;
    find(this.question, '.text', HTMLElement).textContent = prompt;
    this.shown = new Markdown(this.part('.text'));
    this.reasons = new Reasons(this.part('.reasons'), (said, done) => {
      this.save('.meta', said, () => (this.say('.meta', 'Saved'), done()));
    });
    this.part('.actions .copy').onclick = () => this.copy();
    this.part('.retry').onclick = () => active || this.run();
    this.part('.edit').onclick = () => this.takeBack();
    this.part('[data-thumb="1"]').onclick = () => this.toggleThumb(1);
    this.part('[data-thumb="-1"]').onclick = () => this.toggleThumb(-1);
    this.part('.correct').onclick = () => this.openEditor(this.part('.editor').hidden);
    this.part('.cancel').onclick = () => this.openEditor(false);
    this.part('.send-correction').onclick = () => this.sendCorrection();
    this.field = find(this.view, 'textarea', HTMLTextAreaElement);
    this.field.oninput = () => {
      this.correction = '';
      this.say('.editor', ''); // A Retry shown there would send the older text.
    };
  }

  /** Asks for the answer, the first time or again. */
  async run() {
    const control = new AbortController();
    refresh(control);
    draft.focus(); // The button that started this may be gone by now.
    this.invitation.end();
    this.answer = this.episode = live.textContent = '';
    for (const line of ['.release', '.problem p']) this.part(line).textContent = '';
    this.shown.finish('');
    this.view.setAttribute('aria-busy', 'true');
    lastTop = 0; // A page that shrinks here moves up by itself; that is nobody scrolling away.
    try {
      this.settle(await this.receive(control.signal));
    } catch (error) {
      if (!control.signal.aborted) this.fail(error);
      else if (this.answer) this.settle('stopped');
      else this.fail(new Problem('Stopped before the answer began.'));
      control.abort(); // Lets go of a stream that was not read to its end.
    }
    this.shown.finish(this.answer);
    this.view.removeAttribute('aria-busy');
    if (active === control) refresh(null);
  }

  /** Streams the answer in; returns why it ended. @param {AbortSignal} signal */
  async receive(signal) {
    const options = { model: 'everloop', stream: true, stream_options: { include_usage: true } };
    const body = { ...options, user, messages: this.history() };
    let reason = '';
    for await (const data of events(await call('/v1/chat/completions', { method: 'POST', body, signal }))) {
      if (data === '[DONE]') return reason;
      const { id, model, choices, error } = /** @type {Chunk} */ (JSON.parse(data));
      if (error) throw new Problem(error.message);
      if (!this.episode) keepDraft(); // Until an answer begins, a reload brings the question back.
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

  /** What is on the screen, except questions without any answer: they would put two in a row. */
  history() {
    const earlier = turns.slice(0, turns.indexOf(this)).filter((turn) => turn.answer);
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
    if (!turns.includes(this)) return;
    live.textContent = `Everloop: ${this.answer} ${note}`;
    if (this.episode) this.invitation.begin(this.episode, user);
  }

  async copy() {
    const button = this.part('.actions .copy');
    const isCopied = await copied(this.answer);
    button.textContent = isCopied ? 'Copied' : 'Not copied';
    if (isCopied) this.hint('copied');
    setTimeout(() => (button.textContent = 'Copy'), 2000);
  }

  /** Tells what a person did with the answer; nobody misses it where it is lost. @param {string} name */
  hint(name) {
    const body = { episode_id: this.episode, user, kind: 'implicit', name, idempotency_key: uuid() };
    call('/v1/feedback', { method: 'POST', body }).catch(() => {});
  }

  /** @param {unknown} error */
  fail(error) {
    const known = error instanceof Problem;
    if (!known) console.error(error); // A lost connection or an unreadable chunk: keep the cause.
    this.part('.problem p').textContent = known ? error.message : 'The answer broke off.';
  }

  /** Puts an unanswered question back into the composer, before anything typed since. */
  takeBack() {
    turns = turns.filter((turn) => turn !== this);
    for (const part of [this.question, this.view]) part.remove();
    draft.value = [this.prompt, draft.value].filter(Boolean).join('\n');
    keepDraft();
    refresh();
    draft.focus();
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
    const body = { episode_id: this.episode, user, ...feedback, idempotency_key: key };
    const attempt = async () => {
      this.say(place, 'Saving…');
      const request = { method: 'POST', body, signal: AbortSignal.timeout(20_000) };
      await call('/v1/feedback', request).then(done, (error) =>
        this.say(place, `Not saved. ${error.message}`, again));
    };
    // In a queue, so that quick clicks cannot overtake each other on the way.
    const again = () => void (this.queue = this.queue.then(attempt));
    again();
  }

  /** @param {string} place @param {string} line @param {() => void} [again] Offered as Retry. */
  say(place, line, again) {
    this.part(`${place} .state`).textContent = line;
    this.part(`${place} .again`).hidden = !again;
    this.part(`${place} .again`).onclick = again ?? null;
  }

  /** @param {boolean} open */
  openEditor(open) {
    this.part('.editor').hidden = !open;
    this.part('.correct').setAttribute('aria-expanded', `${open}`);
    if (!open) return this.part('.correct').focus();
    stuck = false; // Growing the page below must not push the editor out of sight.
    this.field.value ||= this.answer; // A correction left half-written is still there.
    this.field.focus();
    this.part('.editor').scrollIntoView({ block: 'nearest' });
  }

  sendCorrection() {
    const text = this.field.value.trim();
    if (!text || text === this.answer.trim()) return this.say('.editor', 'Change the text first.');
    if (text === this.correction) return this.part('.editor .again').click(); // Not a second one.
    this.correction = text;
    this.save('.editor', { kind: 'correction', text }, () => {
      this.say('.editor', 'Sent. Thank you.');
      this.part('.correct span').textContent = 'Corrected';
      this.openEditor(false);
    });
  }
}

/** What is being written survives a reload. */
function keepDraft() {
  try {
    localStorage.setItem('everloop.draft', draft.value);
  } catch { /* No storage, or no room in it: the draft then lasts as long as the page. */ }
}

/** @param {string} prompt */
function ask(prompt) {
  const turn = new Turn(prompt);
  turns.push(turn);
  messages.append(turn.question, turn.view);
  stuck = true;
  turn.run();
}

/** Brings the controls up to date. @param {AbortController | null} control */
function refresh(control = active) {
  if (!control && document.activeElement === stopButton) draft.focus(); // It is about to hide.
  active = control;
  empty.hidden = turns.length > 0;
  document.body.classList.toggle('busy', active !== null); // Shows Stop in place of Send.
  sendButton.disabled = !draft.value.trim();
}

messages.onclick = async (/** @type {MouseEvent} */ { target }) => {
  const button = target instanceof Element ? target.closest('.code .copy') : null;
  const code = button?.closest('.code')?.querySelector('code')?.textContent;
  if (!button || code === null || code === undefined) return;
  button.textContent = (await copied(code)) ? 'Copied' : 'Not copied';
  setTimeout(() => (button.textContent = 'Copy'), 2000);
};

const toBottom = () => scroller.scrollTo(0, scroller.scrollHeight);
const gap = () => scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop;
const growth = new ResizeObserver(() => (stuck ? toBottom() : (latest.hidden = gap() < 24)));
for (const box of [messages, scroller]) growth.observe(box);
scroller.onscroll = () => {
  // The least move up lets go, or each new word would fight a slow wheel.
  stuck = scroller.scrollTop < lastTop ? gap() < 2 : stuck || gap() < 24;
  lastTop = scroller.scrollTop;
  latest.hidden = stuck;
};
latest.onclick = toBottom;

find(document, '#composer', HTMLFormElement).onsubmit = (event) => {
  event.preventDefault();
  const prompt = draft.value.trim();
  if (active || !prompt) return; // One answer at a time; the draft waits.
  draft.value = '';
  ask(prompt);
};
draft.oninput = () => {
  keepDraft();
  refresh();
};
draft.onkeydown = (/** @type {KeyboardEvent} */ event) => {
  // Enter also ends a word in an input method; Safari marks that one by its key code only.
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  sendButton.click();
};
document.onkeydown = (event) => {
  if (event.key !== 'Escape' || event.isComposing) return;
  const turn = turns.find(({ view }) => view.contains(document.activeElement));
  if (turn && !turn.part('.editor').hidden) turn.openEditor(false);
  else active?.abort();
};
stopButton.onclick = () => active?.abort();
newChat.onclick = () => {
  active?.abort();
  for (const turn of turns) turn.invitation.end();
  turns = [];
  messages.replaceChildren();
  refresh(null);
  draft.focus();
};
for (const example of document.querySelectorAll('.example')) {
  example.addEventListener('click', () => ask(example.textContent ?? ''));
}
try {
  draft.value = localStorage.getItem('everloop.draft') ?? '';
} catch { /* As above. */ }
refresh();
