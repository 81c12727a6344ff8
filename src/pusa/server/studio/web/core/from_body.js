/** The form that sends a body of POST /v1/videos: what Edit takes back. Pure; request.js is the way there. */
import { lengthOf, placeItems, serversOverlap } from "../timeline/model.js";
import { splitList } from "./positions.js";
import { DRAFT_STEPS, standards } from "./request.js";
import { draftSize, parseSize, targetSize } from "./size.js";

/** @typedef {import("./store.js").Form} Form */
/** @typedef {import("./store.js").Item} Item */

/** Which input of a body a reference is: the key of its FileObject. @param {any} reference @returns {string} */
export const referenceKey = (reference) => JSON.stringify(reference);

/** @param {any} body @returns {any[]} all references of a body, in order */
export function referencesOf(body) {
  const listed = body.input_reference ?? body.video ?? [];
  const keyframes = (body.keyframes ?? []).map((/** @type {any} */ frame) => frame.reference).filter(Boolean);
  return [...keyframes, ...(Array.isArray(listed) ? listed : [listed])];
}

/**
 * @param {any} file  a FileObject @param {any} reference @param {string} id  of the item
 * @returns {Item}
 */
export function itemOf(file, reference, id) {
  return {
    id,
    source: { file_id: file.id },
    kind: file.kind,
    name: file.filename,
    width: file.width,
    height: file.height,
    seconds: file.seconds ?? null,
    frames: file.frames ?? null,
    fps: file.fps ?? null,
    position: null,
    noise: null,
    crop: reference?.crop ?? null,
    start: reference?.start ?? null,
    end: reference?.end ?? null,
    frame: reference?.frame ?? null,
  };
}

/** @param {any} keyframe @returns {string} */
function positionText({ latent, frame, time }) {
  if (frame !== undefined && frame !== null) return frame === "last" ? "last" : `${frame}f`;
  if (time !== undefined && time !== null) return time === "last" ? "last" : `${time}s`;
  return String(latent ?? 0);
}

/** @param {any} list @returns {string[]} */
const texts = (list) => (list === undefined || list === null ? [] : Array.isArray(list) ? list.map(String) : splitList(String(list)));

/**
 * The form that sends a body.
 * @param {any} body  of POST /v1/videos
 * @param {Map<string, any>} files  FileObjects of its inputs by `referenceKey`; those that are missing are left out
 * @param {any} model
 * @param {Form} empty  the form as it is at the beginning
 * @param {() => string} newId
 * @returns {{form: Form, lost: number}} `lost`: inputs that are not there any more
 */
export function fromBody(body, files, model, empty, newId) {
  const all = referencesOf(body);
  const lost = all.filter((reference) => !files.has(referenceKey(reference))).length;
  const form = { ...empty, ...placedInputs(body, files, newId) };
  form.prompt = body.prompt ?? "";
  form.story = storyText(body.prompts);
  form.preset = body.preset ?? empty.preset;
  form.fit = body.fit ?? (body.keyframes ?? []).find((/** @type {any} */ frame) => frame.fit)?.fit ?? empty.fit;
  form.fast = Boolean(body.fast && model.fast);
  form.draft = Boolean(body.draft);
  form.exact = Boolean(body.exact);
  form.schedule = String(body.schedule ?? "even").startsWith("wave") ? "wave" : "even";
  form.lora = Array.isArray(body.lora) ? (body.lora[0] ?? null) : (body.lora?.name ?? body.lora ?? null);
  form.frames = body.num_frames ?? null;
  Object.assign(form, numbers(body, form, model));
  form.shape = shapeOf(body, form, model);
  const seed = body.seed ?? null;
  Object.assign(form, { seed, seedLocked: seed !== null, variants: 1 });
  if (form.tab === "images") form.items = automatic(form, model);
  return { form, lost };
}

/** @param {any} prompts @returns {string} */
const storyText = (prompts) => (Array.isArray(prompts) ? prompts.join("\n") : (prompts ?? ""));

/**
 * Tab, mode, pictures and clips of a body.
 * @param {any} body @param {Map<string, any>} files @param {() => string} newId
 * @returns {Partial<Form>}
 */
function placedInputs(body, files, newId) {
  const item = (/** @type {any} */ reference) => {
    const file = files.get(referenceKey(reference));
    return file ? [itemOf(file, reference, newId())] : [];
  };
  const keyframes = (body.keyframes ?? []).flatMap((/** @type {any} */ frame) =>
    item(frame.reference).map((one) => ({ ...one, position: positionText(frame), noise: frame.noise ?? null })),
  );
  const listed = referencesOf({ ...body, keyframes: [] }).flatMap(item);
  const task = body.task ?? "generate";
  if (task !== "generate") {
    const items = [...keyframes, ...listed.filter((one) => one.kind === "image")].map((one) => ({ ...one, position: null }));
    return { tab: "video", mode: task, clips: listed.filter((one) => one.kind === "video"), items };
  }
  const positions = texts(body.cond_positions);
  const noise = texts(body.noise_multipliers ?? body.noise_multiplier);
  const clips = listed.filter((one) => one.kind === "video" && one.frame === null);
  if (clips.length) {
    return { tab: "video", mode: "complete", clips, items: keyframes, keptPositions: positions.join(","), keptNoise: noise.join(",") };
  }
  const pictures = listed.map((one, index) => ({
    ...one,
    position: positions[index] ?? (index === 0 ? "0" : "last"),
    noise: noise.length ? Number(noise[Math.min(index, noise.length - 1)]) : null,
  }));
  const items = [...keyframes, ...pictures];
  if (!items.length) return { tab: referencesOf(body).length ? "images" : "text" };
  const isFirst = items.length === 1 && items[0].position === "0";
  return isFirst ? { tab: "image", items: [{ ...items[0], position: null }] } : { tab: "images", items };
}

/** @param {any} body @param {Form} form @param {any} model @returns {Partial<Form>} numbers; null where they are the default */
function numbers(body, form, model) {
  const standard = standards(form, model);
  const of = (/** @type {any} */ value, /** @type {any} */ own) => (value === undefined || value === null || value === own ? null : value);
  const isShort = form.draft && !form.fast && body.num_inference_steps;
  const steps = isShort ? Math.round(body.num_inference_steps / DRAFT_STEPS) : body.num_inference_steps;
  return {
    negative: of(body.negative_prompt, standard.negative),
    frames: of(body.num_frames, standard.frames),
    fps: of(body.fps, standard.fps),
    steps: of(steps, standard.steps),
    guidance: of(body.guidance_scale, standard.guidance),
    shift: of(body.flow_shift, standard.shift),
    alpha: of(body.lora_alpha, standard.alpha),
    alpha2: of(body.lora_alpha_2, standard.alpha2),
    overlap: of(body.overlap ?? (form.mode === "transition" && form.tab === "video" ? serversOverlap(form, model) : null), standard.overlap),
    metadata: of(body.metadata, standard.metadata),
  };
}

/** @param {any} body @param {Form} form @param {any} model @returns {string} */
function shapeOf(body, form, model) {
  const named = body.size ? parseSize(body.size) : null;
  const width = body.width ?? named?.width;
  const height = body.height ?? named?.height;
  if (!width || !height) return "auto";
  const made = (/** @type {string} */ shape) => {
    const size = targetSize({ ...form, shape }, model);
    const { width: w, height: h } = form.draft ? draftSize(size, model) : size;
    return w === width && h === height;
  };
  const known = ["auto", ...Object.keys(model.shapes ?? {})].find(made);
  if (known) return known;
  return form.draft ? `${2 * width}x${2 * height}` : `${width}x${height}`;
}

/** Places that are those of the automatic ones are automatic. @param {Form} form @param {any} model @returns {Item[]} */
function automatic(form, model) {
  const length = lengthOf(form, model);
  const free = form.items.map((item) => ({ ...item, position: null }));
  const cells = placeItems(free, length);
  const same = form.items.every((item, index) => {
    const text = item.position ?? "";
    return text === String(cells[index]) || (text === "last" && cells[index] === length.count - 1);
  });
  return same ? free : form.items;
}
