/**
 * The form as the body of POST /v1/videos. Pure: what is sent follows from the form and the model alone. The way back is
 * in from_body.js.
 *
 * A field that is null is left out: the server then takes the model's default, which the form shows.
 */
import { keptText, layoutOf, overlapFrames, placeItems, lengthOf, usedClips, usedItems } from "../timeline/model.js";
import { PositionError, formatPosition, latentIndex, parseNoise, parsePosition, parsePositions, splitList } from "./positions.js";
import { seedAfter } from "./seeds.js";
import { draftSize, targetSize } from "./size.js";

/** @typedef {import("./store.js").Form} Form */
/** @typedef {import("./store.js").Item} Item */
/** @typedef {{key: string, values?: Record<string, any>, fix?: Partial<Form>|((form: Form) => Partial<Form>), fixKey?: string}} Problem  `key` of its text; `fix`: what to edit, `fixKey`: its text */

export const DRAFT_STEPS = 0.4; // of the whole clip's

/** @param {number} steps @returns {number} of a draft of a clip of so many steps */
export const draftSteps = (steps) => Math.max(1, Math.round(steps * DRAFT_STEPS));

/** @param {Form} form @returns {boolean} whether the open tab gives the model a picture or a clip */
const hasInputs = (form) => usedItems(form).length + usedClips(form).length > 0;

/**
 * What a field that is null stands for, by the model, the preset and the mode.
 * @param {Form} form @param {any} model
 */
export function standards(form, model) {
  const { defaults } = model;
  const fast = form.fast ? model.fast : null;
  const preset = model.presets[form.preset];
  const guidance = hasInputs(form) ? (defaults.condition_guidance ?? defaults.guidance_scale) : defaults.guidance_scale;
  const faster = fast ? fast.lora_alpha - defaults.lora_alpha : 0; // a preset changes the alpha of either
  return {
    frames: /** @type {number} */ (defaults.num_frames),
    fps: /** @type {number} */ (defaults.fps),
    steps: /** @type {number} */ ((fast ?? defaults).num_inference_steps),
    guidance: /** @type {number} */ (fast ? fast.guidance_scale : guidance),
    shift: /** @type {number} */ (fast?.flow_shift ?? defaults.flow_shift),
    alpha: /** @type {number} */ (Math.round(1e6 * (preset.lora_alpha + faster)) / 1e6),
    alpha2: /** @type {number|null} */ (preset.lora_alpha_2 ?? null),
    overlap: /** @type {number} */ (overlapFrames({ ...form, overlap: null }, model)),
    negative: /** @type {string} */ (defaults.negative_prompt),
    metadata: /** @type {string} */ (defaults.metadata),
  };
}

/**
 * Whole lines of the story.
 * @param {string} text @returns {string[]}
 */
const storyLines = (text) =>
  text
    .split(/\r?\n/)
    .map((line) => line.trim())
    .filter(Boolean);

/**
 * Where the server finds an item's content, and which part of it is used.
 * @param {Item} item @param {boolean} still  of a clip one frame is used
 * @returns {Record<string, any>}
 */
function referenceOf(item, still) {
  const { file_id, video_id, input } = item.source;
  const found = file_id ? { file_id } : { video_id, ...(input === undefined ? {} : { input }) };
  const part =
    item.kind !== "video" ? {} : still ? { frame: item.frame ?? 0 } : { start: item.start, end: item.end };
  return drop({ ...found, ...part, crop: item.crop });
}

/** Leave out what is null. @template {Record<string, any>} T @param {T} values @returns {Partial<T>} */
const drop = (values) =>
  /** @type {Partial<T>} */ (Object.fromEntries(Object.entries(values).filter(([, value]) => value !== null && value !== undefined)));

/** @param {string} text @returns {Record<string, any>} the place of a keyframe as the API names it */
function placeOf(text) {
  const { unit, value } = parsePosition(text);
  if (unit === "latent") return { latent: value === -1 && text.trim().toLowerCase() === "last" ? "last" : value };
  return unit === "frame" ? { frame: value } : { time: value };
}

/** @param {Form} form @param {any} model @returns {Record<string, any>} pictures and clips of the open tab */
function inputs(form, model) {
  const items = usedItems(form);
  const clips = usedClips(form);
  if (!items.length && !clips.length) return {};
  const fit = { fit: form.fit };
  if (clips.length) {
    const input_reference = clips.map((clip) => referenceOf(clip, false));
    if (form.mode !== "complete") return { ...fit, input_reference };
    const noise = form.keptNoise.trim() ? { noise_multipliers: parseNoise(form.keptNoise) } : {};
    return { ...fit, input_reference, cond_positions: parsePositions(keptText(form, model)).map(formatPosition), ...noise };
  }
  const length = lengthOf(form, model);
  const isFirst = form.tab !== "images";
  const cells = isFirst ? [0] : placeItems(items, length);
  const last = length.count - 1;
  const keyframes = items.map((item, index) => ({
    ...(isFirst || item.position === null
      ? { latent: cells[index] === last && last > 0 ? "last" : (cells[index] ?? 0) }
      : placeOf(item.position)),
    ...drop({ noise: item.noise }),
    reference: referenceOf(item, true),
  }));
  return { ...fit, keyframes };
}

/** @param {Form} form @param {any} model @returns {Record<string, any>} size, length and how the video is made */
function settings(form, model) {
  const size = form.shape === "auto" && !hasInputs(form) ? null : targetSize(form, model);
  const made = size && form.draft ? draftSize(size, model) : size;
  const steps = form.steps !== null && form.draft && !form.fast ? draftSteps(form.steps) : form.steps;
  const isTransition = form.tab === "video" && form.mode === "transition";
  return drop({
    width: made?.width,
    height: made?.height,
    num_frames: form.frames,
    fps: form.fps,
    num_inference_steps: steps,
    guidance_scale: form.guidance,
    flow_shift: form.shift,
    lora_alpha: form.alpha,
    lora_alpha_2: form.alpha2,
    overlap: form.overlap ?? (isTransition ? overlapFrames(form, model) : null),
    preset: form.preset,
    exact: form.exact || null,
    fast: form.fast || null,
    draft: form.draft || null,
    schedule: form.schedule === "even" ? null : form.schedule,
    metadata: form.metadata,
    lora: form.lora,
    seed: form.seed,
  });
}

/**
 * @param {Form} form @param {any} model  as GET /v1/models/{id} describes it
 * @returns {Record<string, any>} the body of POST /v1/videos
 */
export function toBody(form, model) {
  const task = form.tab === "video" && form.mode !== "complete" ? form.mode : null;
  const story = storyLines(form.story);
  return {
    ...drop({ task, negative_prompt: form.negative }),
    prompt: form.prompt.trim(),
    ...(story.length ? { prompts: story } : {}),
    ...settings(form, model),
    ...inputs(form, model),
  };
}

/**
 * The bodies of one click: a seed for each variant from the form's on, which must be set.
 * @param {Form} form @param {any} model @param {string} batch  what the variants have in common
 * @returns {Record<string, any>[]}
 */
export function bodiesOf(form, model, batch) {
  const body = toBody(form, model);
  const first = form.seed ?? 0;
  if (form.variants === 1) return [{ ...body, seed: first }];
  return Array.from({ length: form.variants }, (_, number) => ({ ...body, seed: seedAfter(first, number), batch }));
}

/**
 * The same for POST /v1/videos/estimate: size, length and steps without inputs, which cost nothing to speak of.
 * @param {Form} form @param {any} model
 * @returns {Record<string, any>}
 */
export function estimateBody(form, model) {
  const { width, height, num_frames, fps, num_inference_steps, guidance_scale, fast, draft, schedule } = toBody(
    { ...form, keptPositions: "0", keptNoise: "" },
    model,
  );
  const isLoop = form.tab === "video" && form.mode === "loop";
  const guidance = guidance_scale ?? (fast ? undefined : standards(form, model).guidance);
  const prompt = model.has_text ? "-" : "";
  const asked = { width, height, num_frames, fps, num_inference_steps, guidance_scale: guidance, fast, draft, schedule };
  return { prompt, ...drop(asked), ...(isLoop ? { task: "loop", ...drop({ overlap: form.overlap }) } : {}) };
}

// ---- what is missing -------------------------------------------------------------------------------------------------

/**
 * The first thing that keeps the form from being sent; null: nothing.
 * @param {Form} form @param {any} model
 * @returns {Problem|null}
 */
export function problemOf(form, model) {
  const own = missingInput(form) ?? keptProblem(form, model);
  if (own) return { key: `form.problem.${own.key}`, values: own.values, ...wordsAlone(form, model) };
  if (model.has_text && !form.prompt.trim() && !storyLines(form.story).length) return { key: "form.problem.no_prompt" };
  try {
    const [found] = layoutOf(form, model).problems;
    return found ? { key: `timeline.problem.${found.code}`, values: found.values, fix: fixOf(form, model, found) } : null;
  } catch (error) {
    if (error instanceof PositionError) return { key: `timeline.problem.${error.code}`, values: error.values };
    throw error;
  }
}

/** A way out of a missing picture: words make a video too. @param {Form} form @param {any} model @returns {Partial<Problem>} */
function wordsAlone(form, model) {
  const isStill = form.tab === "image" || form.tab === "images";
  return isStill && model.has_text && form.prompt.trim() ? { fix: { tab: "text" }, fixKey: "form.problem.words_alone" } : {};
}

/** @param {Form} form @returns {Problem|null} */
function missingInput(form) {
  if (form.tab === "image" && !form.items.length) return { key: "no_image" };
  if (form.tab === "images" && !form.items.length) return { key: "no_images" };
  if (form.tab !== "video" || form.mode === "loop") return null;
  if (!form.clips.length) return { key: "no_video" };
  return form.mode === "transition" && form.clips.length < 2 ? { key: "no_second_video" } : null;
}

/** @param {Form} form @param {any} model @returns {Problem|null} */
function keptProblem(form, model) {
  if (form.tab !== "video" || form.mode !== "complete") return null;
  const text = keptText(form, model);
  if (!text.trim()) return { key: "no_positions" };
  const noises = form.keptNoise.trim() ? splitList(form.keptNoise).length : 0;
  const positions = splitList(text).length;
  return noises > 1 && noises !== positions ? { key: "noise_count", values: { noises, positions } } : null;
}

/**
 * "last" for what lies after the end of the video, and the clip's last latent frame for what lies after its own.
 * @param {Form} form @param {any} model @param {import("../timeline/model.js").Problem} problem
 * @returns {Partial<Form>|undefined}
 */
function fixOf(form, model, problem) {
  const length = lengthOf(form, model);
  const isAfter = (/** @type {string} */ text) => {
    const { unit, value } = parsePosition(text);
    const end = { latent: length.count, frame: length.frames, second: length.seconds }[unit];
    return value >= end;
  };
  if (problem.code === "outside") {
    const item = form.items.find((one) => one.id === problem.id);
    if (!item?.position || !isAfter(item.position)) return undefined;
    return { items: form.items.map((one) => (one === item ? { ...one, position: "last" } : one)) };
  }
  if (problem.code === "kept_outside") return keptInstead(form, model, isAfter, "last");
  if (problem.code !== "clip_ends") return undefined;
  const { last } = problem.values;
  const isBeyond = (/** @type {string} */ text) => (latentIndex(parsePosition(text), length) ?? 0) > last;
  return keptInstead(form, model, isBeyond, String(last));
}

/**
 * Kept latent frames with another one in the place of some, once, and the noise of those that stay.
 * @param {Form} form @param {any} model @param {(text: string) => boolean} isWrong @param {string} right
 * @returns {Partial<Form>}
 */
function keptInstead(form, model, isWrong, right) {
  const texts = splitList(keptText(form, model)).map((text) => (isWrong(text) ? right : text));
  const stays = (/** @type {any} */ _, /** @type {number} */ number) => texts.indexOf(texts[number]) === number;
  const keptPositions = texts.filter(stays).join(",");
  const noises = form.keptNoise.trim() ? splitList(form.keptNoise) : [];
  return noises.length > 1 ? { keptPositions, keptNoise: noises.filter(stays).join(",") } : { keptPositions };
}
