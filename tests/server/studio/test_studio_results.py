"""The stage of the studio in a browser: a video in the making, finished, failed; variants; comparison; all tabs."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from gallery_samples import Filled, Looker, filled
from server_samples import wait_until

pytest.importorskip("playwright")

from playwright.sync_api import expect

expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    with filled(tmp_path_factory.mktemp("results")) as site:
        yield site


def plays(page: Any, *ids: str) -> None:
    """Wait until these videos are on the stage and move, all at the same moment."""
    page.wait_for_function(
        """ids => {
            const videos = [...document.querySelectorAll(".stage video.clip")];
            const moves = videos.every((video) => video.readyState >= 2 && video.currentTime > 0 && video.videoWidth);
            const times = videos.map((video) => video.currentTime);
            return videos.length === ids.length && moves && Math.max(...times) - Math.min(...times) < 0.15
                && ids.every((id) => videos.some((video) => video.src.includes(id)));
        }""",
        arg=list(ids),
    )


def jobs_in_address(page: Any) -> list[str]:
    found: list[str] = page.evaluate("new URLSearchParams(location.search).getAll('job')")
    return found


def newest(site: Filled) -> Any:
    return site.service.queue.jobs_of("", 50)[0]


def test_a_video_is_followed_from_the_queue_to_the_player(site, looker):
    ahead, job = site.submit(), site.submit("a bus slides to the right")
    page = looker.open(job.id)
    stage = page.locator(".stage")
    expect(stage).to_contain_text("One video is ahead of it")
    expect(stage.get_by_role("progressbar")).not_to_have_attribute("aria-valuenow", re.compile("."))

    first = site.begin()
    assert first.id == ahead.id
    expect(stage).to_contain_text("Starts as soon as the model is loaded")
    site.finish(first)
    running = site.begin()
    site.reach(running, 6)
    expect(stage).to_contain_text("Denoising · step 6 of 10")
    expect(stage).to_contain_text("about 42 sec left")
    expect(stage.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "60")
    expect(stage.get_by_alt_text("Preview of the video while it is made")).to_be_visible()
    expect(stage.get_by_role("status")).to_have_text("60 percent done")
    expect(page).to_have_title("60 % · pusa")
    assert page.locator("link[rel=icon]").get_attribute("href").startswith("data:image/svg+xml")

    site.finish(running)
    plays(page, job.id)
    expect(page).to_have_title("pusa studio")
    expect(stage.get_by_role("status")).to_have_text("The video is done")
    expect(stage).to_contain_text("96 × 96")
    stage.get_by_role("button", name="All settings").click()
    expect(stage.locator(".settings")).to_contain_text("Steps10")


def test_the_player_goes_frame_by_frame(site, looker):
    page = looker.open(site.make())
    slider = page.get_by_role("slider", name="Moment")
    page.get_by_role("button", name="Pause").click()
    slider.focus()
    page.keyboard.press("Home")
    page.keyboard.press(".")
    page.keyboard.press(".")
    expect(slider).to_have_attribute("aria-valuetext", re.compile(r"0\.13 of 2\.0\d seconds, frame 2"))
    page.keyboard.press(",")
    expect(slider).to_have_attribute("aria-valuetext", re.compile(r", frame 1$"))
    expect(page.get_by_role("button", name="Play", exact=True)).to_be_visible()


def test_the_address_names_the_video_and_back_leads_to_the_one_before(site, looker):
    first, second = site.make("one"), site.make("two")
    page = looker.open(first)
    plays(page, first)
    page.get_by_role("button", name="Open: two").click()
    plays(page, second)
    assert jobs_in_address(page) == [second]
    page.go_back()
    plays(page, first)
    page.go_forward()
    plays(page, second)
    page.reload()
    plays(page, second)


def test_a_failure_is_told_in_the_visitors_language_and_made_again(browser, site):
    site.submit()
    failed = site.fail(site.begin())
    french = Looker(browser, site.url, {"locale": "fr-FR"})
    page = french.open(failed)
    told = page.locator(".stage").get_by_role("alert")
    expect(told).to_contain_text("Cette vidéo n’a pas pu être créée")
    page.get_by_role("button", name="Réessayer").click()
    expect(page.locator(".stage")).to_contain_text("En attente")
    site.finish(site.begin())
    plays(page, failed)
    french.close()
    assert not french.errors


def test_a_video_that_is_not_there_is_told(looker):
    page = looker.open("video_" + "0" * 32)
    expect(page.locator(".stage")).to_contain_text("This video is not here")


def test_the_same_again_and_another_seed(site, looker):
    made = site.make("a duck swims", guidance=2.0)
    page = looker.open(made)
    page.get_by_role("button", name="New seed").click()
    page.wait_for_function("id => !location.search.includes(id)", arg=made)
    varied = site.service.queue.get(jobs_in_address(page)[0])
    assert varied.request["prompt"] == "a duck swims"
    assert varied.request["guidance"] == 2.0
    assert varied.request["seed"] != 7
    page.go_back()
    plays(page, made)
    page.get_by_role("toolbar", name="What to do").get_by_role("button", name="More").click()
    page.get_by_role("menuitem", name="Same again").click()
    page.wait_for_function("([a, b]) => ![a, b].some((id) => location.search.includes(id))", arg=[made, varied.id])
    assert site.service.queue.get(jobs_in_address(page)[0]).request["seed"] == 7
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator(".stage")).to_contain_text("Nothing was kept of it but its settings.")
    site.service.queue.cancel(varied.id)


def test_edit_takes_all_of_a_video_into_the_form(site, looker):
    page = looker.open(site.make("a whale jumps", seed=4711))
    page.get_by_role("toolbar", name="What to do").get_by_role("button", name="Edit").click()
    expect(page.locator("#prompt")).to_have_value("a whale jumps")
    assert page.evaluate("JSON.parse(localStorage.getItem('pusa.form')).seed") == 4711


def test_a_seed_of_another_client_is_exact_wherever_it_goes(site, looker):
    seed = 2**63 - 3
    page = looker.open(site.make("a large seed", seed=seed))
    expect(page.locator(".facts")).to_contain_text(f"seed {seed}")
    tools = page.get_by_role("toolbar", name="What to do")
    tools.get_by_role("button", name="Edit").click()
    expect(page.locator("#seed")).to_have_value(str(seed))
    tools.get_by_role("button", name="More").click()
    with page.expect_response(lambda answer: answer.request.method == "POST" and answer.url.endswith("/v1/videos")):
        page.get_by_role("menuitem", name="Same again").click()
    assert newest(site).request["seed"] == seed
    page.locator("#variants").select_option(label="2")
    with page.expect_response(
        lambda answer: answer.request.method == "POST" and answer.request.post_data.count(str(seed + 1))
    ):
        page.click("#generate")
    assert newest(site).request["seed"] == seed + 1
    page.locator("#seed").fill("9" * 20)
    expect(page.locator("#seed-problem")).to_contain_text(str(2**63 - 1))
    page.locator("#seed").blur()
    expect(page.locator("#seed")).to_have_value(str(2**63 - 1))
    looker.context.request.post(f"{site.url}v1/videos/cancel")


def test_four_variants_show_their_whole_seeds(site, looker):
    ids = [site.make("a fox sits", batch="whole", seed=2**32 - 1 - number) for number in range(4)]
    page = looker.open(*ids)
    plays(page, *ids)
    page.fill("#seconds", "80")
    page.locator("#seconds").blur()
    expect(page.locator(".row .field-head .small").nth(1)).to_have_text("1281 frames")
    cut = "texts => texts.filter((one) => one.scrollWidth > one.clientWidth).map((one) => one.textContent)"
    assert page.eval_on_selector_all(".variant-facts, .row .field-head *", cut) == []


def test_delete_is_undone(site, looker):
    made = site.make("kept after all")
    page = looker.open(made)
    plays(page, made)
    page.get_by_role("toolbar", name="What to do").get_by_role("button", name="Delete").click()
    expect(page.locator(".stage")).to_contain_text("Your video appears here")
    expect(page.get_by_role("button", name="Open: kept after all")).to_have_count(0)
    page.locator(".toast").get_by_role("button", name="Undo").click()
    plays(page, made)
    expect(page.get_by_role("button", name="Open: kept after all")).to_be_visible()


def test_variants_play_in_step_and_the_others_are_deleted_at_once(site, looker):
    ids = [site.make("a fox runs", batch="fox", seed=seed) for seed in range(3)]
    page = looker.open(*ids)
    plays(page, *ids)
    page.get_by_role("button", name="Keep variant 2").click()
    expect(page.get_by_role("button", name="Remove variant 2 from favourites")).to_be_visible()
    page.get_by_role("button", name="Delete the 2 others").click()
    plays(page, ids[1])
    assert jobs_in_address(page) == [ids[1]]
    wait_until(lambda: site.service.queue.get(ids[1]).favourite)
    page.locator(".toast").get_by_role("button", name="Undo").click()
    expect(page.get_by_role("button", name="All variants")).to_be_visible()
    page.get_by_role("button", name="All variants").click()
    plays(page, *ids)


def test_two_videos_are_wiped_by_drag_and_keys(site, looker):
    first, second = site.make("this one"), site.make("that one")
    page = looker.open(first)
    page.get_by_role("toolbar", name="What to do").get_by_role("button", name="Compare").click()
    expect(page.locator(".gallery")).to_contain_text("Choose the second video in the gallery.")
    page.get_by_role("button", name="Open: that one").click()
    plays(page, first, second)
    line = page.get_by_role("slider", name="Line between the two videos")
    line.press("ArrowLeft")
    expect(line).to_have_attribute("aria-valuenow", "48")
    line.press("Shift+ArrowRight")
    expect(line).to_have_attribute("aria-valuenow", "58")
    box = page.locator(".wipe").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 20)
    page.mouse.up()
    expect(line).to_have_attribute("aria-valuenow", "25")
    page.get_by_role("button", name="End the comparison").click()
    plays(page, first)


def test_all_tabs_of_a_browser_share_one_connection_and_one_takes_it_over(site, looker):
    first = looker.open()
    expect(first.locator(".queue")).to_be_hidden()
    second = looker.open()
    site.submit("seen in both tabs")
    for page in (first, second):
        expect(page.locator(".queue")).to_contain_text("seen in both tabs")
    assert looker.streams == 1
    first.close()
    site.finish(site.begin())
    expect(second.locator(".gallery").get_by_role("button", name="Open: seen in both tabs")).to_be_visible()
    assert looker.streams == 2


def test_what_is_deleted_in_another_tab_leaves_the_stage_and_comes_back(site, looker):
    made = site.make("in two tabs")
    first, second = looker.open(made), looker.open(made)
    plays(second, made)
    first.get_by_role("toolbar", name="What to do").get_by_role("button", name="Delete").click()
    expect(second.locator(".stage")).to_contain_text("This video is not here")
    first.locator(".toast").get_by_role("button", name="Undo").click()
    expect(second.locator(".stage video.clip")).to_have_attribute("src", re.compile(made))


def test_after_a_lost_connection_all_is_right_again(site, looker):
    gone, job = site.make("deleted meanwhile"), site.submit("made meanwhile")
    page = looker.open(job.id)
    expect(page.get_by_role("button", name="Open: deleted meanwhile")).to_be_visible()
    looker.context.set_offline(True)
    page.evaluate("fetch('/v1/session').catch(() => {})")
    site.finish(site.begin())
    site.service.queue.delete(gone)
    looker.context.set_offline(False)
    plays(page, job.id)
    expect(page.get_by_role("button", name="Open: deleted meanwhile")).to_have_count(0)


def test_a_video_that_could_not_be_fetched_is_fetched_again(site, looker):
    failures = iter(range(3))
    looker.context.route(
        "**/content", lambda route: route.fallback() if next(failures, None) is None else route.abort()
    )
    plays(looker.open(site.make("a swan sings")), newest(site).id)
    assert next(failures, None) is None


def test_its_files_are_made_when_they_are_asked_for(site, looker):
    page = looker.open(site.make("a swan sings", seed=3))
    tools = page.get_by_role("toolbar", name="What to do")
    for entry, ending in {
        "Video (MP4)": ".mp4",
        "Animation (GIF)": ".gif",
        "Animation (WebP)": ".webp",
        "Last frame": ".png",
        "Contact sheet": ".webp",
    }.items():
        tools.get_by_role("button", name="Download").click()
        with page.expect_download() as download:
            page.get_by_role("menuitem", name=entry).click()
        name = download.value.suggested_filename
        assert name.startswith("a-swan-sings"), entry
        assert name.endswith(ending), entry


def test_a_frame_and_the_whole_clip_go_into_the_form(site, looker):
    page = looker.open(site.make("a swan sings"))
    page.wait_for_function(
        "() => document.querySelector('.stage video')?.readyState >= 2"
    )  # there are no frames before
    page.get_by_role("slider", name="Moment").focus()
    page.keyboard.press("Home")
    page.keyboard.press(".")
    page.keyboard.press(".")
    page.get_by_role("button", name="Use this frame").click()
    form = "() => JSON.parse(localStorage.getItem('pusa.form') || '{}')"
    page.wait_for_function(f"() => ({form})().items?.[0]?.frame === 2")
    page.get_by_role("button", name="Extend", exact=True).click()
    page.wait_for_function(f"() => ({form})().mode === 'extend' && ({form})().clips.length === 1")


def test_a_notification_comes_only_after_asking_and_while_the_page_is_not_seen(browser, site):
    looker = Looker(browser, site.url)
    looker.context.add_init_script(
        """window.told = [];
        window.Notification = class {
            static permission = "granted";
            static requestPermission = async () => "granted";
            constructor(title, { body }) { window.told.push(`${title}: ${body}`); }
        };
        Object.defineProperty(document, "visibilityState", { get: () => window.away ? "hidden" : "visible" });"""
    )
    page = looker.open()

    def make(prompt: str) -> None:
        site.submit(prompt)
        expect(page.locator(".queue")).to_contain_text(prompt)
        site.finish(site.begin())
        expect(page.locator(".gallery").get_by_role("button", name=f"Open: {prompt}")).to_be_visible()

    page.evaluate("() => { window.away = true; }")
    make("before asking")
    page.get_by_role("switch", name="Notify me when a video is done").click()
    make("while away")
    page.evaluate("() => { window.away = false; }")
    make("while here")
    assert page.evaluate("() => window.told") == ["Your video is done: while away"]
    looker.close()


def test_each_key_sees_its_own_and_nothing_stays_after_signing_out(browser, tmp_path_factory):
    mine, other = "a-key-of-mine-0001", "a-key-of-others-02"
    with filled(tmp_path_factory.mktemp("keys"), api_keys=[mine, other]) as site:
        looker = Looker(browser, site.url)
        page = looker.context.new_page()
        page.goto(site.url)

        def sign_in(key: str) -> None:
            page.get_by_label("Key").fill(key)
            page.get_by_role("button", name="Log in").click()
            page.wait_for_selector(".gallery")

        sign_in(mine)
        page.evaluate(
            """() => fetch("/v1/videos", { method: "POST", body: '{"prompt": "only mine"}',
            headers: { "content-type": "application/json", "x-pusa-page": "1" } })"""
        )
        expect(page.locator(".queue")).to_contain_text("only mine")
        page.get_by_role("button", name="Log out").click()
        sign_in(other)
        expect(page.locator(".gallery")).to_contain_text("Every video that you make is kept here")
        expect(page.get_by_text("only mine")).to_have_count(0)
        page.get_by_role("button", name="Log out").click()
        sign_in(mine)
        expect(page.locator(".queue")).to_contain_text("only mine")
        looker.close()
        assert not looker.errors
