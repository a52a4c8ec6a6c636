"""Where figures are kept: a JSON file that is whole at any moment."""

import json
from pathlib import Path

from show_1.files import write_atomically, writing


def write_figures(file: Path | None, figures: dict) -> None:
    """Write figures where a file is named for them; raises Show1Error where it cannot be written."""
    if file is None:
        return
    text = json.dumps(figures, indent=1) + "\n"
    with writing(file):
        if file.exists() and not file.is_file():  # a pipe, or /dev/stdout
            file.write_text(text)
        else:
            write_atomically(file.resolve(), text.encode())
