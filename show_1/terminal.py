"""What the commands draw in the terminal, and a notebook below its cells."""

import contextlib
import sys
from collections.abc import Iterator

from tqdm import tqdm

from show_1.hub import Progress
from show_1.pipeline import Clip, Event, Notice, StageStart, StepDone


class DownloadBar:
    """Draws the fetching of all models as one bar: bytes, speed, time left. To be given to `hub.fetch` as `report`.

    As a context it leaves the line of the bar at its end, also where fetching breaks off.
    """

    def __init__(self):
        self._bar: tqdm | None = None

    def __enter__(self) -> "DownloadBar":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: Progress) -> None:
        if self._bar is None:
            if progress.done == progress.total:
                return
            # Its own `initial`: what an earlier run has fetched says nothing of the speed.
            self._bar = tqdm(
                total=progress.total, initial=progress.done, desc="fetching models", unit="B", unit_scale=True
            )
        self._bar.update(progress.done - self._bar.n)
        if progress.done == progress.total:
            self._bar.close()
            self._bar = None  # what is found damaged then comes anew


def draw(events: Iterator[Event]) -> Iterator[Event]:
    """Draw a bar a stage, with steps and time left, and pass the events on."""
    with contextlib.ExitStack() as bars:  # a bar's line ends before anything is said of what broke it off
        for event in events:
            match event:
                case Notice(message):
                    print(message, file=sys.stderr)
                case StageStart(stage, steps):
                    bar = bars.enter_context(tqdm(total=steps, desc=f"{stage.replace('_', ' '):14}", unit="step"))
                case StepDone():
                    bar.update()
                case Clip():
                    bar.close()
            yield event
