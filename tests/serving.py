"""What the page's tests share: the real server in a process of its own, a real browser, no network but this one."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

APP = Path(__file__).parents[1] / "app.py"
STAGES = ["keyframes", "interpolation", "first frame", "pixel upscale", "latent upscale"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The browser finds no host but this one: what the page would load from elsewhere is missing.
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
PATIENCE = 240  # seconds; a guard against hanging, far from what is normal
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
    cascade: str | Path,
    folder: Path,
    *flags: str,
    environment: Mapping[str, str] = os.environ,
    port: int = 0,
    program: Path = APP,
) -> Iterator[Server]:
    """Start the app, wait until it answers, kill it at the end; the same folder, and port, again is a restart."""
    with socket.create_server(("127.0.0.1", port)) as free:
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
    command = [sys.executable, program, "--cascade", cascade, "--device", "cpu", "--port", str(port), *flags]
    with log.open("a") as file:
        process = subprocess.Popen(
            [*command, "--output-dir", outputs],
            cwd=folder,
            # One thread: the tiny cascade's steps are too small to share, and wait for each other on a busy computer.
            env=dict(environment) | {"PATH": str(programs), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
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


def ask(page: Page, prompt: str, seed: str = "", **steps: str) -> None:
    """Ask for a video; `steps` are those of stages by their names, the cascade's own for the others."""
    boxes = {stage: page.get_by_label(f"{stage}: steps") for stage in ("Keyframes", "Interpolation", "Pixel upscale")}
    if any(steps.values()) and not boxes["Keyframes"].is_visible():
        page.get_by_role("button", name="Advanced").click()
        expect(boxes["Keyframes"]).to_be_visible()
    if boxes["Keyframes"].is_visible():
        for stage, box in boxes.items():
            box.fill(steps.get(stage.lower().replace(" ", "_"), ""))
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


LONG = {"keyframes": "900", "pixel_upscale": "900"}  # steps of a job that runs for many minutes, if nothing ends it


def asking(page: Page, *arguments: str, **settings: str) -> str:
    """Ask, and return the new job's id."""
    before = page.url
    ask(page, *arguments, **settings)
    page.wait_for_function("before => location.href !== before", arg=before)
    return job_in(page)
