// @ts-check
/**
 * What is remembered of a person: seen, corrected and deleted by them.
 *
 * @typedef {{id: string, text: string, episode_id: string | null, conversation_id: string | null, updated_at: string}} Memory
 */
import { call, copyOf, find, Problem } from './server.js';
import { whoAsks } from './who.js';

const [problem, list, nothing, note] = ['#problem', '#memories', '#nothing', '#remember-note'].map(
  (selector) => find(document, selector, HTMLElement),
);
const remember = find(document, '#remember', HTMLInputElement);
const form = find(document, '#new-memory', HTMLFormElement);
const text = find(document, '#memory-text', HTMLInputElement);
const user = whoAsks();
const when = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' });

/** @param {() => Promise<unknown>} act */
async function attempt(act) {
  problem.textContent = '';
  try {
    await act();
  } catch (error) {
    problem.textContent = error instanceof Problem ? error.message : 'Something went wrong on this page.';
    if (!(error instanceof Problem)) console.error(error);
  }
}

/** @param {Memory} memory */
function row(memory) {
  const item = find(copyOf('#memory-template'), 'li', HTMLElement);
  const words = find(item, 'input', HTMLInputElement);
  const source = find(item, 'a', HTMLAnchorElement);
  const path = `/v1/memories/${encodeURIComponent(memory.id)}`;
  words.value = memory.text;
  find(item, '.said', HTMLElement).textContent =
    `${memory.episode_id ? 'You said this' : 'You wrote this'} ${when.format(new Date(memory.updated_at))}.`;
  source.hidden = !memory.conversation_id;
  source.href = `/c/${encodeURIComponent(memory.conversation_id ?? '')}`;
  find(item, 'form', HTMLFormElement).onsubmit = (event) => {
    event.preventDefault();
    void attempt(async () => {
      await call(path, { method: 'PATCH', body: { text: words.value }, user });
      note.textContent = 'Saved.';
    });
  };
  find(item, '.delete', HTMLElement).onclick = () => attempt(async () => {
    await call(path, { method: 'DELETE', user });
    note.textContent = 'Deleted.';
    await show();
    text.focus(); // The button that had the focus is gone.
  });
  return item;
}

async function show() {
  const told = await (await call('/v1/memories', { user })).json();
  list.replaceChildren(...told.data.map(row));
  nothing.hidden = told.data.length > 0;
  remember.checked = told.remember;
  remember.disabled = false;
}

remember.onchange = () => attempt(async () => {
  const wished = remember.checked;
  remember.disabled = true; // One wish at a time, or an older one could come last.
  try {
    await call('/v1/memories/choice', { method: 'PUT', body: { remember: wished }, user });
    note.textContent = wished ? 'What you say of yourself is remembered.' : 'Nothing new is kept, and nothing that is kept is used.';
  } catch (error) {
    remember.checked = !wished;
    throw error;
  } finally {
    remember.disabled = false;
  }
});

form.onsubmit = (/** @type {SubmitEvent} */ event) => {
  event.preventDefault();
  void attempt(async () => {
    await call('/v1/memories', { method: 'POST', body: { text: text.value }, user });
    form.reset();
    note.textContent = 'Remembered.';
    await show();
  });
};
find(form, 'button', HTMLButtonElement).disabled = false;

void attempt(show);
