// Problem documents and job failures as a person reads them.

import { h } from "./dom.js";

// What to do besides what the detail says, where there is something to click or to know.
const ADVICE = {
  model_not_onnx: "Choose the .onnx file that the exporter wrote. Weights in files of their own go into External data.",
  external_data_missing: "Choose the missing file under External data, by the name the model refers to.",
  recipe_invalid: "Change the field in the recipe.",
  recipe_unsupported: "Choose another value for the field in the recipe.",
  worker_out_of_memory: "A smaller calibration file takes less memory; the limit is a setting of the service.",
  worker_timeout: "A smaller calibration file takes less time; the limit is a setting of the service.",
  request_too_large: "The limit is a setting of the service.",
  unauthorized: "Set a key with the API key button above.",
};

const FACTS = [["node", "Node"], ["field", "Field"], ["file", "File"]];

/** A notice that tells what went wrong, where, and what to do. */
export function problemNotice(problem, ...actions) {
  const facts = FACTS.filter(([name]) => problem[name]);
  return h("div", { class: "notice error", role: "alert", tabindex: "-1" },
    h("p", { class: "notice-title" }, problem.title ?? titleOf(problem.code), " ", h("code", {}, problem.code)),
    h("p", {}, problem.detail),
    ADVICE[problem.code] && h("p", {}, ADVICE[problem.code]),
    facts.length > 0 && h("dl", { class: "facts" }, facts.map(([name, title]) => h("div", {}, h("dt", {}, title), h("dd", {}, h("code", {}, problem[name]))))),
    actions.length > 0 && h("div", { class: "buttons" }, actions));
}

function titleOf(code) {
  const text = code.replaceAll("_", " ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** The problem of an error that was caught; a fault of the page itself is one too. */
export function problemOf(error) {
  if (error.problem) return error.problem;
  console.error(error);
  return { code: "page_error", title: "The page failed", detail: `${error.message}. Reload it; the job itself is not concerned.` };
}
