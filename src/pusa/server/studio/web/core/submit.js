/**
 * Generate: what the form shows at the click is sent, and seen at once as a job of its own.
 *
 * Every press has a key, by which the server knows a second sending of it: what was pressed while the server was away is
 * kept in the browser, and sent once after asking.
 */
import { ApiError, post } from "./api.js";
import { batch, signal } from "./dom.js";
import { read, write } from "./persist.js";
import { bodiesOf, problemOf } from "./request.js";
import { remember } from "./prompts.js";
import { targetSize } from "./size.js";
import { amend, form, jobs, misread, model, problem, ready, selected, uploads } from "./store.js";
import { drawSeed, token } from "./token.js";

/** @typedef {{key: string, body: Record<string, any>}} Press */

const UNSENT_KEY = "pusa.unsent";
const AWAY = [0, 502, 504]; // no answer, or a proxy's whose server is away

/** What was pressed while the server was away. @type {import("./dom.js").Signal<Press[]>} */
export const unsent = signal(read(UNSENT_KEY, /** @type {Press[]} */ ([])));

/** @param {Press[]} presses */
function keepUnsent(presses) {
  unsent.value = presses;
  write(UNSENT_KEY, presses.length ? presses : null);
}

/** Why Generate is off; null: it is not. @returns {string|null} key of a text */
export function offReason() {
  if (ready.value?.stage === "failed") return "form.problem.failed_model";
  return model.value ? null : "form.problem.loading";
}

/** @param {Press} press @returns {any} a VideoObject for the time until the server has answered */
function placeholder({ key, body }) {
  const size = targetSize(form.value, model.value);
  const frames = body.num_frames ?? model.value.defaults.num_frames;
  return {
    id: `local_${key}`,
    object: "video",
    model: model.value.id,
    status: "queued",
    stage: "sending",
    progress: 0,
    step: 0,
    steps: 0,
    created_at: Math.floor(Date.now() / 1000),
    created_at_ms: Date.now(),
    prompt: body.prompt,
    seconds: String(frames / (body.fps ?? model.value.defaults.fps)),
    size: `${body.width ?? size.width}x${body.height ?? size.height}`,
    task: body.task ?? "generate",
    seed: body.seed,
    batch: body.batch ?? null,
    draft: Boolean(body.draft),
    favourite: false,
    notes: [],
    note_details: [],
    has: [],
    error: null,
    local: true,
  };
}

/** Make what the form shows. @returns {Promise<void>} */
export async function generate() {
  const off = offReason();
  if (off) return void (problem.value = { key: off });
  if (uploads.value.length) return void (problem.value = { key: "form.problem.uploading" });
  const found = Object.values(misread.value)[0] ?? problemOf(form.value, model.value);
  if (found) return void (problem.value = found);
  if (!form.value.seedLocked || form.value.seed === null) amend({ seed: drawSeed() });
  const presses = bodiesOf(form.value, model.value, token()).map((body) => ({ key: token(), body }));
  remember(form.value.prompt);
  begin(presses);
  await send(presses);
}

/** Show presses as jobs before the server knows them. @param {Press[]} presses */
function begin(presses) {
  batch(() => {
    const next = new Map(jobs.value);
    for (const press of presses) next.set(`local_${press.key}`, placeholder(press));
    jobs.value = next;
    selected.value = presses.map(({ key }) => `local_${key}`);
    problem.value = null;
  });
}

/** @param {Press[]} presses in order, one after another */
async function send(presses) {
  for (const [number, press] of presses.entries()) {
    try {
      const job = await post("/v1/videos", press.body, { headers: { "Idempotency-Key": press.key } });
      replace(press, job);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      const rest = presses.slice(number);
      for (const one of rest) replace(one, null);
      if (AWAY.includes(error.status)) keepUnsent([...unsent.value, ...rest]);
      else problem.value = error;
      return;
    }
  }
}

/**
 * Put the server's job in the place of a press's own.
 * @param {Press} press @param {any} job  null: there is none
 */
function replace({ key }, job) {
  const local = `local_${key}`;
  batch(() => {
    const next = new Map(jobs.value);
    next.delete(local);
    if (job && !next.has(job.id)) next.set(job.id, job); // the feed may know more of it already
    jobs.value = next;
    if (!selected.value.includes(local)) return;
    selected.value = selected.value.flatMap((id) => (id !== local ? [id] : job ? [job.id] : []));
  });
}

/** Send what was kept. */
export async function sendUnsent() {
  const presses = unsent.value;
  keepUnsent([]);
  begin(presses);
  await send(presses);
}

/** Forget what was kept. */
export const discardUnsent = () => keepUnsent([]);
