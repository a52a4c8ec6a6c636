"""The memory that each of placement's tiers takes, side by side: `python -m benchmarks.memory --help`.

Every tier makes the same video, at once as often as it takes prompts, in a few steps a stage, which take as much memory
as many do. The peaks are those of PyTorch's allocator, `used` of the tensors and `reserved` of the blocks they lie in.
The frames are held against those of the first tier.
"""

import argparse
import gc
import sys
import time
from pathlib import Path

import torch

from benchmarks import models
from benchmarks.cascade import Clock, distance, in_few_steps, keeping
from benchmarks.figures import write_figures
from benchmarks.ways import STAGES, Ours
from show_1 import Cascade, Show1Error, placement
from show_1.device import check_device, default_dtype
from show_1.errors import exit_code
from show_1.files import check_outputs


def measure(cascade: Cascade, tier: placement.Tier, device: torch.device, random: bool) -> tuple[dict, torch.Tensor]:
    """Return a tier's {"seconds", "stages": {stage: {"peak_allocated_gb", …}}, …}, and its videos.

    These are as many as the tier takes prompts at once, all of the same: (prompts, 3, frames, height, width).
    """
    gc.collect()  # of the tier before, whose recorded UNets refer to themselves
    torch.cuda.empty_cache()
    pipeline = models.load(cascade, device, default_dtype(device), random)
    placement.place(pipeline, tier, device)
    gc.collect()
    torch.cuda.empty_cache()
    ours, clock, clips, stages = Ours(pipeline, tier.prompts), Clock(device), {}, {}
    began = time.perf_counter()
    for stage in STAGES:
        clips[stage], stages[stage] = clock(lambda stage=stage: ours.run(stage, clips))
    peaks = {key: max(told[key] for told in stages.values()) for key in ("peak_allocated_gb", "peak_reserved_gb")}
    return peaks | {"seconds": time.perf_counter() - began, "stages": stages}, clips[STAGES[-1]].cpu()


def table(found: dict) -> str:
    """Return what was found as Markdown."""
    lines = [
        f"{found['cascade']} ({found['weights']} weights) on {found['device']}, torch {found['torch']}.",
        "",
        "| tier | for cards of GB | used at the peak GB | reserved GB | in stage | largest difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["tiers"].items():
        stage = max(row["stages"], key=lambda stage: row["stages"][stage]["peak_allocated_gb"]).replace("_", " ")
        peaks = f"{row['peak_allocated_gb']:.2f} | {row['peak_reserved_gb']:.2f}"
        lines.append(f"| {name} | {row['card_gb']:g} | {peaks} | {stage} | {row['difference']['max']:.1e} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--cascade", metavar="NAME|FILE", default="show-1", help="default: %(default)s")
    parser.add_argument("--weights", choices=("own", "random"), default="own", help="random: full size, no download")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return exit_code(lambda: _run(parser.parse_args()))


@torch.no_grad()
def _run(arguments: argparse.Namespace) -> None:
    device = check_device(None)
    if device.type != "cuda":
        raise Show1Error("The tiers share the memory of a GPU, and there is none.", "Run this where one is.")
    check_outputs(arguments.json)
    cascade = Cascade.load(arguments.cascade)
    few = in_few_steps(cascade, steps=3)  # the latent upscale makes two calls of three: one as ever, one recorded
    found = {
        "cascade": cascade.name,
        "weights": arguments.weights,
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "tiers": {},
    }
    reference = None
    with keeping("the finished tiers"):
        for tier in placement.TIERS:
            row, videos = measure(few, tier, device, arguments.weights == "random")
            reference = videos[:1] if reference is None else reference
            more = {"card_gb": tier.memory, "prompts": tier.prompts, "difference": distance(videos, reference)}
            found["tiers"][tier.name] = row | more
            print(f"measured: {tier.name}", file=sys.stderr)
    if not found["tiers"]:
        raise Show1Error("No tier is finished.", "Let it run longer, on a GPU whose memory is free.")
    print(table(found))
    write_figures(arguments.json, found)


if __name__ == "__main__":
    sys.exit(main())
