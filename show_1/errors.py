"""The one exception that users meet: what is wrong, and what to do about it; and how commands tell it."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator


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


def memory_is_full(error: Exception) -> bool:
    """Whether this is how PyTorch, Python or the system say that a memory is full: of a GPU, or the computer's own."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (
            isinstance(error, RuntimeError)
            and any(words in str(error) for words in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))
        )
    )


@contextlib.contextmanager
def telling_full_memory(what: str) -> Iterator[None]:
    """Raise Show1Error where the memory is full while `what` is done."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not memory_is_full(error):
            raise
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # PyTorch's words on a CPU
            place, remedy = "the GPU", "allow less of it (--memory, or memory=), or take a smaller cascade"
        else:
            place, remedy = "this computer", "or take smaller frames, or a smaller cascade"
        raise Show1Error(
            f"{what} failed: the memory of {place} is full.", f"Close what else uses it, {remedy}."
        ) from error


def tell_plainly() -> None:
    """Have a Ctrl-C be one word, also while a command's modules are imported, which takes seconds."""
    shown = sys.excepthook
    sys.excepthook = lambda kind, error, trace: (
        print("Cancelled.", file=sys.stderr) if kind is KeyboardInterrupt else shown(kind, error, trace)
    )


def exit_code(command: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run a command and return its exit code: its own, or 2 after bad input, which is told in two sentences.

    Or 130 after Ctrl-C, and 141 where nobody reads its output any more, as the shell has it. With `debug`, bad input is
    raised instead, with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of names and signs that it cannot show
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
        return 141
