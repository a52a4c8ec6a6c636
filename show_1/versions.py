"""Whether Python and the packages are those that the program was tested with: requirements.txt says which.

This file runs on whatever Python there is, and with whatever packages.
"""

import importlib.metadata
import platform
import sys
from pathlib import Path

PYTHON = (3, 11)
REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
INSTALL = "Run: pip install -r requirements.txt"


def too_old() -> list:
    """Return what is missing or older than the tested versions, each as a sentence of what is wrong."""
    if sys.version_info < PYTHON:
        return [f"This is Python {platform.python_version()}, and Show-1 needs {PYTHON[0]}.{PYTHON[1]} or newer."]
    try:
        import packaging  # noqa: F401
    except ImportError:
        return ["The package packaging is not installed."]
    return [
        f"The package {name} is not installed." if here is None else f"{name} {here} is too old: {wanted} was tested."
        for name, here, wanted, older in _compared()
        if older
    ]


def untested() -> list:
    """Return what is newer than the tested versions, each as "name version"; it may well work."""
    return [f"{name} {here}" for name, here, _, older in _compared() if not older]


def require() -> None:
    """End the program, with a sentence each and exit code 2, where Python or a package is missing or too old."""
    if wrong := too_old():
        remedy = "Install a newer Python, and start this with it." if sys.version_info < PYTHON else INSTALL
        print("\n".join(wrong), remedy, sep="\n", file=sys.stderr)
        sys.exit(2)


def _compared() -> list:
    """Return (name, version or None, wanted, whether it is too old) of each package that is not in its range."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    # Where the package was installed by pip, there is no file, and pip keeps what stood in it.
    lines = REQUIREMENTS.read_text().splitlines() if REQUIREMENTS.exists() else importlib.metadata.requires("show-1")
    found = []
    for line in lines or ():
        if not line.partition("#")[0].strip():
            continue
        wanted = Requirement(line.partition("#")[0].strip())
        try:
            here = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found.append((wanted.name, None, wanted.specifier, True))
            continue
        if not wanted.specifier.contains(here, prereleases=True):
            least = max(Version(s.version) for s in wanted.specifier if s.operator in (">=", "=="))
            found.append((wanted.name, here, wanted.specifier, Version(here) < least))
    return found
