// @ts-check
/**
 * Mathematics in Markdown, as models write it: \( \), \[ \], $$ $$, and $ $ where it cannot be money.
 * The rules only find it; it is typeset when its block is complete, and stays readable TeX where it cannot be.
 */

const PAIRS = [
  { open: '$$', close: '$$', isDisplay: true },
  { open: '\\[', close: '\\]', isDisplay: true },
  { open: '\\(', close: '\\)', isDisplay: false },
  { open: '$', close: '$', isDisplay: false },
];

/** Where the pair that opens at `start` closes, or -1. @param {string} text @param {number} start @param {typeof PAIRS[0]} pair */
function closing(text, start, { open, close }) {
  const from = start + open.length;
  for (let at = text.indexOf(close, from); at >= 0; at = text.indexOf(close, at + 1)) {
    if (text[at - 1] === '\\' && close[0] !== '\\') continue;
    if (open !== '$') return at > from ? at : -1;
    // "$5 and $6" is money: what opens is followed by no space, what closes by no digit and preceded by no space.
    const isTight = /\S/.test(text[from] ?? ' ') && /\S/.test(text[at - 1]) && !/\d/.test(text[at + 1] ?? '');
    return isTight && at > from && !text.slice(from, at).includes('\n') ? at : -1;
  }
  return -1;
}

/** Teaches a parser to find mathematics. @param {InstanceType<typeof import('/static/vendor/markdown-it.js').default>} md */
export function withMathematics(md) {
  md.inline.ruler.before('escape', 'mathematics', (state, isSilent) => {
    const pair = PAIRS.find(({ open }) => state.src.startsWith(open, state.pos));
    const end = pair ? closing(state.src, state.pos, pair) : -1;
    if (!pair || end < 0 || end > state.posMax) return false;
    if (!isSilent) {
      const token = state.push('mathematics', 'span', 0);
      token.content = state.src.slice(state.pos + pair.open.length, end);
      token.meta = pair;
    }
    state.pos = end + pair.close.length;
    return true;
  });
  // On lines of its own, before they are taken for lists or headings.
  md.block.ruler.before(
    'fence',
    'mathematics_block',
    (state, startLine, endLine, isSilent) => {
      const first = state.bMarks[startLine] + state.tShift[startLine];
      const pair = PAIRS.find(({ open, isDisplay }) => isDisplay && state.src.startsWith(open, first));
      const end = pair ? closing(state.src, first, pair) : -1;
      if (!pair || end < 0 || end > state.eMarks[endLine - 1]) return false;
      let line = startLine;
      while (state.eMarks[line] < end) line += 1;
      if (state.src.slice(end + pair.close.length, state.eMarks[line]).trim()) return false;
      if (isSilent) return true;
      const token = state.push('mathematics_block', 'p', 0);
      token.content = state.src.slice(first + pair.open.length, end);
      token.meta = pair;
      state.line = line + 1;
      return true;
    },
    { alt: ['paragraph', 'reference', 'blockquote', 'list'] },
  );
  md.renderer.rules.mathematics_block = (...args) => `<p>${md.renderer.rules.mathematics?.(...args)}</p>`;
  md.renderer.rules.mathematics = (tokens, at) => {
    const { content, meta } = tokens[at];
    const pair = /** @type {typeof PAIRS[0]} */ (meta);
    const source = md.utils.escapeHtml(pair.open + content + pair.close);
    return `<span class="${pair.isDisplay ? 'math display' : 'math'}">${source}</span>`;
  };
}

/** Typesets what the rules found in an element, as MathML. @param {HTMLElement} root */
export async function typeset(root) {
  const found = /** @type {HTMLElement[]} */ ([...root.querySelectorAll('span.math:not([data-done])')]);
  if (!found.length) return;
  await import('/static/vendor/katex.js');
  const { katex } = /** @type {{katex: typeof import('/static/vendor/katex.js').default}} */ (/** @type {unknown} */ (window));
  for (const span of found) {
    span.dataset.done = '';
    const pair = PAIRS.find(({ open }) => span.textContent?.startsWith(open));
    const source = span.textContent ?? '';
    if (!pair) continue;
    try {
      const tex = source.slice(pair.open.length, -pair.close.length);
      const limits = { maxSize: 20, maxExpand: 200, trust: false, throwOnError: true };
      katex.render(tex, span, { ...limits, output: 'mathml', displayMode: pair.isDisplay });
    } catch {
      span.textContent = source;
    }
  }
}
