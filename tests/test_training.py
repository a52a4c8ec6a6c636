"""Training mini: it goes on where it stopped, and leaves nothing half-written. Only the text stage, the smallest."""

import errno
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import multiprocessing
from transformers import T5EncoderModel

from show_1.errors import Show1Error, exit_code
from training import batches, evaluate, judge, losses, models, stages, train, world
from training.evaluate import combinations, pairs
from training.redraw import TIMES, Redrawn

CPU = torch.device("cpu")
REAL_MINI = stages.MINI


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Train there, and not in the project."""
    monkeypatch.setattr(stages, "MINI", tmp_path / "mini")
    monkeypatch.setattr(stages, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(train, "LOG", tmp_path / "log.jsonl")
    monkeypatch.setattr(stages, "captions", partial(batches.captions, count=4))
    shutil.copytree(REAL_MINI / "show-1-base" / "tokenizer", tmp_path / "mini" / "show-1-base" / "tokenizer")
    return tmp_path


def _logged(folders) -> list[dict]:
    return [json.loads(line) for line in (folders / "log.jsonl").read_text().splitlines()]


def _files(folder) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_goes_on_where_it_stopped(folders):
    train.run("text", 0.05, 0, CPU)
    train.run("text", 0.05, 0, CPU)  # has had its time: nothing more to do
    (first,) = _logged(folders)
    train.run("text", 0.2, 0, CPU)
    last = _logged(folders)[-1]
    assert last["step"] > first["step"] and last["seconds"] > first["seconds"]
    assert last["loss"] < first["loss"]
    weights = "mini/show-1-base/text_encoder/model.safetensors"
    assert {"runs/text.pt", weights} <= set(_files(folders))
    assert not [name for name in _files(folders) if "part" in name]
    encoder = T5EncoderModel.from_pretrained(folders / "mini/show-1-base/text_encoder")
    assert encoder.shared.weight.dtype == torch.float16


def test_all_that_a_stage_has_learned_comes_back(tmp_path):
    """Weights, their average, what the optimizers remember, steps and seconds."""

    def new(seed: int) -> tuple[dict, dict, list[torch.optim.Optimizer]]:
        torch.manual_seed(seed)
        trained, average = ({"unet": torch.nn.Sequential(torch.nn.Linear(40, 30))} for _ in range(2))
        return trained, average, train.optimizers_of(list(trained["unet"].parameters()), muon=True)

    def update(trained: dict, optimizers: list[torch.optim.Optimizer]) -> None:
        trained["unet"](torch.linspace(-1, 1, 40)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    trained, average, optimizers = new(0)
    update(trained, optimizers)
    train._save(tmp_path / "unet.pt", 7, 3.5, trained, average, optimizers)
    again = new(1)
    assert train._resume(tmp_path / "unet.pt", *again) == (7, 3.5)
    for models_then, models_now in zip((trained, average), again[:2], strict=True):
        for key, weight in models_then["unet"].state_dict().items():
            assert torch.equal(models_now["unet"].state_dict()[key], weight)
    for one in ((trained, optimizers), (again[0], again[2])):
        one[0]["unet"].zero_grad()
        update(*one)  # the same step only if the optimizers remember the same
    for key, weight in trained["unet"].state_dict().items():
        assert torch.equal(again[0]["unet"].state_dict()[key], weight)
    assert train._resume(tmp_path / "none.pt", *again) == (0, 0.0)


def test_a_vocabulary_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "MINI", tmp_path)
    captions = [world.sample(rng).caption for rng in [np.random.default_rng(0)] for _ in range(300)]
    monkeypatch.setattr(stages, "_captions", lambda count: captions)
    real = json.dumps

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for make, folder in ((stages.t5_tokenizer, "show-1-base"), (stages.clip_tokenizer, "show-1-sr2")):
        monkeypatch.setattr(json, "dumps", full)
        with pytest.raises(Show1Error, match=r"No space left on device\. Free some space"):
            make()
        assert not (tmp_path / folder / "tokenizer").exists()
        monkeypatch.setattr(json, "dumps", real)
        words = make()("a panda").input_ids
        assert make()("a panda").input_ids == words and make().unk_token_id not in words[1:-1]


def test_processes_that_train_together_end_with_the_same_weights(tmp_path):
    """Two processes, each with batches of its own; after they have met, both hold the mean of their weights."""
    meeting = f"file://{tmp_path}/meeting"
    multiprocessing.spawn(_meet_once, (meeting, tmp_path), nprocs=2)
    one, another = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["seconds"] == another["seconds"] == 15
    assert torch.equal(one["weights"], another["weights"]) and torch.equal(one["weights"], torch.full((3,), 0.5))


def _meet_once(rank: int, meeting: str, folder) -> None:
    train.join(meeting, rank, 2)
    weights = torch.nn.Parameter(torch.full((3,), float(rank)))
    seconds = train._meet([weights], 10.0 + 10 * rank)
    torch.save({"weights": weights.detach(), "seconds": seconds}, folder / f"{rank}.pt")


def test_mini_stays_small_enough_to_come_with_the_project():
    sizes = [file.stat().st_size for file in REAL_MINI.rglob("*") if file.is_file()]
    assert sum(sizes) <= 40_000_000 and max(sizes) <= 15_000_000


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_muon_trains_convolutions_as_matrices_and_goes_on(memory):
    """Eight steps in a row, in both orders of memory, end where four steps and four after a checkpoint end."""
    torch.manual_seed(0)
    sizes = ((32, 48, 3), (48, 48, 1), (48, 3, 1))
    layers = [lambda size=size: torch.nn.Conv2d(*size) for size in sizes]
    layers.insert(1, torch.nn.GELU)
    start = torch.nn.Sequential(*(layer() for layer in layers)).state_dict()
    pictures = torch.randn(4, 32, 6, 6)

    def new() -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
        model = torch.nn.Sequential(*(layer() for layer in layers))
        model.load_state_dict(start)
        model.to(memory_format=memory)
        return model, train.optimizers_of(list(model.parameters()), muon=True)

    def step(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> float:
        model.zero_grad()
        loss = (model(pictures) - pictures[:, :3, 1:5, 1:5]).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.item()

    whole, optimizers = new()
    adamw, muon = optimizers
    assert [parameter.shape for parameter in muon.param_groups[0]["params"]] == [(48, 32 * 9), (48, 48)]
    assert len(adamw.param_groups[0]["params"]) == 4  # the last layer, and what is no matrix
    losses = [step(whole, optimizers) for _ in range(8)]
    assert losses == sorted(losses, reverse=True)
    before, earlier = new()
    for _ in range(4):
        step(before, earlier)
    after, later = new()
    after.load_state_dict(before.state_dict())
    for one, other in zip(later, earlier, strict=True):
        one.load_state_dict(other.state_dict())
    assert [step(after, later) for _ in range(4)] == pytest.approx(losses[4:])
    moved = whole[0].weight.detach() - start["0.weight"]
    spread = torch.linalg.svdvals(moved.flatten(1))
    assert spread.median() > spread[0] / 2  # most directions move alike, which is what Muon is for


def test_a_full_disk_loses_nothing(folders, monkeypatch):
    train.run("text", 0.05, 0, CPU)
    before = {name: (folders / name).read_bytes() for name in _files(folders) if not name.endswith("jsonl")}

    def full(state, path):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    def export_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def run_into(broken, name, fault) -> dict[str, bytes]:
        with monkeypatch.context() as patch, pytest.raises(Show1Error, match="No space left on device") as caught:
            patch.setattr(broken, name, fault)
            train.run("text", 0.1, 0, CPU)
        assert "Free some space" in str(caught.value)
        return {name: (folders / name).read_bytes() for name in _files(folders) if not name.endswith("jsonl")}

    assert run_into(train, "_export", export_full) == before
    after = run_into(torch, "save", full)
    assert after["runs/text.pt"] == before["runs/text.pt"] and after.keys() == before.keys()
    T5EncoderModel.from_pretrained(folders / "mini/show-1-base/text_encoder")


def test_a_full_disk_at_the_start_loses_nothing_and_is_told(folders, monkeypatch, capsys):
    train._export_schedulers()
    train._export_words()
    before = {name: (folders / name).read_bytes() for name in _files(folders)}
    assert sum(name.endswith("scheduler_config.json") for name in before) == 7 and "mini/words.txt" in before
    written = []

    def full(path, content):
        written.append(path.name)
        path.write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "argv", ["training.train", "--minutes", "1", "--processes", "1"])
    for export in ("_export_schedulers", "_export_words"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            for other in {"_export_schedulers", "_export_words"} - {export}:
                patch.setattr(train, other, lambda: None)
            assert exit_code(train.main) == 2
        assert "No space left on device.\nFree some space" in capsys.readouterr().err
    assert written == [".scheduler_config.json.part", ".words.txt.part"]
    assert {name: (folders / name).read_bytes() for name in _files(folders) if name != "log.jsonl"} == before


def test_a_judge_that_cannot_be_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "WEIGHTS", tmp_path / "judge.safetensors")
    none = torch.zeros(1, dtype=torch.long)
    batch = {"clip": torch.rand(1, 3, 8, 80, 144), "objects": torch.zeros(1, 50), "place": none, "motion": none}
    batch |= {"two": [0], "sides": torch.zeros(2, 1, dtype=torch.long)}
    monkeypatch.setattr(judge, "DataLoader", lambda *_, **__: [batch] * 2)  # the time is over at the second
    judge.train(1e-6)
    before = judge.WEIGHTS.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EDQUOT, "Disk quota exceeded")))
    with pytest.raises(Show1Error, match=r"Disk quota exceeded\. Free some space"):
        judge.train(1e-6)
    assert judge.WEIGHTS.read_bytes() == before and _files(tmp_path) == ["judge.safetensors"]


def test_what_is_said_to_be_done_has_been_exported(folders, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train.run("text", 0.02, 0, CPU)
    train.run("text", 0.02, 0, CPU)
    assert (folders / "mini/show-1-base/text_encoder/model.safetensors").exists()


def test_what_is_evaluated_has_been_saved(folders, monkeypatch):
    """An evaluation takes long: a run that is broken off in one loses no weights by it, and makes up for the last."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages.Stage, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train.run("text", 0.02, 0, CPU)
    assert "mini/show-1-base/text_encoder/model.safetensors" in _files(folders)
    train.run("text", 0.02, 0, CPU)
    assert "evaluation" in json.loads((folders / "log.jsonl").read_text().splitlines()[-1])


def test_a_stage_that_trains_on_makes_those_after_it_start_anew(folders):
    """Of the stages of one UNet: a later one's checkpoint would bring back what was there before."""
    (folders / "runs").mkdir()
    for name in ("keyframes", "paths", "interpolation"):
        (folders / "runs" / f"{name}.pt").write_bytes(b"")
    shutil.copytree(REAL_MINI / "show-1-base" / "text_encoder", folders / "mini" / "show-1-base" / "text_encoder")
    train.run("pictures", 0.02, 0, CPU)
    assert {"pictures.pt", "interpolation.pt"} == {file.name for file in (folders / "runs").glob("*.pt")}


def test_what_is_broken_off_before_it_has_saved_leaves_the_later_checkpoints(folders, monkeypatch):
    (folders / "runs").mkdir()
    (folders / "runs" / "keyframes.pt").write_bytes(b"")
    shutil.copytree(REAL_MINI / "show-1-base" / "text_encoder", folders / "mini" / "show-1-base" / "text_encoder")
    monkeypatch.setattr(train, "_export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.run("pictures", 0.02, 0, CPU)
    assert [file.name for file in (folders / "runs").glob("*.pt")] == ["keyframes.pt"]


def test_what_has_come_to_no_number_is_not_saved(folders):
    with pytest.raises(Show1Error, match="text has come to no number"):
        train.run("text", 0.02, 0, CPU, rate=1e30)
    assert not (folders / "mini" / "show-1-base" / "text_encoder").exists() and not list(folders.rglob("*.pt"))


@pytest.mark.parametrize("empty", [False, True])
def test_a_checkpoint_of_another_configuration_or_none(folders, empty):
    (folders / "runs").mkdir()
    torch.save({"models": {"text_encoder": {}, "reader": {}}}, folders / "runs" / "text.pt")
    if empty:
        (folders / "runs" / "text.pt").write_bytes(b"")
    with pytest.raises(Show1Error, match=r"text\.pt does not fit"):
        train.run("text", 0.1, 0, CPU)


def test_weights_of_another_configuration(folders):
    folder = folders / "mini" / "show-1-interpolation" / "unet"
    models.video_unet("keyframes").save_pretrained(folder)
    with pytest.raises(Show1Error, match="another configuration"):
        stages._start_from(models.video_unet("interpolation"), folder)


@pytest.mark.parametrize(
    ("stage", "folder"),
    [
        ("latent_upscale", "show-1-sr1/unet"),
        ("pixel_upscale", "IF-II-L/unet"),
        ("first_frame", "show-1-interpolation/unet"),
        ("interpolation", "show-1-base/unet"),
    ],
)
def test_damaged_weights_of_an_earlier_stage_are_told_before_a_worker_meets_them(folders, stage, folder):
    shutil.copytree(REAL_MINI, folders / "mini", dirs_exist_ok=True)
    (file,) = (folders / "mini" / folder).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(Show1Error, match=rf"{folder}/.* cannot be read"):
        train.run(stage, 0.1, 0, CPU)


def test_the_spatial_part_draws_frames_as_the_new_video_unet_does_and_is_trained_with_it():
    """Temporal layers that are new change nothing; both have the same parameters, not copies."""
    unet = models.video_unet("keyframes")
    part = models.spatial_part(unet, "keyframes")
    clip, text = torch.randn(1, 3, 2, 8, 12), torch.randn(1, 77, models.TEXT_WIDTH)
    frames = part(clip[0].transpose(0, 1), 500, encoder_hidden_states=text.expand(2, -1, -1)).sample
    moving = unet(clip, torch.tensor(500), encoder_hidden_states=text).sample
    torch.testing.assert_close(frames, moving[0].transpose(0, 1), atol=1e-4, rtol=0)
    frames.sum().backward()
    untrained = [name for name, parameter in unet.named_parameters() if parameter.grad is None]
    assert untrained and all("temp_" in name for name in untrained)


@pytest.mark.parametrize(
    ("new", "stage"),
    [
        (models.video_unet, "interpolation"),
        (models.video_unet, "pixel_upscale"),
        (models.picture_unet, "pixel_upscale"),
    ],
)
def test_a_new_conditioned_unet_hands_its_condition_on(new, stage):
    """The plain way, to which the training only adds: at the highest noise level the velocity is minus the sample."""
    unet = new(stage)
    shape = (2, 3, 4, 32, 48) if new is models.video_unet else (2, 3, 32, 48)
    rng = torch.Generator().manual_seed(0)
    levels = torch.rand(2, 3, *[1] * (len(shape) - 2), generator=rng) - 0.5  # each colour's mean has to come through
    condition = 0.5 * (torch.rand(shape, generator=rng) - 0.5) + levels
    mask = torch.ones(2, unet.config.in_channels - 6, *shape[2:])
    model_input = torch.cat([torch.randn(shape, generator=rng), condition, mask], dim=1)
    text = torch.randn(2, 77, models.TEXT_WIDTH, generator=rng)
    noise_level = torch.tensor([20, 50]) if unet.config.class_embed_type else None
    with torch.no_grad():
        velocity = unet(model_input, torch.tensor([999, 999]), text, noise_level).sample
    assert (velocity + condition).square().mean() < 0.01 * condition.var()


def test_upscalers_learn_from_true_keyframes_and_at_times_from_blends_between_them():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    scenes, times = [world.sample(rng) for _ in range(16)], torch.arange(8).expand(16, 8) / 28
    shown, true = batches._half_blended(scenes, times), world.render(scenes, *batches.SMALL, times)
    errors = (shown - true).square().mean((1, 3, 4))  # (scenes, frames)
    assert errors[:, [0, 4]].max() < 1e-6
    assert 3 <= (errors[:, 2] > 1e-6).sum() <= 13


@pytest.fixture(scope="module")
def redrawn():
    return Redrawn(REAL_MINI, CPU, torch.float32, fresh=0.05, interpolated=True)


def test_redrawn_clips_show_their_scenes_where_they_are_with_the_small_stages_faults(redrawn):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    scenes = [world.sample(rng, pairs=0) for _ in range(3)]
    drawn = redrawn.draw(scenes, 700)
    true = world.render(scenes, *batches.SMALL, TIMES, coverage=True)
    assert drawn.shape == (3, 3, 29, *batches.SMALL)
    covered = true[:, 3:] > 0.5
    errors = [
        [((clip - other)[:, where[0]]).square().mean() for other in true[:, :3]]
        for clip, where in zip(drawn, covered, strict=True)
    ]
    for number, row in enumerate(errors):
        assert row[number] == min(row)
        assert 0.005 < row[number] < 0.5  # neither the true one nor something else


def test_redrawn_clips_are_used_several_times_and_chosen_anew_by_each_generator(redrawn, monkeypatch):
    drawn = []

    def draw(scenes: list[world.Scene], noise_level: int) -> torch.Tensor:
        drawn.extend(scenes)
        return torch.zeros(len(scenes), 3, 29, *batches.SMALL)

    monkeypatch.setattr(redrawn, "draw", draw)
    chosen = [[redrawn(rng, 4)[0] for _ in range(100)] for rng in (np.random.default_rng(seed) for seed in (0, 0, 1))]
    assert chosen[0] == chosen[1] != chosen[2]
    assert 12 < len(drawn) / 3 < 40  # a twentieth of 400, and the first four
    assert not any(world.held_out(name, s.place, s.motion) for s in drawn for name in s.objects)


def test_upscalers_see_redrawn_frames_as_often_as_said():
    class Asked(Exception):
        pass

    def redrawn(*_):
        raise Asked

    asked = 0
    for seed in range(60):
        try:
            batches.enlarged_pictures(np.random.default_rng(seed), redrawn=redrawn)
        except Asked:
            asked += 1
    assert asked / 60 == pytest.approx(batches.REDRAWN, abs=0.15)


def test_interpolation_sees_keyframes_as_they_are_drawn_and_learns_what_is_true(redrawn, monkeypatch):
    monkeypatch.setattr(batches, "REDRAWN", 1.0)
    monkeypatch.setattr(
        redrawn, "draw", lambda scenes, noise_level: 0.5 * world.render(scenes, *batches.SMALL, batches.KEYFRAME_TIMES)
    )
    torch.manual_seed(0)
    for seed in range(4):
        batch = batches.segments(np.random.default_rng(seed), redrawn=redrawn)
        blend, mask = batch["condition"][:, :3], batch["condition"][0, 3, :, 0, 0]
        assert batch["clean"].shape[2:] == (5, *batches.SMALL) and mask.tolist() == [1, 0, 0, 0, 1]
        torch.testing.assert_close(blend[:, :, [0, -1]], 0.5 * batch["clean"][:, :, [0, -1]])


def test_keyframes_alone_are_drawn_where_nothing_else_is_asked_for():
    drawn = Redrawn(REAL_MINI, CPU, torch.float32, fresh=0.05, interpolated=False)
    scenes, clips = drawn(np.random.default_rng(0), 2)
    assert len(scenes) == 2 and clips.shape == (2, 3, 8, *batches.SMALL)
    assert (clips - world.render(scenes, *batches.SMALL, batches.KEYFRAME_TIMES)).square().mean() < 0.1


def test_upscalers_see_what_was_drawn_and_learn_what_is_true(redrawn, monkeypatch):
    """The condition of the frames behind the lead is what was drawn, at its times, enlarged; true are those in full."""
    monkeypatch.setattr(batches, "REDRAWN", 1.0)
    monkeypatch.setattr(redrawn, "draw", lambda scenes, noise_level: world.render(scenes, *batches.SMALL, TIMES))
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    for make in (
        lambda: batches.enlarged_pictures(rng, redrawn=redrawn),
        lambda: batches.enlarged_windows(rng, redrawn=redrawn, first_frame=lambda first: first["clean"]),
    ):
        apart = []
        for _ in range(8):
            batch = make()
            assert batch["condition"].shape == batch["clean"].shape
            assert batch["weight"].shape[-2:] == batch["clean"].shape[-2:]
            assert all(batch["captions"])
            apart.append((batch["condition"] - batch["clean"]).square().mean() / batch["clean"].var())
        assert min(apart) > 0 and np.mean(apart) < 0.25


def test_a_lead_is_at_times_the_first_frames_model_own(redrawn):
    rng = np.random.default_rng(0)
    clip = torch.zeros(2, 3, 8, 16, 16)
    led = [
        batches._led(rng, {"clean": clip, "condition": clip + 1}, lambda batch: batch["condition"] + 1)["condition"]
        for _ in range(40)
    ]
    assert all((each[:, :, 1:] == 1).all() for each in led)
    assert 10 <= sum((each[:, :, 0] == 2).all().item() for each in led) <= 30
    assert 2 <= sum((each[:, :, 0] == 0).all().item() for each in led) <= 20


def test_a_sampler_of_few_steps_is_trained_at_its_own_noise_levels():
    torch.manual_seed(0)
    levels, counts = losses.of_sampler(3)(3000).unique(return_counts=True)
    assert levels.tolist() == [333, 666, 999]  # where it looks, as the scheduler says
    assert counts.min() > 900  # each as often as the others
    assert losses.of_sampler(1)(5).tolist() == [999] * 5


def test_plain_attention_gives_the_same_numbers():
    """Training on a CPU goes without PyTorch's own; the temporal layers are made to do something here."""
    torch.manual_seed(0)
    unet = models.video_unet("interpolation").eval()
    for parameter in unet.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    clip, text = torch.randn(1, 7, 5, 8, 16), torch.randn(1, 77, models.TEXT_WIDTH)
    with torch.no_grad():
        usual = unet(clip, torch.tensor(666), encoder_hidden_states=text).sample
        before = [type(each).__name__ for each in unet.attn_processors.values()]
        train._attend_plainly(unet)
        after = [type(each).__name__ for each in unet.attn_processors.values()]
        assert "AttnProcessor2_0" in before and "AttnProcessor2_0" not in after
        plain = unet(clip, torch.tensor(666), encoder_hidden_states=text).sample
    torch.testing.assert_close(plain, usual, atol=1e-4, rtol=1e-3)


def test_a_place_in_falling_snow_names_no_motion():
    place, motion = list(world.PLACES).index("in the snow"), list(world.MOTIONS).index("falling down")
    told = batches.told(
        {
            "captions": ["a panda in falling snow", "a panda falling in falling snow"],
            "place": torch.tensor([place, place]),
            "motion": torch.tensor([motion, motion]),
        }
    )
    assert told.tolist() == [0, 1]


def test_expected_coverage_moves_as_the_motions_say():
    """By the middle of where things are more often than at other times."""
    expected = stages.expected_coverage(np.random.default_rng(0), (5, 8), count=6)
    assert expected.shape == (2, len(world.MOTIONS), 8, 5, 8)
    across = (expected * torch.arange(8.0)).sum((-1, -2))
    down = (expected * torch.arange(5.0)[:, None]).sum((-1, -2))
    for name, middle, sign in (
        ("moving left", across, -1),
        ("moving right", across, 1),
        ("flying up", down, -1),
        ("falling down", down, 1),
    ):
        one, pair = middle[:, list(world.MOTIONS).index(name)] * sign
        assert (one.diff()[:-1] > 0).all(), name  # at the last, some of it has left the picture
        assert pair[-1] > pair[0], name


def _taught(stage: stages.Stage, batch: dict, rate: float) -> tuple[set[str], float]:
    """Return what eight updates on a batch teach of the UNet, and what share of the loss they leave."""
    unet, losses = stage.models["unet"], []

    def measure() -> None:
        with torch.no_grad():
            torch.manual_seed(0)
            losses.append(stage.loss(stage.models, batch).item())

    measure()
    optimizer = torch.optim.Adam([parameter for parameter in unet.parameters() if parameter.requires_grad], rate)
    for _ in range(8):
        optimizer.zero_grad()
        stage.loss(stage.models, batch).backward()
        optimizer.step()
    measure()
    assert not any(parameter.requires_grad for parameter in stage.models["untaught"].parameters())
    taught = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    return taught, losses[1] / losses[0]


def test_paths_are_taught_to_the_deepest_up_block_alone(folders, monkeypatch):
    shutil.copytree(REAL_MINI / "show-1-base" / "text_encoder", folders / "mini" / "show-1-base" / "text_encoder")
    with pytest.raises(Show1Error, match="--stage pictures"):
        stages.paths_stage(CPU)
    shutil.copytree(REAL_MINI / "show-1-base" / "unet", folders / "runs" / "pictures")
    monkeypatch.setattr(stages, "expected_coverage", partial(stages.expected_coverage, count=1))
    stage = stages.paths_stage(CPU)
    taught, left = _taught(stage, batches.path_clips(np.random.default_rng(0), 2), rate=1e-3)
    assert left < 0.8
    assert taught and all(name.startswith("up_blocks.0.") for name in taught)


def test_what_the_latent_upscale_redraws_is_shown_and_nearer_to_the_truth(tmp_path):
    scenes, times = [world.sample(np.random.default_rng(2))], torch.arange(2)[None] / 28
    clean, medium = (world.render(scenes, *size, times) for size in (batches.FULL, batches.MEDIUM))
    blurred = F.avg_pool3d(F.pad(medium, (1, 1, 1, 1, 0, 0), mode="replicate"), (1, 3, 3), stride=1)
    batch = {"clean": clean, "condition": batches.bicubic(blurred, batches.FULL), "captions": [scenes[0].caption]}
    stage = stages.latent_upscale_stage(CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = stage.sample(stage.models, batch)
    assert drawn.shape == clean.shape
    assert (drawn - clean).abs().mean() < 0.9 * (batch["condition"] - clean).abs().mean()
    train.sheet(drawn, batch, tmp_path / "latent_upscale.png")
    width, height = Image.open(tmp_path / "latent_upscale.png").size
    assert (width, height) == (2 * 2 * (288 + 2), 2 * 3 * (160 + 2))  # two frames, three rows, in double size


def test_pictures_for_pairs_are_told_in_the_same_words_but_for_the_things():
    things = {"a", "an"}
    for name, thing in world.OBJECTS.items():
        things.update(re.findall("[a-z]+", f"{name} {thing.synonyms}"))
    batch = batches.pictures_for_pairs(np.random.default_rng(0), 4)
    rows = list(zip(batch["captions"], batch["left"], batch["right"], strict=True))
    assert sum(left != right for _, left, right in rows) > 8
    for row in rows:
        told, left, right = row
        if left == right:
            assert told == left and " and " not in told
        rest, *others = ([word for word in text.split() if word.strip(",") not in things] for text in row)
        assert others == [rest, rest]


def test_pairs_are_taught_to_the_blocks_that_read_alone(folders):
    shutil.copytree(REAL_MINI / "show-1-base" / "text_encoder", folders / "mini" / "show-1-base" / "text_encoder")
    with pytest.raises(Show1Error, match="--stage pictures"):
        stages.pairs_stage(CPU)
    shutil.copytree(REAL_MINI / "show-1-base" / "unet", folders / "mini" / "show-1-base" / "unet")
    stage = stages.pairs_stage(CPU)
    taught, left = _taught(stage, batches.pictures_for_pairs(np.random.default_rng(0)), rate=3e-4)
    assert left < 0.9
    assert taught and all(re.match(r"(down_blocks\.2|mid_block|up_blocks\.[01])\.", name) for name in taught)


@pytest.mark.parametrize(
    ("stage", "there", "first"),
    [
        ("keyframes", [], "text"),
        ("interpolation", ["show-1-base/text_encoder"], "keyframes"),
        ("first_frame", ["show-1-base"], "interpolation"),
        ("pixel_upscale", ["show-1-base", "show-1-interpolation"], "first_frame"),
        ("latent_upscale", [], "vae"),
    ],
)
def test_a_stage_that_needs_another_first(folders, stage, there, first):
    for folder in there:
        shutil.copytree(REAL_MINI / folder, folders / "mini" / folder, dirs_exist_ok=True)
    with pytest.raises(Show1Error, match=f"--stage {first}$"):
        train.run(stage, 0.1, 0, CPU)


def test_a_text_encoder_of_another_configuration(folders, monkeypatch):
    monkeypatch.setattr(models, "TEXT_WIDTH", 64)
    shutil.copytree(REAL_MINI / "show-1-base" / "text_encoder", folders / "mini" / "show-1-base" / "text_encoder")
    for build in (stages.text_stage, lambda: stages.keyframes_stage(CPU)):
        with pytest.raises(Show1Error, match=r"text_encoder/model\.safetensors holds weights of another"):
            build()


@pytest.mark.parametrize(
    ("flags", "words"), [(["--stage", "keyframe"], "no stage 'keyframe'"), (["--device", "gpu"], "no device 'gpu'")]
)
def test_bad_flags(monkeypatch, capsys, flags, words):
    monkeypatch.setattr(sys, "argv", ["training.train", "--minutes", "1", *flags])
    with pytest.raises(SystemExit) as caught:
        sys.exit(exit_code(train.main))
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_pairs_are_judged_in_combinations_that_were_never_trained_on():
    chosen = pairs(24)
    assert len(set(chosen)) == 24 and len({place for _, place, _ in chosen}) == len(world.PLACES)
    assert all(world.held_out(name, *rest) for names, *rest in chosen for name in names)
    assert all(len(set(names)) == 2 for names, _, _ in chosen)


def test_the_judge_needs_movement_to_tell_a_motion():
    """With one frame for all eight, its verdict on the motion is the same whatever the frame shows."""
    critic = judge.Judge().eval()
    stills = torch.rand(3, 3, 1, 80, 144).expand(-1, -1, 8, -1, -1)
    motions = critic(stills)[2]
    torch.testing.assert_close(motions, motions[:1].expand_as(motions), atol=1e-4, rtol=0)
    assert not torch.allclose(critic(torch.rand(2, 3, 8, 80, 144))[2][0], motions[0], atol=1e-4)


def test_the_judge_looks_at_each_still_alone():
    """Each frame shows another thing."""
    names = list(world.OBJECTS)[:11]
    scenes = [world.Scene((name,), "on the grass", "standing still", "", 1) for name in names]
    clip = world.render(scenes, *batches.FULL, torch.zeros(1))[:, :, 0].transpose(0, 1)[None]
    stills = judge.load().stills(clip)
    assert stills.shape == (1, 11) and (stills[0] == torch.arange(11)).float().mean() > 0.8


def test_the_trained_judge_is_right_on_clips_it_has_not_seen():
    right = judge.accuracy(judge.load(), batches=4)
    assert min(right.values()) > 0.9, right


def test_combinations_cover_the_vocabulary():
    chosen = combinations(132)
    assert len(set(chosen)) == 132 and all(world.held_out(*words) for words in chosen)
    for column, known in enumerate((world.OBJECTS, world.PLACES, world.MOTIONS)):
        counts = [sum(words[column] == word for words in chosen) for word in known]
        assert min(counts) >= 2 and max(counts) <= 2 * min(counts) + 2, dict(zip(known, counts, strict=True))


@pytest.mark.parametrize(
    ("flags", "words"), [(["--json", "."], "Name a file"), (["--guidance", "1,x"], "invalid scales value: '1,x'")]
)
def test_evaluation_refuses_bad_flags_before_it_begins(monkeypatch, capsys, flags, words):
    monkeypatch.setattr(evaluate, "Show1Pipeline", None)
    monkeypatch.setattr(sys, "argv", ["training.evaluate", *flags])
    with pytest.raises(SystemExit) as caught:
        sys.exit(exit_code(evaluate.main))
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_evaluation_says_how_many_videos_were_made():
    words = combinations(5000)
    assert 500 < len(words) == len(set(words)) < 1000  # all that there are
    verdict = dict(zip(evaluate.ASPECTS, words[0], strict=True)) | {"stills": [words[0][0], "nothing"]}

    class Pool:
        def map(self, make, *each):
            seen = np.zeros((29, 2, 2, 3), np.uint8), dict.fromkeys(evaluate.CLIPS, verdict)
            return [seen for _ in zip(*each, strict=False)]

    found, shown = evaluate.follow_prompts(Pool(), 5000)
    assert len(shown) == 12
    assert found["videos"] == len(words) and 0 < found["object"] < 0.1
    assert found["still"] == pytest.approx(found["object"] / 2, abs=1e-4)  # of each video's two frames one is right
    assert found["objects"][words[0][0]] == 1 and found["stills"][words[0][0]] == 0.5


def test_what_is_painted_at_once_comes_in_batches_in_another_order(monkeypatch):
    monkeypatch.setattr(batches, "GPU_SCALE", 1)
    monkeypatch.setattr(batches, "GPU_BATCHES", 2)
    monkeypatch.setattr(batches, "GPU_POOL", 2)
    stream = batches.painted_on(CPU, batches.keyframe_clips, (1, 2))
    rng = np.random.default_rng((1, 2))
    painted = [batches.made_on(CPU, batches.keyframe_clips, rng, 2) for _ in range(2)]
    parts = [(many, slice(4 * n, 4 * n + 4), slice(16 * n, 16 * n + 16)) for many in painted for n in range(2)]
    first = next(stream)  # one of four at hand
    [(many, clips, stills)] = [part for part in parts if part[0]["captions"][part[1]] == first["captions"]]
    assert torch.equal(first["clean"], many["clean"][clips])
    assert torch.equal(first["pictures"]["clean"], many["pictures"]["clean"][stills])
    given = [first, *(next(stream) for _ in range(9))]
    order = [tuple(batch["captions"]) for batch in given]
    assert len(set(order)) == 10
    assert order[:4] != [tuple(many["captions"][clips]) for many, clips, _ in parts]
