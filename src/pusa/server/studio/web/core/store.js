/**
 * The one state of the page. What is seen is drawn from it, and Generate sends it.
 *
 * `form` holds an immutable object: every edit makes a new one, goes into the history (undo, redo) and into the
 * browser's storage at once. All files in it are ids of the server's, so a reload loses nothing.
 */
import { batch, computed, signal } from "./dom.js";
import { emptyForm } from "./empty_form.js";
import { read, write } from "./persist.js";

export { emptyForm };

/**
 * A picture or a clip of the form. Exactly one of the sources is set; null stands for "automatic" or "not set".
 * @typedef {object} Item
 * @property {string} id  unique in the form
 * @property {{file_id?: string, video_id?: string, input?: number}} source  where its content is on the server
 * @property {"image"|"video"} kind
 * @property {string} name
 * @property {number} width   pixels of the source
 * @property {number} height
 * @property {number|null} seconds  length of a clip
 * @property {number|null} frames
 * @property {number|null} fps
 * @property {string|null} position  "3" (latent frame), "80f" (frame), "1.5s", "last"; null: placed automatically
 * @property {number|null} noise  0..1; null: the preset's
 * @property {[number, number, number, number]|null} crop  x, y, width, height as fractions of the upright picture
 * @property {number|null} start  seconds: the part of a clip that is used
 * @property {number|null} end
 * @property {number|null} frame  the frame of a clip that is used as a still
 */

/**
 * @typedef {object} Form
 * @property {"image"|"images"|"video"|"text"} tab
 * @property {"complete"|"extend"|"transition"|"loop"} mode  of the tab "video"
 * @property {string} prompt
 * @property {string|null} negative  null: the model's
 * @property {string} story  prompts of a long video, a line each
 * @property {Item[]} items  pictures: "image" uses the first, "images" all, the loop an optional first
 * @property {Item[]} clips  of the tab "video": one, or two for a transition
 * @property {string|null} keptPositions  latent frames of a clip that are kept (complete); null: its first ones
 * @property {string} keptNoise  their noise multipliers
 * @property {string} shape  "auto" (as the picture), "16:9", "1:1", "9:16" or "WIDTHxHEIGHT"
 * @property {number|null} frames  null: the model's default, as in all fields below
 * @property {number|null} fps
 * @property {import("./seeds.js").Seed|null} seed
 * @property {boolean} seedLocked  false: a new seed for every click
 * @property {number} variants  1..8
 * @property {"faithful"|"balanced"|"creative"} preset
 * @property {number|null} alpha
 * @property {number|null} alpha2
 * @property {number|null} steps
 * @property {number|null} guidance
 * @property {number|null} shift
 * @property {number|null} overlap
 * @property {"crop"|"letterbox"|"stretch"} fit
 * @property {boolean} fast
 * @property {boolean} draft
 * @property {boolean} exact
 * @property {"even"|"wave"} schedule
 * @property {string|null} metadata
 * @property {string|null} lora
 */

/**
 * What the server wrote into the page: names of the languages by code, and the examples of every tab.
 * @type {{languages: Record<string, string>, examples: {name: string, tab: string, values: object, files: string[], shows: string[]}[]}}
 */
export const pageData = JSON.parse(document.getElementById("page-data")?.textContent || '{"languages":{},"examples":[]}');

const FORM_KEY = "pusa.form";
const PREFS_KEY = "pusa.prefs";
const MOST_STEPS = 200; // of the history

/** @template {object} T @param {string} key @param {T} fallback @returns {T} */
const stored = (key, fallback) => ({ ...fallback, ...read(key, {}) });

/** @type {import("./dom.js").Signal<Form>} */
export const form = signal(stored(FORM_KEY, emptyForm()));

/** What the visitor chose for the page itself. */
export const prefs = signal(stored(PREFS_KEY, { theme: null, language: null, notify: false }));

/** @type {import("./dom.js").Signal<Map<string, any>>} VideoObjects by id, as the feed keeps them */
export const jobs = signal(new Map());

/** @type {import("./dom.js").Signal<Map<string, string>>} the newest preview (data URL) of a running job */
export const previews = signal(new Map());

/** The model that makes the videos (GET /v1/models/{id}); null until it is read. */
export const model = signal(/** @type {any} */ (null));

/** The state of the workers (GET /ready); null until it is read. */
export const ready = signal(/** @type {any} */ (null));

/** Whether a key is needed and there (GET /v1/session); null until it is read. */
export const session = signal(/** @type {any} */ (null));

/** "online" while the server answers, else "lost". */
export const connection = signal("online");

/** Ids of the video on the stage, or of the variants in its grid. */
export const selected = signal(/** @type {string[]} */ ([]));

/** What did not work at the last click: {code, values, message, param}; null: nothing. */
export const problem = signal(/** @type {any} */ (null));

/**
 * Texts that stand in a box and were not understood, by the box's name: what is seen is then not what would be sent.
 * @type {import("./dom.js").Signal<Record<string, import("./request.js").Problem & {done?: () => void}>>}
 */
export const misread = signal({});

/** Files on their way to the server: {id, name, sent, total}. */
export const uploads = signal(/** @type {any[]} */ ([]));

/** @type {Form[]} */
let past = [];
/** @type {Form[]} */
let future = [];
let lastEdit = { label: "", at: 0 };

const historyChanged = signal(0);
export const canUndo = computed(() => historyChanged.value >= 0 && past.length > 0);
export const canRedo = computed(() => historyChanged.value >= 0 && future.length > 0);

/** @param {Form} next */
function apply(next) {
  batch(() => {
    form.value = next;
    historyChanged.value++;
    problem.value = null;
  });
  write(FORM_KEY, next);
}

/**
 * Change the form. Edits with the same label within a second are one step of the history (typing, dragging).
 * @param {Partial<Form>|((form: Form) => Partial<Form>)} change
 * @param {string} [label]
 */
export function edit(change, label = "") {
  const now = form.value;
  const next = { ...now, ...(typeof change === "function" ? change(now) : change) };
  const at = Date.now();
  if (!label || label !== lastEdit.label || at - lastEdit.at > 1000) past = [...past, now].slice(-MOST_STEPS);
  lastEdit = { label, at };
  future = [];
  apply(next);
}

/**
 * Change the form without a step of the history: what the page itself fills in, such as the seed that it has drawn.
 * @param {Partial<Form>} change
 */
export const amend = (change) => apply({ ...form.value, ...change });

/**
 * Change one item of `items` or `clips`.
 * @param {string} id @param {Partial<Item>} change @param {string} [label]
 */
export function editItem(id, change, label = "") {
  const changed = (/** @type {Item[]} */ list) => list.map((item) => (item.id === id ? { ...item, ...change } : item));
  edit((now) => ({ items: changed(now.items), clips: changed(now.clips) }), label && `${label}:${id}`);
}

export function undo() {
  const before = past.pop();
  if (!before) return;
  future.push(form.value);
  lastEdit = { label: "", at: 0 };
  apply(before);
}

export function redo() {
  const after = future.pop();
  if (!after) return;
  past.push(form.value);
  lastEdit = { label: "", at: 0 };
  apply(after);
}

/** @param {object} change */
export function setPrefs(change) {
  prefs.value = { ...prefs.value, ...change };
  write(PREFS_KEY, prefs.value);
}

/** @returns {string} a new id for an item */
export function newId() {
  return crypto.getRandomValues(new Uint32Array(2)).join("-");
}
