// @ts-check
/** How far tools may go: each with its level, which a person may lower below what the operator allows. */
import { call, copyOf, find, Problem } from './server.js';
import { whoAsks } from './who.js';

/**
 * @typedef {object} Tool
 * @property {string} name
 * @property {string} description
 * @property {string} source
 * @property {string} ceiling
 * @property {string | null} chosen
 * @property {string} level
 */
const LEVELS = ['off', 'ask', 'auto'];
const SAYS = /** @type {Record<string, string>} */ ({
  off: 'Off', ask: 'Ask me each time', auto: 'Go ahead',
});
const list = find(document, '#tools', HTMLElement);
const state = find(document, '#tools-state', HTMLElement);

/** @param {Tool} tool */
function row(tool) {
  const item = copyOf('#tool-template');
  find(item, 'h3', HTMLElement).textContent = tool.name;
  find(item, '.summary', HTMLElement).textContent = `${tool.description} (${tool.source})`;
  const select = find(item, 'select', HTMLSelectElement);
  select.setAttribute('aria-label', `How far ${tool.name} may go`);
  const highest = LEVELS.indexOf(tool.ceiling);
  select.append(...LEVELS.slice(0, highest + 1).map((level) => new Option(SAYS[level], level)));
  select.value = tool.level;
  select.disabled = highest === 0;
  select.onchange = async () => {
    state.textContent = '';
    try {
      const path = `/v1/tools/${encodeURIComponent(tool.name)}`;
      await call(path, { method: 'PUT', body: { level: select.value }, user: whoAsks() });
      state.textContent = `Saved: ${tool.name}, ${SAYS[select.value].toLowerCase()}.`;
      tool.level = select.value;
    } catch (error) {
      select.value = tool.level;
      state.textContent = error instanceof Problem ? error.message : 'That could not be saved.';
    }
  };
  return item;
}

try {
  /** @type {{data: Tool[]}} */
  const { data } = await (await call('/v1/tools', { user: whoAsks() })).json();
  list.replaceChildren(...data.map(row));
} catch (error) {
  state.textContent = error instanceof Problem ? error.message : 'The tools cannot be read just now.';
}
