"""`python -m show_1` as people call it: in a process of its own, on the tiny cascade and on mini."""

import copy
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import pytest
from safetensors.torch import load_file

from show_1 import video
from show_1.__main__ import main
from show_1.errors import Show1Error
from tests import tiny

ROOT = Path(__file__).parents[1]


def show_1(*arguments: str, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "show_1", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_prompt_becomes_a_video(tiny_cascade, tmp_path):
    out, stages = tmp_path / "video.mp4", tmp_path / "stages.safetensors"
    settings = ["--cascade", tiny_cascade, "--seed", tiny.SEED, "--device", "cpu", "--dtype", "float64"]
    done = show_1(tiny.PROMPT, *settings, "--out", out, "--save-stages", stages, "--set", "keyframes.steps=2")
    assert done.returncode == 0, done.stderr
    assert f"Seed: {tiny.SEED}" in done.stdout
    assert f"Video: {out}" in done.stdout
    for stage in ("keyframes", "interpolation", "first frame", "pixel upscale", "latent upscale"):
        assert stage in done.stderr
    assert re.search(r"2/2 \[\d\d:\d\d<\d\d:\d\d", done.stderr)  # steps, time taken, time left
    tensors = load_file(stages)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()}["video"] == (1, 3, 29, 14, 18)
    assert all(str(tensor.dtype) == "torch.float64" for tensor in tensors.values())
    metadata = video.read_metadata(out)
    assert metadata["cascade"]["keyframes"]["steps"] == 2
    assert metadata["prompt"] == tiny.PROMPT
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stages.safetensors", "video.mp4"]
    assert imageio_ffmpeg.count_frames_and_secs(str(out))[0] == 29
    # What a stranger's program finds in the file, without our code.
    said = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", out, "-f", "ffmetadata", "-"],
        capture_output=True,
        text=True,
    )
    comment = next(line for line in said.stdout.splitlines() if line.startswith("comment="))
    assert json.loads(comment.removeprefix("comment=").replace("\\", ""))["seed"] == tiny.SEED


def test_replay_by_the_command(tiny_cascade, tmp_path):
    settings = ["--cascade", tiny_cascade, "--seed", 3, "--device", "cpu"]
    assert show_1("a cat", *settings, "--out", tmp_path / "cat.mp4").returncode == 0
    again = show_1("replay", tmp_path / "cat.mp4", "--cascade", tiny_cascade)
    assert (again.returncode, again.stdout) == (0, "The same frames.\n")


def test_models_from_a_folder_without_a_network(tiny_cascade, tmp_path):
    toml = shutil.copy(tiny_cascade, tmp_path)  # no models beside it
    settings = ["--cascade", toml, "--device", "cpu", "--out", tmp_path / "cat.mp4"]
    refused = show_1("a cat", *settings, "--offline")
    assert refused.returncode == 2 and "the hub is not to be asked" in refused.stderr
    refused = show_1("a cat", *settings, "--models", tiny_cascade.parent, "--memory", "1MB")
    assert refused.returncode == 2 and "does not run with --memory 1MB" in refused.stderr
    made = show_1("a cat", *settings, "--models", tiny_cascade.parent, "--offline")
    assert made.returncode == 0, made.stderr


def test_a_ctrl_c_is_one_word(tiny_cascade, tmp_path):
    command = [sys.executable, "-m", "show_1", "a cat", "--cascade", tiny_cascade, "--device", "cpu"]
    command += ["--set", "keyframes.steps=900", "--set", "pixel_upscale.steps=900", "--out", tmp_path / "cat.mp4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    made = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said = ""
    while "/900" not in said:
        piece = made.stderr.read(1)
        assert piece, said
        said += piece
    made.send_signal(signal.SIGINT)
    said, err = made.communicate(timeout=60)
    assert made.returncode == 130 and err.endswith("Cancelled.\n") and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_several_prompts_in_one_go(one_step_cascade, tmp_path):
    settings = ["--cascade", one_step_cascade, "--seed", 3, "--device", "cpu"]
    done = show_1("a cat", "--also", "a dog", "--also", "a cat", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = [Path(line.removeprefix("Video: ")) for line in done.stdout.splitlines() if line.startswith("Video: ")]
    assert [file.name for file in files] == ["a-cat-3.mp4", "a-dog-3.mp4", "a-cat-3-2.mp4"]
    assert [video.read_metadata(tmp_path / file)["prompt"] for file in files] == ["a cat", "a dog", "a cat"]


def test_mini_fast_makes_its_first_video_in_a_minute(tmp_path):
    start = time.monotonic()
    done = show_1("a panda jumping in the snow", "--cascade", "mini-fast", "--device", "cpu", "--seed", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Written beside the caller, under a name of its own.
    (out,) = (tmp_path / "outputs").iterdir()
    assert out.name == "a-panda-jumping-in-the-snow-1.mp4"
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(out))
    assert (frames, round(seconds, 1)) == (29, 3.6)
    assert time.monotonic() - start < 180  # a guard against hanging; the measured figure is in the README


BAD = {
    "blank prompt": (["  "], "prompt is empty"),
    "unknown cascade": (["a cat", "--cascade", "minni"], "minni"),
    "empty cascade": (["a cat", "--cascade", ""], "cascade"),
    "missing cascade file": (["a cat", "--cascade", "none.toml"], "none.toml"),
    "unknown key": (["a cat", "--set", "keyframes.stepz=3"], "stepz"),
    "steps 0": (["a cat", "--set", "keyframes.steps=0"], "keyframes.steps=0"),
    "frame size": (["a cat", "--set", "keyframes.height=5"], "multiple of 2"),
    "seed": (["a cat", "--seed", "one"], "'one'"),
    "negative seed": (["a cat", "--seed", "-1"], "-1"),
    "output folder": (["a cat", "--out", "nowhere/video.mp4"], "nowhere"),
    "output name": (["a cat", "--out", "video.avi"], ".mp4"),
    "stages folder": (["a cat", "--save-stages", "nowhere/s.safetensors"], "nowhere"),
    "stages a folder": (["a cat", "--save-stages", "."], ". is a folder"),
    "stages a video": (["a cat", "--save-stages", "video.mp4"], "cannot both be video.mp4"),
    "stages a long name": (["a cat", "--save-stages", 250 * "x"], "cannot be written"),
    "device": (["a cat", "--device", "cuda:9"], "cuda:9"),
    "one file for two": (["a cat", "--also", "a dog", "--out", "cat.mp4"], "there are 2 prompts"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_told_in_two_sentences(tiny_cascade, tmp_path, monkeypatch, capfd, arguments, words):
    if "--cascade" not in arguments:
        arguments = [*arguments, "--cascade", str(tiny_cascade)]
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "video.mp4"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["show_1", *arguments])
    assert main() == 2
    said = capfd.readouterr().err
    problem, remedy = said.strip().splitlines()[-2:]
    assert words in problem + remedy
    assert problem.endswith(".") and remedy.endswith((".", "mini"))
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


REFUSED = {"at once": (["--also", " "], "The prompt is empty"), "late": (["--set", "keyframes.height=5"], "multiple")}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_no_folder_behind(tiny_cascade, tmp_path, monkeypatch, capfd, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["show_1", "a cat", *arguments, "--cascade", str(tiny_cascade)])
    assert main() == 2
    assert words in capfd.readouterr().err and not list(tmp_path.iterdir())
    (tmp_path / "outputs").mkdir()
    assert main() == 2 and (tmp_path / "outputs").exists()  # it is not ours


def test_a_folder_for_videos_that_cannot_be_made_is_told(tiny_cascade, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").touch()
    monkeypatch.setattr(sys, "argv", ["show_1", "a cat", "--cascade", str(tiny_cascade)])
    assert main() == 2
    assert "outputs cannot be written to the folder" in capfd.readouterr().err


def test_damaged_weights_are_named(tiny_cascade, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "models"
    shutil.copytree(tiny_cascade.parent, folder)
    weights = folder / "showlab" / "show-1-sr1" / "unet" / "diffusion_pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:100_000])
    command = ["show_1", "a cat", "--cascade", str(folder / "cascade.toml"), "--out", str(tmp_path / "video.mp4")]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 2
    said = capfd.readouterr().err
    assert "[pixel_upscale]" in said and str(weights) in said
    assert "Traceback" not in said
    assert not (tmp_path / "video.mp4").exists()
    monkeypatch.setattr(sys, "argv", [*command, "--debug"])
    with pytest.raises(Show1Error, match="pixel_upscale"):
        main()


def test_an_error_can_be_copied_and_sent_to_another_process():
    error = Show1Error("This is wrong.", "Do that.")
    for same in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(same), same.problem, same.remedy) == ("This is wrong. Do that.", "This is wrong.", "Do that.")
