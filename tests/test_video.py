import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from show_1 import video
from show_1.errors import Show1Error

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)


def read_frames(path: Path) -> np.ndarray:
    """The frames of a video, (frames, height, width, 3), uint8 RGB."""
    reader = imageio_ffmpeg.read_frames(path, output_params=["-sws_flags", "accurate_rnd+full_chroma_int"])
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def refusal(call, *words: str) -> None:
    with pytest.raises(Show1Error) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


# --- The file


@pytest.mark.skipif(not shutil.which("ffprobe"), reason="needs ffprobe")
def test_what_players_see(tmp_path):
    path = tmp_path / "video.mp4"
    video.write(path, np.repeat(FRAMES, 10, axis=0)[:29], 8, {"prompt": "a duck =\n; swims"})
    command = ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-show_format", "-of", "json", path]
    seen = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    (stream,) = seen["streams"]
    assert (stream["codec_name"], stream["pix_fmt"]) == ("h264", "yuv420p")
    assert (stream["width"], stream["height"]) == (24, 16)
    assert (stream["nb_read_frames"], stream["r_frame_rate"], stream["avg_frame_rate"]) == ("29", "8/1", "8/1")
    assert float(stream["duration"]) == 29 / 8
    colours = ("color_space", "color_primaries", "color_transfer", "color_range")
    assert [stream[key] for key in colours] == ["bt709", "bt709", "bt709", "tv"]
    assert seen["format"]["tags"]["title"] == "a duck = ; swims"
    assert "encoder" not in seen["format"]["tags"]


def test_the_index_comes_before_the_frames(tmp_path):
    path = tmp_path / "video.mp4"
    video.write(path, FRAMES, 8, {})
    content, atoms, at = path.read_bytes(), [], 0
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        atoms.append(kind)
        at += size
    assert atoms.index(b"moov") < atoms.index(b"mdat")


@pytest.mark.parametrize("prompt", ["No such file or directory", None, ["a cat", "a dog"]])
def test_frames_are_read_whatever_the_settings_say(tmp_path, prompt):
    video.write(tmp_path / "video.mp4", FRAMES, 8, {"prompt": prompt})
    assert video.read_frames(tmp_path / "video.mp4").shape == FRAMES.shape
    assert video.read_metadata(tmp_path / "video.mp4")["prompt"] == prompt


def test_same_input_same_bytes(tmp_path):
    frames = np.random.default_rng(1).integers(0, 256, (12, 64, 96, 3), dtype=np.uint8)
    for name in ("one.mp4", "two.mp4"):
        video.write(tmp_path / name, frames, 8, {"prompt": "a duck"})
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()


def test_names_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "a %03d.mp4", "concat:b.mp4", "ä 😀.mp4"):
        video.write(name, FRAMES, 8, {"name": name})
        assert video.read_metadata(name)["name"] == name
        assert len(video.read_frames(name)) == len(FRAMES)
    assert len(os.listdir()) == 4


def test_an_older_video_is_replaced(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"older")
    path.chmod(0o444)
    video.write(path, FRAMES, 8, {"seed": 3})
    assert video.read_metadata(path)["seed"] == 3
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- Colours


def test_saturated_colours(tmp_path):
    colours = [(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)]
    patches = np.repeat(np.repeat(np.array([[colours]], np.uint8), 16, axis=1), 16, axis=2)
    frames = np.repeat(patches, 4, axis=0)
    video.write(tmp_path / "video.mp4", frames, 8, {})
    seen = read_frames(tmp_path / "video.mp4")
    assert seen.shape == frames.shape
    # Colour has half the resolution, so edges blend; the middle of a patch must be right.
    assert np.abs(seen[:, 8, 8::16].astype(int) - frames[:, 8, 8::16]).max() <= 3


def test_smooth_gradient(tmp_path):
    x, y = np.meshgrid(np.linspace(0, 255, 256), np.linspace(0, 255, 128))
    frames = np.stack([np.stack([x, y, 255 - x], axis=-1)] * 3).astype(np.uint8)
    video.write(tmp_path / "video.mp4", frames, 8, {})
    difference = read_frames(tmp_path / "video.mp4").astype(int) - frames
    # Stored colours have 220 levels for 256, cut off and rounded: a difference of two, and no drift to one side.
    assert np.abs(difference).mean() < 2
    assert np.abs(difference.mean(axis=(0, 1, 2))).max() < 0.5


# --- Metadata


@settings(max_examples=15, deadline=None)
@given(prompt=st.text() | st.text(alphabet=' \n\r\t\\;=#"[]a😀\0\x7f\u2028', max_size=40))
def test_any_prompt_survives(tmp_path_factory, prompt):
    path = tmp_path_factory.getbasetemp() / "prompt.mp4"
    video.write(path, FRAMES[:1], 8, {"prompt": prompt})
    assert video.read_metadata(path) == {"prompt": prompt, "program": "show-1"}


@pytest.mark.parametrize(
    "prompt",
    [
        "😀" * 10_000,
        " a\\\n;comment=\n[STREAM]\ncomment={}\\",
        ";FFMETADATA1\n[CHAPTER]\ntitle=x",
        "",
    ],
    ids=["long", "tags", "chapter", "empty"],
)
def test_hard_prompts_survive(tmp_path, prompt):
    metadata = {"prompt": prompt, "seed": 2**63, "cascade": {"fps": 8, "keyframes": {"guidance": 9.0}}, "none": None}
    video.write(tmp_path / "video.mp4", FRAMES[:1], 8, metadata)
    read = video.read_metadata(tmp_path / "video.mp4")
    assert read == metadata | {"program": "show-1"}
    video.write(tmp_path / "again.mp4", FRAMES[:1], 8, read)
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "video.mp4").read_bytes()


def test_half_a_character_in_a_video_is_read_as_a_question_mark(tmp_path):
    video.write(tmp_path / "video.mp4", FRAMES[:1], 8, {"prompt": "\ud800 half a character"})
    assert video.read_metadata(tmp_path / "video.mp4")["prompt"] == "? half a character"


def test_metadata_of_what_is_not_ours(tmp_path):
    missing = tmp_path / "missing.mp4"
    refusal(lambda: video.read_metadata(missing), f"no file {missing}")
    refusal(lambda: video.read_metadata(tmp_path), f"no file {tmp_path}")

    ours = tmp_path / "ours.mp4"
    video.write(ours, FRAMES, 8, {})
    damaged = tmp_path / "damaged.mp4"
    playlist = f"#EXTM3U\n#EXTINF:1,\n{ours}\n#EXT-X-ENDLIST\n".encode()
    for content in (b"", b"no video at all" * 100, ours.read_bytes()[:300], ours.read_bytes()[100:], playlist):
        damaged.write_bytes(content)
        refusal(lambda: video.read_metadata(damaged), "damaged.mp4 ", "damaged", "Show-1")

    other = tmp_path / "other.mp4"
    for comment in ("", "hello", "[]", "{}", '{"program": "other"}', "[" * 3000):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", ours, "-metadata", f"comment={comment}"]
        subprocess.run([*command, "-c", "copy", other], check=True)
        refusal(lambda: video.read_metadata(other), "other.mp4 holds no settings", "another program")


# --- Before and while writing


def test_odd_sizes(tmp_path):
    for height, width in ((15, 24), (16, 23)):
        odd = FRAMES[:, :height, :width]
        words = (f"height {height}", f"width {width}", "even")
        refusal(lambda odd=odd: video.write(tmp_path / "video.mp4", odd, 8, {}), *words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "frames", [FRAMES[:0], FRAMES.astype(np.float32), FRAMES[..., [0, 1, 2, 2]]], ids=["none", "float", "RGBA"]
)
def test_what_is_no_video_is_not_written(tmp_path, frames):
    with pytest.raises(ValueError, match="uint8"):
        video.write(tmp_path / "video.mp4", frames, 8, {})
    assert os.listdir(tmp_path) == []


def test_writable(tmp_path, monkeypatch):
    video.check_writable(tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    video.check_writable("VIDEO.MP4")
    assert os.listdir(tmp_path) == []


def test_not_writable(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    for name, words in {
        "none/video.mp4": (str(tmp_path / "none"), "No such file or directory", "Create the folder"),
        "file/video.mp4": (str(tmp_path / "file"), "Not a directory"),
        "folder.mp4": (str(tmp_path / "folder.mp4"), "is a folder"),
        "video.avi": ("video.avi", "does not end in .mp4"),
        "video": ("does not end in .mp4",),
        "x" * 300 + ".mp4": ("File name too long",),
        "nu\0l.mp4": ("nu\\x00l.mp4", "null character"),
    }.items():
        refusal(lambda name=name: video.check_writable(tmp_path / name), *words)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs a folder that even root cannot write to")
def test_a_folder_that_refuses():
    refusal(lambda: video.check_writable("/proc/self/video.mp4"), "/proc/self", "cannot be written")


def test_a_link_that_leads_nowhere_is_replaced(tmp_path):
    loop = tmp_path / "loop.mp4"
    loop.symlink_to(loop)
    video.check_writable(loop)
    video.write(loop, FRAMES, 8, {"seed": 3})
    assert video.read_metadata(loop)["seed"] == 3


def test_another_users_file_in_a_sticky_folder(tmp_path, monkeypatch):
    (tmp_path / "video.mp4").touch()
    tmp_path.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    refusal(lambda: video.check_writable(tmp_path / "video.mp4"), "video.mp4 cannot be written", "not permitted")
    video.check_writable(tmp_path / "other.mp4")
    tmp_path.chmod(0o777)
    video.check_writable(tmp_path / "video.mp4")


def test_a_video_that_has_lost_its_place_is_kept_beside_it(tmp_path):
    (tmp_path / "video.mp4").mkdir()
    with pytest.raises(Show1Error, match=r"The video is made, and cannot be put at .*video\.mp4: Is a dir") as caught:
        video.write(tmp_path / "video.mp4", FRAMES, 8, {"seed": 3})
    (kept,) = tmp_path.glob("video-*.mp4")
    assert str(kept) in caught.value.remedy
    assert video.read_metadata(kept)["seed"] == 3
    assert len(os.listdir(tmp_path)) == 2


@pytest.fixture
def full_disk(tmp_path):
    """A folder with room for 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk(full_disk):
    noise = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    words = (str(full_disk), "No space left on device", "Free some space")
    refusal(lambda: video.write(full_disk / "video.mp4", noise, 8, {}), *words)
    refusal(lambda: video.check_writable(full_disk / "video.mp4"), *words)
    assert os.listdir(full_disk) == []
    video.write(full_disk / "small.mp4", FRAMES, 8, {})


def test_broken_ffmpeg(tmp_path, monkeypatch):
    words = ("ffmpeg", "imageio-ffmpeg", "IMAGEIO_FFMPEG_EXE")
    for broken in (str(tmp_path / "none"), shutil.which("false"), str(tmp_path)):
        monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda broken=broken: broken)
        refusal(lambda: video.check_writable(tmp_path / "video.mp4"), *words)
    assert os.listdir(tmp_path) == []


def test_interrupted_writing_leaves_nothing(tmp_path):
    program = (
        "import sys, numpy as np; from show_1 import video; "
        "frames = np.random.default_rng(0).integers(0, 256, (60, 512, 512, 3), dtype=np.uint8); "
        "video.write(sys.argv[1], frames, 8, {})"
    )
    ours = Path(__file__).parents[1]
    writing = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "video.mp4"], cwd=ours, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob(".*/video.mp4")) and writing.poll() is None:
        time.sleep(0.02)
    assert not (tmp_path / "video.mp4").exists()
    writing.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in writing.communicate(timeout=30)[1]
    assert os.listdir(tmp_path) == []


def test_a_ctrl_c_in_the_terminal_is_not_for_ffmpeg(tmp_path):
    program = """
import os, signal, threading, time
import imageio_ffmpeg
import numpy as np
import psutil
from show_1 import video

imageio_ffmpeg.get_ffmpeg_exe()  # which runs one, too
signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))  # as a server that ends when it has written
interrupts = []

def interrupt():
    while not psutil.Process().children():
        time.sleep(0.001)
    time.sleep(0.05)  # until it is ffmpeg, no longer a copy of this program
    os.killpg(0, signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
video.write("video.mp4", np.random.default_rng(0).integers(256, size=(60, 160, 288, 3), dtype=np.uint8), 8, {})
assert interrupts
"""
    where = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}}
    subprocess.run([sys.executable, "-c", program], check=True, start_new_session=True, timeout=60, **where)
    assert len(video.read_frames(tmp_path / "video.mp4")) == 60
