"""The form of the studio in a real browser: what is seen is what is sent, and nothing of it is lost."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studio_samples import Running, Visitor, studio

pytest.importorskip("playwright")

from playwright.sync_api import expect

from pusa.server.studio import examples

PICTURES, CLIPS = examples.PICTURES, examples.CLIPS
STAR, END, VIEW = PICTURES / "star-start.png", PICTURES / "star-end.png", PICTURES / "view.jpg"
APPLE, BUS = CLIPS / "apple.mp4", CLIPS / "bus.mp4"


@pytest.fixture
def visitor(browser: Any, server: Running) -> Iterator[Visitor]:
    visiting = Visitor(browser, server)
    visiting.open()
    yield visiting
    visiting.close()


def plain(file: Path, folder: Path) -> Path:
    """Copy a clip without the request inside, so that the page does not ask about it."""
    from pusa import media

    target = folder / f"plain-{file.name}"
    frames = media.read_video(file)
    with media.VideoWriter(target, width=frames.shape[2], height=frames.shape[1], fps=16.0, metadata={}) as writer:
        writer.write(frames)
    return target


def edit_button(visitor: Visitor) -> Any:
    return visitor.page.locator(".stage").get_by_role("button", name="Edit", exact=True)


# ---- what is seen is what is sent ------------------------------------------------------------------------------------


def test_a_picture_and_words_with_all_knobs(visitor: Visitor) -> None:
    visitor.choose(VIEW)
    visitor.write("prompt", "a photo, the camera zooms out")
    visitor.write("seconds", "1,06")
    visitor.write("seed", "42")
    visitor.page.click("#open-control")
    visitor.page.click("[data-value=creative]")
    visitor.write("noise", "0.35")
    visitor.write("steps", "3")
    visitor.page.click("#open-advanced")
    visitor.write("negative", "rain")
    request = visitor.request(visitor.generate())
    wanted = {"preset": "creative", "seed": 42, "negative_prompt": "rain", "steps": 3, "frames": 17}
    assert {name: request[name] for name in wanted} == wanted
    condition = request["conditions"][0]
    assert (condition["kind"], condition["positions"], condition["noise"]) == ("image", [0], [0.35])


def test_many_pictures_are_spread_and_a_third_leaves_hand_set_places_alone(visitor: Visitor) -> None:
    visitor.tab("images")
    visitor.choose(STAR, END)
    visitor.write("prompt", "a star in autumn")
    places = [condition["positions"] for condition in visitor.request(visitor.generate())["conditions"]]
    assert places == [[0], ["last"]]
    visitor.page.evaluate(
        """async () => {
            const base = document.querySelector('script[type=module][src]').src.replace('app.js', '')
            const { form, editItem } = await import(base + 'core/store.js')
            editItem(form.value.items[0].id, { position: '2' })
        }"""
    )
    visitor.choose(VIEW)
    places = [condition["positions"] for condition in visitor.request(visitor.generate())["conditions"]]
    assert places[0] == [2]
    assert places[2] == ["last"]


@pytest.mark.parametrize("mode", ["complete", "extend", "transition", "loop"])
def test_a_video_is_completed_extended_joined_or_looped(visitor: Visitor, tmp_path: Path, mode: str) -> None:
    visitor.tab("video", mode)
    if mode != "loop":
        visitor.choose(plain(APPLE, tmp_path))
    if mode == "transition":
        visitor.choose(plain(BUS, tmp_path))
    visitor.write("prompt", "a red apple bounces on the grass")
    request = visitor.request(visitor.generate())
    assert request["task"] == {"complete": "generate"}.get(mode, mode)
    if mode == "complete":
        assert request["conditions"][0]["positions"] == [0, 1, 2, 3]


def test_variants_have_a_seed_each_and_a_batch_in_common(visitor: Visitor) -> None:
    visitor.tab("text")
    visitor.write("prompt", "a bus slides to the right in the desert")
    visitor.write("seed", "7")
    visitor.page.select_option("#variants", label="3")
    before = {job.id for job in visitor.jobs()}
    visitor.page.click("#generate")
    visitor.page.wait_for_function("() => document.querySelectorAll('.variant').length === 3")
    visitor.page.wait_for_function("() => new URLSearchParams(location.search).getAll('job').length === 3")
    made = [job for job in visitor.jobs() if job.id not in before]
    assert sorted(job.request["seed"] for job in made) == [7, 8, 9]
    assert len({job.batch for job in made}) == 1
    assert made[0].batch


def test_an_unlocked_seed_is_drawn_shown_and_sent(visitor: Visitor) -> None:
    visitor.tab("text")
    visitor.write("prompt", "a cat")
    first = visitor.request(visitor.generate())["seed"]
    assert visitor.page.input_value("#seed") == str(first)
    assert visitor.request(visitor.generate())["seed"] != first
    visitor.page.click(".lock")
    kept = int(visitor.page.input_value("#seed"))
    assert visitor.request(visitor.generate())["seed"] == kept


def test_a_press_is_seen_before_the_server_has_answered(visitor: Visitor) -> None:
    held: list[Any] = []
    visitor.page.route("**/v1/videos", lambda route: held.append(route))
    visitor.tab("text")
    visitor.write("prompt", "a slow server")
    milliseconds = visitor.page.evaluate(
        """() => new Promise((resolve) => {
            const start = performance.now();
            const look = () => document.querySelector('.stage').innerText.includes('a slow server')
                ? resolve(performance.now() - start) : requestAnimationFrame(look);
            document.querySelector('#generate').click();
            look();
        })"""
    )
    assert milliseconds < 1000  # 150 on a machine that has nothing else to do
    visitor.page.wait_for_timeout(0)
    assert len(held) == 1
    held[0].continue_()
    visitor.new_job(set())


def test_an_emptied_number_returns_to_its_default_and_a_wrong_one_is_told(visitor: Visitor) -> None:
    visitor.page.click("#open-control")
    field = visitor.page.locator("#steps")
    expect(field).to_have_value("10")
    visitor.write("steps", "4")
    assert visitor.form()["steps"] == 4
    visitor.write("steps", "")
    expect(field).to_have_value("10")
    assert visitor.form()["steps"] is None
    visitor.page.fill("#steps", "4000")
    expect(visitor.page.locator("#steps-problem")).to_contain_text("1")
    field.blur()
    assert visitor.form()["steps"] == int(field.input_value()) <= 200
    visitor.page.fill("#steps", "many")
    expect(visitor.page.locator("#steps-problem")).to_have_text("Write a whole number.")


def test_what_is_missing_is_an_alert_with_a_way_out(visitor: Visitor) -> None:
    visitor.page.click("#generate")
    expect(visitor.page.get_by_role("alert")).to_contain_text("Choose a picture first")
    visitor.choose(VIEW)
    expect(visitor.page.get_by_role("alert")).to_have_count(0)
    visitor.tab("images")
    visitor.choose(STAR)
    visitor.write("prompt", "a star")
    visitor.page.evaluate(
        """async () => {
            const base = document.querySelector('script[type=module][src]').src.replace('app.js', '')
            const { form, editItem } = await import(base + 'core/store.js')
            editItem(form.value.items[1].id, { position: '20' })
        }"""
    )
    visitor.page.click("#generate")
    visitor.page.get_by_role("alert").get_by_role("button", name="Use last").click()
    places = [condition["positions"] for condition in visitor.request(visitor.generate())["conditions"]]
    assert places == [[0], ["last"]]


def test_a_file_that_is_no_picture_is_refused_in_words(visitor: Visitor, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    visitor.page.locator(".item-place input[type=file]").set_input_files(broken)
    expect(visitor.page.get_by_role("alert")).to_contain_text("broken.png")
    assert str(tmp_path) not in visitor.page.inner_text("body")
    assert visitor.form().get("items", []) == []


# ---- nothing is lost -------------------------------------------------------------------------------------------------


def test_a_file_beside_the_form_is_taken_and_one_on_its_way_outlives_a_lost_connection(visitor: Visitor) -> None:
    visitor.context.set_offline(True)
    visitor.page.locator(".item-place input[type=file]").first.set_input_files(VIEW)
    visitor.shows("The server does not answer.")
    visitor.context.set_offline(False)
    expect(visitor.page.locator(".item-card")).to_have_count(1)
    visitor.tab("images")
    visitor.page.evaluate(
        """data => {
            const transfer = new DataTransfer()
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0))
            transfer.items.add(new File([bytes], 'view.jpg', { type: 'image/jpeg' }))
            const init = { bubbles: true, cancelable: true, dataTransfer: transfer }
            const stage = document.querySelector('.workbench').lastElementChild
            const drop = new DragEvent('drop', init)
            stage.dispatchEvent(drop)
            if (!drop.defaultPrevented) throw new Error('the browser would leave the page')
        }""",
        base64.b64encode(VIEW.read_bytes()).decode(),
    )
    expect(visitor.page.locator(".item-card")).to_have_count(2)


def test_the_form_survives_a_reload_another_language_and_undo(visitor: Visitor) -> None:
    visitor.tab("images")
    visitor.choose(STAR, END)
    visitor.write("prompt", "a star in autumn")
    before = visitor.form()
    visitor.page.get_by_role("button", name="Language").click()
    visitor.page.get_by_role("menuitemradio", name="Français").click()
    expect(visitor.page.locator("#generate")).to_have_text("Générer")
    assert visitor.form() == before
    visitor.page.reload()
    visitor.ready()
    expect(visitor.page.locator("#generate")).to_have_text("Générer")
    expect(visitor.page.locator("#prompt")).to_have_value("a star in autumn")
    expect(visitor.page.locator(".item-card")).to_have_count(2)
    visitor.write("prompt", "")
    visitor.page.locator("#prompt").focus()
    visitor.page.keyboard.press("Control+z")
    expect(visitor.page.locator("#prompt")).to_have_value("a star in autumn")
    visitor.page.keyboard.press("Control+Shift+z")
    expect(visitor.page.locator("#prompt")).to_have_value("")


def test_what_is_pressed_while_the_server_is_away_is_sent_once_after_asking(visitor: Visitor) -> None:
    visitor.tab("text")
    visitor.write("prompt", "a patient cat")
    before = {job.id for job in visitor.jobs()}
    visitor.context.set_offline(True)
    visitor.page.click("#generate")
    visitor.shows("The server does not answer.")
    assert {job.id for job in visitor.jobs()} == before
    visitor.context.set_offline(False)
    visitor.page.get_by_role("button", name="Make it now").click()
    visitor.page.wait_for_function("() => !document.querySelector('.banner')")
    visitor.shows("a patient cat")
    visitor.new_job(before)
    assert len(visitor.jobs()) == len(before) + 1
    assert visitor.page.evaluate("() => localStorage['pusa.unsent'] ?? null") is None


def test_a_restart_of_the_server_loses_nothing(browser: Any, tmp_path: Path) -> None:
    with studio(tmp_path) as running:
        visitor = Visitor(browser, running)
        visitor.open()
        visitor.choose(VIEW)
        visitor.write("prompt", "a photo, the camera zooms in")
        stored = visitor.context.storage_state()
        port = int(running.url.rstrip("/").rpartition(":")[2])
        visitor.close()
    with studio(tmp_path, port=port) as running:
        visitor = Visitor(browser, running, storage_state=stored)
        visitor.open()
        expect(visitor.page.locator("#prompt")).to_have_value("a photo, the camera zooms in")
        visitor.page.wait_for_function("() => document.querySelector('.item-card img').naturalWidth > 0")
        assert len(visitor.request(visitor.generate())["conditions"]) == 1
        visitor.close()


def test_a_browser_that_stores_nothing_shows_a_page_that_works(browser: Any, server: Running) -> None:
    visitor = Visitor(browser, server)
    visitor.context.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('off', 'SecurityError') } })"
    )
    visitor.open()
    visitor.shows("This browser keeps nothing")
    visitor.tab("text")
    visitor.write("prompt", "a cat that is forgotten")
    assert visitor.generate().prompt == "a cat that is forgotten"
    visitor.close()


# ---- from what there is ----------------------------------------------------------------------------------------------


def test_an_example_fills_the_form_and_its_play_button_makes_it(visitor: Visitor) -> None:
    visitor.tab("images")
    visitor.page.click("[data-example=star-back] .example-fill")
    expect(visitor.page.locator(".item-card")).to_have_count(3)
    assert visitor.form()["preset"] == "faithful"
    assert visitor.page.input_value("#prompt") == "a star in autumn"
    visitor.tab("image")
    before = {job.id for job in visitor.jobs()}
    visitor.page.click("[data-example=penguin] .example-make")
    request = visitor.request(visitor.new_job(before))
    assert request["prompt"] == "a penguin slides to the right at the beach"
    assert request["conditions"][0]["noise"] == [0]
    assert visitor.page.input_value("#prompt") == request["prompt"]


def test_edit_takes_all_of_a_result_back_into_the_form(visitor: Visitor) -> None:
    visitor.tab("images")
    visitor.choose(STAR, END)
    visitor.write("prompt", "a star in autumn")
    visitor.write("seed", "11")
    first = visitor.generate()
    form = visitor.form()
    edit_button(visitor).wait_for()
    visitor.page.get_by_role("button", name="Start anew").click()
    assert visitor.form()["items"] == []
    edit_button(visitor).click()
    expect(visitor.page.locator("#prompt")).to_have_value("a star in autumn")
    expect(visitor.page.locator(".item-card")).to_have_count(2)
    found = visitor.form()
    different = {name for name in form if name not in ("items", "seedLocked") and form[name] != found[name]}
    assert different == set()
    again = visitor.request(visitor.generate())
    for name in ("prompt", "seed", "width", "height", "frames", "preset", "steps", "guidance"):
        assert again[name] == visitor.request(first)[name], name


def test_a_file_of_ours_offers_its_settings(visitor: Visitor) -> None:
    visitor.page.locator(".item-place input[type=file]").set_input_files(APPLE)
    visitor.page.get_by_role("button", name="Take over all settings").click()
    expect(visitor.page.locator("#prompt")).to_have_value("a red apple bounces on the grass")
    expect(visitor.page.locator("#tab-text")).to_have_attribute("aria-selected", "true")
    assert visitor.form()["seed"] == 0
    assert visitor.form()["seedLocked"] is True


def test_settings_and_prompts_of_ones_own(visitor: Visitor) -> None:
    visitor.tab("text")
    visitor.write("prompt", "a cat for the list")
    visitor.page.click("#open-control")
    visitor.write("steps", "5")
    visitor.generate()
    visitor.page.get_by_role("button", name="My settings").click()
    visitor.page.fill("#saved-name", "quick")
    visitor.page.keyboard.press("Enter")
    visitor.page.get_by_role("button", name="Close").last.click()
    visitor.page.get_by_role("button", name="Start anew").click()
    visitor.page.reload()
    visitor.ready()
    visitor.page.get_by_role("button", name="Prompts you used").click()
    visitor.page.locator("dialog").get_by_role("button", name="a cat for the list").click()
    visitor.page.get_by_role("button", name="My settings").click()
    visitor.page.get_by_role("button", name="Use", exact=True).click()
    form = visitor.form()
    assert (form["steps"], form["prompt"], form["tab"]) == (5, "a cat for the list", "text")


def test_unknown_words_are_named_with_the_nearest_and_exchanged(visitor: Visitor) -> None:
    visitor.tab("text")
    visitor.page.fill("#prompt", "a yacht slides to the left")
    visitor.shows("mini does not know “yacht”.")
    visitor.page.get_by_role("button", name="sailboat").click()
    expect(visitor.page.locator("#prompt")).to_have_value("a sailboat slides to the left")
    visitor.page.wait_for_function("() => !document.querySelector('.prompt-hint')")
    visitor.page.get_by_role("button", name="Words that mini knows").click()
    visitor.page.get_by_role("button", name="under the sea").click()
    assert visitor.page.input_value("#prompt") == "a sailboat slides to the left under the sea"


def test_an_enhanced_prompt_is_shown_before_it_is_used(browser: Any, server: Running) -> None:
    visitor = Visitor(browser, server)

    def with_enhancer(route: Any) -> None:
        found = route.fetch().json()
        route.fulfill(json={**found, "data": [{**found["data"][0], "enhancer": True}]})

    visitor.page.route("**/v1/models", with_enhancer)
    visitor.page.route("**/v1/prompts/enhance", lambda route: route.fulfill(json={"prompt": "a red cat, at night"}))
    visitor.open()
    visitor.tab("text")
    visitor.write("prompt", "un chat")
    visitor.page.get_by_role("button", name="Translate to English").click()
    visitor.shows("a red cat, at night")
    assert visitor.page.input_value("#prompt") == "un chat"
    visitor.page.get_by_role("button", name="Use it").click()
    assert visitor.page.input_value("#prompt") == "a red cat, at night"
    visitor.close()


# ---- for everyone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("language", "button", "told"),
    [
        ("fr-FR", "Générer", "Choisissez d’abord une image"),
        ("zh-CN", "生成", "请先选择图片"),
        ("de-DE", "Generate", "Choose"),
    ],
)
def test_the_page_speaks_the_browsers_language(
    browser: Any, server: Running, language: str, button: str, told: str
) -> None:
    visitor = Visitor(browser, server, locale=language)
    page = visitor.open()
    assert page.inner_text("#generate").strip() == button
    page.click("#generate")
    expect(page.get_by_role("alert")).to_contain_text(told)
    visitor.close()


@pytest.mark.parametrize(("width", "height"), [(1366, 768), (390, 844)])
def test_what_matters_is_above_the_fold_and_nothing_scrolls_sideways(
    browser: Any, server: Running, width: int, height: int
) -> None:
    visitor = Visitor(browser, server, viewport={"width": width, "height": height}, has_touch=width < 500)
    page = visitor.open()
    for tab in ("image", "images", "video", "text"):
        visitor.tab(tab)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width, tab
        needed = ["#tab", "#prompt", "#generate", *([] if tab == "text" else [".item-place"])]
        for css in needed:
            box = page.locator(css).first.bounding_box()
            assert box["y"] >= 0, (tab, css)
            assert box["y"] + box["height"] <= height, (tab, css)
    visitor.close()


def test_generate_is_reached_by_few_tabs_and_every_stop_has_a_name(visitor: Visitor) -> None:
    page = visitor.page
    page.evaluate("() => document.activeElement?.blur()")
    names = []
    for _ in range(15):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate(
                """() => { const e = document.activeElement; return [e.id, e.getAttribute('aria-label') || e.title
                || e.labels?.[0]?.textContent || e.textContent.trim()].map(String) }"""
            )
        )
        if names[-1][0] == "generate":
            break
    assert names[-1][0] == "generate", json.dumps(names)
    assert len(names) < 15
    assert [one for one in names if not one[1]] == []
    page.keyboard.press("Shift+Tab")
    page.locator("#tab-image").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-images")).to_be_focused()
    assert visitor.form()["tab"] == "images"


def test_a_key_is_asked_for_and_the_session_ends(browser: Any, tmp_path: Path) -> None:
    with studio(tmp_path, api_keys=["a-key-of-somebody"]) as running:
        visitor = Visitor(browser, running)
        visitor.page.goto(running.url)
        visitor.page.fill("#key", "wrong")
        visitor.page.keyboard.press("Enter")
        visitor.shows("The server does not know this key.")
        visitor.page.fill("#key", "a-key-of-somebody")
        visitor.page.keyboard.press("Enter")
        visitor.ready()
        visitor.page.reload()
        visitor.ready()
        visitor.page.get_by_role("button", name="Log out").click()
        expect(visitor.page.locator("#key")).to_be_visible()
        visitor.close()


def test_while_the_model_loads_the_page_is_there_and_takes_jobs(browser: Any, tmp_path: Path) -> None:
    with studio(tmp_path, "studio_engine:SlowToLoad") as running:
        visitor = Visitor(browser, running, patience_seconds=90)
        visitor.open()
        visitor.tab("text")
        visitor.write("prompt", "a cat")
        visitor.page.wait_for_selector(".model-state.loading")
        visitor.generate()
        visitor.shows("as soon as the model is loaded")
        visitor.page.wait_for_selector(".model-state.ready")
        visitor.close()
