import assert from "node:assert/strict";
import test from "node:test";
import { emptyForm } from "../../../../src/pusa/server/studio/web/core/empty_form.js";
import { fromBody, itemOf, referenceKey, referencesOf } from "../../../../src/pusa/server/studio/web/core/from_body.js";
import { toBody } from "../../../../src/pusa/server/studio/web/core/request.js";
import { WAN, clip, fileOf, formOf, picture } from "./samples.js";

/** The form of a body whose inputs are all there. */
function back(body, items = []) {
  const byId = new Map(items.map((item) => [item.source.file_id, fileOf(item)]));
  const files = new Map(referencesOf(body).flatMap((one) => (byId.has(one.file_id) ? [[referenceKey(one), byId.get(one.file_id)]] : [])));
  let count = 0;
  return fromBody(body, files, WAN, emptyForm(), () => String(count++));
}

const FORMS = {
  text: { tab: "text", seed: 5 },
  image: { tab: "image", items: [picture("a", { noise: 0.3, crop: [0.1, 0, 0.8, 0.8] })] },
  images: { tab: "images", items: [picture("a"), picture("b"), picture("c")] },
  "images by hand": { tab: "images", items: [picture("a", { position: "2" }), picture("b", { position: "1.5s", noise: 0 }), picture("c", { position: "last" })] },
  complete: { tab: "video", clips: [clip("a", { start: 0.5, end: 2 })], keptPositions: "0,3", keptNoise: "0,0.5" },
  extend: { tab: "video", mode: "extend", clips: [clip("a")], frames: 97 },
  transition: { tab: "video", mode: "transition", clips: [clip("a"), clip("b")] },
  loop: { tab: "video", mode: "loop", items: [picture("a")], overlap: 5 },
  draft: { tab: "image", items: [picture("a")], draft: true, steps: 20 },
  fast: { tab: "text", fast: true, preset: "faithful", shape: "1:1" },
  odd: { tab: "text", shape: "640x352", schedule: "wave", exact: true, story: "one\ntwo", metadata: "off", fps: 24, negative: "" },
};

for (const [name, change] of Object.entries(FORMS)) {
  test(`the form goes and comes back: ${name}`, () => {
    const form = formOf(change);
    const sent = toBody(form, WAN);
    const found = back(sent, [...form.items, ...form.clips]).form;
    assert.deepEqual(toBody(found, WAN), sent);
    assert.equal(found.tab, form.tab);
    assert.equal(found.mode, form.mode);
    assert.equal(found.shape, form.shape);
  });
}

test("a transition of another client without an overlap keeps the server's own", () => {
  const items = [clip("a"), clip("b")];
  const body = { ...toBody(formOf(FORMS.transition), WAN), num_frames: 49 };
  assert.equal(body.overlap, 13);
  const { overlap, ...theirs } = body;
  const again = toBody(back(theirs, items).form, WAN);
  assert.equal(again.overlap, 13);
  const short = { ...theirs, num_frames: 33 };
  assert.equal(toBody(formOf({ ...FORMS.transition, frames: 33 }), WAN).overlap, 9); // what this page begins with
  assert.equal(toBody(back(short, items).form, WAN).overlap, 13); // GenerationRequest's: half of what is between
});

test("the server keeps the fit with each keyframe", () => {
  const form = formOf({ ...FORMS.images, fit: "letterbox" });
  const { fit, keyframes, ...rest } = toBody(form, WAN);
  const kept = { ...rest, keyframes: keyframes.map((one) => ({ ...one, fit })) };
  assert.equal(back(kept, form.items).form.fit, "letterbox");
});

test("automatic places come back as automatic ones", () => {
  const form = formOf(FORMS.images);
  assert.deepEqual(back(toBody(form, WAN), form.items).form.items.map(({ position }) => position), [null, null, null]);
});

test("the body of another client: pictures with positions as text, a size, all fields resolved", () => {
  const items = [picture("a"), picture("b")];
  const body = {
    prompt: "a dog", size: "832x480", num_frames: 81, fps: 16, num_inference_steps: 10, guidance_scale: 3, lora_alpha: 1.4, flow_shift: 5,
    input_reference: [{ file_id: "file_a" }, { file_id: "file_b" }], cond_positions: "0,20", noise_multipliers: "0.1,0.2", negative_prompt: "blurred",
  };
  const { form, lost } = back(body, items);
  assert.equal(lost, 0);
  assert.deepEqual([form.tab, form.shape, form.frames, form.steps, form.guidance, form.alpha, form.negative], ["images", "auto", null, null, null, null, null]);
  assert.deepEqual(form.items.map(({ noise }) => noise), [0.1, 0.2]);
});

test("an input that is gone is counted, and the rest is taken over", () => {
  const form = formOf(FORMS.images);
  const { form: found, lost } = back(toBody(form, WAN), form.items.slice(1));
  assert.equal(lost, 1);
  assert.equal(found.items.length, 2);
  assert.equal(found.tab, "images");
});

test("a file becomes an item with the cuts of its reference", () => {
  const item = itemOf(fileOf(clip("a")), { file_id: "file_a", start: 1, end: 2 }, "x");
  assert.deepEqual([item.source, item.start, item.end, item.frame, item.kind], [{ file_id: "file_a" }, 1, 2, null, "video"]);
});
