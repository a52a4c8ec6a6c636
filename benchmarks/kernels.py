"""Our kernels against PyTorch's way, in channels last, on a GPU: `python -m benchmarks.kernels`.

In shapes of Show-1's models. That the numbers are the same is what the tests are for.
"""

import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from show_1 import Show1Error
from show_1.errors import exit_code

NORMS = [(29, 128, 160, 256), (16, 256, 160, 256), (29, 256, 80, 128), (29, 512, 40, 64), (29, 768, 20, 32)]
NORMS += [(16, 320, 40, 72), (128, 1280, 8, 10), (2, 128, 8, 160 * 256), (1, 2560, 8, 60)]
SUMS = [(16, 128, 160, 256), (16, 512, 40, 64), (58, 320, 40, 72)]
CONVOLUTIONS = [(2, 128, 8, 160 * 256)]  # over frames
GATES = [(167040, 2560), (17920, 10240)]
ATTENTIONS = [(20480, 8, 512), (35840, 5, 640)]  # sequences, frames, channels; of 64 heads


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


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], torch.Tensor], Callable[[], torch.Tensor]]]:
    """Yield what is computed, our call and PyTorch's, where the models take ours in this type."""
    from show_1.models import kernels  # which needs Triton

    def filled(*shape: int) -> torch.Tensor:
        return torch.randn(shape[0], *shape[2:], shape[1], device="cuda", dtype=dtype).movedim(-1, 1)

    for shape in NORMS:
        x, weight, bias = filled(*shape), *torch.randn(2, shape[1], device="cuda", dtype=dtype)
        yield (
            f"group norm and GELU {shape}",
            lambda x=x, w=weight, b=bias: kernels.group_norm(x, 32, w, b, 1e-5, "gelu"),
            lambda x=x, w=weight, b=bias: F.gelu(F.group_norm(x, 32, w, b, 1e-5)),
        )
    for shape in SUMS:
        x, y, bias = filled(*shape), filled(*shape), torch.randn(shape[1], device="cuda", dtype=dtype)
        yield (
            f"sum with a bias {shape}",
            lambda x=x, y=y, b=bias: kernels.add(x, y, b),
            lambda x=x, y=y, b=bias: x + (y + b[:, None, None]),
        )
    for shape in CONVOLUTIONS if dtype == torch.float16 else ():
        x, weight = filled(*shape), torch.randn(shape[1], shape[1], 3, device="cuda", dtype=dtype)
        yield (
            f"convolution over frames {shape}",
            lambda x=x, w=weight: kernels.frame_conv(x, w),
            lambda x=x, w=weight: F.conv2d(x, w[..., None], padding=(1, 0)),
        )
    for shape in GATES if dtype != torch.float32 else ():
        x = torch.randn(shape, device="cuda", dtype=dtype)
        yield (
            f"gated GELU {shape}",
            lambda x=x: kernels.gated_gelu(x),
            lambda x=x: x.chunk(2, dim=-1)[0] * F.gelu(x.chunk(2, dim=-1)[1]),
        )
    for shape in ATTENTIONS:
        q, k, v = torch.randn(3, *shape, device="cuda", dtype=dtype)
        yield (
            f"attention over frames {shape}",
            lambda q=q, k=k, v=v: kernels.short_attention(q, k, v, 64),
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(
                *(each.unflatten(-1, (64, -1)).transpose(1, 2) for each in (q, k, v))
            ),
        )


@torch.no_grad()
def _run() -> None:
    if not torch.cuda.is_available():
        raise Show1Error("The kernels are for a GPU, and there is none.", "Run this where one is.")
    print(torch.cuda.get_device_name(), torch.__version__)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for what, our_call, their_call in cases(dtype):
            ours, theirs = milliseconds(our_call), milliseconds(their_call)
            print(f"{what} {dtype}: ours {ours:.3f} ms, torch {theirs:.3f} ms, {theirs / ours:.1f} times as fast")


if __name__ == "__main__":
    sys.exit(exit_code(_run))
