import dataclasses
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from show_1.cascade import BUNDLED, About, Cascade
from show_1.errors import Show1Error

# With every key on a line of its own, for `spoil`.
SHOW_1 = re.sub(r"(?<=[\[,])\n\s*", " ", (BUNDLED / "show-1.toml").read_text(encoding="utf-8"))


@pytest.fixture
def file(tmp_path):
    """A cascade of one's own, to be spoilt."""
    file = tmp_path / "mine.toml"
    file.write_text(SHOW_1, encoding="utf-8")
    return file


def refusal(call, *words: str) -> Show1Error:
    """The error that `call` ends in; problem and remedy together must say all of `words`."""
    with pytest.raises(Show1Error) as caught:
        call()
    error = caught.value
    assert [word for word in words if word not in str(error)] == [], str(error)
    assert error.problem.endswith(".") and error.remedy.endswith(".")
    return error


def spoil(file: Path, table: str, line: str | None, key: str = "") -> None:
    """Replaces the line of `key` in a table (or at the top, ""), or adds one where no key is named; None deletes it."""
    lines, here, spoilt = file.read_text(encoding="utf-8").splitlines(), "", []
    for old in lines:
        if old.startswith("["):
            here = old[1 : old.index("]")]
        replaced = here == table and key and old.startswith(f"{key} =")
        spoilt += ([line] if line else []) if replaced else [old]
        if not key and table and old.startswith(f"[{table}]"):
            spoilt.append(line)
    if not key and not table:
        spoilt.insert(0, line)
    assert spoilt != lines
    file.write_text("\n".join(spoilt), encoding="utf-8")


# --- What is right


def values(table) -> tuple:
    """The values of a table, those left out not among them."""
    return tuple(value for value in dataclasses.astuple(table) if value is not None)


def test_show_1_is_the_demo():
    cascade = Cascade.load("show-1")
    assert (cascade.name, cascade.fps) == ("Show-1", 8)
    assert values(cascade.keyframes) == ("showlab/show-1-base", 8, 40, 64, 75, 9.0)
    assert values(cascade.interpolation) == ("showlab/show-1-interpolation", 50, 4.0)
    assert values(cascade.first_frame) == ("DeepFloyd/IF-II-L-v1.0", "fp16", 50, 4.0, 150)
    assert values(cascade.pixel_upscale) == ("showlab/show-1-sr1", 50, 7.0, 250)
    last = ("showlab/show-1-sr2", 320, 576, 50, 0.8, 15.0, "low resolution, blur")
    assert values(cascade.latent_upscale) == last


@pytest.mark.parametrize("name", Cascade.names())
def test_every_bundled_cascade_loads(name):
    assert Cascade.load(name).file == BUNDLED / f"{name}.toml"


def test_settings_are_the_file(file):
    cascade = Cascade.load(file)
    written = tomllib.loads(SHOW_1)
    assert cascade.about == About(**written.pop("about"))
    assert cascade.settings() == written  # what is told about it has no part in the video
    through_json = json.loads(json.dumps(cascade.settings()))
    assert Cascade.from_settings(through_json, file) == dataclasses.replace(cascade, about=None)


def test_variant_may_be_left_out(file):
    spoil(file, "first_frame", None, key="variant")
    cascade = Cascade.load(file)
    assert cascade.first_frame.variant is None
    assert Cascade.from_settings(cascade.settings(), file).first_frame == cascade.first_frame


def test_an_int_will_do_for_a_float(file):
    spoil(file, "keyframes", "guidance = 9", key="guidance")
    guidance = Cascade.load(file).keyframes.guidance
    assert guidance == 9.0 and isinstance(guidance, float)


def test_a_mark_of_a_windows_editor_is_no_fault(file):
    file.write_text(SHOW_1, encoding="utf-8-sig")
    assert Cascade.load(file).name == "Show-1"


def test_a_file_wins_over_a_bundled_name_but_a_folder_does_not(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    Path("show-1").mkdir()
    assert Cascade.load("show-1").file.parent == BUNDLED
    Path("show-1").rmdir()
    shutil.copy(file, "show-1")
    assert Cascade.load("show-1").file == file.with_name("show-1")


# --- Which file


def test_unknown_name():
    refusal(lambda: Cascade.load("shwo-1"), '"shwo-1"', "Did you mean show-1?", *Cascade.names(), "TOML file")
    refusal(lambda: Cascade.load(""), '""')


def test_missing_file(tmp_path):
    for missing in (tmp_path / "none.toml", tmp_path / "none", "none.toml"):
        refusal(lambda missing=missing: Cascade.load(missing), f"no file {missing}", "show-1")


def test_folder_instead_of_a_file(tmp_path):
    refusal(lambda: Cascade.load(tmp_path), str(tmp_path), "folder")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that even root cannot read")
def test_unreadable_file():
    refusal(lambda: Cascade.load("/proc/self/mem"), "/proc/self/mem cannot be read")


def test_not_toml(file):
    file.write_text('name = "x"\nfps = eight\n')
    refusal(lambda: Cascade.load(file), str(file), "not valid TOML", "line 2")


@pytest.mark.parametrize("toml", ["x = " + "[" * 5000, "x = " + "9" * 5000])
def test_toml_beyond_the_parser(file, toml):
    file.write_text(toml)
    refusal(lambda: Cascade.load(file), str(file), "not valid TOML")


def test_not_utf_8(file):
    file.write_bytes(SHOW_1.encode("utf-16"))
    refusal(lambda: Cascade.load(file), str(file), "UTF-8")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet='abnamefps[]={}"\n .8-', max_size=80).map(str.encode))
def test_whatever_the_file_holds_the_error_is_ours(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(content)
    refusal(lambda: Cascade.load(file), str(file))


# --- What is in it

TABLES = ["keyframes", "interpolation", "first_frame", "pixel_upscale", "latent_upscale"]


@pytest.mark.parametrize("table", TABLES)
def test_missing_table(file, table):
    without = tomllib.loads(SHOW_1)
    del without[table]
    refusal(lambda: Cascade.from_settings(without, file), str(file), f"[{table}] is missing", "model, ")


REQUIRED = [
    (table if isinstance(value, dict) else "", key)
    for table, value in tomllib.loads(SHOW_1).items()
    for key in (value if isinstance(value, dict) else [table])
    if key != "variant"
]


@pytest.mark.parametrize(("table", "key"), REQUIRED)
def test_missing_key(file, table, key):
    spoil(file, table, None, key=key)
    refusal(lambda: Cascade.load(file), str(file), f"[{table}]" if table else "", f"{key} is missing")


def test_unknown_table(file):
    spoil(file, "keyframes", "[keyframe]", key="model")
    refusal(lambda: Cascade.load(file), str(file), '"keyframe"', "Did you mean keyframes?", "latent_upscale")


def test_unknown_key(file):
    spoil(file, "pixel_upscale", "noise = 250", key="noise_level")
    refusal(lambda: Cascade.load(file), str(file), "[pixel_upscale]", '"noise"', "Did you mean noise_level?", "steps")


def test_file_is_no_key(file):
    spoil(file, "", 'file = "x"')
    refusal(lambda: Cascade.load(file), str(file), '"file"', "Known are name, fps, keyframes")


def test_key_instead_of_a_table(file):
    values = tomllib.loads(SHOW_1) | {"keyframes": [{"steps": 3}]}
    refusal(lambda: Cascade.from_settings(values, file), str(file), "keyframes is not a table", "[keyframes]")


REFUSED = [
    ("", "name", '""', "not empty"),
    ("", "name", "8", "text"),
    ("", "fps", "0", "from 1 to 60 (frames per second)"),
    ("", "fps", "61", "from 1 to 60"),
    ("", "fps", "8.0", "whole number"),
    ("", "fps", "{}", "whole number"),
    ("keyframes", "model", '""', "hub id"),
    ("keyframes", "model", '" "', "hub id"),
    ("keyframes", "model", "7", "hub id"),
    ("keyframes", "frames", "1", "from 2 to 64"),
    ("keyframes", "frames", "65", "from 2 to 64"),
    ("keyframes", "height", "1", "from 2 to 4096 (pixels"),
    ("keyframes", "width", "4097", "from 2 to 4096 (pixels"),
    ("keyframes", "width", "-64", "from 2 to 4096 (pixels"),
    ("keyframes", "steps", "0", "from 1 to 1000"),
    ("keyframes", "steps", "1001", "from 1 to 1000"),
    ("keyframes", "steps", "true", "whole number"),
    ("keyframes", "steps", '"75"', "whole number"),
    ("keyframes", "steps", "75.0", "whole number"),
    ("interpolation", "guidance", "-0.1", "from 0 to 100"),
    ("interpolation", "guidance", "100.1", "from 0 to 100"),
    ("interpolation", "guidance", "nan", "from 0 to 100"),
    ("interpolation", "guidance", "inf", "from 0 to 100"),
    ("interpolation", "guidance", "false", "a number"),
    ("first_frame", "variant", '""', "leave it out"),
    ("first_frame", "variant", "16", "leave it out"),
    ("first_frame", "noise_level", "-1", "from 0 to 999"),
    ("first_frame", "noise_level", "1000", "from 0 to 999"),
    ("pixel_upscale", "noise_level", "250.0", "whole number"),
    ("latent_upscale", "height", "321", "even"),
    ("latent_upscale", "width", "577", "even"),
    ("latent_upscale", "strength", "0", "share of the steps"),
    ("latent_upscale", "strength", "1.01", "to 1 "),
    ("latent_upscale", "negative_prompt", "1979-05-27", "text"),
]


@pytest.mark.parametrize(("table", "key", "value", "wanted"), REFUSED)
def test_refused_value(file, table, key, value, wanted):
    spoil(file, table, f"{key} = {value}", key=key)
    shown = {"nan": "NaN", "inf": "Infinity", "1979-05-27": '"1979-05-27"'}.get(value, value)
    error = refusal(lambda: Cascade.load(file), f"[{table}]" if table else "", f"Give {key} ", wanted)
    assert error.problem.startswith(str(file)) and error.problem.endswith(f"{key} cannot be {shown}.")


ALLOWED = [
    ("fps", ["1", "60"]),
    ("keyframes.frames", ["2", "64"]),
    ("keyframes.height", ["8", "41", "4096"]),
    ("keyframes.steps", ["1", "1000"]),
    ("keyframes.guidance", ["0", "1", "100.0"]),
    ("first_frame.noise_level", ["0", "999"]),
    ("latent_upscale.height", ["8", "4096"]),
    ("latent_upscale.strength", ["0.02", "1"]),
    ("latent_upscale.negative_prompt", ['""']),
]


@pytest.mark.parametrize(("path", "values"), ALLOWED)
def test_the_ends_of_the_ranges_are_allowed(path, values):
    for value in values:
        Cascade.load("show-1").override([f"{path}={value}"])


def test_nothing_left_to_denoise(file):
    spoil(file, "latent_upscale", "steps = 1", key="steps")
    words = (str(file), "[latent_upscale]", "steps = 1", "strength = 0.8", "no step", "Give at least 2 steps")
    refusal(lambda: Cascade.load(file), *words)


@pytest.mark.parametrize("line", ["name = 0x" + "f" * 5000, "name" + ".a" * 2000 + " = 1", f'name = ["{"x" * 500}"]'])
def test_values_too_large_to_show(file, line):
    spoil(file, "", line, key="name")
    error = refusal(lambda: Cascade.load(file), str(file), "name cannot be")
    assert len(error.problem) < len(str(file)) + 100


# --- Models


def test_a_hub_id_is_one(file):
    assert Cascade.load(file).model_source("first_frame") == "DeepFloyd/IF-II-L-v1.0"


def test_a_folder_beside_the_file_wins_wherever_we_are(file, monkeypatch):
    folder = file.parent / "showlab" / "show-1-base"
    folder.mkdir(parents=True)
    monkeypatch.chdir(file.parent)
    cascade = Cascade.load("mine.toml")
    monkeypatch.chdir("/")
    assert cascade.model_source("keyframes") == folder
    assert cascade.model_source("interpolation") == "showlab/show-1-interpolation"
    moved = cascade.override([f"interpolation.model={folder}"])
    assert moved.model_source("interpolation") == folder


@pytest.mark.parametrize("model", ["./showlab/base", "../mini/base", "/models/base", "base", "a/b/c", "a b/c", "a/b\0"])
def test_neither_folder_nor_hub_id(file, model):
    cascade = Cascade.load(file)
    cascade = dataclasses.replace(cascade, keyframes=dataclasses.replace(cascade.keyframes, model=model))
    looked_at = str(file.parent / model)
    refusal(lambda: cascade.model_source("keyframes"), str(file), "[keyframes]", looked_at, "hub id")


# --- --set


def test_override():
    cascade = Cascade.load("show-1")
    changed = cascade.override(
        [
            "keyframes.steps=10",
            "keyframes.guidance = 7",
            "fps=12",
            "name=Mine",
            'first_frame.variant="fp32"',
            "latent_upscale.negative_prompt=low resolution, blur # = \n 8",
        ]
    )
    assert changed.keyframes == dataclasses.replace(cascade.keyframes, steps=10, guidance=7.0)
    assert (changed.fps, changed.name, changed.first_frame.variant) == (12, "Mine", "fp32")
    assert changed.latent_upscale.negative_prompt == "low resolution, blur # = \n 8"
    assert changed.file == cascade.file
    assert cascade == Cascade.load("show-1")
    assert cascade.override([]) == cascade


@pytest.mark.parametrize("given_text", ["8", "true", '""', "'a' b", "a\nfps = 3", ""])
def test_a_text_needs_no_quotes(given_text):
    changed = Cascade.load("show-1").override([f"latent_upscale.negative_prompt={given_text}"])
    assert changed.latent_upscale.negative_prompt == ("" if given_text == '""' else given_text)


def test_settings_that_must_agree_are_looked_at_together():
    cascade = Cascade.load("show-1")
    assert cascade.override(["latent_upscale.steps=1", "latent_upscale.strength=1"]).latent_upscale.steps == 1
    refusal(lambda: cascade.override(["latent_upscale.steps=1"]), "--set latent_upscale.steps=1", "strength = 0.8")


WRONG_SETTINGS = [
    ("keyframes.steps", "not stage.key=value"),
    ("keyframes.steps 10", "not stage.key=value"),
    ("=10", "not stage.key=value"),
    ("", "not stage.key=value"),
    ("keyframes=10", "not stage.key=value"),
    ("keyframes.=10", "not stage.key=value"),
    ("keyframes.steps.more=10", "not stage.key=value"),
    ("keyframe.steps=10", "Did you mean keyframes?"),
    ("keyframes.step=10", "Did you mean steps?"),
    ("fsp=10", "Did you mean fps?"),
    ("name.steps=10", 'no table "name"'),
    ("file=x", 'no key "file"'),
    ("keyframes.steps=0", "from 1 to 1000"),
    ("keyframes.steps=ten", 'steps cannot be "ten"'),
    ("keyframes.steps=", 'steps cannot be ""'),
    ("keyframes.steps=10\nfps=3", "steps cannot be"),
    ("keyframes.steps=true", "steps cannot be true"),
    ("keyframes.guidance=nan", "from 0 to 100"),
    ("first_frame.schedule=smart100", "smart100"),
    ("first_frame.schedule=smart27\nfirst_frame.steps=7", "schedule"),
    ("keyframes.model=", "hub id"),
]


@pytest.mark.parametrize(("assignment", "wanted"), WRONG_SETTINGS)
def test_override_refuses(assignment, wanted):
    cascade = Cascade.load("show-1")
    error = refusal(lambda: cascade.override(["fps=9", assignment]), f"--set {assignment}", wanted)
    assert str(cascade.file) not in str(error)


def test_what_is_told_about_a_cascade_may_be_left_out(file):
    file.write_text(re.sub(r"\[about\].*?(?=\n\[)", "", SHOW_1, flags=re.DOTALL), encoding="utf-8")
    cascade = Cascade.load(file)
    assert cascade.about is None
    assert cascade.known_words() == cascade.unknown_words("anything goes") == []


def test_mini_names_the_words_it_does_not_know():
    mini = Cascade.load("mini")
    assert mini.unknown_words("A PANDA jumping, in the snow!") == []
    assert mini.unknown_words("a cute Panda; cute ukulele in the snow") == ["cute", "ukulele"]
    for prompt in mini.about.examples:
        assert mini.unknown_words(prompt) == []
    assert mini.override(["keyframes.steps=2"]).about == mini.about


def test_a_list_of_words_may_have_capitals_and_a_mark_in_front(file):
    file.write_text(SHOW_1.replace("examples = [", 'words = "words.txt"\nexamples = ['), encoding="utf-8")
    file.with_name("words.txt").write_text("Panda\nice-cream\nÉté\n", encoding="utf-8-sig")
    assert Cascade.load(file).unknown_words("A panda, ICE cream, été") == ["a"]


def test_a_list_of_words_that_is_not_there(file):
    file.write_text(SHOW_1.replace("examples = [", 'words = "words.txt"\nexamples = ['), encoding="utf-8")
    with pytest.raises(Show1Error, match=r"\[about\].*words\.txt"):
        Cascade.load(file).unknown_words("a panda")


@pytest.mark.parametrize("examples", ['"a panda"', '["a panda", ""]', "[1]"])
def test_examples_are_a_list_of_prompts(file, examples):
    file.write_text(re.sub(r"examples = .*", f"examples = {examples}", SHOW_1), "utf-8")
    with pytest.raises(Show1Error, match=r"\[about\]: examples cannot be"):
        Cascade.load(file)
