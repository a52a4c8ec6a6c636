"""A cascade is data: which models make a video, and with which settings.

It is read from a TOML file with two keys, `name` and `fps`, one table a stage, and one that may be left out, `[about]`,
with what people are told. What a setting may be is said once, in its type: `Steps` below is an int together with its
range and unit; reading, `--set` and every message take it from there.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from show_1.errors import Show1Error

STAGES = ("keyframes", "interpolation", "first_frame", "pixel_upscale", "latent_upscale")
MAX_PROMPT = 10_000  # characters; the models read the first 77 tokens
BUNDLED = Path(__file__).parent / "cascades"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Rule:
    """What a setting may be: `words` for people, `kinds` and `accepts` for us. (A bool is no int.)"""

    words: str
    kinds: tuple[type, ...]
    accepts: Callable[[Any], bool]


def whole(low: int, high: int, unit: str, even: bool = False) -> Rule:
    words = f"{'an even' if even else 'a'} whole number from {low} to {high} ({unit})"
    return Rule(words, (int,), lambda value: value in range(low, high + 1, 2 if even else 1))


def real(low: float, high: float, unit: str) -> Rule:
    # An int will do (it becomes a float); nan fails the comparison.
    return Rule(f"a number from {low} to {high} ({unit})", (float, int), lambda value: low <= value <= high)


def text(meaning: str) -> Rule:
    return Rule(f"a text in quotes, not empty ({meaning})", (str,), lambda value: value.strip() != "")


def is_text(value: str) -> bool:
    """Return whether a string is characters alone: JSON and command lines may hand over half of one."""
    return value == value.encode(errors="ignore").decode()


def one_of(*words: str) -> Rule:
    return Rule(f"one of {', '.join(words)}", (str,), lambda value: value in words)


def interval(low: int, high: int, unit: str) -> Rule:
    def accepts(value: list) -> bool:
        return len(value) == 2 and all(type(v) is int for v in value) and low <= value[0] <= value[1] <= high

    return Rule(f"two whole numbers from {low} to {high}, the lower first ({unit})", (list,), accepts)


Name = Annotated[str, text("the cascade's name")]
Rate = Annotated[int, whole(1, 60, "frames per second")]
Model = Annotated[str, text('a hub id "owner/name", or a folder relative to the TOML file')]
Revision = Annotated[str | None, text("a commit, tag or branch at the hub; leave it out for the newest")]
Variant = Annotated[str | None, text('the variant of the weight files, as "fp16"; leave it out where there is none')]
Frames = Annotated[int, whole(2, 64, "keyframes")]
Pixels = Annotated[int, whole(2, 4096, "pixels")]
EvenPixels = Annotated[int, whole(2, 4096, "pixels; H.264 stores colour for every second one", even=True)]
Steps = Annotated[int, whole(1, 1000, "denoising steps")]
Guidance = Annotated[float, real(0, 100, "weight of the prompt; 1 or less switches guidance off")]
SharedNoise = Annotated[float | None, real(0, 1, "share of the first noise's variance that all frames have in common")]
NoiseLevel = Annotated[int, whole(0, 999, "timestep of the noise added to the condition")]
# Above 0 would be the natural bound, but below 0.001 not even 1000 steps leave one to run.
Strength = Annotated[float, real(0.001, 1, "share of the steps to run")]
Prompt = Annotated[
    str,
    Rule(
        f"a text in quotes, of at most {MAX_PROMPT:,} characters", (str,), lambda v: len(v) <= MAX_PROMPT and is_text(v)
    ),
]
# Measures that trade exactness for speed; left out, the video is the exact one.
GuidanceInterval = Annotated[list[int] | None, interval(0, 999, "the timesteps between which guidance works")]
Reuse = Annotated[int | None, whole(2, 10, "steps that share the deep features of the first of them")]
Schedule = Annotated[str | None, one_of("fast27", "smart27", "smart50", "smart100", "super27", "super40", "super100")]
Note = Annotated[str, text("what users should know of this cascade")]
WordList = Annotated[str | None, text("a file of all the words it knows, relative to the TOML file")]
Examples = Annotated[
    list[str],
    Rule(
        "a list of texts in quotes, none empty (prompts that suit it)",
        (list,),
        lambda value: all(isinstance(prompt, str) and prompt.strip() for prompt in value),
    ),
]


@dataclass(frozen=True, kw_only=True)
class Keyframes:
    """Text to `frames` small frames of height × width."""

    model: Model
    revision: Revision = None
    frames: Frames
    height: Pixels
    width: Pixels
    steps: Steps
    guidance: Guidance
    shared_noise: SharedNoise = None
    guidance_interval: GuidanceInterval = None
    reuse: Reuse = None


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """Three new frames between every two keyframes."""

    model: Model
    revision: Revision = None
    steps: Steps
    guidance: Guidance
    guidance_interval: GuidanceInterval = None
    reuse: Reuse = None


@dataclass(frozen=True, kw_only=True)
class FirstFrame:
    """Frame 0 enlarged: what the pixel upscale starts from."""

    model: Model
    revision: Revision = None
    variant: Variant = None
    steps: Steps
    guidance: Guidance
    guidance_interval: GuidanceInterval = None
    schedule: Schedule = None
    noise_level: NoiseLevel

    def __post_init__(self):
        if self.schedule is not None and re.sub(r"\D", "", self.schedule) != str(self.steps):
            raise ValueError(
                f"schedule = {_shown(self.schedule)} does not have steps = {self.steps} steps.",
                "Give steps the number at the end of the schedule's name, or leave the schedule out.",
            )


@dataclass(frozen=True, kw_only=True)
class PixelUpscale:
    """All frames enlarged, each window following on from the one before."""

    model: Model
    revision: Revision = None
    steps: Steps
    guidance: Guidance
    guidance_interval: GuidanceInterval = None
    reuse: Reuse = None
    noise_level: NoiseLevel
    shared_noise: SharedNoise = None


@dataclass(frozen=True, kw_only=True)
class LatentUpscale:
    """Frames resized to height × width and redrawn by the last int(steps · strength) steps of latent diffusion."""

    model: Model
    revision: Revision = None
    height: EvenPixels
    width: EvenPixels
    steps: Steps
    strength: Strength
    guidance: Guidance
    guidance_interval: GuidanceInterval = None
    reuse: Reuse = None
    shared_noise: SharedNoise = None
    negative_prompt: Prompt

    def __post_init__(self):
        if int(self.steps * self.strength) < 1:
            raise ValueError(
                f"steps = {self.steps} with strength = {self.strength} leaves no step to run.",
                f"Give at least {math.ceil(1 / self.strength)} steps, or a higher strength.",
            )


@dataclass(frozen=True, kw_only=True)
class About:
    """What to tell people before they ask for a video; changes nothing in it."""

    note: Note
    words: WordList = None
    examples: Examples


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """All five stages and the frame rate of the result; `file` is where it was read from."""

    name: Name
    fps: Rate
    keyframes: Keyframes
    interpolation: Interpolation
    first_frame: FirstFrame
    pixel_upscale: PixelUpscale
    latent_upscale: LatentUpscale
    about: About | None = None
    file: Path

    @staticmethod
    def names() -> list[str]:
        """Return the bundled cascades, by name."""
        return sorted(file.stem for file in BUNDLED.glob("*.toml"))

    @classmethod
    def load(cls, name_or_file: str | Path) -> "Cascade":
        """Read a bundled cascade ("show-1") or a TOML file; a file that exists wins.

        Raises Show1Error for an unknown name, for a file that is missing, unreadable or no TOML, and for what
        `from_settings` refuses.
        """
        file = _find(name_or_file)
        try:
            toml = file.read_text(encoding="utf-8-sig")  # Windows editors put a mark in front
            settings = tomllib.loads(toml)
        except IsADirectoryError:
            raise Show1Error(f"{file} is a folder, not a cascade.", "Name the TOML file in it.") from None
        except FileNotFoundError:
            raise Show1Error(
                f"There is no file {file}.", f"Check the path, or take one of {_listed(cls.names())}."
            ) from None
        except OSError as error:
            raise Show1Error(
                f"{file} cannot be read: {error.strerror}.", "Check the path and its permissions."
            ) from None
        except UnicodeDecodeError:
            raise Show1Error(f"{file} is not a UTF-8 text file.", "Save it as UTF-8, or name the right file.") from None
        except (ValueError, RecursionError) as error:  # besides TOMLDecodeError: numbers too long, nesting too deep
            raise Show1Error(f"{file} is not valid TOML: {error}.", "Correct it there.") from None
        return cls.from_settings(settings, file)

    @classmethod
    def from_settings(cls, settings: dict[str, Any], file: Path) -> "Cascade":
        """Build the cascade from nested dicts as in the TOML file; models are looked for relative to `file`.

        Raises Show1Error, naming `file`, table, key and value, for anything missing, unknown, of the wrong type or out
        of range.
        """
        return _build(cls, settings, str(file), file=file.absolute())

    def settings(self) -> dict[str, Any]:
        """Return nested dicts as in the TOML file: what `from_settings` takes, and JSON can hold.

        `about` is left out, as it has no part in the video.
        """
        settings = {key: getattr(self, key) for key in _rules(Cascade)}
        for table in STAGES:
            values = dataclasses.asdict(getattr(self, table))
            settings[table] = {key: value for key, value in values.items() if value is not None}
        return settings

    def override(self, assignments: str | Iterable[str]) -> "Cascade":
        """Return this cascade with a change, or several: "keyframes.steps=10", "fps=12"; values as in TOML, or bare.

        Other steps of the first frame leave its schedule out, unless one is given, too. Raises Show1Error, naming
        `--set` and the text given. Settings that must agree are looked at when all are made.
        """
        assignments = [assignments] if isinstance(assignments, str) else list(assignments)
        settings, given = self.settings(), set()
        for assignment in assignments:
            where = f"--set {assignment}"
            path, equals, value = (part.strip() for part in assignment.partition("="))
            *table, key = path.split(".")
            if not equals or not key or len(table) > 1 or path in STAGES:
                raise Show1Error(f"{where}: this is not stage.key=value.", "Write it as in --set keyframes.steps=10.")
            if table:
                _known(table[0], STAGES, "table", where)
            owner = _tables(Cascade)[table[0]] if table else Cascade
            _known(key, _rules(owner), "key", where)
            rule = _rules(owner)[key]
            place = settings[table[0]] if table else settings
            place[key] = _checked(rule, key, _parsed(value, rule), where)
            given.add(path)
        if "first_frame.schedule" not in given:
            leave_out_schedule(settings)
        where = " ".join(f"--set {assignment}" for assignment in assignments)
        return dataclasses.replace(_build(Cascade, settings, where, file=self.file), about=self.about)

    def has_models_of(self, other: "Cascade") -> bool:
        """Return whether the same weights are loaded for both; asks the disk only where they name them in two ways."""

        def named(cascade: Cascade) -> list[tuple]:
            tables = [getattr(cascade, stage) for stage in STAGES]
            return [(table.model, table.revision, getattr(table, "variant", None)) for table in tables]

        def found(cascade: Cascade) -> list[tuple]:
            sources = [cascade.model_source(stage) for stage in STAGES]
            sources = [os.path.realpath(source) if isinstance(source, Path) else source for source in sources]
            return [(source, *which) for source, (_, *which) in zip(sources, named(cascade), strict=True)]

        if self.file.parent == other.file.parent and named(self) == named(other):
            return True
        return found(self) == found(other)

    def stream_settings(self, stage: str) -> dict[str, Any]:
        """Return what the stream of a stage ("keyframes") takes from its table: all but models and prompts."""
        table = dataclasses.asdict(getattr(self, stage))
        left_out = ("model", "revision", "variant", "negative_prompt")
        return {key: value for key, value in table.items() if key not in left_out and value is not None}

    def known_words(self) -> list[str]:
        """Return all words that the cascade has learned; none where it keeps no list of them."""
        if self.about is None or self.about.words is None:
            return []
        file = self.file.parent / self.about.words
        try:
            return _words(file.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise Show1Error(
                f"{self.file}, table [about]: the words cannot be read from {file}: {error}.",
                "Give a UTF-8 text file with one word a line, or leave the key out.",
            ) from None

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that the cascade has never learned; none where it keeps no list of words."""
        known = set(self.known_words())
        return [word for word in dict.fromkeys(_words(prompt)) if known and word not in known]

    def model_source(self, table: str) -> Path | str:
        """Return where the model of a stage ("keyframes") is: an existing folder as a Path, or else a hub id as a str.

        Raises Show1Error if `model` can be neither.
        """
        model = getattr(self, table).model
        folder = self.file.parent / model
        if os.path.isdir(folder):
            return folder
        if HUB_ID.fullmatch(model):
            return model
        raise Show1Error(
            f"{self.file}, table [{table}]: there is no folder {folder} for model = {_shown(model)}.",
            'Give a folder relative to that file, or a hub id like "showlab/show-1-base".',
        )


def leave_out_schedule(settings: dict[str, Any]) -> None:
    """Have the first frame's steps, where others are asked for than its schedule has, spread as usual."""
    first_frame = settings["first_frame"]
    if re.sub(r"\D", "", first_frame.get("schedule", "")) != str(first_frame["steps"]):
        first_frame.pop("schedule", None)


def _words(prose: str) -> list[str]:
    return re.findall(r"[^\W_]+", prose.lower())


def _find(name_or_file: str | Path) -> Path:
    """Return the TOML file that is meant. A folder that happens to be called like a bundled cascade hides nothing."""
    name = str(name_or_file)
    if os.path.isfile(name) or name.endswith(".toml") or Path(name).name != name:
        return Path(name)
    if name in Cascade.names():
        return BUNDLED / f"{name}.toml"
    if os.path.isdir(name):
        return Path(name)  # reading it will say so
    raise Show1Error(
        f"There is no cascade {_shown(name)}.",
        f"{_guess(name, Cascade.names())}Take one of {_listed(Cascade.names())}, or the path of a TOML file.",
    )


def _build(cls: type, values: dict[str, Any], where: str, **more: Any) -> Any:
    """Make a table, or the whole cascade, from what a TOML file says; `where` is what messages begin with."""
    rules, tables = _rules(cls), _tables(cls)
    for key, value in values.items():
        _known(key, rules | tables, "table" if isinstance(value, dict) else "key", where)
    made = dict(more)
    for key, rule in rules.items():
        if key in values:
            made[key] = _checked(rule, key, values[key], where)
        elif key not in _optional(cls):
            raise Show1Error(f"{where}: the key {key} is missing.", f"Give {key} {rule.words}.")
    for table, table_cls in tables.items():
        if table not in values and table in _optional(cls):
            continue
        if table not in values:
            raise Show1Error(f"{where}: the table [{table}] is missing.", f"Add it, with {_listed(_rules(table_cls))}.")
        if not isinstance(values[table], dict):
            raise Show1Error(f"{where}: {table} is not a table.", f"Begin it with a line [{table}].")
        made[table] = _build(table_cls, values[table], f"{where}, table [{table}]")
    try:
        return cls(**made)
    except ValueError as fault:
        problem, remedy = fault.args
        raise Show1Error(f"{where}: {problem}", remedy) from None


def _rules(cls: type) -> dict[str, Rule]:
    """Return the settings of a table, or the cascade's own, with what they may be."""
    return {f.name: f.type.__metadata__[0] for f in dataclasses.fields(cls) if hasattr(f.type, "__metadata__")}


def _tables(cls: type) -> dict[str, type]:
    """Return the tables of the cascade by name, those that may be left out among them."""
    types = {f.name: (get_args(f.type) or (f.type,))[0] for f in dataclasses.fields(cls)}
    return {name: table for name, table in types.items() if dataclasses.is_dataclass(table)}


def _optional(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}


def _checked(rule: Rule, key: str, value: Any, where: str) -> Any:
    if type(value) not in rule.kinds or not rule.accepts(value):
        raise Show1Error(f"{where}: {key} cannot be {_shown(value)}.", f"Give {key} {rule.words}.")
    return float(value) if float in rule.kinds else value


def _known(word: str, known: Iterable[str], what: str, where: str) -> None:
    if word not in known:
        raise Show1Error(
            f"{where}: there is no {what} {_shown(word)}.", f"{_guess(word, known)}Known are {_listed(known)}."
        )


def _parsed(value: str, rule: Rule) -> Any:
    """Return the value behind `--set key=`, as TOML, or as it stands where it is no TOML or a text is wanted."""
    try:
        toml = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return value
    if toml.keys() != {"value"} or (str in rule.kinds and not isinstance(toml["value"], str)):
        return value
    return toml["value"]


def _guess(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"Did you mean {nearest[0]}? " if nearest else ""


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


def _shown(value: Any) -> str:
    """Return a value as TOML would write it, near enough, and short enough for a sentence."""
    try:
        shown = json.dumps(value, ensure_ascii=False, default=str).encode(errors="replace").decode()
    except (ValueError, RecursionError):  # a number of thousands of digits, tables thousands deep
        return "something that large"
    return shown if len(shown) <= 60 else shown[:57] + "..."
