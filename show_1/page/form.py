"""What is typed: the texts of the form's boxes to a job's settings, and back."""

import html
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import gradio as gr

from show_1 import engine
from show_1.cascade import Cascade
from show_1.errors import Show1Error
from show_1.jobs import CHANGEABLE, Jobs
from show_1.pipeline import MAX_SEED

NONE = "none"  # an empty negative prompt: nothing in its box leaves it as it is
log = logging.getLogger("show-1")


def fields() -> list[gr.Textbox]:
    """Draw a box for each setting that a visitor may change, in the order of CHANGEABLE."""
    boxes = []
    for stage, keys in CHANGEABLE.items():
        with gr.Row():
            for key in keys:
                label = f"{words(stage).capitalize()}: {words(key)}"
                boxes.append(gr.Textbox(label=label, max_lines=1, min_width=120))
    return boxes


def placeholders(cascade: Cascade) -> list[str]:
    """Return what `fields` show where nothing is typed: the settings of a preset."""
    return [str(getattr(getattr(cascade, stage), key)) or NONE for stage, keys in CHANGEABLE.items() for key in keys]


def changes(texts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return what was typed into the boxes of `fields`; the empty ones keep the preset's own settings."""
    found: dict[str, dict[str, Any]] = {}
    texts = iter(texts)
    for stage, keys in CHANGEABLE.items():
        for key in keys:
            if text := (next(texts) or "").strip():
                value = ("" if text == NONE else text) if key == "negative_prompt" else _number(text)
                found.setdefault(stage, {})[key] = value
    return found


def texts(changes: dict[str, dict[str, Any]]) -> list[str]:
    """Return what `changes` would read as these."""
    return [
        str(changes[stage][key]) or NONE if key in changes.get(stage, {}) else ""
        for stage, keys in CHANGEABLE.items()
        for key in keys
    ]


def fitting(jobs: Jobs, settings: dict[str, Any]) -> tuple[str, dict[str, dict[str, Any]], Cascade]:
    """Return what comes nearest to a video's settings here: a preset, the changes to it, and both together.

    A stage whose settings cannot be had here keeps the preset's.
    """
    theirs = settings["cascade"]
    named = [name for name, preset in jobs.presets.items() if preset.name == theirs.get("name")]
    preset = named[0] if named else next(iter(jobs.presets))
    ours = jobs.presets[preset].settings()
    found: dict[str, dict[str, Any]] = {}
    for stage, keys in CHANGEABLE.items():
        table = theirs.get(stage) if isinstance(theirs.get(stage), dict) else {}
        changed = {key: table[key] for key in keys if key in table and table[key] != ours[stage][key]}
        with suppress(Show1Error):
            if changed:
                jobs.changed_cascade(preset, {stage: changed})
                found[stage] = changed
    return preset, found, jobs.changed_cascade(preset, found)


def seed(asked: str | int | None) -> int | None:
    """Return a seed as a number, None for a new one, of what was typed; what else a program gives as it is."""
    if not isinstance(asked, str):
        return asked  # whether that is a seed is asked where the job is made
    try:
        return int(asked) if asked.strip() else None
    except ValueError:
        raise Show1Error(
            f"The seed cannot be {short(repr(asked), 60)}.", f"Give a whole number from 0 to {MAX_SEED}."
        ) from None


def words(name: str) -> str:
    """Return a stage or key as people read it."""
    return name.replace("_", " ")


def short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


@contextmanager
def errors_as_toasts(escaped: bool = True) -> Iterator[None]:
    """Turn what goes wrong into a sentence; never a stack trace. The page shows it as HTML, and so it is `escaped`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, Show1Error):
            log.exception("a request failed")
        message = engine.in_two_sentences(error, "That")
        message = html.escape(message, quote=False) if escaped else message
        raise gr.Error(message, duration=None, print_exception=False) from error


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text  # the cascade's own check tells what is wrong with it
