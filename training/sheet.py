"""Draw the README's contact sheet of mini's videos: `python -m training.sheet docs/mini.png`."""

import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from show_1 import Show1Pipeline

PROMPTS = (
    "a panda jumping in the snow",
    "a rocket flying up in space",
    "a red balloon at sunset",
    "a fish moving left in the ocean",
    "a fox moving right on the grass",
    "a robot spinning in the city",
)
FRAMES = (0, 9, 18, 28)  # of 29


def main(path: str) -> None:
    pipeline = Show1Pipeline.from_cascade("mini", "cpu")
    font = ImageFont.load_default(18)
    rows = []
    for prompt in PROMPTS:
        frames = pipeline(prompt, seed=1).frames
        label = Image.new("RGB", (frames.shape[2] * len(FRAMES), 26), "white")
        ImageDraw.Draw(label).text((4, 2), prompt, "black", font)
        rows += [np.concatenate([frames[n] for n in FRAMES], axis=1), np.asarray(label)]
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
