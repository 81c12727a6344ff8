/** The settings of a video as rows: a name and what it was set to. Pure; the texts are made in settings.js. */

/** Fields of POST /v1/videos that are shown as they are, and the names of their rows. */
const PLAIN = [
  ["preset", "preset"],
  ["num_inference_steps", "steps"],
  ["guidance_scale", "guidance"],
  ["guidance_scale_2", "guidance_2"],
  ["flow_shift", "shift"],
  ["lora_alpha", "alpha"],
  ["lora_alpha_2", "alpha_2"],
  ["overlap", "overlap"],
  ["fit", "fit"],
  ["schedule", "schedule"],
  ["step_cache", "step_cache"],
];
const SWITCHES = ["fast", "draft", "exact"];

/** @param {any} value @returns {any[]} */
const listed = (value) => {
  if (value === null || value === undefined || value === "") return [];
  if (Array.isArray(value)) return value;
  return typeof value === "string" ? value.split(",").map((part) => part.trim()) : [value];
};

/** @param {any} keyframe @returns {string} "3" (latent frame), "80f", "1.5s" or "last"; "": placed automatically */
function placeOf({ frame, time, latent }) {
  const [place, unit] = [frame, time, latent].map((value, index) => [value, ["f", "s", ""][index]]).find(([value]) => value !== null && value !== undefined) ?? ["", ""];
  return place === "last" || place === "" ? String(place) : `${place}${unit}`;
}

/** @param {any} request @returns {{place: string, noise: number|null}[]} of its pictures and clips */
export function inputs(request) {
  const keyframes = listed(request.keyframes).map((one) => ({ place: placeOf(one), noise: one.noise ?? request.noise_multiplier ?? null }));
  if (keyframes.length) return keyframes;
  const files = typeof request.input_reference === "string" ? [request.input_reference] : listed(request.input_reference);
  const places = listed(request.cond_positions);
  const noises = listed(request.noise_multipliers).map(Number);
  const count = Math.max(files.length, places.length);
  return Array.from({ length: count }, (_, index) => ({
    place: String(places[index] ?? ""),
    noise: noises[index] ?? noises[0] ?? request.noise_multiplier ?? null,
  }));
}

/**
 * @param {any} request  the body that makes the same video @param {any} job  its VideoObject
 * @returns {[string, any][]} names of rows in the order in which they are read, and their values
 */
export function rows(request, job) {
  /** @type {[string, any][]} */
  const found = [];
  const stories = Array.isArray(request.prompts) ? request.prompts.join("\n") : request.prompts;
  if (stories) found.push(["prompts", stories]);
  else if (request.prompt || job.prompt) found.push(["prompt", request.prompt || job.prompt]);
  if (request.negative_prompt) found.push(["negative_prompt", request.negative_prompt]);
  const given = inputs(request);
  found.push(["task", job.task || request.task || "generate"]);
  if (given.length) found.push(["given", given]);
  found.push(["size", job.size], ["seconds", { seconds: Number(job.seconds), frames: request.num_frames ?? null, fps: request.fps ?? null }]);
  for (const [field, name] of PLAIN) {
    const value = request[field];
    if (value !== null && value !== undefined && value !== "") found.push([name, value]);
  }
  const switches = SWITCHES.filter((name) => request[name]);
  if (switches.length) found.push(["ways", switches]);
  const lora = typeof request.lora === "object" && !Array.isArray(request.lora) ? request.lora?.name : request.lora;
  if (listed(lora).length) found.push(["lora", listed(lora).join(", ")]);
  if (job.seed !== null && job.seed !== undefined) found.push(["seed", job.seed]);
  found.push(["model", job.model]);
  return found;
}
