"""Show-1: type a prompt, get a three-second video (arXiv 2309.15818)."""

__version__ = "0.1.0"

from show_1.cascade import Cascade
from show_1.errors import Show1Error
from show_1.pipeline import Show1Pipeline, Video

__all__ = ["Cascade", "Show1Error", "Show1Pipeline", "Video"]
