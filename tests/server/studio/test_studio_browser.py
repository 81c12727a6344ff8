"""The studio in a real browser: what a creator does, and what the page then shows. The engine is a stand-in."""

from pathlib import Path

import pytest
from PIL import Image
from studio_samples import Visitor, studio

pytest.importorskip("gradio")
pytest.importorskip("playwright")

from pusa import media
from pusa.server.studio import examples

pytestmark = pytest.mark.slow  # together two minutes, and only where a browser is

PICTURES, CLIPS = examples.PICTURES, examples.CLIPS


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    with studio(tmp_path_factory.mktemp("studio")) as running:
        yield running


@pytest.fixture
def visitor(browser, server):
    visiting = Visitor(browser, server.url)
    visiting.open()
    yield visiting
    elsewhere, errors = visiting.elsewhere, visiting.errors
    visiting.close()
    assert elsewhere == [], "a request left the machine"
    assert errors == []


# ---- every tab -------------------------------------------------------------------------------------------------------


def test_one_click_on_the_landing_page_makes_a_video_that_plays(visitor, server):
    job = visitor.made(lambda: visitor.page.click("[data-act='empty.action']"))
    settings = visitor.settings()
    assert settings["Prompt"] == "a penguin slides to the right at the beach"
    assert settings["Given"] == "picture at 0, noise 0"
    assert settings["Size"] == "96x96"
    assert visitor.field("prompt").input_value() == settings["Prompt"]  # the form shows what was made
    assert server.service.queue.get(job).source == "studio"
    visitor.page.get_by_role("tab", name="Contact sheet").click()
    visitor.page.wait_for_function("document.querySelector('.st-sheet')?.naturalWidth > 300")


def test_an_uploaded_picture_becomes_a_video(visitor, server):
    visitor.page.set_input_files("#image input[type=file]", PICTURES / "view.jpg")
    visitor.page.wait_for_selector(".tl-cell.is-given img")
    visitor.write("prompt", "a photo, the camera zooms out")
    job = visitor.made(visitor.generate)
    condition = server.service.queue.get(job).request["conditions"][0]
    assert (condition["positions"], condition["noise"]) == ([0], [0.2])


def test_three_pictures_are_spread_over_the_clip(visitor, server):
    visitor.tab("Multi-image")
    assert visitor.field("positions").input_value() == "0,last"
    files = [PICTURES / name for name in ("star-start.png", "star-end.png", "penguin.png")]
    visitor.page.set_input_files("#images input[type=file]", files)
    visitor.page.wait_for_function("document.querySelectorAll('.tl-cell.is-given img').length === 3")
    assert visitor.field("positions").input_value() == "0,4,last"
    assert visitor.field("multipliers").input_value() == "0.2,0.5,0.5"
    visitor.write("prompt", "a star in autumn")
    job = visitor.made(visitor.generate)
    conditions = server.service.queue.get(job).request["conditions"]
    assert [condition["positions"] for condition in conditions] == [[0], [4], ["last"]]


@pytest.mark.parametrize("mode", ["Complete", "Extend", "Transition", "Loop"])
def test_a_video_is_completed_extended_joined_or_looped(visitor, server, mode):
    visitor.tab("Video to video")
    visitor.page.locator("#mode label", has_text=mode).click()
    if mode == "Loop":
        visitor.page.wait_for_selector("#loop-image", state="visible")
    else:
        visitor.page.set_input_files("#video input[type=file]", CLIPS / "apple.mp4")
        visitor.page.wait_for_selector(".tl-cell img")  # the browser has drawn its frames
    if mode == "Transition":
        visitor.page.set_input_files("#second-video input[type=file]", CLIPS / "bus.mp4")
        visitor.page.wait_for_selector("#second-video video")
    visitor.write("prompt", "a red apple bounces on the grass")
    job = visitor.made(visitor.generate)
    request = server.service.queue.get(job).request
    assert request["task"] == {"Complete": "generate"}.get(mode, mode.lower())
    if mode == "Complete":
        assert request["conditions"][0]["positions"] == [0, 1, 2, 3]
        assert request["conditions"][0]["noise"] == [0, 0.3, 0.4, 0.5]


def test_words_alone_with_all_the_fields(visitor, server):
    visitor.tab("Text to video")
    visitor.write("prompt", "a bus slides to the right in the desert")
    visitor.page.locator("#preset label", has_text="Creative").click()
    visitor.page.wait_for_function("document.querySelector('#alpha input[type=number]')?.value === '1.3'")
    visitor.page.locator("#advanced > button").click()
    visitor.write("seed", "42")
    visitor.write("negative", "rain")
    visitor.write("steps", "3")
    visitor.write("frames", "17")
    visitor.field("seed").click()
    job = visitor.made(visitor.generate)
    request = server.service.queue.get(job).request
    got = {name: request[name] for name in ("preset", "alpha", "seed", "negative_prompt", "steps", "frames")}
    assert got == {
        "preset": "creative",
        "alpha": 1.3,
        "seed": 42,
        "negative_prompt": "rain",
        "steps": 3,
        "frames": 17,
    }


def test_a_draft_made_fast_and_then_its_final(visitor, server):
    visitor.tab("Text to video")
    visitor.write("prompt", "a bus slides to the right in the desert")
    visitor.page.get_by_label("Fast").check()
    visitor.page.wait_for_function("document.querySelector('#steps input[type=number]')?.value === '4'")
    visitor.page.get_by_label("Draft").check()
    draft = visitor.made(visitor.generate)
    asked = server.service.queue.get(draft)
    assert (asked.request["draft"], asked.request["fast"], asked.size) == (True, True, "80x80")
    final = visitor.made(lambda: visitor.page.get_by_role("button", name="Make the final").click())
    asked = server.service.queue.get(final)
    assert (asked.parent, asked.request["draft"], asked.size) == (draft, False, "96x96")
    assert visitor.settings()["Given"].startswith("the draft, noise")
    assert visitor.page.get_by_role("button", name="Make the final").count() == 0


def test_a_story_told_with_its_early_frames_first(visitor, server):
    visitor.tab("Text to video")
    visitor.page.locator("#advanced > button").click()
    visitor.write("prompts", "a cat bounces\n\na cat spins")
    visitor.page.get_by_label("Early frames first").check()
    visitor.generate()
    visitor.page.locator("#pusa-problem", has_text="2 prompts for a video").wait_for()
    visitor.write("frames", "65")
    visitor.field("seed").click()
    request = server.service.queue.get(visitor.made(visitor.generate)).request
    assert (request["prompts"], request["schedule"]) == (["a cat bounces", "a cat spins"], "wave")
    assert visitor.settings()["Story"] == "a cat bounces / a cat spins"
    assert visitor.settings()["Schedule"].startswith("wave:")


@pytest.mark.parametrize(("tab", "example"), [("Multi-image", "star-back"), ("Video to video", "transition")])
def test_examples_of_other_tabs_fill_the_form_and_run(visitor, tab, example):
    visitor.tab(tab)
    visitor.made(lambda: visitor.example(example))
    assert visitor.settings()["Prompt"] == examples.find(example).prompt


# ---- the timeline ----------------------------------------------------------------------------------------------------


def test_the_timeline_and_the_fields_stay_in_step(visitor):
    visitor.tab("Video to video")
    visitor.shows(["0", ".3", ".4", ".5", "", "", "", "", ""])
    cell = visitor.page.locator(".tl-cell")
    cell.nth(6).click()  # keeps it, with the noise of the one before
    visitor.holds("video-positions", "0,1,2,3,6")
    cell.nth(1).click()  # releases it
    visitor.holds("video-positions", "0,2,3,6")
    assert visitor.field("video-multipliers").input_value() == "0,0.4,0.5,0.5"
    visitor.field("video-positions").fill("0,8")
    visitor.field("video-multipliers").fill("0.1,1")
    visitor.shows([".1", "", "", "", "", "", "", "", "1"])
    visitor.field("video-positions").fill("0,9")
    visitor.page.wait_for_function("document.querySelector('.tl-problem').textContent.includes('9 latent frames')")


def test_a_picture_is_dragged_and_its_noise_is_changed_by_wheel_and_drag(visitor):
    visitor.tab("Multi-image")
    visitor.shows([".2", *[""] * 7, ".5"])
    page = visitor.page
    cells = page.locator(".tl-cell")
    page.evaluate("document.querySelector('.tl-strip').scrollIntoView({ block: 'center' })")
    start, target = cells.nth(8).bounding_box(), cells.nth(5).bounding_box()
    middle = lambda box: (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)  # noqa: E731
    page.mouse.move(*middle(start))
    page.mouse.down()
    page.mouse.move(*middle(target), steps=6)
    page.mouse.up()
    visitor.holds("positions", "0,5")
    page.mouse.wheel(0, -100)
    visitor.holds("multipliers", "0.2,0.55")
    x, y = middle(cells.nth(0).bounding_box())
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - 34, steps=4)  # half a cell up: half more noise
    page.mouse.up()
    visitor.holds("multipliers", "0.7,0.55")


def test_the_timeline_is_worked_by_keyboard_and_says_what_it_is(visitor):
    visitor.tab("Multi-image")
    page = visitor.page
    visitor.shows([".2", *[""] * 7, ".5"])
    slider = page.get_by_role("slider", name="Latent frame 0, frame 0, 0 s")
    slider.focus()
    assert slider.get_attribute("aria-valuetext") == "picture 1, noise 0.2"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("PageUp")
    visitor.holds("multipliers", "0.45,0.5")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    visitor.holds("positions", "2,last")
    assert page.evaluate("document.activeElement.dataset.cell") == "2"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.getAttribute('aria-valuetext')") == "picture 2, noise 0.5"
    page.keyboard.press("Home")
    page.keyboard.press("Enter")  # a free cell: the picture last touched goes there
    page.wait_for_function("document.querySelector('#positions input, #positions textarea')?.value.startsWith('0,')")


# ---- while it is made ------------------------------------------------------------------------------------------------


def test_progress_preview_reload_and_cancel(visitor, server):
    visitor.tab("Text to video")
    visitor.write("prompt", "a bus rises slowly")
    visitor.generate()
    job = visitor.new_job("")
    page = visitor.page
    page.wait_for_function("document.querySelector('.st-what')?.textContent.startsWith('Denoising, step')")
    page.wait_for_function("document.querySelector('.st-more').textContent.includes('left')")
    page.wait_for_function("document.querySelector('.st-preview')?.naturalWidth === 96")
    assert page.get_by_role("progressbar").first.get_attribute("aria-valuenow") is not None
    page.reload()
    page.wait_for_function("document.querySelector('.st-what')?.textContent.startsWith('Denoising, step')")
    assert visitor.job() == job
    page.click("[data-act=cancel]")
    page.wait_for_selector("text=Nothing was kept of it")
    assert server.service.queue.get(job).status == "cancelled"


def test_one_that_waits_says_how_many_come_before_it(visitor, server):
    visitor.tab("Text to video")
    page = visitor.page
    jobs = []
    for number in range(3):
        visitor.write("prompt", f"a bus number {number} rises slowly")
        before = visitor.job()
        visitor.generate()
        jobs.append(visitor.new_job(before))
    page.wait_for_function("/^[12] before yours$/.test(document.querySelector('.st-more')?.textContent)")
    for job in jobs:
        server.service.queue.cancel(job)
    page.wait_for_selector("text=Nothing was kept of it")


def test_an_error_is_an_alert_on_the_page(visitor):
    visitor.generate()
    alert = visitor.page.get_by_role("alert")
    assert "Choose a picture first" in alert.inner_text()
    alert.get_by_role("button", name="Dismiss").click()
    visitor.page.set_input_files("#image input[type=file]", Path(__file__))
    visitor.page.wait_for_timeout(500)
    visitor.tab("Text to video")
    visitor.generate()
    visitor.page.wait_for_function(
        "document.querySelector('[role=alert]')?.textContent.includes('the prompt is empty')"
    )
    assert visitor.job() == ""


def test_a_file_that_is_no_picture_is_refused_in_words(visitor, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    visitor.page.set_input_files("#image input[type=file]", broken)
    visitor.page.wait_for_selector(".tl-cell.is-given img", state="attached")
    visitor.write("prompt", "a penguin")
    visitor.generate()
    visitor.page.wait_for_selector("[role=alert]")
    told = visitor.page.get_by_role("alert").inner_text()
    assert "broken.png" in told
    assert str(tmp_path) not in told
    visitor.errors.clear()  # the browser cannot show it either


def test_a_video_that_could_not_be_made_says_why_and_offers_another_try(visitor):
    visitor.tab("Text to video")
    visitor.write("prompt", "it never ends")
    visitor.generate()
    visitor.page.wait_for_selector("text=the engine was told to fail")
    assert visitor.page.get_by_role("button", name="Same again").is_visible()


def test_while_the_model_loads_the_page_is_there_and_takes_jobs(browser, tmp_path):
    with studio(tmp_path, "studio_engine:SlowToLoad") as running:
        visitor = Visitor(browser, running.url)
        visitor.open()
        visitor.page.wait_for_selector("text=The model is loading")
        visitor.page.wait_for_selector(".pusa-model[data-kind=loading]")
        visitor.example("penguin")
        visitor.page.wait_for_selector("text=Starts as soon as the model is loaded")
        visitor.plays(visitor.new_job(""))
        visitor.page.wait_for_selector(".pusa-model[data-kind=ready]")
        assert visitor.errors == []
        visitor.close()


# ---- the result ------------------------------------------------------------------------------------------------------


def content(server, job: str) -> bytes:
    return server.service.files.get_bytes(server.service.queue.get(job).results["video"])


def frames(server, job: str) -> bytes:
    return media.read_video(content(server, job)).tobytes()


def test_same_again_is_the_same_video_and_vary_seed_another(visitor, server):
    first = visitor.made(lambda: visitor.example("penguin"))
    again = visitor.made(lambda: visitor.page.click("[data-act=again]"))
    seed = visitor.settings()["Seed"]
    varied = visitor.made(lambda: visitor.page.click("[data-act=vary]"))
    assert frames(server, first) == frames(server, again)
    assert frames(server, first) != frames(server, varied)
    assert visitor.settings()["Seed"] != seed


def test_the_last_frame_becomes_a_picture_and_the_video_one_to_extend(visitor, server):
    visitor.made(lambda: visitor.example("penguin"))
    visitor.tab("Text to video")
    visitor.page.click("[data-act=last_frame]")
    visitor.page.wait_for_function("document.querySelector('#image img')?.src.includes('last-frame.png')")
    assert visitor.field("prompt").input_value().startswith("a penguin")
    visitor.page.click("[data-act=extend]")
    visitor.page.wait_for_selector("#video video")
    visitor.page.wait_for_function("document.querySelectorAll('.tl-cell.is-given img').length === 4")
    job = visitor.made(visitor.generate)
    assert server.service.queue.get(job).request["task"] == "extend"


def test_a_video_is_downloaded_and_deleted(visitor, server):
    job = visitor.made(lambda: visitor.example("penguin"))
    with visitor.page.expect_download() as download:
        visitor.page.click("[data-act=download]")
    assert download.value.suggested_filename == f"{job}.mp4"
    assert Path(download.value.path()).read_bytes() == content(server, job)
    visitor.page.click("[data-act=delete]")
    visitor.page.click("text=Really delete?")
    visitor.page.wait_for_selector("text=Your video appears here")
    assert server.service.queue.get(job) is None


def test_the_gallery_survives_a_restart_of_the_server(browser, tmp_path):
    with studio(tmp_path) as running:
        visitor = Visitor(browser, running.url)
        visitor.open()
        job = visitor.made(lambda: visitor.example("penguin"))
        visitor.close()
    with studio(tmp_path) as running:
        visitor = Visitor(browser, running.url)
        visitor.open()
        visitor.page.click("text=a penguin slides to the right at the beach >> nth=-1")
        visitor.plays(job)
        visitor.close()


# ---- help with words -------------------------------------------------------------------------------------------------


def test_words_that_the_model_does_not_know_are_named_with_the_nearest(visitor):
    visitor.write("prompt", "a yacht slides to the left")
    visitor.page.wait_for_selector(".pusa-unknown q")
    assert visitor.page.inner_text(".pusa-unknown q") == "yacht"
    visitor.page.click(".pusa-unknown .pusa-chip >> nth=0")
    assert visitor.field("prompt").input_value() == "a sailboat slides to the left"
    visitor.page.wait_for_selector(".pusa-unknown q", state="detached")
    visitor.page.click(".pusa-words summary")
    visitor.page.click(".pusa-words .pusa-chip >> text=under the sea")
    assert visitor.field("prompt").input_value() == "a sailboat slides to the left under the sea"
    visitor.page.click("text=Surprise me")
    assert visitor.field("prompt").input_value().startswith("a")


# ---- for everyone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("language", "button"), [("fr-FR", "Générer"), ("zh-CN", "生成"), ("de-DE", "Generate")])
def test_the_page_speaks_the_browsers_language(browser, server, language, button):
    visitor = Visitor(browser, server.url, locale=language)
    page = visitor.open()
    assert page.inner_text("#generate").strip() == button
    assert page.evaluate("document.documentElement.lang")[:2] == {"de-DE": "en"}.get(language, language[:2])
    visitor.generate()
    page.wait_for_selector("[role=alert]")
    visitor.close()


def test_language_and_theme_are_chosen_and_kept(browser, server):
    visitor = Visitor(browser, server.url, color_scheme="light")
    page = visitor.open()
    page.click("[aria-label='Dark theme']")
    assert page.evaluate("document.body.classList.contains('dark')")
    page.select_option(".pusa-language", "fr")
    page.wait_for_selector("text=Votre vidéo apparaît ici")
    page.wait_for_selector("#generate")
    assert page.evaluate("document.body.classList.contains('dark')")
    assert page.get_by_role("tab", name="Texte en vidéo").is_visible()
    visitor.close()


def test_a_narrow_screen_shows_everything_without_sideways_scrolling(browser, server):
    visitor = Visitor(browser, server.url, viewport={"width": 390, "height": 844}, has_touch=True)
    page = visitor.open()
    for tab in ("Multi-image", "Video to video", "Text to video"):
        if not page.get_by_role("tab", name=tab, exact=True).is_visible():
            page.get_by_role("button", name="More tabs").click()
            page.locator(".overflow-dropdown").get_by_text(tab).click()
        else:
            visitor.tab(tab)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    visitor.page.reload()
    page.wait_for_selector(".tl-cell")
    assert (
        page.eval_on_selector_all(
            ".tl-cell", "cells => Math.min(...cells.map(cell => cell.getBoundingClientRect().width))"
        )
        >= 24
    )
    visitor.made(lambda: visitor.example("penguin"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    visitor.close()


def test_every_control_has_a_name(visitor):
    visitor.made(lambda: visitor.example("penguin"))
    nameless = visitor.page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, video, img, [role=slider]')]
        .filter(e => e.offsetParent && !e.matches('[type=file], [aria-hidden=true], [alt=""]'))
        .filter(e => !(e.getAttribute('aria-label') || e.title || e.textContent.trim() || e.alt || e.labels?.length
            || e.placeholder || e.getAttribute('aria-labelledby') || e.closest('label')))
        .map(e => e.outerHTML.slice(0, 120))"""
    )
    assert [name for name in nameless if "pusa" in name or "st-" in name or "tl-" in name or "ga-" in name] == []
    assert visitor.page.locator("h1").count() == 1


def test_pictures_that_are_sent_are_not_decoded_by_the_server(visitor, tmp_path):
    Image.new("RGB", (300, 200), "teal").save(tmp_path / "plain.bmp")  # a format that Gradio itself would convert
    visitor.page.set_input_files("#image input[type=file]", tmp_path / "plain.bmp")
    visitor.page.wait_for_selector(".tl-cell.is-given img")
    visitor.write("prompt", "a photo")
    visitor.made(visitor.generate)
