// @ts-check
/**
 * The line under an answer that asks for a rating, or offers another answer to choose from, where the server wants one.
 * The server decides that when it scores the answer, shortly after its end; the page looks then, once more if the score
 * was late, and leaves it at that.
 */

const LOOK_AFTER_MS = [1500, 4000]; // Counted from the answer's end.
const LINES = {
  rating: 'Was this helpful? Your thumb here teaches the most.',
  pair: 'Would you choose between this answer and another one?',
};

export class Invitation {
  looking = new AbortController();

  /**
   * @param {HTMLElement} line @param {HTMLElement} another Takes up the offer. @param {HTMLElement} button Dismisses it.
   * @param {HTMLElement} next Focused then.
   */
  constructor(line, another, button, next) {
    this.line = line;
    this.another = another;
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
    const wanted = await askedFor(episode, user, signal).catch(() => null); // Nobody misses an invitation.
    if (!wanted || signal.aborted) return;
    this.line.textContent = LINES[wanted];
    this.another.hidden = wanted !== 'pair';
    this.button.hidden = false;
  }

  /** Takes the line away, and does not show it later. */
  end() {
    this.looking.abort();
    this.line.textContent = '';
    this.another.hidden = this.button.hidden = true;
  }
}

/** @param {string} episode @param {string} user @param {AbortSignal} signal @returns {Promise<'rating' | 'pair' | null>} */
async function askedFor(episode, user, signal) {
  const began = performance.now();
  const headers = { 'x-everloop-user': encodeURIComponent(user) };
  for (const after of LOOK_AFTER_MS) {
    await new Promise((resolve) => setTimeout(resolve, began + after - performance.now()));
    const response = await fetch(`/v1/episodes/${encodeURIComponent(episode)}`, { headers, signal });
    const { solicited, score, feedback } = response.ok ? await response.json() : {};
    if (solicited) return feedback.length ? null : solicited.form;
    if (score) return null;
  }
  return null;
}
