// @ts-check
/**
 * The list of conversations: found again, renamed, deleted. On a narrow page it is a drawer.
 *
 * @typedef {{id: string, title: string | null, updated_at: string}} Talk
 */
import { Drawer } from './drawer.js';
import { call, copyOf, find, Problem } from './server.js';

const SEARCH_AFTER_MS = 200;
const GROUPS = ['Today', 'Yesterday', 'Earlier'];

/** @param {Date} day */
const midnight = (day) => new Date(day.getFullYear(), day.getMonth(), day.getDate());

/** @param {string} time */
function groupOf(time) {
  const days = Math.round((midnight(new Date()).getTime() - midnight(new Date(time)).getTime()) / 86_400_000);
  return GROUPS[Math.max(0, Math.min(days, 2))];
}

/** @param {Talk} talk */
const nameOf = (talk) => talk.title ?? 'Untitled';

export class Talks {
  current = '';
  /** @type {Talk[]} */
  talks = [];
  before = ''; // Where the next page begins.
  reading = new AbortController();
  timer = 0;

  /**
   * @param {HTMLElement} root
   * @param {{user: () => string, open: (id: string) => void, gone: (id: string) => void}} page
   */
  constructor(root, page) {
    this.root = root;
    this.page = page;
    this.list = find(root, '#talk-list', HTMLElement);
    this.note = find(root, '#talk-note', HTMLElement);
    this.more = find(root, '#talk-more', HTMLElement);
    this.search = find(root, 'input', HTMLInputElement);
    this.dialog = find(document, '#sure', HTMLDialogElement);
    this.drawer = new Drawer(root, find(document, '#open-talks', HTMLElement), this.search);
    this.more.onclick = () => void this.read(true);
    this.search.oninput = () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => void this.read(), SEARCH_AFTER_MS);
    };
    this.list.onclick = (event) => this.click(event);
  }

  /** Reads the list; that it cannot be read is said, and harms nothing else. @param {boolean} isNext The next page. */
  async read(isNext = false) {
    this.reading.abort();
    const { signal } = (this.reading = new AbortController());
    const words = this.search.value.trim();
    const query = new URLSearchParams({ ...(isNext && { before: this.before }), ...(words && { query: words }) });
    try {
      const page = await (await call(`/v1/conversations?${query}`, { user: this.page.user(), signal })).json();
      if (signal.aborted) return;
      const known = new Set(page.data.map((/** @type {Talk} */ { id }) => id));
      this.talks = [...(isNext ? this.talks.filter(({ id }) => !known.has(id)) : []), ...page.data];
      this.before = page.next_before ?? '';
      this.note.textContent = this.talks.length ? '' : words ? 'Nothing found.' : 'What you ask is kept here.';
      this.draw();
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Problem)) console.error(error);
      this.note.textContent = 'The list cannot be read just now.';
    }
  }

  /** @param {string} id Which one is on the page; empty for a new chat. */
  show(id) {
    this.current = id;
    for (const link of this.list.querySelectorAll('a')) this.mark(link);
  }

  /** @param {HTMLAnchorElement} link */
  mark(link) {
    if (link.dataset.id === this.current) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }

  draw() {
    this.more.hidden = !this.before;
    if (this.list.querySelector('form')) return; // Somebody is typing a title there.
    const { activeElement } = document;
    const held = activeElement?.closest('li')?.dataset.id;
    const which = this.list.contains(activeElement) ? activeElement?.className : null;
    this.list.replaceChildren(
      ...GROUPS.flatMap((name) => {
        const talks = this.talks.filter(({ updated_at: time }) => groupOf(time) === name);
        if (!talks.length) return [];
        const [title, list] = [document.createElement('h2'), document.createElement('ul')];
        title.textContent = name;
        list.append(...talks.map((talk) => this.item(talk)));
        return [title, list];
      }),
    );
    if (which !== null && held) this.part(held, which)?.focus();
  }

  /** @param {string} id @param {string | undefined} name @returns {HTMLElement | null} */
  part(id, name) {
    return this.list.querySelector(`[data-id="${id}"] .${name || 'talk'}`);
  }

  /** @param {Talk} talk */
  item(talk) {
    const item = find(copyOf('#talk-template'), 'li', HTMLElement);
    const link = find(item, 'a', HTMLAnchorElement);
    item.dataset.id = link.dataset.id = talk.id;
    link.href = `/c/${talk.id}`;
    link.textContent = link.title = nameOf(talk);
    for (const button of item.querySelectorAll('button')) {
      button.setAttribute('aria-label', `${button.title} “${nameOf(talk)}”`);
    }
    this.mark(link);
    return item;
  }

  /** @param {MouseEvent} event */
  click(event) {
    const { target } = event;
    const pressed = target instanceof Element ? target.closest('a, button') : null;
    const talk = this.talks.find(({ id }) => id === pressed?.closest('li')?.dataset.id);
    if (!pressed || !talk) return;
    if (pressed.matches('.rename')) return this.rename(talk);
    if (pressed.matches('.delete')) return this.askToDelete(talk);
    if (!pressed.matches('a') || event.ctrlKey || event.metaKey || event.shiftKey) return; // Another tab, if wished.
    event.preventDefault();
    this.drawer.close();
    this.page.open(talk.id);
  }

  /** Enter saves, Escape leaves it as it was. @param {Talk} talk */
  rename(talk) {
    const item = find(this.list, `li[data-id="${talk.id}"]`, HTMLElement);
    const form = document.createElement('form');
    const field = document.createElement('input');
    field.value = nameOf(talk);
    field.maxLength = 200;
    field.setAttribute('aria-label', 'New name');
    form.append(field);
    const leave = () => {
      form.remove();
      this.draw();
      this.part(talk.id, 'rename')?.focus();
    };
    field.onkeydown = (event) => {
      if (event.key !== 'Escape' || event.isComposing) return;
      event.stopPropagation(); // It closes no drawer, and stops no answer.
      leave();
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      const title = field.value.trim();
      if (title === nameOf(talk)) return leave();
      void this.act(`/v1/conversations/${talk.id}`, 'POST', { title: title || null }, async (response) => {
        const { title: name } = await response.json();
        for (const each of this.talks) if (each.id === talk.id) each.title = name; // It may have been read anew.
        leave();
      });
    };
    this.list.querySelector('form')?.remove(); // One at a time.
    item.append(form);
    field.select();
  }

  /** @param {Talk} talk */
  askToDelete(talk) {
    find(this.dialog, 'h2', HTMLElement).textContent = `Delete “${nameOf(talk)}”?`;
    this.dialog.returnValue = '';
    this.dialog.onclose = () => {
      if (this.dialog.returnValue !== 'yes') return;
      void this.act(`/v1/conversations/${talk.id}`, 'DELETE', undefined, () => this.remove(talk));
    };
    this.dialog.showModal();
  }

  /** @param {Talk} talk */
  remove(talk) {
    const at = Math.max(0, this.talks.findIndex(({ id }) => id === talk.id));
    this.talks = this.talks.filter(({ id }) => id !== talk.id);
    this.draw();
    this.note.textContent = 'Deleted.';
    const next = this.talks[Math.min(at, this.talks.length - 1)];
    (next ? this.part(next.id, 'talk') : this.search)?.focus(); // The button that was pressed is gone.
    this.page.gone(talk.id);
  }

  /** @param {string} path @param {string} method @param {object | undefined} body @param {(response: Response) => void} done */
  async act(path, method, body, done) {
    try {
      done(await call(path, { method, body, user: this.page.user() }));
    } catch (error) {
      this.note.textContent = error instanceof Problem ? error.message : 'That did not work.';
    }
  }
}
