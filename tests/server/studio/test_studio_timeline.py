"""The timeline in a browser: what is dragged, typed and dropped on it is what the form sends."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from media_samples import encode, moving_gradient
from studio_samples import BODY, CARDS_REST, Running

from pusa import mini

PICTURES = Path(mini.__file__).parent / "pictures"
STAR, VIEW, WHALE = PICTURES / "star-start.png", PICTURES / "view.jpg", PICTURES / "whale-end.png"
FRAMES = 33  # of the model's video: latent frames 0..8
CELLS = 9

_STORE = """async change => {
    const base = document.querySelector('script[type=module][src]').src.replace('app.js', '')
    const store = await import(base + 'core/store.js')
    if (change) store.edit(change)
    return store.form.value
}"""
_DROP = """([target, x, y, files, video]) => {
    const transfer = new DataTransfer()
    for (const [name, type, data] of files) {
        const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0))
        transfer.items.add(new File([bytes], name, { type }))
    }
    if (video) transfer.setData('application/x-pusa-video', video)
    const element = document.querySelector(target)
    const init = { bubbles: true, cancelable: true, clientX: x, clientY: y, dataTransfer: transfer }
    for (const kind of ['dragenter', 'dragover', 'drop']) element.dispatchEvent(new DragEvent(kind, init))
}"""


class Board:
    """Somebody before the timeline."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        options = {"viewport": {"width": 1366, "height": 900}, "locale": "en-US", **context}
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector(".end-handle")
        self.url = url

    def form(self) -> dict[str, Any]:
        found: dict[str, Any] = self.page.evaluate(_STORE, None)
        return found

    def edit(self, **change: Any) -> None:
        self.page.evaluate(_STORE, change)

    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = self.page.evaluate(BODY)
        return found

    def item(self, path: Path | bytes, name: str, **values: Any) -> dict[str, Any]:
        """An item of the form whose file the server has."""
        content = path if isinstance(path, bytes) else path.read_bytes()
        part = {"name": name, "mimeType": "application/octet-stream", "buffer": content}
        answer = self.page.request.post(f"{self.url}v1/files", multipart={"file": part})
        assert answer.ok, answer.text()
        file = answer.json()
        own = {key: file[key] for key in ("kind", "width", "height", "seconds", "frames", "fps")}
        none = dict.fromkeys(("position", "noise", "crop", "start", "end", "frame"))
        return {"id": name, "source": {"file_id": file["id"]}, "name": name, **none, **own, **values}

    def pictures(self, *paths: Path, **form: Any) -> None:
        items = [self.item(path, f"{number}-{path.name}") for number, path in enumerate(paths)]
        self.edit(tab="images", items=items, **form)
        self.until("count => document.querySelectorAll('.card-picture').length === count", arg=len(paths))

    def card(self, number: int) -> Any:
        return self.page.get_by_role("slider", name=f"Picture {number}:")

    def cells(self) -> list[int]:
        """The latent frames of the pictures, in the order of the form."""
        placed = self.page.eval_on_selector_all(
            ".card-picture",
            "cards => Object.fromEntries(cards.map(card => [card.dataset.item, +card.dataset.cell]))",
        )
        return [placed[item["id"]] for item in self.form()["items"]]

    def point(self, cell: float, height: float = 0.5) -> tuple[float, float]:
        box = self.page.locator("[data-track]").bounding_box()
        count = self.page.locator(".end-handle").get_attribute("aria-valuenow")
        return box["x"] + box["width"] * (cell + 0.5) / int(count), box["y"] + box["height"] * height

    def drag(self, start: tuple[float, float], end: tuple[float, float], *, drop: bool = True) -> None:
        self.until(CARDS_REST)
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, steps=3)
        self.page.mouse.move(*end, steps=3)
        if drop:
            self.page.mouse.up()

    def drop(self, cell: int, *paths: Path, video: str = "") -> None:
        files = [(path.name, "image/png", base64.b64encode(path.read_bytes()).decode()) for path in paths]
        self.page.locator("[data-track]").scroll_into_view_if_needed()
        self.page.evaluate(_DROP, ["[data-track]", *self.point(cell), files, video])

    def until(self, condition: str, arg: Any = None) -> None:
        """Wait for a condition in JavaScript; the page's policy allows Playwright's own waiting no `eval`."""
        for _ in range(400):
            if self.page.evaluate(condition, arg):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never: {condition}")

    def positions(self) -> Any:
        return self.page.get_by_label("Positions", exact=True)


@pytest.fixture
def board(server: Running, browser: Any) -> Iterator[Board]:
    board = Board(browser, server.url)
    yield board
    board.context.close()
    assert not board.errors


def test_a_dragged_picture_is_sent_from_where_it_lies(board: Board) -> None:
    board.pictures(STAR, VIEW, WHALE)
    assert board.cells() == [0, 4, 8]
    board.drag(board.point(4), board.point(6), drop=False)
    assert board.positions().input_value() == "0,6,last", "in step while it is dragged"
    board.page.mouse.up()
    keyframes = board.body()["keyframes"]  # in the moment after the drag
    assert [frame["latent"] for frame in keyframes] == [0, 6, "last"]
    board.drag(board.point(6), board.point(2), drop=False)
    board.page.keyboard.press("Escape")
    board.page.mouse.up()
    assert board.cells() == [0, 6, 8], "Escape takes a drag back"
    board.drag(board.point(6), board.point(8))
    assert board.cells() == [0, 7, 8], "two pictures never share a latent frame"
    board.page.evaluate(_STORE.replace("if (change) store.edit(change)", "store.undo(); store.undo()"), None)
    assert board.cells() == [0, 4, 8], "a drag is one step of the history"


def test_noise_by_its_line_a_number_and_the_keyboard(board: Board) -> None:
    board.pictures(STAR, VIEW)
    assert board.card(1).get_attribute("aria-valuetext") == "Picture 1 at 0 s, noise 0.2"
    box = board.card(1).bounding_box()
    handle = board.card(1).locator("[data-handle]").bounding_box()
    middle = box["x"] + box["width"] / 2, handle["y"] + handle["height"] / 2
    board.drag(middle, (middle[0], middle[1] - 0.4 * box["height"]))
    assert board.form()["items"][0]["noise"] == pytest.approx(0.6)
    number = board.page.locator(".inspector input.number")
    number.fill("0.37")
    number.press("Tab")
    assert board.form()["items"][0]["noise"] == 0.37
    board.card(2).focus()
    for key in ("ArrowUp", "PageUp", "ArrowDown", "PageUp"):
        board.page.keyboard.press(key)
    assert board.card(2).get_attribute("aria-valuetext") == "Picture 2 at 1.81 s, noise 0.9"
    assert [frame["noise"] for frame in board.body()["keyframes"]] == [0.37, 0.9]


def test_the_keyboard_moves_between_pictures_and_moves_them(board: Board) -> None:
    board.pictures(STAR, VIEW, WHALE)
    board.card(1).focus()
    board.page.keyboard.press("ArrowRight")
    board.until("document.activeElement.ariaLabel?.startsWith('Picture 2:')")
    board.page.keyboard.press("Shift+ArrowRight")
    board.until("document.activeElement.dataset.cell === '5'")
    assert board.cells() == [0, 5, 8]
    board.page.keyboard.press("Delete")
    board.until("document.querySelectorAll('.card-picture').length === 2")
    board.until("document.activeElement.classList.contains('card-picture')")
    assert [item["name"] for item in board.form()["items"]] == [f"0-{STAR.name}", f"2-{WHALE.name}"]


def test_places_as_text_and_their_mistakes(board: Board) -> None:
    board.pictures(STAR, VIEW)
    field = board.positions()
    field.fill("0.5s, 20f")
    assert board.cells() == [2, 5]
    field.fill("0,20")
    problem = board.page.locator(".text-box.positions .field-problem")
    assert "Latent frame 20 is after the end: the last one is 8." in problem.inner_text()
    assert field.get_attribute("aria-invalid") == "true"
    assert board.cells() == [2, 5], "the drawing stays"
    board.edit(prompt="a star")
    asked = board.page.evaluate(_STORE, None)["seed"]
    board.page.click("#generate")
    board.page.locator(".problem", has_text="Latent frame 20 is after the end").get_by_role("button").first.wait_for()
    assert board.form()["seed"] == asked, "what is seen is not what would be sent: nothing is"
    field.focus()
    board.page.locator(".text-box").get_by_role("button", name="Use last").click()
    assert board.cells() == [0, 8]
    assert field.input_value() == "0,last"
    field.fill("0,first")
    assert "“first” is not a position" in problem.inner_text()
    field.press("Escape")
    assert field.input_value() == "0,last"
    field.fill("0,first")
    board.drag(board.point(8), board.point(6))
    assert field.input_value() == "0,6", "what is dragged puts a text right that was not understood"
    assert problem.count() == 0


def test_places_set_by_hand_stay_when_a_picture_comes(board: Board) -> None:
    board.pictures(STAR, VIEW)
    board.positions().fill("1,5")
    board.drop(7, WHALE)
    board.until("document.querySelectorAll('.card-picture').length === 3")
    assert board.cells() == [1, 5, 7]
    assert board.positions().input_value() == "1,5,7"


def test_a_picture_behind_the_end_of_a_shorter_clip_can_go_to_its_end(board: Board) -> None:
    board.pictures(STAR, VIEW)
    board.positions().fill("0,7")
    board.edit(frames=17)
    assert "Picture 2 stands at 7, after the end" in board.page.locator(".timeline-problems").inner_text()
    board.page.locator(".timeline-problems").get_by_role("button", name="Use last").click()
    assert board.cells() == [0, 4]


def test_the_first_picture_is_dropped_on_a_moment(board: Board) -> None:
    board.edit(tab="text")
    board.drop(4, VIEW)
    board.page.wait_for_selector(".card-picture")
    assert (board.form()["tab"], board.cells()) == ("images", [4])
    board.drop(4, WHALE)
    board.until("name => document.querySelector('.card-picture').ariaLabel.includes(name)", arg=WHALE.name)
    assert len(board.form()["items"]) == 1, "on a picture: in its place"


def test_the_end_is_dragged_and_moved_by_keys(board: Board) -> None:
    board.pictures(STAR, VIEW)
    handle = board.page.get_by_role("slider", name="Length")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    start = box["x"] + 9, box["y"] + box["height"] / 2
    width = board.page.locator("[data-track]").bounding_box()["width"] / CELLS
    board.drag(start, (start[0] - 3 * width, start[1]))
    assert board.form()["frames"] == FRAMES - 12
    assert handle.get_attribute("aria-valuetext") == "1.31 s, 21 frames, 6 latent frames"
    handle.focus()
    board.page.keyboard.press("ArrowRight")
    assert board.body()["num_frames"] == 25
    board.page.mouse.move(*start)
    board.drag((handle.bounding_box()["x"] + 9, start[1]), (1364, start[1]), drop=False)
    board.until("Number(document.querySelector('.end-handle').ariaValueNow) > 12")
    board.page.mouse.up()
    assert board.form()["frames"] > 45, "held at the edge of the page, it grows"


def test_a_long_clip_is_zoomed_and_the_wheel_scrolls_the_page(board: Board) -> None:
    board.pictures(STAR, VIEW, frames=1281)
    page = board.page
    assert page.get_by_role("scrollbar", name="Visible part").is_visible()
    assert (
        page.evaluate("parseFloat(getComputedStyle(document.querySelector('.track-frame')).getPropertyValue('--cell'))")
        >= 14
    )
    board.edit(frames=321)
    assert page.locator(".minimap").count() == 0, "81 latent frames fit a wide page"
    page.locator("[data-track]").scroll_into_view_if_needed()
    before = page.evaluate("[scrollY, document.querySelector('.track-frame').clientWidth]")
    page.mouse.move(*board.point(40))
    page.mouse.wheel(0, -300 if before[0] else 300)
    board.until("before => scrollY !== before", arg=before[0])
    assert page.evaluate("document.querySelector('.track-frame').clientWidth") == before[1]
    page.mouse.move(*board.point(40))
    page.keyboard.down("Control")
    page.mouse.wheel(0, -400)
    page.keyboard.up("Control")
    page.wait_for_selector(".minimap")
    assert page.evaluate("document.querySelector('.track-frame').clientWidth") > 2 * before[1]
    page.get_by_role("scrollbar", name="Visible part").press("End")
    board.until(
        "() => { const track = document.querySelector('.timeline-scroll');"
        " return track.scrollLeft + track.clientWidth >= track.scrollWidth - 1 }"
    )
    page.get_by_role("button", name="Show all").click()
    board.until("document.querySelector('.minimap') === null")


def test_latent_frames_of_a_clip_are_kept_and_released(board: Board) -> None:
    clip = board.item(encode(moving_gradient(40), codec="mpeg4", pixels="yuv420p", fps=16), "clip.mkv")
    board.edit(tab="video", mode="complete", clips=[clip])
    page = board.page
    kept = page.locator(".kept-cells [aria-selected=true]")
    assert kept.count() == 4
    page.get_by_role("option", name="latent frame 6:").click()
    assert board.body()["cond_positions"] == ["0", "1", "2", "3", "6"]
    page.keyboard.press("ArrowLeft")
    board.until("document.activeElement.dataset.cell === '5'")
    page.keyboard.press("Enter")
    page.keyboard.press("PageUp")
    assert page.get_by_role("option", name="0.81 s, latent frame 4").count() == 1
    assert page.locator("[data-cell='5'][role=option]").get_attribute("aria-label").endswith("kept, noise 0.7")
    page.keyboard.press("Delete")
    assert board.form()["keptPositions"] == "0,1,2,3,6"
    board.positions().fill("0,last")
    assert kept.count() == 2


def test_a_third_of_a_transition_is_new(board: Board) -> None:
    clip = encode(moving_gradient(40), codec="mpeg4", pixels="yuv420p", fps=16)
    board.edit(tab="video", mode="transition", clips=[board.item(clip, "one.mkv"), board.item(clip, "two.mkv")])
    widths = board.page.eval_on_selector_all(".part", "parts => parts.map(part => part.clientWidth)")
    assert widths[1] == pytest.approx(sum(widths) / 3, abs=2)
    assert board.body()["overlap"] == 9, "what is seen is what is sent"


def test_a_clip_that_no_browser_plays_is_trimmed_by_its_frames(board: Board) -> None:
    clip = board.item(encode(moving_gradient(48), fps=16), "camera.mkv")  # ffv1
    board.edit(tab="video", mode="extend", clips=[clip])
    page = board.page
    board.until("document.querySelector('.monitor img').naturalWidth > 0")
    page.get_by_role("button", name="Play", exact=True).click()
    page.wait_for_selector(".monitor-drawn")
    page.wait_for_selector(".clip-playhead")
    assert page.get_by_text("cannot").count() == 0
    start = page.get_by_role("slider", name="Start of the part")
    start.focus()
    page.keyboard.press("PageUp")
    page.keyboard.press("ArrowRight")
    assert board.body()["input_reference"] == [{"file_id": clip["source"]["file_id"], "start": 1.063}]
    strip = page.locator(".clip-strip").bounding_box()
    end = page.get_by_role("slider", name="End of the part").bounding_box()
    y = end["y"] + end["height"] / 2
    board.drag((end["x"] + 24, y), (strip["x"] + strip["width"] * 0.75, y))
    assert board.form()["clips"][0]["end"] == pytest.approx(2.25, abs=0.07)
    page.get_by_label("Start", exact=True).fill("0.5")
    page.keyboard.press("Tab")
    assert board.form()["clips"][0]["start"] == 0.5


def test_numbers_are_written_as_in_the_visitors_language_and_read_both_ways(server: Running, browser: Any) -> None:
    board = Board(browser, server.url, locale="fr-FR")
    clip = board.item(encode(moving_gradient(33), codec="mpeg4", pixels="yuv420p", fps=16), "clip.mkv")
    board.edit(tab="video", mode="complete", clips=[clip])
    page = board.page
    start, end = page.get_by_label("Début", exact=True), page.get_by_label("Fin", exact=True)
    assert end.input_value() == "2,06"
    for text, seconds in (("0,5", 0.5), ("0.25", 0.25)):
        start.fill(text)
        start.blur()
        assert board.form()["clips"][0]["start"] == seconds
    assert start.input_value() == "0,25"
    start.press("ArrowUp")
    assert board.form()["clips"][0]["start"] == pytest.approx(0.3, abs=0.04)
    start.fill("")
    start.blur()
    assert board.form()["clips"][0]["start"] is None
    page.locator(".kept-cell").nth(1).focus()
    noise = page.locator(".noise-field .number")
    assert noise.input_value() == "0,3"
    noise.fill("0,45")
    assert board.body()["noise_multipliers"][1] == 0.45
    board.context.close()
    assert not board.errors


def test_a_clip_of_few_frames_keeps_those_that_it_has(board: Board) -> None:
    clip = board.item(encode(moving_gradient(6), codec="mpeg4", pixels="yuv420p", fps=16), "short.mkv")
    board.edit(tab="video", mode="complete", clips=[clip], prompt="a cat")
    page = board.page
    assert page.locator(".kept-cells [aria-selected=true]").count() == 2
    assert board.positions().input_value() == "0,1"
    assert board.body()["cond_positions"] == ["0", "1"]
    board.positions().fill("0,1,5")
    board.positions().blur()
    page.click("#generate")
    page.locator(".problem").get_by_role("button", name="Use last").click()
    assert board.body()["cond_positions"] == ["0", "1"]
    board.positions().fill("")
    board.positions().blur()
    assert board.form()["keptPositions"] is None


def test_any_frame_of_a_result_becomes_a_picture(board: Board) -> None:
    page = board.page
    video = page.request.post(
        f"{board.url}v1/videos", data={"prompt": "a star", "seed": 3, "num_inference_steps": 2}
    ).json()
    for _ in range(200):
        if page.request.get(f"{board.url}v1/videos/{video['id']}").json()["status"] == "completed":
            break
        page.wait_for_timeout(50)
    board.edit(tab="images")
    board.drop(3, video=video["id"])
    dialog = page.get_by_role("dialog", name="Choose a frame")
    dialog.wait_for()
    board.until("document.querySelector('.frame-view img').naturalWidth > 0")
    for key in (".", ".", ">", ","):
        page.keyboard.press(key)
    assert "Frame 11 of 32" in dialog.inner_text()
    dialog.get_by_role("button", name="Use this frame").click()
    page.wait_for_selector(".card-picture")
    (keyframe,) = board.body()["keyframes"]
    assert (keyframe["latent"], keyframe["reference"]["frame"]) == (3, 11)
    board.until("document.querySelector('.card-picture img').naturalWidth > 0")


def test_a_crop_is_never_silent_and_is_made_by_hand(board: Board) -> None:
    page = board.page
    board.edit(tab="images", shape="96x64", items=[board.item(VIEW, "view.jpg")])
    assert page.locator(".card-crop.is-automatic").count() == 1
    board.card(1).focus()
    assert "33 % is cut off" in page.locator(".inspector").inner_text()
    page.locator(".inspector").get_by_role("button", name="Crop", exact=True).click()
    frame = page.get_by_role("slider", name="Crop frame")
    frame.focus()
    for key in ("PageDown", "Shift+ArrowUp", "Shift+ArrowUp", "Shift+ArrowUp", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    page.get_by_role("button", name="Use this crop").click()
    x, y, width, height = board.form()["items"][0]["crop"]
    assert (x, y) == (0, 0)
    assert width / height == pytest.approx(1.5, abs=0.001)
    assert page.locator(".inspector").get_by_role("button", name="Cropped").count() == 1
    assert page.locator(".card-crop:not(.is-automatic)").count() == 1
    assert board.body()["keyframes"][0]["reference"]["crop"] == [x, y, width, height]


def test_fingers_move_pictures_scroll_the_page_and_zoom(server: Running, browser: Any) -> None:
    board = Board(browser, server.url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    board.pictures(STAR, VIEW, frames=81)
    fingers = board.context.new_cdp_session(board.page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        places = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        fingers.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": places})

    board.page.locator("[data-track]").scroll_into_view_if_needed()
    (x, y), (to, _) = board.point(20, 0.9), board.point(10, 0.9)
    touch("Start", (x, y))
    for step in range(1, 9):
        touch("Move", (x + (to - x) * step / 8, y))
    touch("End")
    assert board.cells() == [0, 10]
    board.page.locator("[data-track]").evaluate("track => track.scrollIntoView({ block: 'center' })")
    scrolled = board.page.evaluate("scrollY")
    x, y = board.point(0, 0.8)
    touch("Start", (x, y))
    for step in range(1, 13):
        touch("Move", (x, y + 15 * step))
    touch("End")
    board.until("before => scrollY < before - 50", scrolled)
    assert board.cells() == [0, 10]
    assert [one["noise"] for one in board.form()["items"]] == [None, None], "a swipe over a picture changes nothing"
    board.page.locator("[data-track]").evaluate("track => track.scrollIntoView({ block: 'center' })")
    x, y = board.point(5, 0.2)
    touch("Start", (x - 20, y), (x + 20, y))
    for step in range(1, 9):
        touch("Move", (x - 20 - 8 * step, y), (x + 20 + 8 * step, y))
    touch("End")
    board.until("document.querySelector('.minimap') !== null")
    assert board.cells() == [0, 10]
    board.context.close()
    assert not board.errors


@pytest.mark.parametrize("language", ["en", "fr", "zh"])
def test_every_word_of_the_timeline_is_there(server: Running, browser: Any, language: str) -> None:
    board = Board(browser, server.url, locale=language, viewport={"width": 390, "height": 844})
    clip = encode(moving_gradient(40), codec="mpeg4", pixels="yuv420p", fps=16)
    clips = [board.item(clip, "one.mkv"), board.item(clip, "two.mkv")]
    pictures = [board.item(STAR, "a.png", position="0"), board.item(VIEW, "b.jpg", position="30")]
    states = [{"tab": tab, "items": pictures} for tab in ("image", "images", "text")]
    states += [{"tab": "video", "mode": mode, "clips": clips} for mode in ("complete", "extend", "transition", "loop")]
    for state in states:
        board.edit(**state)
        found = board.page.evaluate(
            "document.querySelector('.timeline').outerHTML.match(/timeline\\.[a-z_]+(\\.[a-z_]+)?/g) ?? []"
        )
        assert not found, state
        assert board.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state
    board.context.close()
    assert not board.errors
