"""Our way of making a video against the original's, side by side: `python -m benchmarks.cascade --help`.

Every round runs each stage the original's way, then ours, on the same input; after the warm-up rounds, which take a few
steps a stage, the medians are taken. Seconds are wall clock, with the device's queue empty at both ends; TFLOP are
counted by PyTorch, each kind of the original's calls once, in a warm-up round. A GPU's peak memory is ours with the
models that stay there, and the original's without them: its own are in the computer's memory when a stage begins. A run
that is broken off, or finds the GPU's memory full, keeps its finished rounds, or the finished stages of the first.
"""

import argparse
import contextlib
import dataclasses
import importlib
import math
import platform
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from benchmarks import models
from benchmarks.figures import write_figures
from benchmarks.ways import STAGES, Original, Ours, made_up_clips
from show_1 import Cascade, Show1Error, hub, placement
from show_1.command_line import DTYPES
from show_1.device import check_device, default_cascade, default_dtype
from show_1.errors import exit_code, memory_is_full, telling_full_memory
from show_1.files import check_outputs
from show_1.timing import wait_for

MEASURES = ("steps", "guidance_interval", "reuse")  # of a fast cascade; steps take their schedule along


class Clock:
    """Runs something and tells its seconds and, on a GPU, the peak memory meanwhile."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(
        self, work: Callable[[], torch.Tensor], *, less_resident: bool = False
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return what the work makes, and {"seconds", on a GPU "peak_allocated_gb" and "peak_reserved_gb"}.

        With `less_resident`, the peaks are without what lay in the GPU's memory before.
        """
        cuda, resident = self.device.type == "cuda", 0
        if cuda:
            wait_for(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            resident = torch.cuda.memory_allocated(self.device) if less_resident else 0
        began = time.perf_counter()
        made = work()
        wait_for(self.device)
        told = {"seconds": time.perf_counter() - began}
        if cuda:
            told["peak_allocated_gb"] = (torch.cuda.max_memory_allocated(self.device) - resident) / 1e9
            told["peak_reserved_gb"] = (torch.cuda.max_memory_reserved(self.device) - resident) / 1e9
        return made, told


def compare(
    original: Original, ours: Ours, clock: Clock, stages: list[str], rounds: int, warmups: int
) -> tuple[dict, bool]:
    """Return what `rounds` rounds after `warmups` have told, see `summary`, and whether that is all of them.

    Raises Show1Error if it is broken off before a stage after the warm-ups is finished.
    """
    original_cascade, our_cascade = original.pipeline.cascade, ours.pipeline.cascade
    clips = made_up_clips(our_cascade, clock.device, ours.pipeline.keyframes.dtype)
    told: list[dict] = []  # of each round, of its stages so far: {"ours": {stage: {...}}, "original": {...}}
    tflop, difference = {}, {}
    with keeping("what was finished"):
        for number in range(warmups + rounds):
            for way, cascade in ((original, original_cascade), (ours, our_cascade)):
                way.pipeline.cascade = in_few_steps(cascade) if number < warmups else cascade
            this = {"original": {}, "ours": {}}
            told.append(this)
            for stage in stages:
                if stage != "text":
                    original.flops.total = 0
                    torch.cuda.empty_cache()  # what one way leaves with the allocator is not the other's
                    theirs, this["original"][stage] = clock(
                        lambda stage=stage: original.run(stage, clips), less_resident=True
                    )
                    if getattr(original_cascade, stage) == getattr(our_cascade, stage):  # else ours is other work
                        tflop[stage] = original.flops.total / 1e12
                torch.cuda.empty_cache()
                mine, this["ours"][stage] = clock(lambda stage=stage: ours.run(stage, clips))
                if stage != "text":
                    difference[stage] = distance(mine, theirs)
                    clips[stage] = mine
            print(f"round {number + 1} of {warmups + rounds}", file=sys.stderr)
        return summary(told[warmups:], told[:warmups], stages, tflop, difference), True
    if len(told) > warmups + 1:
        del told[-1]
    else:
        stages = [stage for stage in stages if stage in told[-1]["ours"]] if len(told) > warmups else []
    return summary(told[warmups:], told[:warmups], stages, tflop, difference), False


def in_few_steps(cascade: Cascade, steps: int = 6) -> Cascade:
    """Return a cascade whose stages take a few steps: enough to warm libraries up and to record graphs."""
    short = {}
    for stage in STAGES[1:]:
        table = getattr(cascade, stage)
        least = math.ceil(1 / getattr(table, "strength", 1))
        anew = {"schedule": None} if stage == "first_frame" else {}
        short[stage] = dataclasses.replace(table, steps=min(table.steps, max(steps, least)), **anew)
    return dataclasses.replace(cascade, **short)


def summary(told: list[dict], warmups: list[dict], stages: list[str], tflop: dict, difference: dict) -> dict:
    """Return the medians: {"stages": {stage: {...}}, "original_seconds", "seconds", "ratio", "rounds", ...}."""
    if not told or not set(stages) - {"text"}:
        raise Show1Error(
            "No stage after the warm-ups is finished.",
            "Let it run longer, on a GPU whose memory is free, or with less of it by --memory.",
        )

    def median(way: str, stage: str, key: str) -> float | None:
        values = [r[way][stage][key] for r in told if key in r[way].get(stage, {})]
        return statistics.median(values) if values else None

    rows = {}
    for stage in stages:
        row = {
            "original_seconds": median("original", stage, "seconds"),
            "seconds": median("ours", stage, "seconds"),
            "tflop": tflop.get(stage),
            "difference": difference.get(stage),
            "original_peak_gb": median("original", stage, "peak_allocated_gb"),
            "peak_gb": median("ours", stage, "peak_allocated_gb"),
            "peak_reserved_gb": median("ours", stage, "peak_reserved_gb"),
        }
        if row["original_seconds"]:
            row["ratio"] = row["original_seconds"] / row["seconds"]
        if row["tflop"]:
            row["tflops"] = row["tflop"] / row["seconds"]
        rows[stage] = {key: value for key, value in row.items() if value is not None}

    def whole(round_: dict, way: str) -> float:
        return sum(round_[way][stage]["seconds"] for stage in stages if stage in round_[way])

    totals = {way: statistics.median(whole(r, way) for r in told) for way in ("original", "ours")}
    found = {
        "stages": rows,
        "original_seconds": totals["original"],
        "seconds": totals["ours"],
        "ratio": totals["original"] / totals["ours"],
        "rounds": len(told),
    }
    if len(warmups) > 1:  # libraries warming up and graphs being recorded
        found["cold_start_seconds"] = max(0.0, whole(warmups[0], "ours") - whole(warmups[-1], "ours"))
    return found


def measure_by_measure(fast: Cascade, ours: Ours, clock: Clock, rounds: int) -> dict:
    """Return for each measure of the fast cascade, alone and all together, its seconds and how far its video is off.

    The first row, which they are held against, is the exact cascade. The distance is the peak signal-to-noise ratio to
    its video of the same seed, in decibels.
    """
    exact = ours.pipeline.cascade
    variants = {"exact": exact} | measures(fast, exact)
    rows, seconds = {}, {name: [] for name in variants}
    with keeping("the finished videos of each measure"):
        for cascade in variants.values():
            ours.pipeline.cascade = in_few_steps(cascade, 12)  # all kinds of calls, also unguided ones that reuse
            whole_video(ours)
        for number in range(rounds):  # in turns, as a computer's pace changes within minutes
            for name, cascade in variants.items():
                ours.pipeline.cascade = cascade
                video, told = clock(lambda: whole_video(ours))
                seconds[name].append(told["seconds"])
                rows[name] = {"seconds": statistics.median(seconds[name])}
                if name == "exact":
                    exact_video = video
                else:
                    rows[name]["psnr_db"] = distance(video, exact_video)["psnr_db"]
            print(f"measures: round {number + 1} of {rounds}", file=sys.stderr)
    for row in rows.values():
        row["speed"] = rows["exact"]["seconds"] / row["seconds"]
    return rows


def measures(fast: Cascade, exact: Cascade) -> dict[str, Cascade]:
    """Return the exact cascade with each measure of the fast one alone, then the fast one."""
    variants, mine = {}, fast.settings()
    stages = STAGES[1:]
    for measure in MEASURES:
        changed = {}
        for stage in stages:
            keys = (measure, "schedule") if measure == "steps" else (measure,)
            new = {key: mine[stage][key] for key in keys if key in mine[stage]}
            changed[stage] = dataclasses.replace(getattr(exact, stage), **new)
        if any(changed[stage] != getattr(exact, stage) for stage in stages):
            variants[measure] = dataclasses.replace(exact, **changed)
    return variants | {"all": fast}


def without_measures(cascade: Cascade) -> Cascade:
    """Return a cascade without what only ours can do for speed, its steps as they are."""
    tables = {stage: getattr(cascade, stage) for stage in STAGES[1:]}
    for stage, table in tables.items():
        keys = [key for key in ("guidance_interval", "reuse") if hasattr(table, key)]
        tables[stage] = dataclasses.replace(table, **dict.fromkeys(keys))
    return dataclasses.replace(cascade, **tables)


def whole_video(ours: Ours) -> torch.Tensor:
    """Make a whole video, stage by stage, and return it."""
    clips: dict[str, torch.Tensor] = {}
    for stage in STAGES:
        clips[stage] = ours.run(stage, clips)
    return clips[STAGES[-1]]


def distance(one: torch.Tensor, another: torch.Tensor) -> dict[str, float]:
    """Return the largest difference of two clips in [−1, 1] and their peak signal-to-noise ratio in decibels."""
    gap = (one.double() - another.double()).abs()
    error = gap.square().mean().item()
    return {"max": gap.max().item(), "psnr_db": 10 * float(np.log10(4 / error)) if error > 0 else None}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of a large matrix product, the most that this device has to give; the best of a few."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    clock = Clock(device)
    return max(2 * size**3 / clock(lambda: a @ a)[1]["seconds"] for _ in range(5)) / 1e12


def table(found: dict) -> str:
    """Return what was found as Markdown."""
    dtypes = f"{found['dtype']} (the original's way {found['original_dtype']})"
    lines = [
        f"{found['cascade']} ({found['weights']} weights) on {found['device']}, {dtypes}, "
        f"torch {found['torch']}; median of {found['rounds']} rounds; {found['placement']}.",
        "",
        "| stage | original s | ours s | ratio | TFLOP/s | of matmul peak | peak GB | largest difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage, row in found["stages"].items():
        share = f"{row['tflops'] / found['matmul_peak_tflops']:.0%}" if "tflops" in row else ""
        cells = [
            stage.replace("_", " "),
            _number(row.get("original_seconds")),
            _number(row["seconds"]),
            _number(row.get("ratio")),
            _number(row.get("tflops")),
            share,
            _number(row.get("peak_gb")),
            f"{row['difference']['max']:.1e}" if "difference" in row else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    totals = (_number(found[key]) for key in ("original_seconds", "seconds", "ratio"))
    lines.append(f"| **{_extent(found)}** | {' | '.join(totals)} | | | | |")
    cold = f"Loading {_number(found['load_seconds'])} s"
    if "cold_start_seconds" in found:
        cold += f", and the first video takes {_number(found['cold_start_seconds'])} s longer"
    if "peak_process_gb" in found:
        cold += f", both ways' peak memory in one process {_number(found['peak_process_gb'])} GB"
    lines += ["", f"{cold}."]
    if "measures" in found:
        lines += ["", "| measure | s | times as fast | PSNR to the exact video, dB |", "| --- | --- | --- | --- |"]
        for name, row in found["measures"].items():
            cells = [name.replace("_", " "), *(_number(row.get(key)) for key in ("seconds", "speed", "psnr_db"))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pyplot() -> ModuleType:
    """Return what plots are drawn with; raise Show1Error where it is missing."""
    try:
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise Show1Error("The plot needs matplotlib.", "Run: pip install -r requirements-benchmarks.txt") from None


def plot(found: dict, file: Path) -> None:
    """Draw the seconds of both ways, a pair of bars a stage."""
    plt = pyplot()
    stages = [stage for stage in found["stages"] if stage != "text"]
    places = np.arange(len(stages))
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for way, key, shift in (("original's way", "original_seconds", -0.2), ("ours", "seconds", 0.2)):
        axes.bar(places + shift, [found["stages"][stage][key] for stage in stages], 0.4, label=way)
    axes.set_xticks(places, [stage.replace("_", " ") for stage in stages])
    axes.set_ylabel("seconds")
    axes.set_title(f"{found['cascade']} on {found['device']}: {found['ratio']:.1f} times as fast {_extent(found)}")
    axes.legend()
    figure.savefig(file, dpi=120, format="png")


def _extent(found: dict) -> str:
    return "end to end" if [*found["stages"]] == [*STAGES] else "together"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def main() -> int:
    arguments = _parser().parse_args()
    return exit_code(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cascade", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cascade",
        metavar="NAME|FILE",
        help=f"{', '.join(Cascade.names())}, or a TOML file; default: show-1 on a CUDA GPU, else mini",
    )
    parser.add_argument("--weights", choices=("own", "random"), default="own", help="random: full size, no download")
    parser.add_argument("--stages", metavar="A,B", default=",".join(STAGES[1:]), help="default: %(default)s")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of both ways; default: float16 on a GPU, on a CPU float32 for the original's and what is quick for ours",
    )
    parser.add_argument("--memory", metavar="12GB", help="measure the tier of a smaller card; default: what is free")
    parser.add_argument("--rounds", type=int, default=5, help="how many count; default: %(default)s")
    parser.add_argument("--warmups", type=int, default=2, help="how many in few steps go before; default: %(default)s")
    parser.add_argument("--measures", action="store_true", help="also what its fast preset's measures gain and cost")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the seconds of both ways there")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    device = check_device(arguments.device)
    name = arguments.cascade or default_cascade(device)
    cascade = Cascade.load(name)
    # The original knows no measures: a fast cascade is held against the exact one that it is made of, a file without
    # its measures, in as many steps.
    exact = Cascade.load(name.removesuffix("-fast")) if name in Cascade.names() else without_measures(cascade)
    stages = list(dict.fromkeys(["text", *(part.strip() for part in arguments.stages.split(","))]))
    if unknown := set(stages) - set(STAGES):
        raise Show1Error(f"There is no stage {sorted(unknown)[0]!r}.", f"Known are {', '.join(STAGES[1:])}.")
    if stages == ["text"]:
        raise Show1Error("The prompt alone is not compared.", f"Give some of {', '.join(STAGES[1:])}.")
    if arguments.rounds < 1 or arguments.warmups < 1:  # in which the work is counted
        raise Show1Error(
            "There must be a round to measure and one before it.", "Give --rounds and --warmups 1 or more."
        )
    if arguments.measures and (f"{name}-fast" not in Cascade.names() or stages != list(STAGES)):
        raise Show1Error("Only whole videos of a cascade with a fast preset have measures.", "Take show-1 or mini.")
    random = arguments.weights == "random"
    if device.type == "cpu" and (random or name.removesuffix("-fast") == "show-1"):
        raise Show1Error(
            "Full-size models take hours on a CPU.", "Run this where a GPU is, or take mini's own weights."
        )
    check_outputs(arguments.json, arguments.plot)
    if arguments.plot is not None:
        pyplot()
    dtype = DTYPES.get(arguments.dtype) or default_dtype(device)

    began = time.perf_counter()
    weights = placement.SHOW_1 if random else placement.weight_bytes(cascade, hub.fetch(cascade), dtype)
    tier = placement.choose(cascade, device, weights, arguments.memory)
    # The original knows float16 and float32, and CPUs are slow in float16.
    theirs = torch.float32 if device.type == "cpu" and not arguments.dtype else dtype
    with telling_full_memory("Loading the models"):
        # Random weights are made where there is room for both ways' of them.
        where = device if placement.device_memory(device)[0] > 2.2 * weights else torch.device("cpu")
        original = Original(models.load(exact, where, theirs, random), device)
        loaded = time.perf_counter()
        pipeline = models.load(cascade, where, dtype, random)
        placement.place(pipeline, tier, device)
        load_seconds = time.perf_counter() - loaded
        peak = matmul_peak(device, dtype)
    ours, clock = Ours(pipeline), Clock(device)
    found = {
        "cascade": cascade.name,
        "weights": arguments.weights,
        "device": _device_name(device),
        "original_dtype": str(theirs).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "placement": tier.name,
        "matmul_peak_tflops": peak,
        "load_seconds": load_seconds,
    }
    with torch.no_grad():
        compared, finished = compare(original, ours, clock, stages, arguments.rounds, arguments.warmups)
        found |= compared
        if arguments.measures and finished:
            fast = Cascade.load(f"{name}-fast")
            found["measures"] = measure_by_measure(fast, ours, clock, arguments.rounds)
    found["minutes"] = (time.perf_counter() - began) / 60
    if device.type == "cpu":
        found["peak_process_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(table(found))
    write_figures(arguments.json, found)
    if arguments.plot is not None:
        plot(found, arguments.plot)


@contextlib.contextmanager
def keeping(what: str) -> Iterator[None]:
    """End the work in it, and not the program, on Ctrl-C, SIGTERM (of `timeout`) or when the GPU's memory is full.

    Then it says that what follows is of `what`.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (KeyboardInterrupt, MemoryError, RuntimeError) as error:
        if not (isinstance(error, KeyboardInterrupt) or memory_is_full(error)):
            raise
        why = "Interrupted" if isinstance(error, KeyboardInterrupt) else "The memory is full"
        print(f"{why}; what follows is of {what}.", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


if __name__ == "__main__":
    sys.exit(main())
