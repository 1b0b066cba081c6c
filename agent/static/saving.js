// @ts-check
/**
 * What a person says of an answer, on its way to the server: in order, each once, offered again where it did not arrive.
 *
 * @typedef {{kind: 'thumb', value: number} | {kind: 'preference', over: string} | {kind: 'correction', text: string}
 *   | import('./reasons.js').Said} Feedback
 */
import { call, find, uuid } from './server.js';

export class Saving {
  queue = Promise.resolve();
  /** What did not arrive, by place and kind. @type {Map<string, {place: string, message: string, again: () => void}>} */
  unsaved = new Map();

  /** @param {HTMLElement} view @param {() => {episode_id: string, user: string}} about */
  constructor(view, about) {
    this.part = (/** @type {string} */ selector) => find(view, selector, HTMLElement);
    this.about = about;
  }

  /** @param {string} place @param {Feedback} feedback @param {() => void} done */
  save(place, feedback, done) {
    const key = uuid(); // One key for all tries: a lost reply must not make feedback count twice.
    const body = { ...this.about(), ...feedback, idempotency_key: key };
    const attempt = async () => {
      this.say(place, 'Saving…');
      const request = { method: 'POST', body, signal: AbortSignal.timeout(20_000) };
      await call('/v1/feedback', request).then(
        () => {
          this.unsaved.delete(slot);
          done();
        },
        (error) => this.unsaved.set(slot, { place, message: error.message, again }),
      );
      this.sayUnsaved(place);
    };
    // In a queue, so that quick clicks cannot overtake each other on the way.
    const again = () => void (this.queue = this.queue.then(attempt));
    const slot = `${place} ${feedback.kind}`;
    this.unsaved.delete(slot); // What is said now takes its place.
    again();
  }

  /** Offers to try again what did not arrive, whatever else did. @param {string} place */
  sayUnsaved(place) {
    const left = [...this.unsaved.values()].filter((each) => each.place === place);
    if (!left.length) return;
    this.say(place, `Not saved. ${left[0].message}`, () => left.forEach(({ again }) => again()));
  }

  /** @param {string} place @param {string} line @param {() => void} [again] Offered as Retry. */
  say(place, line, again) {
    this.part(`${place} .state`).textContent = line;
    this.part(`${place} .again`).hidden = !again;
    this.part(`${place} .again`).onclick = again ?? null;
  }
}
