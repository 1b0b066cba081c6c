// The runs page: what is trained and how far it is, and a way to end it.

import { act, button, element, keepLooking, read, timeCell } from './page.js';

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
  const cancel = {
    title: `Cancel ${run.id}`, text: 'It ends after its current step, and nothing is registered.', act: 'Cancel the run',
    path: `/v1/runs/${encodeURIComponent(run.id)}/cancel`,
  };
  cell.append(button('Cancel', cancel.title, () => act(cancel)));
  return cell;
}

function rowOf(run) {
  const row = document.createElement('tr');
  row.dataset.run = run.id;
  row.append(
    element('td', run.id), element('td', run.recipe), element('td', run.status), progressOf(run),
    timeCell(run.started_at), element('td', run.release ?? ''),
    element('td', run.code ? `${run.reason} [${run.code}]` : run.reason), actionsOf(run),
  );
  return row;
}

await keepLooking('The runs', async () => {
  const runs = await read('/v1/runs');
  return () => {
    document.querySelector('#runs').replaceChildren(...runs.map(rowOf));
    document.querySelector('#none').hidden = runs.length > 0;
  };
});
