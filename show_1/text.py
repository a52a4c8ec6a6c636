"""Prompts to embeddings: T5 for the pixel stages, CLIP for the latent one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

TOKENS = 77  # what every text encoder of the cascade is given, padded


@dataclass(frozen=True)
class TextEmbeddings:
    """The states of one or more prompts, (prompts, 77, features), and of their negative prompt, (1, 77, features)."""

    prompt: torch.Tensor
    negative: torch.Tensor


@torch.no_grad()
def encode_t5(
    tokenizer: PreTrainedTokenizerBase, encoder: T5EncoderModel, prompts: str | Sequence[str], device: torch.device
) -> TextEmbeddings:
    """Encode as DeepFloyd IF does: stripped and lower-cased, padding masked; the negative prompt is empty."""
    tokens = _tokenize(tokenizer, [*map(_t5_text, listed(prompts)), ""]).to(device)
    states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return TextEmbeddings(states[:-1], states[-1:])


@torch.no_grad()
def encode_clip(
    tokenizer: PreTrainedTokenizerBase,
    encoder: CLIPTextModel,
    prompts: str | Sequence[str],
    negative_prompt: str,
    device: torch.device,
) -> TextEmbeddings:
    """Encode as Stable Diffusion 2 and ZeroScope do: the last hidden states, padding not masked."""
    tokens = _tokenize(tokenizer, [*listed(prompts), negative_prompt]).to(device)
    states = encoder(tokens.input_ids).last_hidden_state
    return TextEmbeddings(states[:-1], states[-1:])


def listed(prompts: str | Sequence[str]) -> list[str]:
    """Return one prompt or several as a list."""
    return [prompts] if isinstance(prompts, str) else list(prompts)


def dropped_words(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return the end of the prompt that does not fit into 77 tokens, from the first word that is not whole; or ""."""
    offsets = tokenizer(_t5_text(prompt), return_offsets_mapping=True).offset_mapping
    if len(offsets) <= TOKENS:
        return ""
    text = _t5_text(prompt)
    cut = offsets[TOKENS - 1][0]  # one place goes to the end token
    return text[text.rfind(" ", 0, cut + 1) + 1 :]


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]):
    return tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")


def _t5_text(prompt: str) -> str:
    return prompt.lower().strip()
