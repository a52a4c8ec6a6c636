"""Attention over a clip's few frames, and over a frame and its clip's text: diffusers' numbers from less work."""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from show_1.models import try_kernels

AT_ONCE = 2**20  # products: what a CPU's caches hold (measured with mini's shapes)


class TextAttention:
    """diffusers' `AttnAddedKVProcessor2_0`, the same numbers, for frames that share their clip's text.

    Its keys and values are computed once a clip. Once a frame, as diffusers does it, they take more than the image's
    own where maps are small: 77 tokens beside 40 in the pixel family's deepest blocks.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
    ) -> torch.Tensor:
        """Return hidden states of the given shape, (clips·frames, channels, height, width).

        `encoder_hidden_states` is the text, (clips, tokens, features).
        """
        text = encoder_hidden_states
        text = text if attn.norm_cross is None else attn.norm_encoder_hidden_states(text)
        pixels = attn.group_norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2)
        frames = len(hidden_states) // len(text)

        def with_text(of_text: torch.nn.Module, of_pixels: torch.nn.Module | None) -> torch.Tensor:
            parts = [of_text(text)[:, None].expand(-1, frames, -1, -1)]
            if of_pixels is not None:
                parts.append(of_pixels(pixels).unflatten(0, (-1, frames)))
            return torch.cat(parts, dim=2).flatten(0, 1)

        key, value = with_text(attn.add_k_proj, attn.to_k), with_text(attn.add_v_proj, attn.to_v)
        heads = (each.unflatten(2, (attn.heads, -1)).transpose(1, 2) for each in (attn.to_q(pixels), key, value))
        change = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            change = layer(change)
        return hidden_states + change.unflatten(1, hidden_states.shape[2:]).permute(0, 3, 1, 2)


class FrameAttention(AttnProcessor2_0):
    """diffusers' processor, the same numbers; with a way of our own for short sequences of odd heads.

    The pixel family's temporal attention has 64 heads of 10 to 20 features over 5 or 8 frames, for every pixel. In half
    precision PyTorch's fused kernels on a GPU want multiples of 8 features, and what remains is batches of tiny matrix
    products. On a CPU its kernel takes one head of one pixel at a time, and longer in bfloat16 than in float32.
    """

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, **nothing: None) -> torch.Tensor:
        """Return hidden states of the given shape, (sequences, frames, channels); a temporal layer gives no more."""
        short = hidden_states.shape[1] <= 16 and attn.inner_dim // attn.heads <= 64
        change = _attend(attn, hidden_states) if short else None
        if change is None:
            return super().__call__(attn, hidden_states)
        for layer in attn.to_out:
            change = layer(change)
        return change


def _attend(attn: Attention, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """Return what the heads make of it, (sequences, frames, channels); None where PyTorch's way is the better one."""
    features, on_cpu = attn.inner_dim // attn.heads, hidden_states.device.type == "cpu"
    suits = try_kernels.suit("short_attention", hidden_states)
    if not (features <= 20 and not torch.is_grad_enabled() if on_cpu else features % 8 != 0 and suits):
        return None
    query, key, value = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
    change = try_kernels.attempt("short_attention", query, key, value, attn.heads) if suits else None
    return attend_across(query, key, value, attn.heads) if change is None and on_cpu else change


def attend_across(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Return each head's attention, (sequences, frames, channels) as all three are; in float32 at least.

    For a pair of frames and a feature, all heads of many sequences are multiplied at once, side by side in memory.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    _, frames, channels = query.shape
    rows, made = max(1, AT_ONCE // (frames**2 * channels)), []
    for part in zip(*(each.split(rows) for each in (query, key, value)), strict=True):
        # (frames, features, sequences · heads)
        q, k, v = (each.unflatten(2, (heads, -1)).permute(1, 3, 0, 2).to(dtype).flatten(2) for each in part)
        weights = ((q * q.shape[1] ** -0.5)[:, None] * k).sum(2).softmax(1)  # (frames, frames, sequences · heads)
        change = (weights[:, :, None] * v).sum(1).unflatten(2, (-1, heads))
        made.append(change.permute(2, 0, 3, 1).to(query.dtype).flatten(2))
    return torch.cat(made)
