/** The pointer on the timeline: a drag is shown while it lasts and becomes one edit when it ends; Escape takes it back. */
import { form, model } from "../core/store.js";
import { changeItem, movePicture, roundNoise, setKeptNoise, setLength } from "./edits.js";
import { toggle } from "./kept.js";
import { chooseFiles } from "./drop.js";
import { cellAt } from "./scale.js";
import { apply, cell, chosen, drag, dragged, heldCell, layout } from "./state.js";

const DRAG_PIXELS = 4;
const STEP = 0.05;
const EDGE_PIXELS = 28;
const EDGE_STEP = 14; // pixels

/**
 * Follow a pointer from here on.
 * @param {PointerEvent} event
 * @param {object} handlers
 * @param {(event: PointerEvent, x: number, y: number) => import("./edits.js").Change|undefined} handlers.move  what the form becomes; undefined: as before
 * @param {(hasMoved: boolean) => void} [handlers.end]
 * @returns {(change: import("./edits.js").Change) => void} shows what the form becomes, without a move
 */
function follow(event, { move, end }) {
  const target = /** @type {HTMLElement} */ (event.currentTarget);
  const from = { x: event.clientX, y: event.clientY };
  let hasMoved = false;
  /** @type {import("./edits.js").Change} */
  let change = null;
  target.setPointerCapture(event.pointerId);
  const onMove = (/** @type {PointerEvent} */ now) => {
    if (now.pointerId !== event.pointerId) return;
    const [x, y] = [now.clientX - from.x, now.clientY - from.y];
    if (!hasMoved && Math.hypot(x, y) < DRAG_PIXELS) return;
    hasMoved = true;
    const next = move(now, x, y);
    if (next !== undefined) show(next);
  };
  const show = (/** @type {import("./edits.js").Change} */ next) => {
    change = next;
    dragged.value = next ? { ...form.value, ...next } : null;
  };
  const stop = (/** @type {boolean} */ isDone) => {
    target.removeEventListener("pointermove", onMove);
    target.removeEventListener("pointerup", onUp);
    target.removeEventListener("pointercancel", onCancel);
    removeEventListener("keydown", onKey, true);
    removeEventListener("pointerdown", onOther, true);
    drag.value = null;
    dragged.value = null;
    if (isDone) apply(change, "");
    end?.(hasMoved || !isDone);
  };
  const onUp = (/** @type {PointerEvent} */ now) => now.pointerId === event.pointerId && stop(true);
  const onCancel = (/** @type {PointerEvent} */ now) => now.pointerId === event.pointerId && stop(false);
  const onKey = (/** @type {KeyboardEvent} */ key) => {
    if (key.key !== "Escape") return;
    key.stopPropagation();
    stop(false);
  };
  const onOther = (/** @type {PointerEvent} */ other) => other.pointerId !== event.pointerId && stop(false); // two fingers zoom
  target.addEventListener("pointermove", onMove);
  target.addEventListener("pointerup", onUp);
  target.addEventListener("pointercancel", onCancel);
  addEventListener("keydown", onKey, true);
  addEventListener("pointerdown", onOther, true);
  return show;
}

/** @param {HTMLElement} element inside the track @returns {HTMLElement} */
const trackOf = (element) => /** @type {HTMLElement} */ (element.closest("[data-track]"));

/** Noise by how far up or down somebody has dragged. @param {number} start @param {number} y @param {number} height */
const draggedNoise = (start, y, height) => roundNoise(Math.round((start - y / height) / STEP) * STEP);

/**
 * Scroll the track while something is held at the edge of what is visible.
 * @param {HTMLElement} scroller @param {() => void} onScroll  called after each step
 */
function edgeScroll(scroller, onScroll) {
  let step = 0;
  let timer = 0;
  const scroll = () => {
    const before = scroller.scrollLeft;
    scroller.scrollLeft += step;
    timer = step ? window.setTimeout(scroll, 30) : 0;
    if (scroller.scrollLeft !== before) onScroll();
  };
  return {
    /** @param {number} clientX */
    at(clientX) {
      const { left, right } = scroller.getBoundingClientRect();
      step = clientX < left + EDGE_PIXELS ? -EDGE_STEP : clientX > right - EDGE_PIXELS ? EDGE_STEP : 0;
      if (step && !timer) timer = window.setTimeout(scroll, 30);
    },
    end() {
      step = 0;
      clearTimeout(timer);
    },
  };
}

/** @param {PointerEvent} event @param {import("./model.js").Placed} one */
export function onCardDown(event, one) {
  if (event.button) return;
  event.stopPropagation();
  const card = /** @type {HTMLElement} */ (event.currentTarget);
  const track = trackOf(card);
  const id = one.item.id;
  let what = ""; // decided by the first pixels: sideways is a move, up and down is noise
  chosen.value = id;
  card.focus({ preventScroll: true });
  const grabbed = event.clientX - track.getBoundingClientRect().left - (Number(one.cell) + 0.5) * cell.value;
  let clientX = event.clientX;
  const moved = () => {
    const middle = clientX - track.getBoundingClientRect().left - grabbed;
    const to = cellAt(middle, cell.value, layout.value?.length.count ?? 1);
    const change = movePicture(form.value, model.value, id, to);
    return change ?? (to === one.cell ? null : undefined); // another picture lies there: it stays where it was
  };
  const edge = edgeScroll(/** @type {HTMLElement} */ (track.closest(".timeline-scroll")), () => {
    const change = moved();
    if (change !== undefined) show(change);
  });
  const show = follow(event, {
    move(now, x, y) {
      if (!what) what = Math.abs(y) > Math.abs(x) || form.value.tab !== "images" ? "noise" : "move";
      drag.value = { what, id };
      if (what === "noise") {
        const noise = draggedNoise(one.noise, y, card.clientHeight);
        return noise === one.noise ? null : changeItem(form.value, id, { noise });
      }
      clientX = now.clientX;
      edge.at(clientX);
      return moved();
    },
    end: edge.end,
  });
}

/** @param {PointerEvent} event @param {number} at latent frame @param {import("./model.js").Kept|undefined} one */
export function onKeptDown(event, at, one) {
  if (event.button) return;
  event.stopPropagation();
  const box = /** @type {HTMLElement} */ (event.currentTarget);
  const isTouch =
    event.pointerType === "touch" && !(/** @type {HTMLElement} */ (event.target).closest("[data-handle]"));
  chosen.value = `cell:${at}`;
  box.focus({ preventScroll: true });
  follow(event, {
    move(_, __, y) {
      if (!one || isTouch) return undefined;
      drag.value = { what: "noise", id: `cell:${at}` };
      const noise = draggedNoise(one.noise, y, box.clientHeight);
      return noise === one.noise ? null : setKeptNoise(form.value, model.value, at, noise);
    },
    end: (hasMoved) => !hasMoved && toggle(at),
  });
}

/** A click on an empty latent frame asks for a picture. @param {MouseEvent} event */
export function onTrackClick(event) {
  const track = /** @type {HTMLElement} */ (event.currentTarget);
  const isOnPicture = /** @type {HTMLElement} */ (event.target).closest("[data-item]");
  if (isOnPicture || !["image", "images", "text"].includes(layout.value?.kind ?? "")) return;
  const x = event.clientX - track.getBoundingClientRect().left;
  chooseFiles(cellAt(x, cell.value, layout.value?.length.count ?? 1));
}

/**
 * Drag the end of the clip. Beyond the edge of what is visible it grows while it is held there.
 * @param {PointerEvent} event
 */
export function onEndDown(event) {
  if (event.button || !layout.value) return;
  event.stopPropagation();
  const handle = /** @type {HTMLElement} */ (event.currentTarget);
  const scroller = /** @type {HTMLElement} */ (handle.closest(".timeline-scroll"));
  const start = layout.value.length.count;
  const width = cell.value;
  handle.focus({ preventScroll: true });
  let grown = 0;
  let x = 0;
  let timer = 0;
  const made = () => setLength(form.value, model.value, start + Math.round(x / width) + grown);
  const grow = () => {
    grown += 1;
    show(made());
    scroller.scrollLeft = scroller.scrollWidth;
    timer = window.setTimeout(grow, 90);
  };
  const show = follow(event, {
    move(now, dx) {
      heldCell.value ??= width;
      drag.value = { what: "length", id: "" };
      x = dx;
      const isBeyond = dx > DRAG_PIXELS && now.clientX > scroller.getBoundingClientRect().right - 12;
      if (isBeyond && !timer) timer = window.setTimeout(grow, 90);
      if (!isBeyond && timer) {
        clearTimeout(timer);
        timer = 0;
      }
      return made();
    },
    end() {
      clearTimeout(timer);
      heldCell.value = null;
    },
  });
}
