// @ts-check
/** Signing in: by a link, whose token is in the fragment of its address; by name and password; or elsewhere. */
import { call, find, Problem } from './server.js';
import { session } from './who.js';

const link = location.hash.slice(1);
if (link) history.replaceState(null, '', location.pathname + location.search); // It is nobody else's business.

const REFUSED = /** @type {Record<string, string>} */ ({
  account_disabled: 'This account is kept out.',
  another_browser: 'This was begun in another browser. Try again here.',
  too_many_requests: 'That was too often. Wait a minute.',
});

const form = find(document, '#by-password', HTMLFormElement);
const name = find(document, '#name', HTMLInputElement);
const password = find(document, '#password', HTMLInputElement);
const problem = find(document, '#problem', HTMLElement);
const state = find(document, '#state', HTMLElement);
const elsewhere = find(document, '#by-provider', HTMLAnchorElement);
const useLink = find(document, '#by-link', HTMLButtonElement);

/** Where to go on: a page of ours, whatever the address says; as a whole address, which nothing can turn into another. */
function next() {
  const asked = new URL(new URLSearchParams(location.search).get('next') ?? '/', location.origin);
  return asked.origin === location.origin ? asked.href : `${location.origin}/`;
}

/** @param {unknown} error */
function tell(error) {
  state.textContent = '';
  problem.textContent = error instanceof Problem ? error.message : 'Something went wrong on this page.';
  if (!(error instanceof Problem)) console.error(error);
}

/** @param {object} shown */
async function signIn(shown) {
  problem.textContent = '';
  state.textContent = 'Signing in …';
  try {
    await call('/v1/session', { method: 'POST', body: shown });
    if ((await session()).account) return location.replace(next());
    throw new Problem('This browser did not keep the cookie: open the page at the address that it has for everybody.');
  } catch (error) {
    tell(error);
  }
}

form.onsubmit = async (/** @type {SubmitEvent} */ event) => {
  event.preventDefault();
  await signIn({ name: name.value, password: password.value });
  password.select();
};

find(form, 'button', HTMLButtonElement).disabled = false; // Before there is a script, the browser would send it its own way.

onhashchange = () => location.reload(); // Another link was pasted over this page's own address.
useLink.onclick = () => signIn({ link });
try {
  const { account, provider } = await session();
  if (provider) {
    elsewhere.hidden = false;
    elsewhere.textContent = `Sign in with ${new URL(provider).host}`;
    const onwards = next().slice(location.origin.length);
    elsewhere.href = `/login/oidc?next=${encodeURIComponent(onwards)}`;
  }
  const refused = new URLSearchParams(location.search).get('problem');
  if (refused) problem.textContent = REFUSED[refused] ?? 'It did not work there. Try again.';
  if (account) state.textContent = `You are signed in as ${account.name}.`;
  // A link that somebody sent must not put what one says into their account unseen.
  if (link && account) useLink.hidden = false;
  else if (link) await signIn({ link });
} catch (error) {
  tell(error);
  useLink.hidden = !link;
}
