/** Regions of a picture in the shape of the video, as fractions of the picture: moved and scaled inside it. Pure. */

/** @typedef {import("./pictures.js").Region} Region */

const LEAST = 0.1; // of the largest region

/** @param {number} value @param {number} low @param {number} high */
const between = (value, low, high) => Math.min(Math.max(low, high), Math.max(low, value));

/** How large a region is, as a fraction of the largest one. @param {Region} region @param {Region} whole */
export const scaleOf = (region, whole) => region[2] / whole[2];

/**
 * A region of the right shape around the middle of one that may have another: of a video whose size has changed.
 * @param {Region} crop @param {Region} whole the largest region of the right shape
 * @returns {Region}
 */
export function cropBox([x, y, width, height], whole) {
  const scale = between(Math.min(width / whole[2], height / whole[3]), LEAST, 1);
  const [inner, outer] = [whole[2] * scale, whole[3] * scale];
  return moveCrop([x + (width - inner) / 2, y + (height - outer) / 2, inner, outer], 0, 0);
}

/** @param {Region} region @param {number} right @param {number} down fractions of the picture @returns {Region} */
export const moveCrop = ([x, y, width, height], right, down) => [
  between(x + right, 0, 1 - width),
  between(y + down, 0, 1 - height),
  width,
  height,
];

/**
 * Make a region larger or smaller; the corner opposite to the dragged one stays, or the middle.
 * @param {Region} region @param {number} factor @param {Region} whole @param {string} corner "nw", "ne", "sw", "se" or ""
 * @returns {Region}
 */
export function scaleCrop([x, y, width, height], factor, whole, corner) {
  let scale = between((width / whole[2]) * factor, LEAST, 1);
  const anchorX = corner.includes("w") ? 1 : corner.includes("e") ? 0 : 0.5;
  const anchorY = corner.includes("n") ? 1 : corner.includes("s") ? 0 : 0.5;
  const [fixedX, fixedY] = [x + anchorX * width, y + anchorY * height];
  if (corner) {
    const roomX = (anchorX ? fixedX : 1 - fixedX) / whole[2];
    const roomY = (anchorY ? fixedY : 1 - fixedY) / whole[3];
    scale = Math.max(LEAST, Math.min(scale, roomX, roomY));
  }
  const [wide, high] = [whole[2] * scale, whole[3] * scale];
  return moveCrop([fixedX - anchorX * wide, fixedY - anchorY * high, wide, high], 0, 0);
}
