// @ts-check
/**
 * Why an answer was good or bad, asked for after a thumb and never in the way: chips that save at once, and a comment.
 *
 * @typedef {{kind: 'reasons', reasons: string[]} | {kind: 'comment', text: string}} Said
 */
import { copyOf, find } from './server.js';

const CHIPS = {
  1: { exactly_right: 'Exactly right', well_explained: 'Well explained' },
  '-1': {
    incorrect: 'Incorrect', incomplete: 'Incomplete', off_topic: 'Off topic', too_long: 'Too long',
    too_short: 'Too short', repetitive: 'Repetitive', bad_format: 'Bad format', bad_tone: 'Bad tone',
    outdated: 'Outdated', refused_without_need: 'Refused without need', unsafe: 'Unsafe',
  },
};

export class Reasons {
  chosen = /** @type {Set<string>} */ (new Set());
  thumb = 0;
  sent = ''; // A comment on its way, or not arrived: trying that again is another button.

  /** @param {HTMLElement} root @param {(said: Said, done: () => void) => void} save */
  constructor(root, save) {
    this.root = root;
    this.save = save;
  }

  get field() {
    return find(this.root, 'input', HTMLInputElement);
  }

  /** Puts the chips' place and the field on the page, the first time. */
  fill() {
    if (this.root.firstElementChild) return;
    this.root.append(copyOf('#why-template'));
    find(this.root, 'form', HTMLFormElement).onsubmit = (event) => {
      event.preventDefault();
      this.comment();
    };
  }

  /** Asks why, for a thumb or none; what was said for another one is taken back. @param {number} thumb */
  ask(thumb) {
    if (this.chosen.size) this.save({ kind: 'reasons', reasons: [] }, () => {});
    this.show(thumb, []);
  }

  /** @param {number} thumb @param {string[]} chosen */
  show(thumb, chosen) {
    this.chosen = new Set(chosen);
    this.thumb = thumb;
    this.root.hidden = thumb === 0;
    if (!thumb) return;
    this.fill();
    const chips = Object.entries(thumb === 1 ? CHIPS[1] : CHIPS['-1']);
    find(this.root, '.chips', HTMLElement).replaceChildren(...chips.map(([reason, name]) => this.chip(reason, name)));
  }

  /** @param {string} reason @param {string} name */
  chip(reason, name) {
    const chip = document.createElement('button');
    Object.assign(chip, { type: 'button', className: 'chip', textContent: name });
    chip.setAttribute('aria-pressed', `${this.chosen.has(reason)}`);
    chip.onclick = () => {
      if (!this.chosen.delete(reason)) this.chosen.add(reason);
      chip.setAttribute('aria-pressed', `${this.chosen.has(reason)}`);
      this.save({ kind: 'reasons', reasons: [...this.chosen] }, () => {});
    };
    return chip;
  }

  comment() {
    const text = this.field.value.trim();
    if (!text) return this.field.focus();
    if (text === this.sent) return;
    this.sent = text;
    this.save({ kind: 'comment', text }, () => {
      if (this.sent === text) this.sent = '';
      if (this.field.value.trim() === text) this.field.value = '';
      this.field.placeholder = 'Thank you. Anything else?';
    });
  }
}
