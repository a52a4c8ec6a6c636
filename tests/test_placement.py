"""What sits where: the tier that the memory asks for, and the same frames from every tier."""

import contextlib
import logging
import platform
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from show_1 import Cascade, Show1Error, Show1Pipeline, graphs, hub, loading, placement, video
from show_1.errors import telling_full_memory
from show_1.placement import GB, IN_PLACE, SHOW_1, TIERS
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exact(one_step_cascade) -> torch.Tensor:
    return Show1Pipeline.from_cascade(one_step_cascade, "cpu", torch.float64)(tiny.PROMPT, seed=tiny.SEED).tensors[
        "video"
    ]


@pytest.mark.parametrize("tier", TIERS, ids=[f"{tier.memory} GB" for tier in TIERS])
def test_every_tier_gives_the_same_frames(one_step_cascade, exact, tier):
    """The hooks run as on a GPU, only that the device they move models to is the CPU."""
    pipeline = Show1Pipeline.from_cascade(one_step_cascade, "cpu", torch.float64)
    placement.place(pipeline, tier, CPU)
    result = pipeline(tiny.PROMPT, seed=tiny.SEED)
    assert (result.tensors["video"] - exact).abs().max() < 1e-6
    assert result.settings["device"] == "cpu"
    moved = [hook.model for hook in pipeline.offload_hooks]
    assert (pipeline.keyframes.unet in moved) == tier.one_at_a_time
    assert pipeline.keyframes.text_encoder not in moved


@pytest.mark.parametrize(
    ("free", "memory"), [(79, 60), (40, 40), (24, 16), (15.7, 16), (11.6, 12), (8, 8), (7.6, 8), (5.8, 6), (5, None)]
)
def test_cards_by_their_free_memory(monkeypatch, free, memory):
    monkeypatch.setattr(placement, "device_memory", lambda device: (int(free * GB), int(free * GB)))
    cascade = Cascade.load("show-1")
    if memory is None:
        with pytest.raises(
            Show1Error, match=r"Show-1 needs 5\.3 GB of free memory on cuda at the least; there are 5\.0"
        ):
            placement.choose(cascade, torch.device("cuda"), SHOW_1)
    else:
        assert placement.choose(cascade, torch.device("cuda"), SHOW_1).memory == memory


def test_a_size_given_stands_for_a_card(monkeypatch):
    monkeypatch.setattr(placement, "device_memory", lambda device: (80 * GB, 80 * GB))
    cascade, cuda = Cascade.load("show-1"), torch.device("cuda")
    for tier in TIERS:
        assert placement.choose(cascade, cuda, SHOW_1, f"{tier.memory}GB") == tier
    for memory in ("12", "much", "0GB", "-3GB", "1e9GB"):
        with pytest.raises(Show1Error, match="memory cannot be"):
            placement.choose(cascade, cuda, SHOW_1, memory)
    with pytest.raises(Show1Error, match=r"'90GB': the device has 80\.0 GB"):
        placement.choose(cascade, cuda, SHOW_1, "90GB")
    with pytest.raises(
        Show1Error, match=r"does not run with --memory 5\.3GB on cuda\. Give at least (.*GB),"
    ) as refused:
        placement.choose(cascade, cuda, SHOW_1, "5.3GB")
    least = re.search(r"at least (.*GB)", str(refused.value))[1]
    assert placement.choose(cascade, cuda, SHOW_1, least) == TIERS[-1]


def test_weights_count_as_they_are_loaded(tiny_cascade):
    """And not in the type of their files, and in half precision not all of them."""
    cascade = Cascade.load(tiny_cascade)
    folders = hub.fetch(cascade)
    for dtype in (torch.float16, torch.bfloat16):
        stages = loading.load_stages(cascade, folders, dtype)
        models = [each for stage in stages for each in stage.components.values() if isinstance(each, torch.nn.Module)]
        loaded = sum(weight.nbytes for model in models for weight in model.parameters())
        assert placement.weight_bytes(cascade, folders, dtype) == loaded
        # Not half: some of T5 and the UNets' last layers stay in float32.
        assert loaded < placement.weight_bytes(cascade, folders, torch.float32) < 2 * loaded


def test_t5s_embedding_counts_once_whatever_its_names(tiny_cascade, tmp_path):
    cascade = Cascade.load(tiny_cascade)
    folders = hub.fetch(cascade)
    shutil.copytree(folders["keyframes"], tmp_path / "copied")
    for file in (tmp_path / "copied" / "text_encoder").glob("*.bin"):
        weights = torch.load(file)
        if "shared.weight" in weights:
            torch.save(weights | {"encoder.embed_tokens.weight": weights["shared.weight"]}, file)
    sizes = [
        placement.weight_bytes(cascade, each, torch.float16)
        for each in (folders, folders | {"keyframes": tmp_path / "copied"})
    ]
    assert sizes[0] == sizes[1]


def test_numbers_in_files_of_all_kinds(tmp_path):
    """In safetensors, in pickles, and in pickles of before PyTorch 1.6, as far as their size tells."""
    numbers = {"a": torch.zeros(3, 1000), "b": torch.zeros(5)}
    for dtype in (torch.float16, torch.float32):
        weights = {name: tensor.to(dtype) for name, tensor in numbers.items()}
        save_file(weights, tmp_path / "weights.safetensors")
        torch.save(weights, tmp_path / "weights.bin")
        for name in ("weights.safetensors", "weights.bin"):
            assert placement._numbers_in(tmp_path / name) == {"a": 3000, "b": 5}
    torch.save({"a": numbers["a"].half()}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert 3000 <= sum(placement._numbers_in(tmp_path / "old.bin").values()) < 3500


def test_mini_fits_anywhere_and_show_1_not_in_a_small_computer(monkeypatch):
    mini = Cascade.load("mini")
    weights = placement.weight_bytes(mini, hub.fetch(mini), torch.float32)
    assert 60e6 < weights < 90e6
    assert 0 < 2 * placement.weight_bytes(mini, hub.fetch(mini), torch.bfloat16) - weights < 4e6  # text in float32
    assert placement.choose(mini, CPU, weights, "500MB") == IN_PLACE
    monkeypatch.setattr(placement, "device_memory", lambda device: (16 * GB, 16 * GB))
    with pytest.raises(Show1Error, match=r"needs 31\.7 GB"):
        placement.choose(Cascade.load("show-1"), torch.device("mps"), SHOW_1)


def test_the_computers_own_memory_has_to_hold_what_goes_to_a_gpu(monkeypatch):
    show_1 = Cascade.load("show-1")
    for free, enough in ((12 * GB, False), (30 * GB, True)):
        monkeypatch.setattr(placement.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        monkeypatch.setattr(placement.psutil, "swap_memory", lambda: SimpleNamespace(free=0))
        with contextlib.nullcontext() if enough else pytest.raises(Show1Error, match="own memory has 12"):
            placement.check_loading(show_1, torch.device("cuda"), SHOW_1)


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "the GPU"),
        (RuntimeError("CUDA error: out of memory"), "the GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the GPU"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "this computer"),
        (MemoryError(), "this computer"),
    ],
)
def test_full_memory_is_told(error, place):
    full = f"^Making it failed: the memory of {place} is full"
    with pytest.raises(Show1Error, match=full), telling_full_memory("Making it"):
        raise error
    with pytest.raises(RuntimeError, match="kernel"), telling_full_memory("Making it"):
        raise RuntimeError("a kernel died")


# --- CUDA graphs, without CUDA


class _Twice(torch.nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls, self.factor = calls, torch.nn.Parameter(torch.full((), 2.0), requires_grad=False)

    def forward(self, x, *, deep=None):
        self.calls.append(x.shape)
        return {"sample": x * self.factor if deep is None else x * self.factor + deep}


def _record(forward, inputs):
    """Record as on a GPU: what is replayed reads the inputs and the weights where they were then."""
    held = graphs._copy(inputs)
    output, factor = forward(*held[0], **held[1]), forward.__self__.factor.data
    return graphs.Recording(held, output, lambda: output["sample"].copy_(held[0][0] * factor))


@torch.no_grad()
def test_graphs_replay_from_the_third_call_of_a_kind(monkeypatch):
    monkeypatch.setattr(graphs, "record", _record)
    calls = []
    graphed = graphs.Graphed(_Twice(calls))
    outputs = [graphed(torch.full((2,), float(n)))["sample"] for n in range(5)]
    assert len(calls) == 2  # once as ever, once recorded
    assert [output[0].item() for output in outputs] == [0, 2, 4, 6, 8]  # none was written over
    graphed(torch.ones(3))
    graphed(torch.ones(2), deep=torch.ones(2))
    assert len(calls) == 4
    with torch.enable_grad():  # which a replay would leave out
        graphed(torch.ones(2))
    assert len(calls) == 5


@torch.no_grad()
def test_weights_that_have_moved_are_recorded_anew(monkeypatch):
    monkeypatch.setattr(graphs, "record", _record)
    calls = []
    module = _Twice(calls)
    graphed = graphs.Graphed(module)
    for _ in range(3):
        assert graphed(torch.ones(2))["sample"][0] == 2
    module.factor.data = torch.full((), 5.0)
    assert [graphed(torch.full((2,), float(n)))["sample"][0].item() for n in range(4)] == [0, 5, 10, 15]
    assert len(calls) == 4


@torch.no_grad()
def test_a_call_without_room_to_be_recorded_makes_room(monkeypatch):
    """The large one goes on as ever; the small one, whose memory it may have wanted, is recorded once more."""

    def record(forward, inputs):
        recorded.append(len(inputs[0][0]))
        if len(inputs[0][0]) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return _record(forward, inputs)

    monkeypatch.setattr(graphs, "record", record)
    calls, recorded = [], []
    small, large = graphs.Graphed(_Twice(calls)), graphs.Graphed(_Twice(calls))
    for n in range(4):
        assert small(torch.full((2,), float(n)))["sample"][0] == 2 * n
        assert large(torch.full((9,), float(n)))["sample"][0] == 2 * n
    assert not graphs.Graphed.failed and recorded == [2, 9, 2]


@torch.no_grad()
def test_where_graphs_fail_it_goes_on_and_says_so_once(monkeypatch, caplog):
    def record(forward, inputs):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs.Graphed, "failed", False)
    calls = []
    modules = [graphs.Graphed(_Twice(calls)) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for n in range(4):
            for graphed in modules:
                assert graphed(torch.full((2,), float(n)))["sample"][0] == 2 * n
    assert [r.message for r in caplog.records] == [
        "Goes on without CUDA graphs, slower: CUDA error: operation not permitted when stream is capturing"
    ]
    assert len(calls) == 8 and not any(graphed.recordings for graphed in modules)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="Another C library is left as it is.")
def test_freed_memory_is_kept_for_the_next_tensors_in_threads_too_and_while_a_video_is_read(tmp_path):
    video.write(tmp_path / "video.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps=8, metadata={})
    script = """
import resource, sys, torch
from concurrent.futures import ThreadPoolExecutor
from show_1 import placement, video

def pages_anew():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(pages_anew())
placement.keep_freed_memory()
with ThreadPoolExecutor(1) as thread:
    for _ in range(4):  # until the heap is as large as it gets
        thread.submit(pages_anew).result()
    print(thread.submit(pages_anew).result())
    video.read_frames(sys.argv[1])
    print(thread.submit(pages_anew).result())
"""
    command = [sys.executable, "-c", script, str(tmp_path / "video.mp4")]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    before, after, after_reading = map(int, made.stdout.split())
    # Before: 81,920, five times 64 MiB in pages of 4 KiB; that is as large as a heap of a thread's own.
    assert after < before / 20 and after_reading < before / 20
