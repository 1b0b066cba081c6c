// @ts-check
/** What a person changed in an answer, as they write it. */

const MAX_CHARS = 8000; // Longer texts take too long to compare at each key.

/** Shows in `place` how `after` differs from `before`. @param {HTMLElement} place @param {string} before @param {string} after */
export async function showChanges(place, before, after) {
  if (before === after || before.length + after.length > MAX_CHARS) {
    place.replaceChildren();
    return;
  }
  await import('/static/vendor/diff.js');
  const { Diff } = /** @type {{Diff: typeof import('/static/vendor/diff.js')}} */ (/** @type {unknown} */ (window));
  place.replaceChildren(
    ...Diff.diffWordsWithSpace(before, after).map(({ value, added, removed }) => {
      if (!added && !removed) return value;
      const part = document.createElement(added ? 'ins' : 'del');
      part.textContent = value;
      return part;
    }),
  );
}
