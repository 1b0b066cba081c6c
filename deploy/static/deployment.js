// The deployment page: who is served what and why, and ways to change it. Each act takes a reason.

const LOOK_EVERY_MS = 2000;

const problem = document.querySelector('#problem');
const dialog = document.querySelector('#act');
const reason = document.querySelector('#reason');
let cannotRead = false;

/** Return an element with a text, so that nothing of a release is ever taken for markup. */
function element(name, text = '', className = '') {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function tell(text) {
  problem.textContent = text;
  problem.hidden = !text;
}

function timeOf(when) {
  const time = element('time', new Date(when).toLocaleString());
  time.dateTime = when;
  const cell = document.createElement('td');
  cell.append(time);
  return cell;
}

function button(text, label, act) {
  const made = element('button', text, 'danger');
  made.type = 'button';
  made.setAttribute('aria-label', label);
  made.addEventListener('click', act);
  return made;
}

/** Ask for a reason, and send the act with it. */
async function ask(title, text, path, body) {
  document.querySelector('#act-title').textContent = `${title}?`;
  document.querySelector('#act-text').textContent = text;
  document.querySelector('#act-button').textContent = title;
  reason.value = '';
  dialog.returnValue = 'keep';
  dialog.showModal();
  reason.focus();
  await new Promise((resolve) => dialog.addEventListener('close', resolve, { once: true }));
  if (dialog.returnValue !== 'act') return;
  tell(`${title}: every replica is asked to prove it …`);
  const response = await fetch(path, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ ...body, reason: reason.value.trim() }),
  });
  await look();
  tell(response.ok ? '' : (await response.json()).error.message);
}

function actionsOf(release, deployment) {
  const cell = document.createElement('td');
  if (release.name === deployment.champion && deployment.canary_id === null) return cell;
  const text = 'Everybody is served by it once every replica has proved it. Answers that have begun end as they began.';
  const body = { release: release.name };
  cell.append(button('Promote', `Promote ${release.name}`,
    () => ask(`Promote ${release.name}`, text, '/v1/deployment/promote', body)));
  return cell;
}

function rowOf(release, deployment) {
  const row = document.createElement('tr');
  row.dataset.release = release.name;
  row.append(element('td', release.name), element('td', release.alias ?? ''),
    element('td', release.started_from ?? ''), timeOf(release.created_at), actionsOf(release, deployment));
  return row;
}

function showNow(deployment) {
  const now = document.querySelector('#now');
  const challenger = deployment.challenger
    ? `; ${deployment.challenger} for ${Math.round(100 * deployment.share)} % of the users` : '';
  now.replaceChildren(`${deployment.champion} is served${challenger}. By itself: ${deployment.autonomy}. `);
  now.append(button('Roll back', 'Roll back', () => ask('Roll back',
    'The champion before takes over.', '/v1/deployment/rollback', {})));
  document.querySelector('#evidence').textContent = deployment.sentence ?? '';
}

function showProposals(proposals) {
  const items = proposals.map((proposal) => {
    const item = element('li', `${proposal.action} ${proposal.release}: ${proposal.reason} `);
    item.append(button('Decline', `Decline ${proposal.action} of ${proposal.release}`, () => ask('Decline',
      `${proposal.action} ${proposal.release}`, `/v1/proposals/${proposal.id}/decline`, {})));
    return item;
  });
  document.querySelector('#proposals').replaceChildren(...items);
}

function showAudit(entries) {
  const rows = entries.map((entry) => {
    const row = document.createElement('tr');
    row.append(timeOf(entry.created_at), element('td', entry.actor), element('td', entry.action),
      element('td', entry.subject), element('td', entry.reason));
    return row;
  });
  document.querySelector('#audit').replaceChildren(...rows);
}

async function read(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`The server answered ${response.status}.`);
  return response.json();
}

async function look() {
  try {
    const paths = ['/v1/deployment', '/v1/releases?limit=50', '/v1/proposals', '/v1/audit?limit=20'];
    const [deployment, releases, proposals, audit] = await Promise.all(paths.map(read));
    const focused = document.activeElement?.getAttribute('aria-label');
    showNow(deployment);
    showProposals(proposals);
    showAudit(audit);
    const rows = releases.map((release) => rowOf(release, deployment));
    document.querySelector('#releases').replaceChildren(...rows);
    if (focused) document.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
    if (cannotRead) tell('');
    cannotRead = false;
  } catch (error) {
    cannotRead = true;
    tell(`The deployment cannot be read: ${error.message} Trying again.`);
  }
}

// Enter presses the first button of a form, which must not be the one that keeps things without a word.
dialog.querySelector('form').addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.target !== reason) return;
  event.preventDefault();
  dialog.querySelector('#act-button').click();
});

await look();
setInterval(() => { if (!dialog.open) look(); }, LOOK_EVERY_MS);
