"""What the commands draw in the terminal."""

from tqdm import tqdm

from show_1.hub import Progress


class DownloadBar:
    """Draws the fetching of all models as one bar: bytes, speed, time left. To be given to `hub.fetch` as `report`."""

    def __init__(self):
        self._bar: tqdm | None = None

    def __call__(self, progress: Progress) -> None:
        if self._bar is None:
            # Its own `initial`: what an earlier run has fetched says nothing of the speed.
            self._bar = tqdm(
                total=progress.total, initial=progress.done, desc="fetching models", unit="B", unit_scale=True
            )
        self._bar.update(progress.done - self._bar.n)
        if progress.done == progress.total:
            self._bar.close()
