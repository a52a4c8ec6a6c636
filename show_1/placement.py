"""What sits where: how a cascade's models share the memory of a device, chosen by how much of it is free.

Every tier gives the same frames, to rounding: what does not fit waits in the computer's memory (accelerate's and
diffusers' hooks move it), and what is computed at once is computed in parts.
"""

import ctypes
import gc
import math
import platform
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from safetensors import safe_open

from show_1 import hub
from show_1.cascade import STAGES, Cascade
from show_1.errors import Show1Error
from show_1.graphs import Graphed

if TYPE_CHECKING:
    from show_1.pipeline import Show1Pipeline

GB = 10**9
UNITS = {"MB": 10**6, "GB": GB, "MIB": 2**20, "GIB": 2**30}
SHOW_1 = 26_200_000_000  # bytes of Show-1's weights as float16 loads them: what the tiers' figures are for
CARD = 0.88  # the share of a card's nominal memory that is free when nothing else runs on it
# What the libraries load in float32 at the least, in our UNets and in T5; the first frame's UNet is diffusers' own.
IN_FLOAT32 = {"unet": {"conv_norm_out", "conv_out"}, "text_encoder": {"wo"}}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


@dataclass(frozen=True)
class Tier:
    """One way to share a device's memory.

    `memory` is the nominal memory in GB of the smallest card that runs Show-1 this way. `text_by_layer`: of T5, only
    the layer at work is on the device. `one_at_a_time`: the UNets are there only while they work. `unets_by_block`: of
    a UNet, its middle and the down or up block at work. `prompts`: how many run as one batch. `rows` and `vae_frames`
    are as in the stages; where UNets come by blocks, `rows` is the latent upscale's alone, as each row brings all
    blocks once more.
    """

    name: str
    memory: float
    text_by_layer: bool = False
    one_at_a_time: bool = False
    unets_by_block: bool = False
    prompts: int = 1
    rows: int | None = None
    vae_frames: int = 1

    def needs(self, weights: int) -> int:
        """Return the bytes that must be free for a cascade of so many bytes of weights."""
        # In proportion to Show-1, since what is computed grows with the models.
        return int(self.memory * GB * CARD * weights / SHOW_1)


# Of a GPU with memory of its own, the fastest first. In GB, Show-1 in float16 is 26.2, of that T5 11.5, the largest
# UNet 3.5, CLIP and the VAE, which always stay, 0.9. Peaks, by `python -m benchmarks.memory` on an H200, were 36 with
# all on the GPU, one prompt and all of T5 in float16, which is 9.5, then 8.5 (12 GB) and 6.5 (8 GB); the others' are
# not measured. T5 as one model that comes and goes, which 16 GB would hold, took 7 seconds a video more than by layer.
TIERS = (
    Tier("all on the GPU, two prompts at once", 60, prompts=2, vae_frames=8),
    Tier("all on the GPU", 40, vae_frames=8),
    Tier("one UNet at a time, T5 by layer", 16, text_by_layer=True, one_at_a_time=True, vae_frames=4),
    Tier("one UNet at a time, few frames of the VAE", 12, text_by_layer=True, one_at_a_time=True, vae_frames=2),
    Tier("one UNet at a time, single rows", 8, text_by_layer=True, one_at_a_time=True, rows=1),
    Tier("streamed", 6, text_by_layer=True, unets_by_block=True, rows=1),
)
# Held where modules are given parameters: while diffusers and transformers load, they change for the whole process how
# that is done, so that what another thread builds meanwhile would be left without numbers.
BUILDING = threading.RLock()
# Where the device computes in the computer's own memory (CPU, Apple), to move a model out would free nothing.
IN_PLACE = Tier("in place", 36, prompts=2)


def choose(cascade: Cascade, device: torch.device, weights: int, memory: str | None = None) -> Tier:
    """Return the tier that suits the free memory of the device, or `memory` ("12GB") instead.

    `weights` is the size of the models in bytes, as they will be on the device. Raises Show1Error if no tier fits, and
    for a `memory` that is nonsense or more than there is.
    """
    free, total = device_memory(device)
    if memory is not None:
        free = int(parse_memory(memory, total) * CARD)
    tiers = (IN_PLACE,) if device.type in ("cpu", "mps") else TIERS
    for tier in tiers:
        if tier.needs(weights) <= free:
            return tier
    if memory is not None:
        least = math.ceil(tiers[-1].needs(weights) / CARD / 10**8) / 10
        raise Show1Error(
            f"{cascade.name} does not run with --memory {memory} on {device.type}.",
            f"Give at least {least} GB, leave it out, or take the cascade mini.",
        )
    raise Show1Error(
        f"{cascade.name} needs {hub.gigabytes(tiers[-1].needs(weights))} of free memory on {device.type} at the least; "
        f"there are {hub.gigabytes(free)}.",
        "Close other programs, choose another device, or take the cascade mini.",
    )


def check_loading(cascade: Cascade, device: torch.device, weights: int) -> None:
    """Raise Show1Error where the computer's own memory does not hold the models, which go to a GPU from there."""
    memory = psutil.virtual_memory().available + psutil.swap_memory().free
    if device.type not in ("cpu", "mps") and memory < weights:
        raise Show1Error(
            f"The computer's own memory has {hub.gigabytes(memory)} free, and {cascade.name} needs "
            f"{hub.gigabytes(weights)} of it.",
            "Close other programs, take a computer with more, or the cascade mini.",
        )


def place(pipeline: "Show1Pipeline", tier: Tier, device: torch.device) -> None:
    """Put the models where the tier wants them; the pipeline gets the hooks of those that come and go.

    On a CPU this process's memory is kept from then on, see `keep_freed_memory`.
    """
    from accelerate import cpu_offload_with_hook  # these take seconds, which the doctor does not have
    from diffusers.hooks import apply_group_offloading

    from show_1.models import channels_last, sum_in_float32

    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # as the hooks will see it
    if device.type == "cpu":
        keep_freed_memory()
    stages = (pipeline.keyframes, pipeline.interpolation, pipeline.pixel_upscale, pipeline.latent_upscale)
    for stage in stages:
        stage.rows = tier.rows if stage is pipeline.latent_upscale or not tier.unets_by_block else None
    pipeline.latent_upscale.vae_frames = tier.vae_frames

    text_encoder = pipeline.keyframes.text_encoder
    unets = [pipeline.keyframes.unet, pipeline.interpolation.unet]  # in the order in which they work
    unets += [pipeline.pixel_upscale.first_frame_unet, pipeline.pixel_upscale.unet, pipeline.latent_upscale.unet]
    if device.type != "mps":  # whose kernels know one layout
        with BUILDING:
            for model in (*unets, pipeline.latent_upscale.vae):
                channels_last(model)
        sum_in_float32(pipeline.keyframes.unet)
    coming_and_going = unets if tier.one_at_a_time else []
    where = {"onload_device": device, "offload_device": torch.device("cpu")}
    streamed = []
    if tier.text_by_layer:
        # One module under both its names: the hooks warn of layers that never run.
        text_encoder.shared = text_encoder.encoder.embed_tokens
        stream = device.type == "cuda"  # fetches the next layer meanwhile
        apply_group_offloading(
            text_encoder,
            **where,
            offload_type="leaf_level",
            use_stream=stream,
            record_stream=stream,
            low_cpu_mem_usage=stream,  # pins what is on its way, not a second copy of everything
        )
        streamed.append(text_encoder)
    if tier.unets_by_block:
        for unet in unets:
            # No leaves: the temporal convolutions read their weights themselves. No stream: it would fetch the blocks
            # in the order of the first call, and calls with reused features leave some out.
            apply_group_offloading(unet, **where, offload_type="block_level", num_blocks_per_group=1)
        streamed += unets
    hooks = []
    for model in coming_and_going:
        hooks.append(cpu_offload_with_hook(model, device, hooks[-1] if hooks else None)[1])
    elsewhere = {id(model) for model in (*coming_and_going, *streamed)}
    for stage in stages:
        for model in stage.components.values():
            if isinstance(model, torch.nn.Module) and id(model) not in elsewhere:
                model.to(device)
    if device.type == "cuda" and not elsewhere:  # a graph knows its weights by their addresses: they must stay
        for unet in unets:
            unet.forward = Graphed(unet)
    pipeline.offload_hooks, pipeline.prompts_at_once = hooks, tier.prompts


def keep_freed_memory() -> None:
    """Have this process keep the memory of freed tensors for those that come next, where its C library is glibc.

    glibc gives large pieces back to the system at once, which has to clear every page of the next one: a twentieth of
    mini's processor time (measured). More than 1 GiB that is free at the heap's end still goes back. Threads that begin
    later share the main thread's heap: one of their own is given back in pieces of 64 MiB, whatever the threshold.
    """
    if platform.libc_ver()[0] == "glibc":
        malloc = ctypes.CDLL(None)
        malloc.mallopt(M_MMAP_THRESHOLD, 2**30)
        malloc.mallopt(M_TRIM_THRESHOLD, 2**30)
        malloc.mallopt(M_ARENA_MAX, 1)


def dtype_of(component: str, dtype: torch.dtype) -> torch.dtype:
    """Return what a component computes in where the cascade's models are of a dtype.

    All stages read the text: of what bfloat16 changed in mini's keyframes of a prompt, two thirds came from the text
    encoder (they were 42.6 dB from float32's, and 48.1 with the encoder in float32).
    """
    return torch.float32 if component == "text_encoder" and dtype == torch.bfloat16 else dtype


def weight_bytes(cascade: Cascade, folders: Mapping[str, Path], dtype: torch.dtype) -> int:
    """Return the bytes of the cascade's weights as they are loaded in a dtype, whatever their files are in."""
    size = 0
    for table in STAGES:
        folder = folders[table]
        for component in set(hub.COMPONENTS[table]) & set(hub.MODELS):
            numbers: dict[str, int] = {}
            for name in hub.weights_in(folder, table, component, hub.variant(cascade, table)).names:
                numbers |= _numbers_in(folder / component / name)
            if "shared.weight" in numbers:
                numbers.pop("encoder.embed_tokens.weight", None)  # T5's same embedding by another name
            kept = set() if table == "first_frame" else IN_FLOAT32.get(component, set())
            itemsize = dtype_of(component, dtype).itemsize
            for name, number in numbers.items():
                size += number * (max(itemsize, 4) if kept & set(name.split(".")) else itemsize)
    return size


def _numbers_in(file: Path) -> dict[str, int]:
    """Return how many numbers each weight of a file has, without reading them."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {key: math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        if file.suffix == ".bin":
            weights = torch.load(file, map_location="meta", mmap=True, weights_only=True)
            return {key: tensor.numel() for key, tensor in weights.items()}
        return {}  # an index of shards
    except Exception:  # damaged, as the loading will tell, or of before PyTorch 1.6
        return {str(file): file.stat().st_size // 2}


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the free and the total memory of a device, in bytes."""
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        return memory.available, memory.total
    gc.collect()  # pipelines that nobody has any more: their hooks know them, as they know their hooks
    torch.get_device_module(device).empty_cache()  # which else counts as used
    return torch.get_device_module(device).mem_get_info(device)


def parse_memory(memory: str, total: int) -> int:
    """Return "12GB" as bytes; raise Show1Error for nonsense and for more than the `total` that there is."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*([GM]i?B)", str(memory).strip(), re.IGNORECASE | re.ASCII)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size == 0:
        raise Show1Error(f"The memory cannot be {memory!r}.", 'Give a size like "12GB" or "800MB".')
    if size > total * 1.1:  # what is sold as 12 GB may show a little less
        raise Show1Error(
            f"The memory cannot be {memory!r}: the device has {hub.gigabytes(total)}.", "Give less, or leave it out."
        )
    return size
