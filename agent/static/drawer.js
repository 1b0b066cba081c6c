// @ts-check
/** A part of the page that is a drawer where the page is narrow: the focus goes in, stays, and returns. */

const NARROW = matchMedia('(max-width: 799px)');

export class Drawer {
  /** @param {HTMLElement} root @param {HTMLElement} button Opens it. @param {HTMLElement} first Is focused then. */
  constructor(root, button, first) {
    this.root = root;
    this.button = button;
    this.first = first;
    button.onclick = () => this.open();
    for (const each of root.querySelectorAll('.close')) each.addEventListener('click', () => this.close());
    document.querySelector('#veil')?.addEventListener('click', () => this.close());
    NARROW.onchange = () => this.set(false);
  }

  get isOpen() {
    return document.body.classList.contains('drawn');
  }

  open() {
    this.set(true);
    this.first.focus();
  }

  close() {
    if (!this.isOpen) return;
    this.set(false);
    this.button.focus();
  }

  /** @param {boolean} isOpen */
  set(isOpen) {
    document.body.classList.toggle('drawn', isOpen);
    this.button.setAttribute('aria-expanded', `${isOpen}`);
    for (const rest of document.querySelectorAll('.bar, #scroller, .dock')) rest.toggleAttribute('inert', isOpen);
  }
}
