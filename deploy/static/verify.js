// @ts-check
/** The audit page's button: has the server compute every hash anew, and says whether the chain holds. */

import { call } from '/static/server.js';

export function verify() {
  const button = document.querySelector('#verify');
  const said = document.querySelector('#verified');
  if (!button || !said) return;
  button.addEventListener('click', async () => {
    said.textContent = 'Computing every hash …';
    try {
      const found = await (await call('/v1/audit/verification')).json();
      said.textContent = `The chain holds: ${found.entries} entries, the last has the hash ${found.last_hash.slice(0, 12)}.`;
    } catch (error) {
      said.textContent = `The chain does not hold, or could not be read. ${error instanceof Error ? error.message : error}`;
    }
  });
}
