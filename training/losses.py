"""What mini's models are trained for: the velocity at some noise level, and what an autoencoder loses."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from show_1.stages.denoise import share_noise
from training import models
from training.batches import NOISE
from training.redraw import CPU

# Of each of the 1000 levels of the one schedule:
ALPHA = NOISE.alphas_cumprod.sqrt()
SIGMA = (1 - NOISE.alphas_cumprod).sqrt()


def around(middle: float, spread: float) -> Callable[[int], torch.Tensor]:
    """Return what draws noise levels, logit-normal (arXiv 2403.03206): most where shapes and paths are decided."""
    return lambda count: (1000 * torch.sigmoid(middle + spread * torch.randn(count))).long().clamp(0, 999)


def of_sampler(steps: int) -> Callable[[int], torch.Tensor]:
    """Return what draws the noise levels at which a sampler of few steps looks, one as often as another."""
    scheduler = models.scheduler(thresholding=False)
    scheduler.set_timesteps(steps)
    return lambda count: scheduler.timesteps[torch.randint(steps, (count,))]


def mostly(level: int) -> Callable[[int], torch.Tensor]:
    """Return what draws mostly the noise level from which a sampler of one step starts, and at times any below."""
    return lambda count: torch.where(torch.rand(count) < 0.95, level, torch.randint(0, level + 1, (count,)))


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16: a CPU that does not is ten times slower in it (measured)."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def noise_like(clips: torch.Tensor, shared: float) -> torch.Tensor:
    """Return noise for clips, (batch, channels, frames, height, width), or for pictures where nothing is shared."""
    noise = torch.randn_like(clips)
    return share_noise(noise, torch.randn_like(clips[:, :, :1]), shared) if shared else noise


def velocity_loss(
    unet: nn.Module,
    states: torch.Tensor,
    batch: dict,
    draw_levels: Callable[[int], torch.Tensor],
    top: int = 1000,
    movement_weight: float = 0.0,
    edge_weight: float = 0.0,
    shared_noise: float = 0.0,
    error_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the weighted squared error of the predicted velocity (arXiv 2202.00512) at levels up to `top`.

    What `error_of` says of the clean sample that the prediction stands for is added.

    The error less its mean over a clip's frames, which is that of what moves, counts `movement_weight` times more.
    `edge_weight` is that of the absolute error in differences between neighbouring pixels: squares alone would rather
    have a blur than an edge a little beside its place.

    A batch with a "degraded" sample starts from it at the highest level and from the clean one at the lowest, with the
    velocity always pointing to the clean one: so a chain that starts from a degraded sample learns to repair it.
    """
    clean = batch["clean"]
    levels = draw_levels(len(clean))
    shape = (-1, *(1,) * (clean.ndim - 1))
    alpha, sigma = (table[levels].view(shape).to(clean.device) for table in (ALPHA, SIGMA))
    levels = levels.to(clean.device)
    start = clean.lerp(batch["degraded"], (levels / top).view(shape)) if "degraded" in batch else clean
    noisy = alpha * start + sigma * noise_like(clean, shared_noise)
    target = (alpha * noisy - clean) / sigma.clamp(min=0.02)
    model_input = torch.cat([noisy, batch["condition"]], dim=1) if "condition" in batch else noisy
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=native_bfloat16(clean.device)):
        velocity = unet(model_input, levels, encoder_hidden_states=states, class_labels=batch.get("noise_level")).sample
    error = velocity.float() - target
    weight = batch.get("weight", torch.ones_like(clean[:, :1]))
    loss = (error.square() * weight).mean() / weight.mean()
    if movement_weight:
        moving = error - error.mean(2, keepdim=True)
        weight = weight.amax(2, keepdim=True)  # where an object ever is, so that the weighting does not move with it
        loss = loss + movement_weight * (moving.square() * weight).mean() / weight.mean()
    if edge_weight:
        edges = sum((error.diff(dim=d).abs() * weight.narrow(d, 1, weight.shape[d] - 1)).mean() for d in (-2, -1))
        loss = loss + edge_weight * edges / weight.mean()
    if error_of is not None:
        loss = loss + error_of(alpha * noisy - sigma * velocity.float())
    return loss


@torch.no_grad()
def draw(unet: nn.Module, states: torch.Tensor, batch: dict, steps: int, shared_noise: float = 0.0) -> torch.Tensor:
    """Return what the model draws, without guidance, for the text and condition of a batch, as large as its "clean"."""
    with CPU:  # whatever the default is meanwhile
        scheduler = models.scheduler(thresholding=False)
        scheduler.set_timesteps(steps, device=states.device)
    sample = noise_like(batch["clean"], shared_noise)
    for level in scheduler.timesteps:
        model_input = torch.cat([sample, batch["condition"]], dim=1) if "condition" in batch else sample
        options = {"encoder_hidden_states": states, "class_labels": batch.get("noise_level")}
        sample = scheduler.step(unet(model_input, level, **options).sample, level, sample).prev_sample
    return sample


def autoencoder_loss(vae: AutoencoderKL, batch: dict) -> torch.Tensor:
    """Return the error in pixels and in edges, and a light pull of the latents to a normal distribution."""
    clean = batch["clean"]
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=native_bfloat16(clean.device)):
        posterior = vae.encode(clean).latent_dist
        decoded = vae.decode(posterior.sample()).sample.float()
    return pixel_error(decoded, clean) + 1e-4 * posterior.kl().mean() / clean[0, 0].numel()


def pixel_error(frames: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute error of frames, (batch, channels, height, width), and that of their edges."""
    edges = sum(F.l1_loss(frames.diff(dim=d), clean.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(frames, clean) + edges
