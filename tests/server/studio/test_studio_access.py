"""The page for everyone: axe-core finds nothing, keys and fingers reach everything, motion can be reduced."""

from collections.abc import Iterator
from typing import Any

import pytest
from gallery_samples import Filled, Looker, filled

pytest.importorskip("playwright")
pytest.importorskip("axe_playwright_python")

from axe_playwright_python.base import AXE_SCRIPT

SIZES = {1366: {"width": 1366, "height": 768}, 390: {"width": 390, "height": 844}}
LEAST_PIXELS = 40
MOST_TABS = 14
# Where a state looks otherwise than the one before: contrast, which takes the longest, is measured there only.
PARTS = {
    "empty": "body",
    "pictures on the timeline": ".form, .timeline",
    "control": "#more-control",
    "advanced": "#more-advanced",
    "a finished video": ".stage",
    "selected videos": ".gallery",
}

_AXE = """async part => {
    const found = []
    const look = async (name, where, options) => {
        const { violations } = await axe.run(where, { resultTypes: ['violations'], preload: false, ...options })
        for (const { id, nodes } of violations) {
            found.push(...nodes.map(node => `${name} ${id}: ${node.target} ${node.any[0]?.message ?? node.html}`))
        }
    }
    await look('', document, { rules: { 'color-contrast': { enabled: false } } })
    const parts = [...document.querySelectorAll(part)]
    for (const theme of ['light', 'dark']) {
        document.documentElement.dataset.theme = theme
        await look(theme, { include: parts }, { runOnly: { type: 'rule', values: ['color-contrast'] } })
    }
    return found
}"""
_FRAMES = """async () => {
    const base = document.querySelector('script[type=module][src]').src.replace('app.js', '')
    const { form } = await import(base + 'core/store.js')
    const { openFrames } = await import(base + 'timeline/frames.js')
    openFrames(form.value.clips[0])
}"""
# What takes the focus and can be pressed; a hidden chooser of files has no box.
_PRESSED = "a[href], button, input, select, textarea, summary, video[controls], [tabindex]"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    with filled(tmp_path_factory.mktemp("access")) as site:
        site.make()
        site.make("a bus slides to the right in the desert")
        yield site


class Reader(Looker):
    """Somebody who has the page checked in one language and width."""

    def begin(self) -> Any:
        self.page = self.open()
        self.page.wait_for_selector("#generate:not([disabled])")
        self.page.wait_for_selector(".tile img")
        return self.page

    def findings(self, state: str) -> list[str]:
        """All rules, and contrast in both themes: nothing else differs between them."""
        if not self.page.evaluate("() => 'axe' in window"):
            self.page.evaluate(AXE_SCRIPT)
        return [f"{state}: {found}" for found in self.page.evaluate(_AXE, PARTS.get(state, "dialog[open]"))]

    def states(self) -> Iterator[str]:
        """Bring the page from state to state; yield the name of each."""
        page = self.begin()
        yield "empty"
        self.fill_images()
        yield "pictures on the timeline"
        page.click("#open-control")
        yield "control"
        page.click("#open-advanced")
        yield "advanced"
        page.click(".item-card >> nth=0 >> button >> nth=0")
        yield from self.in_dialog("crop")
        page.click("#tab-video")
        page.click(".example-fill >> nth=0")
        page.wait_for_selector(".item-card")
        page.evaluate(_FRAMES)
        yield from self.in_dialog("frames of a clip")
        page.click(".tile-open >> nth=0")
        page.wait_for_selector(".stage video.clip")
        page.click(".about .more")
        yield "a finished video"
        page.click(".gallery-head .button.toggle >> nth=1")
        for number in range(2):
            page.locator(".tile-check input").nth(number).check()
        yield "selected videos"
        page.locator(".chosen-actions button").nth(3).click()
        yield from self.in_dialog("film")

    def fill_images(self) -> None:
        self.page.click("#tab-images")
        self.page.click(".example-fill >> nth=0")
        self.page.wait_for_function("() => document.querySelectorAll('.card-picture').length === 2")
        self.page.locator(".card-picture").first.focus()

    def in_dialog(self, name: str) -> Iterator[str]:
        self.page.wait_for_selector("dialog[open]")
        yield name
        self.page.keyboard.press("Escape")
        self.page.wait_for_selector("dialog[open]", state="detached")


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("language", ["en-US", "fr-FR", "zh-CN"])
def test_axe_finds_nothing(browser: Any, site: Filled, language: str, width: int) -> None:
    reader = Reader(browser, site.url, {"viewport": SIZES[width], "locale": language, "reduced_motion": "reduce"})
    findings = [found for state in reader.states() for found in reader.findings(state)]
    reader.close()
    assert findings == []
    assert not reader.errors


# ---- keyboard --------------------------------------------------------------------------------------------------------

_TO_TOP = """() => {
    document.body.tabIndex = -1
    document.body.focus()
    document.body.removeAttribute('tabindex')
}"""
_FOCUS = """() => {
    const one = document.activeElement
    if (!one || one === document.body) return null
    const seen = [one, ...one.querySelectorAll('*')].some(each => {
        const style = getComputedStyle(each)
        const isOutlined = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2
        return isOutlined || each !== one && style.boxShadow !== 'none'
    })
    const box = one.getBoundingClientRect()
    const isVisible = one.checkVisibility({ opacityProperty: true, visibilityProperty: true })
    const shown = box.width > 0 && box.height > 0 && isVisible
    return { name: one.id || one.className || one.tagName, label: one.getAttribute('aria-label'), seen: seen && shown }
}"""


def test_the_keyboard_is_soon_at_generate(browser: Any, site: Filled) -> None:
    reader = Reader(browser, site.url)
    page = reader.begin()
    presses = {}
    for tab in ("image", "images", "video", "text"):
        page.click(f"#tab-{tab}")
        if tab == "images":
            reader.fill_images()
        page.evaluate(_TO_TOP)
        for count in range(1, 2 * MOST_TABS):
            page.keyboard.press("Tab")
            if page.evaluate("() => document.activeElement.id") == "generate":
                presses[tab] = count
                break
    reader.close()
    assert set(presses) == {"image", "images", "video", "text"}
    assert max(presses.values()) <= MOST_TABS, presses


@pytest.mark.parametrize("width", SIZES)
def test_what_has_the_focus_is_seen(browser: Any, site: Filled, width: int) -> None:
    reader = Reader(browser, site.url, {"viewport": SIZES[width], "reduced_motion": "reduce"})
    page = reader.begin()
    reader.fill_images()
    page.click("#open-control")
    page.click(".tile-open >> nth=0")
    page.wait_for_selector(".stage video.clip")
    page.evaluate(_TO_TOP)
    stops = []
    while len(stops) < 120:
        page.keyboard.press("Tab")
        stop = page.evaluate(_FOCUS)
        if stop is None:
            break
        stops.append(stop)
    reader.close()
    assert 30 < len(stops) < 120
    assert [stop for stop in stops if not stop["seen"]] == []


# ---- fingers ---------------------------------------------------------------------------------------------------------

_SMALL = """([pressed, least]) => [...document.querySelectorAll(pressed)].filter(one => {
    if (!one.checkVisibility({ visibilityProperty: true }) || one.matches('.skip, video')) return false
    const label = one.matches('input[type=checkbox], input[type=radio]') && one.closest('label')
    const box = (label || one).getBoundingClientRect()
    return box.width > 1 && (box.width < least - .5 || box.height < least - .5)
}).map(one => {
    const box = one.getBoundingClientRect()
    const name = one.getAttribute('aria-label') ?? one.innerText
    return `${one.tagName} ${one.className || one.id} (${name}): ${box.width.toFixed()} x ${box.height.toFixed()}`
})"""


def test_a_finger_hits_everything(browser: Any, site: Filled) -> None:
    options = {"viewport": SIZES[390], "has_touch": True, "is_mobile": True, "reduced_motion": "reduce"}
    reader = Reader(browser, site.url, options)
    found = {state: reader.page.evaluate(_SMALL, [_PRESSED, LEAST_PIXELS]) for state in reader.states()}
    assert reader.page.evaluate("() => matchMedia('(pointer: coarse)').matches")
    reader.close()
    assert {state: small for state, small in found.items() if small} == {}


@pytest.mark.parametrize("language", ["en-US", "fr-FR", "zh-CN"])
def test_no_state_is_wider_than_a_telephone(browser: Any, site: Filled, language: str) -> None:
    reader = Reader(browser, site.url, {"viewport": SIZES[390], "locale": language, "reduced_motion": "reduce"})
    too_wide = "() => document.documentElement.scrollWidth - innerWidth"
    found = {state: reader.page.evaluate(too_wide) for state in reader.states()}
    reader.close()
    assert set(found.values()) == {0}, found


_LONG = """async () => {
    const base = document.querySelector('script[type=module][src]').src.replace('app.js', '')
    const { edit } = await import(base + 'core/store.js')
    edit({ tab: 'text', frames: 321 })
}"""


def test_a_long_track_and_a_clip_are_legible_on_a_telephone(browser: Any, site: Filled) -> None:
    reader = Reader(browser, site.url, {"viewport": SIZES[390], "reduced_motion": "reduce"})
    page = reader.begin()
    page.evaluate(_LONG)
    page.wait_for_function("() => document.querySelector('[data-track]').clientWidth > 2 * innerWidth")
    hint = page.locator(".track-hint span").bounding_box()
    page.click("#tab-video")
    page.click(".example-fill >> nth=0")
    page.wait_for_selector(".clip-frames .strip-frame >> nth=1")
    frame = page.locator(".clip-frames .strip-frame").first.bounding_box()
    reader.close()
    assert hint["x"] >= 0
    assert hint["x"] + hint["width"] <= 390
    assert 0.7 < frame["width"] / frame["height"] <= 1, "the frames of a square clip are hardly cut, and never squeezed"


# ---- motion ----------------------------------------------------------------------------------------------------------


def test_motion_is_reduced_for_those_who_ask(browser: Any, site: Filled) -> None:
    site.submit("a ghost fades away in the forest")
    job = site.begin()
    site.reach(job, 4)
    moving = {}
    for wish in ("reduce", "no-preference"):
        reader = Looker(browser, site.url, {"reduced_motion": wish})
        page = reader.open(job.id)
        page.wait_for_selector(".preview.running")
        moving[wish] = page.evaluate("() => document.getAnimations().length")
        reader.close()
    done = site.finish(job)
    reader = Looker(browser, site.url, {"reduced_motion": "reduce"})
    page = reader.open(done)
    page.wait_for_function("() => document.querySelector('.stage video.clip')?.readyState >= 2")
    assert page.evaluate("() => document.querySelector('.stage video.clip').paused")
    reader.close()
    assert moving["reduce"] == 0
    assert moving["no-preference"] > 0
