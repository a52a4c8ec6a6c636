"""Which files of a model repository a stage needs, and getting them: from a folder as it is, or from the hub."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from httpx2 import RequestError
from huggingface_hub import get_cached_repo_tree, model_info, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from show_1.cascade import Cascade
from show_1.errors import Show1Error

# The subfolders of a stage's repository that are used. T5 is taken once, from the keyframes; the others' copies of it,
# feature extractors, safety checkers and watermarkers are left on the hub.
COMPONENTS = {
    "keyframes": ("tokenizer", "text_encoder", "unet", "scheduler"),
    "interpolation": ("unet", "scheduler"),
    "first_frame": ("unet", "scheduler", "image_noising_scheduler"),
    "pixel_upscale": ("unet", "scheduler", "image_noising_scheduler"),
    "latent_upscale": ("tokenizer", "text_encoder", "vae", "unet", "scheduler"),
}
MODELS = ("text_encoder", "unet", "vae")  # the components that have weights

# diffusers and transformers put the variant before or behind the shard's number, and an index beside the shards.
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<variant>[\w]+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<late_variant>fp16|bf16|fp32))?"
    r"\.(?P<format>safetensors|bin)(?:\.index(?:\.(?P<index_variant>\w+))?\.json)?"
)
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
SMALL_FILES = (".json", ".txt", ".model")  # configurations and tokenizers


@dataclass(frozen=True)
class WeightFiles:
    """One set of weight files of one component: what they are called, and in which form they are."""

    variant: str | None
    format: str  # "safetensors" or "bin"
    names: tuple[str, ...]


def choose_weights(names: Iterable[str], variant: str | None) -> WeightFiles | None:
    """Return the set to take of a component's files: the variant where there is one, safetensors before .bin."""
    sets: dict[tuple[str | None, str], list[str]] = {}
    for name in sorted(names):
        if match := WEIGHTS.fullmatch(name):
            found = match["variant"] or match["late_variant"] or match["index_variant"]
            sets.setdefault((found, match["format"]), []).append(name)
    for choice in ((variant, "safetensors"), (variant, "bin"), (None, "safetensors"), (None, "bin")):
        if choice in sets:
            return WeightFiles(*choice, tuple(sets[choice]))
    return None


def needed_files(files: Iterable[str], table: str, variant: str | None) -> list[str]:
    """Return those of a repository's files, by their paths in it, that the stage of a cascade's table reads."""
    files, needed = list(files), []
    for component in COMPONENTS[table]:
        inside = [file.removeprefix(f"{component}/") for file in files if file.startswith(f"{component}/")]
        weights = choose_weights(inside, variant) if component in MODELS else None
        wanted = [n for n in inside if n.endswith(SMALL_FILES) and not WEIGHTS.fullmatch(n) and "/" not in n]
        needed += [f"{component}/{name}" for name in (*wanted, *(weights.names if weights else ()))]
    return needed


def fetch(cascade: Cascade, table: str) -> Path:
    """Return the folder that holds what a stage needs, fetched from the hub where the cascade names a hub id.

    Raises Show1Error, naming the table and the file or the repository, where something is missing or out of reach.
    """
    source = cascade.model_source(table)
    folder = source if isinstance(source, Path) else _download(source, table, _variant(cascade, table))
    _check_complete(folder, table, _variant(cascade, table))
    return folder


def weights_in(folder: Path, table: str, component: str, variant: str | None) -> WeightFiles:
    """Return a component's weight files, all of them there."""
    names = [file.name for file in (folder / component).iterdir()]
    weights = choose_weights(names, variant)
    if weights is None:
        raise _missing(table, folder / component, "a weight file (*.safetensors or *.bin)")
    index = next((name for name in weights.names if name.endswith(".json")), None)
    if index is None and all(SHARD.search(name) for name in weights.names):
        raise _missing(table, folder / component, "the index of its shards (*.index.json)")
    if index is not None:
        for shard in sorted(_shards(folder / component / index, table) - set(names)):
            raise _missing(table, folder / component, shard)
    return weights


def _shards(index: Path, table: str) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Show1Error(
            f"A file of [{table}] is damaged or cut short: {index}.", "Remove it and fetch it again."
        ) from error


def first_line(error: Exception) -> str:
    """Return what a library's error says, as part of a sentence; some say nothing but their name, some a page."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _variant(cascade: Cascade, table: str) -> str | None:
    return getattr(getattr(cascade, table), "variant", None)


def _check_complete(folder: Path, table: str, variant: str | None) -> None:
    for component in COMPONENTS[table]:
        if not (folder / component).is_dir():
            raise _missing(table, folder, f"the folder {component}")
        if component in MODELS:
            if not (folder / component / "config.json").is_file():
                raise _missing(table, folder / component, "config.json")
            weights_in(folder, table, component, variant)
        elif component.endswith("scheduler"):
            if not (folder / component / "scheduler_config.json").is_file():
                raise _missing(table, folder / component, "scheduler_config.json")
        else:
            needed = ("spiece.model",) if table == "keyframes" else ("vocab.json", "merges.txt")
            for name in needed:
                if not (folder / component / name).is_file() and not (folder / component / "tokenizer.json").is_file():
                    raise _missing(table, folder / component, name)


def _missing(table: str, folder: Path, what: str) -> Show1Error:
    return Show1Error(
        f"The model of [{table}] is incomplete: {folder} lacks {what}.",
        "Copy the missing part there, or set the table's `model` to a complete folder or a hub id.",
    )


def _download(repository: str, table: str, variant: str | None) -> Path:
    try:
        try:
            # Not `list_repo_files`: where the hub is out of reach it keeps trying for half a minute.
            files = [file.rfilename for file in model_info(repository, timeout=10).siblings or ()]
        except (RequestError, OSError) as error:
            # The hub is out of reach, or refuses: what an earlier run has fetched will do.
            try:
                return _fetched_before(repository, table, variant)
            except LocalEntryNotFoundError:
                raise error from None
        return Path(snapshot_download(repository, allow_patterns=needed_files(files, table, variant)))
    except GatedRepoError as error:
        raise Show1Error(
            f"The model {repository} of [{table}] is gated, and this computer has no access to it.",
            f"Open https://huggingface.co/{repository}, accept its licence, then log in: hf auth login.",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise Show1Error(
            f"The hub has no model {repository}, which [{table}] names, or it is private; nor is it a folder here.",
            "Correct the table's `model`, or log in with an account that may see it: hf auth login.",
        ) from error
    except (RequestError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise Show1Error(
            f"The model {repository} of [{table}] is not on this computer, and the hub cannot be reached.",
            "Connect to the internet and try again, or choose a cascade that is here: --cascade mini.",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code == 401
        raise Show1Error(
            f"Fetching the model {repository} of [{table}] failed: {first_line(error)}.",
            "Log in again: hf auth login." if refused else "Try again: what is complete is kept.",
        ) from error


def _fetched_before(repository: str, table: str, variant: str | None) -> Path:
    """Return the cached folder of a repository; raises LocalEntryNotFoundError where it lacks what is needed."""
    try:
        files = [file.path for file in get_cached_repo_tree(repository)]
        patterns = needed_files(files, table, variant)
    except CachedRepoTreeNotFoundError:
        patterns = None  # fetched by an older huggingface_hub, which kept no list: take it as it is
    return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
