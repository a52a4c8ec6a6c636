"""Mini's models: the same classes as the released ones, small enough to train and run on two cores.

Widths are multiples of 32, since the temporal convolutions normalise in 32 groups whatever the configuration says.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from show_1.errors import Show1Error, first_line
from show_1.models import UNet3DConditionModel

TEXT_WIDTH = 128
LATENT_TEXT_WIDTH = 64
LATENT_CHANNELS = 12

_PIXEL = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": TEXT_WIDTH,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": TEXT_WIDTH,
    "encoder_hid_dim_type": "text_proj",
    "norm_num_groups": 16,
    "out_channels": 3,
    "resnet_time_scale_shift": "scale_shift",
}
_SMALL = _PIXEL | {
    "sample_size": 32,
    "down_block_types": ["ResnetDownsampleBlock3D", "SimpleCrossAttnDownBlock3D", "SimpleCrossAttnDownBlock3D"],
    "mid_block_type": "UNetMidBlock3DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock3D", "SimpleCrossAttnUpBlock3D", "ResnetUpsampleBlock3D"],
}
_UPSCALE = _PIXEL | {
    "block_out_channels": [32, 32, 64, 96],
    "class_embed_type": "timestep",
    "in_channels": 6,
    "layers_per_block": 1,
    "sample_size": 128,
    "down_block_types": ["ResnetDownsampleBlock3D"] * 3 + ["SimpleCrossAttnDownBlock3D"],
    "mid_block_type": "UNetMidBlock3DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock3D"] + ["ResnetUpsampleBlock3D"] * 3,
}
_LATENT = {
    "act_fn": "silu",
    "attention_head_dim": [1, 1, 2],
    "block_out_channels": [32, 32, 64],
    "cross_attention_dim": LATENT_TEXT_WIDTH,
    "down_block_types": ["DownBlock3D", "DownBlock3D", "CrossAttnDownBlock3D"],
    "in_channels": LATENT_CHANNELS,
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock3DCrossAttn",
    "out_channels": LATENT_CHANNELS,
    "sample_size": 72,
    "transfromer_in_opt": False,
    "up_block_types": ["CrossAttnUpBlock3D", "UpBlock3D", "UpBlock3D"],
    "use_linear_projection": True,
}
UNETS = {
    "keyframes": _SMALL
    | {"in_channels": 3, "block_out_channels": [32, 96, 96], "layers_per_block": [3, 2, 2], "time_embedding_dim": 256}
    | {"down_block_types": ["ResnetDownsampleBlock3D"] * 2 + ["SimpleCrossAttnDownBlock3D"]}
    | {"up_block_types": ["SimpleCrossAttnUpBlock3D"] + ["ResnetUpsampleBlock3D"] * 2},
    "interpolation": _SMALL
    | {"attention_head_dim": 8, "in_channels": 7, "block_out_channels": [32, 64, 64], "layers_per_block": 1},
    "pixel_upscale": _UPSCALE,
    "latent_upscale": _LATENT,
}


def video_unet(stage: str) -> UNet3DConditionModel:
    """Return a new UNet whose temporal layers change nothing yet, so that it starts as its pictures' UNet."""
    unet = UNet3DConditionModel.from_config(UNETS[stage])
    for name, module in unet.named_modules():
        if "temp_attentions" in name and name.endswith(".proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the data never ends, so there is nothing to overfit
    start_from_condition(unet)
    return unet


def picture_unet(stage: str) -> UNet2DConditionModel:
    """Return a new UNet with the spatial layers of a stage's video UNet alone."""
    unet = UNet2DConditionModel.from_config(json.loads(json.dumps(UNETS[stage]).replace("3D", "2D")))
    start_from_condition(unet)
    return unet


@torch.no_grad()
def start_from_condition(unet: UNet2DConditionModel) -> None:
    """Have a UNet that is conditioned on a picture or clip predict that very one, the plain way that it has to better.

    Its last ResNet is handed the condition's colours past all other layers, and only what is missing remains to be
    learned. The normalisation before `conv_out` would take each colour's mean and contrast away; they survive beside a
    channel of known and greater variance: the sample's noise, which is subtracted again in the end. So this holds at
    the highest noise level, where one-step samplers start. GELU lets z through as GELU(z) − GELU(−z); to shift z to
    where GELU is straight would cost bfloat16 too much (31 dB against 42, measured). A UNet without a condition is left
    as it is.
    """
    if unet.config.in_channels == unet.config.out_channels:
        return
    strength = 4.0  # of the noise beside a colour: more costs half precision, less the colour
    last, width = unet.up_blocks[-1].resnets[-1], unet.conv_in.out_channels
    if width != 2 * unet.conv_norm_out.num_groups:
        raise ValueError("The last normalisation has to be of two channels a group.")

    used = 4  # channels of the first layer: three colours, and the noise of the sample's first colour
    unet.conv_in.weight[:used] = 0
    unet.conv_in.bias[:used] = 0
    unet.conv_in.weight[range(used), [3, 4, 5, 0], 1, 1] = 1

    used = 14  # channels of the last layer: colour and noise, three times; the same again; noise and minus noise
    beside = range(used + 1, width, 2)  # noise beside each channel that is left to learn in: what is small stays small
    changing = [last.conv_shortcut, last.conv2]
    if hasattr(unet.up_blocks[-1], "temp_convs"):
        changing.append(unet.up_blocks[-1].temp_convs[-1].conv4[-1])
    for layer in changing:
        for channels in (slice(used), beside):
            layer.weight[channels] = 0
            layer.bias[channels] = 0
    handed_on = last.conv_shortcut.weight[:, -width:, 0, 0]
    handed_on[range(0, 12, 2), [0, 1, 2, 0, 1, 2]] = 1
    handed_on[range(1, 12, 2), 3] = strength
    handed_on[[12, 13], 3] = torch.tensor([strength, -strength])
    handed_on[beside, 3] = strength

    unet.conv_norm_out.weight[:used] = torch.tensor([1.0] * 6 + [-1.0] * 6 + [1.0] * 2)
    unet.conv_norm_out.bias[:used] = 0
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.zero_()
    pair, noise = strength / 2**0.5 * torch.tensor([-1.0, 1, 1, -1]), strength * torch.tensor([-1.0, 1])
    for colour in range(3):  # the velocity: minus the colour
        first, again = 2 * colour, 2 * colour + 6
        unet.conv_out.weight[colour, [first, first + 1, again, again + 1], 1, 1] = pair
        unet.conv_out.weight[colour, [12, 13], 1, 1] = noise


def spatial_part(unet: UNet3DConditionModel, stage: str) -> UNet2DConditionModel:
    """Return a picture UNet whose parameters are those of a stage's video UNet, without its temporal layers."""
    with torch.device("meta"):
        part = picture_unet(stage)
    for name, module in part.named_modules():
        for key in list(module._parameters):
            if module._parameters[key] is not None:
                module._parameters[key] = unet.get_parameter(f"{name}.{key}" if name else key)
    return part


def inputs_of(layer: nn.Module, model: nn.Module, *inputs: torch.Tensor) -> tuple:
    """Return what a layer of a model is given; the layer and those after it are not run."""

    class Reached(Exception):
        pass

    def reached(_layer: nn.Module, given: tuple) -> None:
        raise Reached(*given)

    hook = layer.register_forward_pre_hook(reached)
    try:
        model(*inputs)
    except Reached as found:
        return found.args
    finally:
        hook.remove()
    raise ValueError("The model does not run this layer.")


def cores() -> int:
    """Return how many of this computer's cores this program may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def text_encoder(vocabulary: int) -> T5EncoderModel:
    """Return a new T5 encoder of two layers for the pixel stages."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=32,
            num_heads=4,
            d_ff=256,
            num_layers=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )


def latent_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return a new CLIP text encoder of one layer for the latent upscale."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=LATENT_TEXT_WIDTH,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def autoencoder() -> AutoencoderKL:
    """Return a new autoencoder, four times smaller a side, of twelve channels: eight and four would cost detail."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=160,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def scheduler(*, thresholding: bool) -> DPMSolverMultistepScheduler:
    """Return the sampler of every mini model: the pixel models' cosine schedule, predicting the velocity."""
    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        beta_end=0.02,
        prediction_type="v_prediction",
        thresholding=thresholding,
        sample_max_value=1.0,
        final_sigmas_type="zero",
        lower_order_final=True,
    )


def image_noising_scheduler() -> DDPMScheduler:
    """Return what adds noise to an upscaler's condition."""
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", beta_end=0.02)


def train_t5_tokenizer(captions: Iterable[str], folder: Path) -> T5Tokenizer:
    """Learn a SentencePiece vocabulary from captions; save it as `spiece.model` in the folder.

    Raises Show1Error where it cannot be saved.
    """
    learned = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=learned,
        normalization_rule_name="identity",  # the usual rules are 240 kB, for characters that none of mini's words has
        vocab_size=700,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 77}
    with _made_whole(folder) as making:
        (making / "spiece.model").write_bytes(learned.getvalue())
        (making / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return T5Tokenizer.from_pretrained(folder)


def train_clip_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary from captions; save it in CLIP's form in the folder.

    Raises Show1Error where it cannot be saved.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    learner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False),
    )
    learned = json.loads(learner.to_str())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in learned["merges"]]
    pieces = alphabet + [f"{letter}</w>" for letter in alphabet] + [merge.replace(" ", "") for merge in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    with _made_whole(folder) as making:
        (making / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, indent=1) + "\n")
        (making / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        (making / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


@contextlib.contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, which bears its name only once it is full: there may be no half of one."""
    making = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    with telling_what_cannot_be_saved():
        making.mkdir(parents=True)
        yield making
        os.replace(making, folder)


@contextlib.contextmanager
def telling_what_cannot_be_saved() -> Iterator[None]:
    """Raise Show1Error where what is saved in it cannot be: on a full disk, for one."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch says a full disk with a RuntimeError
        raise Show1Error(
            f"The training cannot be saved: {first_line(error)}.",
            "Free some space and start again: all that was saved before is whole.",
        ) from error
