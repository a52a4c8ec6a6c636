"""What the page costs: against the command, until it can be used, from a cancel to the next job, and its time left.

`python -m benchmarks.page` needs requirements-dev.txt, Chromium, and a computer with nothing else to do.
"""

import argparse
import json
import multiprocessing
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.cascade import keeping
from benchmarks.figures import write_figures
from show_1 import Cascade, Show1Error
from show_1.errors import exit_code
from show_1.files import check_outputs

ROOT = Path(__file__).parents[1]
PROMPT = "a panda jumping in the snow"
PATIENCE = 3600  # seconds; a guard against hanging
QUARTERS = (0.25, 0.5, 0.75)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__.splitlines()[0])
    parser.add_argument("--cascade", default="mini")
    parser.add_argument("--rounds", type=int, default=10, help="videos each way, half as many for the time left")
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep the figures there")
    return exit_code(lambda: _run(parser.parse_args()))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.rounds < 1:
        raise Show1Error("There must be a round to measure.", "Give --rounds 1 or more.")
    check_outputs(arguments.json)
    Cascade.load(arguments.cascade)  # what is wrong with it is said here, not by a server that does not answer
    figures: dict[str, Any] = {}
    with keeping("the finished figures"):
        measure(arguments.cascade, arguments.rounds, figures)
    if not figures:
        raise Show1Error("No figure is finished.", "Let it run longer.")
    print(told(figures))
    write_figures(arguments.json, {"cascade": arguments.cascade} | figures)


def measure(cascade: str, rounds: int, figures: dict[str, Any]) -> None:
    """Measure all that the page costs; each figure is put into `figures` as soon as it is there."""
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder, serve(cascade, Path(folder)) as url:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        figures["usable_seconds"] = until_usable(browser, url)
        # Asked at once, while the models load: the very first run of this computer.
        for _ in range(1 + max(rounds // 2 - 1, 1)):
            figures["time_left"] = [*figures.get("time_left", ()), time_left(url)]
        figures["cancel_to_next_step_seconds"] = cancel_to_next_step(browser, url)
        figures |= against_the_command(cascade, rounds, browser, url, Path(folder))
        browser.close()


def told(figures: dict[str, Any]) -> str:
    """Return the figures that are there in sentences."""
    sentences = {
        "usable_seconds": "usable after the server answers: {:.2f} s",
        "cancel_to_next_step_seconds": "from cancel to the next job's first step: {:.2f} s",
        "command_seconds": "a video by the command: {:.2f} s",
        "page_seconds": "a video by the page: {:.2f} s",
        "page_to_command": "page to command: {:.3f}",
    }
    lines = [sentence.format(figures[name]) for name, sentence in sentences.items() if name in figures]
    if "time_left" in figures:
        lines.append("time left told, against the true rest, at a quarter, half and three quarters of the way:")
        for number, errors in enumerate(figures["time_left"], 1):
            shown = ", ".join("none" if error is None else f"{100 * error:+.0f} %" for error in errors)
            lines.append(f"  run {number}: {shown}")
    return "\n".join(lines)


@contextmanager
def serve(cascade: str, folder: Path) -> Iterator[str]:
    """Start the app with an empty output folder, yield its address once it answers, end it."""
    command = [sys.executable, "-u", ROOT / "app.py", "--cascade", cascade, "--output-dir", folder, "--no-share"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        addresses = (found[0] for line in server.stdout if (found := re.search(r"http://127\S+", line)))
        if (url := next(addresses, None)) is None:
            raise Show1Error("The server ended before it answered.", "What it says above is why.")
        yield url
    finally:
        server.terminate()
        server.wait()


def until_usable(browser: Browser, url: str) -> float:
    """Return the seconds from the server's first answer until a prompt can be typed and the page says how it is."""
    while not _answers(url):
        time.sleep(0.02)
    started = time.monotonic()
    page = _open(browser, url)
    page.get_by_label("Prompt", exact=True).fill("a")
    seconds = time.monotonic() - started
    page.close()
    return seconds


def time_left(url: str) -> list[float | None]:
    """Ask for a video by the endpoint; return how far the time left was off at each of QUARTERS, as a share."""
    started = time.monotonic()
    told = [(time.monotonic() - started, status["seconds_left"]) for status in call(url)]
    total = told[-1][0]
    errors = []
    for quarter in QUARTERS:
        at, rest = quarter * total, (1 - quarter) * total
        when, left = next(((when, left) for when, left in reversed(told) if when <= at), (0, None))
        errors.append(None if left is None else (left - (at - when)) / rest - 1)
    return errors


def call(url: str) -> Iterator[dict[str, Any]]:
    """Ask for a video by plain HTTP and yield each status as it is told."""
    url = f"{url}/gradio_api/call/v2/show-1"
    body = json.dumps({"prompt": PROMPT}).encode()
    event = json.load(urlopen(Request(url, body, {"Content-Type": "application/json"})))["event_id"]
    with urlopen(f"{url}/{event}", timeout=PATIENCE) as answer:
        for line in answer:
            if line.startswith(b"event: error"):
                raise Show1Error("The server could not make a video.", "What it says above is why.")
            if line.startswith(b"data: ["):
                yield json.loads(line.removeprefix(b"data: "))[3]


def cancel_to_next_step(browser: Browser, url: str) -> float:
    """Return the seconds from a click on Cancel until the next one in the queue has done a step."""
    page = _open(browser, url)
    page.get_by_role("button", name="Advanced").click()
    page.get_by_label("Keyframes: steps").fill("900")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Prompt", exact=True).press("Enter")
    page.locator("#status").get_by_text("Stage 1 of 5").wait_for()
    waiting = call(url)
    next(waiting)
    started = time.monotonic()
    page.get_by_role("button", name="Cancel", exact=True).click()
    next(status for status in waiting if re.search(r", step [1-9]", status["text"]))
    seconds = time.monotonic() - started
    for _ in waiting:
        pass
    page.close()
    return seconds


def against_the_command(cascade: str, rounds: int, browser: Browser, url: str, folder: Path) -> dict[str, Any]:
    """Make videos in turns by the command's engine and on the page, both warm, a browser looking on; medians.

    The ratio is the median of the rounds' own: within minutes a computer's pace may change by a fifth, for both alike.
    """
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    command = multiprocessing.get_context("spawn").Process(target=_command, args=(theirs, cascade), daemon=True)
    command.start()
    theirs.close()  # so that the end of the command is heard
    page = _open(browser, url)
    ways: dict[str, list[float]] = {"command": [], "page": []}
    for seed in range(rounds + 1):  # the first one warms up
        for way in list(ways)[:: (-1) ** seed]:  # each way is first as often as the other
            if way == "command":
                try:
                    ours.send((seed, str(folder / "command.mp4")))
                    ways[way].append(ours.recv())
                except (EOFError, OSError):
                    raise Show1Error(
                        "The command could not make a video beside the page.", "What it says above is why."
                    ) from None
            else:
                ways[way].append(_on_the_page(page, seed, folder))
    ours.send(None)
    command.join()
    medians = {f"{way}_seconds": statistics.median(seconds[1:]) for way, seconds in ways.items()}
    ratios = [page / command for command, page in zip(ways["command"], ways["page"], strict=True)][1:]
    return medians | {"page_to_command": statistics.median(ratios), "rounds": ways}


def _command(pipe: Connection, cascade: str) -> None:
    """What `python -m show_1` does once its models are loaded, as often as it is asked."""
    from show_1 import Show1Pipeline

    pipeline = Show1Pipeline.from_cascade(cascade)
    while request := pipe.recv():
        started = time.monotonic()
        pipeline(PROMPT, seed=request[0], path=request[1])
        pipe.send(time.monotonic() - started)


def _on_the_page(page: Page, seed: int, folder: Path) -> float:
    """Ask for a video on the page, wait until it plays, return the seconds that the server took for it."""
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    before = page.url
    page.get_by_label("Prompt", exact=True).press("Enter")
    page.wait_for_function("before => location.href !== before", arg=before)
    job = page.url.partition("?job=")[2]
    record = folder / "jobs" / job / "job.json"
    while json.loads(record.read_text())["state"] in ("waiting", "running"):
        time.sleep(0.1)
    page.wait_for_function(
        "job => { const video = document.querySelector('#screen video');"
        " return video?.src.includes(job) && video.currentTime > 0; }",
        arg=job,
    )
    # What is done beside must not run into the other way's time.
    page.locator(f"#downloads a[href*='{job}'][href$='.gif']").wait_for()
    return json.loads(record.read_text())["seconds"]


def _open(browser: Browser, url: str) -> Page:
    page = browser.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(url)
    page.locator("#status [role=status]").get_by_text(re.compile(".")).wait_for()
    return page


def _answers(url: str) -> bool:
    try:
        return urlopen(url).status == 200
    except (URLError, ConnectionError):
        return False


if __name__ == "__main__":
    sys.exit(main())
