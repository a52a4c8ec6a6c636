"""Our group norm with a GELU against PyTorch's, in channels last, on a GPU: `python -m benchmarks.norm`.

In shapes of Show-1's models. That the numbers are the same is what the tests are for.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from show_1 import Show1Error
from show_1.errors import exit_code

SHAPES = [(29, 128, 160, 256), (16, 256, 160, 256), (29, 256, 80, 128), (29, 512, 40, 64), (29, 768, 20, 32)]
SHAPES += [(16, 320, 40, 72), (128, 1280, 8, 10), (2, 128, 8, 160 * 256), (1, 2560, 8, 60)]


def milliseconds(call: Callable[[], torch.Tensor]) -> float:
    """Return how long a call takes the GPU, without Python's part in it: the mean of twenty in a CUDA graph."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            call()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(4):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 20


@torch.no_grad()
def _run() -> None:
    if not torch.cuda.is_available():
        raise Show1Error("The kernels are for a GPU, and there is none.", "Run this where one is.")
    from show_1.models import kernels  # which needs Triton

    print(torch.cuda.get_device_name(), torch.__version__)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for shape in SHAPES:
            x = torch.randn(shape[0], *shape[2:], shape[1], device="cuda", dtype=dtype).movedim(-1, 1)
            weight, bias = torch.randn(2, shape[1], device="cuda", dtype=dtype)
            ours = milliseconds(lambda: kernels.group_norm(x, 32, weight, bias, 1e-5, "gelu"))  # noqa: B023
            theirs = milliseconds(lambda: F.gelu(F.group_norm(x, 32, weight, bias, 1e-5)))  # noqa: B023
            print(f"{shape} {dtype}: ours {ours:.3f} ms, torch {theirs:.3f} ms, {theirs / ours:.1f} times as fast")


if __name__ == "__main__":
    sys.exit(exit_code(_run))
