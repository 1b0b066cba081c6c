// @ts-check
/**
 * The chat page: one conversation with its versions, kept in memory; thumbs and corrections go to the server.
 * What people write enters the page only as text nodes; what models write is Markdown, sanitised.
 */
import { Fork } from './branches.js';
import { find, whoAsks } from './server.js';
import { copied, Turn } from './turn.js';

const [scroller, empty, messages, live, latest, stopButton, newChat, editing] = [
  '#scroller', '#empty', '#messages', '#live', '#latest', '#stop', '#new-chat', '#editing',
].map((selector) => find(document, selector, HTMLElement));
const draft = find(document, '#prompt', HTMLTextAreaElement);
const sendButton = find(document, '#send', HTMLButtonElement);

let root = /** @type {Fork<Turn>} */ (new Fork());
let edited = /** @type {Turn | null} */ (null); // Whose question is in the composer, to be asked another way.
let kept = ''; // What was in the composer before that.
let active = /** @type {AbortController | null} */ (null); // Ends the answer being streamed.
let stuck = true; // Follow new text until the person scrolls up.
let lastTop = 0;

/** @type {import('./turn.js').Page} */
const page = {
  get user() { // Another page of this browser may have been forgotten meanwhile.
    return whoAsks();
  },
  isBusy: () => active !== null,
  begin(control) {
    refresh(control);
    draft.focus(); // The button that started this may be gone by now.
    live.textContent = '';
    lastTop = 0; // A page that shrinks here moves up by itself; that is nobody scrolling away.
  },
  answered: keepDraft, // Until then, a reload brings the question back.
  end: (control) => active === control && refresh(null),
  shows: (turn) => root.path().includes(turn),
  announce: (text) => (live.textContent = text),
  ask,
  edit(turn) {
    edit(turn);
    draft.focus();
  },
  show(fork, step) {
    if (active) return;
    edit(null);
    fork.step(step);
    draw();
    // The button that was pressed went with its version.
    fork.turns[fork.shown].part(step < 0 ? '.earlier' : '.later').focus();
    live.textContent = `Version ${fork.shown + 1} of ${fork.turns.length}`;
  },
  /** Before anything typed since; a question that others follow stays where it is, too. */
  takeBack(turn) {
    edit(null);
    if (!turn.next.turns.length) turn.fork.remove(turn);
    draft.value = [turn.prompt, draft.value].filter(Boolean).join('\n');
    keepDraft();
    draw();
    refresh();
    draft.focus();
  },
  letGo: () => (stuck = false),
};

/** What is being written survives a reload. */
function keepDraft() {
  try {
    localStorage.setItem('everloop.draft', (edited && kept) || draft.value);
  } catch { /* No storage, or no room in it: the draft then lasts as long as the page. */ }
}

/** @param {string} prompt @param {Fork<Turn>} fork Where: at the end, or beside another version. */
function ask(prompt, fork = root.path().at(-1)?.next ?? root) {
  const turn = new Turn(prompt, fork, page);
  fork.add(turn);
  edit(null);
  draw();
  stuck = true;
  turn.run();
}

/** Begins to ask a question another way, or leaves that: then what was being written before is back. @param {Turn | null} turn */
function edit(turn) {
  if (turn && !edited) kept = draft.value;
  if (turn) draft.value = turn.prompt;
  else if (edited) draft.value = kept;
  edited = turn;
  editing.hidden = turn === null;
  refresh();
}

/** Puts the shown versions on the page; what stays is not touched. */
function draw() {
  const path = root.path();
  for (const turn of path) turn.count();
  const wanted = path.flatMap(({ question, view }) => [question, view]);
  for (const part of [...messages.children]) if (!wanted.includes(/** @type {HTMLElement} */ (part))) part.remove();
  messages.append(...wanted.slice(messages.children.length));
}

/** Brings the controls up to date. @param {AbortController | null} control */
function refresh(control = active) {
  if (!control && document.activeElement === stopButton) draft.focus(); // It is about to hide.
  active = control;
  empty.hidden = root.turns.length > 0;
  document.body.classList.toggle('busy', active !== null); // Shows Stop in place of Send.
  sendButton.disabled = !draft.value.trim();
}

function stopEditing() {
  edit(null);
  keepDraft();
  draft.focus();
}

messages.onclick = async (/** @type {MouseEvent} */ { target }) => {
  const button = target instanceof Element ? target.closest('.code .copy') : null;
  const code = button?.closest('.code')?.querySelector('code')?.textContent;
  if (!button || code === null || code === undefined) return;
  await copied(button, code, page.announce);
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
  const before = edited;
  if (before) return before.again('edited_and_resent', () => ask(prompt, before.fork));
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
  const turn = root.path().find(({ view }) => view.contains(document.activeElement));
  if (turn && !turn.part('.editor').hidden) turn.openEditor(false);
  else if (active) active.abort();
  else if (edited) stopEditing();
};
find(editing, 'button', HTMLElement).onclick = stopEditing;
stopButton.onclick = () => active?.abort();
newChat.onclick = () => {
  active?.abort();
  for (const turn of root.path()) turn.invitation.end();
  root = new Fork();
  edit(null);
  draw();
  refresh(null);
  draft.focus();
};
for (const example of document.querySelectorAll('.example')) {
  example.addEventListener('click', () => ask(example.textContent ?? ''));
}
try {
  draft.value ||= localStorage.getItem('everloop.draft') ?? ''; // Whoever was faster than this script is typing.
} catch { /* As above. */ }
refresh();
