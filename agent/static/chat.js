// @ts-check
/**
 * The chat page: one conversation with its versions, kept on the server; the list of all of them beside it.
 * What people write enters the page only as text nodes; what models write is Markdown, sanitised.
 */
import { refuseFiles } from './attachments.js';
import { Conversation } from './conversation.js';
import { draftOf, keepDraft } from './drafts.js';
import { find, Problem } from './server.js';
import { Pair } from './pair.js';
import { Scroll } from './scroll.js';
import { MAX_TURNS, Sheets } from './sheets.js';
import { Talks } from './talks.js';
import { copied, Turn } from './turn.js';
import { whoAsks } from './who.js';

const [empty, messages, live, stopButton, editing, missing, older] = [
  '#empty', '#messages', '#live', '#stop', '#editing', '#missing', '#older',
].map((selector) => find(document, selector, HTMLElement));
const draft = find(document, '#prompt', HTMLTextAreaElement);
const sendButton = find(document, '#send', HTMLButtonElement);

let edited = /** @type {Turn | null} */ (null); // Whose question is in the composer, to be asked another way.
let kept = ''; // What was in the composer before that.
let active = /** @type {AbortController | null} */ (null); // Ends the answer being streamed.
let isLoading = false; // The conversation is on its way.
let isReading = false; // Earlier turns of it are.

/** @type {import('./turn.js').Page} */
const page = {
  get user() { // Another page of this browser may have been forgotten meanwhile.
    return whoAsks();
  },
  isBusy: () => active !== null,
  begin(control) {
    refresh(control);
    // The button that started this may be gone by now; but a question that was waiting begins by itself.
    if (!(document.activeElement instanceof HTMLInputElement || document.activeElement instanceof HTMLTextAreaElement)) {
      draft.focus();
    }
    live.textContent = '';
    scroll.forget();
  },
  place,
  answered: saveDraft, // Until then, a reload brings the question back.
  end(control) {
    if (active !== control) return;
    refresh(null);
    void talks.read(); // It is the most recently used one now.
  },
  shows: (turn) => talk.root.path().includes(turn),
  announce: (text) => (live.textContent = text),
  ask,
  edit(turn) {
    edit(turn, true);
    draft.focus();
  },
  show(fork, step) {
    if (active) return;
    edit(null, true);
    fork.step(step);
    draw();
    // The button that was pressed went with its version.
    const shown = /** @type {Turn} */ (fork.turns[fork.shown]); // Drawn, it does not rest.
    shown.part(step < 0 ? '.earlier' : '.later').focus();
    live.textContent = `Version ${fork.shown + 1} of ${fork.turns.length}`;
  },
  /** Shows another answer beside one; whoever just goes on writing goes on from the first. */
  offer(first) {
    first.leave();
    const second = new Turn(first.prompt, first.fork, page);
    const { fork } = first;
    fork.add(second);
    const pair = (second.pair = new Pair(first, second, (shown) => {
      second.pair = null;
      fork.shown = fork.turns.indexOf(shown);
      draw();
    }));
    draw();
    void second.run().then(() => {
      if (second.pair !== pair) return;
      if (second.answer && second.episode) return pair.open();
      pair.end();
      first.saving.say('.meta', 'The other answer did not come.');
    });
  },
  /** Before anything typed since; a question that others follow stays where it is, too. */
  takeBack(turn) {
    edit(null, true);
    if (!turn.next.turns.length) turn.fork.remove(turn);
    draft.value = [turn.prompt, draft.value].filter(Boolean).join('\n');
    saveDraft();
    draw();
    refresh();
    draft.focus();
  },
  letGo: () => (scroll.isStuck = false),
};
const sheets = new Sheets(messages, find(document, '#scroller', HTMLElement));
const scroll = new Scroll(messages, () => older.hidden || void showOlder());
const talks = new Talks(find(document, '#talks', HTMLElement), {
  user: whoAsks,
  open: (id) => void open(id),
  gone: (id) => {
    if (id === talk.id) void open('');
    keepDraft(id, '');
  },
});
let talk = new Conversation('', page);

function saveDraft() {
  keepDraft(talk.id, (edited && kept) || draft.value);
}

/** @param {string} prompt @param {import('./rest.js').Place} [beside] Where: beside another version, or (unset) at the end. */
function ask(prompt, beside) {
  talk.root.path().at(-1)?.pair?.end();
  const fork = beside ?? talk.root.path().at(-1)?.next ?? talk.root;
  const turn = new Turn(prompt, fork, page);
  fork.add(turn);
  edit(null);
  draw();
  scroll.isStuck = true;
  turn.run();
}

/** Where a turn is kept; null, if the server cannot keep it just now. @param {Turn} turn */
async function place(turn) {
  const [here, before] = [talk, talk.id];
  try {
    await here.begin();
  } catch (error) {
    if (!(error instanceof Problem)) console.error(error);
    return null;
  }
  if (here.id !== before && here === talk) {
    keepDraft(here.id, draftOf(before) || draft.value);
    keepDraft(before, '');
    history.pushState(null, '', `/c/${here.id}`);
    talks.show(here.id);
    void talks.read();
  }
  return here.place(turn);
}

/**
 * Begins to ask a question another way, or leaves that: then what was being written before is back.
 *
 * @param {Turn | null} turn @param {boolean} keeps Whether what was written of it stays, too: nobody has said to drop it.
 */
function edit(turn, keeps = false) {
  if (edited && keeps && draft.value !== edited.prompt) kept = [kept, draft.value].filter(Boolean).join('\n');
  if (turn && !edited) kept = draft.value;
  if (turn) draft.value = turn.prompt;
  else if (edited) draft.value = kept;
  edited = turn;
  editing.hidden = turn === null;
  refresh();
}

/** Puts the shown versions on the page. */
function draw() {
  const path = talk.root.path();
  for (const turn of path) turn.count();
  sheets.show(path);
}

/** Brings the controls up to date. @param {AbortController | null} control */
function refresh(control = active) {
  if (!control && document.activeElement === stopButton) draft.focus(); // It is about to hide.
  active = control;
  empty.hidden = talk.root.turns.length > 0 || isLoading || !missing.hidden;
  document.body.classList.toggle('busy', active !== null); // Shows Stop in place of Send.
  sendButton.disabled = !draft.value.trim() || !missing.hidden || isLoading;
}

/** Shows a conversation, or (without an id) a new chat. @param {string} id @param {boolean} isNew Whether it gets an address. */
async function open(id, isNew = true) {
  active?.abort();
  for (const turn of talk.root.path()) turn.leave();
  if (edited) {
    edit(null, true);
    saveDraft();
  }
  const here = (talk = new Conversation(id, page));
  if (isNew) history.pushState(null, '', id ? `/c/${id}` : '/');
  talks.show(id);
  draft.value = draftOf(id);
  missing.hidden = older.hidden = true;
  isLoading = id !== '';
  sheets.show([]);
  scroll.isStuck = true;
  refresh(null);
  draft.focus();
  if (id) await load(here);
}

/** @param {Conversation} here */
async function load(here) {
  try {
    const rows = await here.read();
    if (here !== talk) return;
    here.add(rows);
  } catch (error) {
    if (here !== talk) return;
    const isGone = error instanceof Problem && error.code === 'conversation_not_found';
    find(missing, 'p', HTMLElement).textContent = isGone
      ? 'There is no such conversation. It may have been deleted.'
      : 'This conversation cannot be read just now.';
    find(missing, '.retry-open', HTMLElement).hidden = isGone;
    missing.hidden = false;
  }
  isLoading = false;
  draw();
  older.hidden = !here.before;
  refresh();
}

/** Puts earlier turns above, a few in each frame, so that neither the page nor its reader jumps. */
async function showOlder() {
  if (isLoading || isReading) return;
  isReading = true;
  const here = talk;
  try {
    do {
      const rows = await here.read();
      while (rows.length && here === talk) {
        const { root } = here;
        const first = root.turns[root.shown];
        here.add(rows.splice(0, MAX_TURNS)); // More at once would be felt while scrolling.
        const path = here.root.path();
        scroll.keep();
        sheets.prepend(path.slice(0, path.indexOf(first)));
        await new Promise((resolve) => requestAnimationFrame(resolve));
      }
    } while (here === talk && here.before && scroll.isNearTop());
  } catch (error) {
    if (here === talk) live.textContent = error instanceof Problem ? error.message : '';
  }
  isReading = false;
  if (here === talk) older.hidden = !here.before;
}

function stopEditing() {
  edit(null);
  saveDraft();
  draft.focus();
}

function newChat() {
  talks.drawer.close();
  void open('', location.pathname !== '/');
}

messages.onclick = async (/** @type {MouseEvent} */ { target }) => {
  const button = target instanceof Element ? target.closest('.code .copy') : null;
  const code = button?.closest('.code')?.querySelector('code')?.textContent;
  if (!button || code === null || code === undefined) return;
  await copied(button, code, page.announce);
};
older.onclick = showOlder;
find(document, '#composer', HTMLFormElement).onsubmit = (event) => {
  event.preventDefault();
  const prompt = draft.value.trim();
  if (active || isLoading || !missing.hidden || !prompt) return; // One answer at a time; the draft waits.
  const before = edited;
  if (before) return before.again('edited_and_resent', () => ask(prompt, before.fork));
  draft.value = '';
  ask(prompt);
};
draft.oninput = () => {
  saveDraft();
  refresh();
};
draft.onkeydown = (/** @type {KeyboardEvent} */ event) => {
  // Enter also ends a word in an input method; Safari marks that one by its key code only.
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  sendButton.click();
};
document.onkeydown = (event) => {
  if (event.ctrlKey && event.shiftKey && event.code === 'KeyO') {
    event.preventDefault();
    return newChat();
  }
  if (event.key !== 'Escape' || event.isComposing || document.querySelector('dialog[open]')) return;
  if (event.target === talks.search && talks.search.value) return; // It empties the field.
  if (talks.drawer.isOpen) return talks.drawer.close();
  const turn = talk.root.path().find(({ view }) => view?.contains(document.activeElement));
  if (turn instanceof Turn && !turn.part('.editor').hidden) turn.openEditor(false);
  else if (active) active.abort();
  else if (edited) stopEditing();
};
find(editing, 'button', HTMLElement).onclick = stopEditing;
find(missing, '.retry-open', HTMLElement).onclick = () => void open(talk.id, false);
stopButton.onclick = () => active?.abort();
for (const button of document.querySelectorAll('.new-chat')) button.addEventListener('click', newChat);
for (const example of document.querySelectorAll('.example')) {
  example.addEventListener('click', () => ask(example.textContent ?? ''));
}
const [attach, noFiles] = ['#attach', '#no-files'].map((selector) => find(document, selector, HTMLElement));
refuseFiles(attach, noFiles, draft);

const addressed = () => decodeURIComponent(/^\/c\/([^/]+)$/.exec(location.pathname)?.[1] ?? '');
onpopstate = () => void open(addressed(), false);
// Another tab may have written, renamed or deleted.
document.onvisibilitychange = () => document.visibilityState === 'visible' && void talks.read();
const typed = draft.value; // Whoever was faster than this script is typing.
void open(addressed(), false);
if (typed && typed !== draft.value) {
  draft.value = [draft.value, typed].filter(Boolean).join('\n');
  saveDraft();
}
document.body.classList.remove('starting');
for (const button of document.querySelectorAll('.new-chat, #open-talks')) button.removeAttribute('disabled');
refresh();
void talks.read();
