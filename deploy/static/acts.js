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
const told = find(document, '#told', HTMLElement);

/** @type {HTMLElement | null} */
let asked = null;

/** Says what was done, where everybody sees it. @param {string} text */
export function tell(text) {
  told.textContent = text;
  told.hidden = !text;
}

/** @param {HTMLElement} button */
function ask(button) {
  asked = button;
  const { title = '', says = '', confirm: word = '' } = button.dataset;
  find(dialog, '#act-title', HTMLElement).textContent = title;
  find(dialog, '#act-text', HTMLElement).textContent = says;
  find(dialog, '#act-word', HTMLElement).textContent = word;
  find(dialog, '#act-typed', HTMLElement).hidden = !word;
  doIt.textContent = (button.textContent ?? '').trim();
  doIt.className = button.className;
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

/** @param {() => Promise<void>} refresh */
async function act(refresh) {
  if (!asked) return;
  const { path = '', method, body, watch: release } = asked.dataset;
  const name = asked.dataset.title?.replace(/\?$/, '') ?? '';
  const progress = new AbortController();
  doIt.setAttribute('aria-disabled', 'true');
  problem.textContent = '';
  if (release) watch(release, progress.signal);
  try {
    await call(path, { method, body: { ...JSON.parse(body ?? '{}'), reason: reason.value.trim() } });
    dialog.close();
    await refresh();
    tell(`Done: ${name}.`);
  } catch (error) {
    problem.textContent = error instanceof Problem ? error.message : String(error);
  } finally {
    progress.abort();
    doIt.removeAttribute('aria-disabled');
  }
}

/** Has buttons that act ask first. @param {() => Promise<void>} refresh */
export function listen(refresh) {
  document.addEventListener('click', (event) => {
    const button = event.target instanceof Element ? event.target.closest('[data-act]') : null;
    if (button instanceof HTMLElement) ask(button);
  });
  find(dialog, '#act-keep', HTMLButtonElement).addEventListener('click', () => dialog.close());
  dialog.addEventListener('close', () => {
    // The button may have gone with what it did.
    if (asked?.isConnected) asked.focus();
    else find(document, '#main', HTMLElement).focus();
  });
  find(dialog, 'form', HTMLFormElement).addEventListener('submit', (event) => {
    event.preventDefault();
    if (doIt.hasAttribute('aria-disabled') || !asked) return;
    const word = asked.dataset.confirm;
    if (!reason.value.trim()) problem.textContent = 'Say why; it is kept with what you do.';
    else if (word && confirm.value.trim() !== word) problem.textContent = `Type ${word} to confirm.`;
    else act(refresh);
  });
}
