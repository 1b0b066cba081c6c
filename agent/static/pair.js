// @ts-check
/**
 * Two answers to one question, side by side, of which a person may choose the better one. Which stands where is chance,
 * and which release gave them is not said before: neither should decide.
 */
import { find } from './server.js';
import { Turn } from './turn.js';

export class Pair {
  element = document.createElement('div');
  note = document.createElement('p');
  buttons = /** @type {HTMLButtonElement[]} */ ([]);

  /** @param {Turn} first @param {Turn} second The one that is asked for now. @param {(shown: Turn) => void} done */
  constructor(first, second, done) {
    this.first = first;
    this.done = done;
    this.element.className = 'pair';
    this.note.setAttribute('role', 'status');
    this.note.textContent = 'Another answer is on its way …';
    const sides = document.createElement('ol');
    sides.className = 'sides';
    const order = Math.random() < 0.5 ? [first, second] : [second, first];
    sides.append(...order.map((turn, index) => this.side(turn, turn === first ? second : first, index + 1)));
    this.element.append(this.note, sides, this.button('About the same', () => this.end()));
  }

  /** @param {Turn} turn @param {Turn} other @param {number} number */
  side(turn, other, number) {
    const side = document.createElement('li');
    side.append(turn.view, this.button(`Answer ${number} is better`, () => {
      turn.prefer(other);
      this.end(turn);
    }));
    return side;
  }

  /** @param {string} text @param {() => void} act */
  button(text, act) {
    const button = document.createElement('button');
    button.type = 'button';
    button.className = 'soft';
    button.textContent = text;
    button.disabled = true;
    button.onclick = act;
    this.buttons.push(button);
    return button;
  }

  /** Lets one choose, now that both are there. */
  open() {
    this.note.textContent = 'Which one is better?';
    for (const button of this.buttons) button.disabled = false;
  }

  /** Goes on with one of them; the other stays as a version. @param {Turn} shown */
  end(shown = this.first) {
    this.done(shown);
    find(shown.view, '.thumb', HTMLElement).focus();
  }
}
