"""Show-1: type a prompt, get a three-second video (arXiv 2309.15818)."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from show_1.cascade import Cascade
    from show_1.errors import Show1Error
    from show_1.pipeline import Show1Pipeline, Video

__version__ = "0.1.0"
__all__ = ["Cascade", "Show1Error", "Show1Pipeline", "Video"]

HOMES = {"Cascade": "cascade", "Show1Error": "errors", "Show1Pipeline": "pipeline", "Video": "pipeline"}


def __getattr__(name: str):
    """Import a public name when it is first asked for: the libraries take seconds, and not every command needs them."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"show_1.{HOMES[name]}"), name)
