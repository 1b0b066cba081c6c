// @ts-check
/**
 * An answer that somebody said something about: as it was then, and (asked again) as it is now. Nothing is learned from
 * what is asked here.
 */
import { call, Problem } from './server.js';

/** @param {string} name @param {string} text @param {string} [className] */
function element(name, text, className = '') {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

/** @param {string} title @param {string} text */
function side(title, text) {
  const made = document.createElement('div');
  made.append(element('h4', title), element('p', text, 'words'));
  return made;
}

/** @param {HTMLElement} into @param {string} episode @param {string} user */
async function tell(into, episode, user) {
  const told = await (await call(`/v1/episodes/${encodeURIComponent(episode)}`, { user })).json();
  const sides = element('div', '', 'sides');
  sides.append(side(`Then, by release ${told.release}`, told.answer));
  const better = told.feedback.findLast((/** @type {{kind: string}} */ { kind }) => kind === 'correction');
  if (better) sides.append(side('As you corrected it', better.text));
  const ask = element('button', 'What does it say now?', 'soft');
  const state = element('p', '');
  state.setAttribute('role', 'status');
  ask.onclick = async () => {
    ask.hidden = true;
    state.textContent = 'Asking …';
    try {
      const body = { model: 'everloop', messages: told.messages, store: false, user };
      const now = await (await call('/v1/chat/completions', { method: 'POST', body })).json();
      sides.append(side(`Now, by release ${now.model}`, now.choices[0].message.content));
      state.textContent = '';
    } catch (error) {
      ask.hidden = false;
      state.textContent = error instanceof Problem ? error.message : 'It could not be asked.';
    }
  };
  into.replaceChildren(element('p', told.messages.at(-1).content, 'words asked'), sides, ask, state);
}

/** What is to be opened under a receipt. @param {string} episode @param {string} user */
export function thenAndNow(episode, user) {
  const details = document.createElement('details');
  const body = element('div', '');
  details.append(element('summary', 'The answer, then and now'), body);
  details.className = 'then';
  details.ontoggle = () => {
    if (!details.open || body.firstElementChild) return;
    body.textContent = 'Reading …';
    tell(body, episode, user).catch((error) => { // Opened again, it is read again.
      body.textContent = error instanceof Problem ? error.message : 'It could not be read.';
    });
  };
  return details;
}
