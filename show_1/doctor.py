"""What would keep a cascade from running here, found out before a byte is fetched: `python -m show_1 doctor`."""

import argparse
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
from huggingface_hub import constants, get_token

from show_1 import access, hub, versions
from show_1.cascade import Cascade
from show_1.errors import Show1Error, exit_code, first_line
from show_1.hub import COMPONENTS, Model, gigabytes

ON_CPU = 4e9  # bytes of weights, beyond which a video on the CPU would take many hours


@dataclass(frozen=True)
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
        prog="python -m show_1 doctor", description="Say whether a cascade can run here, and what to do if not."
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
    hub_ids = {table: source for table in COMPONENTS if isinstance(source := cascade.model_source(table), str)}
    asks = bool(hub_ids) and models is None and not offline
    with ThreadPoolExecutor() as pool:
        # All at once: the hub may be far, and torch takes seconds to import.
        torch = pool.submit(__import__, "torch")
        token = pool.submit(_token) if asks else None
        looked = {table: pool.submit(_find, cascade, table, models, offline, asks) for table in COMPONENTS}
        yield _versions()
        yield _encoder()
        if token:
            yield token.result()
        found: list[Model] = []
        for table in COMPONENTS:
            model, finding = looked[table].result()
            found += [model] if model else []
            yield finding
        if asks:
            yield _disk(found, complete=len(found) == len(COMPONENTS))
        # Of what is out of reach, suppose that it is large, as the models at the hub are.
        whole = len(found) == len(COMPONENTS)
        yield _device(torch.result(), cascade, sum(model.size for model in found) if whole else None)


def _versions() -> Finding:
    newer = versions.untested()
    besides = f"newer than those tested: {', '.join(newer)}" if newer else "all packages as tested"
    return Finding("versions", True, f"Python {platform.python_version()}, {besides}.")


def _encoder() -> Finding:
    remedy = "Run: pip install --force-reinstall imageio-ffmpeg"
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        said = subprocess.run([program, "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=20).stdout
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return Finding("video encoder", False, f"ffmpeg does not run: {first_line(error)}. {remedy}")
    if "libx264" not in said:
        return Finding("video encoder", False, f"{program} has no libx264. {remedy}")
    return Finding("video encoder", True, f"ffmpeg with libx264, {program}.")


def _token() -> Finding:
    token = get_token()
    if token is None:
        return Finding("token", True, "none; models that are free for all need none. To log in: python login.py.")
    try:
        account = access.account(access.check_form(token))
    except Show1Error as error:
        return Finding("token", False, str(error))
    if not account.reads_gated:
        return Finding("token", True, f"of {account.name}; it has no right to read gated models.")
    return Finding("token", True, f"of {account.name}.")


def _find(cascade: Cascade, table: str, models: Path | None, offline: bool, asks: bool) -> tuple[Model | None, Finding]:
    subject = f"model of [{table}]"
    try:
        model = access.in_time(lambda: hub.find(cascade, table, models=models, offline=offline))
        if model.folder is not None:
            return model, Finding(subject, True, f"here, {gigabytes(model.size)}, {model.folder}.")
        access.check_model(model.repository, get_token())
    except TimeoutError as error:
        source = cascade.model_source(table)
        return None, Finding(subject, False, str(access.explain(error, f"the model {source}")))
    except Show1Error as error:
        return None, Finding(subject, False, str(error))
    missing = sum(file.missing for file in model.files)
    return model, Finding(subject, True, f"{model.repository} can be fetched, {gigabytes(missing)} to go.")


def _disk(found: Sequence[Model], complete: bool) -> Finding:
    cache = Path(constants.HF_HUB_CACHE)
    disk = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    missing = sum({file.blob: file.missing for model in found for file in model.files}.values())
    free = shutil.disk_usage(disk).free
    says = f"{gigabytes(free)} free at {cache}, {gigabytes(missing)} to fetch"
    says += "." if complete else " besides the models that are out of reach."
    if free < missing:
        return Finding("disk", False, f"{says} Free some space, or set HF_HOME to a folder on a larger disk.")
    if missing and not os.access(disk, os.W_OK):
        return Finding("disk", False, f"{cache} cannot be written to. Set HF_HOME to a folder that can be.")
    return Finding("disk", True, says)


def _device(torch, cascade: Cascade, weights: int | None) -> Finding:
    """What the models, of so many bytes, will run on, and how they will share its memory."""
    if torch.cuda.is_available():
        from show_1 import placement  # brings diffusers, which takes seconds

        properties = torch.cuda.get_device_properties(0)
        says = f"{properties.name}, {gigabytes(properties.total_memory)}"
        try:
            tier = placement.choose(cascade, torch.device("cuda"), weights or placement.SHOW_1)
        except Show1Error as error:
            return Finding("GPU", False, f"{says}. {error}")
        return Finding("GPU", True, f"{says}; {tier.name}, in half precision.")
    why = "none that torch can use"
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        why = "there is one, but this torch is built for the CPU only"
    if weights is None or weights > ON_CPU:
        remedy = "Take a computer with a CUDA GPU, or the cascade for those without: --cascade mini."
        if why.startswith("there"):
            remedy = "Install a torch with CUDA, see https://pytorch.org/get-started/locally."
        return Finding("GPU", False, f"{why}, and on the CPU a {cascade.name} video would take many hours. {remedy}")
    return Finding("GPU", True, f"{why}; the models run on the CPU, in single precision.")
