/** What the timeline itself holds: how it is zoomed, what is chosen, a drag that has not ended. Not part of the form. */
import { computed, signal } from "../core/dom.js";
import { targetSize } from "../core/size.js";
import { edit, form, model } from "../core/store.js";
import { layoutOf, picturesByCell } from "./model.js";
import { FINGER_CELL, LEAST_CELL, cellWidth } from "./scale.js";

/** @typedef {import("../core/store.js").Form} Form */

/** Pixels of a latent frame that the visitor chose; null: all of the clip. @type {import("../core/dom.js").Signal<number|null>} */
export const zoom = signal(/** @type {number|null} */ (null));

/** Visible pixels of the track; 0 until it is measured. */
export const visibleWidth = signal(0);

/** Scrolled pixels of the track. */
export const scrolled = signal(0);

/** The chosen picture (its item's id), clip's latent frame ("cell:3"), or "". */
export const chosen = signal("");

/** A drag that has not ended: the form it would make; null: none. @type {import("../core/dom.js").Signal<Form|null>} */
export const dragged = signal(/** @type {Form|null} */ (null));

/** What is being dragged: {what: "move"|"noise"|"length", id}, or null. */
export const drag = signal(/** @type {{what: string, id: string}|null} */ (null));

/** The latent frame that something from outside is held over; null: none. */
export const dropCell = signal(/** @type {number|null} */ (null));

/** Files on their way to a latent frame. */
export const arriving = signal(
  /** @type {{id: string, cell: number|null, name: string, preview: string|null}[]} */ ([]),
);

/** The form that is shown: with what is being dragged where it is held. */
export const shownForm = computed(() => dragged.value ?? form.value);

/** @type {import("../core/dom.js").ReadonlySignal<import("./model.js").Layout|null>} null until the model is known */
export const layout = computed(() => (model.value ? layoutOf(shownForm.value, model.value) : null));

export const size = computed(() => (model.value ? targetSize(shownForm.value, model.value) : { width: 1, height: 1 }));

/** @returns {number} pixels of a latent frame that can be told apart, and hit where it is pressed */
const leastCell = () =>
  layout.value?.kind === "complete" && matchMedia("(pointer: coarse)").matches ? FINGER_CELL : LEAST_CELL;

/** Pixels of one latent frame. While the clip's end is dragged it is fixed, and the end moves. */
export const heldCell = signal(/** @type {number|null} */ (null));
export const cell = computed(
  () => heldCell.value ?? cellWidth(visibleWidth.value, layout.value?.length.count ?? 1, zoom.value, leastCell()),
);

/** @returns {import("./model.js").Placed[]} pictures in the order of their latent frames */
export const ordered = computed(() => {
  const found = layout.value ? [...picturesByCell(layout.value).values()] : [];
  return found.sort((a, b) => Number(a.cell) - Number(b.cell));
});

/** Change the form where there is something to change. @param {Partial<Form>|null} change @param {string} label */
export function apply(change, label) {
  if (change) edit(change, label);
}
