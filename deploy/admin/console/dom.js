// Small helpers over the page's own elements. Text only ever goes through textContent: what comes from requests is never markup.

export const $ = (id) => document.getElementById(id);

/** A new element: make("td", {class: "n"}, child or text, ...). */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Sets a text where it differs, so that selections and screen readers are left alone. */
export function say(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

/** A badge that says a state. */
export function badge(element, state) {
  element.className = "state";
  element.dataset.state = state;
  say(element, state);
}

/** Brings the children of `parent` to `items`, one for each key, kept while the key lasts, so that focus and choices last, too. */
export function keyed(parent, items, key, create, update) {
  const known = (parent.known ??= new Map());
  const wanted = new Set(items.map(key));
  for (const [name, element] of known) {
    if (wanted.has(name)) continue;
    element.remove();
    known.delete(name);
  }
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    let element = known.get(name);
    if (!element) known.set(name, (element = create(item)));
    if (element === place) place = place.nextElementSibling;
    else parent.insertBefore(element, place);
    update(element, item);
  }
}

/** A row of a table with so many cells; `classes` by column. */
export function tableRow(count, classes = {}) {
  const row = make("tr");
  for (let i = 0; i < count; i++) row.append(make("td", classes[i] ? { class: classes[i] } : {}));
  return row;
}

/** Texts into the first cells of a row; undefined leaves a cell alone. */
export function fill(row, texts) {
  texts.forEach((text, i) => {
    if (text === undefined) return;
    say(row.cells[i], text);
    row.cells[i].title = row.cells[i].className === "id" || row.cells[i].className === "why" ? text : "";
  });
}

export const number = (value) => Math.round(value).toLocaleString("en");

export function duration(ms) {
  if (ms < 1) return `${ms.toFixed(2)} ms`;
  if (ms < 1000) return `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
  return `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
}

export function ago(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  return seconds < 86400 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
}
