/** What can be done with videos. Each failure is told in a toast, and nothing is lost by it. */
import { ApiError, get, post, remove } from "../core/api.js";
import { batch } from "../core/dom.js";
import { t, told } from "../core/i18n.js";
import { jobs, selected } from "../core/store.js";
import { dismiss, toast } from "../shell/toasts.js";
import { show } from "./selection.js";
import { isBusy } from "./states.js";
import { contentUrl } from "./words.js";

const UNDO_SECONDS = 30;

/** @param {any[]} list */
export function learn(list) {
  const next = new Map(jobs.value);
  for (const job of list) next.set(job.id, job);
  jobs.value = next;
}

/**
 * Take what a page of a list says: of what is not finished the feed knows more.
 * @param {any[]} page
 */
export function learnPage(page) {
  learn(page.filter((job) => !isBusy(job) || !jobs.value.has(job.id)));
}

/** @param {string[]} ids */
function forget(ids) {
  const next = new Map(jobs.value);
  for (const id of ids) next.delete(id);
  batch(() => {
    jobs.value = next;
    if (selected.value.some((id) => ids.includes(id))) show(selected.value.filter((id) => !ids.includes(id)));
  });
}

/** @param {unknown} error */
export function tellError(error) {
  if (!(error instanceof ApiError)) throw error;
  toast(told("errors", error), { kind: "problem" });
}

/**
 * Ask for new videos and show them.
 * @param {() => Promise<any>} ask  its answer is the VideoObject
 */
async function begin(ask) {
  try {
    const job = await ask();
    learn([job]);
    show([job.id]);
  } catch (error) {
    tellError(error);
  }
}

/** The bodies that were read, by id: they never change. @type {Map<string, any>} */
export const requests = new Map();

/** @param {any} job @returns {Promise<any>} the body of POST /v1/videos that makes the same video */
export async function requestOf({ id }) {
  if (!requests.has(id)) requests.set(id, (await get(`/v1/videos/${id}/request`)).request);
  return requests.get(id);
}

/** @param {any} job */
export const again = (job) => begin(async () => post("/v1/videos", { ...(await requestOf(job)), batch: undefined }));

/** The same with a new seed. @param {any} job */
export const vary = (job) =>
  begin(async () => {
    const [seed] = crypto.getRandomValues(new Uint32Array(1));
    return post("/v1/videos", { ...(await requestOf(job)), seed: seed >>> 1, batch: undefined });
  });

/** @param {any} job  one that failed */
export const retry = (job) => begin(() => post(`/v1/videos/${job.id}/retry`));

/** @param {any} job  a draft */
export const makeFinal = (job) => begin(() => post(`/v1/videos/${job.id}/final`));

/** @param {any[]} list @param {boolean} favourite */
export async function setFavourite(list, favourite) {
  learn(list.map((job) => ({ ...job, favourite })));
  try {
    await Promise.all(list.map((job) => post(`/v1/videos/${job.id}`, { favourite })));
  } catch (error) {
    learn(list);
    tellError(error);
  }
}

/** @param {any} job */
export async function cancel(job) {
  learn([{ ...job, cancel_requested: true }]);
  try {
    learn([await post(`/v1/videos/${job.id}/cancel`)]);
  } catch (error) {
    learn([job]);
    tellError(error);
  }
}

/** All unfinished ones of the visitor. */
export async function cancelAll() {
  try {
    await post("/v1/videos/cancel");
  } catch (error) {
    tellError(error);
  }
}

/** @param {string[]} ids @param {string[]} shownBefore */
async function restore(ids, shownBefore) {
  const answers = await Promise.allSettled(ids.map((id) => post(`/v1/videos/${id}/restore`)));
  learn(answers.flatMap((answer) => (answer.status === "fulfilled" && answer.value?.id ? [answer.value] : [])));
  if (!selected.value.length && shownBefore.some((id) => ids.includes(id))) show(shownBefore);
  for (const answer of answers) if (answer.status === "rejected") return tellError(answer.reason);
}

/** Delete videos; a toast takes it back. @param {any[]} list */
export async function removeAll(list) {
  const ids = list.map((job) => job.id);
  const shownBefore = selected.value;
  forget(ids);
  const answers = await Promise.allSettled(ids.map((id) => remove(`/v1/videos/${id}?undo_seconds=${UNDO_SECONDS}`)));
  const failed = answers.flatMap((answer, index) => (answer.status === "rejected" ? [{ job: list[index], answer }] : []));
  learn(failed.map(({ job }) => job));
  const removed = ids.filter((id) => !failed.some(({ job }) => job.id === id));
  if (failed.length) tellError(failed[0].answer.reason);
  if (removed.length)
    toast(t("result.deleted", { count: removed.length }), {
      label: t("result.undo"),
      action: () => void restore(removed, shownBefore),
      seconds: UNDO_SECONDS,
    });
}

/** @param {string} text @param {string} done  what is told afterwards */
export async function copy(text, done) {
  try {
    await navigator.clipboard.writeText(text);
    toast(done);
  } catch {
    toast(t("result.copy_failed"), { kind: "problem" }); // no permission, or a page over plain HTTP
  }
}

/** @param {string} href @param {string} [name] */
export function save(href, name = "") {
  const link = document.createElement("a");
  link.href = href;
  link.download = name;
  link.click();
}

/** @param {string|null} header  Content-Disposition @returns {string} the file's name in it */
function nameIn(header) {
  const long = /filename\*=(?:UTF-8|utf-8)''([^;]+)/.exec(header || "");
  if (long) return decodeURIComponent(long[1]);
  return /filename="?([^";]+)"?/.exec(header || "")?.[1] ?? "";
}

/**
 * Save what the server makes on demand, which takes a while the first time.
 * @param {any} job @param {"gif"|"webp"|"last_frame"|"contact_sheet"} variant
 */
export async function saveMade(job, variant) {
  const waiting = toast(t("result.preparing"), { seconds: 120 });
  try {
    const answer = await fetch(contentUrl(job, variant), { headers: { "x-pusa-page": "1" } });
    if (!answer.ok) throw new ApiError(answer.status, (await answer.json().catch(() => null))?.error || {});
    const address = URL.createObjectURL(await answer.blob());
    save(address, nameIn(answer.headers.get("content-disposition")));
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  } catch (error) {
    tellError(error instanceof ApiError ? error : new ApiError(0, { code: "connection" }));
  } finally {
    dismiss(waiting);
  }
}
