"""How far a cascade's videos in half precision are from those in float32: `python -m benchmarks.precision --help`.

The same prompts and seeds, from end to end, so that all that rounding does on the way is in the distance.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.cascade import distance
from benchmarks.figures import write_figures
from show_1 import Show1Error, Show1Pipeline
from show_1.device import check_device, load_cascade
from show_1.errors import exit_code
from show_1.files import check_outputs

PROMPTS = ("a cat", "a dog on the grass")  # of a cascade that gives no examples


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--cascade", metavar="NAME|FILE", help="default: show-1 on a CUDA GPU, else mini")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--videos", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return exit_code(lambda: _run(parser.parse_args()))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.videos < 1:
        raise Show1Error(f"There cannot be {arguments.videos} videos.", "Give --videos a number from 1 on.")
    check_outputs(arguments.json)
    device = check_device(arguments.device)
    cascade = load_cascade(arguments.cascade, device)
    prompts = cascade.about.examples if cascade.about and cascade.about.examples else PROMPTS
    asked = [(prompts[seed % len(prompts)], seed) for seed in range(arguments.videos)]

    def videos(dtype: torch.dtype) -> list[torch.Tensor]:
        pipeline = Show1Pipeline.from_cascade(cascade, device, dtype)
        told = tqdm(asked, str(dtype).removeprefix("torch."))
        return [pipeline(prompt, seed=seed).tensors["video"] for prompt, seed in told]

    pairs = zip(videos(getattr(torch, arguments.dtype)), videos(torch.float32), strict=True)
    rows = [
        {"prompt": prompt, "seed": seed, **distance(*pair)} for (prompt, seed), pair in zip(asked, pairs, strict=True)
    ]
    levels = [row["psnr_db"] for row in rows if row["psnr_db"] is not None]  # None: the same video
    for row in rows:
        told = "the same" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB, at most {row['max']:.3f} of 2"
        print(f"{row['prompt']}, seed {row['seed']}: {told}")
    if levels:
        print(f"{arguments.dtype} against float32: {min(levels):.1f} to {max(levels):.1f} dB")
    write_figures(
        arguments.json,
        {
            "cascade": cascade.name,
            "device": device.type,
            "dtype": arguments.dtype,
            "torch": torch.__version__,
            "median_psnr_db": float(np.median(levels)) if levels else None,
            "videos": rows,
        },
    )


if __name__ == "__main__":
    sys.exit(main())
