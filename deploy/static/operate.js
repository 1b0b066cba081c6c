// @ts-check
/** What every operators' page does: stays as it is on the server, tells times in the reader's zone, draws, acts. */

import { Idiomorph } from '/static/vendor/idiomorph.js';
import { find, signIn } from '/static/server.js';
import { listen } from './acts.js';
import { draw } from './charts.js';
import { compare } from './compare.js';
import { verify } from './verify.js';

const live = find(document, '#live', HTMLElement);
const LEAST_MS = 1000;
const AGAIN_AFTER_MS = 5000;

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

/** A button that only the script can answer comes disabled, so that no press is lost on it. @param {Document} page */
function enable(page) {
  for (const button of page.querySelectorAll('#main button')) button.removeAttribute('disabled');
}

/** Reads the page anew, and changes what has changed in it; tells whether it could. */
async function refresh() {
  try {
    const response = await fetch(location.href, { headers: { accept: 'text/html' } });
    if (response.redirected && new URL(response.url).pathname === '/login') signIn();
    if (!response.ok) return false;
    const page = new DOMParser().parseFromString(await response.text(), 'text/html');
    const main = find(page, '#main', HTMLElement);
    enable(page);
    Idiomorph.morph(find(document, '#main', HTMLElement), main, {
      morphStyle: 'outerHTML', restoreFocus: true, callbacks: KEEP,
    });
    dress();
    return true;
  } catch (error) {
    if (!(error instanceof TypeError)) console.error(error); // Else the server could not be reached.
    return false;
  }
}

function dress() {
  localise();
  draw(document);
}

/** Follows what the server says has changed, while somebody can see the page. */
class Follower {
  /** @type {EventSource | null} */
  source = null;
  isDue = false;
  isReading = false;

  /** @param {Set<string>} topics */
  constructor(topics) {
    this.topics = topics;
    document.addEventListener('visibilitychange', () => this.listen());
    addEventListener('pagehide', () => this.end());
    addEventListener('pageshow', () => this.listen());
    this.listen();
  }

  /** A page that nobody sees holds no connection: browsers have few of them for one server. */
  listen() {
    if (document.hidden) return this.end();
    if (this.source) return;
    this.source = new EventSource('/operate/live');
    // What happened since the page was made was told to nobody.
    this.source.addEventListener('ready', () => this.look(true));
    this.source.addEventListener('error', () => {
      show('away');
      if (this.source?.readyState !== EventSource.CLOSED) return; // Else the browser has given up.
      this.end();
      setTimeout(() => this.listen(), AGAIN_AFTER_MS);
    });
    this.source.addEventListener('changed', (event) => {
      const changed = /** @type {string[]} */ (JSON.parse(event.data));
      this.look(changed.some((topic) => this.topics.has(topic)));
    });
  }

  end() {
    this.source?.close();
    this.source = null;
  }

  /** Reads the page where that is due, at most once a second, and again where it could not. @param {boolean} isDue */
  async look(isDue) {
    this.isDue ||= isDue;
    if (this.isReading) return;
    this.isReading = true;
    while (this.isDue && this.source) {
      this.isDue = !(await refresh());
      show(this.isDue ? 'away' : 'live');
      await new Promise((done) => setTimeout(done, LEAST_MS));
    }
    this.isReading = false;
  }
}

function follow() {
  const topics = new Set(find(document, '#main', HTMLElement).dataset.live?.split(' ').filter(Boolean));
  live.hidden = !topics.size;
  if (topics.size) new Follower(topics);
}

document.querySelector('nav [aria-current]')?.scrollIntoView({ block: 'nearest', inline: 'center' });
dress();
listen(refresh);
compare();
verify();
enable(document);
follow();
