import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";
import {
  PositionError,
  defaultOverlap,
  formatPosition,
  frameRange,
  framesOf,
  latentFrames,
  latentIndex,
  nearestOf,
  parseNoise,
  parsePosition,
  presetNoise,
  splitList,
  spread,
  transitionOverlap,
} from "../../../../src/pusa/server/studio/web/core/positions.js";

const cases = JSON.parse(readFileSync(new URL("../position_cases.json", import.meta.url), "utf-8"));

/** What a function returns, or "error" for a PositionError. @param {() => any} act */
function answer(act) {
  try {
    return act();
  } catch (error) {
    assert.ok(error instanceof PositionError, String(error));
    return "error";
  }
}

for (const one of cases.parse) {
  test(`position ${JSON.stringify(one.text)}`, () => {
    const found = answer(() => parsePosition(one.text));
    if (one.error) return assert.equal(found, "error");
    assert.deepEqual(found, { unit: one.unit, value: one.value });
    assert.equal(formatPosition(found), one.shown);
  });
}

test("places in clips of every factor", () => {
  for (const one of cases.index) {
    const found = answer(() => latentIndex(parsePosition(one.text), one));
    assert.equal(found, one.error ? "error" : one.index, JSON.stringify(one));
  }
});

test("lists of places and of noise", () => {
  for (const one of cases.lists) assert.deepEqual(splitList(one.text), one.parts, JSON.stringify(one.text));
  for (const one of cases.noise_lists) {
    const found = answer(() => parseNoise(one.text).map((value) => value + 0));
    assert.deepEqual(found, one.error ? "error" : one.values, JSON.stringify(one.text));
  }
  assert.equal(
    answer(() => splitList("0,".repeat(513))),
    "error",
  );
  assert.deepEqual(parseNoise("  "), []);
});

test("lengths, overlaps and the noise of presets", () => {
  for (const one of cases.lengths) {
    assert.equal(latentFrames(one.frames, one.factor), one.latents, JSON.stringify(one));
    assert.equal(nearestOf(one.frames, one.factor, 1), one.nearest, JSON.stringify(one));
    assert.equal(framesOf(one.latents, one.factor), one.decoded, JSON.stringify(one));
  }
  for (const one of cases.overlaps) {
    assert.equal(defaultOverlap(one.window, one.factor, one.most, one.sides), one.overlap, JSON.stringify(one));
  }
  for (const one of cases.presets) assert.deepEqual(presetNoise(one.values, one.count), one.noise);
});

test("a third of a transition is new", () => {
  for (const frames of [33, 81, 121]) {
    const count = latentFrames(frames, 4);
    const kept = latentFrames(transitionOverlap(frames, 4, 999), 4);
    assert.ok(count - 2 * kept >= count / 3, `${frames}: ${kept} of ${count} kept`);
    assert.ok(count - 2 * (kept + 1) < count / 3);
  }
  assert.equal(transitionOverlap(33, 4, 13), 9);
  assert.equal(transitionOverlap(81, 4, 13), 13, "no more than the model takes over");
});

test("pictures are spread from the first to the last latent frame", () => {
  assert.deepEqual(spread(1, 9), [0]);
  assert.deepEqual(spread(2, 9), [0, 8]);
  assert.deepEqual(spread(3, 21), [0, 10, 20]);
  assert.deepEqual(spread(4, 9), [0, 3, 5, 8]);
  assert.deepEqual(frameRange(0, 4), [0, 0]);
  assert.deepEqual(frameRange(5, 4), [17, 20]);
});
