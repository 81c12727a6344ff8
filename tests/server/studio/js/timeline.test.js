import assert from "node:assert/strict";
import test from "node:test";
import { PositionError } from "../../../../src/pusa/server/studio/web/core/positions.js";
import {
  addPicture,
  movePicture,
  nextFree,
  noiseText,
  positionsText,
  readNoise,
  readPositions,
  setKeptNoise,
  setLength,
  toggleKept,
  withLast,
} from "../../../../src/pusa/server/studio/web/timeline/edits.js";
import { cropBox, moveCrop, scaleCrop } from "../../../../src/pusa/server/studio/web/timeline/framing.js";
import { layoutOf, overlapFrames, placeItems } from "../../../../src/pusa/server/studio/web/timeline/model.js";
import {
  cellAt,
  cellWidth,
  placeCards,
  rulerMarks,
  xOfFrame,
} from "../../../../src/pusa/server/studio/web/timeline/scale.js";
import { picture as sample } from "./samples.js";

const model = {
  frames_per_latent: 4,
  defaults: { num_frames: 33, fps: 16, width: 96, height: 96, window: 33, overlap: 13 },
  presets: {
    faithful: { noise_multipliers: [0], video_noise_multipliers: [0] },
    balanced: { noise_multipliers: [0.2, 0.5], video_noise_multipliers: [0, 0.3, 0.4, 0.5] },
  },
  limits: { frames: 321 },
};

/** @param {string} id @param {object} [values] */
const picture = (id, values = {}) => sample(id, { name: id, width: 96, height: 96, ...values });

const clip = (id, seconds, values = {}) =>
  picture(id, { kind: "video", seconds, frames: seconds * 16, fps: 16, ...values });

/** @param {object} [values] */
const formOf = (values = {}) => ({
  tab: "images",
  mode: "complete",
  items: [],
  clips: [],
  keptPositions: "0,1,2,3",
  keptNoise: "",
  frames: null,
  fps: null,
  preset: "balanced",
  overlap: null,
  fit: "crop",
  shape: "auto",
  ...values,
});

const cells = (form) => layoutOf(form, model).pictures.map((one) => one.cell);
const length = { factor: 4, frames: 33, fps: 16, count: 9, seconds: 33 / 16 };
const cellsOf = (...positions) =>
  placeItems(
    positions.map((position, number) => picture(String(number), { position })),
    length,
  );

test("automatic places are spread; those set by hand stay when pictures come", () => {
  assert.deepEqual(cellsOf(null), [0]);
  assert.deepEqual(cellsOf(null, null), [0, 8]);
  assert.deepEqual(cellsOf(null, null, null), [0, 4, 8]);
  assert.deepEqual(cellsOf("2", "6", null), [2, 6, 8]);
  assert.deepEqual(cellsOf("0", "last", null), [0, 8, 4], "no room after the last: the middle of the widest gap");
  assert.deepEqual(cellsOf(null, "5", null), [0, 5, 8]);
  assert.deepEqual(cellsOf("0", null, null), [0, 4, 8]);
  assert.deepEqual(cellsOf(null, null, "last"), [0, 4, 8]);
  assert.deepEqual(cellsOf("1.5s", "8f"), [6, 2]);
  assert.deepEqual(cellsOf("0", "20"), [0, null]);
  const crowd = placeItems(
    Array.from({ length: 11 }, (_, number) => picture(String(number))),
    length,
  );
  assert.equal(new Set(crowd.slice(0, 9)).size, 9);
  assert.deepEqual(crowd.slice(9), [null, null]);
});

test("what is shown of pictures: place, noise, problems", () => {
  const form = formOf({ items: [picture("a"), picture("b", { noise: 0.1 }), picture("c", { position: "20" })] });
  const { pictures, problems } = layoutOf(form, model);
  assert.deepEqual(
    pictures.map((one) => one.noise),
    [0.2, 0.1, 0.5],
  );
  assert.deepEqual(
    problems.map((one) => [one.code, one.id]),
    [["outside", "c"]],
  );
  const both = formOf({ items: [picture("a", { position: "3" }), picture("b", { position: "12f" })] });
  assert.equal(layoutOf(both, model).problems[0].code, "twice");
  assert.deepEqual(
    layoutOf(formOf({ tab: "image", items: [picture("a", { position: "5" }), picture("b")] }), model).pictures.map(
      (one) => one.cell,
    ),
    [0],
  );
});

test("a moved picture takes a free place, and the others stay", () => {
  const form = formOf({ items: [picture("a"), picture("b"), picture("c")] });
  const moved = { ...form, ...movePicture(form, model, "b", 6) };
  assert.deepEqual(cells(moved), [0, 6, 8]);
  assert.equal(positionsText(moved, model), "0,6,last");
  assert.equal(movePicture(moved, model, "b", 8), null, "another picture lies there");
  assert.equal(nextFree(moved, model, "a", -1), null);
  assert.equal(
    nextFree({ ...form, ...movePicture(form, model, "b", 1) }, model, "a", 1),
    2,
    "it passes over its neighbour",
  );
  assert.equal(movePicture(formOf({ tab: "image", items: [picture("a")] }), model, "a", 3), null);
});

test("a picture that is put on a latent frame stands there, in order", () => {
  const form = formOf({ items: [picture("a"), picture("b")] });
  const more = { ...form, ...addPicture(form, model, picture("c"), 3) };
  assert.deepEqual(
    more.items.map((item) => item.id),
    ["a", "c", "b"],
  );
  assert.deepEqual(cells(more), [0, 3, 8]);
  const replaced = { ...form, ...addPicture(form, model, picture("d"), 8) };
  assert.deepEqual(
    replaced.items.map((item) => item.id),
    ["a", "d"],
  );
  const first = addPicture(formOf({ tab: "text" }), model, picture("a"), 0);
  assert.deepEqual([first.tab, first.items.length], ["image", 1]);
  const later = { ...formOf({ tab: "image", items: [picture("a")] }) };
  const two = { ...later, ...addPicture(later, model, picture("b"), 5) };
  assert.deepEqual([two.tab, cells(two)], ["images", [0, 5]]);
});

test("places as text, both ways", () => {
  const form = formOf({ items: [picture("a"), picture("b"), picture("c")] });
  assert.equal(positionsText(form, model), "0,4,last");
  const read = { ...form, ...readPositions(form, model, "0, 1.5s;LAST") };
  assert.deepEqual(
    read.items.map((item) => item.position),
    ["0", "1.5s", "last"],
  );
  assert.equal(positionsText(read, model), "0,1.5s,last");
  assert.deepEqual(
    cells({ ...form, ...readPositions(form, model, "1") }),
    [1, 5, 8],
    "the rest is placed automatically",
  );
  const code = (text) => {
    try {
      readPositions(form, model, text);
    } catch (error) {
      assert.ok(error instanceof PositionError);
      return error.code;
    }
    return null;
  };
  assert.equal(code("0,20"), "latent_outside");
  assert.equal(code("0,x"), "position");
  assert.equal(code("0,3,12f"), "two_places");
  assert.equal(code("0,1,2,3"), "position_count");
  assert.equal(code(""), null);
  assert.equal(withLast(form, model, "0,20"), "0,last");
  assert.equal(withLast(form, model, "0,9s,-40"), "0,last,-40");
});

test("noise as text", () => {
  const form = formOf({ items: [picture("a"), picture("b")] });
  assert.equal(noiseText(form, model), "0.2,0.5");
  assert.deepEqual(
    readNoise(form, model, "0.3").items.map((item) => item.noise),
    [0.3, 0.3],
  );
  assert.deepEqual(
    readNoise(form, model, "").items.map((item) => item.noise),
    [null, null],
  );
  assert.throws(() => readNoise(form, model, "0,0,0"), { code: "noise_count" });
});

test("kept latent frames of a clip", () => {
  const form = formOf({ tab: "video", clips: [clip("v", 2.0625)] });
  assert.deepEqual(
    layoutOf(form, model).kept.map((one) => one.noise),
    [0, 0.3, 0.4, 0.5],
  );
  const fewer = { ...form, ...toggleKept(form, model, 2) };
  assert.equal(fewer.keptPositions, "0,1,3");
  assert.deepEqual(
    layoutOf(fewer, model).kept.map((one) => one.noise),
    [0, 0.3, 0.4],
  );
  const noisy = { ...form, ...setKeptNoise(form, model, 1, 0.75) };
  assert.equal(noisy.keptNoise, "0,0.75,0.4,0.5");
  assert.equal(toggleKept(noisy, model, 6).keptNoise, "0,0.75,0.4,0.5,0.5");
  const short = layoutOf(formOf({ tab: "video", clips: [clip("v", 0.5)], keptPositions: "0,4" }), model);
  assert.deepEqual(short.parts[0], { role: "clip", from: 0, to: 2, clip: 0 });
  assert.deepEqual(
    short.problems.map((one) => one.code),
    ["clip_ends"],
  );
  const broken = layoutOf(formOf({ tab: "video", clips: [clip("v", 2)], keptNoise: "0,x" }), model);
  assert.deepEqual(
    broken.problems.map((one) => one.code),
    ["noise"],
  );
});

test("what is new of an extension, of a transition and of a loop", () => {
  const extend = layoutOf(formOf({ tab: "video", mode: "extend", clips: [clip("v", 3)] }), model);
  assert.deepEqual(
    extend.parts.map(({ role, from, to }) => [role, from, to]),
    [
      ["end", 0, 4],
      ["new", 4, 9],
    ],
  );
  assert.equal(extend.before, 3 - 13 / 16);
  assert.equal(extend.total, 3 - 13 / 16 + 33 / 16);
  const form = formOf({ tab: "video", mode: "transition", clips: [clip("v", 3), clip("w", 3)] });
  const transition = layoutOf(form, model);
  assert.deepEqual(
    transition.parts.map(({ role, from, to }) => [role, from, to]),
    [
      ["end", 0, 3],
      ["new", 3, 6],
      ["start", 6, 9],
    ],
  );
  assert.equal(overlapFrames(form, model), 9);
  assert.equal(layoutOf({ ...form, frames: 65 }, model).problems[0].code, "transition_too_long");
  assert.deepEqual(layoutOf({ ...form, overlap: 17 }, model).problems[0], {
    code: "overlap",
    values: { overlap: 17, most: 13 },
  });
  assert.equal(
    layoutOf({ ...form, clips: [clip("v", 3), clip("w", 3, { start: 2.75 })] }, model).problems[0].code,
    "clip_too_short",
  );
  const loop = layoutOf(formOf({ tab: "video", mode: "loop", overlap: 5 }), model);
  assert.deepEqual(loop.parts, [{ role: "bridge", from: 4, to: 9, clip: null }]);
});

test("the length is set in whole latent frames within the limits", () => {
  assert.deepEqual(setLength(formOf(), model, 12), { frames: 45 });
  assert.deepEqual(setLength(formOf(), model, 999), { frames: 321 });
  assert.deepEqual(setLength(formOf(), model, 0), { frames: 5 });
  assert.equal(setLength(formOf(), model, 9), null);
});

test("a clip of 321 latent frames stays legible, one of 9 fills the page", () => {
  assert.equal(cellWidth(1326, 9, null), 1326 / 9);
  assert.equal(cellWidth(1326, 321, null), 14);
  assert.equal(cellWidth(366, 21, null), 366 / 21);
  assert.equal(cellWidth(1326, 9, 20), 1326 / 9, "never less than the page is wide");
  assert.equal(cellAt(-5, 20, 9), 0);
  assert.equal(cellAt(1e6, 20, 9), 8);
});

test("the ruler's marks can be read at every zoom", () => {
  for (const [frames, cell] of [
    [33, 147],
    [81, 63],
    [321, 16],
    [1281, 14],
    [81, 17],
  ]) {
    const marks = rulerMarks({ frames, fps: 16, factor: 4 }, cell);
    assert.equal(marks[0].seconds, 0);
    assert.ok(marks.length >= 2);
    for (const [number, mark] of marks.entries())
      if (number) assert.ok(mark.x - marks[number - 1].x >= 43, `${frames}: ${mark.x}`);
  }
  assert.equal(xOfFrame(1, 20, 4), 20);
  assert.equal(xOfFrame(5, 20, 4), 40);
});

test("cards hold their latent frame and do not overlap", () => {
  for (const at of [[0, 10, 20], [0, 1, 2, 3], [0], [20], [0, 19, 20], [5, 6, 20]]) {
    for (const cell of [14, 63, 150]) {
      const places = placeCards(at, cell, 190, 21 * cell);
      for (const [number, { x, width }] of places.entries()) {
        const slack = Math.min(6, cell / 4);
        assert.ok(x <= at[number] * cell + slack && x + width >= (at[number] + 1) * cell - slack, `${at} ${cell}`);
        assert.ok(x >= 0 && x + width <= 21 * cell + 0.01);
        if (number) assert.ok(places[number - 1].x + places[number - 1].width <= x + 0.01, `${at} at ${cell}`);
      }
    }
  }
});

test("a crop keeps its shape inside the picture", () => {
  const whole = [0.2, 0, 0.6, 1];
  assert.deepEqual(moveCrop(whole, 0.5, 0.5), [0.4, 0, 0.6, 1]);
  const small = scaleCrop(whole, 0.5, whole, "se");
  assert.deepEqual(small, [0.2, 0, 0.3, 0.5]);
  assert.deepEqual(
    scaleCrop(small, 9, whole, "se"),
    whole.map((value, index) => (index < 2 ? small[index] : value)),
  );
  const middle = scaleCrop(whole, 0.5, whole, "");
  assert.deepEqual(
    middle.map((value) => Math.round(value * 100) / 100),
    [0.35, 0.25, 0.3, 0.5],
  );
  const [x, y, width, height] = cropBox([0, 0, 1, 0.5], whole);
  assert.ok(Math.abs(width / height - 0.6) < 1e-9 && height <= 0.5 && x >= 0 && y >= 0);
});
