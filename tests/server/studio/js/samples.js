/** Models as GET /v1/models describes them, forms and items for tests. */
import { emptyForm } from "../../../../src/pusa/server/studio/web/core/empty_form.js";

const FIELDS = { width: { maximum: 2048 }, height: { maximum: 2048 } };

/** Wan's: 81 frames of 832x480, 4 frames to a latent one. */
export const WAN = {
  id: "wan",
  defaults: {
    width: 832,
    height: 480,
    num_frames: 81,
    fps: 16,
    num_inference_steps: 10,
    guidance_scale: 3,
    condition_guidance: 3,
    flow_shift: 5,
    lora_alpha: 1.4,
    lora_alpha_2: null,
    negative_prompt: "blurred",
    window: 81,
    overlap: 13,
    metadata: "full",
  },
  fast: { num_inference_steps: 4, guidance_scale: 1, flow_shift: 5, lora_alpha: 1.4, lora_alpha_2: null },
  presets: {
    faithful: { noise_multipliers: [0], video_noise_multipliers: [0], lora_alpha: 1.5, lora_alpha_2: null },
    balanced: { noise_multipliers: [0.2, 0.5], video_noise_multipliers: [0, 0.3, 0.4, 0.5], lora_alpha: 1.4, lora_alpha_2: null },
    creative: { noise_multipliers: [0.4, 0.7], video_noise_multipliers: [0.2, 0.5, 0.6, 0.7], lora_alpha: 1.3, lora_alpha_2: null },
  },
  shapes: { "16:9": "832x480", "1:1": "624x624", "9:16": "480x832" },
  sizes: ["832x480", "624x624", "480x832", "1280x720", "720x1280"],
  size_multiple: 16,
  frames_per_latent: 4,
  has_text: true,
  experts: 1,
  limits: { frames: 1281 },
  fields: FIELDS,
};

/** @param {string} id @param {object} [change] */
export const picture = (id, change = {}) => ({
  id,
  source: { file_id: `file_${id}` },
  kind: "image",
  name: `${id}.png`,
  width: 832,
  height: 480,
  seconds: null,
  frames: null,
  fps: null,
  position: null,
  noise: null,
  crop: null,
  start: null,
  end: null,
  frame: null,
  ...change,
});

/** @param {string} id @param {object} [change] */
export const clip = (id, change = {}) => picture(id, { kind: "video", name: `${id}.mp4`, seconds: 5.0625, frames: 81, fps: 16, ...change });

/** @param {object} change */
export const formOf = (change) => ({ ...emptyForm(), prompt: "a cat", ...change });

/** The FileObject of an item. @param {any} item */
export const fileOf = ({ source, kind, name, width, height, seconds, frames, fps }) => ({
  id: source.file_id,
  object: "file",
  filename: name,
  kind,
  width,
  height,
  seconds,
  frames,
  fps,
});
