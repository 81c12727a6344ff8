/** Pictograms of the page: lines of two units in a square of 24, drawn for it. */
import { html } from "../core/dom.js";

/** @type {Record<string, string>} paths by name */
const PATHS = {
  undo: "M8 5 4 9l4 4M4 9h9a6 6 0 0 1 0 12h-3",
  redo: "m16 5 4 4-4 4M20 9h-9a6 6 0 0 0 0 12h3",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8ZM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6 19 19M19 5l-1.4 1.4M6.4 17.6 5 19",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.5Z",
  globe: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18ZM3 12h18M12 3c-5 5.5-5 12.5 0 18M12 3c5 5.5 5 12.5 0 18",
  logout: "M10 4H5v16h5M14 8l4 4-4 4M18 12H9",
  close: "M6 6l12 12M18 6 6 18",
  plus: "M12 5v14M5 12h14",
  minus: "M5 12h14",
  check: "m5 12.5 4.5 4.5L19 7.5",
  image: "M4 5h16v14H4zM4 16l4.5-4.5 4 4 2.5-2.5 5 5M15.5 9.5h.01",
  images: "M7 7h14v12H7zM3 15V3h14M7 16l4-4 4 4 2-2 4 4",
  video: "M3 6h13v12H3zM16 10.5 21 7.5v9L16 13.5",
  text: "M5 6V4h14v2M12 4v16M9 20h6",
  upload: "M12 16V4M7 9l5-5 5 5M4 16v4h16v-4",
  download: "M12 4v12M7 11l5 5 5-5M4 16v4h16v-4",
  crop: "M7 2v15h15M2 7h15v15",
  replace: "M4 9h13l-3.5-3.5M20 15H7l3.5 3.5",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5",
  lock: "M6 11h12v9H6zM8.5 11V8a3.5 3.5 0 0 1 7 0v3",
  unlock: "M6 11h12v9H6zM8.5 11V7a3.5 3.5 0 0 1 6.5-1.800",
  dice: "M5 5h14v14H5zM9 9h.01M15 9h.01M12 12h.01M9 15h.01M15 15h.01",
  play: "M8 5.5v13L18.5 12z",
  pause: "M9 5v14M15 5v14",
  stop: "M7 7h10v10H7z",
  more: "M5.5 12a.5.5 0 1 0 1 0 .5.5 0 1 0-1 0M11.5 12a.5.5 0 1 0 1 0 .5.5 0 1 0-1 0M17.5 12a.5.5 0 1 0 1 0 .5.5 0 1 0-1 0",
  history: "M4 12a8 8 0 1 0 2.5-5.800L4 8.5M4 4v4.5h4.5M12 8v4.5l3 2",
  clock: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16ZM12 8v4.5l3 2",
  bookmark: "M7 4h10v16l-5-4-5 4z",
  wand: "m4 20 11-11M17 3v4M15 5h4M19.5 11v3M18 12.5h3M9 4v3M7.5 5.5h3",
  translate: "M3 6h10M8 4v2M11 6c-1 4-4 7-7.5 8.5M5 9c1.5 2.5 4 4.5 6.5 5.5M12.5 21 17 10.5 21.5 21M14 17.5h6",
  words: "M4 6h9M4 11h16M4 16h12M17 4.5v4M15 6.5h4",
  warning: "M12 4 2.5 20h19zM12 10v4.5M12 17.5h.01",
  info: "M12 3.5a8.5 8.5 0 1 0 0 17 8.5 8.5 0 0 0 0-17ZM12 11v5M12 8h.01",
  search: "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14ZM16 16l4.5 4.5",
  star: "m12 4 2.5 5.200 5.5.8-4 4 .9 5.600-4.900-2.600-4.900 2.600L8 14l-4-4 5.5-.8z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  left: "M15 5l-7 7 7 7",
  right: "M9 5l7 7-7 7",
  up: "M5 15l7-7 7 7",
  down: "M5 9l7 7 7-7",
  "zoom-in": "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14ZM16 16l4.5 4.5M11 8v6M8 11h6",
  "zoom-out": "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14ZM16 16l4.5 4.5M8 11h6",
  fit: "M4 9V4h5M15 4h5v5M20 15v5h-5M9 20H4v-5",
  scissors: "M6 4a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5ZM6 15a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5ZM8 8l12 9M8 16 20 7",
  loop: "M7 7h9a4 4 0 0 1 4 4M17 17H8a4 4 0 0 1-4-4M10 4 7 7l3 3M14 14l3 3-3 3",
  extend: "M4 6h8v12H4zM15 12h6M18 9l3 3-3 3",
  transition: "M3 6h6v12H3zM15 6h6v12h-6zM9 12h6",
  film: "M4 4h16v16H4zM8 4v16M16 4v16M4 9h4M4 15h4M16 9h4M16 15h4",
  grid: "M4 4h7v7H4zM13 4h7v7h-7zM4 13h7v7H4zM13 13h7v7h-7z",
  compare: "M12 3v18M4 6h5v12H4M20 6h-5v12h5",
  edit: "M4 20l1-5L16 4l4 4L9 19zM14 6l4 4",
  bell: "M6 17V11a6 6 0 0 1 12 0v6l1.5 1.5h-15zM10 21h4",
  camera: "M4 8h4l1.5-3h5L16 8h4v11H4zM12 10.5a3 3 0 1 0 0 6 3 3 0 0 0 0-6Z",
  drag: "M9 6h.01M15 6h.01M9 12h.01M15 12h.01M9 18h.01M15 18h.01",
  eye: "M2.5 12C5 7.5 8.5 5.5 12 5.5S19 7.5 21.5 12C19 16.5 15.5 18.5 12 18.5S5 16.5 2.5 12ZM12 9.5a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5Z",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4",
  gear: "M12 9a3 3 0 1 0 0 6 3 3 0 0 0 0-6ZM12 3v3M12 18v3M3 12h3M18 12h3M5.600 5.600l2.100 2.100M16.300 16.300l2.100 2.100M18.400 5.600l-2.100 2.100M7.700 16.300l-2.100 2.100",
  wide: "M3 7.5h18v9H3z",
  tall: "M7.5 3h9v18h-9z",
  square: "M5 5h14v14H5z",
  new: "M6 3h8l4 4v14H6zM12 10.5v6M9 13.5h6",
  offline: "M3 3l18 18M8.5 15.5a5 5 0 0 1 7 0M5 12a10 10 0 0 1 4-2.400M15 9.600a10 10 0 0 1 4 2.400M12 19h.01",
};
/** Drawn as an area, not as lines. */
const FILLED = new Set(["play", "stop"]);

/**
 * A pictogram beside words or in a button with a label of its own: it is no text, so readers skip it.
 * @param {{name: string, size?: number, filled?: boolean}} props
 */
export function Icon({ name, size = 20, filled = FILLED.has(name) }) {
  return html`<svg
    class="glyph"
    width=${size}
    height=${size}
    viewBox="0 0 24 24"
    fill=${filled ? "currentColor" : "none"}
    stroke="currentColor"
    stroke-width="2"
    stroke-linecap="round"
    stroke-linejoin="round"
    aria-hidden="true"
  >
    <path d=${PATHS[name] ?? PATHS.more} />
  </svg>`;
}
