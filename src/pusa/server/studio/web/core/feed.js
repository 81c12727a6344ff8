/**
 * Everything that changes on the server, by one connection to GET /v1/events for all tabs of a browser.
 *
 * The tab that holds the lock has the connection and passes the events on; when it is closed another one takes over.
 * A tab that is looked at and gets no answer from it (a browser may stop hidden tabs) takes the lock away. Without
 * locks (a page that came over plain HTTP from another machine) every tab has a connection of its own.
 */
import { get, url } from "./api.js";
import { afterEvent, afterList, newest, pause } from "./changes.js";
import { batch, computed, effect, signal } from "./dom.js";
import { parseJson } from "./json.js";
import { connection, jobs, previews, ready, session } from "./store.js";

const LOCK = "pusa.feed";
const EVENTS = ["videos", "video", "deleted", "preview", "ready"];
const ANSWER_MS = 4000; // a leading tab that is alive answers much sooner
const LOOK_MS = 20_000;

/** Counts the lists that were taken over: after each the rest of what is known may be out of date. */
export const refreshed = signal(0);

/** @type {EventSource|null} */
let source = null;
/** @type {BroadcastChannel|null} */
let channel = null;
let leads = false;
let attempt = 0;
let timer = 0;
let heard = 0; // time of the last word of the leading tab
let started = false;

/** @param {any} message */
const say = (message) => channel?.postMessage(message);

/** @param {import("./changes.js").Known} next */
function keep(next) {
  batch(() => {
    jobs.value = next.jobs;
    previews.value = next.previews;
    ready.value = next.ready;
  });
}

const known = () => ({ jobs: jobs.peek(), previews: previews.peek(), ready: ready.peek() });

/** @param {string} name @param {any} data */
function take(name, data) {
  if (name === "videos") takeList(data.data, data.has_more === false);
  else keep(afterEvent(known(), name, data));
}

/** @param {any[]} list @param {boolean} complete */
function takeList(list, complete) {
  const next = afterList(known(), list, complete);
  batch(() => {
    keep(next);
    refreshed.value = refreshed.peek() + 1;
  });
  for (const id of next.doubtful) void look(id);
}

/**
 * Read one video anew.
 * @param {string} id @returns {Promise<any>} the VideoObject; null if there is none
 */
export async function look(id) {
  try {
    const job = await get(`/v1/videos/${id}`);
    take("video", job);
    return job;
  } catch (error) {
    const { status } = /** @type {import("./api.js").ApiError} */ (error);
    if (status === 404) take("deleted", { id });
    else if (status !== 0) throw error;
    return null;
  }
}

/** @param {"online"|"lost"} value */
function setConnection(value) {
  connection.value = value;
  if (leads) say({ kind: "connection", value });
}

const mayAsk = computed(() => !(session.value?.keys_required && !session.value.signed_in));

function disconnect() {
  clearTimeout(timer);
  source?.close();
  source = null;
}

function connect() {
  disconnect();
  if (!leads || !mayAsk.peek()) return;
  source = new EventSource(url("/v1/events"));
  source.onopen = () => {
    attempt = 0;
    setConnection("online");
  };
  source.onerror = () => {
    disconnect();
    timer = window.setTimeout(again, pause(attempt++, Math.random()));
  };
  for (const name of EVENTS) {
    source.addEventListener(name, (event) => {
      const data = parseJson(/** @type {MessageEvent} */ (event).data);
      take(name, data);
      say({ kind: "event", name, data });
    });
  }
}

/** Try once more; from the second time on look first whether the server answers at all, and what it says. */
async function again() {
  if (attempt > 1) {
    try {
      const now = await get("/v1/session");
      session.value = now;
      if (!mayAsk.peek()) return;
      const page = await get("/v1/videos?limit=50"); // a proxy that lets no stream through: better this than nothing
      takeList(page.data, !page.has_more);
    } catch (error) {
      const { status } = /** @type {import("./api.js").ApiError} */ (error);
      setConnection(status === 0 || status >= 500 ? "lost" : "online");
    }
  }
  connect();
}

/** @param {{kind: string, wants?: boolean, name?: any, data?: any, value?: any, state?: any}} message */
function listen(message) {
  if (leads) {
    if (message.kind !== "hello") return;
    if (!message.wants) return say({ kind: "here" });
    const state = { list: newest(jobs.peek()), previews: previews.peek(), ready: ready.peek(), count: refreshed.peek() };
    return say({ kind: "state", state, value: connection.peek() });
  }
  if (message.kind === "hello") return;
  heard = performance.now();
  if (message.kind === "event") take(message.name, message.data);
  if (message.kind === "connection") connection.value = message.value;
  if (message.kind === "state") {
    const { list, previews: images, ready: state, count } = message.state;
    const next = afterList(known(), list);
    batch(() => {
      keep({ jobs: next.jobs, previews: images, ready: state });
      refreshed.value = count;
      connection.value = message.value;
    });
  }
}

/** @param {boolean} steal */
async function lead(steal) {
  try {
    await navigator.locks.request(LOCK, steal ? { steal } : {}, () => {
      leads = true;
      attempt = 0;
      connect();
      return new Promise(() => {}); // until the tab is closed, or another one takes the lock
    });
  } catch {
    leads = false; // taken away
    disconnect();
    void lead(false);
  }
}

/**
 * Ask the leading tab whether it is there; take over where it does not answer.
 * @param {boolean} wants  and for all that it knows
 */
function ask(wants) {
  if (leads || document.visibilityState !== "visible") return;
  const asked = performance.now();
  say({ kind: "hello", wants });
  setTimeout(() => {
    if (!leads && heard < asked && document.visibilityState === "visible") void lead(true);
  }, ANSWER_MS);
}

function wake() {
  if (!leads) ask(true);
  else if (!source) {
    attempt = 0;
    connect();
  }
}

/** Begin; a second call changes nothing. */
export function startFeed() {
  if (started) return;
  started = true;
  if (navigator.locks && "BroadcastChannel" in window) {
    channel = new BroadcastChannel(LOCK);
    channel.onmessage = (event) => listen(event.data);
    void lead(false);
    setInterval(() => ask(false), LOOK_MS);
    void navigator.locks.query().then((state) => {
      if (state.held?.some((lock) => lock.name === LOCK)) ask(true);
    });
  } else {
    leads = true;
  }
  addEventListener("online", wake);
  document.addEventListener("visibilitychange", wake);
  effect(() => {
    if (mayAsk.value) connect();
    else {
      disconnect();
      keep({ jobs: new Map(), previews: new Map(), ready: ready.peek() }); // another's, after a log out
    }
  });
}
