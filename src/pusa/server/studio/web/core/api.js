/** Requests to the server's API. Every failure is an `ApiError`, with the code and values that a text is made of. */
import { effect } from "./dom.js";
import { jsonText, parseJson } from "./json.js";
import { connection, session, uploads } from "./store.js";

const UPLOAD_TRIES = 3; // a file that the browser cannot read any more looks like a lost connection
const ROOT = new URL(document.baseURI).pathname.replace(/\/[^/]*$/, "");

/** @param {string} path such as "/v1/videos" @returns {string} */
export const url = (path) => ROOT + path;

export class ApiError extends Error {
  /** @param {number} status 0: no answer @param {{code?: string|null, message?: string, param?: string|null, values?: object}} error */
  constructor(status, error) {
    super(error.message || error.code || "");
    this.status = status;
    this.code = error.code || "internal_error";
    this.param = error.param || null;
    this.values = error.values || {};
  }
}

/** The key is needed, and not there or not valid any more. */
function endSession() {
  if (session.value) session.value = { ...session.value, keys_required: true, signed_in: false };
}

/**
 * @param {string} method @param {string} path @param {object} [options]
 * @param {any} [options.body]  sent as JSON; a FormData as it is
 * @param {Record<string, string>} [options.headers]
 * @param {AbortSignal} [options.signal]
 * @returns {Promise<any>} the JSON of the answer; null for an empty one
 */
export async function call(method, path, { body, headers = {}, signal } = {}) {
  /** @type {RequestInit} */
  const request = { method, headers: { "x-pusa-page": "1", ...headers }, signal };
  if (body instanceof FormData) request.body = body;
  else if (body !== undefined) {
    request.body = jsonText(body);
    /** @type {any} */ (request.headers)["content-type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(url(path), request);
  } catch (error) {
    if (signal?.aborted) throw error;
    connection.value = "lost";
    throw new ApiError(0, { code: "connection" });
  }
  connection.value = "online";
  if (response.status === 401) endSession();
  const text = await response.text();
  /** @type {any} */
  let json = null;
  try {
    json = text ? parseJson(text) : null;
  } catch {
    json = { error: { message: text.slice(0, 200) } }; // a proxy's page, which is no JSON
  }
  if (!response.ok) throw new ApiError(response.status, json?.error || {});
  return json;
}

/** @typedef {{headers?: Record<string, string>, signal?: AbortSignal}} Options */

/** @param {string} path @param {Options} [options] */
export const get = (path, options) => call("GET", path, options);
/** @param {string} path @param {any} [body] @param {Options} [options] */
export const post = (path, body, options) => call("POST", path, { body, ...options });
/** @param {string} path */
export const remove = (path) => call("DELETE", path);

/** @returns {Promise<void>} when the server answers again */
const backOnline = () =>
  new Promise((resolve) => {
    const stop = effect(() => {
      if (connection.value === "lost") return;
      resolve();
      queueMicrotask(() => stop());
    });
  });

/**
 * Send a file to the durable store; its progress is in `uploads`. Where the connection is lost on the way, it is sent
 * again once the server answers.
 * @param {File|Blob} file @param {string} [name]
 * @returns {Promise<any>} its FileObject
 */
export async function upload(file, name = /** @type {File} */ (file).name || "file") {
  const id = `${name}-${performance.now()}`;
  const progress = (/** @type {number} */ sent) => {
    uploads.value = [...uploads.value.filter((one) => one.id !== id), { id, name, sent, total: file.size }];
  };
  for (let left = UPLOAD_TRIES - 1; ; left--) {
    try {
      return await uploadOnce(id, file, name, progress);
    } catch (error) {
      if (!left || !(error instanceof ApiError) || error.status !== 0) throw error;
      progress(0);
      await backOnline();
    }
  }
}

/**
 * @param {string} id @param {File|Blob} file @param {string} name @param {(sent: number) => void} progress
 * @returns {Promise<any>} its FileObject
 */
function uploadOnce(id, file, name, progress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch tells no progress of what is sent
    request.open("POST", url("/v1/files"));
    request.setRequestHeader("x-pusa-page", "1");
    request.responseType = "json";
    request.upload.onprogress = (event) => progress(event.loaded);
    const end = (/** @type {() => void} */ settle) => {
      uploads.value = uploads.value.filter((one) => one.id !== id); // before anybody goes on with the file
      settle();
    };
    request.onload = () =>
      end(() => {
        if (request.status < 300) return resolve(request.response);
        if (request.status === 401) endSession();
        reject(new ApiError(request.status, request.response?.error || {}));
      });
    request.onerror = () =>
      end(() => {
        connection.value = "lost";
        reject(new ApiError(0, { code: "connection" }));
      });
    request.onabort = () => end(() => reject(new ApiError(0, { code: "connection" })));
    const form = new FormData();
    form.append("file", file, name);
    progress(0);
    request.send(form);
  });
}
