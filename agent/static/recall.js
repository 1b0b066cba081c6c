// @ts-check
/**
 * What an answer was given of what was said before: a quiet line under it, which opens into what the model saw; and the
 * pin, by which a turn is always part of it.
 *
 * @typedef {{kept: number, earlier: number, memories: number}} Used
 */
import { call, Problem } from './server.js';

const pins = /** @type {Map<string, Promise<Set<string>>>} */ (new Map()); // By conversation.

/** What the server says of a context in its answer's header. @param {Response} response @returns {Used | null} */
export function usedIn(response) {
  const told = response.headers.get('x-everloop-memory');
  return told ? JSON.parse(told) : null;
}

/** @param {number} number @param {string} one @param {string} many */
const count = (number, one, many) => `${number} ${number === 1 ? one : many}`;

/** @param {Used} used */
function line({ kept, earlier, memories }) {
  const parts = [
    earlier && `${kept} of ${count(earlier, 'earlier message', 'earlier messages')}`,
    memories && count(memories, 'memory', 'memories'),
  ];
  return `Used ${parts.filter(Boolean).join(', ')}`;
}

/** @param {string} tag @param {string} text @param {string} [className] */
function element(tag, text, className = '') {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

/** @param {HTMLElement} into @param {string} episode @param {string} user */
async function tell(into, episode, user) {
  const told = await (await call(`/v1/episodes/${encodeURIComponent(episode)}`, { user })).json();
  const names = /** @type {Record<string, string>} */ ({ user: 'You', assistant: 'Everloop', system: 'Before all' });
  const said = told.messages.slice(0, -1).map((/** @type {{role: string, content: string}} */ { role, content }) => {
    const item = element('li', '');
    item.append(element('strong', names[role] ?? role), element('p', content ?? ''));
    return item;
  });
  const list = element('ol', '');
  list.append(...said);
  const { used, budget } = told.context ?? {};
  const link = /** @type {HTMLAnchorElement} */ (element('a', 'What it remembers of me'));
  link.href = '/memory';
  into.replaceChildren(list, element('p', used ? `${used} of ${budget} tokens.` : ''), link);
}

export class Recall {
  /**
   * @param {HTMLElement} place Where the line goes. @param {HTMLElement} pin
   * @param {() => {episode: string, conversation: string, user: string}} where
   * @param {(text: string) => void} say What became of a pin.
   */
  constructor(place, pin, where, say) {
    this.place = place;
    this.pin = pin;
    this.where = where;
    this.say = say;
    pin.onclick = () => this.toggle();
  }

  /** Says how much was used. @param {Used | null} used */
  show(used) {
    this.place.replaceChildren();
    if (!used || !(used.earlier || used.memories)) return;
    const details = document.createElement('details');
    const body = element('div', '');
    details.append(element('summary', line(used)), body);
    details.ontoggle = () => {
      if (!details.open || body.firstElementChild) return;
      body.textContent = 'Reading …';
      const { episode, user } = this.where();
      tell(body, episode, user).catch((error) => { // Opened again, it is read again.
        body.textContent = error instanceof Problem ? error.message : 'It could not be read.';
      });
    };
    this.place.append(details);
  }

  /** Looks whether the turn is pinned; nothing is said where that is not known. */
  async look() {
    const { episode, conversation, user } = this.where();
    if (!conversation) return;
    const path = `/v1/conversations/${encodeURIComponent(conversation)}/pins`;
    const known = pins.get(conversation) ?? call(path, { user }).then(async (told) => new Set((await told.json()).data));
    pins.set(conversation, known);
    const found = await known.catch(() => new Set());
    this.press(found.has(episode));
  }

  /** @param {boolean} isPinned */
  press(isPinned) {
    this.pin.hidden = !this.where().conversation;
    this.pin.setAttribute('aria-pressed', `${isPinned}`);
    this.pin.textContent = isPinned ? 'Pinned' : 'Pin';
  }

  async toggle() {
    const { episode, conversation, user } = this.where();
    const pinned = this.pin.getAttribute('aria-pressed') !== 'true';
    const path = `/v1/conversations/${encodeURIComponent(conversation)}/turns/${encodeURIComponent(episode)}/pin`;
    try {
      await call(path, { method: 'POST', body: { pinned }, user });
    } catch (error) {
      return this.say(error instanceof Problem ? error.message : 'It could not be pinned.');
    }
    const known = await (pins.get(conversation) ?? Promise.resolve(new Set()));
    if (pinned) known.add(episode);
    else known.delete(episode);
    this.press(pinned);
    return this.say(pinned ? 'Kept in mind in this chat' : 'No longer pinned');
  }
}
