// The HTTP API: requests with the key, uploads with progress, server-sent events, downloads, problems.

const KEY = "onnx-qat.api-key";
const RETRY_MS = { first: 500, longest: 5000 };

/** An RFC 9457 problem document, or what stands for one where there was no answer. */
export class ApiError extends Error {
  constructor(problem) {
    super(problem.detail);
    this.problem = problem;
  }
}

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

// Asks a person for a key; true when there is one to try. The application sets it.
let askForKey = async () => false;
export function onUnauthorized(ask) {
  askForKey = ask;
}

const authorization = () => (apiKey() ? { Authorization: `Bearer ${apiKey()}` } : {});

function unreachable(detail) {
  return new ApiError({ code: "unreachable", title: "The service cannot be reached", detail });
}

function problemFrom(status, text) {
  try {
    const problem = JSON.parse(text);
    if (problem.code) return problem;
  } catch {
    // Not from the service: a proxy's own error page.
  }
  return { code: `http_${status}`, title: `HTTP status ${status}`, status, detail: "The answer is not the service's own; a proxy in between may have sent it." };
}

/** A response that is a success. `quiet`: do not ask for a key. */
export async function request(path, { quiet = false, headers = {}, ...options } = {}) {
  const used = apiKey();
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...authorization() } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw unreachable("Check that it runs and that the network is there, then try again.");
  }
  if (response.ok) return response;
  const problem = problemFrom(response.status, await response.text());
  if (response.status === 401 && !quiet && (apiKey() !== used || (await askForKey(problem)))) {
    return request(path, { quiet, headers, ...options });
  }
  throw new ApiError(problem);
}

export const getJson = async (path, options) => (await request(path, options)).json();

export const postJson = (path, body) =>
  getJson(path, {
    method: "POST",
    ...(body && { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) }),
  });

/** POST a body with progress, which fetch cannot report; the answer's JSON. */
export async function upload(path, body, { onProgress, signal }) {
  const { status, text } = await send(path, body, onProgress, signal);
  if (status >= 200 && status < 300) return JSON.parse(text);
  const problem = problemFrom(status, text);
  if (status === 401 && (await askForKey(problem))) return upload(path, body, { onProgress, signal });
  throw new ApiError(problem);
}

function send(path, body, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const xhr = new XMLHttpRequest();
    xhr.open("POST", path);
    for (const [name, value] of Object.entries(authorization())) xhr.setRequestHeader(name, value);
    xhr.upload.addEventListener("progress", (event) => onProgress(event.loaded, event.total));
    xhr.addEventListener("load", () => resolve({ status: xhr.status, text: xhr.responseText }));
    xhr.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    xhr.addEventListener("error", () =>
      reject(unreachable("The upload broke off: the connection was lost, a chosen file has changed since, or the service refused the size. Choose the files again and retry.")));
    signal?.addEventListener("abort", () => xhr.abort());
    xhr.send(body);
  });
}

/**
 * Follow a stream of server-sent events until `onData` returns true. A broken stream is taken up again after the
 * last event; EventSource would do that, but sends no Authorization header.
 */
export async function follow(path, { onData, onConnection, signal }) {
  let last = null;
  let wait = RETRY_MS.first;
  while (!signal.aborted) {
    try {
      const headers = { Accept: "text/event-stream", ...(last !== null && { "Last-Event-ID": last }) };
      const response = await request(path, { headers, signal });
      onConnection(true);
      if (response.status === 204) return; // the job has ended with the last event
      for await (const event of eventsOf(response.body)) {
        last = event.id ?? last;
        wait = RETRY_MS.first;
        if (onData(JSON.parse(event.data))) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      // 5xx, too many requests and a lost connection pass; anything else will not change by asking again.
      if (error instanceof ApiError && error.problem.status < 500 && error.problem.status !== 429) throw error;
    }
    onConnection(false);
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(wait * 2, RETRY_MS.longest);
  }
}

/** The events of a text/event-stream body (HTML standard, section 9.2.6), those without data left out. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffered += value;
    const blocks = buffered.split(/\r?\n\r?\n/);
    buffered = blocks.pop();
    for (const block of blocks) {
      const event = { data: [] };
      for (const line of block.split(/\r?\n/)) {
        const [, field, text] = /^([^:]*):? ?(.*)$/.exec(line);
        if (field === "data") event.data.push(text);
        else if (field === "id") event.id = text;
      }
      if (event.data.length) yield { ...event, data: event.data.join("\n") };
    }
  }
}

/** Save a file of the API; with a key through the page, because a plain link cannot send it. */
export async function download(path, name) {
  const blob = await (await request(`${path}?redirect=false`)).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
