"""The one exception that users meet: what is wrong, and what to do about it."""


class Show1Error(Exception):
    """Bad input or a fault outside the program, told in two sentences.

    `problem` says what is wrong and names it (file, table, key, value); `remedy` says what to do. Commands print both
    and exit with code 2; the page shows them.
    """

    def __init__(self, problem: str, remedy: str):
        super().__init__(f"{problem} {remedy}")
        self.problem = problem
        self.remedy = remedy


def first_line(error: Exception) -> str:
    """Return what a library's error says, as part of a sentence; some say nothing but their name, some a page."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
