"""Folders to stages: each component by its subfolder, whatever model_index.json says, and strictly."""

import contextlib
import errno
import hashlib
import inspect
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from show_1 import hub, placement
from show_1.cascade import Cascade
from show_1.errors import Show1Error, first_line, memory_is_full
from show_1.models import UNet3DConditionModel
from show_1.stages import InterpolationPipeline, KeyframesPipeline, LatentUpscalePipeline, PixelUpscalePipeline
from show_1.stages.denoise import Stage
from show_1.text import TOKENS

Folders = Mapping[str, Path]  # where the model of each table is, as `hub.fetch` returns it
# What the system says of files that are in order; libraries say others of those that are cut short.
UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SCHEDULERS = {each.__name__: each for each in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler)}


class Repository:
    """The fetched model of one table of a cascade, whose components load one by one in one dtype."""

    def __init__(self, cascade: Cascade, table: str, folder: Path, dtype: torch.dtype):
        self.table, self.folder, self.dtype = table, folder, dtype
        self.variant = hub.variant(cascade, table)

    def model(self, model_class: type, component: str) -> torch.nn.Module:
        """Return a component with its weights, in evaluation mode, on the CPU.

        Raises Show1Error for damaged files and where not every key and shape of the files and the model match, and what
        `memory_is_full` knows where the computer's memory is.
        """
        weights = hub.weights_in(self.folder, self.table, component, self.variant)
        dtype_name = "dtype" if issubclass(model_class, (T5EncoderModel, CLIPTextModel)) else "torch_dtype"
        try:
            with _quiet():
                model, info = model_class.from_pretrained(
                    self.folder / component,
                    variant=weights.variant,
                    use_safetensors=weights.format == "safetensors",
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # told below, with the key's name
                    **{dtype_name: placement.dtype_of(component, self.dtype)},
                )
            _check_numbers(model)
        except Exception as error:  # whatever a damaged file makes the libraries raise
            if memory_is_full(error):
                raise
            raise self._damaged(component, weights, error) from error
        # Of shards diffusers believes their index: what they lack is still without numbers, as what does not fit is.
        info["lacking_keys"] = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys", "lacking_keys"):
            for key in sorted(info[fault], key=str):
                name, *shapes = key if isinstance(key, tuple) else (key,)
                what = {
                    "missing_keys": f"lacks the weight {name}",
                    "lacking_keys": f"lacks the weight {name}",
                    "unexpected_keys": f"holds {name}, which the model does not have",
                    "mismatched_keys": f"holds {name} in the wrong shape"
                    + (f", {list(shapes[0])} instead of {list(shapes[1])}" if len(shapes) == 2 else ""),
                }[fault]
                files = self._files(component, weights)
                raise Show1Error(
                    f"The model of [{self.table}] does not fit its config.json: {files} {what}.",
                    "Take the weights and config.json of this folder from the same model.",
                )
        return model.eval()

    def scheduler(self, component: str) -> SchedulerMixin:
        """Return a scheduler, see `load_scheduler`; raises Show1Error for one that will not do in its place."""
        try:
            scheduler = load_scheduler(self.folder / component)
            if component == "image_noising_scheduler" and not isinstance(scheduler, DDPMScheduler):
                raise ValueError("what adds noise to an image is a DDPMScheduler")  # others count levels otherwise
            return scheduler
        except Exception as error:  # whatever values that are none make the library raise
            raise self._bad_config(component, first_line(error)) from error

    def tokenizer(self, tokenizer_class: type) -> PreTrainedTokenizerBase:
        """Return the tokenizer; raises Show1Error where its files are damaged."""
        try:
            with _quiet():
                tokenizer = tokenizer_class.from_pretrained(self.folder / "tokenizer")
            tokenizer("a cat", padding="max_length", max_length=TOKENS, truncation=True)
            if not isinstance(tokenizer.model_max_length, int | float):
                raise ValueError("model_max_length is no number")
            if tokenizer_class is CLIPTokenizer:
                _check_merges(tokenizer)
            return tokenizer
        except Exception as error:
            # The library's own words mislead: of a spiece.model cut short it says to install tiktoken.
            unread = isinstance(error, OSError) and error.errno in UNREADABLE
            why = os.strerror(error.errno) if unread else "a file there is damaged or cut short"
            raise self._bad_config("tokenizer", why) from error

    def _files(self, component: str, weights: hub.WeightFiles) -> str:
        return ", ".join(str(self.folder / component / name) for name in weights.names if not name.endswith(".json"))

    def _damaged(self, component: str, weights: hub.WeightFiles, error: Exception) -> Show1Error:
        for name in weights.names:
            fault = _fault(file := self.folder / component / name)
            if isinstance(fault, OSError) and fault.errno in UNREADABLE:
                return Show1Error(
                    f"A weight file of [{self.table}] cannot be read: {file}, {os.strerror(fault.errno)}.",
                    "See that it is yours to read, and its disk in order.",
                )
            if fault:
                return Show1Error(
                    f"A weight file of [{self.table}] is damaged or cut short: {file}.",
                    "Remove it and fetch it again.",
                )
        return Show1Error(
            f"The model of [{self.table}] does not load from {self.folder / component}: {first_line(error)}.",
            "Take the weights and config.json of this folder from the same model.",
        )

    def _bad_config(self, component: str, why: str) -> Show1Error:
        return Show1Error(
            f"The {component} of [{self.table}] does not load from {self.folder / component}: {why}.",
            "Take this folder from the model's repository again, or save it anew.",
        )


def load_scheduler(folder: Path) -> SchedulerMixin:
    """Return a scheduler of the class that its file names, with the original's end of the noise schedule.

    Raises ValueError, or what diffusers raises, for a file that will not do.
    """
    config = DPMSolverMultistepScheduler.load_config(folder)
    if config["_class_name"] not in SCHEDULERS:
        raise ValueError(f"{config['_class_name']!r} is none of {', '.join(SCHEDULERS)}")
    scheduler_class = SCHEDULERS[config["_class_name"]]
    if scheduler_class is DPMSolverMultistepScheduler:
        # The released files predate this key; then the last step went to the smallest sigma, not to zero.
        config.setdefault("final_sigmas_type", "sigma_min")
    scheduler = scheduler_class.from_config(config)
    if scheduler.config.prediction_type not in PREDICTIONS:  # which they do not look at before their first step
        raise ValueError(f"prediction_type {scheduler.config.prediction_type!r} is none of {', '.join(PREDICTIONS)}")
    return scheduler


def load_stages(
    cascade: Cascade, folders: Folders, dtype: torch.dtype
) -> tuple[KeyframesPipeline, InterpolationPipeline, PixelUpscalePipeline, LatentUpscalePipeline]:
    """Return the four stages, on the CPU; each raises Show1Error for a model that does not load."""
    return (
        load_keyframes(cascade, folders, dtype),
        load_interpolation(cascade, folders, dtype),
        load_pixel_upscale(cascade, folders, dtype),
        load_latent_upscale(cascade, folders, dtype),
    )


def load_keyframes(cascade: Cascade, folders: Folders, dtype: torch.dtype) -> KeyframesPipeline:
    """Return the first stage, on the CPU, with the T5 that reads for all pixel stages; raises Show1Error."""
    repository = Repository(cascade, "keyframes", folders["keyframes"], dtype)
    return KeyframesPipeline(
        tokenizer=repository.tokenizer(T5Tokenizer),
        text_encoder=repository.model(T5EncoderModel, "text_encoder"),
        unet=repository.model(UNet3DConditionModel, "unet"),
        scheduler=repository.scheduler("scheduler"),
    )


def load_interpolation(cascade: Cascade, folders: Folders, dtype: torch.dtype) -> InterpolationPipeline:
    """Return the second stage, on the CPU; raises Show1Error."""
    repository = Repository(cascade, "interpolation", folders["interpolation"], dtype)
    return InterpolationPipeline(
        unet=repository.model(UNet3DConditionModel, "unet"), scheduler=repository.scheduler("scheduler")
    )


def load_pixel_upscale(cascade: Cascade, folders: Folders, dtype: torch.dtype) -> PixelUpscalePipeline:
    """Return the third stage, on the CPU, with the model of the first frame; raises Show1Error."""
    repository = Repository(cascade, "pixel_upscale", folders["pixel_upscale"], dtype)
    first_frame = Repository(cascade, "first_frame", folders["first_frame"], dtype)
    return PixelUpscalePipeline(
        unet=repository.model(UNet3DConditionModel, "unet"),
        scheduler=repository.scheduler("scheduler"),
        image_noising_scheduler=repository.scheduler("image_noising_scheduler"),
        first_frame_unet=first_frame.model(UNet2DConditionModel, "unet"),
        first_frame_scheduler=first_frame.scheduler("scheduler"),
        first_frame_image_noising_scheduler=first_frame.scheduler("image_noising_scheduler"),
    )


def load_latent_upscale(cascade: Cascade, folders: Folders, dtype: torch.dtype) -> LatentUpscalePipeline:
    """Return the last stage, on the CPU, with its CLIP and autoencoder; raises Show1Error."""
    repository = Repository(cascade, "latent_upscale", folders["latent_upscale"], dtype)
    return LatentUpscalePipeline(
        tokenizer=repository.tokenizer(CLIPTokenizer),
        text_encoder=repository.model(CLIPTextModel, "text_encoder"),
        vae=repository.model(AutoencoderKL, "vae"),
        unet=repository.model(UNet3DConditionModel, "unet"),
        scheduler=repository.scheduler("scheduler"),
    )


def fingerprint(stages: Iterable[Stage]) -> str:
    """Return a few letters that differ where weights or configurations differ, from a sample of each tensor.

    What the libraries fill in by themselves, and the folder and versions of a model, have no part in them.
    """
    digest = hashlib.sha256()
    for stage in stages:
        for name, component in sorted(stage.components.items()):
            told = json.dumps(_configured(component), sort_keys=True, default=str)
            digest.update(f"{name} {type(component).__name__} {told}".encode())
            if isinstance(component, torch.nn.Module):
                for key, tensor in component.state_dict().items():
                    flat = tensor.detach().flatten()
                    sample = flat[:: max(len(flat) // 64, 1)].double().cpu()
                    digest.update(f"{name} {key} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _configured(component: Any) -> dict[str, Any]:
    """Return what a component's own configuration says; tokenizers have none that could be read alike."""
    config = getattr(component, "config", {})
    told = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
    filled_in = {"transformers_version", *told.get("_use_default_values", ())}
    return {key: value for key, value in told.items() if not key.startswith("_") and key not in filled_in}


def _check_numbers(model: torch.nn.Module) -> None:
    """Raise ValueError where a configuration of diffusers has a text for a number, which it meets in mid-video."""
    for each in type(model).__mro__:
        for name, parameter in inspect.signature(each.__init__).parameters.items():
            value = getattr(model.config, name, None)
            if isinstance(value, str) and isinstance(parameter.default, int | float):
                raise ValueError(f"{name} in its config.json is {value!r}, no number")
    if isinstance(model, AutoencoderKL):
        factors = model.config.scaling_factor, model.config.shift_factor or 0
        if not all(isinstance(factor, int | float) for factor in factors):
            raise ValueError("scaling_factor and shift_factor in its config.json are no numbers")


def _check_merges(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where the merges do not make all of the vocabulary: a file cut between two lines looks whole."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    made = {"".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]}
    for piece in set(model["vocab"]) - made - set(tokenizer.all_special_tokens):
        if len(piece.removesuffix("</w>")) > 1:
            raise ValueError(f"no merge makes {piece!r}")


def _fault(file: Path) -> Exception | None:
    """Return what keeps a weight file from being read, if anything does."""
    try:
        with file.open("rb"):
            pass
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        elif file.suffix == ".bin":
            torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        return error
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' bars and their advice to developers from people who asked for a video.

    One loads at a time: what a second one found, it would leave behind.
    """
    loggers = [logging.getLogger(library) for library in ("diffusers", "transformers")]
    with placement.BUILDING, warnings.catch_warnings():
        levels = [logger.level for logger in loggers]
        bars = [each for each in (diffusers_logging, transformers_logging) if each.is_progress_bar_enabled()]
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        for each in bars:
            each.disable_progress_bar()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            for each in bars:
                each.enable_progress_bar()
