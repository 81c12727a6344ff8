/** A video that the browser cannot play, as some have no H.264: it plays as frames that the server draws. */
import { html, useEffect, useMemo, useRef, useState } from "../core/dom.js";
import { DrawnVideo, frameAt, framesOf } from "./frames.js";
import { stripOf } from "./words.js";

/** @param {{transport: import("./transport.js").Transport, job: any, label: string}} props */
export function Drawn({ transport, job, label }) {
  const seconds = Number(job.seconds) || 1;
  const count = framesOf(seconds);
  const ref = useRef(/** @type {HTMLCanvasElement|null} */ (null));
  const [strip, setStrip] = useState(/** @type {HTMLImageElement|null} */ (null));
  const video = useMemo(() => new DrawnVideo(seconds), [job.id]);
  useEffect(() => transport.add(video), [transport, video]);
  useEffect(() => {
    const image = new Image();
    image.onload = () => setStrip(image);
    image.src = stripOf(job, count);
    return () => {
      image.onload = null;
    };
  }, [job.id]);
  const frame = frameAt(transport.time.value, seconds, count);
  useEffect(() => {
    if (!strip || !ref.current) return;
    const [width, height] = [strip.naturalWidth / count, strip.naturalHeight];
    Object.assign(ref.current, { width, height });
    ref.current.getContext("2d")?.drawImage(strip, frame * width, 0, width, height, 0, 0, width, height);
  }, [strip, frame]);
  return html`<canvas ref=${ref} class="clip" role="img" aria-label=${label} />`;
}
