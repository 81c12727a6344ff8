/** Where everything stands: header, form beside the stage, the timeline across the page, queue, gallery. */
import { html } from "../core/dom.js";
import { Form } from "../form/form.js";
import { Gallery } from "../gallery/gallery.js";
import { Queue } from "../gallery/queue.js";
import { Stage } from "../result/stage.js";
import { Timeline } from "../timeline/timeline.js";
import { Header } from "./header.js";

export function Shell() {
  return html`
    <${Header} />
    <main class="layout">
      <${Form} />
      <${Stage} />
      <${Timeline} />
      <${Queue} />
      <${Gallery} />
    </main>
  `;
}
