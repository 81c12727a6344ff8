/** A video as frames that the server draws: its clock, and which frame shows a time. Pure. */

const MOST = 64; // frames of a strip
const A_SECOND = 16; // of them, at most

/** What a transport needs of a video, without one. */
export class DrawnVideo {
  /** @param {number} seconds @param {() => number} [now]  milliseconds */
  constructor(seconds, now = () => performance.now()) {
    this.duration = seconds;
    this.readyState = 4;
    this.seeking = false;
    this.isDrawn = true;
    this.now = now;
    this.from = 0;
    /** @type {number|null} when it began to play */
    this.began = null;
  }

  get currentTime() {
    const played = this.began === null ? 0 : (this.now() - this.began) / 1000;
    return (this.from + played) % this.duration;
  }

  set currentTime(seconds) {
    this.from = seconds;
    if (this.began !== null) this.began = this.now();
  }

  async play() {
    this.began ??= this.now();
  }

  pause() {
    this.from = this.currentTime;
    this.began = null;
  }

  addEventListener() {} // it is there at once, and says nothing
  removeEventListener() {}
}

/** @param {number} seconds @returns {number} */
export const framesOf = (seconds) => Math.max(1, Math.min(MOST, Math.round(seconds * A_SECOND)));

/** The frame of a strip that shows a time. @param {number} time @param {number} seconds @param {number} count */
export const frameAt = (time, seconds, count) => Math.max(0, Math.min(count - 1, Math.floor((time / seconds) * count)));
