/** How far all videos of the visitor are. Pure. */

/** @param {any} job */
const isBusy = (job) => job.status === "queued" || job.status === "in_progress";

/**
 * @param {Iterable<any>} jobs @returns {number} percent of the video that is furthest; 0 while all wait; -1: none is made
 */
export function overall(jobs) {
  const busy = [...jobs].filter(isBusy);
  if (!busy.length) return -1;
  return Math.round(Math.max(...busy.map((job) => (job.status === "in_progress" ? job.progress || 0 : 0))));
}

/**
 * The jobs that have ended since, with a result or a failure that nobody asked for.
 * @param {Map<string, any>} before  those that were unfinished @param {Map<string, any>} now @returns {any[]}
 */
export function turnedOut(before, now) {
  return [...before.keys()].flatMap((id) => {
    const job = now.get(id);
    return job && !isBusy(job) && job.status !== "cancelled" && job.error?.code !== "cancelled" ? [job] : [];
  });
}
