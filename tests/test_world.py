"""The synthetic world: same scene, same pixels; captions that tell the truth; combinations kept from training."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from show_1.errors import Show1Error
from training import world

FONT_MISSING = not Path(world.FONT).exists()
needs_font = pytest.mark.skipif(
    FONT_MISSING, reason="the font is not installed: apt-get install fonts-noto-color-emoji"
)
CLIP = torch.linspace(0, 1, 8)


def scene(objects=("panda",), place="in the snow", motion="jumping", seed=1):
    return world.Scene(objects, place, motion, "", seed)


def scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [world.sample(rng) for _ in range(count)]


def centres(motion, seed):
    """An object's centre of mass in pixels of a 64x40 clip, as x and y, and its extent; each (frames,).

    Its pixels are those that change when an apple is exchanged for a banana in the same scene.
    """
    apple, banana = world.render(
        [scene((name,), motion=motion, seed=seed) for name in ("apple", "banana")], 40, 64, CLIP
    )
    weight = (apple - banana).abs().sum(0)  # (frames, height, width)
    total = weight.sum((1, 2))
    x = (weight.sum(1) * torch.arange(64)).sum(1) / total
    y = (weight.sum(2) * torch.arange(40)).sum(1) / total
    return x, y, total


def test_there_is_enough_to_see():
    assert 48 <= len(world.OBJECTS) <= 52
    assert len(world.PLACES) >= 12
    assert len(world.MOTIONS) >= 10
    assert {"panda", "cat", "rocket", "pizza"} <= set(world.OBJECTS)
    assert {"at the beach", "in the snow", "in space"} <= set(world.PLACES)
    assert {"moving left", "jumping", "spinning", "shrinking"} <= set(world.MOTIONS)


def test_held_out_combinations_are_never_trained_on():
    sampled = scenes(5000)
    assert not any(world.held_out(name, s.place, s.motion) for s in sampled for name in s.objects)
    assert 0.1 < np.mean([len(s.objects) == 2 for s in sampled]) < 0.2
    every = [world.held_out(o, p, m) for o in world.OBJECTS for p in world.PLACES for m in world.MOTIONS]
    assert 0.08 < np.mean(every) < 0.12


def test_test_scenes_are_all_held_out_and_plainly_captioned():
    rng = np.random.default_rng(0)
    for _ in range(100):
        s = world.sample(rng, train=False)
        (name,) = s.objects
        assert world.held_out(name, s.place, s.motion)
        assert s.caption == world.plain_caption(name, s.place, s.motion)


def test_plain_captions_have_the_right_article():
    assert world.plain_caption("panda", "in the snow", "jumping") == "a panda jumping in the snow"
    assert world.plain_caption("owl", "at sunset", "spinning") == "an owl spinning at sunset"
    assert world.plain_caption("unicorn", "in space", "growing") == "a unicorn growing in space"


def test_captions_name_their_objects_in_known_words():
    words = world.vocabulary()
    sampled = scenes(3000)
    for s in sampled:
        assert s.caption == s.caption.lower()
        assert set(re.findall("[a-z]+", s.caption)) <= words, s.caption
        for name in s.objects:
            assert any(synonym in s.caption for synonym in (name, *world.OBJECTS[name].synonyms)), s
    captions = {s.caption for s in sampled}
    assert len(captions) > 2000
    assert any(
        caption in captions for caption in (world._with_article(name) for name in world.OBJECTS)
    )  # "a cat" alone


def test_sampling_is_seeded():
    assert scenes(50, seed=3) == scenes(50, seed=3)
    assert scenes(50, seed=3) != scenes(50, seed=4)


@needs_font
@pytest.mark.parametrize(("height", "width"), [(20, 32), (80, 128), (160, 288)])
def test_render_gives_clips_in_range(height, width):
    clips = world.render(scenes(3), height, width, torch.tensor([0.0, 1.0]))
    assert clips.shape == (3, 3, 2, height, width)
    assert clips.dtype == torch.float32
    assert clips.isfinite().all() and clips.min() >= -1 and clips.max() <= 1


@needs_font
def test_every_place_can_be_painted_and_is_alive():
    clips = world.render([scene(place=place, motion="standing still") for place in world.PLACES], 20, 32, CLIP)
    assert clips.isfinite().all()
    assert ((clips[:, :, 0] - clips[:, :, -1]).abs().mean((1, 2, 3)) > 0.005).all()


@needs_font
def test_a_scene_always_looks_the_same():
    several = scenes(6)
    together = world.render(several, 20, 32, CLIP)
    assert torch.equal(together, world.render(several, 20, 32, CLIP))
    for k, one in enumerate(several):  # neither the other scenes nor the other frames matter
        alone = world.render([one], 20, 32, torch.full((1, 1), float(CLIP[3])))
        torch.testing.assert_close(alone[0, :, 0], together[k, :, 3], atol=1e-3, rtol=0)


@needs_font
def test_times_may_differ_by_clip():
    several = scenes(2)
    mixed = world.render(several, 20, 32, torch.tensor([[0.0], [1.0]]))
    both = world.render(several, 20, 32, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(mixed[0, :, 0], both[0, :, 0], atol=1e-3, rtol=0)
    torch.testing.assert_close(mixed[1, :, 0], both[1, :, 1], atol=1e-3, rtol=0)


@needs_font
def test_small_and_large_clips_show_the_same():
    several = scenes(12)
    small = world.render(several, 20, 32, torch.tensor([0.5]))[:, :, 0]
    large = torch.nn.functional.avg_pool2d(world.render(several, 80, 128, torch.tensor([0.5]))[:, :, 0], 4)
    assert (small - large).abs().mean() < 0.08


@needs_font
@pytest.mark.parametrize("seed", range(4))
def test_motions_do_what_they_say(seed):
    x, _, _ = centres("moving left", seed)
    assert (x.diff() < 0).all() and x[0] > 32 > x[-1]
    x, _, _ = centres("moving right", seed)
    assert (x.diff() > 0).all() and x[0] < 32 < x[-1]
    assert (centres("flying up", seed)[1].diff() < 0).all()
    assert (centres("falling down", seed)[1].diff() > 0).all()
    assert (centres("growing", seed)[2].diff() > 0).all()
    assert (centres("shrinking", seed)[2].diff() < 0).all()


def test_a_missing_font_says_what_to_install(monkeypatch):
    # In a fresh copy of the module, which has no sprites in its caches yet.
    spec = importlib.util.spec_from_file_location("fresh_world", world.__file__)
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_world", fresh)  # dataclasses look their module up
    spec.loader.exec_module(fresh)
    fresh.FONT = "/nowhere/NotoColorEmoji.ttf"
    with pytest.raises(Show1Error, match="apt-get install fonts-noto-color-emoji"):
        fresh.render([scene()], 20, 32, torch.tensor([0.0]))
