"""Fetching from the hub: huggingface_hub itself, against a hub on this computer."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from show_1 import hub, loading
from show_1.cascade import Cascade
from tests import tiny
from tests.hub_server import Client, Fault, Hub, Refusal, git_sha1

TABLES = tuple(hub.COMPONENTS)
UNET = ("unet/config.json", "unet/diffusion_pytorch_model.bin")
SCHEDULER = "scheduler/scheduler_config.json"
NOISING = "image_noising_scheduler/scheduler_config.json"
NEEDED = {
    "showlab/show-1-base": {
        *UNET,
        SCHEDULER,
        "text_encoder/config.json",
        "text_encoder/pytorch_model.bin.index.json",
        "text_encoder/pytorch_model-00001-of-00002.bin",
        "text_encoder/pytorch_model-00002-of-00002.bin",
        "tokenizer/spiece.model",
        "tokenizer/tokenizer_config.json",
    },
    "showlab/show-1-interpolation": {*UNET, SCHEDULER},
    "showlab/show-1-sr1": {*UNET, SCHEDULER, NOISING},
    "showlab/show-1-sr2": {
        *UNET,
        SCHEDULER,
        "text_encoder/config.json",
        "text_encoder/pytorch_model.bin",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
    },
    "DeepFloyd/IF-II-L-v1.0": {
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        SCHEDULER,
        NOISING,
    },
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The folder that the hub serves: the tiny cascade, among much that the released repositories hold besides."""
    folder = tmp_path_factory.mktemp("served")
    tiny.build(folder)
    (folder / "cascade.toml").unlink()
    for name in ("showlab/show-1-interpolation", "showlab/show-1-sr1", "DeepFloyd/IF-II-L-v1.0"):
        for component in ("text_encoder", "tokenizer"):
            shutil.copytree(folder / "showlab/show-1-base" / component, folder / name / component)
    for repository in NEEDED:
        _add(folder / repository, ".gitattributes", "README.md", "model_index.json", "feature_extractor/config.json")
    first_frame = folder / "DeepFloyd/IF-II-L-v1.0"
    weights = "diffusion_pytorch_model"
    _add(first_frame, *(f"unet/{weights}.{end}" for end in ("bin", "safetensors", "fp16.bin", "msgpack")))
    _add(first_frame, "safety_checker/config.json", "safety_checker/model.safetensors")
    _add(first_frame, f"watermarker/{weights}.safetensors")
    _add(folder / "showlab/show-1-sr2", "text_encoder/flax_model.msgpack", "unet/backup/config.json")
    return folder


@pytest.fixture(scope="module")
def server(served):
    server = Hub(served)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    """The tiny cascade's file, where no folder has the name of a model."""
    toml = tmp_path_factory.mktemp("cascade") / "cascade.toml"
    toml.write_text(tiny.CASCADE)
    return toml


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    client = Client(server.environment(tmp_path_factory.mktemp("home")))
    yield client
    client.close()


@pytest.fixture(scope="module")
def folders(client, toml):
    """Where the stages' files are, once fetched."""
    answer = client.fetch(toml)
    assert "folders" in answer, answer
    return answer["folders"]


@pytest.fixture
def new_model(server, served, request):
    """A model like the interpolation's that nobody has fetched; "owner/name"."""
    name = f"someone/{hashlib.md5(request.node.name.encode()).hexdigest()}"
    shutil.copytree(served / "showlab/show-1-interpolation", served / name)
    weights = served / name / "unet/diffusion_pytorch_model.bin"
    weights.write_bytes(weights.read_bytes() + name.encode())  # a hash of its own
    return name


def weights_of(model: str) -> str:
    return f"{model}/unet/diffusion_pytorch_model.bin"


# --- What is fetched


def test_fetches_just_what_the_stages_read(folders, server):
    needed = [f"{repository}/{file}" for repository, files in NEEDED.items() for file in files]
    assert sorted(server.fetched) == sorted(needed)  # each once


def test_what_is_fetched_loads(folders, toml):
    cascade = Cascade.load(toml)
    paths = {table: Path(folder) for table, folder in folders.items()}
    for load in (
        loading.load_keyframes,
        loading.load_interpolation,
        loading.load_pixel_upscale,
        loading.load_latent_upscale,
    ):
        load(cascade, paths, torch.float32)


def test_fetches_nothing_twice(folders, client, server, toml):
    fetched, requests = list(server.fetched), server.requests
    answer = client.fetch(toml)
    assert answer == {"folders": folders, "reports": []}
    assert server.fetched == fetched
    assert server.requests - requests == len(TABLES)  # has the hub something newer?


def test_of_a_pinned_commit_nothing_is_asked_twice(folders, client, server, toml):
    requests = server.requests
    pins = [f'{table}.revision="{Path(folder).name}"' for table, folder in folders.items()]
    assert client.fetch(toml, *pins)["folders"] == folders
    assert server.requests == requests


def test_offline_asks_nothing(folders, server, client, toml, tmp_path):
    """Neither the hub nor anything else: the process notes every connection and every name that it looks up."""
    requests = server.requests
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "def note(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        f"        open({str(tmp_path / 'asked')!r}, 'a').write(repr((event, arguments)))\n"
        "sys.addaudithook(note)\n"
    )
    home = Path(folders["keyframes"]).parents[3]
    environment = server.environment(home)
    online = Client(environment | {"PYTHONPATH": f"{tmp_path}:{environment['PYTHONPATH']}"})
    assert online.fetch(toml, offline=True) == {"folders": folders, "reports": []}
    assert not (tmp_path / "asked").exists() and server.requests == requests
    online.fetch(toml)
    assert (tmp_path / "asked").exists() and server.requests > requests  # the notes are taken
    online.close()


def test_progress_is_told(server, toml, tmp_path):
    client = Client(server.environment(tmp_path))
    server.pause = 0.05
    reports = client.fetch(toml)["reports"]
    server.pause = 0
    client.close()
    total = sum(
        (server.folder / repository / file).stat().st_size for repository in NEEDED for file in NEEDED[repository]
    )
    assert {report[1] for report in reports} == {total}
    done = [report[0] for report in reports]
    assert done == sorted(done) and done[-1] == total
    assert reports[-1][3] == 0 and all(speed >= 0 for _, _, speed, _ in reports) and reports[-1][2] > 0


@pytest.mark.parametrize("revision", ["v1", "a commit", "main", None])
def test_a_revision(server, client, toml, tiny_cascade, new_model, revision):
    revision = server.commit(new_model) if revision == "a commit" else revision
    changes = [f'interpolation.model="{new_model}"', *([f'interpolation.revision="{revision}"'] if revision else [])]
    answer = client.fetch(tiny_cascade, *changes)
    assert Path(answer["folders"]["interpolation"]).name == server.commit(new_model)
    assert client.fetch(tiny_cascade, *changes, offline=True)["folders"] == answer["folders"]


def test_a_revision_that_is_not_there(client, tiny_cascade, new_model):
    answer = client.fetch(tiny_cascade, f'interpolation.model="{new_model}"', "interpolation.revision=v9")
    _check_says(answer, new_model, "[interpolation]", "revision")


def test_what_was_fetched_pinned_is_found_unpinned(server, client, tiny_cascade, new_model):
    model = f'interpolation.model="{new_model}"'
    client.fetch(tiny_cascade, model, f'interpolation.revision="{server.commit(new_model)}"')
    fetched = list(server.fetched)
    assert client.fetch(tiny_cascade, model)["reports"] == []
    assert server.fetched == fetched
    assert "folders" in client.fetch(tiny_cascade, model, offline=True)


def test_huggingface_hub_finds_what_we_fetched(folders, server):
    fetched = list(server.fetched)
    home = Path(folders["keyframes"]).parents[3]
    for offline in (True, False):
        assert _snapshot_download(server.environment(home), offline=offline) == set(folders.values())
    assert server.fetched == fetched


def test_what_huggingface_hub_fetched_is_found(server, toml, tmp_path):
    by_itself = _snapshot_download(server.environment(tmp_path))
    fetched = list(server.fetched)
    client = Client(server.environment(tmp_path))
    for offline in (True, False):
        assert set(client.fetch(toml, offline=offline)["folders"].values()) == by_itself
    client.close()
    assert server.fetched == fetched


# --- A folder of models


def test_models_are_taken_from_a_folder(client, server, served, toml):
    requests = server.requests
    answer = client.fetch(toml, models=str(served))
    names = {table: getattr(Cascade.load(toml), table).model for table in TABLES}
    assert answer["folders"] == {table: str(served / name) for table, name in names.items()}
    assert server.requests == requests


@pytest.mark.parametrize("gone", ["unet/diffusion_pytorch_model.bin", "unet/config.json", "scheduler", ""])
def test_what_a_folder_of_models_lacks_is_named(client, served, toml, tmp_path, gone):
    shutil.copytree(served, tmp_path / "models")
    lost = tmp_path / "models/showlab/show-1-sr1" / gone
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    word = "a weight file" if gone.endswith(".bin") else lost.name
    _check_says(client.fetch(toml, models=str(tmp_path / "models")), "[pixel_upscale]", "show-1-sr1", word)


# --- What the hub refuses

GATED = {"X-Error-Code": "GatedRepo"}
REFUSALS = {
    "no such model": (Refusal(404, {"X-Error-Code": "RepoNotFound"}), ("The hub does not have the model", "`model`")),
    "private": (Refusal(401, {"X-Error-Code": "RepoNotFound"}), ("or it is private", "login.py")),
    "token expired": (
        Refusal(401, {"X-Error-Message": 'User Access Token "mine" is expired'}),
        ("does not accept the token", "has expired", "settings/tokens"),
    ),
    "wrong token": (
        Refusal(401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        ("does not accept the token", "settings/tokens"),
    ),
    "gated, not logged in": (Refusal(401, GATED, files_only=True), ("nobody is logged in", "login.py")),
    "gated, not asked": (
        Refusal(403, GATED | {"X-Error-Message": "you are not in the authorized list."}, files_only=True),
        ("has not asked", "Agree and access repository", "https://huggingface.co/someone/"),
    ),
    "gated, pending": (
        Refusal(403, GATED | {"X-Error-Message": "Your request is awaiting a review from the repo authors."}, True),
        ("waits for its authors", "gated-repos"),
    ),
    "gated, token": (
        Refusal(403, {"X-Error-Message": "Please enable it in your fine-grained token settings"}, files_only=True),
        ("no right to read gated models", "tick"),
    ),
    "disabled": (
        Refusal(403, {"X-Error-Message": "Access to this resource is disabled."}),
        ("(403): Access to this resource is disabled.", "Open https://huggingface.co/someone/"),
    ),
    "forbidden, without a word": (Refusal(403, files_only=True), ("refuses to give", "(403).")),
    "not there, without a word": (Refusal(404), ("The hub does not have the model", "`model`")),
    "another page than the hub's": (Refusal(200), ("cannot be understood", "proxy")),
    "bad request": (Refusal(400), ("failed", "Try again")),
    "always busy": (Refusal(429, {"Retry-After": "0"}), ("too many requests", "is kept")),
    "busy for long": (Refusal(429, {"Retry-After": "3600"}), ("too many requests", "Wait 60 minutes")),
    "busy until then": (
        Refusal(429, {"Retry-After": "Thu, 31 Dec 2099 23:59:59 GMT"}),
        ("too many requests", "Wait 3"),  # and some million minutes more
    ),
    "busy for long, files": (Refusal(429, {"Retry-After": "3600"}, files_only=True), ("too many", "Wait 60 minutes")),
    "busy, as the hub says it": (Refusal(429, {"RateLimit": '"api";r=0;t=299'}), ("too many requests", "5 minutes")),
    "files always failing": (Refusal(503, files_only=True), ("fails (503)", "is kept")),
    "always failing": (Refusal(500), ("fails (500)", "is kept")),
}


@pytest.mark.parametrize(("refusal", "said"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(client, server, tiny_cascade, new_model, refusal, said):
    server.refusals[new_model] = refusal
    answer = client.fetch(tiny_cascade, f'interpolation.model="{new_model}"')
    # A token concerns all models; everything else one.
    _check_says(answer, *said, *(() if "token (401)" in answer["problem"] else (new_model, "[interpolation]")))


def test_a_closed_gate_is_met_before_much_has_come(server, served, toml, new_model, tmp_path):
    (served / weights_of(new_model)).write_bytes(os.urandom(20_000_000))
    gated = "DeepFloyd/IF-II-L-v1.0"  # not the first of the cascade's models
    server.refusals[gated], server.pause = REFUSALS["gated, not asked"][0], 0.05
    client = Client(server.environment(tmp_path))
    answer = client.fetch(toml, f'interpolation.model="{new_model}"')
    client.close()
    del server.refusals[gated]
    server.pause = 0
    _check_says(answer, gated, "has not asked")
    blobs = [blob for blob in tmp_path.rglob("blobs/*") if blob.stat().st_size > 2_000_000]
    assert blobs == []


def test_a_model_that_is_not_there(client, tiny_cascade):
    answer = client.fetch(tiny_cascade, "pixel_upscale.model=showlab/show-1-sr9")
    _check_says(answer, "[pixel_upscale]", "showlab/show-1-sr9")


def test_a_name_that_cannot_be(client, tiny_cascade):
    """It looks like a hub id, but the hub gives no such names."""
    answer = client.fetch(tiny_cascade, "keyframes.model=some--one/base")
    _check_says(answer, "[keyframes]", "some--one/base", "`model`")


def test_a_repository_without_what_is_needed(client, served, tiny_cascade):
    _add(served / "someone/empty", "README.md")
    answer = client.fetch(tiny_cascade, "latent_upscale.model=someone/empty")
    _check_says(answer, "[latent_upscale]", "someone/empty/tokenizer lacks vocab.json")


@pytest.mark.parametrize(
    "gone", ["scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.bin"]
)
def test_nothing_is_fetched_of_a_repository_that_lacks_something(client, server, served, tiny_cascade, new_model, gone):
    (served / new_model / gone).unlink()
    answer = client.fetch(tiny_cascade, f"interpolation.model={new_model}")
    _check_says(answer, "[interpolation]", new_model, "lacks")
    assert not [file for file in server.fetched if file.startswith(new_model)]


def test_what_is_fetched_is_used_though_the_hub_refuses(folders, client, server, toml):
    """A login that has run out, a model that was taken down: what is here is good."""
    model = "showlab/show-1-base"
    server.refusals[model] = Refusal(401, {"X-Error-Code": "RepoNotFound"})
    answer = client.fetch(toml)
    del server.refusals[model]
    assert answer["folders"] == folders


# --- What goes wrong on the way

FAULTS = {
    "failing once": [Fault("status", 500)],
    "busy once": [Fault("status", 429, {"Retry-After": "1"})],
    "stalled": [Fault("stall")],
    "cut short, again and again": [Fault("cut") for _ in range(7)],
    "shorter than it should be": [Fault("short")],
    "wrong once": [Fault("wrong")],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_goes_on_after(server, client, tiny_cascade, new_model, faults):
    server.faults[weights_of(new_model)] = list(faults)
    answer = client.fetch(tiny_cascade, f'interpolation.model="{new_model}"')
    assert "folders" in answer, answer
    assert server.faults[weights_of(new_model)] == []
    _check_same(server, new_model, answer["folders"]["interpolation"])


@pytest.mark.parametrize("refusal", [Refusal(500), Refusal(429, {"Retry-After": "1"})], ids=["failing", "busy"])
def test_asks_again_for_the_list_of_files(server, client, tiny_cascade, new_model, refusal):
    server.busy[new_model] = [refusal]
    assert "folders" in client.fetch(tiny_cascade, f'interpolation.model="{new_model}"')


def test_what_comes_again_from_its_beginning_is_no_progress(monkeypatch):
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    sizes, asked = itertools.cycle([0, 5, 0, 3, 0, 4]), []

    def ask():
        asked.append(1)
        raise hub.TransportError("the connection broke")

    with pytest.raises(hub.TransportError):
        hub._patiently(ask, lambda: next(sizes))
    assert len(asked) == 1 + len(hub.WAITS)


@pytest.mark.parametrize("file", UNET)
def test_what_arrives_damaged_again_and_again_is_not_kept(server, client, folders, tiny_cascade, new_model, file):
    """Of large files the hub gives one hash, of small ones another."""
    config = server.folder / new_model / UNET[0]
    config.write_text(config.read_text() + " " * len(new_model))  # a hash of its own
    server.faults[f"{new_model}/{file}"] = [Fault("wrong") for _ in range(9)]
    answer = client.fetch(tiny_cascade, f'interpolation.model="{new_model}"')
    _check_says(answer, new_model, file, "damaged", "Try again")
    cache = Path(folders["keyframes"]).parents[2] / f"models--{new_model.replace('/', '--')}"
    content = (server.folder / new_model / file).read_bytes()
    names = (hashlib.sha256(content).hexdigest(), git_sha1(content))
    assert not [blob for name in names for blob in cache.glob(f"blobs/{name}*")]
    assert not list(cache.glob(f"snapshots/*/{file}"))
    server.faults.clear()
    answer = client.fetch(tiny_cascade, f'interpolation.model="{new_model}"')
    _check_same(server, new_model, answer["folders"]["interpolation"])


def test_what_is_damaged_in_the_cache_and_removed_comes_anew(server, client, tiny_cascade, new_model):
    answer = client.fetch(tiny_cascade, f'interpolation.model="{new_model}"')
    file = Path(answer["folders"]["interpolation"]) / UNET[0]
    file.resolve().write_bytes(b"damaged")
    file.unlink()  # as the message says: a link to what is damaged
    answer = client.fetch(tiny_cascade, f'interpolation.model="{new_model}"')
    _check_same(server, new_model, answer["folders"]["interpolation"])


def test_killed_in_the_middle_it_goes_on_from_there(server, served, tiny_cascade, new_model, tmp_path):
    weights = served / weights_of(new_model)
    weights.write_bytes(os.urandom(20_000_000))
    server.pause = 0.1
    client = Client(server.environment(tmp_path))
    client.start(tiny_cascade, f'interpolation.model="{new_model}"')
    part = tmp_path / f"hub/models--{new_model.replace('/', '--')}/blobs/{_sha256(weights)}.incomplete"
    deadline = time.monotonic() + 60
    while not part.exists() or part.stat().st_size == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    client.process.send_signal(signal.SIGKILL)
    client.process.wait()
    server.pause = 0
    came = part.stat().st_size
    assert 0 < came < 20_000_000
    client = Client(server.environment(tmp_path))
    answer = client.fetch(tiny_cascade, f'interpolation.model="{new_model}"')
    client.close()
    assert f"{weights_of(new_model)} {came}" in server.ranges
    assert answer["reports"][0][0] >= came and answer["reports"][-1][0] == answer["reports"][-1][1]
    _check_same(server, new_model, answer["folders"]["interpolation"])


# --- What is wrong with the disk


def test_a_disk_too_small_is_told_before_anything_is_fetched(server, client, tiny_cascade, new_model):
    server.sizes[weights_of(new_model)] = 10**16
    fetched = len(server.fetched)
    answer = client.fetch(tiny_cascade, f'interpolation.model="{new_model}"')
    _check_says(answer, "10000000.0 GB", "Free some space", "HF_HUB_CACHE")
    assert len(server.fetched) == fetched


def test_a_disk_that_is_full_on_the_way(server, client, folders, served, tiny_cascade, new_model):
    blobs = Path(folders["keyframes"]).parents[2] / f"models--{new_model.replace('/', '--')}/blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{_sha256(served / weights_of(new_model))}.incomplete"
    part.symlink_to("/dev/full")  # where every write fails for want of space
    answer = client.fetch(tiny_cascade, f'interpolation.model="{new_model}"')
    _check_says(answer, new_model, "is full", "Free some space")
    part.unlink()  # there is space again
    answer = client.fetch(tiny_cascade, f'interpolation.model="{new_model}"')
    _check_same(server, new_model, answer["folders"]["interpolation"])


def test_a_cache_that_cannot_be_written(server, tiny_cascade, new_model):
    client = Client(server.environment(Path("/sys/show-1")))  # not even root may
    answer = client.fetch(tiny_cascade, f'interpolation.model="{new_model}"')
    client.close()
    _check_says(answer, "/sys/show-1", "cannot be kept", "HF_HUB_CACHE")


# --- How much it is

# Which files the released repositories hold, and their bytes: large ones to three digits or so, small ones by guess.
MANIFEST = json.loads(Path(__file__).with_name("manifest.json").read_text())


def test_what_show_1_needs_is_a_fraction_of_the_repositories():
    cascade, needed = Cascade.load("show-1"), 0
    for table in TABLES:
        sizes = MANIFEST[getattr(cascade, table).model]
        files = hub.needed_files(sizes, table, hub.variant(cascade, table))
        assert hub.choose_weights([f[5:] for f in files if f.startswith("unet/")], hub.variant(cascade, table))
        needed += sum(sizes[file] for file in files)
    assert 25e9 < needed <= 27e9
    assert sum(sum(sizes.values()) for sizes in MANIFEST.values()) > 3 * needed


# --- From here on the hub is out of reach, and it is another process that asks.


@pytest.fixture(scope="module")
def cut_off(server, folders):
    server.stop()
    client = Client(server.environment(Path(folders["keyframes"]).parents[3]))
    yield client
    client.close()


def test_without_the_hub_what_was_fetched_is_used(folders, cut_off, toml):
    assert cut_off.fetch(toml)["folders"] == folders


def test_without_the_hub_a_new_model_is_out_of_reach(cut_off, tiny_cascade):
    answer = cut_off.fetch(tiny_cascade, "first_frame.model=someone/new")
    _check_says(answer, "[first_frame]", "someone/new", "cannot be reached", "--cascade mini")


@pytest.mark.parametrize("offline", [True, False])
def test_without_the_hub_half_a_model_is_not_enough(folders, cut_off, toml, offline):
    with contextlib.suppress(FileNotFoundError):
        (Path(folders["interpolation"]) / "unet/diffusion_pytorch_model.bin").unlink()
    answer = cut_off.fetch(toml, offline=offline)
    why = "--offline" if offline else "cannot be reached"
    _check_says(answer, "[interpolation]", "showlab/show-1-interpolation", why)


def _add(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"not needed: {name}")


def _snapshot_download(environment: dict[str, str], *, offline: bool = False) -> set[str]:
    """Where huggingface_hub itself puts or finds the needed files."""
    program = (
        "from huggingface_hub import snapshot_download\n"
        f"for repository, files in { ({name: sorted(files) for name, files in NEEDED.items()})!r}.items():\n"
        f"    print(snapshot_download(repository, allow_patterns=files, local_files_only={offline}))"
    )
    command = [sys.executable, "-c", program]
    return set(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split())


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _check_same(server: Hub, model: str, folder: str) -> None:
    """All needed files are as the hub has them, and the cache holds nothing that is not what its name says."""
    for file in NEEDED["showlab/show-1-interpolation"]:
        assert (Path(folder) / file).read_bytes() == (server.folder / model / file).read_bytes()
    for blob in (Path(folder).parents[1] / "blobs").iterdir():
        assert blob.name in (_sha256(blob), git_sha1(blob.read_bytes()))


def _check_says(answer: dict[str, str], *words: str) -> None:
    assert answer.keys() == {"problem", "remedy"}, answer
    assert [word for word in words if word not in f"{answer['problem']} {answer['remedy']}"] == [], answer
    assert "\n" not in answer["problem"] and answer["problem"].endswith(".") and not answer["problem"].endswith("..")
