"""Stage 4: to the final size, in the latent space of an autoencoder."""

from collections.abc import Generator, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from show_1.models import UNet3DConditionModel
from show_1.stages.denoise import (
    Pause,
    Stage,
    Step,
    begin,
    denoise,
    finish,
    fold,
    last_timesteps,
    prepare,
    seeded,
    unfold,
)
from show_1.text import TextEmbeddings, encode_clip
from show_1.video import from_uint8, to_uint8


class LatentUpscalePipeline(Stage):
    """Enlarges a clip plainly and redraws its detail (arXiv 2309.15818, section 3.5; SDEdit, arXiv 2108.01073).

    `vae_frames` bounds the memory of a call of the autoencoder: it is given at most that many frames at once.
    """

    vae_frames: int = 1

    model_cpu_offload_seq = "text_encoder->unet->vae"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet3DConditionModel,
        scheduler: SchedulerMixin,
    ):
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, unet=unet, scheduler=scheduler)

    def encode(self, prompts: str | Sequence[str], negative_prompt: str) -> TextEmbeddings:
        """Return the CLIP states of the prompts, (prompts, 77, features), and of the negative prompt."""
        return encode_clip(self.tokenizer, self.text_encoder, prompts, negative_prompt, self._execution_device)

    @torch.no_grad()
    def stream(
        self,
        text: TextEmbeddings,
        clip: torch.Tensor,
        *,
        height: int,
        width: int,
        steps: int,
        strength: float,
        guidance: float,
        seed: int | Sequence[int],
        shared_noise: float = 0.0,
        **measures: Any,
    ) -> Generator[Step | Pause, None, torch.Tensor]:
        """Yield the last `int(steps · strength)` steps, and pauses while frames are encoded and decoded.

        Returns (prompts, 3, frames, height, width), about [−1, 1]; `clip` is (prompts, 3, frames, any height, any
        width) in [−1, 1]. A step's sample is in latents, for Show-1 (prompts, 4, frames, height / 8, width / 8);
        `decode` shows it. `shared_noise`, in [0, 1], is the share of the noise's variance that all frames have in
        common: 0 for the released model.
        """
        scheduler = prepare(self.scheduler, steps, self._execution_device)
        timesteps = last_timesteps(scheduler, int(steps * strength))
        begin(scheduler, timesteps)  # `add_noise`, too
        generators, noisy = seeded(seed), []
        for one, generator in zip(clip, generators, strict=True):
            latents = yield from self._encode_frames(_resize(one[None], height, width), generator)
            noise = self.noise(latents.shape, [generator], shared_noise, frames=0)[0]
            wide = torch.promote_types(latents.dtype, torch.float32)
            noisy.append(scheduler.add_noise(latents.to(wide), noise.to(wide), timesteps[:1]))
        sample = torch.stack(noisy).transpose(1, 2)
        latents = yield from denoise(
            self.unet,
            scheduler,
            sample,
            text,
            guidance,
            timesteps=timesteps,
            generators=generators,
            rows=self.rows,
            **measures,
        )
        return (yield from self._decode(latents))

    def _encode_frames(self, frames: torch.Tensor, generator: torch.Generator) -> Generator[Pause, None, torch.Tensor]:
        frames, moments = frames.to(self._execution_device, self.vae.dtype), []
        # In parts, for the encoder's memory grows with its batch; the draw below is that of one batch all the same.
        for part in frames.split(self.vae_frames):
            moments.append(self.vae.encode(part).latent_dist.parameters)
            yield Pause(part.transpose(0, 1)[None])
        latents = DiagonalGaussianDistribution(torch.cat(moments)).sample(generator)
        return (latents - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return (batch, 3, frames, ...), about [−1, 1], of (batch, channels, frames, height, width) latents."""
        return finish(self._decode(latents))

    def _decode(self, latents: torch.Tensor) -> Generator[Pause, None, torch.Tensor]:
        decoded, config = [], self.vae.config
        frames = fold(latents).to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0)
        for part in frames.split(self.vae_frames):
            decoded.append(self.vae.decode(part).sample)
            yield Pause(decoded[-1].transpose(0, 1)[None])
        return unfold(torch.cat(decoded), latents.shape)


def _resize(clip: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the clip's frames as 8-bit images enlarged by Pillow's bicubic filter, (frames, 3, height, width)."""
    images = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in to_uint8(clip)]
    return from_uint8(images)[0].transpose(0, 1)
