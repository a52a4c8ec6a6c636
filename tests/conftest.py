import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.serving import CHROMIUM, CHROMIUM_FLAGS, Server, serve

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the real hub


@pytest.fixture(scope="session")
def tiny_cascade(tmp_path_factory) -> Path:
    """The tiny cascade's TOML file, its models beside it; copy the folder to change something."""
    from tests import tiny

    return tiny.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def one_step_cascade(tiny_cascade) -> Path:
    """The tiny cascade with one step in every stage and 9 frames, for what no number of them would change."""
    file = tiny_cascade.with_name("one-step.toml")
    toml = re.sub(r"steps = \d+", "steps = 1", tiny_cascade.read_text())
    file.write_text(toml.replace("strength = 0.8", "strength = 1.0").replace("frames = 8", "frames = 3"))
    return file


@pytest.fixture(scope="module")
def app(one_step_cascade, tmp_path_factory) -> Iterator[Server]:
    with serve(one_step_cascade, tmp_path_factory.mktemp("app"), "--mcp") as server:
        yield server
        assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()
