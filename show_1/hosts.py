"""Where the program runs: on a rented notebook of a known kind, in another notebook, or on a computer of one's own."""

from __future__ import annotations  # this file too is read before it is said that a Python is too old

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PAPERSPACE_STORAGE = Path("/storage")
ROOM = 30e9  # bytes; Show-1's models take 26 GB, and a free Paperspace account has 5 GB of storage


@dataclass(frozen=True)
class Host:
    """What is known of a place: its name, whether it is rented and reached only through a browser, where files last.

    `storage` is a folder that outlives the machine; `outputs` the folder for videos. `in_notebook` is true in a
    notebook's kernel and in what it starts, where there is no terminal to ask in.
    """

    name: str
    rented: bool
    in_notebook: bool
    storage: Path | None
    outputs: Path


def detect(environment: Mapping[str, str] = os.environ) -> Host:
    """Return the host, told by the variables that it sets for everything that runs on it."""
    in_notebook = "JPY_PARENT_PID" in environment
    here = Path("outputs")
    if any(name.startswith("PAPERSPACE_") for name in environment):
        lasting = PAPERSPACE_STORAGE / "show-1"
        storage = lasting if _is_kept(lasting) else None
        return Host("Paperspace", True, in_notebook, storage, storage / "outputs" if storage else here)
    if any(name.startswith("KAGGLE_KERNEL_") for name in environment):
        return Host("Kaggle", True, in_notebook, None, Path("/kaggle/working/outputs"))
    if "COLAB_RELEASE_TAG" in environment or "COLAB_GPU" in environment:
        return Host("Colab", True, in_notebook, None, here)
    return Host("Jupyter" if in_notebook else "this computer", False, in_notebook, None, here)


def prepare() -> None:
    """Have models kept where they outlive the machine; to be called before huggingface_hub is imported.

    Only the models: the token stays where huggingface_hub keeps it, for a whole team reads Paperspace's storage. Who
    has chosen a place, by HF_HOME or HF_HUB_CACHE, keeps it.

    What is set but empty, as containers have it, is unset: huggingface_hub would keep the token in the folder it is
    called from.
    """
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT"):
        if not os.environ.get(name):
            os.environ.pop(name, None)
    storage = detect().storage
    if storage and not os.environ.keys() & {"HF_HOME", "HF_HUB_CACHE"}:
        os.environ["HF_HUB_CACHE"] = str(storage / "models")


def _is_kept(folder: Path) -> bool:
    """Whether this folder is to be used: it was before, or there is room for all models."""
    if (folder / "models").is_dir():
        return True
    return (
        folder.parent.is_dir() and os.access(folder.parent, os.W_OK) and shutil.disk_usage(folder.parent).free >= ROOM
    )
