// @ts-check
/** One's account: signing out, a password, and keys for programs. */
import { forgetDrafts } from './drafts.js';
import { call, copyOf, find, Problem } from './server.js';
import { session } from './who.js';

/**
 * @typedef {object} Key
 * @property {string} id
 * @property {string} name
 * @property {string} role
 * @property {string} created_at
 * @property {string | null} expires_at
 * @property {string | null} last_used_at
 */
const ROLES = ['user', 'rater', 'operator', 'admin'];
const problem = find(document, '#problem', HTMLElement);
const who = find(document, '#who', HTMLElement);
const own = find(document, '#own', HTMLElement);
const keys = find(document, '#keys', HTMLElement);
const secret = find(document, '#secret', HTMLElement);
const passwordState = find(document, '#password-state', HTMLElement);
const [current, fresh] = ['#current', '#new-password'].map((id) => find(document, id, HTMLInputElement));
const keyName = find(document, '#key-name', HTMLInputElement);
const [days, role] = ['#key-days', '#key-role'].map((id) => find(document, id, HTMLSelectElement));
const when = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' });

/** @param {() => Promise<unknown>} act */
async function attempt(act) {
  problem.textContent = '';
  try {
    await act();
  } catch (error) {
    problem.textContent = error instanceof Problem ? error.message : 'Something went wrong on this page.';
    if (!(error instanceof Problem)) console.error(error);
  }
}

/** @param {string | null} at @param {string} otherwise */
const told = (at, otherwise) => (at ? when.format(new Date(at)) : otherwise);

/** @param {Key} key */
function row(key) {
  const item = copyOf('#key-template');
  find(item, 'h3', HTMLElement).textContent = key.name;
  find(item, '.summary', HTMLElement).textContent =
    `${key.id}, as ${key.role}. Made ${told(key.created_at, '')}, ends ${told(key.expires_at, 'never')}, ` +
    `last used ${told(key.last_used_at, 'never')}.`;
  const path = `/v1/keys/${encodeURIComponent(key.id)}`;
  find(item, '.rotate', HTMLElement).onclick = () => attempt(async () => {
    await reveal(await call(`${path}/rotate`, { method: 'POST', body: {} }), 'Shown this once; the one before ends within an hour:');
  });
  find(item, '.revoke', HTMLElement).onclick = () => attempt(async () => {
    await call(path, { method: 'DELETE' });
    await show();
  });
  return item;
}

/** Shows a secret, this once. @param {Response} response @param {string} says */
async function reveal(response, says) {
  const key = await response.json();
  find(secret, 'span', HTMLElement).textContent = says;
  find(secret, 'code', HTMLElement).textContent = key.secret;
  find(secret, 'button', HTMLElement).onclick = () => attempt(() => navigator.clipboard.writeText(key.secret));
  secret.hidden = false;
  await show();
}

async function show() {
  /** @type {Key[]} */
  const found = await (await call('/v1/keys')).json();
  keys.replaceChildren(...found.map(row));
}

find(document, '#sign-out', HTMLElement).onclick = () => attempt(async () => {
  await call('/v1/session', { method: 'DELETE' });
  forgetDrafts(); // The next person in this browser is somebody else.
  location.assign('/login');
});

find(document, '#set-password', HTMLFormElement).onsubmit = (event) => {
  event.preventDefault();
  passwordState.textContent = '';
  void attempt(async () => {
    await call('/v1/session/password', { method: 'PUT', body: { password: fresh.value, current: current.value || null } });
    current.value = fresh.value = '';
    passwordState.textContent = 'It is set. You are signed out everywhere else.';
    hasPassword(true);
  });
};

find(document, '#new-key', HTMLFormElement).onsubmit = (event) => {
  event.preventDefault();
  void attempt(async () => {
    const body = { name: keyName.value, days: Number(days.value), role: role.value };
    await reveal(await call('/v1/keys', { method: 'POST', body }), 'The key, shown this once:');
    keyName.value = '';
  });
};

/** @param {boolean} has */
function hasPassword(has) {
  find(document, '#no-password', HTMLElement).hidden = has;
  find(document, '#current-field', HTMLElement).hidden = !has;
}

await attempt(async () => {
  const { access, account } = await session();
  if (access === 'open') who.textContent = 'Nobody signs in here: whoever reaches this machine may do everything.';
  if (!account) return;
  who.textContent = `${account.name}, ${account.role}`;
  find(document, '#username', HTMLInputElement).value = account.name;
  find(document, '#operate', HTMLElement).hidden = !['operator', 'admin'].includes(account.role);
  role.replaceChildren(...ROLES.slice(0, ROLES.indexOf(account.role) + 1).map((each) => new Option(each)));
  find(document, '#password-part', HTMLElement).hidden = account.issuer !== null;
  hasPassword(account.has_password);
  own.hidden = false;
  await show();
});
