"""A tiny cascade in the layout of the released repositories, with weights that follow from their names.

`build(folder)` writes it; `python -m tests.tiny` records its numbers in tests/tiny.safetensors. They were recorded with
the code that reproduces the original program's numbers on a larger cascade of the same kind (keyframes to 1e-5).
"""

import copy
import io
import json
import zlib
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from show_1.models import UNet3DConditionModel

NUMBERS = Path(__file__).with_name("tiny.safetensors")
PROMPT, SEED = "A cat jumps", 7

PIXEL = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "attention_head_dim": 16,
    "block_out_channels": [32, 64],
    "cross_attention_dim": 32,
    "cross_attention_norm": "group_norm",
    "down_block_types": ["ResnetDownsampleBlock3D", "SimpleCrossAttnDownBlock3D"],
    "encoder_hid_dim": 16,
    "encoder_hid_dim_type": "text_proj",
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock3DSimpleCrossAttn",
    "norm_num_groups": 8,
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
    "up_block_types": ["SimpleCrossAttnUpBlock3D", "ResnetUpsampleBlock3D"],
}
UPSCALE = PIXEL | {
    "class_embed_type": "timestep",
    "in_channels": 6,
    "layers_per_block": [1, 2],
    "mid_block_scale_factor": 1.4142271248762552,
    "resnet_out_scale_factor": 1.4142271248762552,
    "resnet_skip_time_act": True,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 48,
}
LATENT = {
    "act_fn": "silu",
    "attention_head_dim": [2, 4],
    "block_out_channels": [32, 64],
    "cross_attention_dim": 32,
    "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock3DCrossAttn",
    "norm_num_groups": 8,
    "out_channels": 4,
    "transfromer_in_opt": True,
    "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
    "use_linear_projection": True,
}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000}
DPM = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "solver_order": 2} | COSINE
DPM_PIXEL = DPM | {"dynamic_thresholding_ratio": 0.95, "thresholding": True, "variance_type": "fixed_small"}
DDPM = {"_class_name": "DDPMScheduler", "variance_type": "fixed_small"} | COSINE

CASCADE = """
name = "Tiny"
fps = 8

[keyframes]
model = "showlab/show-1-base"
frames = 8
height = 4
width = 6
steps = 3
guidance = 9.0

[interpolation]
model = "showlab/show-1-interpolation"
steps = 2
guidance = 4.0

[first_frame]
model = "DeepFloyd/IF-II-L-v1.0"
variant = "fp16"
steps = 2
guidance = 4.0
noise_level = 150

[pixel_upscale]
model = "showlab/show-1-sr1"
steps = 2
guidance = 7.0
noise_level = 250

[latent_upscale]  # 7 by 9 latents: neither size halves evenly
model = "showlab/show-1-sr2"
height = 14
width = 18
steps = 4
strength = 0.8
guidance = 15.0
negative_prompt = "low resolution, blur"
"""


def build(folder: Path) -> Path:
    """Write the whole cascade, every weight file in the form that the released one has; return its TOML file."""
    base, interpolation, sr1, sr2 = (
        folder / "showlab" / f"show-1-{name}" for name in ("base", "interpolation", "sr1", "sr2")
    )
    first_frame = folder / "DeepFloyd" / "IF-II-L-v1.0"
    _write_scheduler(base / "scheduler", DPM_PIXEL | {"lambda_min_clipped": -5.1, "sample_max_value": 1.5})
    _write_scheduler(interpolation / "scheduler", DPM_PIXEL | {"lambda_min_clipped": -5.1, "sample_max_value": 1.5})
    _write_scheduler(sr1 / "scheduler", DPM_PIXEL | {"lambda_min_clipped": float("-inf"), "sample_max_value": 1.0})
    _write_scheduler(sr1 / "image_noising_scheduler", DDPM)
    _write_scheduler(sr2 / "scheduler", DPM | {"beta_schedule": "scaled_linear", "beta_end": 0.012, "steps_offset": 1})
    _write_scheduler(first_frame / "scheduler", DDPM | {"thresholding": True, "variance_type": "learned_range"})
    _write_scheduler(first_frame / "image_noising_scheduler", DDPM)

    _write_model(UNet3DConditionModel.from_config(PIXEL), "base", base / "unet")
    _write_model(UNet3DConditionModel.from_config(PIXEL | {"in_channels": 7}), "interpolation", interpolation / "unet")
    _write_model(UNet3DConditionModel.from_config(UPSCALE), "sr1", sr1 / "unet")
    _write_model(UNet3DConditionModel.from_config(LATENT), "sr2", sr2 / "unet")
    pictures = UNet2DConditionModel.from_config(json.loads(json.dumps(UPSCALE).replace("3D", "2D")))
    _write_model(pictures, "first_frame", first_frame / "unet", form="fp16.safetensors")
    autoencoder = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=0.18215,
    )
    _write_model(autoencoder, "vae", sr2 / "vae")
    t5 = T5EncoderModel(
        T5Config(vocab_size=64, d_model=16, d_kv=8, num_heads=2, d_ff=32, num_layers=2, feed_forward_proj="gated-gelu")
    )
    _write_model(t5, "t5", base / "text_encoder", form="shards")
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=512,
            eos_token_id=513,
        )
    )
    _write_model(clip, "clip", sr2 / "text_encoder")
    _write_tokenizers(base / "tokenizer", sr2 / "tokenizer")

    (base / "model_index.json").write_text(
        json.dumps({"unet": ["showone.models.unet_3d_condition", "UNet3DConditionModel"]})
    )
    toml = folder / "cascade.toml"
    toml.write_text(CASCADE)
    return toml


def fill(name: str, shape: torch.Size, component: str) -> torch.Tensor:
    z = np.random.RandomState(zlib.crc32(f"{component}:{name}".encode())).standard_normal(shape)
    if len(shape) > 1:
        z = z / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        z = 1 + 0.1 * z
    else:
        z = 0.05 * z
    return torch.from_numpy(0.1 * z if name in ("conv_out.weight", "conv_out.bias") else z).half()


def _write_model(model: torch.nn.Module, component: str, folder: Path, form: str = "bin") -> None:
    """Write config.json and the weights, as `.bin`, as `.bin` in two shards, or as the fp16 variant."""
    folder.mkdir(parents=True)
    (model.save_config if hasattr(model, "save_config") else model.config.save_pretrained)(folder)
    weights = {
        name: fill(name, tensor.shape, component)
        for name, tensor in model.state_dict().items()
        if name != "encoder.embed_tokens.weight"  # T5's `shared.weight`, by another name
    }
    stem = "diffusion_pytorch_model" if hasattr(model, "save_config") else "pytorch_model"
    if form == "bin":
        torch.save(weights, folder / f"{stem}.bin")
    elif form == "shards":
        names = sorted(weights)
        index = {}
        for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
            shard = f"{stem}-{number:05}-of-00002.bin"
            torch.save({name: weights[name] for name in part}, folder / shard)
            index |= dict.fromkeys(part, shard)
        (folder / f"{stem}.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    else:
        save_file(weights, folder / f"{stem}.{form}", metadata={"format": "pt"})


def _write_scheduler(folder: Path, config: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "scheduler_config.json").write_text(json.dumps(config))  # -Infinity stands bare, as in the released ones


def _write_tokenizers(t5: Path, clip: Path) -> None:
    t5.mkdir(parents=True)
    sentences = ["a cat jumps", "the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"]
    learned = io.BytesIO()  # not a file, whose path would be in it
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=learned,
        vocab_size=48,
        hard_vocab_limit=False,
        model_type="char",
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (t5 / "spiece.model").write_bytes(learned.getvalue())
    (t5 / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    clip.mkdir(parents=True)
    # CLIP's alphabet: a printable character for each byte, alone and at the end of a word.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (clip / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (clip / "merges.txt").write_text("#version: 0.2\n")
    (clip / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "!"})
    )


def numbers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what is kept of a run: all of the small tensors, of the large ones every fourth pixel each way."""
    kept = {name: copy.copy(tensor) for name, tensor in tensors.items()}
    for name in ("pixel_upscaled", "video"):
        kept[name] = tensors[name][..., ::4, ::4]
    return {name: tensor.contiguous() for name, tensor in kept.items()}


if __name__ == "__main__":
    import tempfile

    from show_1 import Show1Pipeline

    with tempfile.TemporaryDirectory() as folder:
        pipeline = Show1Pipeline.from_cascade(build(Path(folder)), "cpu", torch.float64)
        save_file({name: t.float() for name, t in numbers(pipeline(PROMPT, seed=SEED).tensors).items()}, NUMBERS)
