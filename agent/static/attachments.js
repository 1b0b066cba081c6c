// @ts-check
/** Files: no model here reads any, which is said where somebody wants to give one. */

const LINE = 'No model here reads files yet';
const SHOWN_MS = 6000;

/** @param {HTMLElement} button @param {HTMLElement} line @param {HTMLElement} field Where text is pasted. */
export function refuseFiles(button, line, field) {
  let timer = 0;
  const say = () => {
    clearTimeout(timer);
    line.textContent = LINE;
    timer = setTimeout(() => (line.textContent = ''), SHOWN_MS);
  };
  button.onclick = say;
  // Text that comes with a file is pasted as ever.
  field.addEventListener('paste', ({ clipboardData }) => clipboardData?.files.length && say());
  const holdsFiles = (/** @type {DragEvent} */ { dataTransfer }) => dataTransfer?.types.includes('Files') ?? false;
  // Or the browser would leave the page for the file.
  document.addEventListener('dragover', (event) => holdsFiles(event) && event.preventDefault());
  document.addEventListener('drop', (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    say();
  });
}
