"""The whole chain on the tiny cascade: its numbers, and what a caller may rely on."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file

import show_1
from show_1 import Cascade, Show1Error, Show1Pipeline, video
from show_1.models import UNet3DConditionModel, channels_last
from show_1.pipeline import MAX_SEED, Clip, Notice, Pause, StageStart, StepDone, Video, _requests, draw_seed
from show_1.stages import InterpolationPipeline
from show_1.stages.denoise import finish, last_timesteps, try_steps, unfold
from show_1.text import TextEmbeddings, dropped_words
from tests import tiny

STAGES = ["keyframes", "interpolation", "first_frame", "pixel_upscale", "latent_upscale"]


@pytest.fixture(scope="module")
def pipeline(tiny_cascade) -> Show1Pipeline:
    return Show1Pipeline.from_cascade(tiny_cascade, "cpu", torch.float32)


@pytest.fixture(scope="module")
def result(pipeline) -> Video:
    return pipeline(tiny.PROMPT, seed=tiny.SEED)


def test_golden_numbers(tiny_cascade):
    exact = Show1Pipeline.from_cascade(tiny_cascade, "cpu", torch.float64)(tiny.PROMPT, seed=tiny.SEED)
    expected = load_file(tiny.NUMBERS)
    kept = tiny.numbers(exact.tensors)
    assert kept.keys() == expected.keys()
    for name, tensor in kept.items():
        assert tensor.dtype == torch.float64
        assert tensor.shape == expected[name].shape
        difference = (tensor - expected[name]).abs()
        # The numbers are kept in float32. The sampling amplifies rounding most where the noise is largest: see show-1's
        # scheduler of the pixel upscale.
        limit = {"pixel_upscaled": 2e-3, "video": 5e-4}.get(name, 1e-4)
        assert difference.max() < limit and difference.mean() < limit / 20, name


def test_shapes_and_settings(pipeline, result):
    shapes = {name: tuple(tensor.shape) for name, tensor in result.tensors.items()}
    assert shapes == {
        "prompt_embeds": (1, 77, 16),
        "negative_prompt_embeds": (1, 77, 16),
        "keyframes": (1, 3, 8, 4, 6),
        "interpolated": (1, 3, 29, 4, 6),
        "first_frame": (1, 3, 16, 24),
        "pixel_upscaled": (1, 3, 29, 16, 24),
        "video": (1, 3, 29, 14, 18),
    }
    assert result.frames.shape == (29, 14, 18, 3)
    assert result.frames.dtype == np.uint8
    assert result.settings["prompt"] == tiny.PROMPT
    assert result.settings["seed"] == tiny.SEED
    assert result.settings["dtype"] == "float32"
    assert result.settings["cascade"] == pipeline.cascade.settings()


def test_same_seed_same_frames_and_nothing_left_behind(pipeline, result):
    schedulers = {
        (type(stage), name): str(vars(component))
        for stage in (pipeline.keyframes, pipeline.interpolation, pipeline.pixel_upscale, pipeline.latent_upscale)
        for name, component in stage.components.items()
        if name.endswith("scheduler")
    }
    torch.manual_seed(5)
    state, grad, dtype = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype()
    again = pipeline(tiny.PROMPT, seed=tiny.SEED)
    assert np.array_equal(again.frames, result.frames)
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == (grad, dtype)
    for stage in (pipeline.keyframes, pipeline.interpolation, pipeline.pixel_upscale, pipeline.latent_upscale):
        for name, component in stage.components.items():
            if name.endswith("scheduler"):
                assert str(vars(component)) == schedulers[type(stage), name]
            if isinstance(component, torch.nn.Module):
                assert not component.training
    other = pipeline(tiny.PROMPT, seed=tiny.SEED + 1)
    assert not np.array_equal(other.frames, result.frames)


@pytest.mark.parametrize("draws", [False, True])
def test_segments_as_one_batch_equal_one_by_one(pipeline, result, draws):
    """In float64: random networks multiply float32's rounding by up to 20,000."""
    scheduler = pipeline.interpolation.scheduler
    if draws:  # with each step; every segment the same
        scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="sde-dpmsolver++")
    text = pipeline.keyframes.encode(tiny.PROMPT)
    text = TextEmbeddings(text.prompt.double(), text.negative.double())
    interpolation = InterpolationPipeline(copy.deepcopy(pipeline.interpolation.unet).double(), scheduler)
    keyframes = result.tensors["keyframes"].double()
    settings = {"steps": 2, "guidance": 4.0, "seed": tiny.SEED}
    batch = interpolation(text, keyframes, **settings)
    for i in range(7):
        segment = interpolation(text, keyframes[:, :, i : i + 2], **settings)
        last = 5 if i == 6 else 4  # a keyframe between two segments is the later one's
        assert (segment[:, :, :last] - batch[:, :, 4 * i : 4 * i + last]).abs().max() < 1e-5


def test_prompts_in_a_batch_get_what_they_would_get_alone(one_step_cascade, tmp_path):
    """In float64, as for the segments. Three prompts, two at a time, each with its own seed."""
    few_frames = Cascade.load(one_step_cascade).override(["keyframes.frames=3"])
    pipeline = Show1Pipeline.from_cascade(few_frames, "cpu", torch.float64)
    prompts, seeds, paths = ["a cat", "the lazy dog", "a fox"], [1, 2, 1], [tmp_path / f"{n}.mp4" for n in range(3)]
    rows = []
    handle = pipeline.keyframes.unet.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    videos = pipeline(prompts, seed=seeds, path=paths)
    handle.remove()
    assert rows == [4, 2]  # under guidance a clip counts twice
    for prompt, seed, path, together in zip(prompts, seeds, paths, videos, strict=True):
        alone = pipeline(prompt, seed=seed)
        assert together.tensors.keys() == alone.tensors.keys()
        for name, tensor in together.tensors.items():
            assert tensor.shape == alone.tensors[name].shape
            assert (tensor - alone.tensors[name]).abs().max() < 1e-6, name
        assert {**together.settings, "seconds": 0} == {**alone.settings, "seconds": 0}
        assert video.read_metadata(path)["prompt"] == prompt
    assert (videos[0].tensors["video"] - videos[2].tensors["video"]).abs().max() > 1e-2  # the same seed, another prompt


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mini_in_half_precision_is_within_40_db(dtype):
    """On five small frames, in few steps, as many CPUs compute in these ten times slower.

    Mini's networks are trained, and so not chaotic as random ones are.
    """
    short = ["keyframes.frames=2", "keyframes.steps=2", "latent_upscale.height=40", "latent_upscale.width=72"]
    cascade = Cascade.load("mini").override(short)
    try:
        half = Show1Pipeline.from_cascade(cascade, "cpu", dtype)("a panda jumping in the snow", seed=1)
    except Show1Error as error:
        assert "cannot compute in" in str(error)
        pytest.skip(str(error))
    exact = Show1Pipeline.from_cascade(cascade, "cpu", torch.float32)("a panda jumping in the snow", seed=1)
    error = np.square(half.frames.astype(float) - exact.frames).mean()
    assert 10 * np.log10(255**2 / error) > 40


def test_minis_networks_have_the_same_weights_in_bfloat16():
    files = [file for file in Path(show_1.__file__).parent.glob("mini/*/*/*.safetensors") if "text" not in str(file)]
    assert len(files) == 6
    kept = tuple(UNet3DConditionModel._keep_in_fp32_modules)
    for file in files:
        for name, weight in load_file(file).items():
            assert name.startswith(kept) or weight.bfloat16().half().equal(weight), (file, name)


def test_text_is_encoded_in_float32_where_the_networks_are_in_bfloat16():
    cascade = Cascade.load("mini")
    half, exact = (Show1Pipeline.from_cascade(cascade, "cpu", dtype) for dtype in (torch.bfloat16, torch.float32))
    assert half.keyframes.unet.dtype == half.latent_upscale.unet.dtype == torch.bfloat16
    for encode in (lambda p: p.keyframes.encode(tiny.PROMPT), lambda p: p.latent_upscale.encode(tiny.PROMPT, "")):
        assert torch.equal(encode(half).prompt, encode(exact).prompt)


def test_a_preview_is_nearer_to_the_result_than_the_noisy_sample():
    stage = Show1Pipeline.from_cascade("mini", "cpu", torch.float32).keyframes
    settings = {"frames": 8, "height": 20, "width": 32, "steps": 8, "guidance": 1.0, "seed": 1}
    stream = stage.stream(stage.encode("a panda jumping in the snow"), **settings)
    half = [next(stream) for _ in range(4)][-1]
    clip = finish(stream)
    assert (half.clean - clip).square().mean() < 0.3 * (half.sample - clip).square().mean()


def test_words_that_mini_does_not_know_are_told_first():
    first = next(Show1Pipeline.from_cascade("mini", "cpu").stream("a cute panda", seed=1))
    assert isinstance(first, Notice) and first.message.endswith("cannot follow them: cute")


def test_events_in_order_with_previews(pipeline, result, tmp_path):
    path = tmp_path / "video.mp4"
    events, previews = [], []
    for event in pipeline.stream(tiny.PROMPT, seed=tiny.SEED, path=path):
        events.append(event)
        if isinstance(event, StepDone):
            previews.append(event.preview())
    assert [e.stage for e in events if isinstance(e, StageStart)] == STAGES
    assert [e.stage for e in events if isinstance(e, Clip)] == STAGES
    assert [e.steps for e in events if isinstance(e, StageStart)] == [3, 2, 2, 5 * 2 - 2, 3]
    for stage in STAGES:
        steps = [e for e in events if isinstance(e, StepDone) and e.stage == stage]
        assert [e.step for e in steps] == list(range(1, steps[0].steps + 1))
    assert all(preview.dtype == np.uint8 and preview.ndim == 4 for preview in previews)
    assert isinstance(events[-1], Video)
    assert np.array_equal(events[-1].frames, result.frames)  # looking on changes nothing
    parts = [video.to_uint8(e.clip) for e in events if isinstance(e, Pause)]
    assert [len(part) for part in parts] == [1] * 58  # each when it is encoded, and when it is decoded
    assert np.array_equal(np.concatenate(parts[29:]), result.frames)
    clips = {e.stage: e.frames.shape for e in events if isinstance(e, Clip)}
    assert clips["first_frame"] == (1, 16, 24, 3)
    assert clips["interpolation"] == (29, 4, 6, 3)
    metadata = video.read_metadata(path)
    assert metadata["seed"] == tiny.SEED
    assert metadata["cascade"]["keyframes"]["steps"] == 3


def test_a_path_is_where_it_was_when_the_video_was_asked_for(pipeline, one_step_cascade, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    stream = pipeline.with_cascade(Cascade.load(one_step_cascade)).stream("a cat", seed=1, path="video.mp4")
    monkeypatch.chdir("elsewhere")
    list(stream)
    assert (tmp_path / "video.mp4").is_file()


@pytest.mark.parametrize("after", [StageStart, StepDone, Pause, Clip])
def test_to_cancel_is_to_stop_asking(pipeline, tmp_path, after):
    stream = pipeline.stream(tiny.PROMPT, seed=1, path=tmp_path / "video.mp4")
    for event in stream:
        if isinstance(event, after):
            break
    stream.close()
    assert list(tmp_path.iterdir()) == []


def test_without_a_seed_one_is_drawn(pipeline):
    seeds = {draw_seed() for _ in range(5)}
    assert len(seeds) == 5
    assert pipeline("a cat").settings["seed"] in range(2**31)


def test_each_prompt_without_a_seed_gets_one_of_its_own():
    alike = _requests(["a cat", "a cat"], None, None)
    assert alike[0].seed != alike[1].seed
    assert [request.seed for request in _requests(["a cat", "a dog"], np.int64(3), None)] == [3, 3]
    assert [request.seed for request in _requests(["a cat", "a dog"], np.array([3, 4]), None)] == [3, 4]


def test_a_stage_takes_numpys_seeds_and_any_slicing_of_attention(pipeline):
    text, settings = pipeline.keyframes.encode("a cat"), pipeline.cascade.stream_settings("keyframes")
    clip = pipeline.keyframes(text, **settings, seed=3)
    pipeline.keyframes.enable_attention_slicing()
    assert torch.equal(pipeline.keyframes(text, **settings, seed=np.int64(3)), clip)


def test_a_scheduler_of_second_order_begins_at_the_first_of_a_pair():
    scheduler = HeunDiscreteScheduler.from_config(DDPMScheduler().config)
    scheduler.set_timesteps(10)
    assert last_timesteps(scheduler, 4).tolist() == scheduler.timesteps[12:].tolist()
    assert scheduler.sigmas[12] > scheduler.sigmas[13]  # a step that moves
    assert last_timesteps(scheduler, 10).tolist() == scheduler.timesteps.tolist()


def test_prompts_without_seeds_for_all_are_refused(pipeline):
    text = pipeline.keyframes.encode(["a cat", "a dog"])
    with pytest.raises(ValueError, match="2 prompts want as many seeds"):
        pipeline.keyframes(text, **pipeline.cascade.stream_settings("keyframes"), seed=1)


def test_a_default_type_that_is_another_meanwhile_changes_nothing(pipeline, result):
    """As it is while another engine's models are loaded."""
    torch.set_default_dtype(torch.float16)
    try:
        frames = pipeline(tiny.PROMPT, seed=tiny.SEED).frames
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(frames, result.frames)


def test_models_may_be_loaded_at_once(tiny_cascade):
    """By several threads, as by a server's two engines: the libraries change meanwhile how modules are made."""
    with ThreadPoolExecutor(3) as pool:
        loads = [pool.submit(Show1Pipeline.from_cascade, tiny_cascade, "cpu") for _ in range(3)]
    assert {load.result().weights for load in loads} == {Show1Pipeline.from_cascade(tiny_cascade, "cpu").weights}


def test_a_cascade_of_other_models_is_refused(pipeline):
    with pytest.raises(Show1Error, match="Mini has other models than"):
        pipeline.with_cascade(Cascade.load("mini"))


def test_long_prompt_says_what_it_drops(pipeline):
    words = [f"word{n}" for n in range(40)]
    notices = [e for e in _until_first_step(pipeline, " ".join(words)) if isinstance(e, Notice)]
    assert len(notices) == 2  # T5 and CLIP each read 77 tokens
    for notice in notices:
        dropped = notice.message.split(": ")[1].split()
        assert dropped == words[-len(dropped) :]
        assert 0 < len(dropped) < 40
    assert not [e for e in _until_first_step(pipeline, "a cat") if isinstance(e, Notice)]


def test_dropped_words_are_told_as_they_were_typed(pipeline):
    assert dropped_words(pipeline.latent_upscale.tokenizer, " word" * 40 + " in Paris").endswith("in Paris")


@pytest.mark.parametrize("between", ["\n", "\t", "\u3000"])
def test_words_may_have_anything_between_them(pipeline, between):
    words = [f"w{n}" for n in range(40)]
    tokenizer = pipeline.latent_upscale.tokenizer
    dropped = dropped_words(tokenizer, between.join(words)).split(between)
    assert dropped == words[-len(dropped) :] and 0 < len(dropped) < 40


def test_a_prompt_without_spaces_drops_what_does_not_fit(pipeline):
    tokenizer = pipeline.latent_upscale.tokenizer
    dropped = dropped_words(tokenizer, "猫狗" * 30)  # a byte is a token here, three bytes a character
    assert dropped == ("猫狗" * 30)[25:]


def test_what_is_dropped_is_told_by_us_alone(pipeline, monkeypatch, caplog):
    tokenizer = pipeline.latent_upscale.tokenizer
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(tokenizer, "deprecation_warnings", {})  # it says this only once
    assert dropped_words(tokenizer, "a cat " * 40)
    assert caplog.records == []


def test_threads_may_share_a_tokenizer(pipeline):
    def encode(_):
        assert pipeline.latent_upscale.encode(["a cat " * 40, "b"], "").prompt.shape == (2, 77, 32)
        assert dropped_words(pipeline.latent_upscale.tokenizer, "a cat " * 40)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(encode, range(60)))


def _until_first_step(pipeline, prompt):
    events = []
    for event in pipeline.stream(prompt, seed=1):
        if isinstance(event, StepDone):
            return events
        events.append(event)


def test_guidance_one_is_no_guidance(pipeline):
    """At guidance 1 the negative prompt has no say, so it is not computed either: half the work."""
    text = pipeline.keyframes.encode(tiny.PROMPT)
    sizes = []
    handle = pipeline.keyframes.unet.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    settings = {"frames": 2, "height": 4, "width": 6, "steps": 2, "seed": 1}
    pipeline.keyframes(text, guidance=1.0, **settings)
    pipeline.keyframes(text, guidance=2.0, **settings)
    handle.remove()
    assert sizes == [1, 1, 2, 2]


def test_keyframes_share_noise(pipeline):
    text = pipeline.keyframes.encode([tiny.PROMPT, "a fox"])
    settings = pipeline.cascade.stream_settings("keyframes") | {"steps": 1, "guidance": 1.0, "height": 16, "width": 24}
    given = []
    hook = pipeline.keyframes.unet.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    try:
        for share in (0.0, 0.5, 1.0):
            pipeline.keyframes(text, **settings, seed=[3, 4], shared_noise=share)
        pipeline.keyframes(pipeline.keyframes.encode("a fox"), **settings, seed=4, shared_noise=0.5)
    finally:
        hook.remove()
    own, mixed, common, alone = given
    assert torch.equal(common, common[:, :, :1].expand_as(common)) and not torch.equal(common[0], common[1])
    torch.testing.assert_close(mixed, 0.5**0.5 * (own + common))  # the frames' own noise is drawn first, always
    assert torch.equal(mixed[1:], alone)
    assert mixed.std().item() == pytest.approx(1, abs=0.05)


def test_the_pixel_upscale_shares_noise(pipeline, result):
    text, keyframes = pipeline.keyframes.encode(tiny.PROMPT), result.tensors["keyframes"]
    settings = pipeline.cascade.stream_settings("pixel_upscale") | {"steps": 1, "guidance": 1.0}
    first = torch.zeros(1, 3, *(4 * side for side in keyframes.shape[-2:]))
    given = []
    hook = pipeline.pixel_upscale.unet.register_forward_pre_hook(lambda _, args: given.append(args[0][:, :3]))
    try:
        for share in (0.0, 1.0):
            pipeline.pixel_upscale(text, keyframes, first, **settings, seed=3, shared_noise=share)
    finally:
        hook.remove()
    own, common = given
    assert torch.equal(common, common[:, :, :1].expand_as(common))
    assert not torch.allclose(own, own[:, :, :1].expand_as(own), atol=0.1)


def test_the_latent_upscale_shares_noise(pipeline, result, monkeypatch):
    stage, clip = pipeline.latent_upscale, result.tensors["pixel_upscaled"]
    text = stage.encode(tiny.PROMPT, "")
    settings = pipeline.cascade.stream_settings("latent_upscale") | {"steps": 1, "strength": 1.0, "guidance": 1.0}
    given, add_noise = [], type(stage.scheduler).add_noise

    def spy(scheduler, latents, noise, timesteps):
        given.append(noise)
        return add_noise(scheduler, latents, noise, timesteps)

    monkeypatch.setattr(type(stage.scheduler), "add_noise", spy)
    for share in (0.0, 0.5, 1.0):
        stage(text, clip, **settings, seed=3, shared_noise=share)
    own, mixed, common = given  # (frames, channels, height, width) each
    assert torch.equal(common, common[:1].expand_as(common)) and not torch.equal(own[0], own[1])
    torch.testing.assert_close(mixed, 0.5**0.5 * (own + common))


def test_latents_are_shifted_and_scaled_as_the_autoencoder_says(pipeline, result, monkeypatch):
    stage, clip = pipeline.latent_upscale, result.tensors["pixel_upscaled"][0, :, :2].transpose(0, 1)

    def latents():
        return finish(stage._encode_frames(clip, torch.Generator().manual_seed(0)))

    plain = latents()
    monkeypatch.setattr(stage.vae, "_internal_dict", FrozenDict(stage.vae.config | {"shift_factor": 0.3}))
    shifted = latents()
    torch.testing.assert_close(shifted, plain - 0.3 * stage.vae.config.scaling_factor)
    decoded = stage.decode(unfold(shifted, torch.Size([1, 4, 2])))
    monkeypatch.undo()
    torch.testing.assert_close(decoded, stage.decode(unfold(plain, torch.Size([1, 4, 2]))))


def test_a_stage_saves_and_loads_as_a_diffusers_pipeline(pipeline, result, tmp_path):
    pipeline.interpolation.save_pretrained(tmp_path)
    loaded = InterpolationPipeline.from_pretrained(tmp_path)
    channels_last(loaded.unet)  # as `placement` does; in another layout the numbers are the same to rounding
    text = pipeline.keyframes.encode(tiny.PROMPT)
    clip = loaded(text, result.tensors["keyframes"], steps=2, guidance=4.0, seed=tiny.SEED)
    assert torch.equal(clip, result.tensors["interpolated"])


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": None}, "prompt is no text"),
        ({"prompt": ["a cat", None]}, "prompt is no text"),
        ({"seed": -1}, "seed cannot be -1"),
        ({"seed": MAX_SEED + 1}, str(MAX_SEED)),
        ({"seed": 1.5}, "seed cannot be 1.5"),
        ({"seed": True}, "seed cannot be True"),
        ({"seed": "42"}, "seed cannot be '42'"),
        ({"path": "nowhere/video.mp4"}, "nowhere"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": ["a cat", ""]}, "prompt is empty"),
        ({"prompt": ["a cat", "a dog"], "seed": [1]}, "2 prompts, and seeds for 1"),
        ({"prompt": ["a cat", "a dog"], "path": "cats.mp4"}, "2 prompts, and paths for 1"),
        ({"prompt": ["a cat", "a dog"], "path": ["a.mp4", "a.mp4"]}, "same path"),
        ({"prompt": ["a cat", "a dog"], "path": ["a.mp4", "./a.mp4"]}, "same path"),
        ({"path": 5}, "path cannot be 5"),
        ({"prompt": ["a cat", "a dog"], "path": ["a.mp4", 5]}, "path cannot be 5"),
    ],
)
def test_bad_requests_are_refused_at_once(pipeline, request_, words):
    with pytest.raises(Show1Error, match=words):
        pipeline.stream(**{"prompt": "a cat", **request_})


def test_some_of_several_videos_may_have_no_seed_and_no_path(pipeline, tmp_path):
    pipeline.stream(["a cat", "a dog", "a fox"], seed=[1, None, None], path=[None, tmp_path / "b.mp4", None])


def test_a_path_may_be_a_link_that_leads_nowhere(pipeline, tmp_path):
    loop = tmp_path / "loop.mp4"
    loop.symlink_to(loop)
    pipeline.stream("a cat", path=loop)
    with pytest.raises(Show1Error, match="same path"):
        pipeline.stream(["a cat", "a dog"], path=[loop, loop])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["keyframes.height=5"], r"\[keyframes\]: height = 5 .* multiple of 2"),
        (["keyframes.width=7"], r"\[keyframes\]: width = 7 .* multiple of 2"),
        (["latent_upscale.width=20", "latent_upscale.height=14"], None),
    ],
)
def test_frame_sizes_that_the_models_cannot_take(pipeline, settings, words):
    def build() -> Show1Pipeline:
        cascade = pipeline.cascade.override(settings)
        return Show1Pipeline(
            cascade, pipeline.keyframes, pipeline.interpolation, pipeline.pixel_upscale, pipeline.latent_upscale
        )

    if words is None:
        build()
    else:
        with pytest.raises(Show1Error, match=words):
            build()


@pytest.mark.parametrize(
    ("table", "of", "words"),
    [
        ("interpolation", "keyframes", "3 channels, .* this stage has 7 channels"),
        ("pixel_upscale", "keyframes", "no noise level, and this stage has 6 channels, .* a noise level"),
        ("latent_upscale", "keyframes", "3 channels, .* this stage has 4 channels"),
        ("keyframes", "pixel_upscale", "6 channels, .* a noise level, and this stage has 3 channels"),
    ],
)
def test_a_model_in_the_table_of_another_is_refused_before_anything_runs(pipeline, table, of, words):
    stages = [pipeline.keyframes, pipeline.interpolation, pipeline.pixel_upscale, pipeline.latent_upscale]
    wrong = copy.copy(getattr(pipeline, table))
    wrong.unet = getattr(pipeline, of).unet
    with pytest.raises(Show1Error, match=rf"\[{table}\]: the UNet of .* takes .*{words}"):
        Show1Pipeline(pipeline.cascade, *(wrong if stage is getattr(pipeline, table) else stage for stage in stages))


@pytest.mark.parametrize(
    ("table", "component", "key", "value", "words"),
    [
        ("keyframes", "unet", "num_class_embeds", 10, "has num_class_embeds = 10, for which this stage has nothing"),
        ("latent_upscale", "unet", "addition_embed_type", "text_time", "has addition_embed_type = 'text_time', for"),
        ("pixel_upscale", "unet", "class_embed_type", "identity", "has class_embed_type = 'identity', for which"),
        ("keyframes", "unet", "out_channels", 2, "the UNet of .*base gives 2 channels, and this stage needs 3"),
        ("latent_upscale", "unet", "out_channels", 3, "gives 3 channels, and this stage needs 4"),
        ("keyframes", "text_encoder", "vocab_size", 20, "knows 20 tokens and reads 77 at once, and is given 77 of"),
        ("latent_upscale", "text_encoder", "vocab_size", 513, "knows 513 tokens .* 77 of 514"),
        ("latent_upscale", "text_encoder", "max_position_embeddings", 64, "reads 64 at once, and is given 77"),
    ],
)
def test_models_that_do_not_suit_each_other_are_refused_before_anything_runs(
    pipeline, monkeypatch, table, component, key, value, words
):
    model = getattr(getattr(pipeline, table), component)
    if component == "unet":
        monkeypatch.setattr(model, "_internal_dict", FrozenDict(model.config | {key: value}))
    else:
        monkeypatch.setattr(model.config, key, value)
    with pytest.raises(Show1Error, match=rf"\[{table}\]: .*{words}"):
        pipeline.with_cascade(pipeline.cascade)


@pytest.mark.parametrize(
    ("of", "changes", "settings", "words"),
    [
        ("keyframes.scheduler", {}, ["keyframes.steps=998"], "keyframes.* fails at steps = 998: it divides by zero"),
        ("latent_upscale.scheduler", {"timestep_spacing": "foo"}, [], "latent_upscale.* foo is not supported"),
        ("latent_upscale.scheduler", {"final_sigmas_type": "foo"}, [], "latent_upscale.* but got foo"),
        ("latent_upscale.scheduler", {"timestep_spacing": "leading", "steps_offset": 900}, [], "not all of the 1000"),
        ("latent_upscale.scheduler", {"variance_type": "learned"}, [], "latent_upscale.* fails at steps = 4"),
        ("interpolation.scheduler", {"dynamic_thresholding_ratio": 2.0}, [], "interpolation.* range"),
        ("pixel_upscale.scheduler", {"_class": DDPMScheduler, "num_train_timesteps": 1}, [], "pixel_upscale.* larger"),
        (
            "pixel_upscale.first_frame_scheduler",
            {"_class": DDIMScheduler},
            ["first_frame.schedule=smart27", "first_frame.steps=27"],
            r"\[first_frame\].* unexpected keyword argument",
        ),
        (
            "pixel_upscale.image_noising_scheduler",
            {"num_train_timesteps": 250},
            [],
            r"\[pixel_upscale\]: noise_level = 250 is beyond the 250 levels",
        ),
    ],
)
def test_what_a_scheduler_cannot_do_is_refused_before_anything_runs(pipeline, of, changes, settings, words):
    stages = {name: getattr(pipeline, name) for name in STAGES if name != "first_frame"}
    stage, _, component = of.partition(".")
    stages[stage] = copy.copy(stages[stage])
    scheduler = getattr(stages[stage], component)
    options = {key: value for key, value in changes.items() if key != "_class"}
    setattr(stages[stage], component, changes.get("_class", type(scheduler)).from_config(scheduler.config, **options))
    with pytest.raises(Show1Error, match=words):
        Show1Pipeline(pipeline.cascade.override(settings), **stages)


def test_steps_that_the_latent_upscale_leaves_out_may_be_what_they_are(pipeline):
    """Of 1000 steps two begin with the same noise, but only the last ones are run."""
    pipeline.with_cascade(pipeline.cascade.override(["latent_upscale.steps=1000", "latent_upscale.strength=0.3"]))
    with pytest.raises(Show1Error, match="divides by zero"):
        pipeline.with_cascade(pipeline.cascade.override(["latent_upscale.steps=1000", "latent_upscale.strength=1"]))


def test_trying_steps_leaves_nothing_behind(pipeline):
    state = torch.get_rng_state()
    scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.keyframes.scheduler.config, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True
    )
    try_steps(scheduler, 30, 30, None, 3, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert scheduler.num_inference_steps is None


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
def test_other_schedulers_run(pipeline, scheduler):
    keyframes = copy.copy(pipeline.keyframes)
    keyframes.scheduler = scheduler.from_config(keyframes.scheduler.config, clip_sample=False, skip_prk_steps=True)
    settings = pipeline.cascade.stream_settings("keyframes") | {"steps": 3, "seed": tiny.SEED}
    assert keyframes(keyframes.encode(tiny.PROMPT), **settings).isfinite().all()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_variance_that_the_scheduler_does_not_take_is_dropped(pipeline, result, scheduler):
    stage = copy.copy(pipeline.pixel_upscale)
    config = stage.first_frame_scheduler.config
    assert config.variance_type == "learned_range"
    stage.first_frame_scheduler = scheduler.from_config(config)
    settings = pipeline.cascade.stream_settings("first_frame") | {"seed": 1}
    image = result.tensors["keyframes"][:, :, 0]
    stream = stage.stream_first_frame(pipeline.keyframes.encode(tiny.PROMPT), image, **settings)
    assert finish(stream).shape == (1, 3, 16, 24)


def test_timesteps_that_repeat_are_walked_from_the_first(pipeline, result, monkeypatch):
    """Of ten sigmas spaced as Karras does, the four largest lie at the same whole timestep."""
    keyframes, latent = copy.copy(pipeline.keyframes), copy.copy(pipeline.latent_upscale)
    scheduler = DPMSolverMultistepScheduler.from_config(keyframes.scheduler.config, use_karras_sigmas=True)
    keyframes.scheduler = latent.scheduler = scheduler
    settings = pipeline.cascade.stream_settings("keyframes") | {"steps": 10, "seed": 1}
    assert keyframes(keyframes.encode(tiny.PROMPT), **settings).isfinite().all()

    begun, add_noise = [], DPMSolverMultistepScheduler.add_noise

    def spy(scheduler, *args):
        begun.append(scheduler.begin_index)
        return add_noise(scheduler, *args)

    monkeypatch.setattr(DPMSolverMultistepScheduler, "add_noise", spy)
    settings = pipeline.cascade.stream_settings("latent_upscale") | {"steps": 10, "strength": 0.8, "seed": 1}
    latent(latent.encode(tiny.PROMPT, ""), result.tensors["pixel_upscaled"][:, :, :1], **settings)
    assert begun == [2]


def test_a_full_gpu_is_told(pipeline, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(pipeline.interpolation.unet, "forward", full)
    with pytest.raises(Show1Error, match="the memory of the GPU is full"):
        pipeline(tiny.PROMPT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_stage_that_comes_to_no_numbers_is_told(pipeline, monkeypatch, tmp_path, value):
    bias = pipeline.interpolation.unet.conv_out.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, value))
    clips = []
    with pytest.raises(Show1Error, match=f"interpolation of {tiny.PROMPT!r} came to values that are no numbers"):
        for event in pipeline.stream(tiny.PROMPT, path=tmp_path / "video.mp4"):
            clips += [event.stage] if isinstance(event, Clip) else []
    assert clips == ["keyframes"]
    assert list(tmp_path.iterdir()) == []


def test_devices_and_dtypes_that_are_not_here(tiny_cascade):
    if not torch.cuda.is_available():
        with pytest.raises(Show1Error, match="There is no device 'cuda' here"):
            Show1Pipeline.from_cascade(tiny_cascade, "cuda")
    for device in ("nonsense", "meta"):
        with pytest.raises(Show1Error, match=f"There is no device '{device}' here"):
            Show1Pipeline.from_cascade(tiny_cascade, device)
    with pytest.raises(Show1Error, match="cannot compute in int8"):
        Show1Pipeline.from_cascade(tiny_cascade, "cpu", torch.int8)
    with pytest.raises(Show1Error, match="dtype cannot be 'float32'"):
        Show1Pipeline.from_cascade(tiny_cascade, "cpu", "float32")
    with pytest.raises(Show1Error, match="folder of models cannot be 5"):
        Show1Pipeline.from_cascade(tiny_cascade, "cpu", models=5)
