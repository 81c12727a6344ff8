/** Tell how far the videos are where the page is not looked at: title, favicon, and notifications that are asked for. */
import { effect, html } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { jobs, prefs, setPrefs } from "../core/store.js";
import { isBusy, stateOf } from "../result/states.js";
import { contentUrl } from "../result/words.js";
import { Icon } from "./icon.js";
import { overall, turnedOut } from "./progress.js";
import { toast } from "./toasts.js";

const NAME = "pusa";

/** @param {number} percent @returns {string} address of a ring that is closed as far as that */
function ring(percent) {
  const length = 2 * Math.PI * 12;
  const svg =
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><circle cx="16" cy="16" r="12" fill="none" stroke="#8a837b" stroke-opacity=".45" stroke-width="6"/>` +
    `<circle cx="16" cy="16" r="12" fill="none" stroke="#ffab1f" stroke-width="6" stroke-dasharray="${((length * percent) / 100).toFixed(2)} ${length.toFixed(2)}" transform="rotate(-90 16 16)"/></svg>`;
  return `data:image/svg+xml,${encodeURIComponent(svg)}`;
}

/** @param {any} job */
function notify(job) {
  const failed = stateOf(job) === "failed";
  const notice = new Notification(t(failed ? "result.notice_failed" : "result.notice_done"), {
    body: job.prompt || "",
    icon: failed ? undefined : contentUrl(job, "thumbnail"),
    tag: job.id, // of several tabs one is shown
  });
  notice.onclick = () => {
    window.focus();
    notice.close();
  };
}

const isAllowed = () => "Notification" in window && Notification.permission === "granted";

let started = false;

/** Begin; a second call changes nothing. */
export function startNotices() {
  if (started) return;
  started = true;
  const icon = /** @type {HTMLLinkElement|null} */ (document.querySelector('link[rel="icon"]'));
  const plain = icon?.href ?? "";
  const title = document.title;
  let shown = -2;
  /** @type {Map<string, any>} */
  let before = new Map();
  effect(() => {
    const now = jobs.value;
    const percent = overall(now.values());
    if (percent !== shown) {
      shown = percent;
      document.title = percent < 0 ? title : `${percent} % · ${NAME}`;
      if (icon) icon.href = percent < 0 ? plain : ring(percent);
    }
    const ended = turnedOut(before, now);
    before = new Map([...now].filter(([, job]) => isBusy(job)));
    if (prefs.peek().notify && isAllowed() && document.visibilityState !== "visible") ended.forEach(notify);
  });
}

/** Switch notifications; the browser asks only now. */
async function toggle() {
  if (prefs.value.notify && isAllowed()) return setPrefs({ notify: false });
  const answer = "Notification" in window ? await Notification.requestPermission() : "denied";
  setPrefs({ notify: answer === "granted" });
  if (answer !== "granted") toast(t("result.notices_denied"), { kind: "problem" });
}

/** The switch of the page's head. */
export function NoticeSwitch() {
  if (!("Notification" in window)) return null; // a phone's browser, a page over plain HTTP
  const isOn = Boolean(prefs.value.notify && isAllowed());
  const name = t("result.notices");
  return html`<button type="button" class="button plain icon notice-switch" role="switch" aria-checked=${String(isOn)} aria-label=${name} title=${name} onClick=${toggle}>
    <${Icon} name="bell" filled=${isOn} />
  </button>`;
}
