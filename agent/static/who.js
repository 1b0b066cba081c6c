// @ts-check
/** Who uses this page: the one who is signed in, or (where nobody signs in) a name that this browser keeps. */
import { call, uuid } from './server.js';

/**
 * Somebody who is signed in, as the server tells it.
 *
 * @typedef {object} Account
 * @property {string} name
 * @property {'user' | 'rater' | 'operator' | 'admin'} role
 * @property {string} user Who they are to chats and feedback.
 * @property {boolean} has_password
 * @property {string | null} issuer Where they sign in, if that is elsewhere.
 */

/** Who is signed in and how one can. @returns {Promise<{access: string, account: Account | null, provider: string | null}>} */
export const session = async () => (await call('/v1/session')).json();

let account = await session().then((told) => told.account, () => null);
let known = '';

/** Who is asking from now on: whoever was forgotten is somebody else. */
export async function whoAsksAnew() {
  account = (await session()).account;
  return whoAsks(true);
}

/** The name of whoever uses this browser, where nobody signs in one of its own; somebody else where it is to be a new one. */
export function whoAsks(isNew = false) {
  if (account) return account.user;
  let user = isNew ? '' : known;
  try {
    if (!isNew) user = localStorage.getItem('everloop.user') || user;
    user ||= uuid();
    localStorage.setItem('everloop.user', user);
  } catch { /* Storage is forbidden here: the name then lasts as long as the page. */ }
  known = user || uuid();
  return known;
}
