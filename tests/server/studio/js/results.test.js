import assert from "node:assert/strict";
import test from "node:test";
import { afterEvent, afterList, newest, pause } from "../../../../src/pusa/server/studio/web/core/changes.js";
import { after, between, matches, moved, neighbour, noFilter, query, queueOrder, shown } from "../../../../src/pusa/server/studio/web/gallery/model.js";
import { DrawnVideo, frameAt, framesOf } from "../../../../src/pusa/server/studio/web/result/frames.js";
import { inputs, rows } from "../../../../src/pusa/server/studio/web/result/rows.js";
import { named, percentOf, ratioOf, siblings, spoken, stateOf } from "../../../../src/pusa/server/studio/web/result/states.js";
import { overall, turnedOut } from "../../../../src/pusa/server/studio/web/shell/progress.js";

const job = (id, values = {}) => ({ id, status: "completed", created_at_ms: 100, prompt: "a duck", has: ["video"], task: "generate", ...values });
const known = (...jobs) => ({ jobs: new Map(jobs.map((one) => [one.id, one])), previews: new Map(), ready: null });
const ids = (jobs) => [...jobs].map((one) => one.id);

test("a list replaces what it covers, and leaves what is older", () => {
  const before = known(job("gone", { created_at_ms: 90 }), job("old", { created_at_ms: 10 }), job("kept", { created_at_ms: 80, favourite: true }));
  const { jobs, doubtful } = afterList(before, [job("new", { created_at_ms: 95 }), job("kept", { created_at_ms: 80 })]);
  assert.deepEqual(ids(jobs.values()).sort(), ["kept", "new", "old"]);
  assert.equal(jobs.get("kept").favourite, undefined);
  assert.deepEqual(doubtful, []);
});

test("a list of all jobs leaves nothing else", () => {
  const { jobs } = afterList(known(job("old", { created_at_ms: 1 })), [job("new")], true);
  assert.deepEqual(ids(jobs.values()), ["new"]);
});

test("what was unfinished and is in no list has to be looked at; what was just pressed stays", () => {
  const before = known(job("a", { status: "in_progress" }), job("local_1", { status: "queued", local: true }));
  before.previews.set("a", "data:,");
  const next = afterList(before, []);
  assert.deepEqual(next.doubtful, ["a"]);
  assert.deepEqual(ids(next.jobs.values()), ["local_1"]);
  assert.equal(next.previews.size, 0);
});

test("events change one job each", () => {
  let state = known();
  state = afterEvent(state, "video", job("a", { status: "in_progress" }));
  state = afterEvent(state, "preview", { id: "a", image: "data:image/webp;base64,AA" });
  assert.equal(state.previews.get("a"), "data:image/webp;base64,AA");
  state = afterEvent(state, "video", job("a"));
  assert.equal(state.previews.size, 0);
  assert.equal(state.jobs.get("a").status, "completed");
  state = afterEvent(state, "ready", { ready: true });
  assert.equal(state.ready.ready, true);
  state = afterEvent(state, "deleted", { id: "a" });
  assert.equal(state.jobs.size, 0);
  assert.equal(afterEvent(state, "end", { reason: "shutdown" }), state);
});

test("another tab gets all that is unfinished and the newest others without a gap", () => {
  const all = Array.from({ length: 60 }, (_, index) => job(`v${index}`, { created_at_ms: index }));
  const jobs = known(...all, job("waits", { created_at_ms: -5, status: "queued" })).jobs;
  const found = newest(jobs, 50);
  assert.equal(found.length, 51);
  assert.equal(found[0].id, "v59");
  assert.ok(ids(found).includes("waits") && !ids(found).includes("v9"));
});

test("pauses grow up to a limit, and differ between browsers", () => {
  assert.equal(pause(0, 0.5), 200);
  assert.deepEqual([1, 2, 3, 9].map((attempt) => pause(attempt, 0.5)), [1000, 2000, 4000, 15000]);
  assert.ok(pause(3, 0) < pause(3, 1));
});

test("a job says what it is", () => {
  assert.equal(stateOf(job("a", { status: "queued" })), "queued");
  assert.equal(stateOf(job("a", { status: "queued", local: true })), "sending");
  assert.equal(stateOf(job("a", { status: "in_progress", cancel_requested: true })), "stopping");
  assert.equal(stateOf(job("a")), "completed");
  assert.equal(stateOf(job("a", { has: [] })), "expired");
  assert.equal(stateOf(job("a", { status: "failed", error: { code: "cancelled" } })), "cancelled");
  assert.equal(stateOf(job("a", { status: "failed", error: { code: "worker_lost" } })), "failed");
  assert.equal(ratioOf({ size: "832x480" }), 832 / 480);
  assert.equal(ratioOf({ size: "" }), 1);
  assert.equal(percentOf({ progress: 41.6 }), 42);
});

test("variants stay in the order in which they were asked for", () => {
  const jobs = known(job("a", { batch: "x", created_at_ms: 102 }), job("c", { batch: "y" }), job("b", { batch: "x", created_at_ms: 101 })).jobs;
  assert.deepEqual(ids(siblings(jobs, jobs.get("b"))), ["b", "a"]);
  assert.deepEqual(ids(siblings(jobs, job("alone"))), ["alone"]);
  assert.deepEqual(ids(named(jobs, ["a", "missing", "c"])), ["a", "c"]);
});

test("a screen reader is told every ten percent", () => {
  const said = (progress) => spoken([job("a", { status: "in_progress", progress })]);
  assert.deepEqual(said(41), said(49));
  assert.notDeepEqual(said(49), said(50));
  assert.equal(spoken([job("a"), job("b", { status: "in_progress", progress: 10 })]).key, "running");
  assert.deepEqual(spoken([job("a"), job("b", { status: "failed" })]), { key: "failed", values: { percent: 0, done: 1, count: 2 } });
  assert.equal(spoken([]), null);
});

test("the gallery shows what matches, as far back as it was read, the newest first", () => {
  const all = [job("a", { created_at_ms: 1 }), job("b", { created_at_ms: 3, prompt: "A red Apple" }), job("c", { created_at_ms: 2 }), job("d", { created_at_ms: 9, status: "queued" })];
  assert.deepEqual(ids(shown(all, noFilter(), 2)), ["b", "c"]);
  assert.deepEqual(ids(shown(all, { ...noFilter(), q: "apple  red" }, -Infinity)), ["b"]);
  assert.equal(matches(job("a", { task: "loop" }), { ...noFilter(), task: "loop" }), true);
  assert.equal(matches(job("a"), { ...noFilter(), favourite: true }), false);
  const second = [job("x", { created_at: 5, created_at_ms: 5003 }), job("z", { created_at: 5, created_at_ms: 5001 }), job("y", { created_at: 5, created_at_ms: 5002 })];
  assert.deepEqual(ids(shown(second, noFilter(), 0)), ["x", "y", "z"]); // of one second, as the API lists them
  assert.deepEqual(ids(shown(second, noFilter(), 5002)), ["x", "y"]);
  assert.equal(query({ q: " red apple ", task: "loop", favourite: true }, "video_1", 40), "limit=40&q=red+apple&task=loop&favourite=true&after=video_1");
});

test("a click with Shift selects from the last one to this one, both ways", () => {
  assert.deepEqual(between(["a", "b", "c", "d"], "c", "a"), ["a", "b", "c"]);
  assert.deepEqual(between(["a", "b"], "gone", "b"), ["b"]);
});

test("arrow keys find the neighbour in rows of different widths", () => {
  const row = (top, ...widths) => {
    let left = 0;
    return widths.map((width) => ({ left, right: (left += width), top }));
  };
  const boxes = [...row(0, 100, 200, 100), ...row(150, 300, 100)];
  assert.equal(neighbour(boxes, 0, "ArrowRight"), 1);
  assert.equal(neighbour(boxes, 0, "ArrowLeft"), 0);
  assert.equal(neighbour(boxes, 2, "ArrowDown"), 4);
  assert.equal(neighbour(boxes, 4, "ArrowUp"), 2);
  assert.equal(neighbour(boxes, 3, "ArrowDown"), 3);
  assert.equal(neighbour(boxes, 1, "End"), 4);
  assert.equal(neighbour(boxes, 1, "a"), 1);
});

test("the queue has those that run first, then those that wait in their order", () => {
  const all = [job("later", { status: "queued", queue_position: 4 }), job("done"), job("next", { status: "queued", queue_position: 0 }), job("runs", { status: "in_progress" })];
  assert.deepEqual(ids(queueOrder(all)), ["runs", "next", "later"]);
  assert.deepEqual(moved(["a", "b", "c"], "c", 0), ["c", "a", "b"]);
  assert.deepEqual(moved(["a", "b", "c"], "a", 9), ["b", "c", "a"]);
  assert.equal(after(["c", "a", "b"], "c"), "a");
  assert.equal(after(["c", "a", "b"], "b"), null);
});

test("settings are told in the order in which they are read", () => {
  const request = {
    prompt: "a duck",
    negative_prompt: "blurry",
    num_frames: 33,
    guidance_scale: 5,
    fast: true,
    lora: { name: "paint", scale: 1.2 },
    noise_multiplier: 0.4,
    keyframes: [{ latent: 0, noise: 0 }, { frame: 80 }, { time: "last" }],
  };
  const found = new Map(rows(request, job("a", { size: "96x96", seconds: "2.06", seed: 7, model: "mini" })));
  assert.deepEqual([...found.keys()], ["prompt", "negative_prompt", "task", "given", "size", "seconds", "guidance", "ways", "lora", "seed", "model"]);
  assert.deepEqual(found.get("given"), [{ place: "0", noise: 0 }, { place: "80f", noise: 0.4 }, { place: "last", noise: 0.4 }]);
  assert.equal(found.get("lora"), "paint");
  const clip = { input_reference: [{ video_id: "v", input: 0 }], cond_positions: ["0", "1s"], noise_multipliers: [0.1, 0.5] };
  assert.deepEqual(inputs(clip), [{ place: "0", noise: 0.1 }, { place: "1s", noise: 0.5 }]);
  assert.deepEqual(inputs({}), []);
});

test("the title tells the video that is furthest, notices those that ended by themselves", () => {
  assert.equal(overall([job("a")]), -1);
  assert.equal(overall([job("a", { status: "queued", progress: 0 })]), 0);
  assert.equal(overall([job("a", { status: "in_progress", progress: 12 }), job("b", { status: "in_progress", progress: 60.4 })]), 60);
  const before = new Map(["a", "b", "c", "d"].map((id) => [id, job(id, { status: "in_progress" })]));
  const now = new Map([
    ["a", job("a")],
    ["b", job("b", { status: "failed", error: { code: "cancelled" } })],
    ["c", job("c", { status: "in_progress" })],
  ]);
  assert.deepEqual(ids(turnedOut(before, now)), ["a"]);
});

test("a video that cannot be played plays as frames: it repeats, pauses, moves, and shows each frame for its share", () => {
  let now = 0;
  const video = new DrawnVideo(2, () => now);
  now = 500;
  assert.equal(video.currentTime, 0, "until it is played");
  void video.play();
  now = 1000;
  assert.equal(video.currentTime, 0.5);
  now = 3000;
  assert.equal(video.currentTime, 0.5, "from the beginning again");
  video.currentTime = 1.5;
  now = 3250;
  assert.equal(video.currentTime, 1.75);
  video.pause();
  now = 9000;
  assert.equal(video.currentTime, 1.75);
  assert.deepEqual([framesOf(0.01), framesOf(2), framesOf(20)], [1, 32, 64]);
  assert.deepEqual([0, 0.99, 1, 2].map((time) => frameAt(time, 2, 2)), [0, 0, 1, 1]);
});
