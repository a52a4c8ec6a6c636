"""The synthetic world the mini cascade learns from: an endless, vectorised, seeded supply of captioned clips.

A `Scene` says what a clip shows; `sample` draws one, `render` paints it at any size. Lengths are in frame heights: y
runs from 0 (top) to 1 (bottom), x is 0 in the middle, and what matters stays within |x| < 0.8. Shapes are drawn with
edges one pixel wide and textures without waves finer than the pixels, so a small clip looks like a big one scaled down.
"""

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, lerp
from torch.nn import functional as F

from show_1.errors import Show1Error

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SPRITE = 128  # side of the largest sprite, in pixels
SPRITE_FILL = 0.86  # part of that side the object takes; the rest is room for its shadow
LEVELS = [round(SPRITE * 2 ** (-k / 2)) for k in range(9)]  # 128, 91, 64, ... 8: sides of the scaled-down sprites
RANDOM_NUMBERS = 320  # uniform numbers behind the looks of one clip; the first PATH_NUMBERS are for the motion
PATH_NUMBERS = 12
ASPECT = 1.6  # width of the keyframes to their height
SMALL = 48  # frames less high than this are painted twice as large and averaged


@dataclass(frozen=True)
class Scene:
    """Everything about one clip but its pixels."""

    objects: tuple[str, ...]  # one or two canonical names
    place: str  # e.g. "in the snow"
    motion: str  # e.g. "jumping"
    caption: str
    seed: int  # of all visual variation


# Tables of words are strings with commas, the canonical wording first.


@dataclass(frozen=True)
class Object:
    emoji: str
    synonyms: str = ""
    faces: int = 0  # -1: looks left, 1: looks right, 0: straight ahead


@dataclass(frozen=True)
class Place:
    paint: "Callable[[Canvas], Tensor]"
    phrases: str  # where: "in the snow"
    settings: str  # what one sees: "snowy field"

    def words(self) -> list[str]:
        return f"{self.phrases}, {self.settings}".split(", ")


@dataclass(frozen=True)
class Motion:
    path: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    wordings: str  # "jumping/jumps"
    faces: int = 0  # the side an object that looks sideways turns to; 0: as it is drawn

    def words(self) -> list[str]:
        return re.split(", |/", self.wordings)


OBJECTS = {
    "panda": Object("🐼", "panda bear"),
    "cat": Object("🐱", "kitten, kitty"),
    "dog": Object("🐶", "puppy, doggy"),
    "fox": Object("🦊"),
    "frog": Object("🐸", "toad"),
    "lion": Object("🦁"),
    "tiger": Object("🐯"),
    "pig": Object("🐷", "piglet, piggy"),
    "cow": Object("🐮"),
    "monkey": Object("🐵", "ape"),
    "rabbit": Object("🐰", "bunny"),
    "penguin": Object("🐧", faces=-1),
    "chicken": Object("🐔", "hen", faces=-1),
    "owl": Object("🦉"),
    "whale": Object("🐳", faces=-1),
    "fish": Object("🐠", "tropical fish", faces=-1),
    "octopus": Object("🐙", "squid"),
    "crab": Object("🦀"),
    "butterfly": Object("🦋"),
    "bee": Object("🐝", "bumblebee, honeybee", faces=-1),
    "ladybug": Object("🐞", "ladybird", faces=-1),
    "snail": Object("🐌", faces=-1),
    "turtle": Object("🐢", "tortoise", faces=-1),
    "elephant": Object("🐘", faces=-1),
    "horse": Object("🐎", "pony", faces=-1),
    "unicorn": Object("🦄", faces=-1),
    "dinosaur": Object("🦕", "dino", faces=-1),
    "rocket": Object("🚀", "spaceship", faces=1),
    "car": Object("🚗", "automobile, red car", faces=-1),
    "bus": Object("🚌", faces=-1),
    "train": Object("🚂", "locomotive", faces=-1),
    "tractor": Object("🚜", faces=-1),
    "airplane": Object("✈️", "plane, aeroplane", faces=1),
    "boat": Object("⛵", "sailboat, sailing boat"),
    "balloon": Object("🎈", "red balloon"),
    "robot": Object("🤖", "android"),
    "ghost": Object("👻", "spook"),
    "snowman": Object("⛄"),
    "pumpkin": Object("🎃", "halloween pumpkin"),
    "pizza": Object("🍕", "slice of pizza, pizza slice"),
    "hamburger": Object("🍔", "burger"),
    "donut": Object("🍩", "doughnut"),
    "cake": Object("🎂", "birthday cake"),
    "apple": Object("🍎", "red apple"),
    "banana": Object("🍌"),
    "strawberry": Object("🍓"),
    "mushroom": Object("🍄", "toadstool"),
    "sunflower": Object("🌻", "flower"),
    "guitar": Object("🎸"),
    "ball": Object("⚽", "football, soccer ball"),
}


# ---------------------------------------------------------------------------------------------------------- motions
# A path takes the time, (clips, frames) in [0, 1], and uniform numbers, (clips, 1) each, and gives x and y relative to
# the middle of the frame, the size relative to the object's own, and the clockwise angle in radians: (clips, frames).


def _between(low: float, high: float, number: Tensor) -> Tensor:
    return low + (high - low) * number


def _slide(direction: int, t: Tensor, r: Tensor):
    start, end = _between(0.3, 0.48, r[0]), _between(0.3, 0.48, r[1])
    return direction * (t * (start + end) - start), _between(-0.08, 0.1, r[2]) + 0 * t, 1 + 0 * t, 0 * t


def _rise(direction: int, t: Tensor, r: Tensor):
    start, end = _between(0.22, 0.3, r[0]), _between(0.22, 0.3, r[1])
    return _between(-0.35, 0.35, r[2]) + 0 * t, direction * (t * (start + end) - start), 0.85 + 0 * t, 0 * t


def _jump(t: Tensor, r: Tensor):
    jumps, height = _between(1.1, 1.6, r[0]), _between(0.3, 0.4, r[1])
    y = 0.16 - height * (math.pi * (jumps * t + 0.3 * r[2])).sin().abs()
    return _between(-0.35, 0.35, r[3]) + _between(-0.12, 0.12, r[4]) * (t - 0.5), y, 0.85 + 0 * t, 0 * t


def _spin(t: Tensor, r: Tensor):
    turns = _between(0.35, 0.6, r[0])
    return _between(-0.35, 0.35, r[2]) + 0 * t, _between(-0.08, 0.1, r[3]) + 0 * t, 1 + 0 * t, 2 * math.pi * turns * t


def _resize(direction: int, t: Tensor, r: Tensor):
    small, big = _between(0.45, 0.54, r[0]), _between(1, 1.12, r[1])
    size = small * (big / small) ** (t if direction > 0 else 1 - t)
    return _between(-0.3, 0.3, r[2]) + 0 * t, _between(-0.05, 0.06, r[3]) + 0 * t, size, 0 * t


def _swing(t: Tensor, r: Tensor):
    angle = _between(0.45, 0.7, r[0]) * (2 * math.pi * (_between(0.8, 1.1, r[1]) * t + 0.25 * r[2])).sin()
    # Like a pendulum that hangs from a point above the object.
    return _between(-0.25, 0.25, r[3]) - 0.42 * angle.sin(), 0.42 * angle.cos() - 0.36, 0.92 + 0 * t, angle


def _circle(t: Tensor, r: Tensor):
    angle = 2 * math.pi * (_between(0.75, 1, r[0]) * t * (2 * (r[1] > 0.5) - 1) + 0.25 * r[2])
    radius = _between(0.2, 0.26, r[3])
    return _between(-0.2, 0.2, r[4]) + 1.2 * radius * angle.cos(), radius * angle.sin(), 0.78 + 0 * t, 0 * t


def _stand(t: Tensor, r: Tensor):
    return _between(-0.4, 0.4, r[0]) + 0 * t, _between(-0.06, 0.08, r[1]) + 0 * t, 1 + 0 * t, 0 * t


MOTIONS = {
    "moving left": Motion(
        partial(_slide, -1),
        "moving left/moves left, going left/goes left, moving to the left/moves to the left",
        faces=-1,
    ),
    "moving right": Motion(
        partial(_slide, 1),
        "moving right/moves right, going right/goes right, moving to the right/moves to the right",
        faces=1,
    ),
    "flying up": Motion(
        partial(_rise, -1), "flying up/flies up, rising/rises, soaring/soars, flying/flies, moving up/moves up"
    ),
    "falling down": Motion(
        partial(_rise, 1), "falling down/falls down, falling/falls, dropping/drops, moving down/moves down"
    ),
    "jumping": Motion(_jump, "jumping/jumps, hopping/hops, bouncing/bounces, jumping up and down/jumps up and down"),
    "spinning": Motion(_spin, "spinning/spins, turning/turns, rotating/rotates, rolling/rolls"),
    "growing": Motion(partial(_resize, 1), "growing/grows, getting bigger/gets bigger"),
    "shrinking": Motion(partial(_resize, -1), "shrinking/shrinks, getting smaller/gets smaller"),
    "swinging": Motion(_swing, "swinging/swings, dancing/dances, swaying/sways"),
    "circling": Motion(_circle, "circling/circles, moving in a circle/moves in a circle"),
    "standing still": Motion(_stand, "standing still/stands still, standing/stands, resting/rests"),
}


# ----------------------------------------------------------------------------------------------------------- places


@lru_cache(maxsize=8)
def _texture(height: int, device: torch.device) -> Tensor:
    """(1, 1, 512, 512) cloudy noise, about -1..1, 4 frame heights wide, no waves under 2.5 pixels."""
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)[None]) * 128  # in waves per frame height
    strength = np.where(frequency > 0.6, np.maximum(frequency, 0.6) ** -1.9, 0)
    white = np.fft.rfft2(np.random.default_rng(7).standard_normal((512, 512)))
    scale = np.fft.irfft2(white * strength).std() * 2
    fine = 1 / (1 + (frequency / (0.4 * height)) ** 8)
    return torch.from_numpy(np.fft.irfft2(white * strength * fine) / scale).float().to(device)[None, None]


class Canvas:
    """The coordinates and random numbers of some clips of the same place, and shapes to paint with.

    Fields are shaped to broadcast to (clips, channels, frames, height, width); random numbers are (clips, 1, 1, 1, 1).
    Masks are in [0, 1], colours (clips or 1, 3, 1, 1, 1) in [0, 1]. Positions in time, `t`, run over 0..1.
    """

    def __init__(self, numbers: Tensor, times: Tensor, ys: Tensor, xs: Tensor):
        self.numbers, self.used = numbers, 0
        self.height, self.pixel = len(ys), 1 / len(ys)
        self.t = times[:, None, :, None, None]
        self.y = 0.5 + ys.view(1, 1, 1, -1, 1)
        self.x = xs.view(1, 1, 1, 1, -1)

    def random(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        self.used += 1
        return _between(low, high, self.numbers[:, self.used - 1]).view(-1, 1, 1, 1, 1)

    def randoms(self, count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(clips, count, 1), for `dots`."""
        self.used += count
        return _between(low, high, self.numbers[:, self.used - count : self.used, None])

    def side(self) -> Tensor:
        """-1 or 1, by chance."""
        return 1 - 2 * (self.random() > 0.5).float()

    def colour(self, first: int, second: int) -> Tensor:
        """A colour by chance between two, given as 0xRRGGBB."""
        return lerp(_rgb(first), _rgb(second), self.random())

    def gradient(self, top: Tensor, bottom: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
        return lerp(top, bottom, ((self.y - start) / (end - start)).clamp(0, 1))

    def inside(self, distance: Tensor) -> Tensor:
        """Mask of where `distance` is positive, with an edge one pixel wide."""
        return (distance / self.pixel + 0.5).clamp(0, 1)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return ((self.x - x) ** 2 + (self.y - y) ** 2).sqrt()

    def disc(self, x: Tensor, y: Tensor, radius) -> Tensor:
        return self.inside(radius - self.distance(x, y))

    def glow(self, x: Tensor, y: Tensor, radius) -> Tensor:
        return (-((self.x - x) ** 2 + (self.y - y) ** 2) / radius**2).exp()

    def noise(self, x: Tensor, y: Tensor) -> Tensor:
        """Cloudy noise, about -1..1, at coordinates in frame heights; another part of it for each clip."""
        x, y = torch.broadcast_tensors(x + self.random(0, 4), y + self.random(0, 4))
        grid = torch.stack((x, y), dim=-1) / 2 - 1
        flat = grid.reshape(1, -1, x.shape[-1], 2)
        texture = _texture(self.height, flat.device)
        return F.grid_sample(texture, flat, padding_mode="reflection", align_corners=False).view(x.shape)

    def ridge(self, waves: float, height: float) -> Tensor:
        """A wavy line: its elevation, within about ±height, for every x."""
        total = 0
        for k, share in ((1, 0.6), (1.9, 0.3), (3.7, 0.15)):
            total = total + share * height * (2 * math.pi * (waves * k * self.x + self.random())).sin()
        return total

    def dots(self, x: Tensor, y: Tensor, radius, strength=1.0, stretch: float = 1.0) -> Tensor:
        """Mask of soft dots at x, y: (clips, dots, frames or 1) each; `stretch` makes them taller.

        A Gaussian is a product of one in x and one in y, so all dots together are one matrix product.
        """
        across = (-(((self.x[0] - x[..., None]) / radius) ** 2)).exp()  # (clips, dots, frames, width)
        down = (-(((self.y.view(-1) - y[..., None]) / (radius * stretch)) ** 2)).exp() * strength
        mask = down.permute(0, 2, 3, 1) @ across.permute(0, 2, 1, 3)
        return (2.2 * mask - 0.4).clamp(0, 1)[:, None]

    def time(self) -> Tensor:
        """(clips, 1, frames), for `dots`."""
        return self.t[:, :, :, 0, 0]

    def clouds(self, image: Tensor, colour: Tensor, cover: float, bottom: float, opacity: float = 0.9) -> Tensor:
        """Clouds that drift sideways, above y = bottom."""
        drift = self.side() * self.random(0.15, 0.35) * self.t
        noise = self.noise(self.x * 0.6 + drift, self.y * 1.2 + 0.1 * self.t)
        mask = ((noise - 0.5 + cover) * 2.5).clamp(0, 1) * ((bottom - self.y) * 4).clamp(0, 1)
        return lerp(image, colour, opacity * mask)


def _rgb(code: int) -> Tensor:
    return _rgb_on(code, torch.get_default_device())


@cache  # there are a few hundred, and to bring one to a GPU makes it wait
def _rgb_on(code: int, device: torch.device) -> Tensor:
    return torch.tensor([code >> 16, code >> 8 & 255, code & 255], device=device).view(1, 3, 1, 1, 1) / 255


WHITE = 0xFFFFFF


def _beach(c: Canvas) -> Tensor:
    image = c.gradient(c.colour(0x3A9BEA, 0x5CB8F5), c.colour(0xBFE6FA, 0xE2F3F7), 0, 0.4)
    image = c.clouds(image, _rgb(WHITE), 0.3, 0.35)
    horizon, shore = c.random(0.3, 0.38), c.random(0.56, 0.64)
    tide = 0.035 * (2 * math.pi * (c.t * c.random(0.8, 1.3) + c.random())).sin()
    edge = shore + tide + c.ridge(0.6, 0.035) + c.random(-0.06, 0.06) * c.x
    sand = lerp(c.colour(0xF2D495, 0xE9C27E), c.colour(0xFBE7BC, 0xF3D9A0), 0.5 + 0.5 * c.noise(c.x, c.y))
    sea = c.gradient(c.colour(0x1273B8, 0x0F86B5), c.colour(0x43CFCB, 0x5AD8DC), 0.35, 0.62)
    ripples = c.noise(c.x * 0.4 + 0.15 * c.t, c.y * 2 - 0.5 * c.t)
    image = lerp(image, lerp(sea, _rgb(WHITE), 0.35 * ripples.clamp(0, 1)), c.inside(c.y - horizon))
    image = lerp(image, sand, c.inside(c.y - edge))
    image = lerp(image, _rgb(WHITE), 0.9 * c.inside(0.028 - (c.y - edge).abs()))
    side = c.side()
    root, lean = side * c.random(0.6, 0.78), -side * c.random(0.05, 0.15)
    top = c.random(0.14, 0.24)
    trunk = root + lean * ((0.85 - c.y) / 0.65).clamp(0, 1) ** 2
    image = lerp(
        image, _rgb(0x8A5A33), c.inside(0.03 - (c.x - trunk).abs()) * c.inside(c.y - top) * c.inside(0.85 - c.y)
    )
    sway = 0.02 * (2 * math.pi * (c.t + c.random())).sin()
    dx = c.x - root - lean
    for reach, droop in ((-0.36, 0.13), (0.36, 0.13), (-0.26, 0.32), (0.26, 0.32), (-0.24, -0.1), (0.24, -0.1)):
        along = dx / reach
        leaf = 0.045 * (along * (1 - along) * 4).clamp(min=0).sqrt() - (c.y - top - (droop + sway) * along**2).abs()
        image = lerp(image, _rgb(0x2E8B3A), c.inside(leaf) * (along > 0) * (along < 1))
    return image


def _night(c: Canvas) -> Tensor:
    image = c.gradient(c.colour(0x050B2E, 0x0A1445), c.colour(0x1F3A86, 0x2C3F96))
    x, y, weight = c.randoms(45, -0.95, 0.95), c.randoms(45, 0, 0.85), c.randoms(45, 0.3, 1)
    twinkle = weight * (0.75 + 0.25 * (2 * math.pi * (2 * c.time() + x * 7)).sin())
    image = lerp(image, _rgb(0xFFF6D0), c.dots(x + 0.03 * c.time(), y, 0.03, twinkle[..., None]))
    mx, my, radius = c.side() * c.random(0.4, 0.65), c.random(0.16, 0.26) - 0.03 * c.t, c.random(0.11, 0.15)
    image = lerp(image, _rgb(0xFFF3C0), 0.35 * c.glow(mx, my, 2.2 * radius))
    crescent = c.disc(mx, my, radius) * (1 - c.disc(mx + c.side() * 0.55 * radius, my - 0.25 * radius, 0.85 * radius))
    image = lerp(image, _rgb(0xFFF4C4), crescent)
    image = c.clouds(image, _rgb(0x35478F), 0.2, 0.8, 0.5)
    image = lerp(image, c.colour(0x0F2450, 0x183058), c.inside(c.y - c.random(0.76, 0.82) + c.ridge(0.7, 0.07)))
    return lerp(image, _rgb(0x060A1E), c.inside(c.y - c.random(0.86, 0.92) + c.ridge(0.5, 0.06)))


def _grass(c: Canvas) -> Tensor:
    image = c.gradient(c.colour(0x4FA8F0, 0x6CBCF5), c.colour(0xC5E8FB, 0xDFF2FA), 0, 0.5)
    image = c.clouds(image, _rgb(WHITE), 0.45, 0.5)
    top = c.random(0.36, 0.46)
    image = lerp(image, c.colour(0x6DBB4A, 0x86C95A), c.inside(c.y - top + 0.04 + c.ridge(0.5, 0.06)))
    hill = c.inside(c.y - top - 0.06 + c.ridge(0.4, 0.05))
    green = c.gradient(c.colour(0x63BE3B, 0x55B53A), c.colour(0x2F8F2A, 0x3D9A22), 0.4, 1)
    wind = 0.05 * (2 * math.pi * (1.5 * c.t - c.x + c.random())).sin() * (1 - c.y)
    blades = c.noise(c.x + wind, c.y * 0.3)
    image = lerp(image, (green * (1 + 0.2 * blades)).clamp(0, 1), hill)
    x, y = c.randoms(24, -0.95, 0.95), c.randoms(24, 0.58, 1.0)
    swing = 0.015 * (2 * math.pi * (1.5 * c.time() + x)).sin()
    image = lerp(image, c.colour(0xFFE34A, 0xFFFFFF), c.dots(x[:, :12] + swing[:, :12], y[:, :12], 0.03))
    return lerp(image, c.colour(0xF0507A, 0xE84A3A), c.dots(x[:, 12:] + swing[:, 12:], y[:, 12:], 0.028))


def _pines(c: Canvas, image: Tensor, colour: Tensor, tip: Tensor, count: int, ground: float) -> Tensor:
    for k in range(count):
        x = (k + c.random(0.1, 0.9)) * 2 / count - 1
        top, foot = ground - c.random(0.25, 0.45), ground + c.random(-0.02, 0.06)
        slope = (c.y - top) * 0.3
        tree = c.inside(slope - (c.x - x).abs()) * c.inside(foot - c.y)
        image = lerp(image, colour, tree)
        image = lerp(image, tip, tree * c.inside(top + 0.12 - c.y + 0.5 * (c.x - x).abs()))
    return image


def _snow(c: Canvas) -> Tensor:
    image = c.gradient(c.colour(0x7F9CBC, 0x93A9C4), c.colour(0xB9CBDD, 0xCAD8E4), 0, 0.6)
    ground = 0.55
    image = lerp(image, _rgb(0xD3E0EC), c.inside(c.y - c.random(0.42, 0.5) + c.ridge(0.6, 0.06)))
    image = _pines(c, image, c.colour(0x2F5B52, 0x3C6A5C), _rgb(0xF4F9FF), 5, ground)
    field = c.gradient(_rgb(0xFFFFFF), c.colour(0xCBDDF2, 0xDCE8F5), 0.55, 1.05)
    image = lerp(image, field, c.inside(c.y - ground - 0.03 + c.ridge(0.5, 0.04)))
    image = lerp(image, _rgb(0xBBD0EA), 0.6 * (c.noise(c.x * 0.4, c.y) * c.inside(c.y - 0.62)).clamp(0, 1))
    for count, radius, speed in ((30, 0.028, 0.6), (18, 0.038, 0.9)):
        x, y = c.randoms(count, -1, 1), c.randoms(count, 0, 1.2)
        x = x + 0.05 * (2 * math.pi * (c.time() + y)).sin()
        image = lerp(image, _rgb(WHITE), c.dots(x, (y + speed * c.time()) % 1.2 - 0.1, radius))
    return image


def _desert(c: Canvas) -> Tensor:
    image = c.gradient(c.colour(0x59B4E6, 0x7CC4E8), c.colour(0xFBE3B0, 0xFDD9A0), 0, 0.5)
    sx, sy = c.random(-0.7, 0.7), c.random(0.1, 0.2)
    image = lerp(image, _rgb(0xFFF7C0), 0.7 * c.glow(sx, sy, 0.22 + 0.02 * (12 * c.t).sin()))
    image = lerp(image, _rgb(0xFFF6B8), c.disc(sx, sy, 0.08))
    for base, light, dark in ((0.42, 0xEDB565, 0xD89A4D), (0.56, 0xE8A552, 0xC98338), (0.76, 0xF0B25A, 0xD08A3A)):
        line = base + c.random(-0.03, 0.03) + c.ridge(0.45, 0.08)
        ripples = c.noise(c.x * 0.5 + 0.2 * c.t, (c.y - line) * 2)
        dune = lerp(_rgb(light), _rgb(dark), ((c.y - line) * 3 + 0.35 * ripples).clamp(0, 1))
        image = lerp(image, dune, c.inside(c.y - line))
        if base == 0.42:
            continue
        # A cactus behind the next dune: a stem and two arms, each a capsule.
        x, foot, green = c.random(-0.75, 0.75), base + 0.12, c.colour(0x2F7D3B, 0x3C8F45)
        for dx, low, high, wide in ((0, 0, 0.36, 0.035), (-0.1, 0.14, 0.26, 0.024), (0.1, 0.1, 0.22, 0.024)):
            near = ((c.y - (foot - high)).clamp(max=0) + (c.y - (foot - low)).clamp(min=0)) ** 2
            image = lerp(image, green, c.inside(wide - ((c.x - x - dx) ** 2 + near).sqrt()))
        for low, left, right in ((0.14, -0.1, 0), (0.1, 0, 0.1)):
            bar = torch.minimum(c.x - x - left, x + right - c.x)
            image = lerp(image, green, c.inside(bar) * c.inside(0.022 - (c.y - foot + low).abs()))
    return image


def _sunset(c: Canvas) -> Tensor:
    horizon = c.random(0.58, 0.66)
    image = c.gradient(c.colour(0x4A2A7A, 0x6A2F80), c.colour(0xF0524A, 0xF26A3A), 0, 0.4)
    image = lerp(image, _rgb(0xFFC04A), ((c.y - 0.3) * 3).clamp(0, 1))
    x, radius = c.random(-0.5, 0.5), c.random(0.19, 0.25)
    y = horizon - c.random(0.04, 0.1) + 0.08 * c.t
    image = lerp(image, _rgb(0xFFE08A), 0.6 * c.glow(x, y, 2 * radius))
    image = lerp(image, _rgb(0xFFF0A0), c.disc(x, y, radius))
    bands = c.noise(c.x * 0.3 + c.side() * 0.2 * c.t, c.y * 2)
    image = lerp(
        image, c.colour(0x8A2F6A, 0xB03A5A), 0.75 * ((bands - 0.15) * 3).clamp(0, 1) * (0.6 - c.y).clamp(0, 0.2) * 5
    )
    sea = c.gradient(c.colour(0xC2483E, 0xB04050), c.colour(0x3A1B55, 0x2B1A4A), 0.6, 1)
    waves = c.noise(c.x * 0.35 + 0.1 * c.t, c.y * 2 - 0.5 * c.t)
    path = (-(((c.x - x) / (0.12 + 0.35 * (c.y - horizon).clamp(min=0))) ** 2)).exp()
    sea = lerp(sea, _rgb(0xFFC860), (path * (0.55 + 0.7 * waves)).clamp(0, 1))
    sea = lerp(sea, _rgb(0xF08050), 0.3 * waves.clamp(0, 1))
    return lerp(image, sea, c.inside(c.y - horizon))


def _ocean(c: Canvas) -> Tensor:
    image = c.gradient(c.colour(0x2FB4DC, 0x3AC4D8), c.colour(0x06306E, 0x083A7C))
    source = c.random(-0.6, 0.6)
    fan = (c.x - source) / (c.y + 0.5)
    rays = (9 * fan + 2 * c.t + 6 * c.random()).sin() + (15 * fan - 3 * c.t + 6 * c.random()).sin()
    image = lerp(image, _rgb(0xBFF4FF), (0.24 * rays).clamp(0, 1) * (1 - c.y).clamp(0, 1))
    surface = 0.05 + 0.02 * (9 * c.x + 5 * c.t).sin()
    image = lerp(image, _rgb(0xD8FAFF), 0.7 * c.inside(surface - c.y))
    image = lerp(image, c.colour(0x14507A, 0x2A5E78), c.inside(c.y - 0.9 + c.ridge(0.6, 0.05)))
    for _ in range(5):
        x, top, phase = c.random(-0.8, 0.8), c.random(0.5, 0.72), c.random(0, 6)
        bend = 0.05 * (1 - c.y) * 2 * (9 * c.y + 5 * c.t + phase).sin()
        weed = 0.03 * ((c.y - top) * 8).clamp(0, 1) - (c.x - x - bend).abs()
        image = lerp(image, c.colour(0x0F6B4F, 0x1F8A55), c.inside(weed) * c.inside(c.y - top))
    x, y, size = c.randoms(16, -0.85, 0.85), c.randoms(16, 0, 1.2), c.randoms(16, 0.028, 0.05)
    x = x + 0.03 * (2 * math.pi * (1.5 * c.time() + y)).sin()
    bubbles = c.dots(x, (y - 0.7 * c.time()) % 1.2 - 0.1, size[..., None])
    return lerp(image, _rgb(0xD6F6FF), 0.75 * bubbles)


def _space(c: Canvas) -> Tensor:
    cloud = c.noise(c.x * 0.5 + 0.1 * c.t, c.y * 0.5 + 0.05 * c.t)
    other = c.noise(c.x * 0.5 - 0.1 * c.t, c.y * 0.5)
    image = lerp(_rgb(0x06030F), c.colour(0x6A1FA0, 0x9A1F8A), (0.15 + 0.9 * cloud).clamp(0, 1))
    image = lerp(image, c.colour(0xD040A0, 0x4040D0), 0.6 * (other * cloud.clamp(min=0) * 1.5).clamp(0, 1))
    x, y, weight = c.randoms(50, -1.0, 1.0), c.randoms(50, 0, 1), c.randoms(50, 0.25, 1)
    twinkle = weight * (0.8 + 0.2 * (2 * math.pi * (2 * c.time() + x * 7)).sin())
    drift = 0.1 * c.time()
    image = lerp(image, _rgb(WHITE), c.dots((x + 1 - drift) % 2 - 1, y, 0.028, twinkle[..., None]))
    px, py, radius = c.side() * c.random(0.45, 0.65), c.random(0.2, 0.8), c.random(0.15, 0.2)
    py = py - 0.04 * c.t
    dx, dy = (c.x - px) / radius, (c.y - py) / radius
    tilt = c.random(-0.5, 0.5)
    u, v = dx * tilt.cos() + dy * tilt.sin(), dy * tilt.cos() - dx * tilt.sin()
    shade = (0.75 - 0.35 * (dx + dy)).clamp(0.25, 1.1)
    stripes = 0.5 + 0.5 * (7 * v + 0.5 * u).sin()
    warm = lerp(_rgb(0xE0803A), _rgb(0xFAD9A0), stripes)
    cold = lerp(_rgb(0x3A90E0), _rgb(0xA0E8F0), stripes)
    body = lerp(warm, cold, (c.random() > 0.5).float())
    image = lerp(image, (body * shade).clamp(0, 1), c.inside(radius * (1 - (dx**2 + dy**2).sqrt())))
    ring = c.inside(radius * (0.14 - ((u**2 + (v / 0.3) ** 2).sqrt() - 1.65).abs() * 0.6))
    hidden = ((v < 0) & (dx**2 + dy**2 < 1)).float()  # the far half runs behind the planet
    return lerp(image, c.colour(0xF0D8B0, 0xC8B0F0), 0.9 * ring * (1 - hidden))


def _forest(c: Canvas) -> Tensor:
    image = c.gradient(c.colour(0x5FA05A, 0x79B060), c.colour(0xA5C878, 0x8FBF70), 0, 0.7)
    rays = (6 * (c.x + 0.6 * c.y) + c.t + 6 * c.random()).sin().clamp(min=0)
    image = lerp(image, _rgb(0xF2F5B8), 0.45 * rays)
    for layer, (count, wide, foot, bark) in enumerate(((7, 0.025, 0.66, 0x5E6B3C), (4, 0.055, 0.8, 0x55371F))):
        for k in range(count):
            x = (k + c.random(0.15, 0.85)) * 2 / count - 1
            trunk = wide * (1 + 0.5 * ((c.y - foot + 0.1) * 6).clamp(0, 1) ** 2) - (c.x - x - 0.03 * c.y).abs()
            image = lerp(image, _rgb(bark), c.inside(trunk) * c.inside(foot + 0.06 - c.y))
        if layer == 0:
            line = 0.66 + c.ridge(0.5, 0.03)
            floor = c.gradient(c.colour(0x4F7F2F, 0x5F8A35), c.colour(0x2B4A1C, 0x3A4A1C), 0.65, 1)
            floor = floor * (1 + 0.3 * c.noise(c.x, c.y * 1.5))
            image = lerp(image, floor.clamp(0, 1), c.inside(c.y - line))
    rustle = 0.03 * (2 * math.pi * (c.t + c.x)).sin()
    leaves = c.noise(c.x + rustle, c.y + rustle)
    depth = 0.3 + c.ridge(0.9, 0.06) + 0.16 * leaves - c.y
    green = lerp(c.colour(0x1F5A22, 0x1A4F2A), c.colour(0x3F8F35, 0x55962F), (0.5 + 0.7 * leaves).clamp(0, 1))
    image = lerp(image, green, c.inside(depth))
    bushes = c.inside(c.y - 0.92 + c.ridge(1.6, 0.06) + 0.08 * leaves)
    return lerp(image, c.colour(0x1F4F1F, 0x2A5F25), bushes)


def _city(c: Canvas) -> Tensor:
    image = c.gradient(c.colour(0x6F9CC8, 0x8FA5C8), c.colour(0xE8C8B8, 0xF0DCC0), 0, 0.7)
    image = c.clouds(image, _rgb(0xF5EFEF), 0.25, 0.5)
    soft = min(1.0, 3.0 * 0.06 / (2 * math.pi * c.pixel))  # windows blur when they get near the size of a pixel
    lines = (0.5 + 3 * soft * (2 * math.pi * c.y / 0.115).sin()).clamp(0, 1)
    for count, low, high, first, second in ((7, 0.12, 0.35, 0x7F8FA8, 0x98A2B8), (6, 0.25, 0.6, 0x3F4A60, 0x6A4A48)):
        for k in range(count):
            x, half = (k + c.random(0.25, 0.75)) * 2 / count - 1, c.random(0.09, 0.15)
            top, wall = c.random(low, high), c.colour(first, second)
            block = c.inside(half - (c.x - x).abs()) * c.inside(c.y - top)
            image = lerp(image, wall, block)
            panes = (0.5 + 3 * soft * (2 * math.pi * (c.x - x) / 0.105).cos()).clamp(0, 1)
            lit = lines * panes * c.inside(half - 0.03 - (c.x - x).abs()) * c.inside(c.y - top - 0.05)
            image = lerp(image, c.colour(0xFFE08A, 0xFFD060) if low > 0.2 else _rgb(0xD5DCE8), 0.85 * lit)
    image = lerp(image, _rgb(0xA8A8AC), c.inside(c.y - 0.8))
    image = lerp(image, _rgb(0x3A3A42), c.inside(c.y - 0.835))
    dash = (0.5 + soft * 3 * (2 * math.pi * (c.x / 0.4 + c.side() * 1.6 * c.t + c.random())).sin()).clamp(0, 1)
    return lerp(image, _rgb(0xF5F0D0), dash * c.inside(0.02 - (c.y - 0.92).abs()))


def _mountains(c: Canvas) -> Tensor:
    image = c.gradient(c.colour(0x3F8FE0, 0x5FA8EA), c.colour(0xCFE6F5, 0xE5EEF5), 0, 0.6)
    image = c.clouds(image, _rgb(WHITE), 0.3, 0.5)
    for count, low, high, rock, shadow in ((3, 0.2, 0.32, 0x8A9AB8, 0x7686A8), (3, 0.08, 0.3, 0x6F7488, 0x4A5068)):
        for k in range(count):
            x, top, slope = (k + c.random(0.1, 0.9)) * 1.8 / count - 0.9, c.random(low, high), c.random(1.0, 1.5)
            rough = 0.05 * c.noise(c.x, c.y)
            dx = c.x - x
            lit = lerp(_rgb(rock), _rgb(shadow), c.inside(dx + rough))
            snow = lerp(_rgb(WHITE), _rgb(0xC5D3EA), c.inside(dx + rough))
            cap = c.inside(top + 0.17 - c.y + 0.8 * rough + 0.03 * (40 * dx).sin())
            peak = c.inside((c.y - top + rough - slope * dx.abs()) / slope)
            image = lerp(image, lerp(lit, snow, cap), peak)
    mist = c.noise(c.x * 0.4 + 0.3 * c.t, c.y * 1.2)
    image = lerp(image, _rgb(0xE8EFF8), 0.6 * mist.clamp(0, 1) * (1 - ((c.y - 0.62) / 0.2) ** 2).clamp(0, 1))
    image = lerp(image, c.colour(0x5A8A55, 0x6A9A58), c.inside(c.y - 0.76 + c.ridge(0.6, 0.05)))
    return lerp(image, c.colour(0x3A6B3A, 0x4A7A3A), c.inside(c.y - 0.88 + c.ridge(0.8, 0.05)))


def _rain(c: Canvas) -> Tensor:
    image = c.gradient(c.colour(0x4F5A68, 0x5C6674), c.colour(0x8D9AA6, 0x96A0AA), 0, 0.7)
    cloud = c.noise(c.x * 0.6 + c.side() * 0.25 * c.t, c.y)
    edge = c.random(0.2, 0.27) + 0.05 * cloud + 0.04 * (9 * c.x + 6 * c.random()).sin().abs() - c.y
    image = lerp(image, (_rgb(0x363E4A) * (1.1 + 0.4 * cloud)).clamp(0, 1), (edge * 14 + 0.5).clamp(0, 1))
    ground = c.gradient(c.colour(0x5B6B70, 0x5E6672), c.colour(0x38464E, 0x3C424E), 0.75, 1)
    image = lerp(image, ground, c.inside(c.y - 0.77 + c.ridge(0.4, 0.02)))
    for _ in range(5):  # ripples that widen and fade
        x, y, phase = c.random(-0.8, 0.8), c.random(0.83, 0.97), (2 * c.t + c.random()) % 1
        away = ((c.x - x) ** 2 + ((c.y - y) * 3) ** 2).sqrt() - 0.16 * phase
        image = lerp(image, _rgb(0xB8D0E0), (1 - phase) * (1 - away.abs() / 0.05).clamp(0, 1))
    x, y = c.randoms(60, -0.95, 0.95), c.randoms(60, 0, 1.3)
    fall = c.dots(x, (y + c.randoms(60, 2.0, 2.6) * c.time()) % 1.3 - 0.1, 0.02, 0.8, stretch=4.5)
    return lerp(image, _rgb(0xC4E0F8), 0.85 * fall * (0.2 + 4 * (c.y - 0.12)).clamp(0.2, 1))


PLACES = {
    "at the beach": Place(_beach, "at the beach, on the beach, at the seaside", "beach, sandy beach, seaside"),
    "in the night sky": Place(
        _night, "in the night sky, at night, under the stars, in the moonlight", "night sky, starry night, night"
    ),
    "on the grass": Place(
        _grass, "on the grass, in the grass, in the meadow, on a green field", "green meadow, meadow, grass"
    ),
    "in the snow": Place(
        _snow, "in the snow, in a snowy field, in falling snow, in winter", "snowy field, snow, winter"
    ),
    "in the desert": Place(_desert, "in the desert, in a sandy desert, on the dunes", "desert, sand dunes"),
    "at sunset": Place(
        _sunset, "at sunset, in the sunset, in the evening sun, at dusk", "sunset, evening, red sunset sky"
    ),
    "in the ocean": Place(
        _ocean, "in the ocean, in the sea, under water, underwater, under the sea", "ocean, sea, deep sea"
    ),
    "in space": Place(_space, "in space, in outer space, among the planets", "outer space, space, galaxy"),
    "in the forest": Place(_forest, "in the forest, in the woods, among the trees", "forest, woods, dark forest"),
    "in the city": Place(_city, "in the city, in the town, on the street", "city, city street, street"),
    "in the mountains": Place(
        _mountains, "in the mountains, in front of the mountains, in the alps", "mountains, snowy peaks"
    ),
    "in the rain": Place(_rain, "in the rain, in rainy weather, in a rainstorm", "rain, rainy day, rainy weather"),
}


# --------------------------------------------------------------------------------------------------------- captions

# {a}: "a panda", {the}: "the panda", {name}: "panda"; {doing}: "jumping", {does}: "jumps"; {where}: "in the snow",
# {setting}: "snowy field". The first of each group is the plain one and is drawn most often.
TEMPLATES = {
    "full": (
        "{a} {doing} {where}",
        "{the} {does} {where}",
        "{a} {does} {where}",
        "{a} is {doing} {where}",
        "{where}, {a} {doing}",
        "{where} {a} {does}",
        "{a} {where}, {doing}",
        "{setting}, {name}, it {does}",
        "{name} {doing}, {setting}",
        "{setting}, {a} {doing}",
        "{name} {doing} {where}",
    ),
    "no place": ("{a} {doing}", "{the} {does}", "{a} is {doing}", "{name} {doing}", "{name}, it {does}"),
    "no motion": ("{a} {where}", "{the} {where}", "{where}, {a}", "{name}, {setting}", "{name} {where}"),
    "object": ("{a}", "{name}", "{the}"),
}
PAIR_TEMPLATES = {
    "full": ("{a} {doing} {where}", "{where}, {a} {doing}", "{a} are {doing} {where}", "{name} {doing}, {setting}"),
    "no place": ("{a} {doing}", "{a} are {doing}", "{name} {doing}"),
    "no motion": ("{a} {where}", "{where}, {a}", "{name}, {setting}"),
    "object": ("{a}", "{name}"),
}


def with_article(name: str) -> str:
    return ("an " if name[0] in "aeiou" and not name.startswith("uni") else "a ") + name


def caption(rng: np.random.Generator, objects: tuple[str, ...], place: str, motion: str) -> str:
    """A caption in random words, or in the same ones where the generator is in the same state."""

    def pick(choices, plain: float) -> str:  # the first with probability `plain`, else any
        choices = choices.split(", ") if isinstance(choices, str) else choices
        return choices[0] if rng.random() < plain else choices[rng.integers(len(choices))]

    names = [pick(f"{name}, {OBJECTS[name].synonyms or name}", 0.6) for name in objects]
    group = ("full", "no place", "no motion", "object")[rng.choice(4, p=(0.66, 0.12, 0.12, 0.1))]
    doing, does = pick(MOTIONS[motion].wordings, 0.5).split("/")
    return pick((TEMPLATES if len(names) == 1 else PAIR_TEMPLATES)[group], 0.3).format(
        a=" and ".join(with_article(name) for name in names),
        the="the " + names[0],
        name=" and ".join(names),
        doing=doing,
        does=does,
        where=pick(PLACES[place].phrases, 0.5),
        setting=pick(PLACES[place].settings, 0.3),
    )


def plain_caption(objects: str | tuple[str, ...], place: str, motion: str) -> str:
    """The caption of canonical names: "a panda jumping in the snow", "a cat and an owl jumping in the snow"."""
    names = (objects,) if isinstance(objects, str) else objects
    return f"{' and '.join(map(with_article, names))} {motion} {place}"


def vocabulary() -> set[str]:
    """All words that captions can contain."""
    texts = ["a an the is are it and", *OBJECTS]
    texts += [entry.synonyms for entry in OBJECTS.values()] + [entry.wordings for entry in MOTIONS.values()]
    texts += [f"{entry.phrases} {entry.settings}" for entry in PLACES.values()]
    return set(re.findall("[a-z]+", " ".join(texts)))


def held_out(object: str, place: str, motion: str) -> bool:
    """Whether the combination is kept from training, to test with: one in ten are."""
    return zlib.crc32(f"{object}|{place}|{motion}".encode()) % 10 == 0


def sample(
    rng: np.random.Generator, *, train: bool = True, pairs: float = 0.4, motions: tuple[str, ...] = tuple(MOTIONS)
) -> Scene:
    """A random scene: never of a held-out combination, or with train=False only of those, with plain captions.

    `pairs` is the share of scenes of two objects in training, `motions` are those to choose from.
    """
    names, places = list(OBJECTS), list(PLACES)
    while True:
        count = 2 if train and rng.random() < pairs else 1
        objects = tuple(names[k] for k in rng.choice(len(names), count, replace=False))
        place, motion = places[rng.integers(len(places))], motions[rng.integers(len(motions))]
        kept = [held_out(name, place, motion) for name in objects]
        if (train and not any(kept)) or (not train and all(kept)):
            break
    told = caption(rng, objects, place, motion) if train else plain_caption(objects[0], place, motion)
    return Scene(objects, place, motion, told, int(rng.integers(2**31)))


# -------------------------------------------------------------------------------------------------------- rendering


@lru_cache(maxsize=1)
def sprites() -> list[Tensor]:
    """The objects with soft shadows: for each of LEVELS, (objects, 4, side, side) premultiplied RGBA in [0, 1]."""
    try:
        font = ImageFont.truetype(FONT, 109)  # the one size the bitmaps come in
    except OSError:
        raise Show1Error(
            f"The emoji font {FONT} is missing.", "Install its package: apt-get install fonts-noto-color-emoji"
        ) from None
    pictures = []
    for entry in OBJECTS.values():
        picture = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(picture).text((10, 10), entry.emoji, font=font, embedded_color=True)
        picture = picture.crop(picture.getbbox())
        scale = SPRITE * SPRITE_FILL / max(picture.size)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
        )
        canvas = Image.new("RGBA", (SPRITE, SPRITE))
        canvas.paste(picture, ((SPRITE - picture.width) // 2, (SPRITE - picture.height) // 2))
        pictures.append(torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255)
    pictures = torch.stack(pictures)
    alpha = pictures[:, 3:]
    # A dark, blurred rim sets the object off from a background of its own colour.
    shadow = 0.4 * F.avg_pool2d(F.avg_pool2d(alpha, 9, 1, 4), 9, 1, 4)
    full = torch.cat((pictures[:, :3] * alpha, alpha + shadow * (1 - alpha)), 1)
    return [F.interpolate(full, size=(n, n), mode="bilinear", antialias=True, align_corners=False) for n in LEVELS]


def from_left(scene: Scene) -> tuple[str, ...]:
    """A scene's objects from left to right: of two, the darker one is on the left, however the caption puts them.

    The text encoder tells which two there are but hardly in which order. Were either on either side, a model would have
    to agree with itself which is where, and draws the same one twice.
    """
    return tuple(sorted(scene.objects, key=_brightness().__getitem__))


@cache
def _brightness() -> dict[str, float]:
    return dict(zip(OBJECTS, sprites()[0][:, :3].mean((1, 2, 3)).tolist(), strict=True))


@cache
def _sprites_on(device: torch.device) -> list[Tensor]:
    return [pictures.to(device) for pictures in sprites()]


def paths(scenes: list[Scene], times: Tensor) -> Tensor:
    """(4, clips, frames): x, y, relative size and angle along the path of every scene; times as for `render`."""
    return _paths(scenes, _numbers(scenes), _times(scenes, times))


def _numbers(scenes: list[Scene]) -> Tensor:
    numbers = [np.random.default_rng(scene.seed).random(RANDOM_NUMBERS, np.float32) for scene in scenes]
    return torch.from_numpy(np.stack(numbers)).to(torch.get_default_device())


def _times(scenes: list[Scene], times: Tensor) -> Tensor:
    return times.to(torch.get_default_device(), torch.float32).expand(len(scenes), -1)


def _paths(scenes: list[Scene], numbers: Tensor, times: Tensor) -> Tensor:
    paths = torch.empty(4, *times.shape)
    for motion in dict.fromkeys(scene.motion for scene in scenes):
        chosen = torch.tensor([index for index, scene in enumerate(scenes) if scene.motion == motion])
        paths[:, chosen] = torch.stack(MOTIONS[motion].path(times[chosen], numbers[chosen].T[..., None]))
    return paths


def _place(scenes: list[Scene], numbers: Tensor, paths: Tensor, order: int) -> Tensor:
    """(5, clips, frames): x, y, size, angle and flip of each scene's object on the left (order 0) or on the right."""
    x, y, size, angle = paths
    base, tilt, _, gap = numbers[:, PATH_NUMBERS - 4 : PATH_NUMBERS].T[..., None]
    pair = torch.tensor([[len(scene.objects) == 2] for scene in scenes])
    x = torch.where(pair, 0.45 * x + (2 * order - 1) * _between(0.27, 0.33, gap), x)
    size = size * torch.where(pair, _between(0.48, 0.56, base), _between(0.7, 0.88, base))
    looks = torch.tensor([[OBJECTS[from_left(scene)[order]].faces] for scene in scenes])
    wanted = torch.tensor([[MOTIONS[scene.motion].faces] for scene in scenes])
    flip = torch.where((wanted != 0) & (looks == -wanted), -1.0, 1.0)
    return torch.stack(torch.broadcast_tensors(x, y, size, angle + _between(-0.12, 0.12, tilt), flip))


def _draw(frames: Tensor, where: Tensor, objects: Tensor, rows: Tensor, ys: Tensor, xs: Tensor) -> None:
    """Draw one object onto each of frames[where], (n, 4, height, width), in place; rows: (5, n) as in `_place`."""
    height, ys, xs = len(ys), ys.view(1, -1, 1), xs.view(1, 1, -1)
    side = rows[2] / SPRITE_FILL  # of the whole sprite
    level = (torch.tensor(LEVELS)[:, None] >= side * height).sum(0).clamp(min=1) - 1  # the smallest that is big enough
    for k in level.unique().tolist():
        chosen = level == k
        x, y, _, angle, flip = rows[:, chosen, None, None]
        dx, dy, half = xs - x, ys - y, side[chosen, None, None] / 2
        across = (dx * angle.cos() + dy * angle.sin()) * flip / half
        down = (dy * angle.cos() - dx * angle.sin()) / half
        pictures = _sprites_on(objects.device)[k][objects[chosen]]
        drawn = F.grid_sample(pictures, torch.stack((across, down), dim=-1), align_corners=False)
        target = where[chosen]
        frames[target] = frames[target] * (1 - drawn[:, 3:]) + drawn


@torch.no_grad()
def render(scenes: list[Scene], height: int, width: int, times: Tensor, *, coverage: bool = False) -> Tensor:
    """Paint clips: float32 (batch, 3, frames, height, width) in [-1, 1], on PyTorch's default device.

    `times` is (frames,) or (batch, frames) in [0, 1], 0 the first frame of the clip and 1 the last. With `coverage`
    a fourth channel says how much of a pixel the objects cover, from 0 to 1.

    All sizes show the same, so that stages have to enlarge and not to guess: whatever its shape, a frame is 1.6 heights
    wide, as the cascade stretches a little in the end, and frames less than SMALL high are zoomed out by 2 to 4 %, as
    the pixel upscale enlarges them four times with their corner pixels kept in place.
    """
    if height >= SMALL:
        return _paint(scenes, _pixels(height), _pixels(width) * ASPECT, times, coverage)
    # At this size an edge one pixel wide is too coarse: average a picture twice as large.
    ys, xs = (
        _pixels(2 * size) * heights * (1 - 1 / (4 * size)) / (1 - 1 / size)
        for size, heights in ((height, 1), (width, ASPECT))
    )
    return F.avg_pool3d(_paint(scenes, ys, xs, times, coverage), (1, 2, 2))


def _pixels(count: int) -> Tensor:
    """Where a row's pixels are, between -0.5 and 0.5."""
    return (torch.arange(count) + 0.5) / count - 0.5


def _paint(scenes: list[Scene], ys: Tensor, xs: Tensor, times: Tensor, coverage: bool) -> Tensor:
    """Paint clips as `render` returns them, at pixels (ys, xs): in frame heights, from the middle of the frame."""
    height, width = len(ys), len(xs)
    times = _times(scenes, times)
    count = times.shape[1]
    numbers = _numbers(scenes)
    clips = torch.zeros(len(scenes), count, 4, height, width)
    for place in dict.fromkeys(scene.place for scene in scenes):
        chosen = torch.tensor([index for index, scene in enumerate(scenes) if scene.place == place])
        canvas = Canvas(numbers[chosen, PATH_NUMBERS:], times[chosen], ys, xs)
        clips[chosen, :, :3] = PLACES[place].paint(canvas).transpose(1, 2).expand(-1, count, 3, height, width)
    names, paths = list(OBJECTS), _paths(scenes, numbers, times)
    for order in (0, 1):
        chosen = [index for index, scene in enumerate(scenes) if len(scene.objects) > order]
        if chosen:
            some = [scenes[index] for index in chosen]
            rows = _place(some, numbers[chosen], paths[:, chosen], order)
            where = (torch.tensor(chosen)[:, None] * count + torch.arange(count)).view(-1)
            objects = torch.tensor([names.index(from_left(scene)[order]) for scene in some]).repeat_interleave(count)
            _draw(clips.view(-1, 4, height, width), where, objects, rows.flatten(1), ys, xs)
    clips = clips.clamp(0, 1).transpose(1, 2)
    pictures = clips[:, :3] * 2 - 1
    return torch.cat((pictures, clips[:, 3:]), dim=1) if coverage else pictures.contiguous()
