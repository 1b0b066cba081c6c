// @ts-check
/** What the pages know of the server: who asks, how to call it, and failures that are meant to be read. */

const RELOADED_EVERY_MS = 30_000;

/** randomUUID exists only on secure origins; a plain-http address needs the long way. */
export function uuid() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-');
}

/** A failure whose message is meant for the person reading the page. */
export class Problem extends Error {
  code = '';
  plain = ''; // The message without when to try again.
  isBusy = false; // Too much was asked, by this person or all.
  wait = 0; // Seconds after which the server would have it tried again, where it said so.
}

/** Goes to where one signs in, and comes back. */
export const signIn = () => location.assign(`/login?next=${encodeURIComponent(location.pathname + location.search)}`);

/** A page that takes its reader for somebody else begins anew; once in a while, or a server that errs has it loop. */
function reloadOnce() {
  const at = Number(sessionStorage.getItem('everloop.reloaded'));
  if (Date.now() - at < RELOADED_EVERY_MS) return;
  sessionStorage.setItem('everloop.reloaded', `${Date.now()}`);
  location.reload();
}

/**
 * Calls the server; what it refuses is a Problem.
 *
 * @param {string} path
 * @param {{method?: string, body?: object, user?: string, signal?: AbortSignal}} [options]
 */
export async function call(path, { method = 'GET', body, user, signal } = {}) {
  const headers = /** @type {Record<string, string>} */ ({});
  if (body) headers['content-type'] = 'application/json';
  if (user) headers['x-everloop-user'] = encodeURIComponent(user);
  const request = { method, headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(path, request).catch(() => null);
  if (!response) throw new Problem('The server could not be reached.');
  if (response.ok) return response;
  const envelope = await response.json().catch(() => null);
  const message = envelope?.error?.message || `The server answered with status ${response.status}.`;
  const wait = Number(response.headers.get('retry-after'));
  const problem = new Problem(wait > 0 ? `${message} Try again in ${wait} s.` : message);
  problem.code = envelope?.error?.code ?? '';
  problem.plain = message;
  problem.isBusy = response.status === 429;
  problem.wait = [429, 503].includes(response.status) && wait > 0 ? wait : 0;
  if (problem.code === 'not_signed_in') signIn();
  if (problem.code === 'not_you') reloadOnce(); // Forgotten, or signed in as somebody else, in another tab.
  throw problem;
}

/** Waits for a promise, but not on once the signal is given. @template T @param {AbortSignal} signal @param {Promise<T>} promise */
export const unless = (signal, promise) =>
  Promise.race([
    promise,
    new Promise((_, reject) => {
      if (signal.aborted) reject(signal.reason);
      signal.addEventListener('abort', () => reject(signal.reason), { once: true });
    }),
  ]);

/** The data of each event, which the server puts on one line. @param {Response} response */
export async function* events(response) {
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (let part = await reader?.read(); part && !part.done; part = await reader?.read()) {
    const lines = (rest + part.value).split('\n');
    rest = lines.pop() ?? '';
    for (const line of lines) if (line.startsWith('data:')) yield line.slice(5).trim();
  }
}

/** What is in a template, to be put on the page. @param {string} id */
export const copyOf = (id) => document.importNode(find(document, id, HTMLTemplateElement).content, true);

/** An element of a page by its selector. @type {<T extends HTMLElement>(root: ParentNode, selector: string, type: new () => T) => T} */
export const find = (root, selector, type) => {
  const element = root.querySelector(selector);
  if (!(element instanceof type)) throw new Error(`The page lacks ${selector}`);
  return element;
};
