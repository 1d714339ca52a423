// The page put together: which view an address shows, the key, the list of jobs.

import { apiKey, onUnauthorized, setApiKey } from "./api.js";
import { byId, h } from "./dom.js";
import { hideJob, showJob } from "./job.js";
import { refreshJobs, watchJobs } from "./job-list.js";
import { createNewJob, showNewJob } from "./new-job.js";
import { problemNotice, problemOf } from "./problems.js";

const JOB_PATH = /^\/jobs\/([^/]+)$/;

/** Go to an address of this page without loading it again. */
function go(path, options = {}) {
  if (path !== location.pathname + location.search) history.pushState(null, "", path);
  show({ ...options, focus: true });
}

async function show({ found = false, focus = false } = {}) {
  const job = JOB_PATH.exec(location.pathname);
  byId("new-view").hidden = Boolean(job);
  byId("job-view").hidden = !job;
  hideJob();
  refreshJobs();
  if (focus) {
    scrollTo(0, 0);
    byId(job ? "job-title" : "new-title").focus({ preventScroll: true });
  }
  if (job) {
    document.title = "Job · onnx-qat";
    await showJob(decodeURIComponent(job[1]), { go, found });
    return;
  }
  document.title = "Prepare a model · onnx-qat";
  try {
    await showNewJob(new URLSearchParams(location.search).get("from"));
  } catch (error) {
    byId("new-problem").replaceChildren(problemNotice(problemOf(error)));
  }
}

function followLinks() {
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-local]");
    if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    go(link.getAttribute("href"));
  });
  addEventListener("popstate", () => show({ focus: true }));
}

const KEY_NOTE = "Kept in this tab until it is closed, and sent to this service only.";
let asking = null;

/** Ask for a key; true when one was given. Several requests that need one ask once. */
function askForKey(problem) {
  asking ??= openKeyDialog(problem).finally(() => (asking = null));
  return asking;
}

function openKeyDialog(problem) {
  const dialog = byId("key-dialog");
  byId("key-reason").replaceChildren(problem ? h("strong", {}, problem.detail, " ") : "", KEY_NOTE);
  byId("key-input").value = apiKey();
  dialog.returnValue = "cancel";
  dialog.showModal();
  byId("key-input").select();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const saved = dialog.returnValue === "save";
      if (saved) setApiKey(byId("key-input").value.trim());
      byId("key-input").value = "";
      showKeyState();
      resolve(saved && apiKey() !== "");
    }, { once: true });
  });
}

function showKeyState() {
  byId("key-button").textContent = apiKey() ? "API key set" : "API key";
}

async function start() {
  onUnauthorized(askForKey);
  byId("key-button").addEventListener("click", async () => {
    await askForKey(null);
    show();
  });
  showKeyState();
  followLinks();
  try {
    await createNewJob(go);
  } catch (error) {
    byId("new-problem").replaceChildren(problemNotice(problemOf(error)));
    byId("new-view").hidden = false;
    return;
  }
  await Promise.all([show(), watchJobs()]);
}

start();
