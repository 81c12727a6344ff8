/** What a VideoObject says of itself. Pure. */

/** @typedef {"sending"|"queued"|"running"|"stopping"|"completed"|"expired"|"failed"|"cancelled"} State */

/**
 * @param {any} job @returns {State} "sending": the server does not know it yet; "stopping": it was
 *   cancelled, and its step is still being finished;
 *   "expired": it was made, and its file was removed after the operator's time
 */
export function stateOf(job) {
  if (job.local) return "sending";
  if (job.status === "queued") return "queued";
  if (job.status === "in_progress") return job.cancel_requested ? "stopping" : "running";
  if (job.status === "completed") return job.has && !job.has.includes("video") ? "expired" : "completed";
  return job.status === "cancelled" || job.error?.code === "cancelled" ? "cancelled" : "failed";
}

/** @param {any} job */
export const isBusy = (job) => job.status === "queued" || job.status === "in_progress";

/** @param {any} job @returns {boolean} whether there is a video to play */
export const isPlayable = (job) => stateOf(job) === "completed";

/** @param {any} job @returns {number} width divided by height; 1 where the size is unknown */
export function ratioOf(job) {
  const [width, height] = String(job.size || "").split("x").map(Number);
  return width > 0 && height > 0 ? width / height : 1;
}

/** @param {any} job @returns {number} whole percent, 0..100 */
export const percentOf = (job) => Math.max(0, Math.min(100, Math.round(job.progress || 0)));

/**
 * The jobs of a stage in an order that stays: as they are named, without those that are not known.
 * @param {Map<string, any>} jobs @param {string[]} ids @returns {any[]}
 */
export const named = (jobs, ids) => ids.flatMap((id) => jobs.get(id) ?? []);

/**
 * The variants that were asked for together with a job, in the order of their making.
 * @param {Map<string, any>} jobs @param {any} job @returns {any[]} at least the job itself
 */
export function siblings(jobs, job) {
  if (!job.batch) return [job];
  const found = [...jobs.values()].filter((other) => other.batch === job.batch);
  return found.sort((a, b) => a.created_at_ms - b.created_at_ms || (a.id < b.id ? -1 : 1));
}

/**
 * What a screen reader is told while jobs are made: a new text at most every ten percent.
 * @param {any[]} list @returns {{key: string, values: {percent: number, done: number, count: number}}|null}
 */
export function spoken(list) {
  if (!list.length) return null;
  const states = list.map(stateOf);
  const done = states.filter((state) => state === "completed").length;
  const percent = Math.floor(list.reduce((sum, job) => sum + percentOf(job), 0) / list.length / 10) * 10;
  const values = { percent, done, count: list.length };
  for (const state of ["running", "stopping", "queued", "sending", "failed", "cancelled", "expired", "completed"])
    if (states.includes(/** @type {State} */ (state))) return { key: state, values };
  return null;
}
