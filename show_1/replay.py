"""Make a video of ours again from the settings inside it, and say whether the same frames came out."""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from show_1 import video
from show_1.cascade import STAGES, Cascade
from show_1.device import check_device, default_dtype
from show_1.errors import Show1Error, exit_code
from show_1.jobs import clip_frames
from show_1.pipeline import Clip, Show1Pipeline, Video, check_request, versions
from show_1.terminal import DownloadBar, draw

MODEL = ("model", "revision", "variant")  # the keys of a table that say which weights it has


def read(file: str | Path) -> dict[str, Any]:
    """Return the settings inside a video; raise Show1Error if it holds none, or not all that `replay` needs."""
    settings = video.read_metadata(file)
    kinds = {"prompt": str, "seed": int, "cascade": dict, "device": str, "dtype": str, "versions": dict}
    for key, kind in kinds.items():
        if not isinstance(settings.get(key), kind):
            raise Show1Error(f"The settings in {Path(file).name} lack {key}.", "Choose a video that Show-1 made.")
    return settings


def here(device: torch.device, pipeline: Show1Pipeline | None) -> dict[str, Any]:
    """Return what a video made here would tell beside its cascade; without the pipeline, not which weights."""
    dtype = pipeline.keyframes.unet.dtype if pipeline else default_dtype(device)
    return {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": pipeline.weights if pipeline else None,
        "versions": versions(device, dtype),
    }


def differences(theirs: dict[str, Any], ours: dict[str, Any], cascade: Cascade) -> list[str]:
    """Return what may make other frames here, in words; `cascade` is ours with the video's settings, where they fit."""
    found = []
    there, mine = theirs["cascade"], cascade.settings()
    if there.get("name") != mine["name"]:
        found.append(f"it was made by the cascade {_shown(there.get('name'))}, here runs {_shown(mine['name'])}")
    for table in mine:
        if table == "name":
            continue
        if not isinstance(mine[table], dict):
            if there.get(table) != mine[table]:
                found.append(f"{table} is {_shown(mine[table])} here, not {_shown(there.get(table))}")
            continue
        values = there.get(table) if isinstance(there.get(table), dict) else {}
        for key in mine[table] | values:
            if mine[table].get(key) != values.get(key):
                found.append(f"{table}.{key} is {_shown(mine[table].get(key))} here, not {_shown(values.get(key))}")
    for key in ("device", "dtype"):
        if theirs[key] != ours[key]:
            found.append(f"the {key} is {ours[key]} here, not {_shown(theirs[key])}")
    # The fingerprint is one of the weights in their dtype, and of the configurations.
    if theirs["dtype"] == ours["dtype"] and ours["weights"] and theirs.get("weights") not in (None, ours["weights"]):
        found.append("the models' weights or configurations are others")
    for name, version in ours["versions"].items():
        if theirs["versions"].get(name) != version:
            found.append(f"{name} is {version} here, not {_shown(theirs['versions'].get(name))}")
    return found


def main(argv: Sequence[str]) -> int:
    """The command `python -m show_1 replay`; returns 0 for the same frames, 1 for others."""
    parser = argparse.ArgumentParser(prog="python -m show_1 replay", description=__doc__)
    parser.add_argument("file", metavar="FILE.mp4", type=Path, help="a video that Show-1 made")
    parser.add_argument(
        "--cascade", metavar="NAME|FILE", help="where its models are; default: the bundled one it names"
    )
    parser.add_argument("--device", help="default: the one it was made on, where it is here")
    parser.add_argument("--out", metavar="FILE.mp4", type=Path, help="keep the new video there")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: _replay(arguments))


def _replay(arguments: argparse.Namespace) -> int:
    settings = read(arguments.file)
    check_request(settings["prompt"], settings["seed"], arguments.out)
    before = video.read_frames(arguments.file)
    local = _local(settings, arguments.cascade, arguments.file)
    cascade = _with_models(settings["cascade"], local, arguments.file)
    device = _device(settings, arguments.device)
    dtype = getattr(torch, settings["dtype"], None)
    dtype = dtype if isinstance(dtype, torch.dtype) else None
    print(f"{cascade.name} on {device.type}: loading", file=sys.stderr)
    with DownloadBar() as bar:
        pipeline = Show1Pipeline.from_cascade(cascade, device, dtype, report=bar)

    frames, fps = _frames(pipeline, settings)
    told = pipeline.settings(settings["prompt"], settings["seed"])
    if "stopped_after" in settings:
        told["stopped_after"] = settings["stopped_after"]
    if arguments.out:
        video.write(arguments.out, frames, fps, told)
    with tempfile.TemporaryDirectory() as folder:  # H.264 changes frames a little: compare what came through it
        video.write(Path(folder, "video.mp4"), frames, fps, {})
        after = video.read_frames(Path(folder, "video.mp4"))
    if before.shape == after.shape and np.array_equal(before, after):
        print("The same frames.")
        return 0
    if before.shape != after.shape:
        print(f"Other frames: {_size(after)} instead of {_size(before)}.")
    else:
        apart = np.abs(before.astype(int) - after)
        count = int(apart.any(axis=(1, 2, 3)).sum())
        print(f"{count} of {len(after)} frames differ, by up to {apart.max()} of 255, {apart.mean():.2f} on average.")
    for difference in differences(settings, here(device, pipeline), cascade):
        print(f"- {difference}")
    return 1


def _frames(pipeline: Show1Pipeline, settings: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Make the video, or the clip that it was stopped at."""
    for event in draw(pipeline.stream(settings["prompt"], seed=settings["seed"])):
        match event:
            case Clip(stage) if stage == settings.get("stopped_after"):
                return clip_frames(stage, event.frames, pipeline.cascade)
            case Video(frames):
                return frames, pipeline.cascade.fps


def _local(settings: dict[str, Any], wanted: str | None, file: Path) -> Cascade:
    """Return the cascade here whose models made the video."""
    if wanted:
        return Cascade.load(wanted)
    for name in Cascade.names():
        if (cascade := Cascade.load(name)).name == settings["cascade"].get("name"):
            return cascade
    raise Show1Error(
        f"{file.name} was made by the cascade {_shown(settings['cascade'].get('name'))}, which is not bundled.",
        "Name its TOML file with --cascade.",
    )


def _with_models(tables: dict[str, Any], local: Cascade, file: Path) -> Cascade:
    """Return the video's cascade with the models of the one here: a video does not say what is fetched and loaded."""
    tables = tables | {"name": local.name}
    for stage in STAGES:
        if isinstance(tables.get(stage), dict):
            mine = {key: value for key, value in local.settings()[stage].items() if key in MODEL}
            tables[stage] = {key: value for key, value in tables[stage].items() if key not in MODEL} | mine
    return dataclasses.replace(Cascade.from_settings(tables, file), file=local.file, about=local.about)


def _device(settings: dict[str, Any], wanted: str | None) -> torch.device:
    if wanted:
        return check_device(wanted)
    try:
        return check_device(settings["device"])
    except Show1Error:
        return check_device(None)


def _size(frames: np.ndarray) -> str:
    return f"{frames.shape[0]} of {frames.shape[2]} by {frames.shape[1]}"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:59] + "…"
