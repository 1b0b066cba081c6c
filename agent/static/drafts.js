// @ts-check
/** What is being written survives a reload: one draft for each conversation, and one for a new chat. */

const PREFIX = 'everloop.draft';

/** @param {string} conversation Its id; empty for a new chat. */
const keyOf = (conversation) => (conversation ? `${PREFIX}.${conversation}` : PREFIX);

/** @param {string} conversation @param {string} text */
export function keepDraft(conversation, text) {
  try {
    if (text) localStorage.setItem(keyOf(conversation), text);
    else localStorage.removeItem(keyOf(conversation));
  } catch { /* No storage, or no room in it: the draft then lasts as long as the page. */ }
}

/** @param {string} conversation */
export function draftOf(conversation) {
  try {
    return localStorage.getItem(keyOf(conversation)) ?? '';
  } catch {
    return '';
  }
}

export function forgetDrafts() {
  try {
    for (const key of Object.keys(localStorage)) if (key.startsWith(PREFIX)) localStorage.removeItem(key);
  } catch { /* No storage, no drafts. */ }
}
