"""The page, as people use it: the real server in a process of its own, a real browser, and no network but this one."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from show_1 import video
from tests.hub_server import Hub

MAIN = "tiny"  # the cascade of the first test: "tiny" for speed, or "mini", the default of people without a GPU
SIZES = {"tiny": (18, 14), "mini": (288, 160)}

APP = Path(__file__).parents[1] / "app.py"
STAGES = ["keyframes", "interpolation", "first frame", "pixel upscale", "latent upscale"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The browser finds no host but this one: what the page would load from elsewhere is missing.
CHROMIUM_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *(
        "--disable-sync",
        "--no-first-run",
        "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ),
]
PATIENCE = 600  # seconds; a guard against hanging, far from what is normal
expect.set_options(timeout=PATIENCE * 1000)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install Debian's package of this name")


measured: dict[str, str] = {}  # cascade: what steps cost


@dataclass
class Server:
    process: subprocess.Popen
    url: str
    outputs: Path
    log: Path

    def videos(self) -> set[Path]:
        return set(self.outputs.glob("*.mp4"))


@contextmanager
def serve(
    cascade: str | Path, folder: Path, *flags: str, environment: Mapping[str, str] = os.environ
) -> Iterator[Server]:
    """Start the app, wait until it answers, kill it at the end; the same folder again is a restart."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # The worst place for Gradio's video component: an ffmpeg that is of no use, and no ffprobe beside it.
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "ffmpeg").write_text("#!/bin/sh\nexit 1\n")
    (programs / "ffmpeg").chmod(0o755)
    outputs, log = folder / "outputs", folder / "log.txt"
    outputs.mkdir(exist_ok=True)
    if calibration := measured.get(str(cascade)):  # by a server before this one: it is not what the others are about
        (outputs / "calibration.json").write_text(calibration)
    command = [sys.executable, APP, "--cascade", cascade, "--device", "cpu", "--port", str(port), *flags]
    with log.open("a") as file:
        process = subprocess.Popen(
            [*command, "--output-dir", outputs],
            cwd=folder,
            # One thread: the tiny cascade's steps are too small to share, and wait for each other on a busy computer.
            env=dict(environment) | {"PATH": str(programs), "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while not _answers(url):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield Server(process, url, outputs, log)
    finally:
        process.kill()
        process.wait()
        if (outputs / "calibration.json").is_file():
            measured.setdefault(str(cascade), (outputs / "calibration.json").read_text())


def _answers(url: str) -> bool:
    try:
        return urlopen(url, timeout=PATIENCE).status == 200
    except (URLError, ConnectionError):
        return False


@pytest.fixture(scope="module")
def app(tiny_cascade, tmp_path_factory) -> Iterator[Server]:
    with serve(tiny_cascade, tmp_path_factory.mktemp("app")) as server:
        yield server
        assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="module")
def main_app(request, tmp_path_factory) -> Iterator[Server]:
    if MAIN == "tiny":
        yield request.getfixturevalue("app")
    else:
        with serve(MAIN, tmp_path_factory.mktemp(MAIN)) as server:
            yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


def visit(browser: Browser | BrowserContext, server: Server, path: str = "", **settings) -> Page:
    """Open the page: of a browser as a new visitor, of a context as the same one in another tab."""
    page = browser.new_page(**settings)
    page.set_default_timeout(PATIENCE * 1000)
    page.goto(server.url + path)
    expect(status(page)).to_have_text(re.compile("."), timeout=PATIENCE * 1000)
    if not path:
        expect(status(page)).to_have_text("Ready", timeout=PATIENCE * 1000)
    return page


def status(page: Page):
    return page.locator("#status [role=status]")


def ask(page: Page, prompt: str, seed: str = "", steps: str = "") -> None:
    """Ask for a video; `steps` are those of the keyframes, to make it last."""
    box = page.get_by_label("Keyframes: steps")
    if steps and not box.is_visible():
        page.get_by_role("button", name="Advanced").click()
        expect(box).to_be_visible()
    if box.is_visible():
        box.fill(steps)
    page.get_by_label("Seed", exact=True).fill(seed)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Prompt", exact=True).press("Enter")


def wait_for(page: Page, text: str) -> None:
    expect(status(page)).to_contain_text(re.compile(text), timeout=PATIENCE * 1000)


def step_of(page: Page, stage: int = 1) -> int:
    return int(page.locator("#progress li .steps").nth(stage).inner_text().split("/")[0])


def wait_for_step(page: Page, step: int) -> None:
    page.wait_for_function(
        "step => parseInt(document.querySelectorAll('#progress li .steps')[1]?.innerText) >= step", arg=step
    )


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def job_in(page: Page) -> str:
    page.wait_for_url("**/?job=*")
    return page.url.partition("?job=")[2]


def asking(page: Page, *arguments: str, **settings: str) -> str:
    """Ask, and return the new job's id."""
    before = page.url
    ask(page, *arguments, **settings)
    page.wait_for_function("before => location.href !== before", arg=before)
    return job_in(page)


@needs_chromium
def test_a_prompt_becomes_a_video_that_plays(main_app, browser):
    page = visit(browser, main_app, viewport={"width": 1280, "height": 800})
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
    ask(page, "a panda jumping in the snow", steps="40")
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
    assert player.evaluate("video => [video.videoWidth, video.videoHeight]") == list(SIZES[MAIN])
    assert player.evaluate("video => video.currentSrc").startswith(main_app.url)
    assert 29 / 8 - 0.01 < player.evaluate("video => video.duration") < 29 / 8 + 0.01

    # It is the file in the output folder, which can be taken away in two forms.
    (file,) = main_app.videos()
    assert file.name.startswith("a-panda-jumping-in-the-snow-")
    settings = video.read_metadata(file)
    assert settings["prompt"] == "a panda jumping in the snow"
    assert settings["cascade"]["keyframes"]["steps"] == 40
    for name, beginning in (("Download MP4", file.read_bytes()), ("Download GIF", b"GIF8")):
        with page.expect_download() as download:
            page.get_by_role("link", name=name).click()
        assert Path(download.value.path()).read_bytes().startswith(beginning)
    press(page, "Reuse")
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(settings["seed"]))
    assert {urlparse(url).hostname for url in asked_for} <= {"127.0.0.1", None}  # None: what is inside the page itself
    page.close()


@needs_chromium
def test_a_job_outlives_its_page(app, browser):
    mine, yours = browser.new_context(), browser.new_context()
    page = visit(mine, app)
    job = asking(page, "a cat", steps="900")
    wait_for_step(page, 2)
    page.reload()
    wait_for(page, "Stage 1 of 5")
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
    wait_for(page, "Cancelled")
    wait_for(other, "Cancelled")
    expect(visit(yours, app, "/?job=nosuchjob").locator("#status")).to_contain_text("There is no such job here")
    mine.close(), yours.close()


@needs_chromium
def test_stop_here_keeps_the_clip(app, browser):
    page = visit(browser, app)
    before = app.videos()
    page.get_by_role("button", name="Advanced").click()
    page.get_by_label("Interpolation: steps").fill("900")
    ask(page, "a cat")
    wait_for(page, "Stage 2 of 5")
    press(page, "Stop here")
    wait_for(page, "Stopped after the keyframes")
    page.wait_for_function("() => document.querySelector('#screen video')?.currentTime > 0.2")
    (file,) = app.videos() - before
    assert video.read_metadata(file)["stopped_after"] == "keyframes"
    press(page, "Again with another seed")
    wait_for(page, "Stage 2 of 5")
    press(page, "Cancel")
    wait_for(page, "Cancelled")
    page.close()


@needs_chromium
def test_two_visitors_take_turns_and_see_their_own_until_the_queue_is_full(one_step_cascade, tmp_path, browser):
    with serve(one_step_cascade, tmp_path, "--queue-size", "3") as server:
        context = browser.new_context()
        first, second = visit(context, server), visit(browser, server)
        running = asking(first, "a cat", steps="900")
        wait_for(first, "Stage 1 of 5")
        asking(first, "a cat again")
        last = asking(first, "a last cat")
        wait_for(first, "In the queue: number 3")
        asking(second, "a dog")
        wait_for(second, "In the queue: number 2")  # before the first visitor's second
        wait_for(first, "In the queue: number 4")
        ask(second, "one dog too many")
        toast = second.get_by_test_id("toast-body").filter(has_text="The queue is full: 3 videos are waiting.")
        expect(toast).to_contain_text("Try again in")
        first.goto(f"{server.url}/?job={running}")
        press(first, "Cancel")
        wait_for(second, "Done")
        first.goto(f"{server.url}/?job={last}")
        wait_for(first, "Done")
        expect(first.locator("#gallery li")).to_have_count(2)
        expect(second.locator("#gallery li")).to_have_count(1)
        assert "dog" not in first.locator("#gallery").inner_text()
        storage = first.evaluate("() => JSON.stringify(localStorage)")

    # After a restart they are all still there. (The server has another port now, hence the storage carried over.)
    with serve(one_step_cascade, tmp_path) as server:
        context.add_init_script(f"if (!localStorage.length) Object.assign(localStorage, {storage})")
        page = visit(context, server)
        expect(page.locator("#gallery li")).to_have_count(2)
        page.locator("#gallery a").filter(has_text="a last cat").click()
        wait_for(page, "Done")
        page.wait_for_function("() => document.querySelector('#screen video')?.readyState >= 2")
        assert "Traceback" not in server.log.read_text()
    context.close(), second.close()


@needs_chromium
def test_jobs_outlive_a_server_that_is_killed(tiny_cascade, tmp_path, browser):
    with serve(tiny_cascade, tmp_path) as server:
        page = visit(browser, server)
        running = asking(page, "a cat", seed="3", steps="900")
        wait_for_step(page, 1)
        waiting = asking(page, "a dog", seed="4", steps="2")
        wait_for(page, "In the queue: number 2")
        page.close()
    with serve(tiny_cascade, tmp_path) as server:
        first, second = visit(browser, server, f"/?job={running}"), visit(browser, server, f"/?job={waiting}")
        wait_for_step(first, 1)
        wait_for(second, "In the queue: number 2")
        expect(second.locator("#status")).to_contain_text("Seed 4")
        first.close(), second.close()


@needs_chromium
def test_another_preset_is_chosen_before_and_after(tiny_cascade, one_step_cascade, tmp_path, browser):
    one_step_cascade.write_text(one_step_cascade.read_text().replace('"Tiny"', '"One step"'))
    with serve(tiny_cascade, tmp_path) as server:
        page = visit(browser, server)
        page.get_by_role("button", name="Advanced").click()
        expect(page.get_by_label("Keyframes: steps")).to_have_attribute("placeholder", "3")
        page.get_by_role("radio", name="One step").check()
        expect(page.get_by_label("Keyframes: steps")).to_have_attribute("placeholder", "1")
        ask(page, "a cat", seed="5")
        wait_for(page, "Done")
        expect(page.locator("#status")).to_contain_text("Seed 5 · One step")
        before = page.url
        page.get_by_label("Preset for another try").click()
        page.get_by_role("option", name="Tiny", exact=True).click()
        press(page, "Again with this preset")
        page.wait_for_function("before => location.href !== before", arg=before)
        expect(page.locator("#status")).to_contain_text("Seed 5 · Tiny")
        wait_for(page, "Done")
        told = [video.read_metadata(file)["cascade"]["name"] for file in sorted(server.videos(), key=os.path.getmtime)]
        assert told == ["One step", "Tiny"]
        page.close()


@needs_chromium
def test_mini_is_offered_while_the_models_are_fetched(tiny_cascade, tmp_path, browser):
    (tmp_path / "elsewhere").mkdir()
    cascade = shutil.copy(tiny_cascade, tmp_path / "elsewhere")  # no models beside it: they come from the hub
    hub = Hub(tiny_cascade.parent)
    hub.pause = 8
    environment = hub.environment(tmp_path / "home") | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    with serve(cascade, tmp_path, environment=environment) as server:
        page = visit(browser, server, "/?")
        wait_for(page, "Fetching the models")
        expect(page.locator("#progress li").first).to_contain_text(re.compile(r"download.* of [\d.]+ MB", re.DOTALL))
        press(page, "Use Mini meanwhile")
        expect(page.get_by_role("radio", name="Mini", exact=True)).to_be_checked()
        expect(page.locator("#examples")).to_contain_text("a panda jumping in the snow")
        page.get_by_role("radio", name="Mini fast").check()
        ask(page, "a panda in the snow")
        page.wait_for_function("() => document.querySelectorAll('#clips figure').length >= 1")  # it works
        wait_for(visit(browser, server, "/?job=none"), "no such job")
        hub.pause = 0
        page.get_by_role("radio", name="Tiny", exact=True).check()
        ask(page, "a cat")
        wait_for(page, "Done")
        assert "Traceback" not in server.log.read_text()
        page.close()
    hub.stop()


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
    page.get_by_role("button", name="Settings from a video").click()
    made = Client(app.url, verbose=False, download_files=tmp_path).predict(
        "a dog", seed="42", settings={"keyframes": {"steps": 2}}, api_name="/show-1"
    )[0]
    page.locator("#drop input[type=file]").set_input_files(made)
    expect(page.locator("#told")).to_contain_text("the same frames can be expected here")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a dog")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("42")
    page.get_by_role("button", name="Advanced").click()
    expect(page.get_by_label("Keyframes: steps")).to_have_value("2")

    frames = video.read_frames(made)
    settings = video.read_metadata(made)
    other, alien, damaged = (tmp_path / f"{name}.mp4" for name in ("other", "alien", "damaged"))
    settings["cascade"]["name"], settings["versions"]["torch"] = "Elsewhere", "1.0"
    video.write(other, frames, 8, settings)
    video.write(alien, frames, 8, {"prompt": "a cat"})
    damaged.write_bytes(b"no video")
    page.locator("#drop input[type=file]").set_input_files(other)
    expect(page.locator("#told")).to_contain_text("it was made by the cascade Elsewhere, here runs Tiny; torch is ")
    for file, problem in ((alien, "lack seed"), (damaged, "is damaged, or is no MP4 video")):
        page.locator("#drop input[type=file]").set_input_files(file)
        expect(page.locator("#told")).to_contain_text(problem)
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
        ask(page, prompt, seed, steps)
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
    ask(page, "a cat")
    wait_for(page, "Done")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    unnamed = """() => [...document.querySelectorAll('button, a, input, textarea, progress, video, img')]
        .filter(each => each.checkVisibility() && each.ariaHidden !== 'true'
            && !(each.innerText || each.labels?.length || each.title || each.ariaLabel || each.alt))
        .map(each => each.outerHTML.slice(0, 120))"""
    assert page.evaluate(unnamed) == []
    page.close()


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
    ):
        with pytest.raises(AppError, match=words):
            client.predict(prompt, settings=settings, api_name="/show-1")
    with pytest.raises(AppError, match="no preset 'best' here"):
        client.predict("a cat", preset="best", api_name="/show-1")

    # Who cancels makes room.
    running = client.submit("a cat", settings={"keyframes": {"steps": 900}}, api_name="/show-1")
    while not running.outputs():
        time.sleep(0.1)
    running.cancel()
    assert client.submit("a dog", api_name="/show-1").result(PATIENCE)[3]["share"] == 1


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
    assert stages == sorted(stages, key=STAGES.index)


def test_a_tool_for_assistants(tiny_cascade, tmp_path):
    mcp = pytest.importorskip("mcp")
    from mcp.client.streamable_http import streamablehttp_client

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
            result = await session.call_tool(tools[0].name, {"prompt": "a cat", "seed": "7"}, progress_callback=note)
            return tools, result, told

    with serve(tiny_cascade, tmp_path, "--mcp") as server:
        with ThreadPoolExecutor() as elsewhere:  # Playwright has an event loop running in this thread
            (tool,), result, told = elsewhere.submit(asyncio.run, use(server.url)).result(PATIENCE)
        assert "video" in tool.description and tool.inputSchema["required"] == ["prompt"]
        assert not result.isError, result
        assert any("Stage" in message for message in told if message), told
        url = re.search(r"http://127\S+\.mp4", " ".join(part.text for part in result.content))[0]
        (file,) = server.videos()
        assert urlopen(url).read() == file.read_bytes()


@needs_chromium
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_one_ctrl_c_ends_all(tiny_cascade, tmp_path, browser, how):
    with serve(tiny_cascade, tmp_path) as server:
        page = visit(browser, server)
        asking(page, "a cat", steps="900")
        wait_for_step(page, 1)
        started = time.monotonic()
        server.process.send_signal(how)
        assert server.process.wait(60) == 0
        assert time.monotonic() - started < 20
        page.close()
        said = server.log.read_text()
        assert "Traceback" not in said and "terminate called" not in said
        assert server.videos() == set()
        assert not list(server.outputs.rglob(".*"))


def test_bad_flags_are_told_in_two_sentences(tiny_cascade, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            "minni": ["--cascade", "minni"],
            "cuda:9": ["--device", "cuda:9"],
            port: ["--port", port],
            "no.such.host": ["--server-name", "no.such.host"],
            "file/outputs": ["--output-dir", "file/outputs"],
            "--auth": ["--auth", "me"],
            "queue size": ["--queue-size", "0"],
        }
        (tmp_path / "file").touch()
        # One process for all, as each would take seconds to start.
        starts = [["app.py", "--cascade", str(tiny_cascade), "--device", "cpu", *flags] for flags in cases.values()]
        program = f"""
import sys, app
for sys.argv in {starts!r}:
    print("exit code", app.main(), file=sys.stderr)
"""
        environment = os.environ | {"PYTHONPATH": str(APP.parent)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, timeout=PATIENCE
        )
        assert "Traceback" not in done.stderr
        *told, rest = done.stderr.split("exit code 2\n")
        assert not rest and len(told) == len(cases), done.stderr
        for word, said in zip(cases, told, strict=True):
            problem, remedy = said.strip().splitlines()[-2:]
            assert word in problem, said
            assert remedy.endswith((".", "?", "PASSWORD")), said
