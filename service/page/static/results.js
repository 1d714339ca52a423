// What succeeded jobs made: a summary, the table of what happened to each part of the model, files, next steps.

import { apiKey, download, getJson, postJson, upload } from "./api.js";
import { downloadCommand, shell, submitCommand, uploadCommand } from "./commands.js";
import { codeBlock, formatBytes, formatNumber, h, plural } from "./dom.js";
import { nameOf, refreshJobs, rememberName } from "./job-list.js";
import { problemNotice, problemOf } from "./problems.js";
import { createTable } from "./table.js";

const FILE_MEANINGS = {
  "qat_model.onnx": "the model with Q/DQ pairs and float weights",
  "training_model.onnx": "forward pass, loss and gradients",
  "eval_model.onnx": "forward pass and loss",
  "optimizer_model.onnx": "the optimizer's step",
  checkpoint: "parameters and state where training starts",
  "manifest.json": "all that is on this page, for a program",
  "model.int8.onnx": "the int8 model, for any onnxruntime",
  "finalize.json": "the report, for a program",
};

const OUTCOMES = [
  { name: "weight", title: "Weights" },
  { name: "activation", title: "Activations" },
  { name: "folded", title: "Folded" },
  { name: "batch norm", title: "Batch norms kept" },
  { name: "skipped", title: "Skipped" },
  { name: "frozen", title: "Frozen" },
];

const COLUMNS = [
  { title: "Name", class: "name", value: (row) => row.name, cell: (row) => row.name },
  { title: "Outcome", class: "outcome", value: (row) => row.outcome, cell: (row) => h("span", { class: `outcome-tag ${row.outcome.replace(" ", "-")}` }, row.outcome) },
  { title: "Where and why", class: "why", value: (row) => row.why, cell: (row) => row.why },
  { title: "Type", value: (row) => row.type, cell: (row) => withNote(row.type, row.typeNote) },
  { title: "Bits", class: "number", value: (row) => row.bits, cell: (row) => row.bits ?? "" },
  { title: "Scale", class: "number", value: (row) => row.scale, cell: (row) => withNote(row.scaleText, row.scaleNote) },
  { title: "Range", class: "range", value: (row) => row.range, cell: (row) => withNote(row.range ?? "", row.rangeNote, row.uncalibrated && "uncalibrated") },
];

// Names of nodes are cut off after so many; the manifest has them all.
const MOST_NODES = 8;

const withNote = (text, note, style) => (note ? [text, h("span", { class: `note ${style || ""}` }, note)] : text);

const heading = (text) => h("h2", {}, text);

/** Links to what a job was submitted for: the bundle, or the int8 model's files. */
export function mainDownloads(job) {
  if (job.bundle) {
    const name = `bundle-${job.id.slice(0, 8)}.zip`;
    return [downloadLink(`/v1/jobs/${job.id}/bundle`, name, `Download the bundle (${formatBytes(job.bundle.bytes)})`, "primary")];
  }
  return job.files
    .filter(({ name }) => name !== "finalize.json")
    .map(({ name, bytes }) => downloadLink(`/v1/jobs/${job.id}/files/${encodeURIComponent(name)}`, name, `Download ${name} (${formatBytes(bytes)})`, "primary"));
}

/** Everything about a prepare job's bundle. */
export async function prepareResult(job, element, { go }) {
  const manifest = await getJson(`/v1/jobs/${job.id}/files/manifest.json?redirect=false`);
  const rows = rowsOf(manifest);
  element.replaceChildren(
    warningsNotice(manifest.warnings),
    tiles(prepareNumbers(manifest)),
    batchNormNote(manifest),
    h("section", { class: "card", "aria-label": "What happened to the model" },
      h("div", { class: "card-head" }, heading("What happened to the model")),
      createTable({
        caption: "What was quantized, folded, skipped and frozen",
        columns: COLUMNS,
        rows,
        text: (row) => [row.name, row.outcome, row.type, row.typeNote, row.range, row.rangeNote, row.why, row.search].join(" "),
        group: (row) => row.outcome,
        groups: OUTCOMES,
      })),
    nextSteps(job, manifest, go),
    filesSection(job));
}

/** Everything about a finalize job's int8 model. */
export async function finalizeResult(job, element) {
  const report = await getJson(`/v1/jobs/${job.id}/files/finalize.json?redirect=false`);
  const [model] = report.files;
  element.replaceChildren(
    warningsNotice(report.warnings),
    tiles([
      ["Size", formatBytes(report.files.reduce((sum, file) => sum + file.bytes, 0)), plural(report.files.length, "file")],
      ["Integer weights", report.integer_weights],
      ...agreementNumbers(report.agreement),
    ]),
    h("section", { class: "card", "aria-label": "Kernels" },
      h("div", { class: "card-head" }, heading("What onnxruntime runs"), h("p", { class: "hint" }, "Convolutions and matrix products, by kernel, with all optimizations on.")),
      h("table", { class: "plain" },
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Kernel"), h("th", { scope: "col", class: "number" }, "Layers"))),
        h("tbody", {}, Object.entries(report.layer_kernels).map(([kernel, count]) =>
          h("tr", {}, h("th", { scope: "row" }, h("code", {}, kernel)), h("td", { class: "number" }, count)))))),
    h("section", { class: "card", "aria-label": "Run it" },
      h("div", { class: "card-head" }, heading("Run it")),
      codeBlock(downloadCommand(`/v1/jobs/${job.id}/files/${model.name}`, model.name), "Download with curl").element,
      codeBlock(loadingCode(model.name, report.agreement), "Load it in Python").element),
    filesSection(job));
}

function loadingCode(name, agreement) {
  const session = (options) => `session = onnxruntime.InferenceSession("${name}"${options}, providers=["CPUExecutionProvider"])`;
  if (!agreement?.saturates) return `import onnxruntime\n\n${session("")}`;
  return [
    "import onnxruntime\n",
    "options = onnxruntime.SessionOptions()",
    'options.add_session_config_entry("session.x64quantprecision", "1")  # see the warning above',
    session(", options"),
  ].join("\n");
}

function prepareNumbers(manifest) {
  const weights = manifest.quantizers.filter(({ kind }) => kind === "weight").length;
  const { found, trained } = manifest.batch_norms;
  const more = found ? [["Batch norms folded", manifest.folded.length, `of ${found}${trained.length ? `, ${trained.length} kept and trained` : ""}`]] : [];
  return [
    ["Nodes quantized", manifest.quantized_nodes.length],
    ["Quantizers", manifest.quantizers.length, `${weights} weight, ${manifest.quantizers.length - weights} activation`],
    ...more,
    ["Nodes skipped", manifest.skipped.length],
    ["Parameters trained", manifest.training.trainable.length, manifest.frozen.length ? `${manifest.frozen.length} frozen` : null],
    ["Loss", manifest.training.loss_kind, `on ${manifest.training.attached_to}`],
  ];
}

function agreementNumbers(agreement) {
  if (!agreement) return [["Compared", "no", "give samples to verify with"]];
  const steps = agreement.step ? agreement.largest_difference / agreement.step : 0;
  return [
    ...(agreement.top1 === null ? [] : [["Same top-1", `${(agreement.top1 * 100).toFixed(2)} %`, `as the trained model, ${plural(agreement.samples, "sample")}`]]),
    ["Largest difference", `${formatNumber(steps)} steps`, `${formatNumber(agreement.largest_difference)}, optimizations off`],
  ];
}

const tiles = (numbers) =>
  h("dl", { class: "tiles" }, numbers.map(([title, value, note]) =>
    h("div", {}, h("dt", {}, title), h("dd", { class: /[a-z]{5}/.test(value) ? "text" : null }, typeof value === "number" ? value.toLocaleString("en") : value, note && h("span", { class: "note" }, note)))));

function warningsNotice(warnings) {
  if (!warnings.length) return "";
  return h("div", { class: "notice warn" },
    h("p", { class: "notice-title" }, plural(warnings.length, "warning")),
    h("ul", {}, warnings.map((warning) => h("li", {}, warning))));
}

function batchNormNote({ batch_norms: { found, note } }) {
  return found ? h("p", { class: "notice" }, note) : "";
}

/** One row for each quantizer, folded or kept batch norm, skipped node and frozen parameter. */
function rowsOf(manifest) {
  const plain = { bits: null, scale: null, scaleText: "", range: null };
  return [
    ...manifest.quantizers.map(quantizerRow),
    ...manifest.folded.map((entry) => ({ ...plain, name: entry.batch_norm, outcome: "folded", type: entry.op, why: `into ${entry.node}, ${statisticsText(entry)}` })),
    ...manifest.batch_norms.trained.map((entry) => ({ ...plain, name: entry.node, outcome: "batch norm", type: "BatchNormalization", why: entry.reason })),
    ...manifest.skipped.map((entry) => ({ ...plain, name: entry.node, outcome: "skipped", type: entry.op, why: entry.reason })),
    ...manifest.frozen.map((entry) => ({ ...plain, name: entry.parameter, outcome: "frozen", type: "parameter", why: entry.reason })),
  ];
}

function quantizerRow(quantizer) {
  const scales = quantizer.initial_scale;
  const largest = scales.reduce((a, b) => Math.max(a, b), 0);
  const smallest = scales.reduce((a, b) => Math.min(a, b), Infinity);
  return {
    name: quantizer.tensor,
    outcome: quantizer.kind,
    type: quantizer.dtype,
    typeNote: quantizer.symmetric ? "symmetric" : "",
    bits: quantizer.bits,
    scale: largest,
    scaleText: scales.length === 1 ? formatNumber(largest) : `${formatNumber(smallest)} … ${formatNumber(largest)}`,
    scaleNote: scales.length === 1 ? "" : `${scales.length} channels`,
    range: quantizer.ranges.replace("_", " "),
    rangeNote: quantizer.existing ? "as in the model" : quantizer.initialized.replaceAll("_", " ").replace(":", ": "),
    uncalibrated: quantizer.initialized.startsWith("uncalibrated"),
    why: `in ${firstOf(quantizer.nodes)}${quantizer.quant_delay > 1 ? `; from step ${quantizer.quant_delay}` : ""}`,
    search: quantizer.nodes.join(" "),
  };
}

function firstOf(names) {
  const left = names.length - MOST_NODES;
  return names.slice(0, MOST_NODES).join(", ") + (left > 0 ? ` and ${left} more` : "");
}

function statisticsText({ statistics, freeze_bn_delay: freeze }) {
  if (statistics === null) return "once, with its running statistics";
  return `statistics of the ${statistics.replace("_", " ")}${freeze === null ? "" : `, frozen from step ${freeze}`}`;
}

/** With a key a plain link would be refused, so that the page fetches the file. */
function downloadLink(path, name, text, style) {
  const link = h("a", { href: path, download: name, class: style === undefined ? null : `button ${style}` }, text);
  link.addEventListener("click", async (event) => {
    if (!apiKey()) return;
    event.preventDefault();
    try {
      await download(path, name);
    } catch (error) {
      link.after(problemNotice(problemOf(error)));
    }
  });
  return link;
}

function filesSection(job) {
  return h("section", { class: "card", "aria-label": "Files" },
    h("div", { class: "card-head" }, heading("Files")),
    h("div", { class: "table-scroll", tabindex: "0", role: "group", "aria-label": "Files of the job" },
      h("table", { class: "plain" },
        h("thead", {}, h("tr", {}, ["Name", "Size", "SHA-256"].map((title) => h("th", { scope: "col", class: title === "Size" ? "number" : null }, title)))),
        h("tbody", {}, job.files.map((file) =>
          h("tr", {},
            h("th", { scope: "row" },
              downloadLink(`/v1/jobs/${job.id}/files/${encodeURIComponent(file.name)}`, file.name, file.name),
              FILE_MEANINGS[file.name] && h("span", { class: "note" }, FILE_MEANINGS[file.name])),
            h("td", { class: "number" }, formatBytes(file.bytes)),
            h("td", {}, h("code", { class: "digest", title: file.sha256 }, file.sha256.slice(0, 16), "…"))))))));
}

function nextSteps(job, manifest, go) {
  const { inputs } = manifest.training;
  const train = [
    downloadCommand(`/v1/jobs/${job.id}/bundle`, "bundle.zip"),
    "unzip -q bundle.zip -d bundle",
    "onnx-qat finetune bundle --data train.npz --epochs 5",
  ].join("\n");
  return h("section", { class: "card", "aria-label": "Next steps" },
    h("div", { class: "card-head" }, heading("Next steps")),
    h("ol", { class: "steps" },
      h("li", {},
        h("h3", {}, "Train the bundle"),
        h("p", {}, "train.npz holds one array for each of ", listOfCode(inputs), ", samples along the first axis. Any loop over onnxruntime.training.api trains the bundle as well."),
        codeBlock(train, "Train the bundle").element),
      h("li", {},
        h("h3", {}, "Make the int8 model"),
        finalizeForm(job, go))));
}

const listOfCode = (names) => names.flatMap((name, index) => [index ? ", " : "", h("code", {}, name)]);

/** Uploads the trained checkpoint and submits the finalize job. */
function finalizeForm(job, go) {
  const checkpoint = h("input", { type: "file", id: "finalize-checkpoint", "aria-describedby": "finalize-checkpoint-help" });
  const verify = h("input", { type: "file", id: "finalize-verify", "aria-describedby": "finalize-verify-help" });
  const submit = h("button", { type: "submit", class: "primary" }, "Finalize");
  const bar = h("progress", { max: 1, hidden: true, "aria-label": "Upload" });
  const problem = h("div", {});
  const curl = codeBlock("", "Finalize with curl");

  function update() {
    const parts = [];
    const body = { kind: "finalize", prepare_job: job.id };
    for (const [name, input, path] of [["checkpoint", checkpoint, "/v1/checkpoints"], ["verify", verify, "/v1/datasets"]]) {
      if (!input.files.length) continue;
      parts.push(uploadCommand(path, input.files[0].name));
      body[name] = `ID of ${shell(input.files[0].name)}`.replaceAll("'", "");
    }
    curl.set([...parts, submitCommand(body)].join("\n"));
  }

  async function send() {
    submit.disabled = true;
    problem.replaceChildren();
    try {
      const body = { kind: "finalize", prepare_job: job.id };
      const onProgress = (loaded, total) => (bar.value = total ? loaded / total : 0);
      for (const [name, input, path] of [["checkpoint", checkpoint, "/v1/checkpoints"], ["verify", verify, "/v1/datasets"]]) {
        if (!input.files.length) continue;
        bar.hidden = false;
        body[name] = (await upload(path, input.files[0], { onProgress })).id;
      }
      const made = await postJson("/v1/jobs", body);
      if (nameOf(job.id)) rememberName(made.id, nameOf(job.id));
      refreshJobs();
      go(`/jobs/${made.id}`, { found: made.state === "succeeded" });
    } catch (error) {
      const notice = problemNotice(problemOf(error));
      problem.replaceChildren(notice);
      notice.focus();
    } finally {
      submit.disabled = false;
      bar.hidden = true;
    }
  }

  checkpoint.addEventListener("change", update);
  verify.addEventListener("change", update);
  update();
  const form = h("form", { class: "finalize" },
    h("div", { class: "field" },
      h("label", { for: "finalize-checkpoint" }, "Trained checkpoint"), checkpoint,
      h("p", { class: "help", id: "finalize-checkpoint-help" }, "bundle/trained_checkpoint; without one, the bundle's own, which is not trained")),
    h("div", { class: "field" },
      h("label", { for: "finalize-verify" }, "Samples to verify with", h("span", { class: "optional" }, "optional")), verify,
      h("p", { class: "help", id: "finalize-verify-help" }, "an .npz; the int8 model is compared with the trained one on it")),
    h("div", { class: "buttons" }, submit, bar),
    problem,
    curl.element);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  return form;
}
