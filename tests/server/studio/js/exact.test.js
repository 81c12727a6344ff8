import assert from "node:assert/strict";
import test from "node:test";
import { emptyForm } from "../../../../src/pusa/server/studio/web/core/empty_form.js";
import { fromBody } from "../../../../src/pusa/server/studio/web/core/from_body.js";
import { jsonText, parseJson } from "../../../../src/pusa/server/studio/web/core/json.js";
import { bodiesOf, toBody } from "../../../../src/pusa/server/studio/web/core/request.js";
import { MOST_SEED, readSeed, seedAfter } from "../../../../src/pusa/server/studio/web/core/seeds.js";
import { WAN, formOf } from "./samples.js";

test("whole numbers that JavaScript does not hold keep their digits, and all others are numbers", () => {
  const text = '{"seed":9223372036854775807,"list":[-9007199254740993, 9007199254740991,1.25e3],"big":12345678901234567890.5}';
  assert.deepEqual(parseJson(text), { seed: "9223372036854775807", list: ["-9007199254740993", 9007199254740991, 1250], big: 12345678901234567890.5 });
  const words = { prompt: 'say "seed":"9223372036854775807" and \\ 9007199254740993', seed: 7 };
  assert.deepEqual(parseJson(JSON.stringify(words)), words);
  assert.throws(() => parseJson("{1234567890123456789"), SyntaxError);
});

test("a seed goes out as the number that came in, and no text of a prompt changes", () => {
  const words = 'a sign: "seed":"9223372036854775807"';
  const text = jsonText({ prompt: words, seed: "9223372036854775807", extra_params: { seed: 7 } });
  assert.match(text, /"seed":9223372036854775807,/);
  assert.match(text, /"extra_params":\{"seed":7\}/);
  assert.equal(JSON.parse(text).prompt, words);
  assert.deepEqual(parseJson(text).seed, "9223372036854775807");
});

test("the seed of another client comes back exactly, and its variants follow it", () => {
  const body = { prompt: "a cat", seed: parseJson("9007199254740993") };
  const { form } = fromBody(body, new Map(), WAN, emptyForm(), () => "x");
  assert.deepEqual([form.seed, form.seedLocked], ["9007199254740993", true]);
  assert.match(jsonText(toBody(form, WAN)), /"seed":9007199254740993[,}]/);
  const variants = bodiesOf({ ...form, variants: 3 }, WAN, "batch");
  assert.deepEqual(variants.map(({ seed }) => seed), ["9007199254740993", "9007199254740994", "9007199254740995"]);
});

test("seeds are read to the last digit", () => {
  assert.deepEqual(readSeed(" 42 "), { seed: 42, isTooLarge: false });
  assert.deepEqual(readSeed("9007199254740993"), { seed: "9007199254740993", isTooLarge: false });
  assert.deepEqual(readSeed(MOST_SEED), { seed: "9223372036854775807", isTooLarge: false });
  assert.deepEqual(readSeed("9223372036854775808"), { seed: "9223372036854775807", isTooLarge: true });
  for (const text of ["", "-1", "1.5", "1e3", "0x10", "9".repeat(101)]) assert.equal(readSeed(text), null, text);
});

test("the next seed crosses the ends", () => {
  assert.equal(seedAfter(40, 2), 42);
  assert.equal(seedAfter(Number.MAX_SAFE_INTEGER, 1), "9007199254740992");
  assert.equal(seedAfter("9007199254740992", -1), Number.MAX_SAFE_INTEGER);
  assert.equal(seedAfter(MOST_SEED, 1), 0);
  assert.equal(toBody(formOf({ tab: "text", seed: null }), WAN).seed, undefined);
});
