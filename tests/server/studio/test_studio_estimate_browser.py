"""What a video would need, and how the model runs, as the page shows them in a real browser."""

import pytest
from studio_samples import Visitor, studio

pytest.importorskip("gradio")
pytest.importorskip("playwright")

from pusa.acceleration.decisions import LoadOptions, Machine, PartPlan, Plan
from pusa.server.plans import Size

pytestmark = pytest.mark.slow  # and only where a browser is


def plan(model: str, size: Size, machine: Machine, options: LoadOptions, guidance: float) -> list[Plan]:
    """Plan by a rule of this test: a video needs 1000 bytes for each of its pixels."""
    need, have = 1000 * size[0] * size[1] * size[2], machine.ram_bytes
    problem = (
        f"{size[0]}x{size[1]} needs {need} bytes and there are {have}: ask for a smaller size" if need > have else ""
    )
    parts = {"transformer": PartPlan("float32", "float32", "cpu")}
    return [Plan(model, options.memory, parts, ram_peak_bytes=need, problem=problem)]


@pytest.fixture(scope="module")
def planned(browser, tmp_path_factory):
    """A server whose worker has reported its machine."""
    with studio(tmp_path_factory.mktemp("planned"), machine=Machine(ram_bytes=10**9), plan=plan) as running:
        yield running


def estimate(page, text: str) -> None:
    """Wait until the line above the button holds this."""
    page.wait_for_function(
        "text => document.querySelector('#pusa-estimate [role=status]').textContent.includes(text)", arg=text
    )


def submit_boxes(page) -> list[dict[str, float]]:
    """Return the boxes of the line and the button: "top" and "bottom" in pixels from the top of the window."""
    return page.evaluate(
        "['#pusa-estimate', '#generate'].map(id => document.querySelector(id).getBoundingClientRect().toJSON())"
    )


def choose_size(page, size: str) -> None:
    page.fill("#size input", size)
    page.press("#size input", "Enter")


@pytest.mark.parametrize(
    "viewport", [{"width": 1280, "height": 900}, {"width": 390, "height": 844}], ids=["wide", "narrow"]
)
def test_the_line_above_the_button_says_what_the_video_needs(browser, planned, viewport):
    visitor = Visitor(browser, planned.url, viewport=viewport)
    page = visitor.open()
    visitor.page.wait_for_selector(".pusa-model[data-kind=ready]")
    estimate(page, "mini: transformer on the CPU in float32 · 0.3 GB of RAM")
    line, button = submit_boxes(page)
    assert line["bottom"] <= button["top"]
    assert button["bottom"] <= viewport["height"]
    page.locator("#advanced > button").click()
    visitor.write("frames", "17", then="Tab")
    estimate(page, "0.2 GB of RAM")
    choose_size(page, "256x256")
    estimate(page, "256x256 needs 1114112000 bytes and there are 1000000000: ask for a smaller size")
    assert page.locator("#pusa-estimate .is-problem").is_visible()
    line, with_problem = submit_boxes(page)
    assert line["bottom"] <= with_problem["top"]
    assert with_problem["bottom"] <= viewport["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    visitor.close()


def test_a_running_job_says_how_the_model_runs(browser, planned):
    visitor = Visitor(browser, planned.url)
    page = visitor.open()
    visitor.tab("Text to video")
    visitor.write("prompt", "a bus rises slowly")
    visitor.generate()
    job = visitor.new_job("")
    page.wait_for_function(
        "document.querySelector('.st-plan')?.textContent === 'mini: transformer on the CPU in float32'"
    )
    plan_box, cancel_box = (page.locator(css).bounding_box() for css in (".st-plan", "[data-act=cancel]"))
    assert plan_box["x"] + plan_box["width"] <= cancel_box["x"]
    planned.service.queue.cancel(job)
    visitor.close()
