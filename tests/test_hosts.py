"""The hosts, told by what they set in the environment; we have none of them at hand."""

from pathlib import Path

import pytest

from show_1 import hosts

PAPERSPACE = {"PAPERSPACE_NOTEBOOK_REPO_ID": "r1", "JPY_PARENT_PID": "1"}


@pytest.mark.parametrize(
    ("environment", "name", "rented", "in_notebook"),
    [
        (PAPERSPACE, "Paperspace", True, True),
        ({"COLAB_RELEASE_TAG": "release-colab", "JPY_PARENT_PID": "1"}, "Colab", True, True),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "JPY_PARENT_PID": "1"}, "Kaggle", True, True),
        ({"JPY_PARENT_PID": "1"}, "Jupyter", False, True),
        ({"HOME": "/root"}, "this computer", False, False),
    ],
)
def test_hosts_are_told_apart(environment, name, rented, in_notebook):
    host = hosts.detect(environment)
    assert (host.name, host.rented, host.in_notebook) == (name, rented, in_notebook)


@pytest.fixture
def volume(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "PAPERSPACE_STORAGE", tmp_path)
    monkeypatch.setattr(hosts, "ROOM", 1)
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, "")  # to be what it was in the end, whatever `prepare` sets
        monkeypatch.delenv(name)
    for name, value in PAPERSPACE.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def test_paperspace_keeps_models_and_results_on_its_volume(volume, monkeypatch):
    hosts.prepare()
    assert hosts.os.environ["HF_HUB_CACHE"] == str(volume / "show-1/models")
    monkeypatch.delenv("HF_HUB_CACHE")
    assert hosts.detect().outputs == volume / "show-1/outputs"


def test_a_small_volume_is_left_alone(volume, monkeypatch):
    monkeypatch.setattr(hosts, "ROOM", 1e18)
    hosts.prepare()
    assert "HF_HUB_CACHE" not in hosts.os.environ
    assert hosts.detect().outputs == Path("outputs")


def test_a_volume_that_the_models_have_filled_is_still_theirs(volume, monkeypatch):
    monkeypatch.setattr(hosts, "ROOM", 1e18)
    (volume / "show-1/models").mkdir(parents=True)
    assert hosts.detect().storage == volume / "show-1"


def test_a_place_that_is_empty_is_not_chosen(volume, monkeypatch):
    monkeypatch.setenv("HF_HOME", "")
    hosts.prepare()
    assert "HF_HOME" not in hosts.os.environ and "HF_HUB_CACHE" in hosts.os.environ


def test_a_place_that_was_chosen_is_kept(volume, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    hosts.prepare()
    assert "HF_HUB_CACHE" not in hosts.os.environ
