// @ts-check
/**
 * What a person taught: the way of each of their signals, whether they are learned from, and how to be forgotten.
 *
 * @typedef {{run_id: string, role: string, status: string | null, release: string | null, fate: string | null}} Training
 * @typedef {{id: string, episode_id: string, kind: string, given_at: string, status: string, summary: string,
 *   reward: {p_before: number | null, p_after: number | null} | null, training: Training[]}} Receipt
 * @typedef {{erasure_id: string, complete: boolean, pending: string[], found: Record<string, Record<string, unknown>>}} Report
 */
import { forgetDrafts } from './drafts.js';
import { call, find, Problem } from './server.js';
import { thenAndNow } from './then.js';
import { whoAsks, whoAsksAnew } from './who.js';

const PAGE_ROWS = 20;
const LOOK_EVERY_MS = 3000;
const SAID = /** @type {Record<string, string>} */ ({
  thumb: 'Your thumb', rating: 'Your rating', correction: 'Your correction', comment: 'Your comment',
  reasons: 'Your reasons', preference: 'Your choice between two answers', implicit: 'What you did with an answer',
});
const FATES = /** @type {Record<string, string>} */ ({
  canary: 'is being tried with a few people', promoted: 'answers everybody', not_promoted: 'was not better than before',
  rolled_back: 'was taken back', quarantined: 'is served no more', held: 'was held back by a gate',
});
const ROOMS = /** @type {Record<string, string>} */ ({
  feedback: 'Conversations and feedback', reward: 'What it believes is good', trainer: 'Training data', deploy: 'Adapters',
});

const [story, nothing, problem, note, report] = ['#story', '#nothing', '#problem', '#learn-note', '#report'].map(
  (selector) => find(document, selector, HTMLElement),
);
const learn = find(document, '#learn', HTMLInputElement);
const more = find(document, '#more', HTMLButtonElement);
const forgetButton = find(document, '#forget', HTMLButtonElement);
const sure = find(document, '#sure', HTMLDialogElement);
let user = whoAsks();
let rows = PAGE_ROWS;
let shown = '';
let isBlind = false; // The last look failed.
const answers = /** @type {Map<string, HTMLElement>} */ (new Map()); // By receipt.

const percent = new Intl.NumberFormat(undefined, { style: 'percent' });
const when = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' });

/** @param {unknown} error */
function fail(error) {
  if (!(error instanceof Problem)) console.error(error);
  problem.textContent = error instanceof Problem ? error.message : 'Something went wrong on this page.';
}

/** The four stations of a signal: what each says, and whether it was reached. @param {Receipt} receipt */
function stations({ status, reward, training }) {
  const run = training.findLast(({ fate }) => fate === 'promoted') ?? training.at(-1);
  const belief = reward?.p_after === null || reward?.p_after === undefined ? '' : `${percent.format(reward.p_after)} good`;
  const before = typeof reward?.p_before === 'number' ? `${percent.format(reward.p_before)} → ` : '';
  const isAside = ['set_aside', 'superseded', 'withdrawn'].includes(status);
  const isOver = isAside && !belief && !run;
  const aside = { set_aside: 'set aside', superseded: 'you said something later', withdrawn: 'you took it back' }[status];
  return [
    { name: 'Said', text: 'safe in the log', state: 'reached' },
    { name: 'Believed', text: belief ? before + belief : aside ?? 'in a moment', state: belief ? 'reached' : isAside ? 'ended' : '' },
    {
      name: 'Trained', state: run ? 'reached' : '',
      text: isOver ? 'not used' : !run ? 'in one of the next nights' : run.role === 'train' ? `in ${run.run_id}` : `kept to judge ${run.run_id}`,
    },
    {
      name: 'Answering', state: run?.fate === 'promoted' ? 'reached' : run?.fate && run.fate !== 'canary' ? 'ended' : '',
      text: run?.fate ? `${run.release ?? 'it'} ${FATES[run.fate] ?? run.fate}` : isOver ? 'not used' : 'if it proves better',
    },
  ];
}

/** @param {Receipt} receipt */
function view(receipt) {
  const template = find(document, '#receipt', HTMLTemplateElement);
  const item = find(document.importNode(template.content, true), '.receipt', HTMLElement);
  const time = document.createElement('time');
  time.dateTime = receipt.given_at;
  time.textContent = when.format(new Date(receipt.given_at));
  find(item, 'h3', HTMLElement).append(SAID[receipt.kind] ?? receipt.kind, time);
  for (const { name, text, state } of stations(receipt)) {
    const [station, title, line] = ['li', 'strong', 'span'].map((tag) => document.createElement(tag));
    station.className = state;
    title.textContent = name;
    line.textContent = text;
    station.append(title, line);
    find(item, '.way', HTMLElement).append(station);
  }
  find(item, '.summary', HTMLElement).textContent = receipt.summary;
  const answer = answers.get(receipt.id) ?? thenAndNow(receipt.episode_id, user);
  answers.set(receipt.id, answer); // What somebody has opened stays.
  item.append(answer);
  return item;
}

/** Reads as many rows as are shown, over as many pages as that takes. */
async function read() {
  const found = /** @type {Receipt[]} */ ([]);
  let before = '';
  do {
    const query = new URLSearchParams({ limit: `${PAGE_ROWS}`, ...(before && { before }) });
    const page = await (await call(`/v1/me/receipts?${query}`, { user })).json();
    found.push(...page.data);
    before = page.next_before ?? '';
  } while (before && found.length < rows);
  return { found, isEnd: !before };
}

/** Looks what became of the signals; what it could not see is said until it can, other problems stay. */
async function look() {
  const { found, isEnd } = await read();
  if (isBlind) problem.textContent = '';
  isBlind = false;
  nothing.hidden = found.length > 0;
  more.hidden = isEnd;
  const text = JSON.stringify(found);
  if (text === shown) return; // What somebody reads, or has selected, stays.
  shown = text;
  story.replaceChildren(...found.map(view));
}

const lookAgain = () =>
  look().catch((error) => {
    isBlind = true;
    fail(error);
  });

/** @param {{learn: boolean, learn_is_default: boolean}} me */
function showConsent(me) {
  learn.checked = me.learn;
  learn.disabled = false;
  const state = me.learn ? 'Your next messages may be learned from.' : 'Your next messages will not be learned from.';
  note.textContent = me.learn_is_default ? `${state} That is the default here.` : state;
}

learn.onchange = async () => {
  const wished = learn.checked;
  problem.textContent = '';
  learn.disabled = true; // One wish at a time, or an older one could come last.
  try {
    showConsent(await (await call('/v1/me/consent', { method: 'PUT', body: { learn: wished }, user })).json());
  } catch (error) {
    learn.checked = !wished;
    learn.disabled = false;
    fail(error);
  }
};

/** @param {Report} told */
function showReport(told) {
  const state = JSON.stringify([told.complete, told.pending]);
  if (report.dataset.state === state) return; // Nobody wants to hear it again each second.
  report.dataset.state = state;
  const lines = Object.entries(ROOMS).map(([room, name]) => {
    const line = document.createElement('li');
    line.textContent = `${name}: ${told.pending.includes(room) ? 'being deleted…' : 'done'}`;
    return line;
  });
  const list = document.createElement('ul');
  list.append(...lines);
  const title = document.createElement('p');
  title.textContent = told.complete
    ? `You are forgotten. The report is ${told.erasure_id}; from now on you are somebody new.`
    : 'Your words are deleted. Clearing up what came of them:';
  report.replaceChildren(title, list);
}

async function forget() {
  let told = /** @type {Report} */ (await (await call('/v1/me', { method: 'DELETE', user })).json());
  user = await whoAsksAnew();
  forgetDrafts();
  showReport(told);
  begin().catch(fail);
  while (!told.complete) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    const looked = call(`/v1/erasures/${told.erasure_id}`).then((response) => response.json());
    told = await looked.catch(() => told); // It goes on without us; the next look may see it.
    showReport(told);
  }
}

forgetButton.onclick = () => sure.showModal();
forgetButton.disabled = false;
sure.onclose = async () => {
  if (sure.returnValue !== 'yes') return;
  sure.returnValue = '';
  forgetButton.disabled = true;
  try {
    await forget();
  } catch (error) {
    if (error instanceof Problem && error.code === 'user_not_found') report.textContent = 'There is nothing of you here.';
    else fail(error);
  }
  forgetButton.disabled = false;
};

more.onclick = () => {
  rows += PAGE_ROWS;
  void lookAgain();
};

async function begin() {
  shown = '';
  showConsent(await (await call('/v1/me', { user })).json());
  await lookAgain();
}

begin().catch(fail);
setInterval(() => document.visibilityState === 'visible' && lookAgain(), LOOK_EVERY_MS);
