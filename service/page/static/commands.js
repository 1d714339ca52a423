// What a person would type to do the same without this page.

import { apiKey } from "./api.js";

/** A word for a POSIX shell. */
export function shell(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

// Curl splits a form field's file name at ; and , unless it is in double quotes.
function formFile(field, name) {
  const plain = /^[^;,"\\]+$/.test(name);
  return shell(`${field}=@${plain ? name : `"${name.replaceAll(/(["\\])/g, "\\$1")}"`}`);
}

const key = () => (apiKey() ? ['-H "Authorization: Bearer $ONNX_QAT_API_KEY"'] : []);

const curl = (url, ...parts) => command("curl -sS", url, ...parts);

const command = (program, url, ...parts) => [`${program} ${url}`, ...key(), ...parts].join(" \\\n    ");

export const address = (path) => shell(location.origin + path);

/** One request that uploads and prepares. */
export function prepareCommand({ model, external, calibration, recipe }) {
  return curl(
    address("/v1/prepare"),
    `-F ${formFile("model", model)}`,
    ...external.map((name) => `-F ${formFile("external_data", name)}`),
    ...(calibration ? [`-F ${formFile("calibration", calibration)}`] : []),
    ...(recipe === "{}" ? [] : [`--form-string ${shell(`recipe=${recipe}`)}`]),
  );
}

export const uploadCommand = (path, name) => curl(address(path), `-X POST -T ${shell(name)}`);

export const submitCommand = (body) =>
  curl(address("/v1/jobs"), "-H 'Content-Type: application/json'", `-d ${shell(JSON.stringify(body))}`);

export const watchCommand = (job) => curl(address(`/v1/jobs/${job}/events`), "-N");

// The service may send a client to its store, and what it says of an error is no file.
export const downloadCommand = (path, name) => command("curl -fsSL", address(path), `-o ${shell(name)}`);
