/** What the gallery shows: the filter, how far back the list was read, what is selected. */
import { get } from "../core/api.js";
import { computed, effect, signal } from "../core/dom.js";
import { refreshed } from "../core/feed.js";
import { jobs, selected } from "../core/store.js";
import { learnPage, tellError } from "../result/actions.js";
import { isFiltered, noFilter, query, shown } from "./model.js";

const PAGE = 40;
const MOST_PAGES = 10; // that are read anew after the connection was away

export const filter = signal(noFilter());

/** Ids of the videos that are selected, and the one from which a click with Shift goes on. */
export const chosen = signal(/** @type {Set<string>} */ (new Set()));
export const anchor = signal("");

/** Whether a press on a card selects it. */
export const choosing = signal(false);

/** @typedef {{oldest: number, last: string|null, more: boolean}} Read  how far back a list was read */

/** @returns {Read} */
const unread = () => ({ oldest: Infinity, last: null, more: true });

/** Of all videos, and of those that match the filter. */
const read = signal({ all: unread(), found: unread() });
export const isReading = signal(false);
export const hasFailed = signal(false);

const current = computed(() => (isFiltered(filter.value) ? read.value.found : read.value.all));
export const hasMore = computed(() => current.value.more);
export const cursor = computed(() => current.value.last);

/** @type {any[]} */
let before = [];

/** The ended jobs that match; the same array while none of them has changed. */
const listed = computed(() => {
  const oldest = Math.min(current.value.oldest, read.value.all.oldest);
  const next = shown(jobs.value.values(), filter.value, oldest);
  if (next.length !== before.length || next.some((job, index) => job !== before[index])) before = next;
  return before;
});

export const videos = computed(() => listed.value.filter((job) => job.status === "completed"));
export const unfinished = computed(() => listed.value.filter((job) => job.status !== "completed"));

/** @param {any} page @returns {Read} */
const readUpTo = ({ data, has_more: more, last_id: last }) => ({
  oldest: more && data.length ? data[data.length - 1].created_at_ms : -Infinity,
  last,
  more,
});

let asked = 0;

/** Read the next page of what is shown. */
export async function readMore() {
  const filtered = isFiltered(filter.value);
  const mine = ++asked;
  isReading.value = true;
  try {
    const page = await get(`/v1/videos?${query(filter.value, current.value.last, PAGE)}`);
    if (mine !== asked) return; // the filter has changed meanwhile
    learnPage(page.data);
    read.value = { ...read.value, [filtered ? "found" : "all"]: readUpTo(page) };
    hasFailed.value = false;
  } catch (error) {
    if (mine !== asked) return;
    hasFailed.value = true;
    if (/** @type {any} */ (error).status) tellError(error); // without a connection the page's banner tells it
  } finally {
    if (mine === asked) isReading.value = false;
  }
}

/** @param {Partial<import("./model.js").Filter>} change */
export function setFilter(change) {
  filter.value = { ...filter.value, ...change };
  read.value = { ...read.value, found: unread() };
  chosen.value = new Set();
  if (isFiltered(filter.value)) void readMore();
  else {
    asked++;
    isReading.value = false;
  }
}

/** Read anew, after a time without a connection, as far back as was read before: what is missing now was removed. */
async function readAgain() {
  const { oldest } = read.value.all;
  if (oldest === Infinity) return;
  /** @type {Set<string>} */
  const there = new Set();
  let page;
  let from = Infinity;
  for (let count = 0; count < MOST_PAGES && from >= oldest; count++) {
    page = await get(`/v1/videos?${query(noFilter(), page?.last_id ?? null, 100)}`);
    for (const job of page.data) there.add(job.id);
    learnPage(page.data);
    from = readUpTo(page).oldest;
    if (!page.has_more) break;
  }
  const kept = [...jobs.value].filter(([id, job]) => there.has(id) || job.created_at_ms < from || selected.value.includes(id));
  jobs.value = new Map(kept);
  read.value = { ...read.value, all: readUpTo(page) };
}

/** @param {string} id @param {boolean} on */
export function choose(id, on) {
  const next = new Set(chosen.value);
  if (on) next.add(id);
  else next.delete(id);
  anchor.value = id;
  chosen.value = next;
}

/** The selected videos that are still there, in the order of the gallery. */
export const chosenVideos = computed(() => videos.value.filter((job) => chosen.value.has(job.id)));

let started = false;

/** Begin; a second call changes nothing. */
export function startGallery() {
  if (started) return;
  started = true;
  let last = 0;
  effect(() => {
    const now = refreshed.value;
    if (last > 0 && now > last) void readAgain().catch(tellError);
    last = now;
  });
}
