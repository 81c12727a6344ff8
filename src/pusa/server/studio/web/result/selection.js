/** Which videos are on the stage: named by the page's address, so that back, forward, reload and a link work. */
import { effect, signal } from "../core/dom.js";
import { look } from "../core/feed.js";
import { told } from "../core/i18n.js";
import { jobs, selected } from "../core/store.js";
import { toast } from "../shell/toasts.js";

/** Ids that the server does not know: removed, or another visitor's. */
export const gone = signal(/** @type {Set<string>} */ (new Set()));

/**
 * Two videos to compare: the second one is null until it is picked in the gallery. It counts only while the first one
 * is on the stage.
 */
export const comparison = signal(/** @type {{first: string, second: string|null}|null} */ (null));

/** Whether the next video that is opened in the gallery is the second one of a comparison. */
export const isPicking = () =>
  comparison.value?.second === null && selected.value.length === 1 && selected.value[0] === comparison.value.first;

/** @param {string[]} ids */
export function show(ids) {
  comparison.value = null;
  selected.value = ids;
}

/** @param {string} first @param {string|null} [second] */
export function compare(first, second = null) {
  selected.value = [first];
  comparison.value = { first, second };
}

/** What is pressed and not yet sent has an id of its own. @param {string} id */
const isServers = (id) => /^video_[0-9a-f]{32}$/.test(id);

/** @returns {string[]} */
const named = () => new URLSearchParams(location.search).getAll("job").filter(isServers);

/** @param {string[]} ids */
function write(ids) {
  const address = new URL(location.href);
  address.searchParams.delete("job");
  for (const id of ids) address.searchParams.append("job", id);
  history.pushState(null, "", address);
}

/** @param {string} id */
async function find(id) {
  try {
    if (await look(id)) return;
  } catch (error) {
    return void toast(told("errors", /** @type {any} */ (error)), { kind: "problem" });
  }
  if (!jobs.peek().has(id)) gone.value = new Set(gone.peek()).add(id);
}

/** Look once more for what is on the stage and was removed: in another tab, or on another device. @param {string[]} ids */
function findAgain(ids) {
  for (const id of ids) if (selected.peek().includes(id) && !jobs.peek().has(id)) void find(id);
}

let started = false;

/** Begin; a second call changes nothing. */
export function startSelection() {
  if (started) return;
  started = true;
  if (!selected.value.length) selected.value = named();
  addEventListener("popstate", () => show(named()));
  effect(() => {
    const ids = selected.value;
    if (ids.every(isServers) && ids.join() !== named().join()) write(ids);
    const unknown = ids.filter((id) => isServers(id) && !jobs.peek().has(id) && !gone.peek().has(id));
    for (const id of unknown) void find(id);
  });
  /** @type {Set<string>} */
  let seen = new Set();
  effect(() => {
    const ids = selected.value.filter(isServers);
    const now = jobs.value;
    const missing = ids.filter((id) => seen.has(id) && !now.has(id));
    seen = new Set(ids.filter((id) => now.has(id)));
    if (missing.length) queueMicrotask(() => findAgain(missing)); // what removes it here takes it off the stage too
  });
}
