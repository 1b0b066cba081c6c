// The deployment page: who is served what and why, and ways to change it. Each act takes a reason.

import { act, button, element, keepLooking, read, timeCell } from './page.js';

const PATHS = ['/v1/deployment', '/v1/releases?limit=50', '/v1/proposals', '/v1/audit?limit=20'];
const EVERYBODY = 'Everybody is served by it once every replica has proved it. Answers that have begun end as they began.';
const PROVING = 'Every replica is asked to prove it …';

function actionsOf(release, deployment) {
  const cell = document.createElement('td');
  if (release.files_deleted_at) return cell;
  if (release.name === deployment.champion && deployment.canary_id === null) return cell;
  const promotion = {
    title: `Promote ${release.name}`, text: EVERYBODY, path: '/v1/deployment/promote',
    body: { release: release.name }, meanwhile: PROVING,
  };
  cell.append(button('Promote', promotion.title, () => act(promotion)));
  if (release.was_champion && release.name !== deployment.champion) {
    const rollback = {
      title: `Roll back to ${release.name}`, text: EVERYBODY, path: '/v1/deployment/rollback',
      body: { to: release.name },
    };
    cell.append(' ', button('Roll back to it', rollback.title, () => act(rollback)));
  }
  return cell;
}

function rowOf(release, deployment) {
  const row = document.createElement('tr');
  row.dataset.release = release.name;
  row.append(element('td', release.name), element('td', release.alias ?? ''),
    element('td', release.started_from ?? ''), timeCell(release.created_at), actionsOf(release, deployment));
  return row;
}

function showNow(deployment) {
  const now = document.querySelector('#now');
  const challenger = deployment.challenger
    ? `; ${deployment.challenger} for ${Math.round(100 * deployment.share)} % of the users` : '';
  now.replaceChildren(`${deployment.champion} is served${challenger}. By itself: ${deployment.autonomy}. `);
  if (deployment.rolls_back_to) {
    const rollback = {
      title: 'Roll back', text: `${deployment.rolls_back_to} takes over.`, path: '/v1/deployment/rollback',
      body: { to: deployment.rolls_back_to },
    };
    now.append(button('Roll back', 'Roll back', () => act(rollback)));
  }
  document.querySelector('#evidence').textContent = deployment.sentence ?? '';
}

function showProposals(proposals) {
  const items = proposals.map((proposal) => {
    const item = element('li', `${proposal.action} ${proposal.release}: ${proposal.reason} `);
    const what = `${proposal.action} of ${proposal.release}`;
    item.append(button('Decline', `Decline ${what}`,
      () => act({ title: 'Decline', text: what, path: `/v1/proposals/${proposal.id}/decline` })));
    return item;
  });
  document.querySelector('#proposals').replaceChildren(...items);
}

function showAudit(entries) {
  const rows = entries.map((entry) => {
    const row = document.createElement('tr');
    row.append(timeCell(entry.created_at), element('td', entry.actor), element('td', entry.action),
      element('td', entry.subject), element('td', entry.reason));
    return row;
  });
  document.querySelector('#audit').replaceChildren(...rows);
}

await keepLooking('The deployment', async () => {
  const [deployment, releases, proposals, audit] = await Promise.all(PATHS.map(read));
  return () => {
    showNow(deployment);
    showProposals(proposals);
    showAudit(audit);
    document.querySelector('#releases').replaceChildren(...releases.map((release) => rowOf(release, deployment)));
  };
});
