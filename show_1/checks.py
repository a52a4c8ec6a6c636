"""What would fail in the middle of a video is refused before: models, schedulers and sizes that do not go together.

All of it raises Show1Error, which names the cascade's file and the table.
"""

import math
from typing import TYPE_CHECKING

import torch

from show_1.errors import Show1Error, first_line
from show_1.models import frame_multiple
from show_1.stages.denoise import try_steps
from show_1.text import TOKENS

if TYPE_CHECKING:
    from show_1.pipeline import Show1Pipeline

# What may condition a UNet besides its time, by the keys of its configuration: all that the stages can give.
GIVEN = {
    "class_embed_type": (None, "timestep"),
    "num_class_embeds": (None,),
    "addition_embed_type": (None, "text"),
    "encoder_hid_dim_type": (None, "text_proj"),
}


def check_models(pipeline: "Show1Pipeline") -> None:
    """Refuse a model in the table of another one."""
    cascade, upscale, last = pipeline.cascade, pipeline.pixel_upscale, pipeline.latent_upscale
    latents = last.vae.config.latent_channels
    t5, clip = pipeline.keyframes.text_encoder.config.d_model, last.text_encoder.config.hidden_size
    for table, unet, *gives in (
        ("keyframes", pipeline.keyframes.unet, 3, t5, False),
        ("interpolation", pipeline.interpolation.unet, 7, t5, False),  # with the keyframes, and where they are
        ("first_frame", upscale.first_frame_unet, 6, t5, True),  # with what is to be enlarged
        ("pixel_upscale", upscale.unet, 6, t5, True),
        ("latent_upscale", last.unet, latents, clip, False),
    ):
        its_unet = f"{cascade.file}, table [{table}]: the UNet of {getattr(cascade, table).model}"
        remedy = "Name the model that was made for this stage."
        text = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
        text = text[0] if isinstance(text, list | tuple) and len(set(text)) == 1 else text
        takes = [unet.config.in_channels, text, unet.config.class_embed_type is not None]
        if takes != gives:
            raise Show1Error(f"{its_unet} takes {_inputs(*takes)}, and this stage has {_inputs(*gives)}.", remedy)
        for key, given in GIVEN.items():
            if (value := unet.config.get(key)) not in given:
                raise Show1Error(f"{its_unet} has {key} = {value!r}, for which this stage has nothing to give.", remedy)
        channels = latents if table == "latent_upscale" else 3
        if unet.config.out_channels < channels:
            raise Show1Error(
                f"{its_unet} gives {unet.config.out_channels} channels, and this stage needs {channels}.", remedy
            )
    for table, stage in (("keyframes", pipeline.keyframes), ("latent_upscale", last)):
        config = stage.text_encoder.config
        # T5's hundred sentinels, which no prompt has, may be beyond what a small encoder knows.
        tokens = sum(not token.startswith("<extra_id_") for token in stage.tokenizer.get_vocab())
        places = getattr(config, "max_position_embeddings", TOKENS)  # T5 counts none
        if config.vocab_size < tokens or places < TOKENS:
            raise Show1Error(
                f"{cascade.file}, table [{table}]: the text encoder of {getattr(cascade, table).model} knows "
                f"{config.vocab_size} tokens and reads {places} at once, and is given {TOKENS} of {tokens}.",
                "Take the folders text_encoder and tokenizer from the model that was made for this stage.",
            )


def _inputs(channels: int, text: int, noise_level: bool) -> str:
    return f"{channels} channels, text {text} wide, and {'a' if noise_level else 'no'} noise level"


def check_schedulers(pipeline: "Show1Pipeline") -> None:
    """Refuse steps and noise levels that would fail, or give no numbers."""
    cascade, upscale, last = pipeline.cascade, pipeline.pixel_upscale, pipeline.latent_upscale
    for table, scheduler, unet, channels in (
        ("keyframes", pipeline.keyframes.scheduler, pipeline.keyframes.unet, 3),
        ("interpolation", pipeline.interpolation.scheduler, pipeline.interpolation.unet, 3),
        ("first_frame", upscale.first_frame_scheduler, upscale.first_frame_unet, 3),
        ("pixel_upscale", upscale.scheduler, upscale.unet, 3),
        ("latent_upscale", last.scheduler, last.unet, last.vae.config.latent_channels),
    ):
        settings = getattr(cascade, table)
        run = int(settings.steps * getattr(settings, "strength", 1))
        try:
            schedule = getattr(settings, "schedule", None)
            try_steps(scheduler, settings.steps, run, schedule, channels, unet.config.out_channels)
        except Exception as error:  # whatever a scheduler raises for values that are none
            raise Show1Error(
                f"{cascade.file}, table [{table}]: the scheduler of {settings.model} fails at steps = "
                f"{settings.steps}: {first_line(error)}.",
                "Give fewer steps, no schedule, or another scheduler_config.json.",
            ) from error
    for table, scheduler in (
        ("first_frame", upscale.first_frame_image_noising_scheduler),
        ("pixel_upscale", upscale.image_noising_scheduler),
    ):
        level, trained = getattr(cascade, table).noise_level, scheduler.config.num_train_timesteps
        if level >= trained:
            raise Show1Error(
                f"{cascade.file}, table [{table}]: noise_level = {level} is beyond the {trained} levels of its "
                "image_noising_scheduler.",
                f"Give a whole number from 0 to {trained - 1}.",
            )
        try:
            nothing = torch.zeros(1, 3, 1, 1)
            scheduler.add_noise(nothing, nothing, torch.tensor([level]))
        except Exception as error:  # as above
            raise Show1Error(
                f"{cascade.file}, table [{table}]: the image_noising_scheduler fails at noise_level = {level}: "
                f"{first_line(error)}.",
                "Take its scheduler_config.json from the model's repository again.",
            ) from error


def check_sizes(pipeline: "Show1Pipeline") -> None:
    """Refuse frame sizes that the models cannot take; the error says which multiple they want."""
    upscale, last = pipeline.pixel_upscale, pipeline.latent_upscale
    small = math.lcm(frame_multiple(pipeline.keyframes.unet), frame_multiple(pipeline.interpolation.unet))
    large = math.lcm(frame_multiple(upscale.first_frame_unet), frame_multiple(upscale.unet))
    latent = 2 ** (len(last.vae.config.block_out_channels) - 1)
    multiples = {
        "keyframes": math.lcm(small, large // math.gcd(large, 4)),  # the pixel upscale's frames are 4 times as high
        "latent_upscale": math.lcm(latent * frame_multiple(last.unet), 2),
    }
    for table, multiple in multiples.items():
        for key in ("height", "width"):
            size = getattr(getattr(pipeline.cascade, table), key)
            if size % multiple:
                raise Show1Error(
                    f"{pipeline.cascade.file}, table [{table}]: {key} = {size} does not suit these models.",
                    f"Give a multiple of {multiple}, as {max(round(size / multiple), 1) * multiple}.",
                )
