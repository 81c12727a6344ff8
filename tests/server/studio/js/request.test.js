import assert from "node:assert/strict";
import test from "node:test";
import { bodiesOf, draftSteps, estimateBody, problemOf, standards, toBody } from "../../../../src/pusa/server/studio/web/core/request.js";
import { WAN, clip, formOf, picture } from "./samples.js";

const body = (change) => toBody(formOf(change), WAN);

test("words alone leave everything else to the server", () => {
  assert.deepEqual(body({ tab: "text" }), { prompt: "a cat", preset: "balanced" });
});

test("one picture is the first frame, in its own shape", () => {
  const item = picture("a", { width: 480, height: 832, crop: [0, 0.1, 1, 0.8], noise: 0.3 });
  const sent = body({ tab: "image", items: [item, picture("b")] });
  assert.deepEqual(sent.keyframes, [{ latent: 0, noise: 0.3, reference: { file_id: "file_a", crop: [0, 0.1, 1, 0.8] } }]);
  assert.ok(sent.height > sent.width);
  assert.equal(sent.fit, "crop");
  assert.equal(sent.task, undefined);
});

for (const [count, places] of [
  [1, [0]],
  [2, [0, "last"]],
  [3, [0, 10, "last"]],
  [5, [0, 5, 10, 15, "last"]],
]) {
  test(`${count} pictures without places are spread evenly`, () => {
    const items = Array.from({ length: count }, (_, number) => picture(String(number)));
    assert.deepEqual(body({ tab: "images", items }).keyframes.map(({ latent }) => latent), places);
  });
}

test("places set by hand survive a further picture, and keep their unit", () => {
  const items = [picture("a", { position: "0" }), picture("b", { position: "40f" }), picture("c", { position: "3.5s" }), picture("d")];
  const places = body({ tab: "images", items }).keyframes.map(({ reference, noise, ...place }) => place);
  assert.deepEqual(places, [{ latent: 0 }, { frame: 40 }, { time: 3.5 }, { latent: "last" }]);
});

test("a frame of a clip is a picture", () => {
  const sent = body({ tab: "images", items: [clip("a", { frame: 12, source: { video_id: "video_1" } })] });
  assert.deepEqual(sent.keyframes[0].reference, { video_id: "video_1", frame: 12 });
});

test("a clip is completed: the kept latent frames and their noise", () => {
  const sent = body({ tab: "video", clips: [clip("a", { start: 1, end: 3 })], keptPositions: "0, 1.5s ,last", keptNoise: "0;0.3;0.4" });
  assert.deepEqual(sent.input_reference, [{ file_id: "file_a", start: 1, end: 3 }]);
  assert.deepEqual(sent.cond_positions, ["0", "1.5s", "last"]);
  assert.deepEqual(sent.noise_multipliers, [0, 0.3, 0.4]);
  assert.equal(sent.keyframes, undefined);
});

test("a clip is extended, two are joined, words loop", () => {
  assert.equal(body({ tab: "video", mode: "extend", clips: [clip("a"), clip("b")] }).input_reference.length, 1);
  const joined = body({ tab: "video", mode: "transition", clips: [clip("a"), clip("b")] });
  assert.deepEqual([joined.task, joined.input_reference.length], ["transition", 2]);
  const latents = (joined.overlap - 1) / 4 + 1;
  assert.ok(21 - 2 * latents >= 7, "a third of the transition is new");
  const loop = body({ tab: "video", mode: "loop", items: [picture("a")], clips: [clip("b")] });
  assert.deepEqual([loop.task, loop.keyframes.length, loop.input_reference], ["loop", 1, undefined]);
});

test("only what the open tab shows is sent", () => {
  const hidden = { items: [picture("a")], clips: [clip("b")] };
  assert.deepEqual(body({ ...hidden, tab: "text" }), { prompt: "a cat", preset: "balanced" });
  assert.equal(body({ ...hidden, tab: "image" }).input_reference, undefined);
});

test("every knob that is set is sent, by the API's names", () => {
  const set = {
    tab: "text", negative: "", frames: 33, fps: 24, seed: 7, alpha: 1.2, alpha2: 1.1, steps: 20, guidance: 2.5, shift: 3,
    overlap: 9, exact: true, schedule: "wave", metadata: "off", lora: "style", preset: "creative", shape: "9:16", story: "one\n\n two ",
  };
  assert.deepEqual(body(set), {
    prompt: "a cat", negative_prompt: "", prompts: ["one", "two"], width: 480, height: 832, num_frames: 33, fps: 24, seed: 7,
    lora_alpha: 1.2, lora_alpha_2: 1.1, num_inference_steps: 20, guidance_scale: 2.5, flow_shift: 3, overlap: 9, exact: true,
    schedule: "wave", metadata: "off", lora: "style", preset: "creative",
  });
});

test("a draft has half the size and fewer steps; a fast one keeps its steps", () => {
  const draft = body({ tab: "image", items: [picture("a")], draft: true, steps: 10 });
  assert.deepEqual([draft.width, draft.height, draft.num_inference_steps, draft.draft], [416, 240, 4, true]);
  assert.equal(body({ tab: "text", draft: true, fast: true, steps: 4 }).num_inference_steps, 4);
  assert.equal(body({ tab: "text", draft: true }).width, undefined);
  assert.deepEqual([1, 4, 10, 50].map(draftSteps), [1, 2, 4, 20]);
});

test("each variant has the next seed, and all have one batch", () => {
  const bodies = bodiesOf(formOf({ tab: "text", seed: 40, variants: 3 }), WAN, "batch");
  assert.deepEqual(bodies.map(({ seed, batch }) => [seed, batch]), [[40, "batch"], [41, "batch"], [42, "batch"]]);
  assert.equal(bodiesOf(formOf({ tab: "text", seed: 40 }), WAN, "batch")[0].batch, undefined);
});

test("what a field that is null stands for follows preset, fast and inputs", () => {
  const model = { ...WAN, defaults: { ...WAN.defaults, condition_guidance: 5 } };
  assert.equal(standards(formOf({ tab: "text" }), model).guidance, 3);
  assert.equal(standards(formOf({ tab: "image", items: [picture("a")] }), model).guidance, 5);
  const fast = standards(formOf({ tab: "text", fast: true, preset: "creative" }), WAN);
  assert.deepEqual([fast.steps, fast.guidance, fast.alpha], [4, 1, 1.3]);
});

test("an estimate names no inputs, whatever is written in the fields", () => {
  const asked = estimateBody(formOf({ tab: "video", clips: [clip("a")], keptPositions: "", keptNoise: "x", seed: 3 }), WAN);
  assert.deepEqual(Object.keys(asked).sort(), ["guidance_scale", "height", "prompt", "width"]);
  assert.equal(estimateBody(formOf({ tab: "video", mode: "loop" }), WAN).task, "loop");
});

test("what is missing is told before anything is sent", () => {
  const key = (change) => problemOf(formOf(change), WAN)?.key;
  assert.equal(key({ tab: "image" }), "form.problem.no_image");
  assert.equal(key({ tab: "images" }), "form.problem.no_images");
  assert.equal(key({ tab: "video" }), "form.problem.no_video");
  assert.equal(key({ tab: "video", mode: "transition", clips: [clip("a")] }), "form.problem.no_second_video");
  assert.equal(key({ tab: "video", clips: [clip("a")], keptPositions: " " }), "form.problem.no_positions");
  assert.equal(key({ tab: "video", clips: [clip("a")], keptNoise: "0,1" }), "form.problem.noise_count");
  assert.equal(key({ tab: "video", clips: [clip("a")], keptNoise: "2" }), "timeline.problem.noise");
  assert.equal(key({ tab: "text", prompt: " " }), "form.problem.no_prompt");
  assert.equal(key({ tab: "text", prompt: "", story: "one" }), undefined);
  assert.equal(key({ tab: "video", mode: "loop" }), undefined);
});

test("without a picture the words alone are offered, where they make a video", () => {
  assert.deepEqual(problemOf(formOf({ tab: "image", prompt: "a star" }), WAN).fix, { tab: "text" });
  assert.equal(problemOf(formOf({ tab: "image", prompt: " " }), WAN).fix, undefined);
  assert.equal(problemOf(formOf({ tab: "image", prompt: "a star" }), { ...WAN, has_text: false }).fix, undefined);
  assert.equal(problemOf(formOf({ tab: "video", prompt: "a star" }), WAN).fix, undefined);
});

test("0,20 on a short clip: the last frame is offered", () => {
  const items = [picture("a", { position: "0" }), picture("b", { position: "20" })];
  const found = problemOf(formOf({ tab: "images", items, frames: 33 }), WAN);
  assert.equal(found.key, "timeline.problem.outside");
  assert.deepEqual(found.fix.items.map(({ position }) => position), ["0", "last"]);
  const kept = problemOf(formOf({ tab: "video", clips: [clip("a")], frames: 33, keptPositions: "0,20" }), WAN);
  assert.deepEqual(kept.fix, { keptPositions: "0,last" });
  const twice = problemOf(formOf({ tab: "video", clips: [clip("a")], frames: 33, keptPositions: "0,20,30", keptNoise: "0,0.1,0.2" }), WAN);
  assert.deepEqual(twice.fix, { keptPositions: "0,last", keptNoise: "0,0.1" });
});

test("by default the first latent frames of a clip are kept, as far as it has them", () => {
  const sent = (seconds, change = {}) => toBody(formOf({ tab: "video", clips: [clip("a", { seconds, ...change })] }), WAN).cond_positions;
  assert.equal(sent(5).length, 4);
  assert.equal(sent(0.5).length, 2);
  assert.equal(sent(5, { start: 1, end: 1.05 }).length, 1);
  for (const seconds of [0.05, 0.3, 0.5, 5]) assert.equal(problemOf(formOf({ tab: "video", clips: [clip("a", { seconds })] }), WAN), null);
  const short = formOf({ tab: "video", frames: 9, clips: [clip("a")] });
  assert.equal(toBody(short, WAN).cond_positions.length, 3);
  assert.equal(problemOf(short, WAN), null);
});

test("kept latent frames that a clip does not have become its last one", () => {
  const form = formOf({ tab: "video", clips: [clip("a", { seconds: 0.5 })], keptPositions: "0,1,2,3", keptNoise: "0,0.1,0.2,0.3" });
  const found = problemOf(form, WAN);
  assert.equal(found.key, "timeline.problem.clip_ends");
  assert.deepEqual(found.fix, { keptPositions: "0,1", keptNoise: "0,0.1" });
  assert.equal(problemOf({ ...form, ...found.fix }, WAN), null);
});

test("two pictures at one place are not sent", () => {
  const items = [picture("a", { position: "3" }), picture("b", { position: "12f" })];
  assert.match(problemOf(formOf({ tab: "images", items }), WAN).key, /twice/);
});
