"""login.py and the doctor, as people call them, against a hub on this computer."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pexpect
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import hf_raise_for_status

from show_1 import access
from tests import tiny
from tests.hub_server import ROOT, Client, Hub, Refusal

TOKEN = "hf_abcdefghijklmnopqrstuvwxyzabcdefgh"
NARROW = "hf_narrowabcdefghijklmnopqrstuvwxyzab"
GATED = "DeepFloyd/IF-II-L-v1.0"
NOT_ASKED = Refusal(
    403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "you are not in the authorized list."}, files_only=True
)
PENDING = Refusal(
    403,
    {"X-Error-Code": "GatedRepo", "X-Error-Message": "Your request is awaiting a review from the repo authors."},
    files_only=True,
)
NO_RIGHT_UNTOLD = Refusal(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, True)
NO_RIGHT = Refusal(
    403, {"X-Error-Message": "Please enable access to it in your fine-grained token settings"}, files_only=True
)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tiny.build(folder)
    return folder


@pytest.fixture
def server(served):
    server = Hub(served)
    server.users[TOKEN] = {"name": "alice", "auth": {"accessToken": {"displayName": "notebook", "role": "read"}}}
    grants = {"displayName": "narrow", "role": "fineGrained", "fineGrained": {"canReadGatedRepos": False}}
    server.users[NARROW] = {"name": "alice", "auth": {"accessToken": grants}}
    yield server
    server.stop()


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    file = tmp_path_factory.mktemp("cascade") / "cascade.toml"
    file.write_text(tiny.CASCADE)
    return file


@pytest.fixture
def login(server, toml, tmp_path):
    """Runs login.py; what it writes is looked through for the token."""

    def login(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        done = run("login.py", "--cascade", toml, *arguments, environment=server.environment(tmp_path) | environment)
        assert TOKEN not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return login


def run(*command, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def said(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done
    assert [word for word in words if word not in done.stdout + done.stderr] == [], done


# --- login.py


def test_a_token_is_saved_by_huggingface_hub_alone(login, tmp_path):
    for _ in range(2):  # again does no harm
        done = login("--token", f" {TOKEN}\n")
        assert done.returncode == 0, done
        assert done.stdout.count("can be had") == 5 and "alice" in done.stdout
    holders = [file for file in tmp_path.rglob("*") if file.is_file() and TOKEN in file.read_text(errors="replace")]
    assert sorted(file.name for file in holders) == ["stored_tokens", "token"]
    assert {file.stat().st_mode & 0o077 for file in holders} == {0}
    assert login().returncode == 0  # logged in by now


def test_the_token_of_the_environment(login, tmp_path):
    done = login("--token", "<your_huggingface_token>", HF_TOKEN=TOKEN)  # the notebook's cell, as it stands
    assert done.returncode == 0, done
    assert (tmp_path / "token").read_text() == TOKEN


def test_check_saves_nothing(login, tmp_path):
    done = login("--check", "--token", TOKEN)
    assert done.returncode == 0 and "alice" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_prompt_is_hidden(server, toml, tmp_path):
    command = [str(ROOT / "login.py"), "--cascade", str(toml)]
    child = pexpect.spawn(sys.executable, command, env=server.environment(tmp_path), encoding="utf-8", timeout=60)
    child.expect("Token: ")
    child.sendline(TOKEN)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0 and "alice" in child.before and TOKEN not in child.before
    assert (tmp_path / "token").read_text() == TOKEN
    child = pexpect.spawn(sys.executable, command, env=server.environment(tmp_path), encoding="utf-8", timeout=60)
    child.expect("Enter alone to keep")  # and once more
    child.expect("Token: ")
    child.sendline("")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0 and "alice" in child.before


def test_in_a_notebook_it_does_not_wait_for_what_nobody_can_type(server, toml, tmp_path):
    """There, `!` gives the program a terminal, as here, and no way to write to it."""
    environment = server.environment(tmp_path) | {"JPY_PARENT_PID": "1"}
    child = pexpect.spawn(sys.executable, [str(ROOT / "login.py")], env=environment, encoding="utf-8", timeout=60)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 2 and "no terminal" in child.before and "%run login.py" in child.before


BAD = {
    "a line break": (f"{TOKEN[:9]}\n{TOKEN[9:]}", "line break"),
    "another form": ("ghp_abcdefghijkl", 'begins with "hf_"'),
    "cut short by an ellipsis": ("hf_abc…", 'begins with "hf_"'),
    "not known, or expired": ("hf_expired", "does not accept the token"),
}


@pytest.mark.parametrize(("token", "words"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("way", ["--token", "HF_TOKEN"])
def test_a_token_that_will_not_do(login, tmp_path, way, token, words):
    done = login("--token", token) if way == "--token" else login(HF_TOKEN=token)
    said(done, words, "settings/tokens")
    assert done.stderr.count("\n") == 2 and token not in done.stderr
    assert not (tmp_path / "token").exists()


def test_a_token_out_of_place_is_not_shown(login):
    done = login(TOKEN)  # the fixture looks for it
    assert done.returncode == 2 and "--token" in done.stderr


def test_the_token_of_a_log_in_by_browser(login, server):
    server.users["hf_oauth_a-b.c_d"] = server.users[TOKEN]
    done = login("--token", "hf_oauth_a-b.c_d")
    assert done.returncode == 0 and "alice" in done.stdout, done


def test_an_answer_that_is_not_the_hubs(login, server):
    server.users[TOKEN] = {"who": "alice"}
    said(login("--token", TOKEN), "cannot be understood")


def test_an_expired_token_is_told_as_such_where_huggingface_hub_speaks_of_the_repository():
    request = httpx2.Request("GET", "https://huggingface.co/api/models/a/b")
    told = {"X-Error-Message": 'User Access Token "mine" is expired'}
    with pytest.raises(RepositoryNotFoundError) as caught:
        hf_raise_for_status(httpx2.Response(401, headers=told, request=request))
    assert "it has expired" in access.explain(caught.value, "the model a/b", "a/b").problem


@pytest.mark.parametrize("endpoint", ["", "hub.example"])
def test_an_address_of_the_hub_that_is_none(doctor, endpoint):
    done = doctor(HF_ENDPOINT=endpoint, HTTPS_PROXY="http://127.0.0.1:9")  # not to ask the real one
    said(done, "cannot be reached" if endpoint == "" else "HF_ENDPOINT")


def test_no_token_and_nobody_to_ask(login):
    said(login(), "no terminal", "HF_TOKEN")


def test_without_a_network(login, server):
    server.stop()
    said(login("--token", TOKEN), "cannot be reached", "Connect to the internet")


def test_where_it_cannot_be_saved(login):
    said(login("--token", TOKEN, HF_HOME="/sys/show-1"), "/sys/show-1", "HF_TOKEN")


@pytest.mark.parametrize(
    ("refusal", "token", "words"),
    [
        (NOT_ASKED, TOKEN, ("not asked", f"Open https://huggingface.co/{GATED}", "Agree and access repository")),
        (PENDING, TOKEN, ("waits for its authors", "settings/gated-repos")),
        (NO_RIGHT, NARROW, ("no right to read gated models", "settings/tokens", "tick")),
        (NO_RIGHT_UNTOLD, NARROW, ("no right to read gated models", "settings/tokens", "tick")),
    ],
    ids=["not asked", "pending", "no right", "no right, untold"],
)
def test_a_model_that_cannot_be_had(login, server, tmp_path, refusal, token, words):
    server.refusals[GATED] = refusal
    done = login("--token", token)
    said(done, *words)
    assert done.stdout.count("can be had") == 4  # the others
    assert (tmp_path / "token").exists()


# --- python -m show_1 doctor


@pytest.fixture
def doctor(server, toml, tmp_path):
    def doctor(*arguments, **environment: str) -> subprocess.CompletedProcess:
        arguments = arguments if "--cascade" in arguments else ("--cascade", toml, *arguments)
        environment = server.environment(tmp_path) | environment
        done = run("-m", "show_1", "doctor", *arguments, environment=environment)
        assert TOKEN not in done.stdout and "Traceback" not in done.stderr
        return done

    return doctor


def test_a_healthy_computer(doctor, server, tmp_path):
    fetched = list(server.fetched)
    done = doctor(HF_TOKEN=TOKEN)
    assert done.returncode == 0, done
    assert "WRONG" not in done.stdout and "alice" in done.stdout and "Tiny can run here." in done.stdout
    subjects = [line[7:].partition(":")[0] for line in done.stdout.splitlines()[:-1]]
    tables = ["keyframes", "interpolation", "first_frame", "pixel_upscale", "latent_upscale"]
    models = [f"model of [{table}]" for table in tables]
    assert subjects == ["versions", "video encoder", "token", *models, "disk", "GPU"]
    assert server.fetched == fetched and list(tmp_path.iterdir()) == []  # it has only looked


def test_mini_needs_no_hub(doctor, server):
    requests = server.requests
    assert doctor("--cascade", "mini").returncode == 0
    assert server.requests == requests


def test_without_a_compiler_mini_runs_slower(doctor):
    done = doctor("--cascade", "mini", PATH="", CXX="")
    gpu = next(line for line in done.stdout.splitlines() if "GPU" in line)
    assert done.returncode == 0 and gpu.startswith("ok") and "slower" in gpu and "apt-get install g++" in gpu


def test_a_folder_of_models(doctor, served, tmp_path):
    assert doctor("--models", served).returncode == 0
    shutil.copytree(served, tmp_path / "models")
    (tmp_path / "models/showlab/show-1-sr2/vae/config.json").unlink()
    said(doctor("--models", tmp_path / "models"), "WRONG  model of [latent_upscale]", "config.json", "cannot run")


def test_what_is_wrong_is_said(doctor, server):
    server.refusals[GATED] = NOT_ASKED
    server.sizes["showlab/show-1-base/unet/diffusion_pytorch_model.bin"] = 10**16
    done = doctor(HF_TOKEN="hf_expired")
    said(done, "WRONG  token", "WRONG  disk", "WRONG  model of [first_frame]", "Agree and access repository")
    assert done.stdout.count("can be fetched") == 4
    if "none that torch can use" in done.stdout:
        said(done, "WRONG  GPU", "many hours")


def test_a_token_that_cannot_be_read(login, doctor, tmp_path):
    for done in (doctor(HF_TOKEN_PATH=str(tmp_path)), login("--check", HF_TOKEN_PATH=str(tmp_path))):
        assert "The token cannot be read" in done.stdout + done.stderr and "Traceback" not in done.stderr
        assert done.returncode == 2


def test_offline(doctor, server):
    requests = server.requests
    said(doctor("--offline"), "WRONG  model of [keyframes]", "--offline")
    assert server.requests == requests


def test_it_does_not_wait_long(doctor, tmp_path):
    """Ten seconds where nothing answers, five where a hub does, on a computer that has nothing else to do."""

    def seconds(*arguments, words: tuple[str, ...] = (), **environment: str) -> float:
        start = time.monotonic()
        done = doctor(*arguments, **environment)
        assert [word for word in words if word not in done.stdout] == [], done
        return time.monotonic() - start

    busy = seconds("--cascade", "mini")  # what it takes without a hub, on this computer as it is now
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes calls, and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = ("WRONG  token", "does not answer")
        assert any(seconds(HF_ENDPOINT=url, HF_TOKEN=TOKEN, words=words) < 10 + busy for _ in range(3))
    assert any(seconds(HF_TOKEN=TOKEN) < 5 + busy for _ in range(3))  # thrice, where others hold it up


def test_a_hub_that_refuses_now_is_asked_once(doctor, server):
    server.refusals["showlab/show-1-base"] = Refusal(500)
    server.refusals["showlab/show-1-sr1"] = Refusal(429, {"Retry-After": "50"})
    done = doctor(HF_TOKEN=TOKEN)
    said(done, "WRONG  model of [keyframes]", "(500)", "WRONG  model of [pixel_upscale]", "(429)", "50 seconds")
    assert server.requests == 5 + 1 + 3  # the models, the token, and whether those that are left may be had


def test_models_that_are_here_need_no_token_and_no_hub(doctor, server, toml, tmp_path):
    client = Client(server.environment(tmp_path))
    assert "folders" in client.fetch(toml)
    client.close()
    done = doctor(HF_TOKEN="hf_expired")
    assert done.returncode == 0 and "does not accept" in done.stdout and "WRONG" not in done.stdout, done
    assert doctor(HF_HUB_OFFLINE="1").returncode == 0
    server.stop()
    assert doctor(HF_TOKEN=TOKEN).returncode == 0


# --- Python or a package that is too old


@pytest.mark.parametrize("command", ["app.py", "login.py", "-m show_1 doctor", '-m show_1 "a cat"'])
def test_what_is_too_old_is_said(tmp_path, command):
    """A package's version is what stands in its folder of metadata; this one comes first."""
    old = tmp_path / "diffusers-0.19.3.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.19.3\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = run(*command.replace('"', "").split(" ", 2), environment=environment)
    assert done.returncode == 2 and "diffusers 0.19.3 is too old" in done.stderr
    assert "pip install -r requirements.txt" in done.stderr and done.stderr.count("\n") == 2


@pytest.mark.parametrize("command", ["app.py", "login.py", "-m show_1 doctor"])
def test_a_python_too_old_is_said(tmp_path, command):
    """No older Python is at hand: this one says that it is, before anything else runs."""
    (tmp_path / "sitecustomize.py").write_text(
        "import platform, sys\nsys.version_info = (3, 10, 4)\nplatform.python_version = lambda: '3.10.4'\n"
    )
    done = run(*command.split(), environment=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 2 and "Python 3.10.4" in done.stderr and "3.11" in done.stderr
    assert done.stderr.count("\n") == 2


def test_what_reads_on_an_older_python():
    """What runs before the check must not be refused for its grammar by the Pythons that it is to name."""
    import ast

    files = ("__init__", "__main__", "hosts", "versions")
    for file in ("app.py", "login.py", *(f"show_1/{name}.py" for name in files)):
        ast.parse(Path(ROOT, file).read_text(), feature_version=(3, 8))
