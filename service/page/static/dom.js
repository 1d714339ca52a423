// Elements, and values as a person reads them. Text only ever becomes text nodes, never markup.

const BYTE_UNITS = ["bytes", "kB", "MB", "GB", "TB"];

/** An element: `on…` attributes are listeners, `null`, `undefined` and `false` leave an attribute out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Tell a screen reader what happened. */
export function announce(text) {
  byId("announcer").textContent = text;
}

export function formatBytes(bytes) {
  let value = bytes;
  let unit = 0;
  while (value >= 1000 && unit < BYTE_UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${BYTE_UNITS[unit]}`;
}

export function formatSeconds(seconds) {
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60
    ? `${minutes} min ${Math.round(seconds % 60)} s`
    : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function formatAge(date) {
  const seconds = Math.max(0, (Date.now() - date) / 1000);
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return date.toLocaleDateString();
}

export const formatNumber = (value) =>
  value === 0 || (Math.abs(value) >= 0.001 && Math.abs(value) < 10000)
    ? String(Number(value.toPrecision(4)))
    : value.toExponential(2);

export const plural = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

/** "weight_bits" as "Weight bits". */
export function words(name) {
  const text = name.replaceAll("_", " ").replace(/\bbn\b/, "batch norm");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** Text to copy into a terminal, with a button that does it; `set` changes the text. */
export function codeBlock(text, label) {
  const code = h("code", {}, text);
  const pre = h("pre", { tabindex: "0", role: "group", "aria-label": label }, code);
  const button = h("button", { type: "button", class: "quiet copy", "aria-label": `Copy: ${label}` }, "Copy");
  button.addEventListener("click", async () => {
    const copied = await copy(code);
    button.textContent = copied ? "Copied" : "Press Ctrl+C";
    announce(copied ? "Copied." : "The text is selected: press Control and C.");
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  const element = h("div", { class: "code-block" }, pre, button);
  return { element, set: (changed) => (code.textContent = changed) };
}

async function copy(element) {
  // The clipboard interface exists on https and localhost only; elsewhere the text is selected.
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    const range = document.createRange();
    range.selectNodeContents(element);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    return false;
  }
}
