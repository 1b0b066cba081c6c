// @ts-check
/** Asks two releases the same, shows both answers side by side, blind if wished, and counts which was better. */

import { Problem, call, find } from '/static/server.js';

const PROVED_WITHIN_MS = 30_000;
const MAX_TOKENS = 160;
const wins = /** @type {Record<string, number>} */ ({});
let ties = 0;

const path = (/** @type {string} */ release) => `/v1/releases/${encodeURIComponent(release)}`;

/** Waits until an engine has proved a release. @param {string} release */
async function load(release) {
  await call(`${path(release)}/load`, { method: 'POST', body: {} });
  const until = Date.now() + PROVED_WITHIN_MS;
  while (Date.now() < until) {
    const shown = await (await call(`${path(release)}/replicas`)).json();
    if (shown.some((/** @type {any} */ replica) => replica.is_up && replica.proved)) return;
    await new Promise((done) => setTimeout(done, 500));
  }
  throw new Problem(`No engine has proved ${release} in time; its page says why.`);
}

/** @param {string} release @param {string} prompt */
async function answer(release, prompt) {
  const body = {
    model: release, messages: [{ role: 'user', content: prompt }], max_tokens: MAX_TOKENS, store: false,
  };
  const told = await (await call('/v1/chat/completions', { method: 'POST', body })).json();
  return told.choices[0].message.content;
}

/** @param {string[]} names */
function count(names) {
  const [one, other] = names.map((name) => `${name} ${wins[name] ?? 0}`);
  find(document, '#tally', HTMLElement).textContent = `So far: ${one}, ${other}, about the same ${ties}.`;
}

/** @param {string} prompt @param {string[]} order @param {string[]} answers @param {boolean} isBlind @param {string[]} names */
function show(prompt, order, answers, isBlind, names) {
  const item = find(/** @type {ParentNode} */ (find(document, '#pair', HTMLTemplateElement).content.cloneNode(true)), 'li', HTMLElement);
  find(item, '.prompt', HTMLElement).textContent = prompt;
  const sides = [...item.querySelectorAll('article')];
  const name = () => sides.forEach((side, index) => { find(side, 'h3', HTMLElement).textContent = order[index]; });
  sides.forEach((side, index) => {
    find(side, 'h3', HTMLElement).textContent = `Answer ${index + 1}`;
    find(side, '.answer', HTMLElement).textContent = answers[index];
  });
  if (!isBlind) name();
  item.addEventListener('click', (event) => {
    const button = event.target instanceof Element ? event.target.closest('button') : null;
    if (!button) return;
    if (button.dataset.side) {
      const chosen = order[Number(button.dataset.side)];
      wins[chosen] = (wins[chosen] ?? 0) + 1;
      sides[Number(button.dataset.side)].classList.add('chosen');
    } else ties += 1;
    name();
    item.querySelectorAll('button').forEach((each) => each.remove());
    find(document, '#ask-prompt', HTMLInputElement).focus(); // The button that was pressed is gone.
    count(names);
  });
  find(document, '#asked', HTMLElement).prepend(item);
}

export function compare() {
  const form = document.querySelector('#ask');
  if (!(form instanceof HTMLFormElement)) return;
  const state = find(form, '#ask-state', HTMLElement);
  const names = [form.dataset.a ?? '', form.dataset.b ?? ''];
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    const prompt = find(form, '#ask-prompt', HTMLInputElement).value.trim();
    const isBlind = find(form, '#ask-blind', HTMLInputElement).checked;
    if (!prompt || state.dataset.busy) return;
    state.dataset.busy = 'yes';
    try {
      state.textContent = 'The engines are asked to hold both …';
      for (const name of names) await load(name);
      state.textContent = 'Both answer …';
      const order = isBlind && Math.random() < 0.5 ? [names[1], names[0]] : names;
      const answers = await Promise.all(order.map((name) => answer(name, prompt)));
      show(prompt, order, answers, isBlind, names);
      state.textContent = '';
    } catch (error) {
      state.textContent = error instanceof Error ? error.message : String(error);
    } finally {
      delete state.dataset.busy;
    }
  });
}
