"""Kernels for CPUs: group norm in channels last, gated GELU, attention over short sequences.

`cpu_kernels.cpp` is compiled by the system's C++ compiler when it is first needed, within two seconds; what comes of it
is kept in the user's cache. Where there is no compiler, calls raise.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")
# No -ffinite-math-only: it would make plausible numbers of NaN.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
FLAGS += ["-std=c++17", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
# What PyTorch found the CPU to have; others, such as ARM's, have their vectors without being asked.
VECTORS = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}
PATIENCE = 60  # seconds for the compiler
NO_COMPILER = "there is no C++ compiler (on Debian and Ubuntu: sudo apt-get install g++)"

POINTER, NUMBER, THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
STRIDED = [POINTER, NUMBER]
ARGUMENTS = {
    "group_norm": [*[POINTER] * 4, *[NUMBER] * 5, POINTER, POINTER, ctypes.c_double, NUMBER, *STRIDED * 3, THREADS],
    "gated_gelu": [POINTER, POINTER, NUMBER, NUMBER, THREADS],
    "short_attention": [*[*STRIDED, NUMBER] * 3, POINTER, *[NUMBER] * 4, THREADS],
}

ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2}
AT_ONCE = 2**13  # elements that are summed up in float32 before float64 goes on


def compiler() -> list[str]:
    """Return the command that the variable CXX names, else the system's C++ compiler; empty where there is none."""
    found = [shutil.which(name) for name in ("c++", "g++")]
    return shlex.split(os.environ.get("CXX", "")) or [program for program in found if program][:1]


def group_norm(
    x: torch.Tensor,
    dtype: torch.dtype,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: str | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return activation(norm(x + added)·(1 + scale) + shift), computed in float32, in that type and the layout of `x`.

    `x` is (batch, channels, …) and lies in memory as (batch, …, channels); `scale` and `shift` are (batch, channels),
    `added` too or (channels,).
    """
    batch, channels = x.shape[:2]
    pixels = x.numel() // (batch * channels)
    rows = min(pixels, max(1, AT_ONCE // channels))
    parts = torch.empty(batch, -(-pixels // rows), 2, channels, dtype=torch.float32, device=x.device)
    lines = torch.empty(batch, 2, channels, dtype=torch.float32, device=x.device)
    weight, bias = weight.to(dtype), bias.to(dtype)
    extra = [None if each is None else each.to(dtype).expand(batch, channels) for each in (scale, shift, added)]
    extra = [each if each is None or each.stride(1) == 1 else each.contiguous() for each in extra]
    strided = (part for each in extra for part in ((None, 0) if each is None else (each.data_ptr(), each.stride(0))))
    y = torch.empty_like(x, dtype=dtype)
    _function("group_norm", x.dtype, dtype)(
        *(x.data_ptr(), y.data_ptr(), parts.data_ptr(), lines.data_ptr(), batch, pixels, channels, groups, rows),
        *(weight.data_ptr(), bias.data_ptr(), eps, ACTIVATIONS[activation], *strided, torch.get_num_threads()),
    )
    return y


def gated_gelu(x: torch.Tensor) -> torch.Tensor:
    """Return the first half of the last dimension times the GELU of the second, computed in float32, in its type."""
    y = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    rows = x.numel() // x.shape[-1]
    _function("gated_gelu", x.dtype)(x.data_ptr(), y.data_ptr(), rows, y.shape[-1], torch.get_num_threads())
    return y


def short_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Return softmax(q·kᵀ/√features)·v of each head, computed in float32, in the type and shape of `q`.

    All are (sequences, frames, heads·features), with the last dimension contiguous.
    """
    sequences, frames, channels = q.shape
    strided = (part for each in (q, k, v) for part in (each.data_ptr(), *each.stride()[:2]))
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _function("short_attention", q.dtype)(
        *(*strided, y.data_ptr(), sequences, frames, heads, channels // heads, torch.get_num_threads())
    )
    return y


@functools.cache
def _function(name: str, *types: torch.dtype) -> Callable[..., None]:
    """Return the function for such types, which `cpu_kernels.cpp` gives in its name."""
    function = getattr(_library(), "_".join([name, *(str(each).removeprefix("torch.") for each in types)]))
    function.argtypes, function.restype = ARGUMENTS[name], None
    return function


@functools.cache
def _library() -> ctypes.CDLL:
    if not compiler():
        raise FileNotFoundError(NO_COMPILER)
    command = [*compiler(), *FLAGS, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())]
    name = hashlib.sha256(" ".join(command).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "show-1" / f"cpu-kernels-{name}.so"
    with contextlib.suppress(OSError):  # it is not there, or is damaged
        return ctypes.CDLL(str(kept))
    return _compile(command, kept)


def _compile(command: list[str], kept: Path) -> ctypes.CDLL:
    """Compile, keep what comes of it where that can be written to, and load it."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernels.so"
        run = subprocess.run(
            [*command, SOURCE, "-o", made], stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False
        )
        if run.returncode:
            raise RuntimeError(f"{command[0]} cannot compile them: {run.stderr.strip() or 'it does not say why'}")
        part = kept.with_suffix(f".{os.getpid()}")
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made, part)
            os.replace(part, kept)  # in one step: another process may want it, too
        except OSError:  # a full disk, for one
            with contextlib.suppress(OSError):
                part.unlink()
            return ctypes.CDLL(str(made))
    return ctypes.CDLL(str(kept))
