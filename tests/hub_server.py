"""A hub on this computer, and a program that uses it: huggingface_hub cannot tell it from the real one.

Only what huggingface_hub 2.4 asks: a model's commit, its list of files, whether a token may have it, whose token that
is, and each file by commit, the large ones behind a redirect. See https://huggingface.co/docs/hub/api.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[1]
LARGE = (".bin", ".safetensors", ".msgpack", ".model")  # kept in LFS, and so served from elsewhere
INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/[^/]+")
ACCESS = re.compile(r"/api/models/([^/]+/[^/]+)/auth-check")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/[0-9a-f]{40}/(.+)")
STORED = "/stored/"
AGENTS = "/api/agent-harnesses"  # huggingface_hub asks once a day and computer which programs call themselves agents


@dataclass(frozen=True)
class Refusal:
    """What the hub answers instead: of a gated model it still shows the list of files, so `files_only`."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    files_only: bool = False


@dataclass(frozen=True)
class Fault:
    """What goes wrong once with the content of a file, after its first half: it stalls, is cut, is short or wrong.

    "cut" breaks the promise of Content-Length, "short" does not: that is all there is said to be. Or, with a `status`,
    before it.
    """

    kind: str  # "stall", "cut", "short", "wrong", "status"
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """Serves `folder`/owner/name as the models owner/name; `url` is for HF_ENDPOINT.

    `fetched` holds "owner/name/path" of every file sent from its beginning, in order and as often as it was, `ranges`
    "owner/name/path byte" of those sent from that byte on; `requests` counts all but those for AGENTS. `faults` holds,
    by "owner/name/path", what goes wrong with the next requests for it; `refusals`, by "owner/name", what is answered
    always; `busy`, by the same, what the next questions about it are answered. `users` holds what the hub knows of a
    token; `sizes`, by "owner/name/path", the size that it pretends a file has.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.refusals: dict[str, Refusal] = {}
        self.busy: dict[str, list[Refusal]] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.users: dict[str, dict] = {}
        self.sizes: dict[str, int] = {}
        self.fetched: list[str] = []
        self.ranges: list[str] = []
        self.requests = 0
        self.pause = 0.0  # seconds, before each MiB of a file
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

    def environment(self, home: Path) -> dict[str, str]:
        """What a program's environment has to be, for it to take this for the hub, with an empty cache in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"  # connections are kept, as the hub keeps them

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests += path != AGENTS
        if path.startswith(STORED):
            if self.headers["Authorization"]:
                self._send(400, b"the address is signed already")  # and the token is nobody else's business
            else:
                self._send_file(path.removeprefix(STORED))
        elif path == "/api/whoami-v2":
            self._whoami()
        elif match := next((m for kind in (ACCESS, TREE, INFO, FILE) if (m := kind.fullmatch(path))), None):
            self._about(match)
        else:
            self._send(404, b"{}")

    def _about(self, match: re.Match) -> None:
        repository, kind = match[1], match.re
        refusal = self.hub.refusals.get(repository)
        if kind is INFO and (waiting := self.hub.busy.get(repository)):
            refusal = waiting.pop(0)
        if refusal and (kind in (FILE, ACCESS) or not refusal.files_only):
            self._send(refusal.status, b"{}", refusal.headers)
        elif not (self.hub.folder / repository).is_dir():
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif kind is INFO and match[2] not in (None, "main", "v1", self.hub.commit(repository)):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif kind is FILE:
            self._resolve(repository, match[2])
        elif kind is ACCESS:
            self._send(200, b"OK")
        else:
            self._send_json(self._info(repository) if kind is INFO else self._tree(repository))

    def _whoami(self) -> None:
        user = self.hub.users.get((self.headers["Authorization"] or "").removeprefix("Bearer "))
        if user is None:
            self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        else:
            self._send_json(user)

    def _info(self, repository: str) -> dict:
        siblings = [
            {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
            | (
                {"lfs": {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}}
                if "lfs" in entry
                else {}
            )
            for entry in self._tree(repository)
        ]
        return {"id": repository, "sha": self.hub.commit(repository), "siblings": siblings}

    def _tree(self, repository: str) -> list[dict]:
        entries = []
        for path in self.hub.files(repository):
            file = self.hub.folder / repository / path
            size = self.hub.sizes.get(f"{repository}/{path}", file.stat().st_size)
            sha1, sha256 = _hashes(file, file.stat().st_mtime_ns)
            entry = {"type": "file", "path": path, "size": size, "oid": sha1}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
            entries.append(entry)
        return entries

    def _resolve(self, repository: str, path: str) -> None:
        headers = {"X-Repo-Commit": self.hub.commit(repository)}
        if path not in self.hub.files(repository):
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        elif path.endswith(LARGE):
            file = self.hub.folder / repository / path
            sha256 = _hashes(file, file.stat().st_mtime_ns)[1]
            headers |= {"X-Linked-Size": str(file.stat().st_size), "X-Linked-Etag": f'"{sha256}"'}
            self._send(302, b"", headers | {"Location": f"{self.hub.storage_url}{STORED}{repository}/{path}"})
        else:
            self._send_file(f"{repository}/{path}", headers)

    def _send_file(self, path: str, headers: dict[str, str] | None = None) -> None:
        file = self.hub.folder / path
        data = file.read_bytes()
        etag = _hashes(file, file.stat().st_mtime_ns)[0]
        headers = (headers or {}) | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if self.command != "GET":
            self._send(200, data, headers)
            return
        fault = faults.pop(0) if (faults := self.hub.faults.get(path)) else None
        if fault and fault.kind == "status":
            self._send(fault.status, b"", fault.headers)
            return
        if fault and fault.kind == "wrong":
            data = bytes(len(data))
        status, begin = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            status, begin = 206, int(match[1])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            self.hub.ranges.append(f"{path} {begin}")
        if begin == 0:
            self.hub.fetched.append(path)
        if fault and fault.kind == "short":
            data = data[: begin + (len(data) - begin) // 2]
        half = begin + (len(data) - begin) // 2 if fault and fault.kind in ("stall", "cut") else None
        self._send(status, data[begin:], headers, only=None if half is None else half - begin)
        if half is not None:
            if fault.kind == "stall":
                time.sleep(3)
            self.close_connection = True

    def _send_json(self, answer: dict | list) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, only: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):  # the client may have been killed
                for begin in range(0, len(body[:only]), 2**20):
                    time.sleep(0 if self.path.startswith("/api/") else self.hub.pause)
                    self.wfile.write(body[:only][begin : begin + 2**20])

    def log_message(self, *args) -> None:
        pass


@functools.cache
def _hashes(file: Path, changed: int) -> tuple[str, str]:
    """What git and LFS call a file's content; a client that waits is not to wait for this."""
    data = file.read_bytes()
    return git_sha1(data), hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Client:
    """`show_1.hub.fetch` in a process of its own: huggingface_hub reads its environment once, when it is imported."""

    def __init__(self, environment: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def fetch(self, cascade: Path, *changes: str, **options) -> dict:
        """Return {"folders": {table: …}, "reports": [[done, total, speed, left], …]}, or {"problem", "remedy"}."""
        self.start(cascade, *changes, **options)
        return json.loads(self.process.stdout.readline())

    def start(self, cascade: Path, *changes: str, **options) -> None:
        self.process.stdin.write(json.dumps([str(cascade), changes, options]) + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


def _serve_fetches() -> None:
    """What the client's process does: read a line, fetch, answer with a line."""
    from show_1 import hub
    from show_1.cascade import Cascade
    from show_1.errors import Show1Error

    hub.WAITS = tuple(wait / 20 for wait in hub.WAITS)  # the tests are in a hurry
    for line in sys.stdin:
        file, changes, options = json.loads(line)
        reports = []
        try:
            folders = hub.fetch(
                Cascade.load(file).override(changes),
                report=lambda p, reports=reports: reports.append([p.done, p.total, p.speed, p.left]),
                **options,
            )
            answer = {"folders": {table: str(folder) for table, folder in folders.items()}, "reports": reports}
        except Show1Error as error:
            answer = {"problem": error.problem, "remedy": error.remedy}
        except Exception as error:  # for the test that asked
            answer = {"traceback": repr(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve_fetches()
