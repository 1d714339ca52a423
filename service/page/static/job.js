// The view of one job: where it stands, why it failed, what it made.

import { follow, getJson, postJson } from "./api.js";
import { submitCommand, watchCommand } from "./commands.js";
import { announce, byId, codeBlock, formatSeconds, h } from "./dom.js";
import { badge, isFinished, nameOf, refreshJobs } from "./job-list.js";
import { withoutDefaults } from "./new-job.js";
import { problemNotice, problemOf } from "./problems.js";
import { finalizeResult, mainDownloads, prepareResult } from "./results.js";

// What each kind of job goes through; a stage that is not named here is shown when it comes.
const STAGES = {
  prepare: {
    load: "Read and check the model",
    normalize: "Normalize the graph, fold batch norms",
    calibrate: "Place quantizers, calibrate their ranges",
    write: "Write the training graphs and the bundle",
  },
  finalize: {
    load: "Read the bundle and the checkpoint",
    quantize: "Make weights and biases integers",
    verify: "Count integer kernels, compare with the trained model",
  },
};

let following = null;

/** Leave the view. */
export function hideJob() {
  following?.abort();
  following = null;
}

/** Show a job and follow it to its end. */
export async function showJob(id, { go, found = false }) {
  hideJob();
  const controller = (following = new AbortController());
  byId("job-title").textContent = "Job";
  const content = byId("job-content");
  content.replaceChildren(h("p", { class: "hint" }, "Loading …"));
  let view = null;
  const onJob = (job) => {
    if (controller.signal.aborted) return true;
    view ??= createView(job, { go, found, content });
    view.update(job);
    return isFinished(job);
  };
  try {
    const path = `/v1/jobs/${encodeURIComponent(id)}`;
    if (onJob(await getJson(path, { signal: controller.signal }))) return;
    await follow(`${path}/events`, { onData: onJob, onConnection: (there) => view.connection(there), signal: controller.signal });
  } catch (error) {
    if (controller.signal.aborted) return;
    const again = h("button", { type: "button", onclick: () => showJob(id, { go }) }, "Try again");
    const notice = problemNotice(problemOf(error), again);
    content.replaceChildren(notice);
  }
}

function createView(first, { go, found, content }) {
  const name = nameOf(first.id) ?? first.id.slice(0, 8);
  const title = first.kind === "prepare" ? `Prepare ${name}` : `Int8 model of ${name}`;
  byId("job-title").textContent = title;
  document.title = `${title} · onnx-qat`;

  const status = h("div", { class: "job-status" });
  const connection = h("p", { class: "notice warn", hidden: true }, "The connection to the service is lost; trying again …");
  const problem = h("div", {});
  const stages = createStages(first.kind);
  const actions = h("div", { class: "actions" });
  const result = h("div", {});
  content.replaceChildren(
    status,
    found ? h("p", { class: "notice" }, "The same work was done before: this is that job.") : "",
    connection, problem, actions, stages.element, result, requestSection(first));

  let last = null;
  return {
    connection: (there) => (connection.hidden = there),
    update(job) {
      status.replaceChildren(...statusLine(job, { onProblem: (error) => problem.replaceChildren(problemNotice(problemOf(error))) }));
      stages.update(job);
      if (last !== null && job.state !== last.state) announce(`The job is ${job.state}.`);
      else if (job.progress.stage !== last?.progress.stage && !isFinished(job)) announce(stages.title(job.progress.stage));
      if (isFinished(job)) {
        if (last !== null) refreshJobs();
        connection.hidden = true;
        finish(job, { problem, actions, result, go });
      }
      last = job;
    },
  };
}

function finish(job, { problem, actions, result, go }) {
  const next = job.kind === "prepare"
    ? h("button", { type: "button", onclick: () => go(`/?from=${job.id}`) }, "Change the recipe and run again")
    : h("a", { class: "button", href: `/jobs/${job.request.prepare_job}`, "data-local": true }, "Show the prepare job");
  actions.replaceChildren(...(job.state === "succeeded" ? mainDownloads(job) : []), next);
  if (job.state === "failed") {
    const mendedAtFiles = /^(model|external_data)_/.test(job.failure.code);
    const other = mendedAtFiles && h("button", { type: "button", onclick: () => go("/") }, "Choose other files");
    problem.replaceChildren(problemNotice(job.failure, ...(other ? [other] : [])));
  } else if (job.state === "succeeded") {
    const show = job.kind === "prepare" ? prepareResult : finalizeResult;
    show(job, result, { go }).catch((error) => result.replaceChildren(problemNotice(problemOf(error))));
  }
}

function statusLine(job, { onProblem }) {
  const started = job.started_at && new Date(job.started_at);
  const ended = job.finished_at ? new Date(job.finished_at) : null;
  const parts = [badge(job.state), h("span", {}, `submitted ${new Date(job.created_at).toLocaleString()}`)];
  if (started && ended) parts.push(h("span", {}, `took ${formatSeconds((ended - started) / 1000)}`));
  parts.push(h("code", { class: "job-id" }, job.id));
  if (!isFinished(job)) {
    const cancel = h("button", { type: "button", class: "danger" }, "Cancel");
    cancel.addEventListener("click", async () => {
      cancel.disabled = true;
      try {
        await postJson(`/v1/jobs/${job.id}/cancel`);
      } catch (error) {
        cancel.disabled = false;
        // It ended a moment ago: the events say how.
        if (error.problem?.code !== "job_finished") onProblem(error);
      }
    });
    parts.push(cancel);
  }
  return parts;
}

function createStages(kind) {
  const titles = { ...STAGES[kind] };
  const element = h("ol", { class: "stages", "aria-label": "Stages" });
  return {
    element,
    title: (stage) => (stage === null ? "Waiting for a worker." : (titles[stage] ?? stage)),
    update({ state, progress: { stage, fraction } }) {
      if (stage !== null && !(stage in titles)) titles[stage] = stage;
      const names = Object.keys(titles);
      const current = stage === null ? -1 : names.indexOf(stage);
      element.hidden = state === "succeeded";
      element.replaceChildren(...names.map((name, index) => {
        const where = index < current || state === "succeeded" ? "done" : index === current ? (isFinished({ state }) ? "stopped" : "current") : "waiting";
        return h("li", { class: where, "aria-current": where === "current" ? "step" : null },
          h("span", { class: "stage-title" }, titles[name], h("span", { class: "visually-hidden" }, `: ${where}`)),
          where === "current" && progressBar(fraction));
      }));
    },
  };
}

function progressBar(fraction) {
  const bar = h("progress", { max: 1, "aria-label": "Share of this stage" });
  // Many stages say only that they begin and end.
  if (fraction > 0) bar.value = fraction;
  return bar;
}

function requestSection(job) {
  const body = Object.fromEntries(Object.entries(job.request).filter(([, value]) => value !== null));
  if (body.recipe) body.recipe = withoutDefaults(body.recipe);
  return h("details", { class: "card request", open: !isFinished(job) },
    h("summary", {}, h("h2", {}, "Request")),
    codeBlock(submitCommand(body), "Submit the same job with curl").element,
    codeBlock(watchCommand(job.id), "Watch the job with curl").element);
}
