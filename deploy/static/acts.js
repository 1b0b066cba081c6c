// @ts-check
/** Acts: each asks for a reason and a word that is typed, then shows how the engines come to it, and what came of it. */

import { Problem, call, find } from '/static/server.js';

const LOOK_EVERY_MS = 400;
const dialog = find(document, '#act', HTMLDialogElement);
const reason = find(dialog, '#act-reason', HTMLInputElement);
const confirm = find(dialog, '#act-confirm', HTMLInputElement);
const problem = find(dialog, '#act-problem', HTMLElement);
const replicas = find(dialog, '#act-replicas', HTMLElement);
const doIt = find(dialog, '#act-do', HTMLButtonElement);
const keep = find(dialog, '#act-keep', HTMLButtonElement);
const told = find(document, '#told', HTMLElement);

/** @type {HTMLElement | null} */
let button = null; // That was pressed; a refresh may make it another one's.
/** @type {DOMStringMap} */
let asked = {}; // What it said then.
let isBusy = false;

/** Says what was done, where everybody sees it. @param {string} text */
function tell(text) {
  told.textContent = text;
}

/** @param {HTMLElement} pressed */
function ask(pressed) {
  button = pressed;
  asked = { ...pressed.dataset };
  const { title = '', says = '', confirm: word = '' } = asked;
  find(dialog, '#act-title', HTMLElement).textContent = title;
  find(dialog, '#act-text', HTMLElement).textContent = says;
  find(dialog, '#act-word', HTMLElement).textContent = word;
  find(dialog, '#act-typed', HTMLElement).hidden = !word;
  doIt.textContent = (pressed.textContent ?? '').trim();
  doIt.className = pressed.className;
  problem.textContent = reason.value = confirm.value = '';
  replicas.hidden = true;
  replicas.replaceChildren();
  confirm.required = Boolean(word);
  dialog.showModal();
  reason.focus();
}

/** Shows which engines have proved the release, while they are asked to. @param {string} release @param {AbortSignal} signal */
async function watch(release, signal) {
  const path = `/v1/releases/${encodeURIComponent(release)}/replicas`;
  while (!signal.aborted) {
    const shown = await call(path, { signal }).then((response) => response.json()).catch(() => []);
    if (signal.aborted) return;
    replicas.hidden = !shown.length;
    replicas.replaceChildren(...shown.map((/** @type {any} */ replica) => {
      const line = document.createElement('li');
      const state = !replica.is_up ? 'down' : replica.proved ? 'has proved it' : replica.problem ?? 'is loading it';
      line.textContent = `${replica.url} ${state}`;
      return line;
    }));
    await new Promise((done) => setTimeout(done, LOOK_EVERY_MS));
  }
}

/** @param {() => Promise<boolean>} refresh */
async function act(refresh) {
  const { path = '', method, body, watch: release } = asked;
  const name = asked.title?.replace(/\?$/, '') ?? '';
  const progress = new AbortController();
  isBusy = true;
  for (const each of [doIt, keep]) each.setAttribute('aria-disabled', 'true');
  problem.textContent = '';
  if (release) watch(release, progress.signal);
  try {
    await call(path, { method, body: { ...JSON.parse(body ?? '{}'), reason: reason.value.trim() } });
    dialog.close();
    await refresh();
    settleFocus();
    tell(`Done: ${name}.`);
  } catch (error) {
    problem.textContent = error instanceof Problem ? error.message : String(error);
  } finally {
    progress.abort();
    isBusy = false;
    for (const each of [doIt, keep]) each.removeAttribute('aria-disabled');
  }
}

/** The button may have gone with what it did. */
function settleFocus() {
  if (button?.isConnected) button.focus();
  else find(document, '#main', HTMLElement).focus();
}

/** Has buttons that act ask first. @param {() => Promise<boolean>} refresh */
export function listen(refresh) {
  document.addEventListener('click', (event) => {
    const pressed = event.target instanceof Element ? event.target.closest('[data-act]') : null;
    if (pressed instanceof HTMLElement) ask(pressed);
  });
  keep.addEventListener('click', () => isBusy || dialog.close());
  dialog.addEventListener('cancel', (event) => {
    if (isBusy) event.preventDefault(); // It is being done: how it ends has to be seen.
  });
  dialog.addEventListener('close', settleFocus);
  find(dialog, 'form', HTMLFormElement).addEventListener('submit', (event) => {
    event.preventDefault();
    if (isBusy) return;
    const word = asked.confirm;
    if (!reason.value.trim()) problem.textContent = 'Say why; it is kept with what you do.';
    else if (word && confirm.value.trim() !== word) problem.textContent = `Type ${word} to confirm.`;
    else act(refresh);
  });
}
