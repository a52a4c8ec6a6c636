"""The page, as people use it: one server and its visitors; see serving."""

import asyncio
import base64
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import AsyncMock
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import mcp
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from mcp.client.streamable_http import streamablehttp_client
from playwright.sync_api import expect

from show_1 import video
from tests.serving import (
    APP,
    LONG,
    PATIENCE,
    STAGES,
    ask,
    asking,
    job_in,
    needs_chromium,
    press,
    serve,
    step_of,
    visit,
    wait_for,
    wait_for_step,
)


@needs_chromium
def test_a_prompt_becomes_a_video_that_plays(browser, tmp_path):
    """Mini, what people without a GPU have, as they have it."""
    with serve("mini", tmp_path) as server:
        _a_prompt_becomes_a_video_that_plays(server, browser)
        assert "Traceback" not in server.log.read_text()


def _a_prompt_becomes_a_video_that_plays(server, browser):
    page = visit(browser, server, viewport={"width": 1280, "height": 800})
    asked_for = []
    page.on("request", lambda request: asked_for.append(request.url))
    page.reload()
    wait_for(page, "Ready")
    page.evaluate("""() => {
        window.said = [];
        const status = document.querySelector("#status");
        const note = () => said.push(status.querySelector("[role=status]")?.innerText);
        new MutationObserver(note).observe(status, {subtree: true, childList: true, characterData: true});
    }""")
    page.locator("#examples button").first.click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a panda jumping in the snow")
    ask(page, "a panda jumping in the snow", keyframes="20")
    # While it runs: percent and time left, a preview that moves on, and the clips of the stages that are done.
    wait_for(page, "Stage 1 of 5: keyframes")
    page.wait_for_function("() => /About .* left/.test(document.querySelector('#progress')?.innerText)")
    first = page.locator("#screen img").get_attribute("src")
    page.wait_for_function("src => document.querySelector('#screen img')?.src !== src", arg=first)
    assert re.match(r"(\d+ %|✓ Done) · a panda jumping in the snow$", page.title())
    wait_for(page, r"Done in [\d.]+ seconds")
    assert page.title().startswith("✓ Done")
    expect(page.locator("#clips figcaption")).to_have_text(STAGES[:-1])
    for clip in page.locator("#clips video").all():
        assert clip.evaluate("video => new Promise(done => video.readyState ? done(true) : video.onloadeddata = done)")

    # What went by too fast to be drawn may be missing; the order may not be wrong.
    numbers = [int(step[1]) for text in page.evaluate("said") if (step := re.match(r"Stage (\d) of 5", text or ""))]
    assert numbers and numbers == sorted(numbers)

    # The video starts by itself, and moves.
    player = page.locator("#screen video")
    page.wait_for_function("() => document.querySelector('#screen video')?.currentTime > 0.2", timeout=30_000)
    assert player.evaluate("video => video.readyState") >= 2
    assert player.evaluate("video => [video.videoWidth, video.videoHeight]") == [288, 160]
    assert player.evaluate("video => video.currentSrc").startswith(server.url)
    assert abs(player.evaluate("video => video.duration") - 29 / 8) < 0.01

    # It is the file in the output folder, which can be taken away in two forms.
    (file,) = server.videos()
    assert file.name.startswith("a-panda-jumping-in-the-snow-")
    settings = video.read_metadata(file)
    assert settings["prompt"] == "a panda jumping in the snow"
    assert settings["cascade"]["keyframes"]["steps"] == 20
    for name, beginning in (("Download MP4", file.read_bytes()), ("Download GIF", b"GIF8")):
        with page.expect_download() as download:
            page.get_by_role("link", name=name).click()
        assert Path(download.value.suggested_filename).stem == file.stem
        assert Path(download.value.path()).read_bytes().startswith(beginning)
    press(page, "Reuse")
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(settings["seed"]))
    assert {urlparse(url).hostname for url in asked_for} <= {"127.0.0.1", None}  # None: what is inside the page itself
    page.close()


@needs_chromium
def test_what_stays_on_the_page_is_left_as_it_is(app, browser):
    """The line that is read out, a clip that plays, what has the focus, is pointed at or was opened."""
    context = browser.new_context()
    page, other = visit(context, app), visit(context, app)
    ask(page, "a dog")
    wait_for(page, "Done")
    page.get_by_text("Settings of this video").click()
    link = page.locator("#gallery a").filter(has_text="a dog")
    link.focus()
    asking(other, "a cat", keyframes="100", interpolation="300")
    expect(page.locator("#gallery li")).to_have_count(2)
    link.hover()
    page.evaluate("window.pointed = document.querySelector('#gallery .thumb video')")
    wait_for(other, "Stage 1 of 5")
    other.evaluate("window.line = document.querySelector('#status [role=status]')")
    title = other.title()
    other.wait_for_function("() => document.querySelector('#clips video')")
    other.evaluate("window.clip = document.querySelector('#clips video'); clip.play()")
    other.wait_for_function("() => document.querySelectorAll('#clips video').length >= 2")
    assert other.title() != title
    assert other.evaluate("line === document.querySelector('#status [role=status]')")
    assert other.evaluate("clip === document.querySelector('#clips video') && !clip.paused")
    wait_for(other, "Done")
    expect(page.locator("#gallery img")).to_have_count(2)
    expect(link).to_be_focused()
    assert page.evaluate("pointed.isConnected")
    page.locator("#gallery a").first.click()
    expect(page.locator("#settings pre")).to_contain_text("a cat")
    expect(page.locator("#settings pre")).to_be_visible()
    context.close()


@needs_chromium
def test_a_job_outlives_its_page(app, browser):
    mine, yours = browser.new_context(), browser.new_context()
    page = visit(mine, app)
    job = asking(page, "a cat", **LONG)
    wait_for_step(page, 2)
    page.reload()
    wait_for(page, "Stage 1 of 5")

    # A dropped connection leaves the page as it was; it goes on by itself.
    mine.set_offline(True)
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
    expect(page.get_by_test_id("toast-body")).to_have_count(0)
    seen = step_of(page)
    mine.set_offline(False)
    wait_for_step(page, seen + 1)
    expect(page.get_by_role("alert")).to_have_count(0)
    page.close()

    # In a new tab it is found without its id, in another browser with it; there it can be watched and no more.
    page = visit(mine, app, "/?")
    assert job_in(page) == job
    other = visit(yours, app, f"/?job={job}")
    wait_for_step(other, step_of(page))
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_visible()
    expect(other.get_by_role("button", name="Cancel", exact=True)).to_be_hidden()
    expect(other.locator("#gallery")).to_contain_text("None yet")
    press(page, "Cancel")
    expect(page.locator("#status .status")).to_be_focused()  # the button is gone
    wait_for(page, "Cancelled")
    wait_for(other, "Cancelled")
    expect(visit(yours, app, "/?job=nosuchjob").locator("#status")).to_contain_text("There is no such job here")
    mine.close(), yours.close()


@needs_chromium
def test_tabs_that_are_opened_together_are_one_visitor(app, browser):
    context = browser.new_context()
    one, other = context.new_page(), context.new_page()
    for page in (one, other):
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(app.url, wait_until="commit")
    for page, prompt in ((one, "a cat"), (other, "a dog")):
        wait_for(page, "Ready")
        ask(page, prompt)
        wait_for(page, "Done")
    for page in (one, other):
        expect(page.locator("#gallery img")).to_have_count(2)
    context.close()


@needs_chromium
def test_an_open_page_asks_for_no_frames(app, browser):
    """Sixty a second would take from models on the same computer; see show_1/page/frames.py."""
    context = browser.new_context()
    context.add_init_script("""
        const asked = requestAnimationFrame;
        window.frames_asked = 0;
        window.requestAnimationFrame = draw => { frames_asked++; return asked(draw); };
    """)
    page = visit(context, app)
    page.wait_for_timeout(1000)  # what moves at first comes to rest
    before = page.evaluate("frames_asked")
    page.wait_for_timeout(1000)
    assert page.evaluate("frames_asked") == before
    context.close()


NOTIFICATIONS = """
    const Real = Notification;
    window.told = [];
    window.Notification = class extends Real {
        constructor(title, options) {
            if (window.refusing) throw new TypeError('Illegal constructor.');  // as Chrome does on Android
            super(title, options);
            told.push(options.body);
        }
    };
"""


@needs_chromium
def test_a_notification_says_when_it_is_done(app, browser):
    """To who has allowed it; a browser that has none for pages loses nothing but that."""
    context = browser.new_context(permissions=["notifications"])
    context.add_init_script(NOTIFICATIONS)
    page = visit(context, app)
    asking(page, "a panda", interpolation="900")
    press(page, "Notify me")
    page.wait_for_function("told.length === 1")
    wait_for(page, "Stage 2 of 5")
    press(page, "Stop here")
    page.wait_for_function("told.length === 2")
    assert page.evaluate("told[1]").endswith("\n✓ Done · a panda")
    for prompt in ("a cow", "a bird"):  # of the first, too, while the page shows the second
        asking(page, prompt, interpolation="200")
        wait_for(page, "Stage|Waiting")
    page.wait_for_function("told.length === 4")
    assert page.evaluate("told[2]") == "✓ Done · a cow" and page.evaluate("told[3]").endswith("\n✓ Done · a bird")
    page.evaluate("refusing = true")
    asking(page, "a cat")
    expect(page).to_have_title("✓ Done · a cat")
    context.close()


@needs_chromium
@pytest.mark.parametrize(
    "way", ["window.Notification = undefined", "Notification.requestPermission = async () => 'denied'"]
)
def test_where_there_are_no_notifications_that_is_told(app, browser, way):
    context = browser.new_context()
    context.add_init_script(way)
    page = visit(context, app)
    told = []
    page.on("dialog", lambda dialog: (told.append(dialog.message), dialog.accept()))
    asking(page, "a cat", **LONG)
    press(page, "Notify me")
    press(page, "Cancel")
    wait_for(page, "Cancelled")
    assert told == ["This browser shows no notifications here; the tab will tell."]
    context.close()


@needs_chromium
def test_an_enter_that_is_held_asks_once(app, browser):
    page = visit(browser, app)
    page.get_by_label("Prompt", exact=True).fill("a pony")
    for _ in range(20):
        page.keyboard.down("Enter")
        page.wait_for_timeout(50)
    page.keyboard.up("Enter")
    expect(page.locator("#gallery li").filter(has_text="a pony")).to_have_count(1)
    wait_for(page, "Done")
    expect(page.locator("#gallery li").filter(has_text="a pony")).to_have_count(1)
    page.close()


@needs_chromium
def test_stop_here_keeps_the_clip(app, browser):
    page = visit(browser, app)
    before = app.videos()
    ask(page, "a cat", interpolation="900")
    wait_for(page, "Stage 2 of 5")
    cancel, stop = (page.get_by_role("button", name=name, exact=True) for name in ("Cancel", "Stop here"))
    expect(stop).to_be_visible()
    # Both places in one go, as the page moves by itself when there is more to show.
    places = cancel.evaluate("""cancel => [true, false].map(shown => {
        document.querySelector('#stop').toggleAttribute('data-shown', shown);
        return JSON.stringify(cancel.getBoundingClientRect());
    })""")
    assert places[0] == places[1]  # so that nobody who aims at the one hits the other
    expect(stop).not_to_be_visible()
    page.evaluate("document.querySelector('#stop').toggleAttribute('data-shown', true)")
    press(page, "Stop here")
    wait_for(page, "Stopped after the keyframes")
    page.wait_for_function("() => document.querySelector('#screen video')?.currentTime > 0.2")
    (file,) = app.videos() - before
    assert video.read_metadata(file)["stopped_after"] == "keyframes"
    press(page, "Again with another seed")
    wait_for(page, "Stage 2 of 5")
    expect(page.locator("#status")).not_to_contain_text(f"Seed {video.read_metadata(file)['seed']} ")
    press(page, "Cancel")
    wait_for(page, "Cancelled")
    page.close()


def test_nothing_is_served_but_what_belongs_to_a_job(app):
    client = Client(app.url, verbose=False, download_files=False)
    client.predict("a cat", api_name="/show-1")
    (app.outputs / "private.txt").write_text("nobody's business")
    (file, *_) = app.videos()
    for path in (app.outputs / "private.txt", app.outputs / "calibration.json", file, app.outputs / "jobs", APP):
        with pytest.raises(HTTPError) as refused:
            urlopen(f"{app.url}/gradio_api/file={path}")
        assert refused.value.code in (403, 404)
    # Nor does what programs can ask list any job.
    described = json.load(urlopen(f"{app.url}/gradio_api/info"))
    assert list(described["named_endpoints"]) == ["/show-1"] and not described["unnamed_endpoints"]
    ids = [folder.name for folder in (app.outputs / "jobs").iterdir()]
    config = urlopen(f"{app.url}/config").read().decode() + urlopen(app.url).read().decode()
    assert ids and not any(id in config for id in ids)


@needs_chromium
def test_a_dropped_video_brings_its_settings_back(app, browser, tmp_path):
    page = visit(browser, app)
    made = Client(app.url, verbose=False, download_files=tmp_path).predict(
        "a dog", seed="42", settings={"keyframes": {"steps": 2}}, api_name="/show-1"
    )[0]
    # Dropped beside the place for it, which is folded in.
    assert page.evaluate(
        """content => {
            const dropped = new DataTransfer(), bytes = Uint8Array.from(atob(content), each => each.charCodeAt(0));
            dropped.items.add(new File([bytes], 'made.mp4', {type: 'video/mp4'}));
            const dragged = kind => new DragEvent(kind, {dataTransfer: dropped, bubbles: true, cancelable: true});
            return ['dragover', 'drop'].every(kind => !document.querySelector('#screen').dispatchEvent(dragged(kind)));
        }""",
        base64.b64encode(Path(made).read_bytes()).decode(),
    )
    expect(page.locator("#told")).to_contain_text("the same frames can be expected here")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a dog")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("42")
    page.get_by_role("button", name="Advanced").click()
    expect(page.get_by_label("Keyframes: steps")).to_have_value("2")

    frames = video.read_frames(made)
    settings = video.read_metadata(made)
    other, alien, damaged = (tmp_path / f"{name}.mp4" for name in ("other", "alien", "damaged"))
    settings["cascade"]["name"], settings["versions"]["torch"] = "Elsewhere", "1.0"
    settings["cascade"]["interpolation"]["steps"] = 0  # which cannot be had here
    video.write(other, frames, 8, settings)
    video.write(alien, frames, 8, {"prompt": "a cat"})
    damaged.write_bytes(b"no video")
    page.locator("#drop input[type=file]").set_input_files(other)
    differs = "cascade Elsewhere, here runs Tiny; interpolation.steps is 1 here, not 0; torch is "
    expect(page.locator("#told")).to_contain_text(differs)
    for file, problem in ((alien, "lack seed"), (damaged, "is damaged, or is no MP4 video")):
        page.locator("#drop input[type=file]").set_input_files(file)
        expect(page.locator("#told")).to_contain_text(problem)
        expect(page.locator("#told")).not_to_contain_text("/")  # nor where the server keeps what is uploaded
        expect(page.get_by_label("Seed", exact=True)).to_have_value("42")
    page.close()


@needs_chromium
def test_bad_input_is_told_in_the_page_and_the_next_run_works(app, browser):
    page = visit(browser, app)
    before = app.videos()
    harm = "<img src=x onerror='window.harmed = true'>${window.harmed = true}\\x"
    for prompt, seed, steps, problem in (
        ("  ", "", "", "The prompt is empty."),
        ("a" * 10_001, "", "", "The prompt is 10,001 characters long."),
        ("a cat", "-1", "", "The seed cannot be -1."),
        ("a cat", "1.5", "", "The seed cannot be '1.5'."),
        ("a cat", harm, "", "The seed cannot be "),
        ("a cat", "", "0", "steps cannot be 0. Give steps a whole number from 1 to 1000"),
        ("a cat", "", "ten", 'steps cannot be "ten".'),
    ):
        ask(page, prompt, seed, keyframes=steps)
        toast = page.get_by_test_id("toast-body").filter(has_text=problem)
        expect(toast).to_be_visible(timeout=PATIENCE * 1000)
    assert app.videos() == before

    # A prompt so long that its end is cut off, and told: what looks like HTML in it is words.
    ask(page, "word " * 80 + harm)
    wait_for(page, "Done")
    expect(page.locator("#status .notice").first).to_contain_text("img src")
    # And in the gallery and the settings.
    ask(page, harm + "\u0642\u0637\u0629 🐼\nand another line")
    page.wait_for_function("() => document.querySelectorAll('#gallery img').length === 2")
    for place in (page.locator("#status .prompt"), page.locator("#gallery li").first):
        expect(place).to_contain_text(harm)
    page.get_by_text("Settings of this video").click()
    expect(page.locator("#settings pre")).to_contain_text("<img src=x")
    assert page.title() == "✓ Done · " + harm[:39] + "…"
    assert page.evaluate("window.harmed") is None
    assert len(app.videos() - before) == 2
    assert "Traceback" not in page.content()
    page.close()


@needs_chromium
@pytest.mark.parametrize("colors", ["light", "dark"])
def test_the_page_fits_a_phone(app, browser, colors):
    page = visit(browser, app, viewport={"width": 390, "height": 844}, color_scheme=colors)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for control in (page.get_by_label("Prompt", exact=True), page.get_by_role("button", name="Make the video")):
        assert control.bounding_box()["width"] >= 300
    folded = page.get_by_role("button", name="Advanced", exact=True)
    expect(folded).to_have_attribute("aria-expanded", "false")
    ask(page, "a cat", keyframes="2")
    expect(folded).to_have_attribute("aria-expanded", "true")
    expect(page.get_by_role("group", name="Preset")).to_be_visible()
    wait_for(page, "Done")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    unnamed = """() => [...document.querySelectorAll('button, a, input, textarea, progress, video, img')]
        .filter(each => each.checkVisibility() && each.ariaHidden !== 'true'
            && !(each.innerText || each.labels?.length || each.title || each.ariaLabel || each.alt))
        .map(each => each.outerHTML.slice(0, 120))"""
    assert page.evaluate(unnamed) == []
    press(page, "Edit these settings")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.locator("#gallery a").first.click()
    expect(page.locator("#screen")).to_be_in_viewport()
    page.close()


def until_told(call) -> list:
    end = time.monotonic() + PATIENCE
    while not call.outputs():
        assert time.monotonic() < end and not call.done(), call
        time.sleep(0.1)
    return call.outputs()


def test_the_gradio_client(app, tmp_path):
    client = Client(app.url, verbose=False, download_files=tmp_path)
    file, seed, settings, told = client.predict("a cat", api_name="/show-1")
    assert video.read_metadata(file)["seed"] == int(seed) == settings["seed"]
    assert re.fullmatch(r"Done in [\d.]+ seconds", told["text"]) and told["share"] == 1
    again, same_seed, *_ = client.predict("a cat", seed=int(seed), api_name="/show-1")
    assert same_seed == seed
    assert Path(again).read_bytes() == Path(file).read_bytes()
    for prompt, settings, words in (
        ("", None, r'The prompt is empty\. Say what .*"'),
        ("a cat", {"keyframes": {"steps": 0}}, "steps cannot be 0"),
        ("a cat", {"keyframes": {"steps": 10_000}}, "steps cannot be 10000"),
        ("a cat", [1], "no table of stages"),
        ("a cat", [], "no table of stages"),
        ("a cat", 0, "no table of stages"),
        (["a cat"], None, "no text"),
        (7, None, "no text"),
    ):
        with pytest.raises(AppError, match=words):
            client.predict(prompt, settings=settings, api_name="/show-1")
    with pytest.raises(AppError, match="no preset 'best' here"):
        client.predict("a cat", preset="best", api_name="/show-1")
    for seed in ([1], True, 1.0, {}):
        with pytest.raises(AppError, match="The seed cannot be"):
            client.predict("a cat", seed=seed, api_name="/show-1")

    # Who cancels makes room.
    running = client.submit("a cat", settings={stage: {"steps": 900} for stage in LONG}, api_name="/show-1")
    until_told(running)
    running.cancel()
    assert client.submit("a dog", api_name="/show-1").result(PATIENCE)[3]["share"] == 1


def test_who_calls_often_does_not_go_before_who_calls_once(app):
    def place(call) -> str:
        return until_told(call)[0][3]["text"]

    often, once = (Client(app.url, verbose=False, headers={"X-Forwarded-For": f"198.51.100.{n}"}) for n in (7, 8))
    long = {"settings": {stage: {"steps": 900} for stage in LONG}, "api_name": "/show-1"}
    calls = [often.submit("a cat", **long)]
    assert place(calls[0])
    calls += [often.submit("a cat again", **long)]
    assert place(calls[1]) == "In the queue: number 2"
    calls += [once.submit("a dog", **long)]
    assert place(calls[2]) == "In the queue: number 2"
    for call in calls:
        call.cancel()


def test_plain_http(app):
    question = Request(
        f"{app.url}/gradio_api/call/v2/show-1",
        json.dumps({"prompt": "a cat", "seed": 7}).encode(),
        {"Content-Type": "application/json"},
    )
    event = json.load(urlopen(question))["event_id"]
    stream = urlopen(f"{app.url}/gradio_api/call/v2/show-1/{event}", timeout=PATIENCE).read().decode()
    events = re.findall(r"event: (\w+)\ndata: (.*)\n", stream)
    kind, data = events[-1]
    assert kind == "complete"
    file, seed, settings, told = json.loads(data)
    assert seed == "7" and settings["seed"] == 7 and told["text"].startswith("Done")
    assert urlopen(file["url"]).read() == (app.outputs / file["orig_name"]).read_bytes()

    # What happened is told, in order.
    told = [json.loads(data)[3] for kind, data in events if kind == "generating"]
    shares = [each["share"] for each in told]
    assert shares == sorted(shares) and shares[-1] == 1
    stages = [step[1] for each in told if (step := re.match(r"Stage \d of 5: ([a-z ]+), step", each["text"]))]
    assert stages and stages == sorted(stages, key=STAGES.index)
    assert len({each["job"] for each in told}) == 1 and {each["preset"] for each in told} == {"one-step"}
    assert all(each["seconds_left"] is None or each["seconds_left"] >= 0 for each in told)


def test_plain_http_that_hangs_up_leaves_no_job(app):
    before = set(app.outputs.glob("jobs/*/job.json"))
    url = f"{app.url}/gradio_api/call/v2/show-1"
    long = {"prompt": "a cat", "preset": "cascade", "settings": {stage: {"steps": 900} for stage in LONG}}
    question = Request(url, json.dumps(long).encode(), {"Content-Type": "application/json"})
    with urlopen(f"{url}/{json.load(urlopen(question))['event_id']}", timeout=PATIENCE) as stream:
        while not (made := set(app.outputs.glob("jobs/*/job.json")) - before):
            assert stream.readline()
    (job,) = made
    end = time.monotonic() + PATIENCE
    while json.loads(job.read_text())["state"] != "cancelled":
        assert time.monotonic() < end, job.read_text()
        time.sleep(0.1)
    assert json.loads(job.read_text())["preset"] == "cascade"


@pytest.mark.parametrize("asked", [{}, {"promt": "a cat"}, {"prompt": "a cat", "sed": 7}])
def test_plain_http_without_a_prompt_or_with_a_wrong_name_is_told(app, asked):
    question = Request(
        f"{app.url}/gradio_api/call/v2/show-1", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(HTTPError) as refused:
        urlopen(question)
    assert refused.value.code == 422
    assert json.load(refused.value)["detail"].startswith('The call has no "prompt", or an argument of another name.')


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        (["a cat"], "complete", '"prompt": "a cat"'),
        (["a cat", "7", None, None], "complete", '"seed": 7'),
        ([], "error", "The prompt is no text."),
        (["a cat", "<7>"], "error", "The seed cannot be '<7>'."),
    ],
)
def test_plain_http_by_position(app, values, kind, words):
    url = f"{app.url}/gradio_api/call/show-1"
    question = Request(url, json.dumps({"data": values}).encode(), {"Content-Type": "application/json"})
    event = json.load(urlopen(question))["event_id"]
    last = urlopen(f"{url}/{event}", timeout=PATIENCE).read().decode().split("event: ")[-1]
    assert last.startswith(kind) and words in last


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("run/show-1", '{"data": ["a cat", null, null, null]}', 404),  # past the queue
        ("call/show-1", "[" * 5000, 400),
        ("call/v2/show-1/", '{"promt": "a cat"}', 422),
    ],
)
def test_what_plain_http_refuses(app, path, body, code):
    question = Request(f"{app.url}/gradio_api/{path}", body.encode(), {"Content-Type": "application/json"})
    with pytest.raises(HTTPError) as refused:
        urlopen(question)
    assert refused.value.code == code


def test_a_tool_for_assistants(app):
    async def use(url: str):
        told = []

        async def note(progress, total, message):
            told.append(message)

        async with (
            streamablehttp_client(f"{url}/gradio_api/mcp/") as (read, write, _),
            mcp.ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            asked = {"prompt": "a cat", "seed": 7, "settings": None, "preset": None}
            result = await session.call_tool(tools[0].name, asked, progress_callback=note)
            return tools, result, told

    before = app.videos()
    with ThreadPoolExecutor() as elsewhere:  # Playwright has an event loop running in this thread
        (tool,), result, told = elsewhere.submit(asyncio.run, use(app.url)).result(PATIENCE)
    assert "video" in tool.description and tool.inputSchema["required"] == ["prompt"]
    assert not result.isError, result
    assert any("Stage" in message for message in told if message), told
    url = re.search(r"http://127\S+\.mp4", " ".join(part.text for part in result.content))[0]
    (file,) = app.videos() - before
    assert urlopen(url).read() == file.read_bytes()
    assert f"{app.outputs}/jobs/" in url  # no copy that is gone with the server


@pytest.mark.parametrize("note", [None, AsyncMock()])  # without progress and with it
def test_an_assistant_that_hangs_up_leaves_no_job(app, note):
    before = set(app.outputs.glob("jobs/*/job.json"))

    async def hang_up(url: str) -> set[Path]:
        async with (
            streamablehttp_client(f"{url}/gradio_api/mcp/") as (read, write, _),
            mcp.ClientSession(read, write) as session,
        ):
            await session.initialize()
            (tool,) = (await session.list_tools()).tools
            long = {"prompt": "a cat", "settings": {stage: {"steps": 900} for stage in LONG}}
            call = asyncio.create_task(session.call_tool(tool.name, long, progress_callback=note))
            while not (made := set(app.outputs.glob("jobs/*/job.json")) - before):
                await asyncio.sleep(0.1)
            call.cancel()
        return made

    with ThreadPoolExecutor() as elsewhere:
        (job,) = elsewhere.submit(asyncio.run, hang_up(app.url)).result(PATIENCE)
    end = time.monotonic() + PATIENCE
    while json.loads(job.read_text())["state"] != "cancelled":
        assert time.monotonic() < end, job.read_text()
        time.sleep(0.1)


@needs_chromium
def test_what_was_typed_survives_a_reload(app, browser):
    page = visit(browser, app)
    ask(page, " ", seed="5", keyframes="7")
    expect(page.get_by_text("The prompt is empty")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("a cat that nobody asked for yet")
    page.reload()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a cat that nobody asked for yet")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("5")
    expect(page.get_by_label("Keyframes: steps")).to_have_value("7")
    page.get_by_label("Prompt", exact=True).press("Enter")
    wait_for(page, "Done")
    expect(page.locator("#status")).to_contain_text("a cat that nobody asked for yet")
    page.close()


@needs_chromium
def test_the_way_back_leads_through_what_was_shown(app, browser):
    page = visit(browser, app)
    for prompt in ("a cat", "a dog"):
        ask(page, prompt)
        expect(page.locator("#status")).to_contain_text(f"“{prompt}”")
        wait_for(page, "Done")
    page.locator("#gallery a").first.click()  # it is shown already
    page.go_back()
    expect(page.locator("#status")).to_contain_text("“a cat”")
    page.go_back()
    wait_for(page, "Ready")
    page.close()
