"""show-1.ipynb, run by a real kernel in an environment of its own, from its install cell to a video."""

import asyncio
import json
import os
import re
import shutil
import sysconfig
import venv
from pathlib import Path
from urllib.request import urlopen

import imageio_ffmpeg
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = nbformat.read(ROOT / "show-1.ipynb", as_version=4)
PATIENCE = 1200  # seconds, for one cell; a guard against hanging, far from what is normal


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project, and a kernel whose Python has its own environment.

    The packages are those here: pip finds them there, as it does on a host that has them, and fetches nothing.
    """
    left_out = shutil.ignore_patterns(".*", "outputs", "tests", "training", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "project", ignore=left_out)
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "here.pth").write_text(sysconfig.get_path("purelib"))
    kernel = tmp_path / "kernels/kernels/own"
    kernel.mkdir(parents=True)
    argv = [str(home / "bin/python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "own", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "kernels"))
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_TOKEN", "PYTHONPATH", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "project"


def test_nothing_is_stored_in_it():
    for cell in NOTEBOOK.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
    assert NOTEBOOK.metadata.kernelspec.name == "python3"
    assert "hf_" not in (ROOT / "show-1.ipynb").read_text()


def test_install_log_in_run_and_a_video(project):
    said = asyncio.run(_run_all(project))
    assert "Videos are kept in" in said["install"]
    assert "no terminal to ask" in said["login"]  # the cell as it stands holds no token, and mini needs none
    (video,) = (project / "outputs").glob("*.mp4")
    assert imageio_ffmpeg.count_frames_and_secs(str(video))[0] == 29
    assert "data:video/mp4;base64" in said["make"]
    assert "Traceback" not in "".join(said.values())


async def _run_all(project: Path) -> dict[str, str]:
    """Run cell after cell, the page's until it answers; return what each has said."""
    client = NotebookClient(
        nbformat.from_dict(NOTEBOOK.copy()),
        kernel_name="own",
        timeout=PATIENCE,
        resources={"metadata": {"path": str(project)}},
    )
    async with client.async_setup_kernel():
        for index, cell in enumerate(client.nb.cells):
            running = asyncio.ensure_future(client.async_execute_cell(cell, index))
            if cell.id == "run":
                assert await asyncio.wait_for(_page(cell, running), PATIENCE) == 200
                await client.km.interrupt_kernel()  # as the notebook's stop button does
            await running
        return {cell.id: _said(cell) for cell in client.nb.cells if cell.cell_type == "code"}


async def _page(cell, running: asyncio.Future) -> int:
    """Wait until the cell has printed the page's address, and return what it answers."""
    while not (found := re.search(r"http://127\.0\.0\.1:\d+", _said(cell))):
        assert not running.done(), _said(cell)
        await asyncio.sleep(0.2)
    return await asyncio.to_thread(lambda: urlopen(found[0], timeout=60).status)


def _said(cell) -> str:
    texts = [output.get("text") or "".join(map(str, output.get("data", {}).values())) for output in cell.outputs]
    return "".join(texts)
