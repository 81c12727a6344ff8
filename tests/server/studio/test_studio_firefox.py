"""The page in a second browser: the tests of its every part are Chromium's, here is one way through it in Firefox."""

from collections.abc import Iterator

import pytest
from firefox import Firefox, firefox
from studio_samples import BODY, CARDS_REST, Running

_PLAYS = "Number(document.querySelector('.stage .scrubber')?.value) > 0.5"
_PIXEL = """(clip => {
    const canvas = Object.assign(document.createElement('canvas'), { width: 1, height: 1 })
    const context = canvas.getContext('2d')
    context.drawImage(clip, 0, 0, 1, 1)
    return [...context.getImageData(0, 0, 1, 1).data]
})(document.querySelector('.stage .clip'))"""
"""Read the average colour of what plays: a video, or without H.264 (of libavcodec in Debian) drawn frames."""


@pytest.fixture(scope="module")
def tab() -> Iterator[Firefox]:
    with firefox() as opened:
        yield opened


@pytest.fixture
def page(tab: Firefox, server: Running) -> Iterator[Firefox]:
    tab.open(server.url)
    tab.until("document.querySelector('#generate:not([disabled])')")
    yield tab
    assert tab.errors == []


def test_words_become_a_video_that_plays(page: Firefox, server: Running) -> None:
    page.click("#tab-text")
    page.click("#prompt")
    page.write("a red bus")
    page.click("#generate")
    page.until(_PLAYS)
    assert sum(page.evaluate(_PIXEL)[:3]) > 0
    (job,) = server.service.queue.page(limit=10)[0]
    assert (job.status, job.request["prompt"]) == ("completed", "a red bus")
    page.until("document.querySelector('.tile')")


def test_what_is_dragged_on_the_timeline_is_what_is_sent(page: Firefox) -> None:
    page.click("#tab-images")
    page.click(".example-fill")
    page.until("document.querySelectorAll('.card-picture').length > 1")
    page.until(f"({CARDS_REST})()")
    before = [frame["latent"] for frame in page.evaluate(f"({BODY})()")["keyframes"]]
    x, y = page.middle_of(".card-picture")
    cells = "document.querySelector('.end-handle').getAttribute('aria-valuenow')"
    width = page.evaluate(f"document.querySelector('[data-track]').clientWidth / {cells}")
    page.drag((x, y), (x + 20, y), (x + round(2 * width), y))
    assert before[0] == 0
    assert [frame["latent"] for frame in page.evaluate(f"({BODY})()")["keyframes"]] == [2, *before[1:]]
