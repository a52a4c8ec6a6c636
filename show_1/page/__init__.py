"""The page of `app.py`: what is laid out, typed and shown, and the same for programs."""

from show_1.page.layout import STYLE, build

__all__ = ["STYLE", "build"]
