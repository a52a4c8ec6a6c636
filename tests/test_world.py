"""The synthetic world: captions, held-out combinations, pixels."""

import os
import re

import numpy as np
import pytest
import torch

from show_1.errors import Show1Error
from training import stages, world
from training.world import MOTIONS, OBJECTS, PLACES, Scene

needs_font = pytest.mark.skipif(not os.path.exists(world.FONT), reason="the Noto Color Emoji font is not installed")
KEYFRAMES = torch.arange(0, 29, 4) / 28


def _scenes(count: int, **options) -> list[Scene]:
    rng = np.random.default_rng(3)
    return [world.sample(rng, **options) for _ in range(count)]


def test_sizes_of_the_tables():
    assert (len(OBJECTS), len(PLACES), len(MOTIONS)) == (50, 12, 11)
    assert set((stages.MINI / "words.txt").read_text().split()) == world.vocabulary()
    share = np.mean([world.held_out(o, p, m) for o in OBJECTS for p in PLACES for m in MOTIONS])
    assert 0.08 < share < 0.12


def test_training_never_shows_a_held_out_combination():
    scenes = _scenes(3000)
    assert not any(world.held_out(name, s.place, s.motion) for s in scenes for name in s.objects)
    assert 0.2 < np.mean([len(s.objects) == 2 for s in scenes]) < 0.4


def test_the_other_samples_are_all_held_out_and_plainly_captioned():
    for scene in _scenes(200, train=False):
        (name,) = scene.objects
        assert world.held_out(name, scene.place, scene.motion)
        assert scene.caption == world.plain_caption(name, scene.place, scene.motion)


def test_captions_name_the_objects_in_known_words():
    words = world.vocabulary()
    for scene in _scenes(2000):
        assert scene.caption == scene.caption.lower()
        assert set(re.findall("[a-z]+", scene.caption)) <= words
        for name in scene.objects:
            assert any(
                wording in scene.caption for wording in [name, *filter(None, OBJECTS[name].synonyms.split(", "))]
            )


def test_plain_captions_have_the_right_article():
    assert world.plain_caption("panda", "in the snow", "jumping") == "a panda jumping in the snow"
    assert world.plain_caption("elephant", "in space", "spinning") == "an elephant spinning in space"
    assert world.plain_caption("unicorn", "in space", "spinning") == "a unicorn spinning in space"
    assert world.plain_caption(("cat", "owl"), "in space", "spinning") == "a cat and an owl spinning in space"


@needs_font
@pytest.mark.parametrize("height, width", [(20, 32), (36, 64), (80, 128)])
def test_shape_range_and_determinism(height, width):
    scenes = _scenes(16)
    clips = world.render(scenes, height, width, KEYFRAMES[:3])
    assert clips.shape == (16, 3, 3, height, width) and clips.dtype == torch.float32
    assert clips.min() >= -1 and clips.max() <= 1 and clips.std() > 0.2
    assert torch.equal(clips, world.render(scenes, height, width, KEYFRAMES[:3]))
    # Neither the rest of the batch nor the other times change a clip.
    alone = world.render(scenes[5:6], height, width, KEYFRAMES[1:2])
    assert torch.allclose(alone[0, :, 0], clips[5, :, 1], atol=1e-4)


@needs_font
def test_times_for_each_clip():
    scenes = _scenes(2)
    clips = world.render(scenes, 20, 32, torch.tensor([[0.0, 0.5], [0.5, 1.0]]))
    assert torch.allclose(clips[1, :, 0], world.render(scenes, 20, 32, torch.tensor([0.5]))[1, :, 0], atol=1e-4)


@needs_font
def test_small_clips_look_like_big_ones_scaled_down():
    """As the pixel upscale scales them, with their corners kept: else it had to find out how far from them it is."""
    scenes = [Scene(("panda",), place, "jumping", "", 5) for place in PLACES]
    small, big = (world.render(scenes, h, w, torch.tensor([0.3]))[:, :, 0] for h, w in ((20, 32), (80, 128)))
    smooth = torch.nn.functional.avg_pool2d(big, 3, 1, 1, count_include_pad=False)
    kept = torch.nn.functional.interpolate(smooth, (20, 32), mode="bilinear", align_corners=True)
    moved = torch.nn.functional.avg_pool2d(big, 4)
    errors = (kept - small).abs().mean((1, 2, 3))
    assert errors.max() < 0.06, dict(zip(PLACES, errors.tolist(), strict=True))
    assert errors.mean() < 0.8 * (moved - small).abs().mean()


@needs_font
@pytest.mark.parametrize("motion, axis, sign", [
    ("moving left", 1, -1), ("moving right", 1, 1), ("flying up", 0, -1), ("falling down", 0, 1),
])  # fmt: skip
def test_motions_go_where_they_say(motion, axis, sign):
    for seed in range(4):
        scenes = [Scene((name,), "in the desert", motion, "", seed) for name in ("ghost", "apple")]
        pale, red = world.render(scenes, 20, 32, KEYFRAMES)
        # The clips differ in nothing but the object, so the difference is where the object is.
        weight = (pale - red).abs().sum(0).sum(2 if axis == 0 else 1)
        centre = (weight * torch.arange(weight.shape[1])).sum(1) / weight.sum(1)
        assert (sign * centre.diff() > 0).all()
        assert abs(centre[-1] - centre[0]) > 5


@needs_font
def test_of_two_objects_the_darker_one_is_on_the_left():
    """However the caption puts them: the dinosaur is the darkest of all, and the pig the brightest."""
    pairs = ("dinosaur", "ghost"), ("ghost", "dinosaur"), ("dinosaur", "pig"), ("crab", "ghost")
    scenes = [Scene(names, "in space", "standing still", "", 1) for names in pairs]
    both, turned, other_right, other_left = world.render(scenes, 40, 64, torch.tensor([0.0]))[:, :, 0].unbind()
    assert torch.equal(both, turned)
    columns = torch.arange(64.0)
    left, right = ((both - other).abs().sum((0, 1)) for other in (other_left, other_right))
    assert (left * columns).sum() / left.sum() + 10 < (right * columns).sum() / right.sum()


def test_missing_font_is_told_clearly(monkeypatch):
    monkeypatch.setattr(world, "FONT", "no-such-font.ttf")
    for cached in (world.sprites, world._sprites_on):  # Pillow would find the true name in the system's folders
        cached.cache_clear()
    with pytest.raises(Show1Error, match="fonts-noto-color-emoji"):
        world.render(_scenes(1), 20, 32, KEYFRAMES)
