// A table that people sort, search and filter. Rows become elements only when they are shown.

import { h, plural } from "./dom.js";

// More rows than this are laid out on demand: a page of 200 answers at once whatever the model's size.
const PAGE_ROWS = 200;

const collator = new Intl.Collator("en", { numeric: true });

function compare(a, b) {
  if (a === b) return 0;
  // What has no value comes last, whatever the direction.
  if (a === null) return 1;
  if (b === null) return -1;
  return typeof a === "number" ? a - b : collator.compare(a, b);
}

/**
 * columns: {title, cell(row) -> text or node, value(row) -> string, number or null to sort by, class}
 * rows: any objects; `text(row)` is what the search looks in, `group(row)` the filter it belongs to
 * groups: {name, title}, in the order of the filter's buttons
 */
export function createTable({ caption, columns, rows, text, group, groups }) {
  const haystacks = new Map(rows.map((row) => [row, text(row).toLowerCase()]));
  const state = { column: null, ascending: true, group: "all", words: [], limit: PAGE_ROWS };

  const search = h("input", { type: "search", id: "table-search", autocomplete: "off", spellcheck: "false", placeholder: "Name, operator, reason …" });
  const count = h("p", { class: "hint", role: "status" });
  const body = h("tbody");
  const more = h("button", { type: "button", class: "quiet", hidden: true });
  const headings = columns.map((column, index) =>
    h("th", { scope: "col", class: column.class },
      h("button", { type: "button", onclick: () => sortBy(index) }, column.title, h("span", { class: "arrow", "aria-hidden": "true" }))));

  const counts = new Map();
  for (const row of rows) counts.set(group(row), (counts.get(group(row)) ?? 0) + 1);
  const filters = [{ name: "all", title: "All" }, ...groups].map(({ name, title }) => {
    const total = name === "all" ? rows.length : (counts.get(name) ?? 0);
    return h("label", { class: "chip" },
      h("input", { type: "radio", name: "table-group", value: name, checked: name === "all", disabled: total === 0, onchange: () => update({ group: name }) }),
      h("span", {}, title, " ", h("b", {}, total.toLocaleString("en"))));
  });

  search.addEventListener("input", () => update({ words: search.value.toLowerCase().split(/\s+/).filter(Boolean) }));
  more.addEventListener("click", () => {
    const from = body.rows.length;
    update({ limit: Infinity });
    // The button is gone: the keyboard goes on where the new rows begin.
    body.rows[from]?.setAttribute("tabindex", "-1");
    body.rows[from]?.focus();
  });

  function sortBy(index) {
    update({ column: index, ascending: state.column === index ? !state.ascending : true });
  }

  function update(changes) {
    Object.assign(state, { limit: PAGE_ROWS }, changes);
    let found = rows.filter((row) =>
      (state.group === "all" || group(row) === state.group) && state.words.every((word) => haystacks.get(row).includes(word)));
    if (state.column !== null) found = sorted(found);
    body.replaceChildren(...found.slice(0, state.limit).map(rowElement));
    if (found.length === 0) {
      body.append(h("tr", {}, h("td", { colspan: columns.length, class: "empty" }, "Nothing matches.")));
    }
    count.textContent = found.length === rows.length ? plural(rows.length, "row") : `${found.length.toLocaleString("en")} of ${plural(rows.length, "row")}`;
    more.hidden = found.length <= state.limit;
    more.textContent = `Show all ${found.length.toLocaleString("en")}`;
    headings.forEach((heading, index) => {
      if (index === state.column) heading.setAttribute("aria-sort", state.ascending ? "ascending" : "descending");
      else heading.removeAttribute("aria-sort");
    });
  }

  function sorted(found) {
    const { value } = columns[state.column];
    const keyed = found.map((row) => [value(row), row]);
    const sign = state.ascending ? 1 : -1;
    keyed.sort(([a], [b]) => (a === null || b === null ? compare(a, b) : sign * compare(a, b)));
    return keyed.map(([, row]) => row);
  }

  const rowElement = (row) =>
    h("tr", {}, columns.map((column, index) =>
      index === 0 ? h("th", { scope: "row", class: column.class }, column.cell(row)) : h("td", { class: column.class }, column.cell(row))));

  update({});
  return h("div", { class: "data-table" },
    h("div", { class: "table-tools" },
      h("label", { class: "search", for: "table-search" }, h("span", {}, "Search"), search),
      h("fieldset", { class: "chips" }, h("legend", { class: "visually-hidden" }, "Show"), filters),
      count),
    h("div", { class: "table-scroll", tabindex: "0", role: "group", "aria-label": caption },
      h("table", {}, h("caption", { class: "visually-hidden" }, caption), h("thead", {}, h("tr", {}, headings)), body)),
    more);
}
