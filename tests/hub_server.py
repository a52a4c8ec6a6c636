"""A hub on this computer, and a program that uses it: huggingface_hub cannot tell it from the real one.

Only what huggingface_hub 2.4 asks of a model: its commit, its list of files, and each file by commit, the large ones
behind a redirect. See https://huggingface.co/docs/hub/api and `huggingface_hub.file_download.get_hf_file_metadata`.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LARGE = (".bin", ".safetensors", ".msgpack", ".model")  # kept in LFS, and so served from elsewhere
INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?")
TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/[^/]+")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/[0-9a-f]{40}/(.+)")
STORED = "/stored/"


@dataclass(frozen=True)
class Refusal:
    """What the hub answers instead: of a gated model it still shows the list of files, so `files_only`."""

    status: int
    headers: dict[str, str]
    files_only: bool = False


class Hub:
    """Serves `folder`/owner/name as the models owner/name; `url` is for HF_ENDPOINT.

    `fetched` holds "owner/name/path" of every file sent, in order and as often as it was; `requests` counts all.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.refusals: dict[str, Refusal] = {}
        self.fetched: list[str] = []
        self.requests = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        # Two, for the client follows redirects to the hub itself, but takes those elsewhere for the storage.
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def files(self, repository: str) -> list[str]:
        root = self.folder / repository
        return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())

    def commit(self, repository: str) -> str:
        return hashlib.sha1(repository.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"  # connections are kept, as the hub keeps them

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests += 1
        path = self.path.partition("?")[0]
        if path.startswith(STORED):
            self._send_file(path.removeprefix(STORED))
        elif match := INFO.fullmatch(path) or TREE.fullmatch(path) or FILE.fullmatch(path):
            repository, refusal = match[1], self.hub.refusals.get(match[1])
            if refusal and (match.re is FILE or not refusal.files_only):
                self._send(refusal.status, b"{}", refusal.headers)
            elif not (self.hub.folder / repository).is_dir():
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif match.re is FILE:
                self._resolve(repository, match[2])
            else:
                self._send_json(self._info(repository) if match.re is INFO else self._tree(repository))
        else:
            self._send(404, b"{}")

    def _info(self, repository: str) -> dict:
        siblings = [{"rfilename": file} for file in self.hub.files(repository)]
        return {"id": repository, "sha": self.hub.commit(repository), "siblings": siblings}

    def _tree(self, repository: str) -> list[dict]:
        entries = []
        for path in self.hub.files(repository):
            data = (self.hub.folder / repository / path).read_bytes()
            entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return entries

    def _resolve(self, repository: str, path: str) -> None:
        headers = {"X-Repo-Commit": self.hub.commit(repository)}
        if path not in self.hub.files(repository):
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        elif path.endswith(LARGE):
            data = (self.hub.folder / repository / path).read_bytes()
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"'}
            self._send(302, b"", headers | {"Location": f"{self.hub.storage_url}{STORED}{repository}/{path}"})
        else:
            self._send_file(f"{repository}/{path}", headers)

    def _send_file(self, path: str, headers: dict[str, str] | None = None) -> None:
        data = (self.hub.folder / path).read_bytes()
        if self.command == "GET":
            self.hub.fetched.append(path)
        self._send(200, data, (headers or {}) | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def _send_json(self, answer: dict | list) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


class Client:
    """`show_1.hub.fetch` in a process of its own: huggingface_hub reads its environment once, when it is imported."""

    def __init__(self, endpoint: str, home: Path, **environment: str):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_server"],
            cwd=Path(__file__).parent.parent,
            env=kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def fetch(self, cascade: Path, table: str, model: str | None = None) -> dict[str, str]:
        """Return {"folder": …}, or {"problem": …, "remedy": …}; `model` is taken instead of the cascade's."""
        changes = [f'{table}.model="{model}"'] if model else []
        self._process.stdin.write(json.dumps([str(cascade), table, changes]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


def _serve_fetches() -> None:
    """What the client's process does: read a line, fetch, answer with a line."""
    from show_1 import hub
    from show_1.cascade import Cascade
    from show_1.errors import Show1Error

    for line in sys.stdin:
        file, table, changes = json.loads(line)
        try:
            answer = {"folder": str(hub.fetch(Cascade.load(file).override(changes), table))}
        except Show1Error as error:
            answer = {"problem": error.problem, "remedy": error.remedy}
        except Exception as error:  # for the test that asked
            answer = {"traceback": repr(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve_fetches()
