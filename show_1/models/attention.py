"""Attention over a clip's few frames, whose heads are of sizes that PyTorch has no quick kernel for."""

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from show_1.models import try_kernels


class FrameAttention(AttnProcessor2_0):
    """diffusers' processor, the same numbers; with a kernel of ours for short sequences of odd heads on a GPU.

    The pixel family's temporal attention has 64 heads of 10 to 20 features over 5 or 8 frames, for every pixel. In half
    precision PyTorch's fused kernels want multiples of 8 features, and what remains is batches of tiny matrix products.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Return hidden states of the given shape, (sequences, frames, channels)."""
        plain = encoder_hidden_states is None and attention_mask is None
        if plain and try_kernels.suit(hidden_states) and _suits_kernel(attn, hidden_states):
            query, key, value = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
            change = try_kernels.attempt("short_attention", query, key, value, attn.heads)
            if change is not None:
                for layer in attn.to_out:
                    change = layer(change)
                change = change + hidden_states if attn.residual_connection else change
                return change if attn.rescale_output_factor == 1 else change / attn.rescale_output_factor
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)


def _suits_kernel(attn: Attention, hidden_states: torch.Tensor) -> bool:
    if any((attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k)) or attn.inner_kv_dim != attn.inner_dim:
        return False
    features = attn.inner_dim // attn.heads
    return hidden_states.ndim == 3 and hidden_states.shape[1] <= 16 and features <= 64 and features % 8 != 0
