import assert from "node:assert/strict";
import test from "node:test";
import { clamp, parseNumber, plainNumber, stepped } from "../../../../src/pusa/server/studio/web/core/numbers.js";
import { draftSize, parseSize, sizeFor, targetSize } from "../../../../src/pusa/server/studio/web/core/size.js";
import { article, exchanged, surprise, withPhrase } from "../../../../src/pusa/server/studio/web/form/phrases.js";
import { placed } from "../../../../src/pusa/server/studio/web/form/placed.js";
import { WAN, clip, formOf, picture } from "./samples.js";

const MINI = { ...WAN, defaults: { ...WAN.defaults, width: 96, height: 96 }, shapes: { "16:9": "144x80", "1:1": "96x96", "9:16": "80x144" }, sizes: ["96x96", "144x80", "80x144"] };

test("numbers are read as people type them", () => {
  assert.equal(parseNumber(" 1,5 "), 1.5);
  assert.equal(parseNumber(".5"), 0.5);
  for (const text of ["", "a", "1e5", "1.2.3", "--1", "Infinity"]) assert.equal(parseNumber(text), null);
  assert.equal(parseNumber("1.5", true), null);
  assert.equal(clamp(7, 1, 5), 5);
  assert.equal(plainNumber(0.1 + 0.2), "0.3");
  assert.equal(plainNumber(2 ** 53 - 1), "9007199254740991");
});

test("a step goes to the next place of the grid", () => {
  assert.equal(stepped(0.2, 1, 0.05, 0, 1), 0.25);
  assert.equal(stepped(0.22, 1, 0.05, 0, 1), 0.25);
  assert.equal(stepped(0.22, -1, 0.05, 0, 1), 0.2);
  assert.equal(stepped(1, 1, 0.05, 0, 1), 1);
});

test("the video has the shape of its picture, in about the model's pixels", () => {
  for (const [width, height] of [[4000, 3000], [3000, 4000], [1920, 1080], [1000, 1000], [3000, 1000], [5000, 500]]) {
    const size = targetSize(formOf({ items: [picture("a", { width, height })] }), WAN);
    const wanted = Math.min(2.4, width / height);
    assert.ok(Math.abs(Math.log(size.width / size.height / wanted)) < 0.06, `${width}x${height}: ${JSON.stringify(size)}`);
    assert.equal(size.width % 16 + size.height % 16, 0);
    const area = (size.width * size.height) / (832 * 480);
    assert.ok(area > 0.7 && area < 1.37, `${JSON.stringify(size)} has ${area} of the pixels`);
  }
  assert.deepEqual(sizeFor(832 / 480, WAN), { width: 832, height: 480 });
  assert.deepEqual(sizeFor(1, MINI), { width: 96, height: 96 });
});

test("a shape by its name, a size by its numbers, none without a picture", () => {
  assert.deepEqual(targetSize(formOf({ shape: "9:16" }), WAN), { width: 480, height: 832 });
  assert.deepEqual(targetSize(formOf({ shape: "641x351" }), WAN), { width: 640, height: 352 });
  assert.deepEqual(targetSize(formOf({ tab: "text", items: [picture("a", { width: 1, height: 9 })] }), WAN), { width: 832, height: 480 });
  assert.deepEqual(parseSize("640 × 352"), { width: 640, height: 352 });
  assert.equal(parseSize("wide"), null);
  assert.deepEqual(draftSize({ width: 96, height: 96 }, MINI), { width: 80, height: 80 });
});

test("pictures go where the open tab has room", () => {
  const [a, b, c] = ["a", "b", "c"].map((id) => picture(id));
  assert.deepEqual(placed(formOf({ tab: "text" }), [a], null), { tab: "image", items: [a] });
  assert.deepEqual(placed(formOf({ tab: "image", items: [a] }), [b], null), { tab: "image", items: [b] });
  assert.deepEqual(placed(formOf({ tab: "image" }), [a, b], null), { tab: "images", items: [a, b] });
  assert.deepEqual(placed(formOf({ tab: "images", items: [a] }), [b, c], null), { items: [a, b, c] });
});

test("a picture that is replaced keeps its place and noise", () => {
  const old = picture("a", { position: "3", noise: 0.1 });
  const [found] = placed(formOf({ tab: "images", items: [old] }), [picture("b")], 0).items;
  assert.deepEqual([found.id, found.position, found.noise], ["b", "3", 0.1]);
});

test("clips fill a transition one after the other", () => {
  const [a, b, c] = ["a", "b", "c"].map((id) => clip(id));
  const now = (clips) => formOf({ tab: "video", mode: "transition", clips });
  assert.deepEqual(placed(now([]), [a], null).clips, [a]);
  assert.deepEqual(placed(now([a]), [b], null).clips, [a, b]);
  assert.deepEqual(placed(now([a, b]), [c], null).clips, [a, c]);
  assert.deepEqual(placed(formOf({ tab: "video", mode: "extend", clips: [a] }), [b], null).clips, [b]);
});

test("words are added and exchanged as words", () => {
  assert.equal(withPhrase("a cat", "the camera zooms in"), "a cat, the camera zooms in");
  assert.equal(exchanged("a Category, a cat", "cat", "a $& dog"), "a Category, a a $& dog");
  assert.equal(article("apple"), "an apple");
  assert.equal(surprise({ things: [["apple", "fruit"]], motions: [["bounces"]], places: [["at sea"]] }, () => 0), "an apple bounces at sea");
});
