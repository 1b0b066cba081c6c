// @ts-check
/**
 * Turns in sheets of a few. What is far from the screen is taken off the page, and only its height stays: a browser
 * that cleans up among hundreds of thousands of nodes stops for the better part of a second.
 *
 * @typedef {import('./turn.js').Turn} Turn
 */
import { Rest } from './rest.js';

export const MAX_TURNS = 5;
const NEAR = '3000px 0px'; // Above and below the screen: more than a quick wheel turns in a frame.

/** @param {Turn} turn */
const partsOf = ({ question, view, pair }) => [question, pair?.element ?? view];

class Sheet {
  element = document.createElement('div');
  /** @type {(Turn | Rest)[]} */
  turns = [];

  constructor() {
    this.element.className = 'sheet';
  }

  /** Has on the page what belongs there; what is in its place is not touched. */
  draw() {
    this.element.style.height = '';
    const turns = (this.turns = this.turns.map((turn) => (turn instanceof Rest ? turn.wake() : turn)));
    const wanted = turns.flatMap(partsOf);
    for (const part of [...this.element.children]) if (!wanted.includes(/** @type {HTMLElement} */ (part))) part.remove();
    wanted.forEach((part, at) => {
      const there = this.element.children[at] ?? null;
      if (there !== part) this.element.insertBefore(part, there);
    });
  }

  /** Leaves nothing but room, unless somebody is at it. @param {number} height In pixels. */
  rest(height) {
    if (this.element.contains(document.activeElement) || isSelected(this.element)) return;
    const resting = this.turns.map((turn) => (turn instanceof Rest ? turn : Rest.canBe(turn)));
    if (!resting.every(Boolean)) return;
    this.turns = this.turns.map((turn) => (turn instanceof Rest ? turn : Rest.of(turn)));
    this.element.style.height = `${height}px`;
    this.element.replaceChildren();
  }
}

/** @param {Element} element */
function isSelected(element) {
  const selection = getSelection();
  return selection?.type === 'Range' && selection.getRangeAt(0).intersectsNode(element);
}

export class Sheets {
  /** From top to bottom. @type {Sheet[]} */
  sheets = [];
  /** @type {WeakMap<Element, Sheet>} */
  of = new WeakMap();

  /** @param {HTMLElement} box @param {HTMLElement} scroller */
  constructor(box, scroller) {
    this.box = box;
    this.watch = new IntersectionObserver((entries) => this.look(entries), { root: scroller, rootMargin: NEAR });
    // Of what somebody did something to, the server has told less than there is now.
    for (const act of ['click', 'input']) box.addEventListener(act, ({ target }) => this.touch(target), true);
  }

  /** Shows these from top to bottom. @param {(Turn | Rest)[]} wanted */
  show(wanted) {
    let same = 0;
    for (const sheet of this.sheets) {
      let kept = 0;
      while (kept < sheet.turns.length && sheet.turns[kept] === wanted[same]) [kept, same] = [kept + 1, same + 1];
      sheet.turns.length = kept;
    }
    while (this.sheets.length && !this.sheets[this.sheets.length - 1].turns.length) this.drop();
    const last = Math.max(0, this.sheets.length - 1);
    for (const turn of wanted.slice(same)) this.last().turns.push(turn);
    for (const sheet of this.sheets.slice(last)) sheet.draw();
  }

  drop() {
    const sheet = this.sheets.pop();
    if (!sheet) return;
    this.watch.unobserve(sheet.element);
    sheet.element.remove();
  }

  /** The sheet that takes the next turn. */
  last() {
    const last = this.sheets[this.sheets.length - 1];
    if (last && last.turns.length < MAX_TURNS) return last;
    const sheet = this.begun();
    this.sheets.push(sheet);
    this.box.append(sheet.element);
    return sheet;
  }

  /** Puts these above all others, on a sheet of their own. @param {(Turn | Rest)[]} turns */
  prepend(turns) {
    if (!turns.length) return;
    const sheet = this.begun();
    sheet.turns = turns;
    sheet.draw();
    this.sheets.unshift(sheet);
    this.box.prepend(sheet.element);
  }

  begun() {
    const sheet = new Sheet();
    this.of.set(sheet.element, sheet);
    this.watch.observe(sheet.element);
    return sheet;
  }

  /** @param {IntersectionObserverEntry[]} entries */
  look(entries) {
    for (const { target, isIntersecting, boundingClientRect } of entries) {
      const sheet = this.of.get(target);
      if (!target.isConnected || !sheet) continue;
      if (isIntersecting) sheet.draw();
      else sheet.rest(boundingClientRect.height);
    }
  }

  /** @param {EventTarget | null} target */
  touch(target) {
    const element = target instanceof Element ? target.closest('.sheet') : null;
    const turns = (element && this.of.get(element)?.turns) ?? [];
    for (const turn of turns) {
      if (turn instanceof Rest) continue;
      if (partsOf(turn).some((part) => part.contains(/** @type {Node} */ (target)))) turn.row = null;
    }
  }
}
