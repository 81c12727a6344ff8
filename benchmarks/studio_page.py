"""Measure the studio's page in a real browser: how soon it is usable, what it loads, and a journey through it.

    python benchmarks/studio_page.py                # all of it, in about two minutes
    python benchmarks/studio_page.py --runs 1 --only quick

Each of `--runs` starts ``pusa studio --no-browser`` with an empty data folder. A browser that is there, without a
cache, opens the page as soon as the port is open, as ``pusa studio`` itself has it opened. The package is compiled
before, as pip leaves it. "Answers": the first byte of the page has come. "Usable": the page shows that Generate is
enabled, and that a click on a tab was answered. First contentful paint (from the first byte on), bytes and layout shift
are the browser's own numbers (bytes with compression and headers; the shift until nothing has been asked for half a
second). "Being made": from the click on Generate to the first frame that shows the video on the stage.

The journey: from landing to a clip with keyframes from three pictures of one's own. Counted are clicks (one for the
chooser of files, without those in the system's own window), keystrokes of the prompt, and seconds in which nobody
thinks: with a quick engine that draws a disc, and with the embedded model. Numbers are medians. The exit status is 1
if an aim is missed.
"""

import argparse
import compileall
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from _common import table
from _support import start_python
from ports import free_port
from studio_samples import chromium, studio

import pusa
from pusa import mini

AIMS = {
    "usable_s": 2.5,
    "first_contentful_paint_s": 0.6,
    "transferred_kb": 350.0,
    "layout_shift": 0.05,
    "being_made_ms": 150.0,
}
NAMES = {
    "answers_s": "the server answers, s",
    "answers_cpu_s": "CPU time of its process until then, s",
    "usable_s": "the page is usable, s",
    "first_contentful_paint_s": "first contentful paint, s",
    "transferred_kb": "transferred, kB",
    "requests": "requests",
    "layout_shift": "layout shift",
    "being_made_ms": "click to being made, ms",
    "journey_clicks": "journey: clicks",
    "journey_keystrokes": "journey: keystrokes",
    "quick_journey_s": "journey with a quick engine, s",
    "embedded_journey_s": "journey with the embedded model, s",
}
PROMPT = "a star slides to the right in autumn"
PICTURES = [Path(mini.__file__).parent / "pictures" / name for name in ("star-start.png", "view.jpg", "star-end.png")]
PATIENCE_MS = 300_000
_SHIFTS = """() => {
    window.shift = 0
    new PerformanceObserver(list => {
        for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shift += entry.value
    }).observe({ type: 'layout-shift', buffered: true })
}"""
_LOADED = """() => {
    const all = [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]
    const sent = all.filter(entry => !entry.name.endsWith('/v1/events'))
    const paint = performance.getEntriesByName('first-contentful-paint')[0].startTime
    return {
        first_contentful_paint_s: (paint - all[0].responseStart) / 1000,
        transferred_kb: sent.reduce((sum, entry) => sum + entry.transferSize, 0) / 1000,
        requests: sent.length,
        layout_shift: window.shift,
    }
}"""
_USE = """() => new Promise(resolve => {
    const look = () => {
        const tab = document.querySelector('#tab-text')
        const isThere = document.querySelector('#generate:not([disabled])')
        if (isThere && tab.ariaSelected === 'true') {
            document.querySelector('#tab-image').click()
            return resolve((performance.timeOrigin + performance.now()) / 1000)
        }
        if (isThere) tab.click()
        requestAnimationFrame(look)
    }
    look()
})"""
_PRESS = """prompt => new Promise(resolve => {
    const start = performance.now()
    const look = () => {
        const isShown = document.querySelector('.stage').innerText.includes(prompt)
        if (isShown) resolve(performance.now() - start)
        else requestAnimationFrame(look)
    }
    document.querySelector('#generate').click()
    requestAnimationFrame(look)
})"""
Numbers = dict[str, float]


def opened(browser: Any, url: str) -> Any:
    """Open the page as a new visitor; return it as soon as its first byte has come."""
    context = browser.new_context(viewport={"width": 1366, "height": 768}, locale="en-US")
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.add_init_script(f"({_SHIFTS})()")
    page.goto(url, wait_until="commit")
    return page


def use(page: Any) -> float:
    """Use an opened page as soon as that is possible; return when it was, in unix seconds."""
    usable: float = page.evaluate(_USE)
    return usable


def journey(page: Any) -> Numbers:
    """Make a clip with keyframes from three pictures; it plays at the end."""
    start = time.monotonic()
    page.click("#tab-images")
    with page.expect_file_chooser() as chooser:
        page.click("#choose")
    chooser.value.set_files([str(picture) for picture in PICTURES])
    page.click("#prompt")
    page.keyboard.type(PROMPT)
    page.wait_for_function("() => document.querySelectorAll('.card-picture').length === 3")
    being_made = page.evaluate(_PRESS, PROMPT)
    page.wait_for_function("() => document.querySelector('.stage video.clip')?.readyState >= 2")
    seconds = time.monotonic() - start
    return {"s": seconds, "clicks": 4, "keystrokes": len(PROMPT), "being_made_ms": being_made}


def wait_until_open(port: int, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 2.0).close()
            return
        except OSError:
            time.sleep(0.01)
    raise RuntimeError(f"the studio does not open its port:\n{log.read_text(errors='replace')[-3000:]}")


def measure_start(browser: Any, folder: Path) -> Numbers:
    """Start ``pusa studio`` with the embedded model, land on its page, and make the journey."""
    port, log = free_port(), folder / "log"
    settings = {"port": str(port), "data": str(folder / "data"), "min_free_bytes": "0"}
    start = time.time()
    process = start_python(["-m", "pusa", "studio", "--no-browser"], settings, log)
    try:
        wait_until_open(port, log)
        page = opened(browser, f"http://127.0.0.1:{port}/")
        answers = time.time()
        times = psutil.Process(process.pid).cpu_times()
        usable = use(page)
        page.wait_for_load_state("networkidle")
        found: Numbers = {
            "answers_s": answers - start,
            "answers_cpu_s": times.user + times.system,
            "usable_s": usable - start,
            **page.evaluate(_LOADED),
        }
        made = journey(page)
        page.context.close()
    finally:
        process.terminate()
        process.wait(60)
    return found | {"embedded_journey_s": made["s"]}


def measure_quick(browser: Any, folder: Path) -> Numbers:
    """Make the journey with a quick engine."""
    with studio(folder / "quick") as running:
        page = opened(browser, running.url)
        use(page)
        made = journey(page)
        page.context.close()
    return {
        "being_made_ms": made["being_made_ms"],
        "quick_journey_s": made["s"],
        "journey_clicks": made["clicks"],
        "journey_keystrokes": made["keystrokes"],
    }


MEASURES: dict[str, Callable[[Any, Path], Numbers]] = {"start": measure_start, "quick": measure_quick}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=list(MEASURES))
    args = parser.parse_args()
    compileall.compile_dir(Path(pusa.__file__).parent, quiet=1)
    found: dict[str, list[float]] = {}
    for _ in range(args.runs):
        for name, measure in MEASURES.items():
            if args.only in (None, name):
                with chromium() as browser, tempfile.TemporaryDirectory() as folder:
                    for key, value in measure(browser, Path(folder)).items():
                        found.setdefault(key, []).append(value)
    medians = {key: statistics.median(found[key]) for key in NAMES if key in found}
    rows = [
        (NAMES[key], f"{value:.3g}", f"{max(found[key]):.3g}", f"{AIMS[key]:g}" if key in AIMS else "")
        for key, value in medians.items()
    ]
    print(table(["", "median", "worst", "aim"], rows))
    busy = os.getloadavg()[0]
    result = {key: round(value, 3) for key, value in medians.items()}
    print(json.dumps({"cpus": os.cpu_count(), "load_average": round(busy, 1), "runs": args.runs, **result}))
    return int(any(value > AIMS[key] for key, value in medians.items() if key in AIMS))


if __name__ == "__main__":
    sys.exit(main())
