// @ts-check
/** Following new text at the bottom until somebody scrolls up; and knowing when the top comes near. */
import { find } from './server.js';

const NEAR_PX = 2000;

export class Scroll {
  isStuck = true; // Follow new text until the person scrolls up.
  lastTop = 0;

  /** @param {HTMLElement} messages @param {() => void} nearTop */
  constructor(messages, nearTop) {
    this.box = find(document, '#scroller', HTMLElement);
    this.latest = find(document, '#latest', HTMLElement);
    const growth = new ResizeObserver(() => (this.isStuck ? this.toBottom() : (this.latest.hidden = this.gap() < 24)));
    for (const each of [messages, this.box]) growth.observe(each);
    this.latest.onclick = () => this.toBottom();
    this.box.onscroll = () => {
      const top = this.box.scrollTop;
      // The least move up lets go, or each new word would fight a slow wheel.
      this.isStuck = top < this.lastTop ? this.gap() < 2 : this.isStuck || this.gap() < 24;
      this.lastTop = top;
      this.latest.hidden = this.isStuck;
      if (this.isNearTop() && !this.isStuck) nearTop();
    };
  }

  toBottom() {
    this.box.scrollTo(0, this.box.scrollHeight);
  }

  gap() {
    return this.box.scrollHeight - this.box.clientHeight - this.box.scrollTop;
  }

  isNearTop() {
    return this.box.scrollTop < NEAR_PX;
  }

  /** A page that shrinks moves up by itself; that is nobody scrolling away. */
  forget() {
    this.lastTop = 0;
  }

  /** Before something is put above: a browser keeps what is read in its place, but not at the very top. */
  keep() {
    if (this.box.scrollTop === 0) this.box.scrollTop = 1;
  }
}
