// The runs page: what is trained and how far it is, and a way to end it.

const LOOK_EVERY_MS = 2000;

const rows = document.querySelector('#runs');
const problem = document.querySelector('#problem');
const dialog = document.querySelector('#cancel');
const reason = document.querySelector('#reason');

/** Return an element with a text, so that nothing of a run is ever taken for markup. */
function element(name, text = '', className = '') {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

/** Return a time that is left, in words. */
function left(seconds) {
  if (seconds === null) return '';
  if (seconds < 90) return `about ${Math.round(seconds)} s left`;
  return `about ${Math.round(seconds / 60)} min left`;
}

function progressOf(run) {
  const cell = element('td', '', 'progress');
  if (run.status !== 'running') return cell;
  const bar = document.createElement('progress');
  bar.max = Math.max(run.phase_total, 1);
  bar.value = run.phase_done;
  bar.setAttribute('aria-label', `${run.phase} of ${run.id}`);
  const when = run.is_stopped ? 'stopped, the next run goes on with it' : left(run.seconds_left);
  const words = [`${run.phase} ${run.phase_done} of ${run.phase_total}`, when];
  cell.append(bar, element('small', words.filter(Boolean).join(', ')));
  return cell;
}

function actionsOf(run) {
  const cell = document.createElement('td');
  if (run.status !== 'running') return cell;
  if (run.cancel_requested) {
    cell.append(element('small', run.is_stopped ? 'ends when the next run starts' : 'ends after its current step'));
    return cell;
  }
  const button = element('button', 'Cancel', 'danger');
  button.type = 'button';
  button.setAttribute('aria-label', `Cancel ${run.id}`);
  button.addEventListener('click', () => ask(run.id));
  cell.append(button);
  return cell;
}

function rowOf(run) {
  const row = document.createElement('tr');
  row.dataset.run = run.id;
  const started = new Date(run.started_at);
  const time = element('time', started.toLocaleString());
  time.dateTime = run.started_at;
  const when = document.createElement('td');
  when.append(time);
  row.append(
    element('td', run.id), element('td', run.recipe), element('td', run.status), progressOf(run), when,
    element('td', run.release ?? ''), element('td', run.code ? `${run.reason} [${run.code}]` : run.reason), actionsOf(run),
  );
  return row;
}

function tell(text) {
  problem.textContent = text;
  problem.hidden = !text;
}

async function look() {
  try {
    const response = await fetch('/v1/runs');
    if (!response.ok) throw new Error(`The server answered ${response.status}.`);
    const runs = await response.json();
    const focused = document.activeElement?.getAttribute('aria-label');
    rows.replaceChildren(...runs.map(rowOf));
    if (focused) rows.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
    document.querySelector('#none').hidden = runs.length > 0;
    tell('');
  } catch (error) {
    tell(`The runs cannot be read: ${error.message} Trying again.`);
  }
}

/** Ask for a reason, and end the run if one is given. */
async function ask(run) {
  document.querySelector('#cancel-run').textContent = run;
  reason.value = '';
  dialog.returnValue = 'keep';
  dialog.showModal();
  reason.focus();
  await new Promise((resolve) => dialog.addEventListener('close', resolve, { once: true }));
  if (dialog.returnValue !== 'cancel') return;
  const response = await fetch(`/v1/runs/${encodeURIComponent(run)}/cancel`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ reason: reason.value.trim() }),
  });
  await look();
  if (!response.ok) tell((await response.json()).error.message);
}

// Enter presses the first button of a form, which must not be the one that keeps the run without a word.
dialog.querySelector('form').addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.target !== reason) return;
  event.preventDefault();
  dialog.querySelector('button[value="cancel"]').click();
});

await look();
setInterval(look, LOOK_EVERY_MS);
