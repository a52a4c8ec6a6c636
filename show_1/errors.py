"""The one exception that users meet: what is wrong, and what to do about it; and how commands tell it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path


class Show1Error(Exception):
    """Bad input or a fault outside the program, told in two sentences.

    `problem` says what is wrong and names it (file, table, key, value); `remedy` says what to do. Commands print both
    and exit with code 2; the page shows them.
    """

    def __init__(self, problem: str, remedy: str):
        super().__init__(problem, remedy)  # both, as copying and pickling hand them to a new one
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem} {self.remedy}"


def first_line(error: Exception) -> str:
    """Return what a library's error says, as part of a sentence; some say nothing but their name, some a page."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def check_outputs(*files: Path | None) -> None:
    """Raise Show1Error for a file that cannot be written, before the work rather than after it."""
    for file in filter(None, files):
        places = [file] if file.exists() else []
        if not places or file.is_file():  # a new one takes its place
            places.append(file.resolve().parent)
        if file.is_dir() or not all(os.access(place, os.W_OK) for place in places):
            raise Show1Error(f"{file} cannot be written.", "Name a file in a folder that is there and yours.")


def exit_code(command: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run a command and return its exit code: its own, 2 after bad input, told in two sentences, or 130 after Ctrl-C.

    With `debug`, bad input is raised instead, with its traceback.
    """
    try:
        code = command() or 0
        if sys.stdout:
            sys.stdout.flush()
        return code
    except Show1Error as error:
        if debug:
            raise
        print(f"{error.problem}\n{error.remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Cancelled.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
