// @ts-check
/**
 * The line under an answer that asks for a rating, where the server wants one. The server decides that when it scores
 * the answer, shortly after its end; the page looks then, once more if the score was late, and leaves it at that.
 */

const LOOK_AFTER_MS = [1500, 4000]; // Counted from the answer's end.
const LINE = 'Was this helpful? Your thumb here teaches the most.';

export class Invitation {
  looking = new AbortController();

  /** @param {HTMLElement} line @param {HTMLElement} button Dismisses it. @param {HTMLElement} next Focused then. */
  constructor(line, button, next) {
    this.line = line;
    this.button = button;
    button.onclick = () => {
      next.focus(); // The button that has the focus is about to go.
      this.end();
    };
  }

  /** Shows the line if a rating is asked for. @param {string} episode @param {string} user */
  async begin(episode, user) {
    this.end();
    const { signal } = (this.looking = new AbortController());
    const wanted = await isAskedFor(episode, user, signal).catch(() => false); // Nobody misses an invitation.
    if (!wanted || signal.aborted) return;
    this.line.textContent = LINE;
    this.button.hidden = false;
  }

  /** Takes the line away, and does not show it later. */
  end() {
    this.looking.abort();
    this.line.textContent = '';
    this.button.hidden = true;
  }
}

/** @param {string} episode @param {string} user @param {AbortSignal} signal */
async function isAskedFor(episode, user, signal) {
  const began = performance.now();
  const headers = { 'x-everloop-user': encodeURIComponent(user) };
  for (const after of LOOK_AFTER_MS) {
    await new Promise((resolve) => setTimeout(resolve, began + after - performance.now()));
    const response = await fetch(`/v1/episodes/${encodeURIComponent(episode)}`, { headers, signal });
    const { solicited, score, feedback } = response.ok ? await response.json() : {};
    if (solicited) return feedback.length === 0;
    if (score) return false;
  }
  return false;
}
