/** Which videos the gallery and the queue show, and in which order. Pure. */

/**
 * @typedef {object} Filter
 * @property {string} q  words of the prompt, all of which must be in it
 * @property {string} task  "generate", "extend", "transition" or "loop"; "": all
 * @property {boolean} favourite  only these
 */

/** @returns {Filter} */
export const noFilter = () => ({ q: "", task: "", favourite: false });

/** @param {Filter} filter */
export const isFiltered = (filter) => Boolean(filter.q.trim() || filter.task || filter.favourite);

/** @param {any} job @param {Filter} filter @returns {boolean} */
export function matches(job, filter) {
  if (filter.task && (job.task || "generate") !== filter.task) return false;
  if (filter.favourite && !job.favourite) return false;
  const prompt = (job.prompt || "").toLocaleLowerCase();
  const words = filter.q.toLocaleLowerCase().split(/\s+/);
  return words.every((word) => prompt.includes(word));
}

/** The newest first, as the API lists them. @param {any} a @param {any} b */
const newestFirst = (a, b) => b.created_at_ms - a.created_at_ms || (a.id < b.id ? 1 : -1);

/**
 * The ended jobs that the gallery shows: those that match, as far back as pages were read, so that none is left out
 * between two others.
 * @param {Iterable<any>} jobs @param {Filter} filter @param {number} oldest  created_at_ms of the last one that was read
 */
export function shown(jobs, filter, oldest) {
  const found = [...jobs].filter(
    (job) => job.created_at_ms >= oldest && job.status !== "queued" && job.status !== "in_progress" && matches(job, filter),
  );
  return found.sort(newestFirst);
}

/** @param {Filter} filter @param {string|null} after  an id @param {number} limit @returns {string} of GET /v1/videos */
export function query(filter, after, limit) {
  const search = new URLSearchParams({ limit: String(limit) });
  if (filter.q.trim()) search.set("q", filter.q.trim());
  if (filter.task) search.set("task", filter.task);
  if (filter.favourite) search.set("favourite", "true");
  if (after) search.set("after", after);
  return String(search);
}

/**
 * The ids from one to another, both included, for a click with Shift.
 * @param {string[]} order @param {string} from @param {string} to
 */
export function between(order, from, to) {
  const [a, b] = [order.indexOf(from), order.indexOf(to)];
  if (a < 0 || b < 0) return [to];
  return order.slice(Math.min(a, b), Math.max(a, b) + 1);
}

/**
 * Where an arrow key leads in a grid whose rows have cards of different widths.
 * @param {{left: number, right: number, top: number}[]} boxes @param {number} at @param {string} key @returns {number}
 */
export function neighbour(boxes, at, key) {
  if (key === "ArrowLeft") return Math.max(0, at - 1);
  if (key === "ArrowRight") return Math.min(boxes.length - 1, at + 1);
  if (key === "Home") return 0;
  if (key === "End") return boxes.length - 1;
  const down = key === "ArrowDown";
  if (!down && key !== "ArrowUp") return at;
  const middle = (boxes[at].left + boxes[at].right) / 2;
  const tops = boxes.map((box) => box.top).filter((top) => (down ? top > boxes[at].top + 4 : top < boxes[at].top - 4));
  if (!tops.length) return at;
  const row = down ? Math.min(...tops) : Math.max(...tops);
  let best = at;
  let distance = Infinity;
  boxes.forEach((box, index) => {
    const off = Math.abs((box.left + box.right) / 2 - middle);
    if (Math.abs(box.top - row) <= 4 && off < distance) [best, distance] = [index, off];
  });
  return best;
}

/** Those that run first, then those that wait, in the order of the queue. @param {Iterable<any>} jobs */
export function queueOrder(jobs) {
  const busy = [...jobs].filter((job) => job.status === "queued" || job.status === "in_progress");
  const place = (/** @type {any} */ job) => (job.status === "in_progress" ? -1 : (job.queue_position ?? Infinity));
  return busy.sort((a, b) => place(a) - place(b) || a.created_at_ms - b.created_at_ms || (a.id < b.id ? -1 : 1));
}

/**
 * Move an element of a list.
 * @param {string[]} order @param {string} id @param {number} to  its new index @returns {string[]}
 */
export function moved(order, id, to) {
  const rest = order.filter((other) => other !== id);
  rest.splice(Math.max(0, Math.min(rest.length, to)), 0, id);
  return rest;
}

/** @param {string[]} order @param {string} id @returns {string|null} the one that comes after it; null: it is the last */
export const after = (order, id) => order[order.indexOf(id) + 1] ?? null;
