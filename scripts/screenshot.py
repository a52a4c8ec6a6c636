"""Make a video on the page and save pictures of it, wide and narrow: `python -m scripts.screenshot --help`."""

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from benchmarks.page import ROOT, serve

SIZES = {1280: 720, 390: 844}
HOUR = 3600 * 1000  # milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Save docs/page-1280.png and docs/page-390.png.")
    parser.add_argument("--cascade", default="mini")
    parser.add_argument("--prompt", default="a panda jumping in the snow")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="the folder of the pictures; default: docs/")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as outputs, serve(arguments.cascade, Path(outputs)) as url:
        _take(url, arguments)


def _take(url: str, arguments: argparse.Namespace) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(color_scheme="dark" if arguments.dark else "light")
        page.goto(url)
        page.get_by_label("Seed", exact=True).fill(arguments.seed)
        page.get_by_label("Prompt", exact=True).fill(arguments.prompt)
        page.get_by_label("Prompt", exact=True).press("Enter")
        page.locator("#status").get_by_text("Done in").wait_for(timeout=HOUR)
        page.get_by_role("link", name="Download GIF").wait_for()
        page.wait_for_function("() => [...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
        page.evaluate(
            "() => { const video = document.querySelector('#screen video'); video.pause(); video.currentTime = 1 }"
        )
        page.evaluate("document.activeElement.blur()")  # no blinking cursor
        for width, height in SIZES.items():
            page.set_viewport_size({"width": width, "height": height})
            page.mouse.move(0, 0)
            page.wait_for_timeout(1000)  # for the layout, and for the player's controls to fade
            file = arguments.out / f"page-{width}.png"
            page.screenshot(path=file, full_page=True)
            print(file)
        browser.close()


if __name__ == "__main__":
    main()
