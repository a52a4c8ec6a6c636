"""Clips to frames for people, and frames to a file that plays everywhere, with the settings that made it inside."""

import errno
import json
import os
import re
import secrets
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch

from show_1.errors import Show1Error
from show_1.files import writing

# Else it forks this process to start ffmpeg, and each page of the models' memory that is written next is a page fault.
os.environ.setdefault("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", "1")

PROGRAM = "show-1"
ROOM = 8 * 2**20  # bytes; a Show-1 video of pure noise, the worst case, took 4.4 million

# Players take untagged video of this size for BT.601 or BT.709 as they please: convert to one, and say which.
TO_BT709 = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+bitexact"
TAGGED_BT709 = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"

REINSTALL = (
    'Bring a working one with "pip install --force-reinstall imageio-ffmpeg", and leave IMAGEIO_FFMPEG_EXE unset.'
)


def to_uint8(clip: torch.Tensor) -> np.ndarray:
    """Return the frames of a (1, 3, frames, height, width) clip in [−1, 1] as (frames, height, width, 3) in 0…255.

    Values beyond the range are clamped; fractions are cut off, as the original does.
    """
    frames = (clip[0].permute(1, 2, 3, 0).float() / 2 + 0.5).clamp(0, 1)
    return (frames * 255).to(torch.uint8).cpu().numpy()


def from_uint8(frames) -> torch.Tensor:
    """Return (frames, height, width, 3) images of 0…255 as a (1, 3, frames, height, width) clip in [−1, 1]."""
    stack = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))
    return stack.permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def write(path: str | Path, frames: np.ndarray, fps: int, metadata: dict[str, Any], *, effort: str = "medium") -> None:
    """Write frames (frames, height, width, 3), uint8 RGB, as H.264 in MP4; `path` appears only when it is complete.

    `metadata` (anything JSON can hold) comes back from `read_metadata`, with "program" added; "prompt", if in it,
    becomes the video's title. `effort` is one of x264's presets: with less of it the file is larger and sooner there.
    The same input gives the same bytes.

    Raises Show1Error for an odd height or width, a folder that is missing, full or not writable, and if ffmpeg fails;
    and where `path` can no longer be written, but its folder can, as the video then has another name there. ValueError
    for frames that are none, not uint8 or not RGB.
    """
    path = Path(path)
    count, height, width, channels = frames.shape
    if frames.dtype != np.uint8 or not count or channels != 3:
        # ffmpeg takes any bytes for a picture, and none at all for a video.
        raise ValueError(f"frames must be one or more of uint8 in RGB, not {count} of {channels} {frames.dtype}")
    if height % 2 or width % 2:
        raise Show1Error(
            f"Frames of height {height} and width {width} cannot be stored in {path.name}: H.264 needs even sizes.",
            "Choose an even height and width for the last stage.",
        )
    # A hidden folder beside the result: on the same disk, so that the finished file can be moved into place in one go,
    # and taken away with all that is in it however this ends.
    with writing(path), tempfile.TemporaryDirectory(prefix=f".{PROGRAM}-", dir=path.parent) as scratch:
        video, tags = Path(scratch, "video.mp4").absolute(), Path(scratch, "tags.txt").absolute()
        # A file, as the command line may be too short: 128 KiB an argument on Linux, 32 KiB in all on Windows.
        tags.write_text(_to_tags(metadata), encoding="utf-8", errors="replace", newline="\n")
        ended = _run_ffmpeg(
            *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0"),
            *("-f", "ffmetadata", "-i", f"file:{tags}", "-map", "0:v", "-map_metadata", "1"),
            *("-vf", f"{TO_BT709},{TAGGED_BT709}"),
            *("-c:v", "libx264", "-preset", effort, "-crf", "17", "-pix_fmt", "yuv420p", "-movflags", "+faststart"),
            # No versions in the file, and no number of threads that shapes it.
            *("-fflags", "+bitexact", "-flags:v", "+bitexact", "-threads", "1"),
            f"file:{video}",
            stdin=frames.tobytes(),
        )
        _check_made(ended, path)
        try:
            os.replace(video, path)
        except OSError as error:  # as where it has become a folder since: what took hours to make is not thrown away
            kept = path.with_stem(f"{path.stem}-{secrets.token_hex(4)}")
            os.replace(video, kept)
            raise Show1Error(
                f"The video is made, and cannot be put at {path}: {error.strerror}.", f"Take it from {kept}."
            ) from None


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the `metadata` that `write` put into the video, with "program".

    They are at the front of the file: a video whose end is cut off still tells them. Raises Show1Error if the file is
    missing, damaged, no MP4, or was made by another program.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise Show1Error(f"There is no file {path}.", "Check the path.")
    # The format is forced: ffmpeg would otherwise also follow a playlist to wherever it points.
    read = _run_ffmpeg("-f", "mp4", "-i", f"file:{path.absolute()}", "-f", "ffmetadata", "pipe:1")
    if read.returncode:
        raise Show1Error(f"{path.name} is damaged, or is no MP4 video.", "Choose a video that Show-1 made.")
    try:
        metadata = json.loads(_from_tags(read.stdout.decode(errors="replace")).get("comment", ""))
        # Its escapes may stand for halves of characters, which nothing could show or send on.
        metadata = json.loads(json.dumps(metadata, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict) or metadata.get("program") != PROGRAM:
        raise Show1Error(
            f"{path.name} holds no settings: another program made it, or it is damaged.",
            "Choose a video that Show-1 made.",
        )
    return metadata


def read_frames(path: str | Path) -> np.ndarray:
    """Return a video's frames, (frames, height, width, 3) uint8; raises Show1Error if it is damaged or no MP4."""
    # As one PPM after the other, which tell their size.
    source = ("-f", "mp4", "-i", f"file:{Path(path).absolute()}")
    read = _run_ffmpeg(*source, "-f", "image2pipe", "-c:v", "ppm", "pipe:1")
    size = re.match(rb"P6\n(\d+) (\d+)\n255\n", read.stdout)
    if read.returncode or not size:
        raise Show1Error(f"{Path(path).name} is damaged, or is no MP4 video.", "Choose a video that Show-1 made.")
    width, height = int(size[1]), int(size[2])
    pictures = np.frombuffer(read.stdout, np.uint8).reshape(-1, size.end() + height * width * 3)
    return pictures[:, size.end() :].reshape(-1, height, width, 3)


def write_gif(path: str | Path, source: str | Path) -> None:
    """Write a video file as a GIF that loops; `path` appears only when it is complete."""
    path = Path(path)
    with writing(path), tempfile.TemporaryDirectory(prefix=f".{PROGRAM}-", dir=path.parent) as scratch:
        gif = Path(scratch, "video.gif").absolute()
        ended = _run_ffmpeg(
            *("-f", "mp4", "-i", f"file:{Path(source).absolute()}"),
            *("-vf", "split[a][b];[a]palettegen[palette];[b][palette]paletteuse", "-loop", "0", f"file:{gif}"),
        )
        _check_made(ended, path)
        os.replace(gif, path)


def check_writable(path: str | Path) -> None:
    """Raise Show1Error if `write` to this path would fail: to be asked before the hours that making a video takes."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise Show1Error(f'The output "{path}" does not end in .mp4.', "Give it a name like video.mp4.")
    if "\0" in str(path):
        raise Show1Error(f"The output {str(path)!r} holds a null character.", "Give it a name like video.mp4.")
    with writing(path):
        if path.is_dir():
            raise Show1Error(f"The output {path} is a folder.", "Give the name of a file in it, like video.mp4.")
        if _is_kept_from_us(path):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        # Tried rather than asked: permissions, quotas, long names and ffmpeg's abilities all answer in the same way.
        with tempfile.TemporaryDirectory(prefix=f".{PROGRAM}-", dir=path.parent) as scratch:
            Path(scratch, "room").write_bytes(bytes(ROOM))
            write(Path(scratch, path.name), np.zeros((1, 16, 16, 3), np.uint8), fps=1, metadata={})


def _is_kept_from_us(path: Path) -> bool:
    """Return whether this is another user's file in a folder like /tmp, whose sticky bit leaves it to its owner."""
    folder = path.parent.stat()
    if not folder.st_mode & stat.S_ISVTX or not os.path.lexists(path):
        return False
    return os.geteuid() not in (0, folder.st_uid, path.lstat().st_uid)


def slug(prompt: str) -> str:
    """Return the prompt's first words as part of a file name that every file system takes."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:48].strip("-") or "video"


def _run_ffmpeg(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess:
    """Run ffmpeg to its end.

    A Ctrl-C in the terminal does not reach it: a server ends after what it writes. In a command that is an exception
    here, and `subprocess.run` kills ffmpeg then.
    """
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-loglevel", "error", *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, process_group=0)
    except (OSError, RuntimeError) as error:
        raise Show1Error(f"ffmpeg cannot be run: {error}.", REINSTALL) from None


def _check_made(ended: subprocess.CompletedProcess, path: Path) -> None:
    """Raise what kept ffmpeg from making a file: OSError where the disk is full, else Show1Error."""
    if ended.returncode:
        said = ended.stderr.decode(errors="replace").strip()
        for full in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(full) in said:
                raise OSError(full, os.strerror(full))
        raise Show1Error(f"ffmpeg could not make {path.name}: {said}.", REINSTALL)


def _to_tags(metadata: dict[str, Any]) -> str:
    """Return ffmpeg's text form of tags (https://ffmpeg.org/ffmpeg-formats.html#Metadata)."""
    tags = {"comment": json.dumps(metadata | {"program": PROGRAM})}
    if isinstance(metadata.get("prompt"), str):
        # A title is one line, of what can be seen. The prompt as it was typed is in the comment.
        words = " ".join(metadata["prompt"].split())
        tags["title"] = "".join(character for character in words if character.isprintable())
    lines = [f"{key}=" + re.sub(r"([=;#\\])", r"\\\1", value) + "\n" for key, value in tags.items()]
    return ";FFMETADATA1\n" + "".join(lines)


def _from_tags(text: str) -> dict[str, str]:
    """Return the video's own tags; those of its streams follow after a line in brackets."""
    pairs = re.findall(r"((?:\\.|[^\\=\n])+)=((?:\\.|[^\\\n])*)\n", text.partition("\n[")[0] + "\n", re.DOTALL)
    return {key: re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL) for key, value in pairs}
