"""Prompts to embeddings: T5 for the pixel stages, CLIP for the latent one."""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

TOKENS = 77  # what every text encoder of the cascade is given, padded
_one_at_a_time = threading.Lock()  # a tokenizer keeps for all threads how a call wants texts padded and cut


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
    """Return the end of the prompt that does not fit into 77 tokens, from the first word that is not whole; or "".

    As it was typed, but where small letters are not as many as capitals.
    """
    text, typed = _t5_text(prompt), prompt.strip()
    with _one_at_a_time:
        offsets = tokenizer(text, return_offsets_mapping=True, verbose=False).offset_mapping
    if len(offsets) <= TOKENS:
        return ""
    cut = offsets[TOKENS - 1][0]  # one place goes to the end token
    last_word = re.search(r"\s(\S*)\Z", text[: cut + 1])
    begin = last_word.start(1) if last_word else cut  # Chinese, for one, has no spaces
    return (typed if len(typed) == len(text) else text)[begin:]


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]):
    with _one_at_a_time:
        return tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")


def _t5_text(prompt: str) -> str:
    return prompt.lower().strip()
