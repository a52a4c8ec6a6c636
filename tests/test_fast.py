"""Measures that trade exactness for speed do what they say; the benchmark runs and tells the truth about two ways."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from benchmarks import cascade as benchmark
from benchmarks import kernels, memory, page, precision
from benchmarks.models import load
from show_1 import Cascade, Show1Error, Show1Pipeline, placement
from show_1.errors import exit_code
from show_1.models import cpu_kernels
from show_1.pipeline import Clip, StepDone
from tests import tiny
from tests.test_models import FAMILIES, _inputs, _unet


@pytest.fixture(scope="module")
def pipeline(tiny_cascade) -> Show1Pipeline:
    return Show1Pipeline.from_cascade(tiny_cascade, "cpu", torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_reused_features_of_the_same_step_change_nothing(family):
    unet = _unet(family)
    inputs = _inputs(unet, torch.float32)
    full = unet(**inputs, return_deep=True)
    assert unet(**inputs).deep is None
    assert torch.equal(unet(**inputs, deep=full.deep).sample, full.sample)
    assert not torch.equal(unet(**inputs, deep=full.deep + 1).sample, full.sample)


def test_reuse_and_guidance_interval_leave_work_out(pipeline):
    """Full calls at every second step and where guidance goes on or off; two clips a call only under guidance."""
    stage, rows, full = pipeline.keyframes, [], []
    text = stage.encode(tiny.PROMPT)
    handles = (
        stage.unet.register_forward_pre_hook(lambda m, args: rows.append(len(args[0]))),
        stage.unet.mid_block.register_forward_pre_hook(lambda m, args: full.append(len(rows))),
    )
    size = {"frames": 2, "height": 4, "width": 6, "guidance": 2.0, "seed": 1}
    clip = stage(text, steps=6, guidance_interval=[400, 700], reuse=2, **size)
    for handle in handles:
        handle.remove()
    assert rows == [1, 1, 2, 2, 1, 1]  # timesteps about 990, 825, 660, 495, 330, 165
    assert full == [1, 3, 5]
    assert not torch.equal(clip, stage(text, steps=6, **size))


@pytest.mark.parametrize("table", ["interpolation", "first_frame", "pixel_upscale", "latent_upscale"])
@pytest.mark.parametrize("rows", [None, 1])
def test_measures_reach_every_stage(pipeline, tiny_cascade, table, rows, monkeypatch):
    stages = {"first_frame": pipeline.pixel_upscale}
    stage = stages.get(table) or getattr(pipeline, table)
    unet = pipeline.pixel_upscale.first_frame_unet if table == "first_frame" else stage.unet
    reuse = [] if table == "first_frame" else [f"{table}.reuse=2"]
    cascade = pipeline.cascade.override([f"{table}.steps=6", f"{table}.guidance_interval=[400, 700]", *reuse])
    monkeypatch.setattr(stage, "rows", rows)
    calls, full = [], []
    handles = (
        unet.register_forward_pre_hook(lambda m, args, kwargs: calls.append(len(args[0])), with_kwargs=True),
        unet.mid_block.register_forward_pre_hook(lambda m, args: full.append(len(calls))),
    )
    steps = 0
    for event in pipeline.with_cascade(cascade).stream(tiny.PROMPT, seed=1):
        steps += isinstance(event, StepDone) and event.stage == table
        if isinstance(event, Clip) and event.stage == table:
            break
    for handle in handles:
        handle.remove()
    segments = 7 if table == "interpolation" else 1
    guided = sum(calls) / segments - steps
    assert 0 < guided < steps  # at some steps and not at all
    assert rows is None or set(calls) == {1}
    assert len(full) == len(calls) if table == "first_frame" else len(full) < 0.8 * len(calls)


def test_measures_are_keys_that_may_be_left_out():
    exact, fast = Cascade.load("show-1"), Cascade.load("show-1-fast")
    assert exact.stream_settings("interpolation") == {"steps": 50, "guidance": 4.0}
    measures = {"guidance_interval": [167, 881], "reuse": 2}
    assert fast.stream_settings("interpolation") == {"steps": 20, "guidance": 4.0} | measures
    assert fast.stream_settings("first_frame")["schedule"] == "smart27"
    assert Cascade.from_settings(json.loads(json.dumps(fast.settings())), fast.file).settings() == fast.settings()
    changed = exact.override(["keyframes.guidance_interval=[100, 900]", "pixel_upscale.reuse=3"])
    assert changed.keyframes.guidance_interval == [100, 900]


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("keyframes.guidance_interval=[900, 100]", "two whole numbers from 0 to 999"),
        ("keyframes.guidance_interval=[1, 2, 3]", "two whole numbers"),
        ("keyframes.guidance_interval=[0.5, 2]", "two whole numbers"),
        ("keyframes.guidance_interval=5", "two whole numbers"),
        ("pixel_upscale.reuse=1", "from 2 to 10"),
        ("first_frame.schedule=smart", "one of fast27, smart27"),
        ("first_frame.schedule=smart27", "does not have steps = 50 steps"),
        ("first_frame.reuse=2", "no key"),
    ],
)
def test_measures_out_of_range(assignment, words):
    with pytest.raises(Show1Error, match=words):
        Cascade.load("show-1").override([assignment])


def test_other_steps_leave_the_schedule_out():
    fast = Cascade.load("show-1-fast")
    other = fast.override(["first_frame.steps=30"]).first_frame
    assert (fast.first_frame.schedule, other.steps, other.schedule) == ("smart27", 30, None)
    assert fast.override(["first_frame.steps=27", "keyframes.steps=3"]).first_frame == fast.first_frame


def test_schedule_is_the_authors_list(pipeline):
    text, image = pipeline.keyframes.encode(tiny.PROMPT), torch.zeros(1, 3, 4, 6)
    seen = []
    handle = pipeline.pixel_upscale.first_frame_unet.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    stream = pipeline.pixel_upscale.stream_first_frame(
        text, image, steps=27, guidance=1.0, noise_level=150, seed=1, schedule="smart27"
    )
    assert len(list(stream)) == 27
    handle.remove()
    assert [int(t) for t in seen[:3]] == [999, 976, 952]
    assert int(seen[-1]) == 0


# --- The benchmark


def _benchmark(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks.cascade", *map(str, arguments)])
    return benchmark.main()


def test_both_ways_give_the_same_video(monkeypatch, one_step_cascade, tmp_path, capsys):
    file = tmp_path / "found.json"
    settings = ["--cascade", one_step_cascade, "--device", "cpu", "--dtype", "float64", "--warmups", 1, "--rounds", 1]
    assert _benchmark(monkeypatch, *settings, "--json", file) == 0, capsys.readouterr().err
    found = json.loads(file.read_text())
    assert found["ratio"] == found["original_seconds"] / found["seconds"] > 0
    assert list(found["stages"]) == [
        "text",
        "keyframes",
        "interpolation",
        "first_frame",
        "pixel_upscale",
        "latent_upscale",
    ]
    for stage, row in found["stages"].items():
        assert row["seconds"] > 0
        if stage != "text":
            assert row["difference"]["max"] < 1e-6, stage
            assert row["tflop"] > 0
    printed = capsys.readouterr().out
    assert "| **end to end** |" in printed and "| pixel upscale |" in printed


def test_a_fast_stage_is_not_told_to_do_the_exact_ones_work(monkeypatch, tmp_path):
    file = tmp_path / "found.json"
    stages = "text,first_frame, first_frame"  # one that is named twice is run once
    settings = ["--cascade", "mini-fast", "--device", "cpu", "--stages", stages, "--warmups", 1, "--rounds", 1]
    assert _benchmark(monkeypatch, *settings, "--json", file) == 0
    found = json.loads(file.read_text())
    row = found["stages"]["first_frame"]
    assert found["original_seconds"] == row["original_seconds"]
    assert row["original_seconds"] > 0 and "tflops" not in row and "tflop" not in row


def test_measures_one_by_one():
    variants = benchmark.measures(Cascade.load("show-1-fast"), exact := Cascade.load("show-1"))
    assert list(variants) == ["steps", "guidance_interval", "reuse", "all"]
    assert variants["reuse"].keyframes.steps == exact.keyframes.steps
    assert variants["steps"].first_frame.schedule == "smart27"
    assert variants["steps"].keyframes.reuse is variants["steps"].keyframes.guidance_interval is None


def test_a_file_is_held_against_itself_without_measures():
    fast = Cascade.load("show-1-fast")
    exact = benchmark.without_measures(fast)
    assert exact.keyframes.reuse is exact.first_frame.guidance_interval is None
    assert exact.keyframes.steps == fast.keyframes.steps and exact != fast


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cascade", "show-1", "--weights", "random", "--device", "cpu"], "take hours on a CPU"),
        (["--cascade", "show-1-fast", "--device", "cpu"], "take hours on a CPU"),  # before they are fetched
        (["--cascade", "mini", "--stages", "nothing"], "no stage 'nothing'"),
        (["--cascade", "mini", "--stages", "text"], "Give some of keyframes, interpolation"),
        (["--cascade", "mini", "--rounds", "0"], "Give --rounds"),
        (["--cascade", "mini", "--warmups", "0"], "and --warmups 1 or more"),
        (["--cascade", "mini-fast", "--measures"], "with a fast preset"),
        (["--cascade", "mini", "--measures", "--stages", "keyframes"], "Only whole videos"),
        (["--cascade", "mini", "--device", "cpu", "--memory", "lots"], "memory cannot be 'lots'"),
        (["--cascade", "mini", "--device", "cpu", "--json", "nowhere/found.json"], "nowhere"),
        (["--cascade", "mini", "--device", "cpu", "--json", "."], "Name a file"),
    ],
)
def test_bad_input(monkeypatch, capsys, arguments, words):
    assert _benchmark(monkeypatch, *arguments) == 2
    assert words in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(benchmark, "compare", None)
    assert _benchmark(monkeypatch, "--cascade", "mini", "--device", "cpu", "--plot", "mini.png") == 2
    assert "requirements-benchmarks.txt" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_says_so():
    run = subprocess.run([sys.executable, "-m", "benchmarks.memory"], capture_output=True, text=True)
    assert run.returncode == 2 and "there is none" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@torch.no_grad()
def test_kernels_are_timed_against_what_computes_the_same():
    whats = set()
    for what, ours, theirs in kernels.cases("cpu", torch.float32):
        true = theirs()
        assert (ours() - true).abs().max() < 3e-5 * true.abs().max(), what  # random; 1.3e-5 at most in 40 rounds
        whats.add(what.partition(" (")[0])
    assert whats == {"group norm and gelu", "group norm and silu", "gated GELU", "attention over frames"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_kernels_are_told_row_by_row(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "milliseconds", lambda call, device: float(len(call().shape) > 0))
    kernels._run()
    _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 * 18 and all("ours 1.000 ms, torch 1.000 ms" in row for row in rows)
    assert {row.partition("torch.")[2].partition(":")[0] for row in rows} == {"bfloat16", "float32"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_that_cannot_be_compiled(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cpu_kernels, "_function", lambda *_: cpu_kernels._compile(["false"], tmp_path / "kernels.so"))
    assert exit_code(kernels._run) == 2
    assert "false cannot compile them: it does not say why.\nOn a CPU, name a C++ compiler" in capsys.readouterr().err


def _interrupted():
    raise KeyboardInterrupt


def _out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory.")


def _way(run) -> SimpleNamespace:
    """A way of working whose stages are that function."""
    pipeline = SimpleNamespace(cascade=Cascade.load("mini"), keyframes=SimpleNamespace(dtype=torch.float32))
    return SimpleNamespace(pipeline=pipeline, run=run, flops=SimpleNamespace(total=0))


def test_our_models_do_not_count_for_the_originals_peak_memory(monkeypatch):
    """The allocator as it would be on a GPU: 24 GB of our models, and six more while a stage works."""
    monkeypatch.setattr(benchmark, "wait_for", lambda device: None)
    for name, size in (("memory_allocated", 24e9), ("max_memory_allocated", 30e9), ("max_memory_reserved", 33e9)):
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)

    class Clock(benchmark.Clock):
        def __call__(self, work, **how):
            self.device = torch.device("cuda")
            return super().__call__(work, **how)

    way = _way(lambda stage, clips: torch.zeros(2))
    found, _ = benchmark.compare(way, way, Clock(torch.device("cpu")), ["text", "keyframes"], rounds=1, warmups=1)
    row = found["stages"]["keyframes"]
    assert (row["original_peak_gb"], row["peak_gb"], row["peak_reserved_gb"]) == (6.0, 30.0, 33.0)


def test_an_interrupted_benchmark_keeps_its_finished_rounds():
    rounds = [{"original": {"keyframes": {"seconds": 4.0}}, "ours": {"keyframes": {"seconds": 2.0}}}] * 3
    cold = {"original": {}, "ours": {"keyframes": {"seconds": 7.0}}}
    found = benchmark.summary(rounds, [cold, rounds[0]], ["keyframes"], {"keyframes": 6.0}, {})
    assert (found["ratio"], found["rounds"], found["stages"]["keyframes"]["tflops"]) == (2.0, 3, 3.0)
    assert found["cold_start_seconds"] == 5.0
    with pytest.raises(Show1Error, match="No stage"):
        benchmark.summary([], [], ["keyframes"], {}, {})


@pytest.mark.parametrize(
    ("calls", "kept"),
    [
        (3, None),  # while it warms up
        (5, None),  # in the first stage that counts
        (7, (["text", "keyframes"], 1)),
        (10, (["text", "keyframes", "interpolation"], 1)),  # in the second round
    ],
)
@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGTERM), _interrupted, _out_of_memory])
def test_a_benchmark_broken_off_in_its_first_round_keeps_its_finished_stages(end, calls, kept):
    runs = iter(range(calls))

    def run(stage: str, clips: dict) -> torch.Tensor:
        if stage != "text" and next(runs, None) is None:
            end()
        return torch.zeros(2)

    clock, stages = benchmark.Clock(torch.device("cpu")), ["text", "keyframes", "interpolation"]
    if kept is None:
        with pytest.raises(Show1Error, match="No stage"):
            benchmark.compare(_way(run), _way(run), clock, stages, rounds=2, warmups=1)
    else:
        found, finished = benchmark.compare(_way(run), _way(run), clock, stages, rounds=2, warmups=1)
        assert ([*found["stages"]], found["rounds"], finished) == (*kept, False)
        assert found["ratio"] > 0


def test_an_interrupted_benchmark_keeps_its_finished_measures(monkeypatch):
    made = iter([torch.zeros(2)] * 6 + [torch.ones(2)])  # five in few steps, which warm up, and two that count

    def whole_video(ours):
        clip = next(made, None)
        if clip is None:
            raise KeyboardInterrupt
        return clip

    monkeypatch.setattr(benchmark, "whole_video", whole_video)
    fast, exact = Cascade.load("show-1-fast"), Cascade.load("show-1")
    ours, clock = SimpleNamespace(pipeline=SimpleNamespace(cascade=exact)), benchmark.Clock(torch.device("cpu"))
    rows = benchmark.measure_by_measure(fast, ours, clock, rounds=1)
    assert list(rows) == ["exact", "steps"]
    assert rows["exact"]["speed"] == 1 and round(rows["steps"]["psnr_db"], 1) == 6.0  # half of the range off


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupted_memory_benchmark_keeps_its_finished_tiers(monkeypatch, capsys, finished):
    """As if there were a GPU, whose memory is full at the next tier."""
    row = {"peak_allocated_gb": 1.0, "peak_reserved_gb": 2.0}
    made = iter([(row | {"stages": {"text": row}}, torch.zeros(2, 3, 1, 2, 2))] * finished)
    monkeypatch.setattr(memory, "check_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(memory, "measure", lambda *_: next(made, None) or _out_of_memory())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(sys, "argv", ["benchmarks.memory"])
    assert memory.main() == (0 if finished else 2)
    printed = capsys.readouterr()
    assert "The memory is full; what follows is of the finished tiers." in printed.err
    assert ("| all on the GPU, two prompts at once | 60 | 1.00 | 2.00 |" in printed.out) == bool(finished)


def _page(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks.page", *arguments])
    return page.main()


def test_the_pages_benchmark_of_what_is_none(monkeypatch, capsys):
    assert _page(monkeypatch, "--cascade", "nothing") == 2 and "nothing" in capsys.readouterr().err
    assert _page(monkeypatch, "--json", ".") == 2 and "Name a file" in capsys.readouterr().err


@pytest.mark.parametrize("videos", [0, 1])
def test_the_pages_benchmark_keeps_its_finished_figures(monkeypatch, capsys, tmp_path, videos):
    file, made = tmp_path / "page.json", iter([[0.1, None, -0.2]] * videos)
    monkeypatch.setattr(page, "sync_playwright", mock.MagicMock())
    monkeypatch.setattr(page, "serve", mock.MagicMock())
    monkeypatch.setattr(page, "until_usable", lambda browser, url: 1.5)
    monkeypatch.setattr(page, "time_left", lambda url: next(made, None) or _interrupted())
    assert _page(monkeypatch, "--json", str(file)) == 0
    printed = capsys.readouterr()
    assert "what follows is of the finished figures" in printed.err
    assert "usable after the server answers: 1.50 s" in printed.out and "by the page" not in printed.out
    assert ("run 1: +10 %, none, -20 %" in printed.out) == bool(videos)
    found = json.loads(file.read_text())
    assert found["usable_seconds"] == 1.5 and len(found.get("time_left", ())) == videos


@pytest.mark.parametrize("name", ["show-1", "show-1-fast", "mini", "mini-fast"])
def test_warming_up_takes_few_steps(name):
    short = benchmark.in_few_steps(Cascade.load(name))
    assert short.keyframes.steps == 6 and short.pixel_upscale.steps <= 6
    assert int(short.latent_upscale.steps * short.latent_upscale.strength) >= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_random_weights_are_as_large_as_the_released_ones_when_loaded(dtype):
    pipeline = load(Cascade.load("show-1-fast"), torch.device("meta"), dtype, random=True)
    stages = (pipeline.keyframes, pipeline.interpolation, pipeline.pixel_upscale, pipeline.latent_upscale)
    models = [model for stage in stages for model in stage.components.values() if isinstance(model, torch.nn.Module)]
    size = sum(parameter.nbytes for model in models for parameter in model.parameters())
    assert round(size / 1e9, 1) == (26.2 if dtype == torch.float16 else 34.4)  # text encoders in float32
    assert dtype == torch.bfloat16 or size <= placement.SHOW_1  # or its tiers would not take it
    t5, unet = pipeline.keyframes.text_encoder, pipeline.keyframes.unet
    assert t5.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == unet.conv_out.weight.dtype == torch.float32
    assert unet.dtype == unet.conv_in.weight.dtype == dtype
    assert t5.shared.weight.dtype == (torch.float16 if dtype == torch.float16 else torch.float32)


def test_a_tier_is_measured_with_as_many_prompts_as_it_takes(monkeypatch, one_step_cascade):
    class Clock(benchmark.Clock):
        def __call__(self, work):
            return work(), {"peak_allocated_gb": 1.0, "peak_reserved_gb": 2.0}

    cascade = Cascade.load(one_step_cascade)
    monkeypatch.setattr(memory, "Clock", Clock)
    tier = replace(placement.IN_PLACE, prompts=3)
    row, videos = memory.measure(cascade, tier, torch.device("cpu"), random=False)
    assert videos.shape == (3, 3, 9, 14, 18) and row["peak_reserved_gb"] == 2
    assert (videos - videos[:1]).abs().max() < 1e-4


def test_precision_is_told_video_by_video(tiny_cascade, tmp_path, monkeypatch, capsys):
    file = tmp_path / "found.json"
    flags = ["--cascade", str(tiny_cascade), "--device", "cpu", "--videos", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.precision", *flags])
    assert precision.main() == 0
    assert "a cat, seed 0: " in (printed := capsys.readouterr().out) and "bfloat16 against float32: " in printed
    rows = json.loads(file.read_text())["videos"]
    assert [row["seed"] for row in rows] == [0, 1] and all(5 < row["psnr_db"] < 100 for row in rows)
