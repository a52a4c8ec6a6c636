"""A video being made: queue, progress, cancel, result. It runs in the server and outlives the page that asked for it.

A job belongs to the visitor who made it; who else has its id, which cannot be guessed, may watch. What has happened to
it is on the disk, beside its clips, so that a finished job is still there after a restart.
"""

import base64
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import secrets
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from show_1 import video
from show_1.cascade import STAGES, Cascade
from show_1.errors import Show1Error
from show_1.hub import Progress, gigabytes
from show_1.pipeline import (
    Clip,
    Event,
    Notice,
    Show1Pipeline,
    StageStart,
    StepDone,
    Video,
    check_request,
    draw_seed,
)
from show_1.stages.interpolation import SEGMENT
from show_1.timing import Calibration, Forecast, device_name, measure, stage_steps, write_atomically

WAITING, RUNNING, DONE, STOPPED, CANCELLED, FAILED = "waiting", "running", "done", "stopped", "cancelled", "failed"
ENDED = (DONE, STOPPED, CANCELLED, FAILED)
STORED = ("id", "visitor", "prompt", "seed", "changes", "file", "state", "created", "seconds", "notices", "clips")
STORED += ("settings", "fault")

CHANGEABLE = {stage: ("steps", "guidance") for stage in STAGES}
CHANGEABLE["latent_upscale"] += ("negative_prompt",)
MAX_PROMPT = 10_000  # characters; the models read the first 77 tokens
CLIP_HEIGHT = 160  # small clips are enlarged to about this, as players would blur them
PREVIEW_PAUSE = 0.4  # seconds from one preview to the next
PREVIEW_PIXELS = 250_000  # in all its frames; larger ones show fewer frames
log = logging.getLogger("show-1")


@dataclass
class Job:
    """One video: what was asked for, how far it is, what has come of it. `changed` grows with every change."""

    id: str
    visitor: str  # a hash of the visitor's secret
    prompt: str
    seed: int
    changes: dict[str, dict[str, Any]]
    file: str  # the result's name in the output folder
    state: str = WAITING
    created: float = field(default_factory=time.time)
    seconds: float | None = None  # that it took
    notices: list[str] = field(default_factory=list)
    clips: dict[str, str] = field(default_factory=dict)  # a stage's clip, by its name in the job's folder
    settings: dict[str, Any] | None = None  # those inside the result
    fault: str = ""  # why there is no result

    # While it lives:
    turn: int = 0
    cascade: Cascade | None = None
    wish: str = ""  # "cancel" or "stop"
    stage: str = ""
    step: int = 0
    preview: str = ""  # a data URL
    previewed: float = 0.0  # when that was
    forecast: Forecast | None = None
    changed: int = 0

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Jobs:
    """All jobs of a server, and the one thread that makes their videos, one after the other."""

    def __init__(
        self,
        cascade: Cascade,
        device: torch.device,
        folder: Path,
        limit: int,
        memory: str | None = None,
        models: Path | None = None,
        offline: bool = False,
    ):
        self.cascade, self.device, self.folder, self.limit = cascade, device, folder, limit
        self.loaded_with = {"memory": memory, "models": models, "offline": offline}
        self.pipeline: Show1Pipeline | None = None
        self.loading: dict[str, Any] = {"text": "Loading the models", "since": time.monotonic(), "expected": None}
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.calibration = Calibration(folder / "calibration.json", device_name(device, dtype))
        self._changed = threading.Condition(threading.RLock())
        self._jobs: dict[str, Job] = {}
        self._running: Job | None = None
        self._turn = 0
        self._closing = False
        self._read()
        self._worker = threading.Thread(target=self._work, name="jobs", daemon=True)

    def start(self) -> None:
        self._worker.start()

    def close(self, patience: float) -> None:
        """End the work at its next step; wait no longer than `patience` seconds for that."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._worker.is_alive():
            self._worker.join(patience)

    # ------------------------------------------------------------------------------------------ what visitors can do

    def submit(
        self, visitor: str, prompt: str, seed: int | None = None, changes: dict[str, dict[str, Any]] | None = None
    ) -> Job:
        """Put a video in the queue. Raises Show1Error for bad input, a full queue, a folder that cannot be written."""
        if not isinstance(prompt, str):
            raise Show1Error("The prompt is no text.", 'Say what the video should show, as in "a panda in the snow".')
        if len(prompt) > MAX_PROMPT:
            raise Show1Error(
                f"The prompt is {len(prompt):,} characters long.",
                f"Give at most {MAX_PROMPT:,}; the models read about the first 60 words.",
            )
        check_request(prompt, seed, None)
        cascade = self.changed_cascade(changes or {})
        self._check_room()
        name = f"{video.slug(prompt)}-{secrets.token_hex(6)}.mp4"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Show1Error(
                f"The output folder {self.folder} is gone, and cannot be made again: {os.strerror(error.errno)}.",
                "Bring it back, or start the page with another --output-dir.",
            ) from None
        video.check_writable(self.folder / name)
        job = Job(
            id=secrets.token_urlsafe(16),
            visitor=_hash(visitor),
            prompt=prompt,
            seed=draw_seed() if seed is None else seed,
            changes=changes or {},
            file=name,
            cascade=cascade,
        )
        with self._changed:
            self._check_room()
            # Fair turns: a visitor's next job stands behind the first one of everybody who is here.
            mine = [other.turn for other in self._jobs.values() if other.visitor == job.visitor and not other.ended]
            job.turn = max([self._turn, *(turn + 1 for turn in mine)])
            try:
                self.place(job).mkdir(parents=True)
                self._save(job)
            except OSError as error:
                raise Show1Error(
                    f"The job cannot be kept in the output folder {self.folder}: {os.strerror(error.errno)}.",
                    "Free some space there, or start the page with another --output-dir.",
                ) from None
            self._jobs[job.id] = job
            self._note(job)
        return job

    def get(self, id: str | None) -> Job | None:
        return self._jobs.get(id or "")

    def of(self, visitor: str) -> list[Job]:
        """Return a visitor's jobs, newest first."""
        mine = [job for job in list(self._jobs.values()) if self.owns(visitor, job)]
        return sorted(mine, key=lambda job: -job.created)

    def owns(self, visitor: str, job: Job) -> bool:
        return job.visitor == _hash(visitor)

    def cancel(self, visitor: str, job: Job) -> None:
        """End a job of this visitor's: at once while it waits, else within one denoising step."""
        self._wish(visitor, job, "cancel")

    def stop(self, visitor: str, job: Job) -> None:
        """End a job of this visitor's within one denoising step, with its last clip as the result."""
        if not any(stage != "first_frame" for stage in job.clips):
            raise Show1Error("There is no clip yet to keep.", "Wait for the end of the first stage, or cancel.")
        self._wish(visitor, job, "stop")

    def changed_cascade(self, changes: dict[str, dict[str, Any]]) -> Cascade:
        """Return the cascade with a job's changes; raise Show1Error for what cannot be changed, or not so."""
        settings = self.cascade.settings()
        if not isinstance(changes, dict):
            raise Show1Error("The settings are no table of stages.", 'Write them as {"keyframes": {"steps": 10}}.')
        for stage, values in changes.items():
            if stage not in CHANGEABLE or not isinstance(values, dict):
                raise Show1Error(
                    f"The settings have no stage {str(stage)[:60]!r} with a table of values.",
                    f'Write them as {{"keyframes": {{"steps": 10}}}}; the stages are {", ".join(STAGES)}.',
                )
            for key in values:
                if key not in CHANGEABLE[stage]:
                    raise Show1Error(
                        f"The settings of {stage} have no {str(key)[:60]!r} that could be changed.",
                        f"What can be changed there: {', '.join(CHANGEABLE[stage])}.",
                    )
            settings[stage] |= values
        cascade = Cascade.from_settings(settings, Path("Settings"))
        return dataclasses.replace(cascade, file=self.cascade.file, about=self.cascade.about)

    # --------------------------------------------------------------------------------------------- how a job is doing

    def place(self, job: Job) -> Path:
        """Return the job's own folder."""
        return self.folder / "jobs" / job.id

    def result(self, job: Job) -> Path | None:
        """Return the finished video, unless somebody has removed it since."""
        file = self.folder / job.file
        return file if job.state in (DONE, STOPPED) and file.is_file() else None

    def ahead(self, job: Job) -> list[Job]:
        """Return the jobs that come before a waiting one, the running one first."""
        queue = self._queue()
        waiting = queue[: queue.index(job)] if job in queue else []
        return [*([self._running] if self._running else []), *waiting]

    def wait(self, job: Job) -> float | None:
        """Return the seconds until a waiting job begins, as far as that can be told."""
        return self._total(self.ahead(job))

    def left(self, job: Job) -> float | None:
        """Return the seconds until a running job is done, as far as that can be told."""
        return job.forecast.left(time.monotonic()) if job.forecast else None

    def share(self, job: Job) -> float:
        """Return how much of the job's time is over, 0 to 1."""
        if job.state in (DONE, STOPPED):
            return 1.0
        return job.forecast.share(time.monotonic()) if job.forecast else 0.0

    def loading_left(self) -> float | None:
        """Return the seconds until the models are ready, as far as that can be told."""
        if not self.loading or not self.loading["expected"]:
            return None
        return max(self.loading["expected"] - (time.monotonic() - self.loading["since"]), 1.0)

    # ------------------------------------------------------------------------------------------------------- the work

    def _work(self) -> None:
        self._load()
        while True:
            with self._changed:
                while not self._closing and not self._queue():
                    self._changed.wait()
                if self._closing:
                    return
                job = self._queue()[0]
                self._turn = job.turn
                self._running, job.state = job, RUNNING
                self._note(job)
            try:
                self._run(job)
            finally:
                with self._changed:
                    self._running = None
                    self._note(job)
            if job.state in (DONE, STOPPED):
                self._after(job)

    def _load(self) -> str:
        """Load the models, and measure this device where it is new; return why that failed, or nothing."""
        started = time.monotonic()
        self.loading = {
            "text": "Loading the models",
            "since": started,
            "expected": self.calibration.loading(self.cascade),
        }
        try:
            self.pipeline = Show1Pipeline.from_cascade(
                self.cascade, self.device, **self.loaded_with, report=self._fetched
            )
            self.calibration.learn_loading(self.cascade, time.monotonic() - started)
        except Exception as error:
            fault = _told(error, "Loading the models")
            log.error("%s", fault, exc_info=not isinstance(error, Show1Error))
            self.loading = {"text": f"The models are not loaded. {fault}", "since": started, "expected": None}
            return fault
        self._measure()
        self.loading = {}
        return ""

    def _fetched(self, progress: Progress) -> None:
        """Tell how far the fetching of the models is."""
        text = f"Fetching the models: {gigabytes(progress.done)} of {gigabytes(progress.total)}"
        if progress.done == progress.total:
            text = "Loading the models"
        elif progress.speed:
            text += f", {gigabytes(progress.speed)} a second"
        self.loading = {"text": text, "since": time.monotonic(), "expected": progress.left}

    def _measure(self) -> None:
        """Learn what the steps cost, unless that is known already; a visitor who comes meanwhile goes first."""
        for stage in STAGES:
            if self.calibration.has(self.cascade, stage):
                continue
            self.loading = {"text": "Measuring this computer", "since": time.monotonic(), "expected": None}
            try:
                for cost in measure(self.pipeline, stage):
                    if cost:
                        self.calibration.learn(self.cascade, stage, cost)
                    if self._queue() or self._closing:
                        return
            except Exception:
                log.exception("measuring failed")  # then the first video's own steps will tell
                return
        self._save_calibration()

    def _run(self, job: Job) -> None:
        started = time.monotonic()
        events = None
        try:
            if self.pipeline is None and (fault := self._load()):
                job.fault = fault
                self._end(job, FAILED, started)
                return
            pipeline = self.pipeline.with_cascade(job.cascade)
            job.forecast = Forecast(job.cascade, self.calibration.costs(job.cascade), time.monotonic())
            events = pipeline.stream(job.prompt, seed=job.seed, path=self.folder / job.file, previews=True)
            for event in events:
                self._follow(job, event, pipeline)
                if self._closing or (job.wish and not isinstance(event, Video)):
                    events.close()
                    break
            if job.settings is None and self._closing:
                return  # the disk says that it was running: the next start will tell
            if job.settings is None and job.wish == "cancel":
                shutil.rmtree(self.place(job), ignore_errors=True)
                job.clips = {}
                self._end(job, CANCELLED, started)
            elif job.settings is None:
                self._keep_clip(job)
                self._end(job, STOPPED, started)
            else:
                self._end(job, DONE, started)
        except Exception as error:
            job.fault = _told(error, "Making this video")
            log.error("A video failed: %s", job.fault, exc_info=not isinstance(error, Show1Error))
            self._end(job, FAILED, started)
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()

    def _follow(self, job: Job, event: Event, pipeline: Show1Pipeline) -> None:
        """Take note of what the pipeline tells."""
        now = time.monotonic()
        match event:
            case Notice(message):
                job.notices.append(message)
            case StageStart(stage):
                job.stage, job.step = stage, 0
                job.forecast.begin(stage, now)
            case StepDone():
                job.step = event.step
                job.forecast.step(now)
                self._preview(job, event.preview)
            case Clip(stage) if stage != STAGES[-1]:
                self._write_clip(job, event, pipeline)
                self._learn(job, stage)
            case Clip(stage):
                self._learn(job, stage)
            case Video():
                job.settings = {key: value for key, value in event.settings.items() if key != "seconds"}
        with self._changed:
            self._note(job)

    def _learn(self, job: Job, stage: str) -> None:
        self.calibration.learn(job.cascade, stage, job.forecast.end(time.monotonic()))

    def _preview(self, job: Job, frames: np.ndarray | None) -> None:
        now = time.monotonic()
        if frames is None or now - job.previewed < PREVIEW_PAUSE:
            return
        job.previewed = now
        job.preview = preview(frames)

    def _write_clip(self, job: Job, clip: Clip, pipeline: Show1Pipeline) -> None:
        """Keep a stage's clip. Where that fails the video can still be made, so it is only told."""
        try:
            if clip.stage == "first_frame":
                name = "first_frame.png"
                part = self.place(job) / ".first_frame.png"
                Image.fromarray(enlarge(clip.frames)[0]).save(part)
                os.replace(part, self.place(job) / name)
            else:
                name = f"{clip.stage}.mp4"
                settings = pipeline.settings(job.prompt, job.seed) | {"stopped_after": clip.stage}
                video.write(self.place(job) / name, *clip_frames(clip, pipeline.cascade), settings)
            job.clips[clip.stage] = name
        except (Show1Error, OSError) as error:
            job.notices.append(f"The clip of {clip.stage.replace('_', ' ')} could not be kept: {error}")

    def _keep_clip(self, job: Job) -> None:
        """Make the last clip the result."""
        stage = [stage for stage in STAGES if stage in job.clips and stage != "first_frame"][-1]
        clip, result = self.place(job) / job.clips[stage], self.folder / job.file
        part = result.with_name(f".{result.name}.part")
        try:
            shutil.copyfile(clip, part)
            os.replace(part, result)
        finally:
            part.unlink(missing_ok=True)
        job.settings = video.read_metadata(result)
        del job.settings["program"]

    def _end(self, job: Job, state: str, started: float) -> None:
        with self._changed:
            job.state, job.preview, job.forecast = state, "", None
            job.seconds = round(time.monotonic() - started, 1)
            self._save_safely(job)
            self._note(job)

    def _after(self, job: Job) -> None:
        """Do what may follow the result: the GIF, and what was learned about the device."""
        try:
            video.write_gif(self.place(job) / "video.gif", self.folder / job.file)
            with self._changed:
                self._note(job)
        except (Show1Error, OSError) as error:
            log.warning("No GIF: %s", error)
        self._save_calibration()

    def _save_calibration(self) -> None:
        try:
            self.calibration.save()
        except OSError as error:
            log.warning("What was learned about this device cannot be kept: %s", error)

    # ----------------------------------------------------------------------------------------------------- the record

    def _queue(self) -> list[Job]:
        waiting = [job for job in list(self._jobs.values()) if job.state == WAITING]
        return sorted(waiting, key=lambda job: (job.turn, job.created))

    def _total(self, jobs: list[Job]) -> float | None:
        """Return the seconds until these are done."""
        total = (self.loading_left() or math.nan) if self.loading else 0.0
        for job in jobs:
            if job is self._running and job.forecast:
                total += self.left(job) or math.nan
            else:
                costs = self.calibration.costs(job.cascade)
                steps = stage_steps(job.cascade)
                total += sum(costs[stage].total(steps[stage]) for stage in STAGES) if costs else math.nan
        return None if math.isnan(total) else total

    def _check_room(self) -> None:
        waiting = self._queue()
        if len(waiting) >= self.limit:
            free = self._total([self._running] if self._running else [])
            when = f"in about {duration(free)}" if free else "in a few minutes"
            raise Show1Error(f"The queue is full: {len(waiting)} videos are waiting.", f"Try again {when}.")

    def _wish(self, visitor: str, job: Job, wish: str) -> None:
        if not self.owns(visitor, job):
            raise Show1Error("This video is somebody else's.", "Cancel or stop it in the browser that asked for it.")
        with self._changed:
            if job.state == WAITING and wish == "cancel":
                self._end(job, CANCELLED, time.monotonic())
            elif job.state == RUNNING:
                job.wish = wish
                self._note(job)

    def _note(self, job: Job) -> None:
        job.changed += 1
        self._changed.notify_all()

    def _save(self, job: Job) -> None:
        record = {key: getattr(job, key) for key in STORED}
        write_atomically(self.place(job) / "job.json", json.dumps(record, indent=1))

    def _save_safely(self, job: Job) -> None:
        try:
            self.place(job).mkdir(parents=True, exist_ok=True)
            self._save(job)
        except OSError as error:
            log.warning("The job %s cannot be kept: %s", job.id, error)

    def _read(self) -> None:
        """Bring the jobs of former runs back."""
        for file in self.folder.glob("jobs/*/job.json"):
            try:
                job = Job(**json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s is damaged, and left out: %s", file, error)
                continue
            if not job.ended:
                job.state = FAILED
                job.fault = "The server was stopped before this video was done. Make it again: its settings are kept."
                self._save_safely(job)
            self._jobs[job.id] = job


def preview(frames: np.ndarray) -> str:
    """Return (frames, height, width, 3) as a small moving picture, a data URL."""
    _, height, width, _ = frames.shape
    count = max(min(len(frames), 8, PREVIEW_PIXELS // (height * width)), 1)
    pictures = [
        Image.fromarray(frames[number]) for number in np.linspace(0, len(frames) - 1, count).round().astype(int)
    ]
    data = io.BytesIO()
    pictures[0].save(
        data, "WEBP", save_all=True, append_images=pictures[1:], duration=250, loop=0, quality=70, method=0
    )
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def enlarge(frames: np.ndarray) -> np.ndarray:
    """Return small frames enlarged by a whole factor, to even sizes, so that players show them sharp."""
    _, height, width, _ = frames.shape
    factor = max(-(-CLIP_HEIGHT // height), 1)
    if height * factor % 2 or width * factor % 2:
        factor += factor % 2 or 1
    return frames.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else frames


def clip_frames(clip: Clip, cascade: Cascade) -> tuple[np.ndarray, int]:
    """Return a stage's clip as it is kept: enlarged, and with its frames per second."""
    fps = max(cascade.fps // (SEGMENT - 1), 1) if clip.stage == "keyframes" else cascade.fps
    return enlarge(clip.frames), fps


def duration(seconds: float) -> str:
    """Return a time as people say it: "40 s", "3 min", "1 h 20 min"."""
    if seconds < 59.5:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _told(error: Exception, what: str) -> str:
    """Return a failure in two sentences."""
    if isinstance(error, Show1Error):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"{what} failed: the memory of the GPU is full. Close what else uses it, or take a smaller cascade."
    return f"{what} failed; the server's log says why. Try again, or with other settings."


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
