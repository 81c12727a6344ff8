/** What an event of GET /v1/events changes in the state of the page. Pure: see core/feed.js for the connection. */

/**
 * @typedef {object} Known
 * @property {Map<string, any>} jobs  VideoObjects by id
 * @property {Map<string, string>} previews  newest preview (data URL) of a running job, by id
 * @property {any} ready  as GET /ready; null until it is told
 */

const BUSY = ["queued", "in_progress"];

/** @param {Map<string, string>} previews @param {string} id @returns {Map<string, string>} */
function without(previews, id) {
  if (!previews.has(id)) return previews;
  const rest = new Map(previews);
  rest.delete(id);
  return rest;
}

/**
 * Take a list of the newest jobs, all unfinished ones among them, as the truth about the time that it covers.
 *
 * @param {Known} known @param {any[]} list
 * @param {boolean} complete  the list holds every job of the visitor
 * @returns {Known & {doubtful: string[]}} `doubtful`: ids that were unfinished and are not in the list: they have ended
 *   long ago or were removed, which only a look at each can tell
 */
export function afterList(known, list, complete = false) {
  const listed = new Set(list.map((job) => job.id));
  const ended = list.filter((job) => !BUSY.includes(job.status));
  const oldest = complete ? -Infinity : Math.min(...ended.map((job) => job.created_at_ms));
  const jobs = new Map();
  const doubtful = [];
  for (const job of list) jobs.set(job.id, job);
  for (const [id, job] of known.jobs) {
    if (listed.has(id)) continue;
    if (job.local) jobs.set(id, job); // pressed here, and not yet known to the server
    else if (BUSY.includes(job.status)) doubtful.push(id);
    else if (job.created_at_ms < oldest) jobs.set(id, job); // older than what the list covers
  }
  const running = new Set(list.filter((job) => job.status === "in_progress").map((job) => job.id));
  const previews = new Map([...known.previews].filter(([id]) => running.has(id)));
  return { jobs, previews, ready: known.ready, doubtful };
}

/**
 * @param {Known} known @param {string} name  "videos", "video", "deleted", "preview" or "ready"; others change nothing
 * @param {any} data  of the event
 * @returns {Known}
 */
export function afterEvent(known, name, data) {
  const { jobs, previews, ready } = known;
  if (name === "videos") return afterList(known, data.data, data.has_more === false);
  if (name === "video") {
    const next = new Map(jobs).set(data.id, data);
    return { jobs: next, previews: data.status === "in_progress" ? previews : without(previews, data.id), ready };
  }
  if (name === "deleted") {
    const next = new Map(jobs);
    next.delete(data.id);
    return { jobs: next, previews: without(previews, data.id), ready };
  }
  if (name === "preview") return { jobs, previews: new Map(previews).set(data.id, data.image), ready };
  if (name === "ready") return { jobs, previews, ready: data };
  return known;
}

/**
 * What another tab needs to know: all unfinished jobs and the newest others, of which none is missing in between.
 * @param {Map<string, any>} jobs @param {number} [count] @returns {any[]} the newest first
 */
export function newest(jobs, count = 50) {
  const all = [...jobs.values()].sort((a, b) => b.created_at_ms - a.created_at_ms);
  const ended = all.filter((job) => !BUSY.includes(job.status)).slice(0, count);
  const kept = new Set(ended);
  return all.filter((job) => BUSY.includes(job.status) || kept.has(job));
}

/** @param {number} attempt  0 for the first @param {number} chance  0..1 @returns {number} milliseconds to wait before it */
export function pause(attempt, chance) {
  if (attempt === 0) return 200; // a server that restarts, a proxy that ends old connections
  return Math.min(15_000, 1000 * 2 ** (attempt - 1)) * (0.75 + chance / 2);
}
