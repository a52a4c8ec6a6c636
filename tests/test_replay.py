"""A video made again from the settings inside it."""

import pytest
import torch

from show_1 import Cascade, Show1Error, Show1Pipeline, replay, video
from show_1.jobs import clip_frames
from show_1.models import try_kernels
from show_1.pipeline import Clip


@pytest.fixture(scope="module")
def pipeline(tiny_cascade):
    return Show1Pipeline.from_cascade(tiny_cascade, "cpu")


@pytest.fixture(scope="module")
def made(pipeline, tmp_path_factory):
    file = tmp_path_factory.mktemp("made") / "cat.mp4"
    pipeline("a cat", seed=7, path=file)
    return file


def changed(file, folder, **changes):
    """Return a copy of a video with other settings inside."""
    settings = video.read_metadata(file) | changes
    video.write(folder / "changed.mp4", video.read_frames(file), 8, settings)
    return folder / "changed.mp4"


def test_the_same_frames_come_out(made, tiny_cascade, tmp_path, capsys):
    out = tmp_path / "again.mp4"
    assert replay.main([str(made), "--cascade", str(tiny_cascade), "--out", str(out)]) == 0
    assert capsys.readouterr().out == "The same frames.\n"
    assert out.read_bytes() == made.read_bytes()


def test_a_stopped_video_too(pipeline, tiny_cascade, tmp_path, capsys):
    clip = next(event for event in pipeline.stream("a cat", seed=7) if isinstance(event, Clip))
    settings = pipeline.settings("a cat", 7) | {"stopped_after": "keyframes"}
    video.write(tmp_path / "stopped.mp4", *clip_frames("keyframes", clip.frames, pipeline.cascade), settings)
    assert replay.main([str(tmp_path / "stopped.mp4"), "--cascade", str(tiny_cascade)]) == 0


def test_a_video_does_not_say_which_models_are_loaded(made, tiny_cascade, tmp_path, capsys):
    tables = video.read_metadata(made)["cascade"]
    tables["keyframes"] |= {"model": "somebody/else", "revision": "main"}
    file = changed(made, tmp_path, cascade=tables, seed=8)
    assert replay.main([str(file), "--cascade", str(tiny_cascade)]) == 1
    mine = Cascade.load(tiny_cascade).keyframes.model
    assert f"- keyframes.model is {mine} here, not somebody/else" in capsys.readouterr().out
    tables["keyframes"]["colour"] = "red"
    assert replay.main([str(changed(made, tmp_path, cascade=tables)), "--cascade", str(tiny_cascade)]) == 2
    assert "changed.mp4" in capsys.readouterr().err


def test_other_frames_are_told_with_what_differs(made, tiny_cascade, tmp_path, capsys):
    versions = video.read_metadata(made)["versions"] | {"torch": "1.0"}
    file = changed(made, tmp_path, seed=8, versions=versions, weights="others")
    assert replay.main([str(file), "--cascade", str(tiny_cascade)]) == 1
    said = capsys.readouterr().out
    assert "of 29 frames differ, by up to" in said
    assert f"- torch is {torch.__version__} here, not 1.0" in said and "weights or configurations are others" in said


def test_kernels_that_are_not_here_are_told(made, tiny_cascade, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(try_kernels, "failed", {"cpu"})
    file = changed(made, tmp_path, seed=8, versions=video.read_metadata(made)["versions"] | {"kernels": "Show-1's"})
    assert replay.main([str(file), "--cascade", str(tiny_cascade)]) == 1
    assert "- kernels is PyTorch's here, not Show-1's" in capsys.readouterr().out


def test_what_cannot_be_made_again_is_told(made, tmp_path, capsys):
    alien = changed(made, tmp_path, cascade={"name": "Elsewhere"})
    assert replay.main([str(alien)]) == 2
    assert "made by the cascade Elsewhere, which is not bundled.\nName its TOML" in capsys.readouterr().err
    assert replay.main([str(tmp_path / "none.mp4")]) == 2
    with pytest.raises(Show1Error, match="lack seed"):
        replay.read(changed(made, tmp_path, seed="seven"))


def test_differences(pipeline, made):
    theirs, cascade = replay.read(made), pipeline.cascade
    ours = replay.here(torch.device("cpu"), pipeline)
    assert replay.differences(theirs, ours, cascade) == []
    assert ours["weights"] == theirs["weights"]
    more = cascade.override(["keyframes.steps=9"])
    assert replay.differences(theirs, ours, more) == ["keyframes.steps is 9 here, not 3"]
    gpu = ours | {"device": "cuda", "dtype": "float16", "weights": "rounded"}
    told = ["the device is cuda here, not cpu", f"the dtype is float16 here, not {theirs['dtype']}"]
    assert replay.differences(theirs, gpu, cascade) == told  # rounded weights are no others
    mini = Cascade.load("mini")
    assert replay.differences(theirs, ours, mini)[0] == "it was made by the cascade Tiny, here runs Mini"
    assert replay.differences(theirs | {"cascade": {"keyframes": 3}}, ours, cascade)
