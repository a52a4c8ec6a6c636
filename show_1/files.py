"""Writing files that are whole at any moment; what keeps one from being written, told in two sentences."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from show_1.errors import Show1Error

REMEDIES = {
    errno.ENOENT: "Create the folder first, or choose another.",
    errno.ENOSPC: "Free some space there, or choose a folder on another disk.",
    errno.EDQUOT: "Free some space there, or choose a folder on another disk.",
}


def check_outputs(*files: Path | None) -> None:
    """Raise Show1Error for a file that cannot be written, before the work rather than after it."""
    for file in filter(None, files):
        places = [file] if file.exists() else []
        if not places or file.is_file():  # a new one takes its place
            places.append(Path(os.path.realpath(file)).parent)  # where resolve() would raise for a link to itself
        if file.is_dir() or not all(os.access(place, os.W_OK) for place in places):
            raise Show1Error(f"{file} cannot be written.", "Name a file in a folder that is there and yours.")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise Show1Error for what the system has against writing a file there."""
    try:
        yield
    except OSError as error:
        raise Show1Error(
            f"{path.name} cannot be written to the folder {path.parent.absolute()}: {os.strerror(error.errno)}.",
            REMEDIES.get(error.errno, "Choose a folder and name that can be written to."),
        ) from None


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, either the old or the new one is there, whole."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
