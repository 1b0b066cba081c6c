// @ts-check
/** Signing in: by a link, whose token is in the fragment of its address; by name and password; or elsewhere. */
import { call, find, Problem, session } from './server.js';

const form = find(document, '#by-password', HTMLFormElement);
const name = find(document, '#name', HTMLInputElement);
const password = find(document, '#password', HTMLInputElement);
const problem = find(document, '#problem', HTMLElement);
const state = find(document, '#state', HTMLElement);
const elsewhere = find(document, '#by-provider', HTMLAnchorElement);

/** Where to go on: a page of ours, whatever the address says. */
function next() {
  const asked = new URL(new URLSearchParams(location.search).get('next') ?? '/', location.origin);
  return asked.origin === location.origin ? asked.pathname + asked.search : '/';
}

/** @param {object} shown */
async function signIn(shown) {
  problem.textContent = '';
  state.textContent = 'Signing in …';
  try {
    await call('/v1/session', { method: 'POST', body: shown });
    location.replace(next());
  } catch (error) {
    state.textContent = '';
    problem.textContent = error instanceof Problem ? error.message : String(error);
  }
}

form.onsubmit = async (/** @type {SubmitEvent} */ event) => {
  event.preventDefault();
  await signIn({ name: name.value, password: password.value });
  password.select();
};

onhashchange = () => location.reload(); // Another link was pasted over this page's own address.
const link = location.hash.slice(1);
const { account, provider } = await session();
if (provider) {
  elsewhere.hidden = false;
  elsewhere.textContent = `Sign in with ${new URL(provider).host}`;
  elsewhere.href = `/login/oidc?next=${encodeURIComponent(next())}`;
}
const refused = new URLSearchParams(location.search).get('problem');
if (refused) problem.textContent = refused === 'account_disabled' ? 'This account is kept out.' : 'It did not work there. Try again.';
if (link) {
  history.replaceState(null, '', location.pathname + location.search); // Used up, and nobody's business.
  await signIn({ link });
} else if (account) state.textContent = `You are signed in as ${account.name}.`;
