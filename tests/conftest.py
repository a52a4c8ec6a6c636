import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the real hub


@pytest.fixture(scope="session")
def tiny_cascade(tmp_path_factory) -> Path:
    """The tiny cascade's TOML file, its models beside it; copy the folder to change something."""
    from tests import tiny

    return tiny.build(tmp_path_factory.mktemp("tiny"))
