"""Our kernels against PyTorch's way, in channels last: `python -m benchmarks.kernels`.

On a GPU in shapes of Show-1's models, on a CPU in mini's. That the numbers are the same is what the tests are for.
"""

import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from show_1.errors import Show1Error, exit_code, first_line, telling_full_memory
from show_1.models.try_kernels import KERNELS

# By device and kernel; of the sums' and the norms' shapes, the second number is that of channels.
SHAPES = {
    "cuda": {
        "group_norm": [
            *[(29, 128, 160, 256), (16, 256, 160, 256), (29, 256, 80, 128), (29, 512, 40, 64), (29, 768, 20, 32)],
            *[(16, 320, 40, 72), (128, 1280, 8, 10), (2, 128, 8, 160 * 256), (1, 2560, 8, 60)],
        ],
        "add": [(16, 128, 160, 256), (16, 512, 40, 64), (58, 320, 40, 72)],
        "frame_conv": [(2, 128, 8, 160 * 256)],
        "gated_gelu": [(167040, 2560), (17920, 10240)],
        "short_attention": [(20480, 8, 512, 64), (35840, 5, 640, 64)],  # sequences, frames, channels, heads
    },
    "cpu": {
        "group_norm": [
            *[(8, 32, 80, 128), (1, 32, 8, 10240), (8, 64, 40, 64), (16, 32, 20, 32), (16, 96, 5, 8)],
            *[(4, 32, 160, 288), (29, 64, 40, 72)],
        ],
        "gated_gelu": [(10240, 256), (640, 768)],
        "short_attention": [(320, 8, 96, 32), (80, 8, 96, 32)],
    },
}


def milliseconds(call: Callable[[], torch.Tensor], device: str) -> float:
    """Return how long a call takes: the median of 100; on a GPU the mean of 20, without Python's part in it."""
    call()
    if device == "cpu":
        seconds = []
        for _ in range(100):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return 1000 * statistics.median(seconds)
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


def cases(
    device: str, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], torch.Tensor], Callable[[], torch.Tensor]]]:
    """Yield what is computed, our call and PyTorch's, where the models take ours in this type."""
    kernels = importlib.import_module(f"show_1.models.{KERNELS[device][0]}")
    shapes = SHAPES[device]

    def filled(*shape: int) -> torch.Tensor:
        return torch.randn(shape[0], *shape[2:], shape[1], device=device, dtype=dtype).movedim(-1, 1)

    for shape, activation in itertools.product(shapes["group_norm"], ("gelu", "silu")):
        x, weight, bias = filled(*shape), *torch.randn(2, shape[1], device=device, dtype=dtype)
        yield (
            f"group norm and {activation} {shape}",
            lambda x=x, w=weight, b=bias, a=activation: kernels.group_norm(x, dtype, 32, w, b, 1e-5, a),
            lambda x=x, w=weight, b=bias, a=activation: getattr(F, a)(F.group_norm(x, 32, w, b, 1e-5)),
        )
    for shape in shapes.get("add", ()):
        x, y, bias = filled(*shape), filled(*shape), torch.randn(shape[1], device=device, dtype=dtype)
        yield (
            f"sum with a bias {shape}",
            lambda x=x, y=y, b=bias: kernels.add(x, y, b),
            lambda x=x, y=y, b=bias: x + (y + b[:, None, None]),
        )
    for shape in shapes.get("frame_conv", ()) if dtype == torch.float16 else ():
        x, weight = filled(*shape), torch.randn(shape[1], shape[1], 3, device=device, dtype=dtype)
        yield (
            f"convolution over frames {shape}",
            lambda x=x, w=weight: kernels.frame_conv(x, w),
            lambda x=x, w=weight: F.conv2d(x, w[..., None], padding=(1, 0)),
        )
    for shape in shapes["gated_gelu"] if (device, dtype) != ("cuda", torch.float32) else ():
        x = torch.randn(shape, device=device, dtype=dtype)
        yield (
            f"gated GELU {shape}",
            lambda x=x: kernels.gated_gelu(x),
            lambda x=x: x.chunk(2, dim=-1)[0] * F.gelu(x.chunk(2, dim=-1)[1]),
        )
    for *shape, heads in shapes["short_attention"]:
        q, k, v = torch.randn(3, *shape, device=device, dtype=dtype)
        yield (
            f"attention over frames {(*shape,)}",
            lambda q=q, k=k, v=v, heads=heads: kernels.short_attention(q, k, v, heads),
            lambda q=q, k=k, v=v, heads=heads: _attention(q, k, v, heads),
        )


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    apart = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(*apart).transpose(1, 2).flatten(2)


@torch.no_grad()
@telling_full_memory("Timing the kernels")
def _run() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(torch.cuda.get_device_name() if device == "cuda" else "CPU", torch.__version__)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        if dtype not in KERNELS[device][2]:
            continue
        for what, our_call, their_call in cases(device, dtype):
            try:
                ours = milliseconds(our_call, device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever the compilers, the driver and what calls them raise
                raise Show1Error(
                    f"{what} {dtype}: our kernel does not run here, {first_line(error)}.",
                    "On a CPU, name a C++ compiler that works in CXX; on a GPU, see whether its driver suits torch.",
                ) from error
            theirs = milliseconds(their_call, device)
            row = f"ours {ours:.3f} ms, torch {theirs:.3f} ms, {theirs / ours:.1f} times as fast"
            print(f"{what} {dtype}: {row}", flush=True)  # `timeout` may end it


if __name__ == "__main__":
    sys.exit(exit_code(_run))
