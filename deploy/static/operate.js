// @ts-check
/** What every operators' page does: stays as it is on the server, tells times in the reader's zone, draws, acts. */

import { Idiomorph } from '/static/vendor/idiomorph.js';
import { find } from '/static/server.js';
import { listen } from './acts.js';
import { draw } from './charts.js';
import { compare } from './compare.js';
import { verify } from './verify.js';

const live = find(document, '#live', HTMLElement);
const LEAST_MS = 1000;

/** Writes times as the reader's place does. */
function localise() {
  for (const time of document.querySelectorAll('time')) {
    const at = new Date(time.dateTime);
    const isToday = at.toDateString() === new Date().toDateString();
    const day = isToday ? '' : `${at.toLocaleDateString(undefined, { day: 'numeric', month: 'short' })} `;
    time.textContent = day + at.toLocaleTimeString(undefined, { hour: '2-digit', minute: '2-digit' });
    time.title = at.toLocaleString(undefined, { dateStyle: 'full', timeStyle: 'long' });
  }
}

/** @param {'live'|'connecting'|'away'} state */
function show(state) {
  if (live.dataset.state === state) return;
  live.dataset.state = state;
  live.textContent = { live: 'live', connecting: 'connecting', away: 'not live: trying again' }[state];
}

// What one has opened or typed, and what the script has drawn, stays; everything else becomes as it is on the server.
const KEEP = {
  beforeNodeMorphed: (/** @type {Node} */ node) => !(node instanceof HTMLFormElement),
  beforeAttributeUpdated: (/** @type {string} */ name, /** @type {Element} */ node) =>
    !(node instanceof HTMLCanvasElement || (name === 'open' && node instanceof HTMLDetailsElement)),
};

/** Reads the page anew, and changes what has changed in it. */
export async function refresh() {
  const response = await fetch(location.href, { headers: { accept: 'text/html' } }).catch(() => null);
  if (!response?.ok) {
    show('away');
    return;
  }
  const page = new DOMParser().parseFromString(await response.text(), 'text/html');
  const main = find(page, '#main', HTMLElement);
  Idiomorph.morph(find(document, '#main', HTMLElement), main, {
    morphStyle: 'outerHTML', restoreFocus: true, callbacks: KEEP,
  });
  dress();
}

function dress() {
  localise();
  draw(document);
}

function follow() {
  const topics = new Set(find(document, '#main', HTMLElement).dataset.live?.split(' ').filter(Boolean));
  if (!topics.size) {
    live.hidden = true;
    return;
  }
  const source = new EventSource('/operate/live');
  let isDue = false;
  let isReading = false;
  const look = async () => {
    if (isReading || document.hidden) return;
    isReading = true;
    while (isDue) {
      isDue = false;
      await refresh();
      await new Promise((done) => setTimeout(done, LEAST_MS));
    }
    isReading = false;
  };
  source.addEventListener('open', () => {
    isDue = true; // what happened since the page was made was told to nobody
    show('live');
    look();
  });
  source.addEventListener('error', () => show('away'));
  source.addEventListener('changed', (event) => {
    const changed = /** @type {string[]} */ (JSON.parse(event.data));
    if (changed.some((topic) => topics.has(topic))) isDue = true;
    look();
  });
  document.addEventListener('visibilitychange', look);
  addEventListener('pagehide', () => source.close());
}

document.querySelector('nav [aria-current]')?.scrollIntoView({ block: 'nearest', inline: 'center' });
dress();
listen(refresh);
compare();
verify();
follow();
