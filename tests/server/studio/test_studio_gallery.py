"""The gallery and the queue of the studio in a browser."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from gallery_samples import STILL, Filled, filled

pytest.importorskip("playwright")

from playwright.sync_api import expect

expect.set_options(timeout=30_000)


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    with filled(tmp_path_factory.mktemp("gallery")) as site:
        yield site


def cards(page: Any) -> list[str]:
    """The prompts of the cards, in their order."""
    found: list[str] = page.locator(".tile-prompt").all_inner_texts()
    return found


def shows(page: Any, prompts: list[str]) -> None:
    page.wait_for_function(
        "prompts => [...document.querySelectorAll('.tile-prompt')].map((one) => one.textContent).join() === prompts",
        arg=",".join(prompts),
    )


def opens(page: Any, prompt: str) -> Any:
    return page.locator(".gallery").get_by_role("button", name=f"Open: {prompt}", exact=True)


def test_it_is_searched_filtered_and_live(site, looker):
    for number, prompt in enumerate(["a red apple", "a green apple", "a red bus"]):
        site.make(prompt, seed=number)
    page = looker.open()
    expect(page.locator(".tile")).to_have_count(3)
    page.get_by_label("Search the prompts").fill("apple RED")
    shows(page, ["a red apple"])
    site.make("a red apple too")
    expect(page.locator(".tile")).to_have_count(2)
    site.make("a blue bus")
    page.get_by_label("Search the prompts").fill("")
    expect(page.locator(".tile")).to_have_count(5)

    star = page.locator(".tile", has_text="a red bus").get_by_role("button", name="Add to favourites")
    star.focus()
    star.click()
    page.get_by_role("button", name="Favourites", exact=True).click()
    shows(page, ["a red bus"])
    phone = looker.open()
    phone.get_by_role("button", name="Favourites", exact=True).click()
    shows(phone, ["a red bus"])
    page.get_by_role("button", name="Remove from favourites").click()
    for one in (page, phone):
        expect(one.locator(".gallery")).to_contain_text("No video matches.")
    page.get_by_role("button", name="Show all videos").click()
    expect(page.locator(".tile")).to_have_count(5)
    page.get_by_label("Task").select_option("loop")
    expect(page.locator(".gallery")).to_contain_text("No video matches.")


def test_scrolling_reads_older_ones_without_a_gap(site, looker):
    for number in range(95):
        site.make(f"number {number}")
    page = looker.open()
    expect(page.locator(".tile").first).to_contain_text("number")
    assert page.locator(".tile").count() < 95
    page.wait_for_function(
        """() => {
            scrollTo(0, document.body.scrollHeight);
            return document.querySelectorAll(".tile").length === 95;
        }"""
    )
    assert sorted(cards(page)) == sorted(f"number {number}" for number in range(95))
    assert page.locator(".tile img[loading=lazy]").count() == 95


def test_keys_lead_through_the_cards_and_the_focus_stays_when_one_is_deleted(site, looker):
    for name in "abcd":
        site.make(name)
    page = looker.open()
    expect(page.locator(".tile")).to_have_count(4)
    order = cards(page)
    opens(page, order[0]).focus()
    page.keyboard.press("ArrowRight")
    expect(opens(page, order[1])).to_be_focused()
    expect(page.locator(".tile").nth(1).locator("video")).to_have_count(1)
    page.keyboard.press("f")
    expect(page.locator(".tile").nth(1).get_by_role("button", name="Remove from favourites")).to_be_visible()
    page.keyboard.press("Delete")
    expect(opens(page, order[2])).to_be_focused()
    shows(page, [order[0], *order[2:]])
    page.keyboard.press("End")
    expect(opens(page, order[3])).to_be_focused()
    page.keyboard.press("Enter")
    page.wait_for_function("() => location.search.includes('job=video_')")


def test_many_are_selected_deleted_and_brought_back(site, looker):
    for number in range(6):
        site.make(f"number {number}")
    page = looker.open()
    expect(page.locator(".tile")).to_have_count(6)
    order = cards(page)
    page.get_by_role("button", name="Select", exact=True).click()
    page.locator(".tile-open").nth(1).click()
    page.locator(".tile-open").nth(4).click(modifiers=["Shift"])
    bar = page.get_by_role("region", name="Selected videos")
    expect(bar).to_contain_text("4 selected")
    page.locator(".tile-open").nth(2).focus()
    page.keyboard.press("x")
    expect(bar).to_contain_text("3 selected")
    page.keyboard.press("Shift+ArrowLeft")
    expect(bar).to_contain_text("4 selected")
    bar.get_by_role("button", name="Delete").click()
    shows(page, [order[0], order[5]])
    page.locator(".toast").get_by_role("button", name="Undo").click()
    shows(page, order)
    page.reload()
    shows(page, order)


def test_what_failed_or_was_cancelled_is_folded_away(site, looker):
    site.submit("it fails")
    site.fail(site.begin())
    site.service.queue.cancel(site.submit("nobody wants it").id)
    page = looker.open()
    fold = page.get_by_text("2 videos were cancelled or failed")
    expect(fold).to_be_visible()
    expect(page.locator(".tile")).to_have_count(0)
    expect(page.get_by_role("button", name="it fails")).to_be_hidden()
    fold.click()
    page.get_by_role("button", name="Same again: it fails").click()
    expect(page.locator(".queue")).to_contain_text("it fails")
    expect(page.get_by_text("One video was cancelled or failed")).to_be_visible()


def test_the_queue_is_reordered_by_keys_and_drag_and_cancelled(site, looker):
    ids = {name: site.submit(name).id for name in ("runs", "one", "two", "three")}
    running = site.begin()
    site.reach(running, 3)
    page = looker.open()
    strip = page.locator(".queue-strip > li")

    def is_in_order(*names: str) -> None:
        page.wait_for_function(
            "names => [...document.querySelectorAll('.queue-prompt')].map((one) => one.textContent).join() === names",
            arg=",".join(names),
        )
        positions = [(site.service.queue.position(ids[name]), name) for name in names[1:]]
        assert positions == sorted(positions, key=lambda place: names.index(place[1]))

    is_in_order("runs", "one", "two", "three")
    expect(strip.first).to_contain_text("step 3 of 10")
    handle = page.get_by_role("button", name="Move: three")
    with page.expect_response("**/move"):
        handle.press("ArrowLeft")
    is_in_order("runs", "one", "three", "two")
    expect(handle).to_be_focused()
    box, target = handle.bounding_box(), strip.nth(1).bounding_box()
    page.mouse.move(box["x"] + 10, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(target["x"] + 20, target["y"] + 20, steps=5)
    with page.expect_response("**/move"):
        page.mouse.up()
    is_in_order("runs", "three", "one", "two")

    page.get_by_role("button", name="Cancel: one").click()
    is_in_order("runs", "three", "two")
    page.get_by_role("button", name="Cancel all").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel all").click()
    expect(strip).to_have_count(1)
    expect(strip).to_contain_text("Stopping after this step")
    assert site.service.queue.get(ids["two"]).status == "cancelled"


def test_what_waits_shows_what_it_is_made_from_until_there_is_a_preview(site, looker):
    part = {"name": "a.webp", "mimeType": "image/webp", "buffer": STILL}
    asked = looker.context.request.post(f"{site.url}v1/videos", multipart={"prompt": "a", "input_reference": part})
    assert asked.ok, asked.text()
    site.submit("from words alone")
    files = f"{site.url}v1/files"
    before = looker.context.request.get(files).json()
    page = looker.open()
    pictures = page.locator(".queue-strip > li .preview img")
    expect(pictures).to_have_count(1)
    page.wait_for_function("() => document.querySelector('.queue-strip .preview img').naturalWidth > 0")
    assert f"{asked.json()['id']}/frame?input=0" in pictures.get_attribute("src")
    assert looker.context.request.get(files).json() == before
    running = site.begin()
    assert running.id == asked.json()["id"]
    site.reach(running, 3)
    page.wait_for_function(
        "() => document.querySelector('.queue-strip .preview img')?.src.startsWith('data:image/webp')"
    )
    expect(pictures).to_have_count(1)


def test_videos_of_one_second_stand_as_the_api_lists_them(site, looker, monkeypatch):
    now = time.time()
    monkeypatch.setattr(site.service.queue, "_clock", lambda: now)
    for number in range(8):
        site.make(f"number {number}")
    listed = looker.context.request.get(f"{site.url}v1/videos").json()["data"]
    assert {video["created_at"] for video in listed} <= {int(now), int(now) + 1}
    page = looker.open()
    expect(page.locator(".tile")).to_have_count(8)
    shows(page, [video["prompt"] for video in listed])


def test_a_card_is_dragged_as_a_video(site, looker):
    made = site.make("drag me")
    page = looker.open()
    expect(page.locator(".tile")).to_have_count(1)
    dragged = page.evaluate(
        """() => {
            const data = new DataTransfer();
            const event = new DragEvent("dragstart", { bubbles: true, dataTransfer: data });
            document.querySelector(".tile").dispatchEvent(event);
            return data.getData("application/x-pusa-video");
        }"""
    )
    assert dragged == made


def test_clips_become_a_film_in_the_order_that_was_chosen(site, looker):
    ids = [site.make(name, seed=number) for number, name in enumerate(("one", "two", "three"))]
    page = looker.open()
    expect(page.locator(".tile")).to_have_count(3)
    page.get_by_role("button", name="Select", exact=True).click()
    for name in ("one", "two", "three"):
        page.get_by_role("button", name=f"Select: {name}", exact=True).click()
    page.get_by_role("button", name="Make a film").click()
    window = page.get_by_role("dialog")
    expect(window.locator(".film-clip")).to_have_count(3)
    order = [card.get_attribute("data-order") for card in window.locator(".film-clip").all()]
    assert sorted(order) == sorted(ids)
    first = window.get_by_role("button", name="Move clip 1")
    first.press("ArrowRight")
    expect(window.get_by_role("button", name="Move clip 2")).to_be_focused()
    expected = [order[1], order[0], order[2]]
    with page.expect_request("**/v1/films") as asked:
        window.get_by_role("button", name="Make a film").click()
    assert asked.value.post_data_json == {"videos": expected}
    page.wait_for_function(
        """() => {
            const film = document.querySelector("dialog video");
            return film.src.includes("/v1/files/file_") && film.duration > 6 && film.currentTime > 0;
        }"""
    )
    with page.expect_download() as download:
        window.get_by_role("button", name="Download the film").click()
    assert download.value.suggested_filename.endswith(".mp4")
    page.keyboard.press("Escape")
    expect(window).to_have_count(0)
