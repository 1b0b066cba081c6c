// @ts-check
/** A question that the server is too busy for waits in its place, and is asked again when the server said. */
import { find } from './server.js';

export class Countdown {
  timer = 0;

  /** @param {HTMLElement} root Holds the line and both buttons. @param {() => boolean} again Asks; false where it cannot now. */
  constructor(root, again) {
    this.root = root;
    this.again = again;
    this.line = find(root, 'span', HTMLElement);
    find(root, '.now', HTMLElement).onclick = () => this.ask();
  }

  /** @param {number} seconds */
  start(seconds) {
    this.stop();
    this.root.hidden = false;
    const until = performance.now() + seconds * 1000;
    const tick = () => {
      const left = Math.max(0, Math.ceil((until - performance.now()) / 1000));
      this.line.textContent = `Trying again in ${left} s`;
      if (left === 0) this.ask();
    };
    this.timer = setInterval(tick, 1000);
    tick();
  }

  ask() {
    if (this.again()) this.stop(); // Else another answer is on its way; the next second may be better.
  }

  stop() {
    clearInterval(this.timer);
    this.root.hidden = true;
  }
}
