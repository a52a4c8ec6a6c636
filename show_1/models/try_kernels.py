"""Kernels of our own where they can run; where one fails, PyTorch's own do the work from then on."""

import importlib
import logging

import torch

log = logging.getLogger("show-1")

# By device, what our kernels there compute, and of which types.
GPU = ({"group_norm", "add", "frame_conv", "gated_gelu", "short_attention"}, {"float16", "bfloat16", "float32"})
CPU = ({"group_norm", "gated_gelu", "short_attention"}, {"bfloat16", "float32"})
KERNELS = {"cuda": ("gpu_kernels", *GPU), "cpu": ("cpu_kernels", *CPU)}

failed = set()  # devices: where one call's kernels cannot be compiled, the others' cannot either


def suit(name: str, x: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether there is such a kernel for `x`, and for a result in that type; they know no gradients."""
    device = x.device.type
    if device in failed or device not in KERNELS or torch.is_grad_enabled():
        return False
    _, names, dtypes = KERNELS[device]
    return name in names and {str(each).removeprefix("torch.") for each in (x.dtype, dtype or x.dtype)} <= dtypes


def attempt(name: str, x: torch.Tensor, *rest) -> torch.Tensor | None:
    """Return what that kernel makes of `x` and the rest; None where it fails, and the log says so once."""
    device = x.device.type
    try:
        module = importlib.import_module(f"show_1.models.{KERNELS[device][0]}")
        return getattr(module, name)(x, *rest)
    except Exception as error:  # whatever the compilers, the driver and what calls them raise
        failed.add(device)
        log.warning("Goes on without kernels of its own, slower: %s", str(error).partition("\n")[0])
        return None
