// @ts-check
/**
 * An answer's text as Markdown, shown while it grows.
 *
 * No HTML of the text is taken over (the parser escapes it), no image is loaded, and what comes out is sanitised
 * all the same. Only blocks that changed are drawn anew, so that nothing above the last line moves or loses its
 * selection.
 *
 * @typedef {import('/static/vendor/markdown-it.js').Token} Token
 */
import MarkdownIt from '/static/vendor/markdown-it.js';
import DOMPurify from '/static/vendor/purify.js';
import { typeset, withMathematics } from './mathematics.js';

const TAGS = [
  'p', 'br', 'hr', 'em', 'strong', 's', 'a', 'code', 'pre', 'blockquote', 'ul', 'ol', 'li', 'span', 'div',
  'h3', 'h4', 'h5', 'h6', 'table', 'thead', 'tbody', 'tr', 'th', 'td',
];

/** @param {string} html @returns {DocumentFragment} */
const clean = (html) =>
  DOMPurify.sanitize(html, {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ['href', 'class', 'start', 'title'],
    RETURN_DOM_FRAGMENT: true,
  });

const md = new MarkdownIt({ html: false, linkify: true, breaks: true });
withMathematics(md);
md.renderer.rules.image = (/** @type {Token[]} */ tokens, /** @type {number} */ at) => {
  // A picture from elsewhere would tell its host who reads what; its address can be opened by choice.
  const address = md.utils.escapeHtml(`${tokens[at].attrGet('src') ?? ''}`);
  return `<a href="${address}" title="${address}">${md.utils.escapeHtml(tokens[at].content || 'image')}</a>`;
};
for (const cell of ['th_open', 'td_open']) {
  md.renderer.rules[cell] = (tokens, at, options, _, self) => {
    // The page's policy allows no style in attributes.
    const side = /text-align:(\w+)/.exec(`${tokens[at].attrGet('style') ?? ''}`)?.[1];
    tokens[at].attrs = side ? [['class', `to-${side}`]] : null;
    return self.renderToken(tokens, at, options);
  };
}
for (const heading of ['heading_open', 'heading_close']) {
  md.renderer.rules[heading] = (tokens, at, options, _, self) => {
    // Under the page's own headings, of which "Everloop" is the second.
    tokens[at].tag = `h${Math.min(Number(tokens[at].tag[1]) + 2, 6)}`;
    return self.renderToken(tokens, at, options);
  };
}

/** The HTML of each block of a text. @param {string} text */
function blocksOf(text) {
  /** @type {Record<string, unknown>} */
  const environment = {};
  const tokens = md.parse(text, environment);
  const blocks = [];
  for (let start = 0, at = 0; at < tokens.length; at += 1) {
    if (tokens[at].level > 0 || tokens[at].nesting > 0) continue;
    blocks.push(md.renderer.render(tokens.slice(start, at + 1), md.options, environment));
    start = at + 1;
  }
  return blocks;
}

/** Dresses what is sanitised: links open elsewhere, tables scroll, code has its language and a button. @param {DocumentFragment} block */
function dress(block) {
  for (const link of block.querySelectorAll('a')) {
    link.target = '_blank';
    link.rel = 'noopener noreferrer nofollow';
  }
  for (const table of block.querySelectorAll('table')) {
    const frame = document.createElement('div');
    frame.className = 'table';
    frame.tabIndex = 0; // A wide one scrolls, by keyboard too.
    frame.setAttribute('role', 'region');
    frame.setAttribute('aria-label', 'Table');
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const code of block.querySelectorAll('pre')) {
    const frame = document.createElement('figure');
    frame.className = 'code';
    const caption = document.createElement('figcaption');
    const button = document.createElement('button');
    Object.assign(button, { type: 'button', className: 'copy soft', textContent: 'Copy' });
    button.setAttribute('aria-label', 'Copy this code');
    caption.append(languageOf(code) || 'code', button);
    code.replaceWith(frame);
    frame.append(caption, code);
    code.tabIndex = 0;
  }
}

/** @param {Element} pre */
const languageOf = (pre) => /language-([\w+#-]+)/.exec(pre.firstElementChild?.className ?? '')?.[1] ?? '';

/** Colours the code of a complete block. @param {HTMLElement} block */
async function highlight(block) {
  for (const pre of block.querySelectorAll('pre:not([data-done])')) {
    const [language, code] = [languageOf(pre), pre.firstElementChild];
    if (!language || !code) continue;
    /** @type {HTMLElement} */ (pre).dataset.done = '';
    const { default: hljs } = await import('/static/vendor/highlight.js');
    if (!hljs.getLanguage(language)) continue;
    const { value } = hljs.highlight(code.textContent ?? '', { language, ignoreIllegals: true });
    code.replaceChildren(clean(value));
  }
}

export class Markdown {
  /** @type {{html: string, element: Element}[]} */
  blocks = [];
  text = '';
  frame = 0;

  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
  }

  /** Shows a text that may still grow, at the next frame. @param {string} text */
  grow(text) {
    this.text = text;
    this.frame ||= requestAnimationFrame(() => this.draw(false));
  }

  /** Shows a text that is complete. @param {string} text */
  finish(text) {
    this.text = text;
    this.draw(true);
  }

  /** @param {boolean} isComplete */
  draw(isComplete) {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const wanted = blocksOf(this.text);
    let same = 0;
    while (same < this.blocks.length && this.blocks[same].html === wanted[same]) same += 1;
    for (const { element } of this.blocks.splice(same)) element.remove();
    for (const html of wanted.slice(same)) {
      const block = clean(html);
      dress(block);
      const element = block.firstElementChild;
      if (!element) continue;
      this.root.append(element);
      this.blocks.push({ html, element });
    }
    const complete = isComplete ? this.blocks : this.blocks.slice(0, -1);
    for (const { element } of complete) {
      if (!(element instanceof HTMLElement) || element.dataset.complete !== undefined) continue;
      element.dataset.complete = '';
      void Promise.all([highlight(element), typeset(element)]).catch((error) => console.error(error));
    }
  }
}
