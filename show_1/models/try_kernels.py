"""Kernels of our own where they can run; where one fails, PyTorch's own do the work from then on."""

import importlib
import logging

import torch

from show_1.errors import memory_is_full

log = logging.getLogger("show-1")

# By device, what our kernels there compute, and of which types.
CPU = ({"group_norm", "gated_gelu", "short_attention"}, {torch.bfloat16, torch.float32})
GPU = (CPU[0] | {"add", "frame_conv"}, CPU[1] | {torch.float16})
KERNELS = {"cuda": ("gpu_kernels", *GPU), "cpu": ("cpu_kernels", *CPU)}

failed = set()  # devices: where one call's kernels cannot be compiled, the others' cannot either


def has(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether models on that device compute with kernels of ours in that type."""
    if device.type in failed or device.type not in KERNELS:
        return False
    _, _, dtypes = KERNELS[device.type]
    return dtype in dtypes


def suit(name: str, x: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether there is such a kernel for `x`, and for a result in that type; they know no gradients."""
    if torch.is_grad_enabled() or not all(has(x.device, each) for each in (x.dtype, dtype or x.dtype)):
        return False
    _, names, _ = KERNELS[x.device.type]
    return name in names


def attempt(name: str, x: torch.Tensor, *rest) -> torch.Tensor | None:
    """Return what that kernel makes of `x` and the rest; None where it fails, and the log says so once.

    That a memory is full is raised.
    """
    device = x.device.type
    try:
        module = importlib.import_module(f"show_1.models.{KERNELS[device][0]}")
        with torch.cuda.device_of(x):  # Triton's start on the current GPU, wherever their tensors are
            return getattr(module, name)(x, *rest)
    except Exception as error:  # whatever the compilers, the driver and what calls them raise
        if memory_is_full(error):
            raise  # a moment's want of memory says nothing of the kernels, and what follows would want more
        failed.add(device)
        log.warning("Goes on without kernels of its own, slower: %s", str(error).partition("\n")[0])
        return None
