"""Stage 1: text to a few keyframes, far apart in time."""

from collections.abc import Generator, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from show_1.models import UNet3DConditionModel
from show_1.stages.denoise import Stage, Step, denoise, prepare, seeded
from show_1.text import TextEmbeddings, encode_t5


class KeyframesPipeline(Stage):
    """Draws the keyframes from noise (arXiv 2309.15818, section 3.2); also holds the T5 that all pixel stages read."""

    model_cpu_offload_seq = "text_encoder->unet"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        unet: UNet3DConditionModel,
        scheduler: SchedulerMixin,
    ):
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, unet=unet, scheduler=scheduler)

    def encode(self, prompts: str | Sequence[str]) -> TextEmbeddings:
        """Return the prompts' T5 states, (prompts, 77, features), and those of the empty negative prompt."""
        return encode_t5(self.tokenizer, self.text_encoder, prompts, self._execution_device)

    @torch.no_grad()
    def stream(
        self,
        text: TextEmbeddings,
        *,
        frames: int,
        height: int,
        width: int,
        steps: int,
        guidance: float,
        seed: int | Sequence[int],
        shared_noise: float = 0.0,
        **measures: Any,
    ) -> Generator[Step, None, torch.Tensor]:
        """Yield `steps` steps; return the keyframes, (prompts, 3, frames, height, width) about [−1, 1].

        `shared_noise` is the share of the first noise's variance that all frames have in common: 0 for the released
        model, and what another was trained with for that one.

        `measures` are those of `denoise` that trade exactness for speed, as in all stages.
        """
        scheduler = prepare(self.scheduler, steps, self._execution_device)
        generators = seeded(seed)
        noise = self.noise((3, frames, height, width), generators, shared_noise)
        sample = noise * scheduler.init_noise_sigma
        return (
            yield from denoise(
                self.unet, scheduler, sample, text, guidance, generators=generators, rows=self.rows, **measures
            )
        )
