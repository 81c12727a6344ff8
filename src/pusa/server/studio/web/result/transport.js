/** Play one or several videos in step: they show the same moment, and are paused, moved and stepped together. */
import { html, signal, useEffect, useMemo, useRef, useState } from "../core/dom.js";
import { Drawn } from "./drawn.js";
import { contentUrl } from "./words.js";

/** @typedef {HTMLVideoElement|import("./frames.js").DrawnVideo} Video */

const DRIFT = 0.09; // seconds by which one may be off before it is set right

export const movesLess = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export class Transport {
  constructor() {
    this.playing = signal(!movesLess());
    this.time = signal(0);
    this.duration = signal(0);
    this.drawn = signal(false); // one of them cannot be played
    /** @type {Video[]} the first sets the time */
    this.videos = [];
    this.frame = 0;
  }

  /** @param {Video} video @returns {() => void} takes it out again */
  add(video) {
    this.videos.push(video);
    if ("isDrawn" in video) this.drawn.value = true;
    const measured = () => {
      this.duration.value = Math.max(...this.videos.map((one) => one.duration || 0));
      if (this.videos[0] !== video) this.align(video);
      if (this.playing.value) void video.play().catch(() => {}); // the browser forbids it: the button plays
    };
    video.addEventListener("loadedmetadata", measured);
    if (video.readyState >= 1) measured();
    if (!this.frame) this.follow();
    return () => {
      video.removeEventListener("loadedmetadata", measured);
      this.videos = this.videos.filter((one) => one !== video);
      if (!this.videos.length) {
        cancelAnimationFrame(this.frame);
        this.frame = 0;
      }
    };
  }

  /** @param {Video} video */
  align(video) {
    const target = this.videos[0].currentTime % (video.duration || Infinity);
    const off = Math.abs(video.currentTime - target);
    if (Math.min(off, (video.duration || Infinity) - off) > DRIFT && !video.seeking) video.currentTime = target;
  }

  follow() {
    this.frame = requestAnimationFrame(() => this.follow());
    const [first, ...others] = this.videos;
    if (!first || first.seeking) return;
    this.time.value = first.currentTime;
    if (this.playing.value) for (const video of others) this.align(video);
  }

  toggle() {
    if (this.playing.value) this.pause();
    else this.play();
  }

  play() {
    this.playing.value = true;
    for (const video of this.videos) void video.play().catch(() => {});
  }

  pause() {
    this.playing.value = false;
    for (const video of this.videos) video.pause();
  }

  /** @param {number} seconds */
  seek(seconds) {
    this.pause();
    this.time.value = Math.max(0, Math.min(this.duration.value, seconds));
    for (const video of this.videos) video.currentTime = this.time.value % (video.duration || Infinity);
  }

  /** @param {number} frames  forwards, or backwards if negative @param {number} fps */
  step(frames, fps) {
    const last = Math.max(0, Math.round(this.duration.value * fps) - 1);
    const at = Math.floor(this.time.value * fps + 0.01);
    this.seek((Math.max(0, Math.min(last, at + frames)) + 0.01) / fps);
  }
}

/** A transport of its own for what is shown. @param {string} key  another one for another key @returns {Transport} */
export const useTransport = (key) => useMemo(() => new Transport(), [key]);

const NOT_DECODED = 3; // a code of MediaError
const AGAIN_MS = [500, 15_000]; // until a video that could not be fetched is asked for again: at first, and at most

const playsH264 = () => Boolean(document.createElement("video").canPlayType('video/mp4; codecs="avc1.42E01E"'));

/** @param {{transport: Transport, job: any, label: string, poster?: boolean}} props */
export function Clip({ transport, job, label, poster = false }) {
  const ref = useRef(/** @type {HTMLVideoElement|null} */ (null));
  const [unplayable, setUnplayable] = useState("");
  const isDrawn = unplayable === job.id;
  useEffect(() => (isDrawn ? undefined : transport.add(/** @type {HTMLVideoElement} */ (ref.current))), [transport, isDrawn]);
  const again = useRef({ wait: AGAIN_MS[0], timer: 0 });
  useEffect(() => () => clearTimeout(again.current.timer), [job.id]);
  if (isDrawn) return html`<${Drawn} transport=${transport} job=${job} label=${label} />`;
  const onError = () => {
    if (ref.current?.error?.code === NOT_DECODED || !playsH264()) return setUnplayable(job.id);
    const { wait } = again.current; // the server is away, or the network
    again.current = { wait: Math.min(AGAIN_MS[1], 2 * wait), timer: window.setTimeout(() => ref.current?.load(), wait) };
  };
  const still = poster ? contentUrl(job, "thumbnail") : undefined;
  return html`<video ref=${ref} class="clip" src=${contentUrl(job)} poster=${still} aria-label=${label} onError=${onError} muted loop playsinline preload="auto" />`;
}
