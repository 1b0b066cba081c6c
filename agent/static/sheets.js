// @ts-check
/**
 * Messages in sheets of a few. A browser keeps an eye on each part that it need not lay out while it is out of sight;
 * thousands of them cost it tens of milliseconds in every frame.
 */
const MAX_PARTS = 20;

export class Sheets {
  /** @param {HTMLElement} box */
  constructor(box) {
    this.box = box;
  }

  get parts() {
    return [...this.box.children].flatMap((sheet) => [...sheet.children]);
  }

  /** Shows these from top to bottom. What is here and stays is where these begin; it is not touched. @param {Element[]} wanted */
  show(wanted) {
    const there = new Set(wanted);
    for (const part of this.parts) if (!there.has(part)) part.remove();
    for (const sheet of [...this.box.children]) if (!sheet.childElementCount) sheet.remove();
    for (const part of wanted.slice(this.parts.length)) this.sheet('append').append(part);
  }

  /** Puts these above all others. @param {Element[]} parts */
  prepend(parts) {
    for (const part of parts.toReversed()) this.sheet('prepend').prepend(part);
  }

  /** Has the sheet at one end, a new one where that is full. @param {'append' | 'prepend'} end */
  sheet(end) {
    const last = end === 'append' ? this.box.lastElementChild : this.box.firstElementChild;
    if (last && last.childElementCount < MAX_PARTS) return last;
    const sheet = document.createElement('div');
    sheet.className = 'sheet';
    this.box[end](sheet);
    return sheet;
  }
}
