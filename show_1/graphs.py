"""CUDA graphs: a UNet's call is recorded once and replayed, so that the GPU never waits for Python.

Nothing is compiled, so the first video waits for nothing: the first call of a kind runs as ever, the second is
recorded on the way, and all others replay the same kernels: the same numbers. A call of Show-1's UNets
launches up to 2,600 kernels.
"""

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from show_1.errors import memory_is_full

log = logging.getLogger("show-1")


@dataclass(frozen=True)
class Recording:
    """A recorded call: `replay` reads the tensors of `inputs` and writes those of `output`."""

    inputs: Any
    output: Any
    replay: Callable[[], None]


class Graphed:
    """A module's forward, replayed from the third call of a kind on; the kind is the shapes and types of its inputs.

    A recording reads the weights where they lay: once they have moved, all is recorded anew.

    Where recording fails, all modules' calls go on as they were, and the log says so once. A call that finds no room to
    be recorded is not tried again; the others are recorded anew, as they held the memory that all share.
    """

    failed = False  # of the class: what one could not, the others will not be able to either
    everyone: ClassVar["weakref.WeakSet[Graphed]"] = weakref.WeakSet()
    replaying = threading.RLock()  # of all: they share their memory

    def __init__(self, module: nn.Module):
        Graphed.everyone.add(self)
        self.too_large: set[tuple] = set()  # kinds
        self.forward, self.weights = module.forward, list(module.parameters())
        self.addresses: list[int] = []  # of the weights, when what there is was recorded
        self.recordings: dict[tuple, Recording | None] = {}  # None: seen once, which has warmed the libraries up

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"recordings": {}, "addresses": []}  # a copy records anew

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A replay leaves nothing to go back through, and what autocast makes of the weights ends with it.
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
            return self.forward(*args, **kwargs)
        with Graphed.replaying:
            return self._replayed(*args, **kwargs)

    def _replayed(self, *args: Any, **kwargs: Any) -> Any:
        inputs = (args, kwargs)
        kind = tuple((tuple(x.shape), x.dtype, x.device) if _is_tensor(x) else x for x in tree_leaves(inputs))
        kind += (*kwargs, torch.is_inference_mode_enabled())
        if Graphed.failed:
            self.recordings.clear()  # their memory may be what was missing
        if Graphed.failed or kind in self.too_large:
            return self.forward(*args, **kwargs)
        addresses = [weight.data_ptr() for weight in self.weights]
        if addresses != self.addresses:  # somebody has moved them: a recording would read what is there now
            self.recordings.clear()
            self.addresses = addresses
        if kind not in self.recordings:
            self.recordings[kind] = None
            return self.forward(*args, **kwargs)
        if self.recordings[kind] is None:
            try:
                self.recordings[kind] = record(self.forward, inputs)
            except Exception as error:  # whatever the driver and the libraries raise
                if memory_is_full(error):
                    self.too_large.add(kind)
                    for each in Graphed.everyone:
                        each.recordings.clear()
                    torch.cuda.empty_cache()
                else:
                    Graphed.failed = True
                    self.recordings.clear()
                    log.warning("Goes on without CUDA graphs, slower: %s", str(error).partition("\n")[0])
                return self.forward(*args, **kwargs)
        recording = self.recordings[kind]
        for held, given in zip(tree_leaves(recording.inputs), tree_leaves(inputs), strict=True):
            if _is_tensor(held):
                held.copy_(given)
        recording.replay()
        return _copy(recording.output)  # the next replay writes over it


def record(forward: Callable, inputs: tuple[tuple, dict]) -> Recording:
    """Record one call on its inputs' CUDA device; what it computes comes with the first replay."""
    args, kwargs = held = _copy(inputs)
    device = next(x.device for x in tree_leaves(held) if _is_tensor(x))
    pool, stream = _shared(device)
    graph = torch.cuda.CUDAGraph()
    # What other threads do on the device meanwhile, such as freeing memory, is no fault of this one's recording.
    with torch.cuda.device(device), torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        output = forward(*args, **kwargs)
    return Recording(held, output, graph.replay)


@functools.cache
def _shared(device: torch.device) -> tuple[tuple[int, int], torch.cuda.Stream]:
    """Return the memory that all graphs of a device share, and the stream that they are recorded on.

    They replay one after the other, and outputs are copied out at once. PyTorch's own stream for recording is on the
    device that was current when it recorded first.
    """
    return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)


def _copy(values: Any) -> Any:
    return tree_map(lambda x: x.clone() if _is_tensor(x) else x, values)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)
