"""The page, as people use it: the real server in a process of its own, a real browser, and no network but this one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Browser, Page, expect, sync_playwright

from show_1 import video

MAIN = "tiny"  # the cascade of the first test: "tiny" for speed, or "mini", the default of people without a GPU
SIZES = {"tiny": (30, 26), "mini": (288, 160)}

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
PATIENCE = 120  # seconds; a guard against hanging, far from what is normal

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install Debian's package of this name")


@dataclass
class Server:
    process: subprocess.Popen
    url: str
    outputs: Path
    log: Path

    def videos(self) -> set[Path]:
        return set(self.outputs.iterdir())


@contextmanager
def serve(cascade: str | Path, folder: Path) -> Iterator[Server]:
    """Start the app, wait until it answers, stop it at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # The worst place for Gradio's video component: an ffmpeg that is of no use, and no ffprobe beside it.
    programs = folder / "programs"
    programs.mkdir()
    (programs / "ffmpeg").write_text("#!/bin/sh\nexit 1\n")
    (programs / "ffmpeg").chmod(0o755)
    outputs, log = folder / "outputs", folder / "log.txt"
    command = [sys.executable, APP, "--cascade", cascade, "--device", "cpu", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--output-dir", outputs],
            cwd=folder,
            env=os.environ | {"PATH": str(programs)},
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


def visit(browser: Browser, server: Server, **settings) -> Page:
    page = browser.new_page(**settings)
    page.set_default_timeout(PATIENCE * 1000)
    page.goto(server.url)
    expect(status(page)).to_have_text("Ready", timeout=PATIENCE * 1000)
    return page


def status(page: Page):
    return page.locator("#status [role=status]")


def ask(page: Page, prompt: str, seed: str = "") -> None:
    page.get_by_label("Seed", exact=True).fill(seed)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Prompt", exact=True).press("Enter")


def wait_for(page: Page, text: str) -> None:
    expect(status(page)).to_contain_text(re.compile(text), timeout=PATIENCE * 1000)


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
    ask(page, "a panda jumping in the snow")
    wait_for(page, r"Done in [\d.]+ seconds")

    # What went by too fast to be drawn may be missing; the order may not be wrong.
    said = [text for text in page.evaluate("said") if text]
    assert said[0] == "In the queue"
    steps = [re.fullmatch(r"Stage (\d) of 5, ([a-z ]+): step (\d+) of \d+.*", text) for text in said]
    steps = [(int(step[1]), step[2], int(step[3])) for step in steps if step]
    assert steps == sorted(steps, key=lambda step: (step[0], step[2]))
    assert len({number for number, *_ in steps}) >= 3
    assert all(STAGES[number - 1] == name for number, name, _ in steps)

    # The video starts by itself, and moves.
    player = page.locator("#video video")
    page.wait_for_function("() => document.querySelector('#video video')?.currentTime > 0.2", timeout=30_000)
    assert player.evaluate("video => video.readyState") >= 2
    assert player.evaluate("video => [video.videoWidth, video.videoHeight]") == list(SIZES[MAIN])
    assert player.evaluate("video => video.currentSrc").startswith(main_app.url)
    assert 29 / 8 - 0.01 < player.evaluate("video => video.duration") < 29 / 8 + 0.01

    # It is the file in the output folder, with the seed that the page tells.
    (file,) = main_app.videos()
    assert file.name.startswith("a-panda-jumping-in-the-snow-")
    settings = video.read_metadata(file)
    assert settings["prompt"] == "a panda jumping in the snow"
    assert page.locator("#used-seed").get_by_role("textbox").input_value() == str(settings["seed"])
    assert {urlparse(url).hostname for url in asked_for} <= {"127.0.0.1", None}  # None: what is inside the page itself
    page.close()


@needs_chromium
def test_the_same_seed_gives_the_same_file(app, browser):
    page = visit(browser, app)
    before, files = app.videos(), []
    for _ in range(2):
        ask(page, "a cat", seed="7")
        wait_for(page, "In the queue|Stage")
        wait_for(page, "Done")
        (file,) = app.videos() - before - set(files)
        files.append(file)
    assert page.locator("#used-seed").get_by_role("textbox").input_value() == "7"
    assert files[0].read_bytes() == files[1].read_bytes()
    page.close()


@needs_chromium
def test_bad_input_is_told_in_the_page_and_the_next_run_works(app, browser):
    page = visit(browser, app)
    before = app.videos()
    harm = "<img src=x onerror='window.harmed = true'>"
    for prompt, seed, problem in (
        ("  ", "", "The prompt is empty."),
        ("a cat", "-1", "The seed cannot be -1."),
        ("a cat", "1.5", "The seed cannot be '1.5'."),
        ("a cat", harm, f'The seed cannot be "{harm}".'),
    ):
        ask(page, prompt, seed)
        toast = page.get_by_test_id("toast-body").filter(has_text=problem)
        expect(toast).to_be_visible(timeout=PATIENCE * 1000)
        wait_for(page, "No video was made")
    assert app.videos() == before

    # A prompt so long that its end is cut off, and told: what looks like HTML in it is words.
    ask(page, "word " * 80 + harm)
    wait_for(page, "Done")
    expect(page.locator("#status p").first).to_contain_text("img src")
    assert page.evaluate("window.harmed") is None
    assert len(app.videos() - before) == 1
    assert "Traceback" not in page.content()
    page.close()


@needs_chromium
@pytest.mark.parametrize("colors", ["light", "dark"])
def test_the_page_fits_a_phone(app, browser, colors):
    page = visit(browser, app, viewport={"width": 390, "height": 844}, color_scheme=colors)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for control in (page.get_by_label("Prompt", exact=True), page.get_by_role("button", name="Make the video")):
        assert control.bounding_box()["width"] >= 300
    page.close()


def test_the_gradio_client(app, tmp_path):
    client = Client(app.url, verbose=False, download_files=tmp_path)
    file, seed, told = client.predict("a cat", api_name="/show-1")
    assert video.read_metadata(file)["seed"] == int(seed)
    assert re.fullmatch(r"Done in [\d.]+ seconds", told["text"]) and told["share"] == 1
    again, same_seed, _ = client.predict("a cat", seed=int(seed), api_name="/show-1")
    assert same_seed == seed
    assert Path(again).read_bytes() == Path(file).read_bytes()
    with pytest.raises(AppError, match=r'The prompt is empty\. Say what .*"'):
        client.predict("", api_name="/show-1")


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
    file, seed, told = json.loads(data)
    assert seed == "7" and told["text"].startswith("Done")
    assert urlopen(file["url"]).read() == (app.outputs / file["orig_name"]).read_bytes()

    # All that happened is told, in order.
    told = [json.loads(data)[2] for kind, data in events if kind == "generating"]
    stages = [step[1] for each in told if (step := re.match(r"Stage \d of 5, ([a-z ]+):", each["text"]))]
    assert list(dict.fromkeys(stages)) == STAGES
    shares = [each["share"] for each in told]
    assert shares == sorted(shares) and shares[-1] == 1


@needs_chromium
def test_the_work_ends_with_its_page_and_all_of_it_with_ctrl_c(tiny_cascade, tmp_path, browser):
    slow = tiny_cascade.with_name("slow.toml")
    slow.write_text(tiny_cascade.read_text().replace("steps = 3", "steps = 900"))
    with serve(slow, tmp_path) as server:
        first, second = visit(browser, server), visit(browser, server)
        ask(first, "a cat")
        wait_for(first, "step [1-9]")
        ask(second, "a dog")
        wait_for(second, "In the queue")
        first.close()
        wait_for(second, "step [1-9]")  # only one video is made at a time: the first is no longer
        started = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
        assert time.monotonic() - started < 20
        second.close()
        said = server.log.read_text()
        assert "Traceback" not in said and "terminate called" not in said
        assert server.videos() == set()


def test_bad_flags_are_told_in_two_sentences(tiny_cascade, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            "minni": ["--cascade", "minni"],
            "cuda:9": ["--device", "cuda:9"],
            port: ["--port", port],
            "no.such.host": ["--server-name", "no.such.host"],
            "file/outputs": ["--output-dir", "file/outputs"],
        }
        (tmp_path / "file").touch()
        # All at once, as each takes seconds to start.
        command = [sys.executable, APP, "--cascade", tiny_cascade, "--device", "cpu"]
        running = {
            word: subprocess.Popen([*command, *flags], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
            for word, flags in cases.items()
        }
        for word, process in running.items():
            _, said = process.communicate(timeout=PATIENCE)
            assert process.returncode == 2, said
            assert "Traceback" not in said
            problem, remedy = said.strip().splitlines()[-2:]
            assert word in problem, said
            assert remedy.endswith((".", "?")), said
