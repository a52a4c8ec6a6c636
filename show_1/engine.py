"""The models of one cascade in the server: fetched, loaded, tried out; and the presets that they can run."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from show_1.cascade import BUNDLED, Cascade
from show_1.device import default_dtype
from show_1.errors import Show1Error
from show_1.hub import Progress
from show_1.pipeline import Show1Pipeline
from show_1.timing import LOADING_SPEED, Calibration, device_name, rehearse

PATIENCE = 10.0  # seconds that a visitor who waits already gives to the trying out
LONGEST = 120.0  # seconds that it takes where nobody waits
log = logging.getLogger("show-1")


@dataclass(frozen=True)
class Preparation:
    """What an engine does before it can make videos, its `text` a few words.

    `phase` is "fetching", "loading", "measuring" or "failed"; `since` when it began, by time.monotonic; `expected` the
    seconds that it takes, where that is known; `fetched` how far the fetching is, or was.
    """

    phase: str
    text: str
    since: float
    expected: float | None = None
    fetched: Progress | None = None

    @property
    def left(self) -> float | None:
        """The seconds left, as far as that can be told."""
        if self.expected is None:
            return None
        return max(self.expected - (time.monotonic() - self.since), 1.0)

    @property
    def share(self) -> float:
        """How much of it is over, 0 to 1."""
        if self.phase == "fetching" and self.fetched:
            return self.fetched.done / max(self.fetched.total, 1)
        return 1 - self.left / self.expected if self.left and self.expected and self.left < self.expected else 0.0


class Engine:
    """A cascade on a device. `pipeline` is None until its models are loaded; `preparation` until it is ready."""

    def __init__(self, cascade: Cascade, device: torch.device, calibration: Path, **options: Any):
        self.cascade, self.device, self.options = cascade, device, options
        self.presets = presets(cascade)
        self.pipeline: Show1Pipeline | None = None
        self.preparation: Preparation | None = Preparation("loading", "Loading the models", time.monotonic())
        self.calibration = Calibration(calibration, device_name(device, default_dtype(device)))

    def load(self) -> None:
        """Fetch and load the models; raises Show1Error, or whatever else keeps them from loading."""
        self._begin("loading", "Loading the models", None)
        try:
            self.pipeline = Show1Pipeline.from_cascade(
                self.cascade, self.device, **self.options, report=self._on_fetch, on_load=self._on_load
            )
        except Exception as error:
            fault = in_two_sentences(error, "Loading the models")
            log.error("%s", fault, exc_info=not isinstance(error, Show1Error))
            self._begin("failed", f"The models are not loaded. {fault}", None)
            raise
        self.calibration.learn_loading(self.cascade, time.monotonic() - self.preparation.since)

    def try_out(self, somebody_waits: Callable[[], bool], closing: Callable[[], bool]) -> None:
        """Learn what the steps cost here, unless that is known: a short video to warm up, another to measure.

        Who waits already is spared the second one, and all that is longer than PATIENCE.
        """
        try:
            if not self.calibration.has_all(self.cascade):
                self._begin("measuring", "Measuring this computer", None)
                if self._rehearse(somebody_waits, closing, again=True) and not somebody_waits():
                    self._rehearse(somebody_waits, closing, again=False)
                self.save_calibration()
        except Exception:
            log.exception("measuring failed")  # then the first video's own steps will tell
        finally:
            self.preparation = None

    def _rehearse(self, somebody_waits: Callable[[], bool], closing: Callable[[], bool], again: bool) -> bool:
        """Make a short video; return whether it came to its end. With `again`, another one is to follow."""
        began, since = time.monotonic(), self.preparation.since
        for left in rehearse(self.pipeline, self.calibration):
            now, waited_for = time.monotonic(), somebody_waits()
            if closing() or now - since > (PATIENCE if waited_for else LONGEST):
                return False
            whole = now - began + left
            expected = now - since + left + (whole if again and not waited_for else 0)
            self.preparation = replace(self.preparation, expected=expected)
        return True

    def save_calibration(self) -> None:
        try:
            self.calibration.save()
        except OSError as error:
            log.warning("What was learned about this device cannot be kept: %s", error)

    def _on_fetch(self, progress: Progress) -> None:
        if self.preparation.phase != "fetching":
            self._begin("fetching", "Fetching the models", None)
        loading = self.calibration.loading(self.cascade) or 2 + progress.total / LOADING_SPEED
        over = time.monotonic() - self.preparation.since
        expected = None if progress.left is None else over + progress.left + loading
        self.preparation = replace(self.preparation, fetched=progress, expected=expected)

    def _on_load(self, size: int) -> None:
        self._begin("loading", "Loading the models", self.calibration.loading(self.cascade) or 2 + size / LOADING_SPEED)

    def _begin(self, phase: str, text: str, expected: float | None) -> None:
        fetched = self.preparation.fetched if self.preparation else None
        self.preparation = Preparation(phase, text, time.monotonic(), expected, fetched)


def presets(cascade: Cascade) -> dict[str, Cascade]:
    """Return the cascades that the models of this one can run, itself first, by the names of their files.

    They are looked for beside its own file and among the bundled ones.
    """
    found = {cascade.file.stem: cascade}
    for file in (*sorted(cascade.file.parent.glob("*.toml")), *sorted(BUNDLED.glob("*.toml"))):
        try:
            other = Cascade.load(file)
            if other.has_models_of(cascade):
                found.setdefault(file.stem, other)
        except Show1Error:
            pass  # some other TOML file
    return found


def in_two_sentences(error: Exception, what: str) -> str:
    """Return a failure in two sentences."""
    if isinstance(error, Show1Error):
        return str(error)
    return f"{what} failed; the server's log says why. Try again, or with other settings."
