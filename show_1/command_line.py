"""The command line: `python -m show_1 "a panda jumping in the snow"`."""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from show_1 import hosts
from show_1.cascade import Cascade
from show_1.device import check_device, load_cascade
from show_1.errors import Show1Error, exit_code
from show_1.files import writing
from show_1.pipeline import MAX_SEED, Clip, Show1Pipeline, check_request, draw_seed
from show_1.terminal import DownloadBar, draw
from show_1.video import slug

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
OUTPUTS = hosts.detect().outputs


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _run(arguments), debug=arguments.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m show_1",
        description="Make a three-second video from a prompt.",
        epilog='"python -m show_1 doctor" says whether this computer can; '
        '"python -m show_1 replay FILE.mp4" makes a video again and compares.',
    )
    parser.add_argument("prompt", help="what the video should show")
    parser.add_argument(
        "--also", metavar="PROMPT", action="append", default=[], help="another video in one go; may be repeated"
    )
    parser.add_argument(
        "--cascade",
        metavar="NAME|FILE",
        help=f"{', '.join(Cascade.names())}, or a TOML file; default: show-1 on a CUDA GPU, else mini",
    )
    parser.add_argument("--seed", metavar="N", help="for the same video again; drawn if left out")
    parser.add_argument("--out", metavar="FILE.mp4", type=Path, help=f"default: a name of its own in {OUTPUTS}/")
    parser.add_argument("--device", help="cuda, cpu, mps, ...; default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: half precision where the device is fast in it")
    parser.add_argument("--memory", metavar="12GB", help="how much of the GPU's memory to use; default: what is free")
    parser.add_argument("--save-stages", metavar="FILE.safetensors", type=Path, help="keep what the stages pass on")
    parser.add_argument(
        "--set", metavar="STAGE.KEY=VALUE", action="append", default=[], help="change the cascade; may be repeated"
    )
    parser.add_argument("--models", metavar="DIR", type=Path, help="take hub models from DIR/owner/name")
    parser.add_argument("--offline", action="store_true", help="ask no network: what was fetched before must do")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    with nullcontext() if arguments.out else _folder(OUTPUTS):
        _make(arguments)


def _make(arguments: argparse.Namespace) -> None:
    seed = draw_seed() if arguments.seed is None else _whole_number(arguments.seed)
    device = check_device(arguments.device)
    cascade = load_cascade(arguments.cascade, device).override(arguments.set)
    prompts = [arguments.prompt, *arguments.also]
    if arguments.also and (arguments.out or arguments.save_stages):
        raise Show1Error(
            f"--out and --save-stages name one file, and there are {len(prompts)} prompts.",
            "Leave them out: each video gets a name of its own. Or give the prompts one at a time.",
        )
    outs: list[Path] = []
    for prompt in prompts:
        outs.append(arguments.out or _free_name(prompt, seed, outs))
        check_request(prompt, seed, outs[-1])
    if arguments.save_stages is not None:
        if os.path.realpath(arguments.save_stages) in map(os.path.realpath, outs):
            raise Show1Error(
                f"The video and the stages' tensors cannot both be {arguments.save_stages}.",
                "Give --save-stages a name of its own, like stages.safetensors.",
            )
        _save_tensors({}, arguments.save_stages, only_try=True)  # to fail now rather than at the end

    if cascade.about:
        words = f" The words: {cascade.file.parent / cascade.about.words}" if cascade.about.words else ""
        print(f"{cascade.about.note}{words}", file=sys.stderr)
    print(f"{cascade.name} on {device.type}: loading", file=sys.stderr)
    with DownloadBar() as bar:
        pipeline = Show1Pipeline.from_cascade(
            cascade,
            device,
            DTYPES.get(arguments.dtype),
            memory=arguments.memory,
            models=arguments.models,
            offline=arguments.offline,
            report=bar,
        )
    # One event at a time: all the steps' tensors at once would be too much for the device.
    for result in draw(pipeline.stream(prompts, seed=[seed] * len(prompts), path=outs)):
        if isinstance(result, Clip) and not arguments.out:
            OUTPUTS.mkdir(parents=True, exist_ok=True)  # another run that failed may have taken it away
    if arguments.save_stages is not None:
        _save_tensors(result.tensors, arguments.save_stages)
        print(f"Stages: {arguments.save_stages}")
    print(f"Seed: {seed}")
    for out in outs:
        print(f"Video: {out}")


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Show1Error(f"The seed cannot be {text!r}.", f"Give a whole number from 0 to {MAX_SEED}.") from None


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Have a folder meanwhile; it stays if it was there before, or if something has been written to it."""
    with writing(path):
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if made:
            with suppress(OSError):
                path.rmdir()


def _free_name(prompt: str, seed: int, taken: Sequence[Path]) -> Path:
    stem = f"{slug(prompt)}-{seed}"
    names = (f"{stem}{suffix}.mp4" for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
    with writing(OUTPUTS):
        return next(OUTPUTS / name for name in names if not (OUTPUTS / name).exists() and OUTPUTS / name not in taken)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path, only_try: bool = False) -> None:
    """Write a safetensors file; it appears only when it is complete. With `only_try`, see whether that can be done."""
    if os.path.isdir(path):
        raise Show1Error(f"{path} is a folder.", "Give the name of a file in it, like stages.safetensors.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, temporary)
        if not only_try:
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise Show1Error(
            f"{path.name} cannot be written to the folder {path.parent.absolute()}: {error}.",
            "Choose a folder that exists, with space, that can be written to.",
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()
