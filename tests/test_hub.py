"""Fetching from the hub: huggingface_hub itself, against a hub on this computer."""

import shutil
from pathlib import Path

import pytest
import torch

from show_1 import hub, loading
from show_1.cascade import Cascade
from tests import tiny
from tests.hub_server import Client, Hub, Refusal

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
def clients(server, tmp_path_factory):
    """Two processes with one cache: what the second knows, it knows from the disk."""
    home = tmp_path_factory.mktemp("home")
    clients = [Client(server.url, home) for _ in range(2)]
    yield clients
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def client(clients):
    return clients[0]


@pytest.fixture(scope="module")
def folders(client, server, toml):
    """Where the stages' files are, once fetched."""
    answers = {table: client.fetch(toml, table) for table in TABLES}
    assert [answer for answer in answers.values() if "folder" not in answer] == []
    return {table: answer["folder"] for table, answer in answers.items()}


def test_fetches_just_what_the_stages_read(folders, server):
    needed = [f"{repository}/{file}" for repository, files in NEEDED.items() for file in files]
    assert sorted(server.fetched) == sorted(needed)  # each once


def test_what_is_fetched_loads(folders, toml):
    cascade = Cascade.load(toml).override(f'{table}.model="{folder}"' for table, folder in folders.items())
    for load in (
        loading.load_keyframes,
        loading.load_interpolation,
        loading.load_pixel_upscale,
        loading.load_latent_upscale,
    ):
        load(cascade, torch.float32)


def test_fetches_nothing_twice(folders, client, server, toml):
    fetched = list(server.fetched)
    assert {table: client.fetch(toml, table)["folder"] for table in TABLES} == folders
    assert server.fetched == fetched


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (Refusal(404, {"X-Error-Code": "RepoNotFound"}), ("The hub has no model", "hf auth login")),
        (Refusal(401, {"X-Error-Code": "RepoNotFound"}), ("or it is private", "hf auth login")),
        (Refusal(401, {"X-Error-Message": "Invalid credentials in Authorization header"}), ("401", "Log in again")),
        # Without a login the hub says 401 of a gated model, with one that has not accepted its licence 403.
        (Refusal(401, {"X-Error-Code": "GatedRepo"}, files_only=True), ("is gated", "accept its licence")),
        (Refusal(403, {"X-Error-Code": "GatedRepo"}, files_only=True), ("is gated", "accept its licence")),
        (Refusal(403, {"X-Error-Code": "GatedRepo"}), ("is gated", "accept its licence")),
        (Refusal(403, {"X-Error-Message": "Access to this resource is disabled."}), ("failed", "Try again")),
        (Refusal(400, {}), ("failed", "Try again")),
    ],
    ids=lambda value: f"{value.status}{[*value.headers.values()]}" if isinstance(value, Refusal) else "",
)
def test_refusals(client, server, served, toml, refusal, said):
    model = f"someone/model-{id(refusal)}"  # one that no other test has fetched
    shutil.copytree(served / "showlab/show-1-interpolation", served / model)
    server.refusals[model] = refusal
    answer = client.fetch(toml, "interpolation", model)
    _check_says(answer, model, "[interpolation]", *said)


def test_a_model_that_is_not_there(client, toml):
    _check_says(client.fetch(toml, "pixel_upscale", "showlab/show-1-sr9"), "[pixel_upscale]", "showlab/show-1-sr9")


def test_a_name_that_cannot_be(client, toml):
    """It looks like a hub id, but the hub gives no such names."""
    _check_says(client.fetch(toml, "keyframes", "some--one/base"), "[keyframes]", "some--one/base", "`model`")


def test_a_repository_without_what_is_needed(client, served, toml):
    _add(served / "someone/empty", "README.md")
    answer = client.fetch(toml, "latent_upscale", "someone/empty")
    _check_says(answer, "[latent_upscale]", "someone--empty", "lacks the folder tokenizer")


def test_what_is_fetched_is_used_though_the_hub_refuses(folders, client, server, toml):
    """A login that has run out, a model that was taken down: what is here is good."""
    model = "showlab/show-1-base"
    server.refusals[model] = Refusal(401, {"X-Error-Code": "RepoNotFound"})
    answer = client.fetch(toml, "keyframes")
    del server.refusals[model]
    assert answer == {"folder": folders["keyframes"]}


# From here on the hub is out of reach, and it is the second process that asks.


def test_without_the_hub_what_an_older_program_fetched_is_found(folders, clients, server, toml):
    """Older versions of huggingface_hub kept no list of a repository's files."""
    server.stop()
    folder = folders["pixel_upscale"]
    shutil.rmtree(Path(folder).parents[1] / "trees")
    assert clients[1].fetch(toml, "pixel_upscale") == {"folder": folder}


def test_without_the_hub_what_is_fetched_is_found(folders, clients, server, toml):
    server.stop()
    assert {table: clients[1].fetch(toml, table)["folder"] for table in TABLES} == folders


def test_without_the_hub_a_new_model_is_out_of_reach(clients, server, toml):
    server.stop()
    answer = clients[1].fetch(toml, "first_frame", "someone/new")
    _check_says(answer, "[first_frame]", "someone/new", "cannot be reached", "--cascade mini")


def test_without_the_hub_half_a_model_is_not_enough(folders, clients, server, toml):
    server.stop()
    (Path(folders["interpolation"]) / "unet/diffusion_pytorch_model.bin").unlink()
    answer = clients[1].fetch(toml, "interpolation")
    _check_says(answer, "[interpolation]", "showlab/show-1-interpolation", "cannot be reached")


def _add(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"not needed: {name}")


def _check_says(answer: dict[str, str], *words: str) -> None:
    assert answer.keys() == {"problem", "remedy"}, answer
    assert [word for word in words if word not in f"{answer['problem']} {answer['remedy']}"] == [], answer
    assert "\n" not in answer["problem"] and answer["problem"].endswith(".") and not answer["problem"].endswith("..")
