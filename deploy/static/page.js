// What the operators' pages share: elements, messages, and acts that take a reason.

const problem = document.querySelector('#problem');
const dialog = document.querySelector('#act');
const reason = document.querySelector('#reason');
let again = async () => {};

/** Return an element with a text, so that nothing that was written by others is ever taken for markup. */
export function element(name, text = '', className = '') {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

/** Return a table cell with a time in the reader's zone. */
export function timeCell(when) {
  const time = element('time', new Date(when).toLocaleString());
  time.dateTime = when;
  const cell = document.createElement('td');
  cell.append(time);
  return cell;
}

/** Return a button; the label says to what it is done. */
export function button(text, label, act) {
  const made = element('button', text, 'danger');
  made.type = 'button';
  made.setAttribute('aria-label', label);
  made.addEventListener('click', act);
  return made;
}

/** Show a message above everything, or none. */
export function tell(text) {
  problem.textContent = text;
  problem.hidden = !text;
}

/** Return what the server has at a path. */
export async function read(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`The server answered ${response.status}.`);
  return response.json();
}

/** Look again and again; what is focused stays so although it is drawn anew. */
export async function keepLooking(what, look, everyMs = 2000) {
  let cannotRead = false;
  again = async () => {
    try {
      const show = await look();
      const focused = document.activeElement?.getAttribute('aria-label');
      show();
      if (focused) document.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
      if (cannotRead) tell('');
      cannotRead = false;
    } catch (error) {
      cannotRead = true;
      tell(`${what} cannot be read: ${error.message} Trying again.`);
    }
  };
  await again();
  setInterval(() => { if (!dialog.open) again(); }, everyMs);
}

/** Ask for a reason; return it, or null where one thinks better of it. */
async function askReason(title, text, act) {
  document.querySelector('#act-title').textContent = `${title}?`;
  document.querySelector('#act-text').textContent = text;
  document.querySelector('#act-button').textContent = act;
  reason.value = '';
  dialog.returnValue = 'keep';
  dialog.showModal();
  reason.focus();
  await new Promise((resolve) => dialog.addEventListener('close', resolve, { once: true }));
  return dialog.returnValue === 'act' ? reason.value.trim() : null;
}

/** Ask for a reason, send the act with it, and look; `meanwhile` is told while it is done. */
export async function act({ title, text, act: named = title, path, body = {}, meanwhile = '' }) {
  const why = await askReason(title, text, named);
  if (why === null) return;
  tell(meanwhile);
  const response = await fetch(path, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ ...body, reason: why }),
  });
  await again();
  tell(response.ok ? '' : (await response.json()).error.message);
}

// Enter presses the first button of a form, which must not be the one that keeps things without a word.
dialog.querySelector('form').addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.target !== reason) return;
  event.preventDefault();
  dialog.querySelector('#act-button').click();
});
