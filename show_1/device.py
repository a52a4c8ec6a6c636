"""What computes: the device, and the dtype and cascade that suit it."""

from pathlib import Path

import torch

from show_1 import placement
from show_1.cascade import Cascade
from show_1.errors import Show1Error, first_line, telling_full_memory


def default_cascade(device: torch.device) -> str:
    """Return the bundled cascade that suits a device."""
    return "show-1" if device.type == "cuda" else "mini"


def load_cascade(name_or_file: str | Path | None, device: torch.device) -> Cascade:
    """Return a cascade, by default the bundled one that suits the device; raise Show1Error as `Cascade.load` does."""
    return Cascade.load(default_cascade(device) if name_or_file is None else name_or_file)


def default_dtype(device: torch.device) -> torch.dtype:
    """Return float16 for a CUDA device, bfloat16 for a CPU that multiplies in it (AMX, AVX-512), else float32."""
    if device.type == "cuda":
        return torch.float16
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32


def check_device(device: str | torch.device | None) -> torch.device:
    """Return the device, by default the CUDA device where there is one; raise Show1Error if it is not here."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        with telling_full_memory("Starting on the device"):
            torch.zeros(1, device=device).item()  # of the device "meta" there is nothing to read
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        raise Show1Error(
            f"There is no device {str(device)!r} here: {first_line(error)}.",
            "Leave the device out to use what there is, or say cpu.",
        ) from None
    return device


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Try what the models do in this dtype; raise Show1Error where this fails, as not every processor can."""
    if not isinstance(dtype, torch.dtype):
        raise Show1Error(f"The dtype cannot be {dtype!r}.", "Give one of torch's, as torch.float32.")
    try:
        with placement.BUILDING, telling_full_memory("Starting on the device"):
            x = torch.ones(1, 32, 4, 4, dtype=dtype, device=device)
            torch.nn.GroupNorm(4, 32, device=device, dtype=dtype)(x)
            torch.nn.Conv2d(32, 32, 3, device=device, dtype=dtype)(x)
            torch.nn.Conv3d(32, 32, (3, 1, 1), device=device, dtype=dtype)(x[:, :, :, None])
            tokens = x.flatten(2).transpose(1, 2)
            torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
            torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
            torch.nn.functional.interpolate(x[:, :, None], scale_factor=2.0, mode="trilinear", align_corners=True)
            torch.randn(4, dtype=dtype)
    except (RuntimeError, TypeError) as error:
        raise Show1Error(
            f"This {device.type} device cannot compute in {str(dtype).removeprefix('torch.')}: {first_line(error)}.",
            "Choose another dtype, as float32.",
        ) from None
