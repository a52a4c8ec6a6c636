"""What would keep a cascade from running here, found out before a byte is fetched: `python -m show_1 doctor`."""

import argparse
import dataclasses
import functools
import importlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import imageio_ffmpeg
from huggingface_hub import constants, is_offline_mode

from show_1 import access, hub, versions
from show_1.cascade import Cascade
from show_1.errors import Show1Error, exit_code, first_line
from show_1.hub import COMPONENTS, Model, gigabytes

ON_CPU = 4e9  # bytes of weights, beyond which a video on the CPU would take many hours


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it will do, what was found and, where it will not do, what to do."""

    subject: str
    good: bool
    says: str

    def __str__(self) -> str:
        return f"{'ok   ' if self.good else 'WRONG'}  {self.subject}: {self.says}"


def main(argv: Sequence[str]) -> int:
    """Print a line a finding; return 0 if the cascade can run, else 2."""
    parser = argparse.ArgumentParser(
        prog="python -m show_1 doctor",
        description="Say whether a cascade can run here, and what to do if not; nothing is fetched.",
        epilog="Exit code 0 if it can run, else 2.",
    )
    parser.add_argument("--cascade", metavar="NAME|FILE", default="show-1", help="default: show-1")
    parser.add_argument("--models", metavar="DIR", type=Path, help="take hub models from DIR/owner/name")
    parser.add_argument("--offline", action="store_true", help="ask no network: what was fetched before must do")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: _run(Cascade.load(arguments.cascade), arguments.models, arguments.offline))


def _run(cascade: Cascade, models: Path | None, offline: bool) -> int:
    good = True
    for finding in examine(cascade, models, offline):
        print(finding, flush=True)
        good &= finding.good
    print(f"{cascade.name} can run here." if good else f"{cascade.name} cannot run here yet.")
    return 0 if good else 2


def examine(cascade: Cascade, models: Path | None = None, offline: bool = False) -> Iterator[Finding]:
    """Yield what is found, in the order in which people set things up; nothing is fetched or written."""
    from_hub = models is None and any(isinstance(cascade.model_source(table), str) for table in COMPONENTS)
    asking = from_hub and not (offline or is_offline_mode())
    # All at once: the hub may be far, and torch takes seconds to import.
    placement = access.in_background(lambda: importlib.import_module("show_1.placement"))
    token = access.in_background(_token) if asking else None
    look = functools.partial(_find, cascade, models=models, offline=offline)
    looks = [access.in_background(functools.partial(look, table)) for table in COMPONENTS]
    yield _versions()
    yield _encoder()
    models_found = [each.result() for each in looks]
    found = [model for model, _ in models_found if model]
    complete = len(found) == len(COMPONENTS)
    if token:
        needed = not complete or any(model.files for model in found)
        finding = token.result()
        yield finding if needed else dataclasses.replace(finding, good=True)
    for _, finding in models_found:
        yield finding
    if asking:
        yield _disk(found, complete)
    # Of what is out of reach, suppose that it is large, as the models at the hub are.
    yield _device(placement.result(), cascade, sum(model.size for model in found) if complete else None)


def _versions() -> Finding:
    newer = versions.untested()
    besides = f"newer than those tested: {', '.join(newer)}" if newer else "all packages as tested"
    return Finding("versions", True, f"Python {platform.python_version()}, {besides}.")


def _encoder() -> Finding:
    remedy = "Run: pip install --force-reinstall imageio-ffmpeg"
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        said = subprocess.run([program, "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=5).stdout
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return Finding("video encoder", False, f"ffmpeg does not run: {first_line(error)}. {remedy}")
    if "libx264" not in said:
        return Finding("video encoder", False, f"{program} has no libx264. {remedy}")
    return Finding("video encoder", True, f"ffmpeg with libx264, {program}.")


def _token() -> Finding:
    try:
        token = access.kept_token()
    except Show1Error as error:
        return Finding("token", False, str(error))
    if token is None:
        return Finding("token", True, "none; models that are free for all need none. To log in: python login.py.")
    try:
        account = access.account(access.check_form(token))
    except Show1Error as error:
        return Finding("token", False, str(error))
    if not account.reads_gated:
        return Finding("token", True, f"of {account.name}; it has no right to read gated models.")
    return Finding("token", True, f"of {account.name}.")


def _find(cascade: Cascade, table: str, models: Path | None, offline: bool) -> tuple[Model | None, Finding]:
    """Return where the model is or what is to be fetched, if that can be, and what to say of it."""
    subject, source = f"model of [{table}]", cascade.model_source(table)

    def look() -> Model:
        model = hub.find(cascade, table, models=models, offline=offline, patient=False)
        if model.files:
            access.check_model(source, access.kept_token())
        return model

    try:
        model = access.in_time(look, access.PATIENCE + 1)  # not each question's time in turn
    except TimeoutError as error:
        return None, Finding(subject, False, str(access.explain(error, f"the model {source}")))
    except Show1Error as error:
        return None, Finding(subject, False, str(error))
    if not model.files:
        return model, Finding(subject, True, f"here, {gigabytes(model.size)}, {os.path.normpath(model.folder)}.")
    missing = sum(file.missing for file in model.files)
    return model, Finding(subject, True, f"{source} can be fetched, {gigabytes(missing)} to go.")


def _disk(found: Sequence[Model], complete: bool) -> Finding:
    cache = Path(constants.HF_HUB_CACHE)
    disk = next(folder for folder in (cache, *cache.parents) if os.path.isdir(folder))
    missing = sum(file.missing for file in {file for model in found for file in model.files})
    free = shutil.disk_usage(disk).free
    says = f"{gigabytes(free)} free at {cache}, {gigabytes(missing)} to fetch"
    says += "." if complete else ", and what is out of reach now."
    if free < missing:
        return Finding("disk", False, f"{says} Free some space, or set HF_HUB_CACHE to a folder on a larger disk.")
    if missing and not os.access(disk, os.W_OK):
        return Finding("disk", False, f"{cache} cannot be written to. Set HF_HUB_CACHE to a folder that can be.")
    return Finding("disk", True, says)


def _device(placement: ModuleType, cascade: Cascade, weights: int | None) -> Finding:
    """What the models, of so many bytes in half precision, will run on, and how they will share its memory."""
    import torch

    from show_1.device import default_dtype
    from show_1.models import cpu_kernels

    if torch.cuda.is_available():
        weights = weights or placement.SHOW_1
        properties = torch.cuda.get_device_properties(0)
        says = f"{properties.name}, {gigabytes(properties.total_memory)}"
        try:
            tier = placement.choose(cascade, torch.device("cuda"), weights)
            placement.check_loading(cascade, torch.device("cuda"), weights)
        except Show1Error as error:
            return Finding("GPU", False, f"{says}. {error}")
        except RuntimeError as error:  # of a driver, or a GPU whose memory is full
            return Finding("GPU", False, f"{says}; it does not answer: {first_line(error)}. Close what else uses it.")
        return Finding("GPU", True, f"{says}; {tier.name}, in half precision.")
    why = "none that torch can use"
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        why = "there is one, but this torch is built for the CPU only"
    if weights is None or weights > ON_CPU:
        remedy = "Take a computer with a CUDA GPU, or the cascade for those without: --cascade mini."
        if why.startswith("there"):
            remedy = "Install a torch with CUDA, see https://pytorch.org/get-started/locally."
        return Finding("GPU", False, f"{why}, and on the CPU a {cascade.name} video would take many hours. {remedy}")
    cpu = torch.device("cpu")
    dtype = default_dtype(cpu)
    try:
        placement.choose(cascade, cpu, weights * dtype.itemsize // 2)
    except Show1Error as error:
        return Finding("GPU", False, f"{why}. {error}")
    says = f"{why}; the models run on the CPU, in {str(dtype).removeprefix('torch.')}"
    if not cpu_kernels.compiler():
        says += f", slower than they could, as {cpu_kernels.NO_COMPILER}"
    return Finding("GPU", True, f"{says}.")
