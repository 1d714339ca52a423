// The view that makes a prepare job: files, recipe, the request.

import { getJson, postJson, upload } from "./api.js";
import { prepareCommand, submitCommand } from "./commands.js";
import { announce, byId, codeBlock, formatBytes, formatSeconds, h } from "./dom.js";
import { refreshJobs, nameOf, rememberName } from "./job-list.js";
import { problemNotice, problemOf } from "./problems.js";
import { clearMarks, createRecipeForm, markField } from "./recipe-form.js";

const FILES = [
  { name: "model", title: "Model", help: "a float .onnx file", required: true },
  { name: "external_data", title: "External data", help: "if the model's weights are in files of their own", multiple: true },
  { name: "calibration", title: "Calibration samples", help: "an .npz with one array for each graph input; without it, ranges come from random inputs" },
];

let recipe = {};
let recipeForm = null;
let curl = null;
// A prepare job whose model and samples are used again, instead of files.
let base = null;
// The job in the view's address, of which a person may have kept nothing since.
let startedFrom = null;
let running = null;

const input = (name) => byId(`file-${name}`);
const chosen = (name) => [...input(name).files];

export async function createNewJob(go) {
  byId("files").append(...FILES.map(fileRow));
  curl = codeBlock("", "The same with curl");
  byId("new-curl").append(curl.element);
  byId("recipe-reset").addEventListener("click", () => {
    setRecipe({});
    announce("The recipe has its defaults.");
  });
  byId("recipe-json").addEventListener("input", readJson);
  byId("new-form").addEventListener("submit", (event) => {
    event.preventDefault();
    submit(go);
  });
  byId("upload-abort").addEventListener("click", () => running?.abort());
  acceptDrops();
  recipeForm = createRecipeForm(await getJson("/page/recipe.schema.json", { quiet: true }), (changed) => {
    recipe = changed;
    writeJson();
    update();
  });
  byId("recipe-form").append(recipeForm.element);
  setRecipe({});
}

/** Show the view; with a job, its model and recipe are where it starts. */
export async function showNewJob(fromJob) {
  byId("new-problem").replaceChildren();
  if (fromJob !== startedFrom) {
    base = fromJob && (await getJson(`/v1/jobs/${encodeURIComponent(fromJob)}`));
    startedFrom = fromJob;
    if (base) {
      for (const { name } of FILES) input(name).value = "";
      setRecipe(withoutDefaults(base.request.recipe));
    }
  }
  update();
}

/** A recipe as a person writes it: the service answers with every field. */
export function withoutDefaults(settings) {
  const defaults = recipeForm.defaults;
  return Object.fromEntries(Object.entries(settings).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(defaults[name])));
}

function fileRow({ name, title, help, required, multiple }) {
  const control = h("input", { type: "file", id: `file-${name}`, multiple, required, "aria-describedby": `file-${name}-help file-${name}-note` });
  const clear = h("button", { type: "button", class: "quiet", id: `file-${name}-clear`, "aria-label": `Remove ${title.toLowerCase()}`, hidden: true }, "Remove");
  control.addEventListener("change", () => {
    if (name === "model") base = null;
    update();
  });
  clear.addEventListener("click", () => {
    if (base && chosen(name).length === 0) base = null;
    control.value = "";
    update();
    control.focus();
  });
  return h("div", { class: "file-row" },
    h("div", { class: "file-label" },
      h("label", { for: `file-${name}` }, title, !required && h("span", { class: "optional" }, "optional")),
      h("p", { class: "help", id: `file-${name}-help` }, help)),
    h("div", { class: "file-control" }, control, h("p", { class: "file-note", id: `file-${name}-note` }), clear));
}

function setRecipe(settings) {
  recipe = settings;
  recipeForm.write(settings);
  writeJson();
  update();
}

function writeJson() {
  byId("recipe-json").value = JSON.stringify(recipe, null, 2);
  setJsonError("");
}

function setJsonError(text) {
  byId("json-error").textContent = text;
  byId("recipe-json").setAttribute("aria-invalid", String(Boolean(text)));
}

function readJson() {
  try {
    const value = JSON.parse(byId("recipe-json").value || "{}");
    if (value === null || typeof value !== "object" || Array.isArray(value)) throw new Error("not an object");
    recipe = value;
    setJsonError("");
    recipeForm.write(value);
    update();
  } catch (error) {
    setJsonError(`Not a JSON object: ${error.message}`);
  }
}

function update() {
  for (const { name } of FILES) {
    const files = chosen(name);
    input(name).required = name === "model" && !base;
    byId(`file-${name}-note`).textContent = files.length ? files.map((file) => `${file.name} (${formatBytes(file.size)})`).join(", ") : baseNote(name);
    byId(`file-${name}-clear`).hidden = files.length === 0 && !baseNote(name);
  }
  curl.set(base ? submitCommand(requestOfBase("CALIBRATION")) : prepareCommand({
    model: chosen("model")[0]?.name ?? "model.onnx",
    external: chosen("external_data").map((file) => file.name),
    calibration: chosen("calibration")[0]?.name,
    recipe: JSON.stringify(recipe),
  }));
  byId("submit-hint").textContent = base || chosen("model").length ? "" : "Choose a model first.";
}

function baseNote(name) {
  if (!base) return "";
  if (name === "model") return `the model of job ${nameOf(base.id) ?? base.id.slice(0, 8)}, already uploaded`;
  if (name === "calibration" && base.request.calibration) return "the samples of that job, already uploaded";
  return "";
}

function requestOfBase(newCalibration) {
  const calibration = chosen("calibration").length ? newCalibration : base.request.calibration;
  return { kind: "prepare", model: base.request.model, recipe, ...(calibration && { calibration }) };
}

function acceptDrops() {
  const veil = byId("drop-veil");
  const isFiles = (event) => !byId("new-view").hidden && event.dataTransfer?.types.includes("Files");
  // Enter and leave come for every element on the way: only the last leave counts.
  let depth = 0;
  addEventListener("dragenter", (event) => {
    if (!isFiles(event)) return;
    depth += 1;
    veil.hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (isFiles(event)) depth = Math.max(0, depth - 1);
    veil.hidden = depth === 0;
  });
  addEventListener("dragover", (event) => {
    if (isFiles(event)) event.preventDefault();
  });
  addEventListener("drop", async (event) => {
    depth = 0;
    veil.hidden = true;
    if (!isFiles(event)) return;
    event.preventDefault();
    await takeFiles([...event.dataTransfer.files]);
  });
}

async function takeFiles(files) {
  const kinds = { model: [], external_data: [], calibration: [] };
  for (const file of files) {
    if (/\.json$/i.test(file.name)) {
      byId("recipe-json").value = await file.text();
      readJson();
    } else if (/\.npz$/i.test(file.name)) kinds.calibration.push(file);
    else if (/\.onnx$/i.test(file.name)) kinds.model.push(file);
    else kinds.external_data.push(file);
  }
  // A single file of another name is meant as the model, unless there is one.
  if (!kinds.model.length && kinds.external_data.length === 1 && !chosen("model").length && !base) {
    kinds.model.push(kinds.external_data.pop());
  }
  for (const { name, multiple } of FILES) {
    if (!kinds[name].length) continue;
    const transfer = new DataTransfer();
    for (const file of multiple ? [...chosen(name), ...kinds[name]] : kinds[name].slice(-1)) transfer.items.add(file);
    input(name).files = transfer.files;
    if (name === "model") base = null;
  }
  update();
  announce(`${files.length} files taken.`);
}

async function submit(go) {
  if (running || !isValid()) return;
  running = new AbortController();
  const started = Date.now();
  const name = base ? nameOf(base.id) : chosen("model")[0].name;
  clearMarks(byId("recipe-form"));
  byId("new-problem").replaceChildren();
  showUpload(true);
  try {
    const job = base ? await submitAgain() : await upload("/v1/prepare", formData(), transferOptions(started));
    if (name) rememberName(job.id, name);
    refreshJobs();
    go(`/jobs/${job.id}`, { found: job.state === "succeeded" });
  } catch (error) {
    if (error.name !== "AbortError") showProblem(problemOf(error));
    else announce("The upload was stopped.");
  } finally {
    running = null;
    showUpload(false);
  }
}

async function submitAgain() {
  const [samples] = chosen("calibration");
  const dataset = samples && (await upload("/v1/datasets", samples, transferOptions(Date.now())));
  return postJson("/v1/jobs", requestOfBase(dataset?.id));
}

function formData() {
  const data = new FormData();
  for (const { name } of FILES) for (const file of chosen(name)) data.append(name, file, file.name);
  data.append("recipe", JSON.stringify(recipe));
  return data;
}

function transferOptions(started) {
  return { signal: running.signal, onProgress: (loaded, total) => showProgress(loaded, total, (Date.now() - started) / 1000) };
}

function showProgress(loaded, total, seconds) {
  byId("upload-progress").value = total ? loaded / total : 0;
  const rate = seconds > 0.5 ? `, ${formatBytes(loaded / seconds)}/s` : "";
  const left = seconds > 2 && loaded < total ? `, ${formatSeconds(((total - loaded) / loaded) * seconds)} left` : "";
  byId("upload-text").textContent = loaded < total ? `${formatBytes(loaded)} of ${formatBytes(total)}${rate}${left}` : "Uploaded; the service stores it …";
}

function showUpload(on) {
  byId("upload-status").hidden = !on;
  byId("submit").disabled = on;
  byId("upload-progress").value = 0;
  byId("upload-text").textContent = "Uploading …";
}

function isValid() {
  const form = byId("new-form");
  if (byId("json-error").textContent) {
    byId("recipe-json").focus();
    return false;
  }
  const wrong = form.querySelector("input:invalid, select:invalid, textarea:invalid");
  if (!wrong) return true;
  // The browser cannot point at what is folded away.
  wrong.closest("details")?.setAttribute("open", "");
  wrong.reportValidity();
  return false;
}

function showProblem(problem) {
  const notice = problemNotice(problem);
  byId("new-problem").replaceChildren(notice);
  const control = problem.field && problem.code.startsWith("recipe_") ? markField(problem.field, problem.detail) : null;
  if (control) {
    notice.append(h("div", { class: "buttons" }, h("button", { type: "button", onclick: () => control.focus() }, "Go to the field")));
  }
  notice.focus();
  notice.scrollIntoView({ block: "nearest" });
}
