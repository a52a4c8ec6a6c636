"""`kernels` where they can run; where one fails, PyTorch's own do the work from then on."""

import logging

import torch

log = logging.getLogger("show-1")

failed = False  # for all: where one call's kernels cannot be compiled, the others' cannot either


def suit(x: torch.Tensor) -> bool:
    """Return whether kernels can compute something of `x`: they know CUDA, and no gradients."""
    if failed or x.device.type != "cuda" or torch.is_grad_enabled():
        return False
    return x.dtype in (torch.float16, torch.bfloat16, torch.float32)


def attempt(name: str, *args) -> torch.Tensor | None:
    """Return what that function of `kernels` makes of the arguments; None where it fails, and the log says so once."""
    global failed
    try:
        from show_1.models import kernels

        return getattr(kernels, name)(*args)
    except Exception as error:  # whatever Triton, the compiler that it calls and the driver raise
        failed = True
        log.warning("Goes on without kernels of its own, slower: %s", str(error).partition("\n")[0])
        return None
