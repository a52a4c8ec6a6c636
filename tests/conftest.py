import os
import re
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the real hub


@pytest.fixture(scope="session")
def tiny_cascade(tmp_path_factory) -> Path:
    """The tiny cascade's TOML file, its models beside it; copy the folder to change something."""
    from tests import tiny

    return tiny.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def one_step_cascade(tiny_cascade) -> Path:
    """The tiny cascade with a single step in every stage, for what no number of steps would change."""
    file = tiny_cascade.with_name("one-step.toml")
    toml = re.sub(r"steps = \d+", "steps = 1", tiny_cascade.read_text()).replace("strength = 0.8", "strength = 1.0")
    file.write_text(toml)
    return file
