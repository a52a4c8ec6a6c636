"""A cascade's stages for measuring: with its own weights, or in full size with random ones and no download."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from show_1 import Show1Error, Show1Pipeline, hub, loading
from show_1.cascade import BUNDLED, STAGES, Cascade
from show_1.models import UNet3DConditionModel
from show_1.placement import dtype_of
from show_1.stages import InterpolationPipeline, KeyframesPipeline, LatentUpscalePipeline, PixelUpscalePipeline

# The released models' own configuration files, where the folder of the tests does not hold them already.
CONFIGS = Path(__file__).parent / "configs"
UNETS = Path(__file__).parents[1] / "tests" / "configs"
MINI = BUNDLED.parent / "mini"  # for its tokenizers: what the tokens mean does not matter here


def load(cascade: Cascade, device: torch.device, dtype: torch.dtype, random: bool) -> Show1Pipeline:
    """Return the cascade's pipeline, placed nowhere yet: on the CPU, or on `device` where its weights are random."""
    if random:
        return _random_pipeline(cascade, device, dtype)
    return Show1Pipeline(cascade, *loading.load_stages(cascade, hub.fetch(cascade), dtype))


def _random_pipeline(cascade: Cascade, device: torch.device, dtype: torch.dtype) -> Show1Pipeline:
    for table in STAGES:
        name = getattr(cascade, table).model.split("/")[-1]
        if not (CONFIGS / name).is_dir() or "/" not in getattr(cascade, table).model:
            raise Show1Error(
                f"{cascade.name}: no configuration is kept of the model of [{table}], {name}.",
                "Leave out --weights random, or take the cascade show-1.",
            )

    def model(model_class: type, config: dict, component: str = "unet") -> torch.nn.Module:
        return random_model(model_class, config, device, dtype_of(component, dtype))

    def unet(name: str) -> UNet3DConditionModel:
        return model(UNet3DConditionModel, json.loads((UNETS / f"{name}.json").read_text()))

    def config(name: str) -> dict:
        return json.loads((CONFIGS / name / "config.json").read_text())

    def scheduler(name: str) -> SchedulerMixin:
        return loading.load_scheduler(CONFIGS / name)

    return Show1Pipeline(
        cascade,
        KeyframesPipeline(
            T5Tokenizer.from_pretrained(MINI / "show-1-base" / "tokenizer"),
            model(T5EncoderModel, config("show-1-base/text_encoder"), "text_encoder"),
            unet("show-1-base"),
            scheduler("show-1-base/scheduler"),
        ),
        InterpolationPipeline(unet("show-1-interpolation"), scheduler("show-1-interpolation/scheduler")),
        PixelUpscalePipeline(
            unet("show-1-sr1"),
            scheduler("show-1-sr1/scheduler"),
            scheduler("show-1-sr1/image_noising_scheduler"),
            model(UNet2DConditionModel, config("IF-II-L-v1.0/unet")),
            scheduler("IF-II-L-v1.0/scheduler"),
            scheduler("IF-II-L-v1.0/image_noising_scheduler"),
        ),
        LatentUpscalePipeline(
            CLIPTokenizer.from_pretrained(MINI / "show-1-sr2" / "tokenizer"),
            model(CLIPTextModel, config("show-1-sr2/text_encoder"), "text_encoder"),
            model(AutoencoderKL, config("show-1-sr2/vae")),
            unet("show-1-sr2"),
            scheduler("show-1-sr2/scheduler"),
        ),
    )


def random_model(model_class: type, config: dict, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Return a model of this configuration, made on the device, the same weights at each call.

    It is in this dtype, and in float32 at the least where it would be so when loaded.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            if model_class is T5EncoderModel:
                model = T5EncoderModel(T5Config(**config))
            elif model_class is CLIPTextModel:
                model = CLIPTextModel(CLIPTextConfig(**config))
            else:
                model = model_class.from_config(config)
    finally:
        torch.set_default_dtype(before)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
        # Temporal convolutions begin at zero, and so would add nothing to what is compared.
        if name.endswith("conv4.3.weight"):
            torch.nn.init.normal_(parameter, std=0.1 / parameter[0].numel() ** 0.5)
    return model.eval().requires_grad_(False)
