/** The form that a visitor begins with; apart from the store, which needs a browser. */
/** @typedef {import("./store.js").Form} Form */

/** @returns {Form} the form as it is before the visitor has done anything */
export function emptyForm() {
  return {
    tab: "image",
    mode: "complete",
    prompt: "",
    negative: null,
    story: "",
    items: [],
    clips: [],
    keptPositions: null,
    keptNoise: "",
    shape: "auto",
    frames: null,
    fps: null,
    seed: null,
    seedLocked: false,
    variants: 1,
    preset: "balanced",
    alpha: null,
    alpha2: null,
    steps: null,
    guidance: null,
    shift: null,
    overlap: null,
    fit: "crop",
    fast: false,
    draft: false,
    exact: false,
    schedule: "even",
    metadata: null,
    lora: null,
  };
}
