// @ts-check
/** Draws the tables of charts. The table is what there is; who cannot see the drawing reads it. */

/** @typedef {import('/static/vendor/chart.js').Chart} Drawing */

const drawn = /** @type {Map<HTMLCanvasElement, Drawing>} */ (new Map());
const COLOURS = ['--accent', '--danger', '--code-name', '--code-word'];

/** @param {string} name */
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** @typedef {ReturnType<typeof read>} Table @param {Element} figure */
function read(figure) {
  const heads = [...figure.querySelectorAll('thead th')];
  const rows = [...figure.querySelectorAll('tbody tr')].map((row) =>
    [...row.children].map((cell) => cell instanceof HTMLElement ? cell.dataset.value ?? '' : ''));
  const isNamed = rows.some(([x]) => x !== '' && Number.isNaN(Number(x)));
  return { heads, rows, isNamed };
}

/** @param {string} text */
const value = (text) => text === '' ? null : Number(text);

/** @param {Table} table */
function datasets({ heads, rows, isNamed }) {
  let number = 0;
  return heads.slice(1).flatMap((head, index) => {
    const style = head instanceof HTMLElement ? head.dataset.style : 'line';
    if (style === 'none') return [];
    const stroke = colour(COLOURS[number++ % COLOURS.length]);
    const data = rows.map((row) => isNamed ? value(row[index + 1]) : { x: Number(row[0]), y: value(row[index + 1]) });
    return [{
      label: head.textContent ?? '', data, borderColor: stroke, backgroundColor: stroke,
      borderWidth: style === 'bars' ? 0 : 2, borderDash: style === 'limit' ? [6, 5] : [],
      showLine: style !== 'points', pointRadius: style === 'points' ? 5 : 0, pointHitRadius: 8, spanGaps: true,
      tension: 0,
    }];
  });
}

/** @param {HTMLElement} figure @param {Table} table */
function options(figure, { heads, isNamed }) {
  const ink = colour('--muted');
  const grid = { color: colour('--line') };
  const title = { display: true, text: heads[0]?.textContent ?? '', color: ink };
  const unit = figure.dataset.unit ? { display: true, text: figure.dataset.unit, color: ink } : { display: false };
  const x = isNamed ? { type: 'category', ticks: { color: ink }, grid } : { type: 'linear', title, ticks: { color: ink }, grid };
  const y = { type: figure.dataset.log ? 'logarithmic' : 'linear', title: unit, ticks: { color: ink }, grid };
  return {
    animation: false, responsive: true, maintainAspectRatio: false, indexAxis: isNamed ? 'y' : 'x',
    interaction: { mode: 'nearest', axis: 'x', intersect: false },
    plugins: { legend: { display: !isNamed, labels: { color: ink, boxHeight: 2, boxWidth: 24 } } },
    scales: isNamed ? { y: { ...x, type: 'category' }, x: { ...y, beginAtZero: true } } : { x, y },
  };
}

/** Draws every chart of a page, or draws it anew where its table changed. @param {ParentNode} root */
export async function draw(root) {
  const figures = [...root.querySelectorAll('figure.chart')].filter((figure) => figure.querySelector('canvas'));
  if (!figures.length) return;
  await import('/static/vendor/chart.js');
  const { Chart } = /** @type {{Chart: typeof import('/static/vendor/chart.js').Chart}} */ (/** @type {unknown} */ (window));
  for (const [canvas, drawing] of drawn) {
    if (canvas.isConnected) continue;
    drawing.destroy();
    drawn.delete(canvas);
  }
  for (const figure of figures) {
    const canvas = figure.querySelector('canvas');
    if (!canvas || !(figure instanceof HTMLElement)) continue;
    const table = read(figure);
    const data = { datasets: datasets(table), labels: table.rows.map(([x]) => x) };
    const config = /** @type {any} */ ({ type: table.isNamed ? 'bar' : 'line', data, options: options(figure, table) });
    const known = drawn.get(canvas);
    if (known) {
      known.data = config.data;
      known.options = config.options;
      known.update('none');
    } else drawn.set(canvas, new Chart(canvas, config));
  }
}

for (const query of ['(prefers-color-scheme: dark)', 'print']) {
  matchMedia(query).addEventListener('change', () => draw(document));
}
