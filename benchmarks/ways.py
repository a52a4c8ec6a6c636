"""The two ways of working that are compared: ours, and the original program's, stage by stage."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from show_1 import Show1Pipeline
from show_1.models import unet_3d_condition
from show_1.models.attention import TextAttention
from show_1.stages.denoise import finish
from show_1.text import TextEmbeddings

STAGES = ("text", "keyframes", "interpolation", "first_frame", "pixel_upscale", "latent_upscale")
PROMPT, SEED = "a panda jumping in the snow", 1


class Ours:
    """A pipeline as it is: the prompt encoded once, segments as one batch, models where `placement` has put them.

    `prompts` is how many it makes videos of at once: all the same one, with the same seed.
    """

    def __init__(self, pipeline: Show1Pipeline, prompts: int = 1):
        self.pipeline, self.text = pipeline, None
        self.prompts, self.seeds = [PROMPT] * prompts, [SEED] * prompts

    def run(self, stage: str, clips: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run one stage on what the stages before it have made, and return what it makes.

        That is (prompts, 3, frames, height, width) in [−1, 1], of the first frame (prompts, 3, height, width), and of
        the "text", which has to be run before the others, (prompts, 77, features). `clips` are by stage.
        """
        if stage == "text":
            for hook in self.pipeline.offload_hooks:
                hook.offload()
            self.text = self.pipeline.keyframes.encode(self.prompts)
            return self.text.prompt
        return self.video_stage(stage, clips)

    def video_stage(self, stage: str, clips: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run one stage but the "text", whose states it reads, with the cascade's settings; see `run`."""
        pipeline, text = self.pipeline, self.text
        settings = pipeline.cascade.stream_settings(stage) | {"seed": self.seeds}
        if stage == "keyframes":
            return pipeline.keyframes(text, **settings)
        if stage == "interpolation":
            return self.interpolate(text, clips["keyframes"], settings)
        if stage == "first_frame":
            return finish(pipeline.pixel_upscale.stream_first_frame(text, clips["interpolation"][:, :, 0], **settings))
        if stage == "pixel_upscale":
            return pipeline.pixel_upscale(text, clips["interpolation"], clips["first_frame"], **settings)
        text = pipeline.latent_upscale.encode(self.prompts, pipeline.cascade.latent_upscale.negative_prompt)
        return pipeline.latent_upscale(text, clips["pixel_upscale"], **settings)

    def interpolate(self, text: TextEmbeddings, keyframes: torch.Tensor, settings: dict) -> torch.Tensor:
        """Return (prompts, 3, 4·(keyframes − 1) + 1, height, width) from (prompts, 3, keyframes, height, width)."""
        return self.pipeline.interpolation(text, keyframes, **settings)


class Original(Ours):
    """The original's way of working, with our stages: moves, encodes and loops as it did, in eager mode.

    Each stage encodes the prompt anew, its models are moved to the device and back around it
    (diffusers' model offloading, as there), the segments run one by one, the autoencoder takes one frame at a time, and
    the temporal layers and the pixel family's attention are diffusers' own.
    """

    def __init__(self, pipeline: Show1Pipeline, device: torch.device):
        super().__init__(pipeline)
        vae, upscale = pipeline.latent_upscale.vae, pipeline.pixel_upscale
        unets = [pipeline.keyframes.unet, pipeline.interpolation.unet, pipeline.latent_upscale.unet]
        unets += [upscale.unet, upscale.first_frame_unet]
        self.flops = Flops([*((unet, "forward") for unet in unets), (vae, "encode"), (vae, "decode")])
        self.offloaded = ()
        if device.type == "cpu":
            return
        self.offloaded = tuple(getattr(pipeline, stage) for stage in STAGES[1:] if stage != "first_frame")
        for stage in self.offloaded:
            stage.enable_model_cpu_offload(device=device)

    def run(self, stage: str, clips: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run one stage but the "text", which each of them encodes anew; shapes and ranges are those of ours."""
        with diffusers_layers():
            if stage != "latent_upscale":  # which encodes with CLIP, as ours does
                self.text = self.pipeline.keyframes.encode(self.prompts)
                if stage != "keyframes":
                    self._free()
            made = self.video_stage(stage, clips)
            self._free()
        return made

    def interpolate(self, text: TextEmbeddings, keyframes: torch.Tensor, settings: dict) -> torch.Tensor:
        """Return what ours does, a pair of keyframes after the other."""
        pairs = (keyframes[:, :, i : i + 2] for i in range(keyframes.shape[2] - 1))
        segments = [self.pipeline.interpolation(text, pair, **settings) for pair in pairs]
        return torch.cat([*(segment[:, :, :-1] for segment in segments[:-1]), segments[-1]], dim=2)

    def _free(self) -> None:
        for stage in self.offloaded:
            stage.maybe_free_model_hooks()


class Flops:
    """The floating-point operations of all calls of some methods: each kind of call is counted once, by PyTorch.

    `total` may be set to 0 at any time.
    """

    def __init__(self, methods: list[tuple[torch.nn.Module, str]]):
        self.total = 0
        for model, name in methods:
            setattr(model, name, self._counted(getattr(model, name)))

    def _counted(self, method: Callable) -> Callable:
        known: dict[tuple, int] = {}

        @functools.wraps(method)
        def counted(*args, **kwargs):
            kind = tuple(x.shape for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
            with contextlib.nullcontext() if kind in known else FlopCounterMode(display=False) as counter:
                result = method(*args, **kwargs)
            if counter is not None:
                known[kind] = counter.get_total_flops()
            self.total += known[kind]
            return result

        return counted


@contextlib.contextmanager
def diffusers_layers() -> Iterator[None]:
    """Compute the temporal layers as diffusers does: 3D convolutions, and a copy into and out of every layer.

    And the pixel family's attention: the text's keys and values for each frame anew.
    """

    def transform(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
        return TransformerTemporalModel.forward(self, hidden_states, num_frames=num_frames).sample

    def attend(
        self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask: None
    ) -> torch.Tensor:
        text = encoder_hidden_states.repeat_interleave(len(hidden_states) // len(encoder_hidden_states), dim=0)
        return AttnAddedKVProcessor2_0()(attn, hidden_states, text)

    with (
        mock.patch.object(TextAttention, "__call__", attend),
        mock.patch.object(unet_3d_condition.TemporalConv, "forward", TemporalConvLayer.forward),
        mock.patch.object(unet_3d_condition.TemporalTransformer, "forward", transform),
    ):
        yield


def made_up_clips(cascade, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return random clips in the shapes that the stages pass on, for stages whose predecessors are not run."""
    table = cascade.keyframes
    frames = 4 * (table.frames - 1) + 1
    shapes = {
        "keyframes": (1, 3, table.frames, table.height, table.width),
        "interpolation": (1, 3, frames, table.height, table.width),
        "first_frame": (1, 3, 4 * table.height, 4 * table.width),
        "pixel_upscale": (1, 3, frames, 4 * table.height, 4 * table.width),
    }
    generator = torch.Generator().manual_seed(SEED)
    return {
        stage: (2 * torch.rand(shape, generator=generator) - 1).to(device, dtype) for stage, shape in shapes.items()
    }
