// The list of recent jobs beside everything else, kept up to date while the page is looked at.

import { getJson } from "./api.js";
import { byId, formatAge, h } from "./dom.js";

const REFRESH_MS = { unfinished: 2000, quiet: 15_000 };
const NAMES = "onnx-qat.names";
const MOST_NAMES = 200;

export const isFinished = (job) => ["succeeded", "failed", "cancelled"].includes(job.state);

let pages = 1;
let timer = null;

/** The service knows a model by its digest; its file's name is remembered here, in this browser. */
export function rememberName(jobId, name) {
  const names = Object.entries({ ...savedNames(), [jobId]: name }).slice(-MOST_NAMES);
  localStorage.setItem(NAMES, JSON.stringify(Object.fromEntries(names)));
}

export const nameOf = (jobId) => savedNames()[jobId] ?? null;

function savedNames() {
  try {
    return JSON.parse(localStorage.getItem(NAMES)) ?? {};
  } catch {
    return {};
  }
}

export const badge = (state) => h("span", { class: `badge ${state}` }, state);

/** Load the list again, now. `ask`: ask for a key if one is needed. */
export async function refreshJobs({ ask = false } = {}) {
  clearTimeout(timer);
  let wait = REFRESH_MS.quiet;
  try {
    const { items, next } = await load(ask);
    show(items, next);
    if (items.some((job) => !isFinished(job))) wait = REFRESH_MS.unfinished;
  } catch (error) {
    byId("job-list-note").textContent = error.message;
  }
  clearTimeout(timer);
  timer = setTimeout(() => (document.hidden ? null : refreshJobs()), wait);
}

async function load(ask) {
  const items = [];
  let next = null;
  for (let page = 0; page < pages; page += 1) {
    const cursor = next === null ? "" : `&cursor=${next}`;
    const answer = await getJson(`/v1/jobs?limit=15${cursor}`, { quiet: !ask });
    items.push(...answer.items);
    next = answer.next;
    if (next === null) break;
  }
  return { items, next };
}

function show(items, next) {
  const list = byId("job-list");
  const focused = list.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  list.replaceChildren(...items.map(item));
  // The list is made anew under the keyboard.
  if (focused) list.querySelector(`a[href="${focused}"]`)?.focus();
  byId("job-list-note").textContent = items.length ? "" : "None yet.";
  byId("job-list-more").hidden = next === null;
}

function item(job) {
  const path = `/jobs/${job.id}`;
  const short = job.id.slice(0, 8);
  const name = nameOf(job.id);
  // Ten jobs of one model have one name.
  const meta = [job.kind, ...(name === null ? [] : [short]), formatAge(new Date(job.created_at))];
  return h("li", {},
    h("a", { href: path, "data-local": true, "aria-current": location.pathname === path ? "page" : null },
      h("span", { class: "job-name" }, name ?? short),
      badge(job.state),
      h("span", { class: "job-meta" }, meta.join(", "))));
}

export function watchJobs() {
  byId("job-list-more").addEventListener("click", () => {
    pages += 1;
    refreshJobs();
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) refreshJobs();
  });
  refreshJobs({ ask: true });
}
