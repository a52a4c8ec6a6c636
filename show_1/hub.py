"""Which files of a model repository a stage needs, and getting them: from a folder as it is, or from the hub.

huggingface_hub keeps the cache, the token and the connection. The fetching itself is ours (`_download`): in version 2.4
`hf_hub_download` begins a file again from nothing when the program was ended, by HTTP as by Xet, as it keeps no parts;
it checks sizes but no hashes, and waits for as long as a busy hub asks it to, be it an hour. Our largest file has ten
gigabytes. What we fetch lies where `hf_hub_download` would have put it, so every other program finds it:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import queue
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from httpx2 import ConnectError, RemoteProtocolError, TimeoutException, TransportError, UnsupportedProtocol
from huggingface_hub import constants, get_session, hf_hub_url, is_offline_mode, model_info, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status

from show_1.access import PATIENCE, check_form, explain, in_background, in_time, kept_token, retry_after
from show_1.cascade import Cascade
from show_1.errors import Show1Error
from show_1.files import write_atomically

# The subfolders of a stage's repository that are used. T5 is taken once, from the keyframes; the others' copies of it,
# feature extractors, safety checkers and watermarkers are left on the hub.
COMPONENTS = {
    "keyframes": ("tokenizer", "text_encoder", "unet", "scheduler"),
    "interpolation": ("unet", "scheduler"),
    "first_frame": ("unet", "scheduler", "image_noising_scheduler"),
    "pixel_upscale": ("unet", "scheduler", "image_noising_scheduler"),
    "latent_upscale": ("tokenizer", "text_encoder", "vae", "unet", "scheduler"),
}
MODELS = ("text_encoder", "unet", "vae")  # the components that have weights

# diffusers and transformers put the variant before or behind the shard's number, and an index beside the shards.
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<variant>[\w]+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<late_variant>fp16|bf16|fp32))?"
    r"\.(?P<format>safetensors|bin)(?:\.index(?:\.(?P<index_variant>\w+))?\.json)?"
)
WEIGHT_FILE = "a weight file (*.safetensors or *.bin)"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
SMALL_FILES = (".json", ".txt", ".model")  # configurations and tokenizers
AT_ONCE = 4  # files; more would not be faster where the line is the limit
SMALL = 10**6  # bytes; see `_fetch_files`
WAITS = (1, 2, 4, 8)  # seconds before each new try, where nothing has come since the last one
LONGEST_WAIT = 60  # seconds that a busy hub may ask for
COMMIT = re.compile("[0-9a-f]{40}")
T = TypeVar("T")


@dataclass(frozen=True)
class WeightFiles:
    """One set of weight files of one component: what they are called, and in which form they are."""

    variant: str | None
    format: str  # "safetensors" or "bin"
    names: tuple[str, ...]


def choose_weights(names: Iterable[str], variant: str | None) -> WeightFiles | None:
    """Return the set to take of a component's files: the variant where there is one, safetensors before .bin."""
    sets: dict[tuple[str | None, str], list[str]] = {}
    for name in sorted(names):
        if match := WEIGHTS.fullmatch(name):
            found = match["variant"] or match["late_variant"] or match["index_variant"]
            sets.setdefault((found, match["format"]), []).append(name)
    for choice in ((variant, "safetensors"), (variant, "bin"), (None, "safetensors"), (None, "bin")):
        if choice in sets:
            return WeightFiles(*choice, tuple(sets[choice]))
    return None


def needed_files(files: Iterable[str], table: str, variant: str | None) -> list[str]:
    """Return those of a repository's files, by their paths in it, that the stage of a cascade's table reads."""
    files, needed = list(files), []
    for component in COMPONENTS[table]:
        inside = [file.removeprefix(f"{component}/") for file in files if file.startswith(f"{component}/")]
        weights = choose_weights(inside, variant) if component in MODELS else None
        wanted = [n for n in inside if n.endswith(SMALL_FILES) and not WEIGHTS.fullmatch(n) and "/" not in n]
        needed += [f"{component}/{name}" for name in (*wanted, *(weights.names if weights else ()))]
    return needed


@dataclass(frozen=True)
class Progress:
    """How far fetching is, all files together: bytes here and in all, bytes a second, seconds left once known."""

    done: int
    total: int
    speed: float
    left: float | None


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class File:
    """A file of a repository at the hub: its path there, its size in bytes, its SHA-256 (or git's SHA-1)."""

    repository: str
    commit: str
    path: str
    size: int
    digest: str

    @property
    def link(self) -> Path:
        """Where the stages read it, and all programs that use the cache; it is there when all of it is."""
        return _cache(self.repository) / "snapshots" / self.commit / self.path

    @property
    def blob(self) -> Path:
        """Where its content is in the cache, once it is whole."""
        return _cache(self.repository) / "blobs" / self.digest

    @property
    def part(self) -> Path:
        return self.blob.with_name(f"{self.digest}.incomplete")

    @property
    def missing(self) -> int:
        """How many bytes are not here yet."""
        if self.link.exists() or self.blob.exists():
            return 0
        return max(self.size - self.part.stat().st_size, 0) if self.part.exists() else self.size


@dataclass(frozen=True)
class Model:
    """The model of one table: its folder, and what has to be fetched from the hub before it is complete.

    `commit` is the one that the hub says is meant, where it was asked.
    """

    table: str
    folder: Path
    size: int  # bytes, of all that the table needs
    files: tuple[File, ...] = ()
    commit: str | None = None


def fetch(
    cascade: Cascade, *, models: str | Path | None = None, offline: bool = False, report: Report | None = None
) -> dict[str, Path]:
    """Return the folder of each table's model, all that it needs in it, after fetching what is not here.

    Models that the cascade names by a hub id are taken from `models`/owner/name where that is given, else from
    huggingface_hub's cache, and from the hub if they are not there yet; `offline` leaves the hub out. `report` is
    called about four times a second while files are fetched, in the calling thread; an exception in it ends that.
    What is complete, and the beginnings of files, are kept for the next time.

    Raises Show1Error, naming the table and the file or the repository, where something is missing or out of reach.
    """
    found = _find_all(cascade, models, offline)
    tables = {file: model.table for model in found for file in model.files}
    if tables:
        _check_room(sum(file.missing for file in tables))
        _fetch_files(tables, report)
    for model in found:
        check_complete(model.folder, model.table, variant(cascade, model.table))
        if model.commit:
            _note_commit(cascade.model_source(model.table), getattr(cascade, model.table).revision, model.commit)
    return {model.table: model.folder for model in found}


def _find_all(cascade: Cascade, models: str | Path | None, offline: bool) -> list[Model]:
    """Return where the model of each table is; asked all at once, as where the hub is silent, each waits."""
    look = functools.partial(find, cascade, models=models, offline=offline)
    looks = [in_background(functools.partial(look, table)) for table in COMPONENTS]
    return [each.result() for each in looks]


def find(
    cascade: Cascade, table: str, *, models: str | Path | None = None, offline: bool = False, patient: bool = True
) -> Model:
    """Return where the model of a table is, and what has to be fetched; asks the hub at most, and fetches nothing.

    Unless `patient`, it asks only once. Raises Show1Error as `fetch` does.
    """
    source, revision, weights = cascade.model_source(table), getattr(cascade, table).revision, variant(cascade, table)
    if isinstance(source, str) and models is not None:
        source = Path(models) / source
        if not os.path.isdir(source):  # where Path would raise for names that cannot be
            raise Show1Error(
                f"The model of [{table}] is not in the folder of models: there is no {source}.",
                "Put the repository's files there, or leave out --models to fetch them.",
            )
    if isinstance(source, Path):
        check_complete(source, table, weights)
        return Model(table, source, _size(source, table, weights))
    what, folder = f"the model {source} of [{table}]", cascade.file.parent / source
    if os.path.isdir(folder.parent):  # it may have been meant
        what += f" (there is no folder {folder})"
    here = _fetched_before(source, revision, table, weights)
    read_only = os.path.isdir(constants.HF_HUB_CACHE) and not os.access(constants.HF_HUB_CACHE, os.W_OK)
    fixed = COMMIT.fullmatch(revision or "")  # a commit cannot change: what is here is as good as what the hub has
    if here and (offline or is_offline_mode() or read_only or fixed):
        return here
    if offline or is_offline_mode():
        raise Show1Error(
            f"{what[0].upper()}{what[1:]} is not on this computer in full, and the hub is not to be asked "
            f"({'--offline' if offline else 'HF_HUB_OFFLINE'}).",
            "Leave that out once, with a connection, to fetch it, or choose a cascade that is here: --cascade mini.",
        )
    try:
        token = kept_token()  # which the question to the hub takes with it
        if token and not re.fullmatch("[!-~]+", token):  # what complains of one that cannot be sent shows it
            check_form(token)
        return _at_hub(source, revision, table, weights, patient and not here)
    except Exception as error:
        if here:  # the hub is out of reach, or refuses
            return here
        raise _explained(error, what, source) from error


def weights_in(folder: Path, table: str, component: str, variant: str | None) -> WeightFiles:
    """Return a component's weight files, all of them there."""
    names = [file.name for file in (folder / component).iterdir() if os.path.isfile(file)]  # no link to nothing
    weights = choose_weights(names, variant)
    if weights is None:
        raise _missing(table, folder / component, WEIGHT_FILE)
    index = next((name for name in weights.names if name.endswith(".json")), None)
    if index is None and all(SHARD.search(name) for name in weights.names):
        raise _missing(table, folder / component, "the index of its shards (*.index.json)")
    if index is not None:
        for shard in sorted(_shards(folder / component / index, table) - set(names)):
            raise _missing(table, folder / component, shard)
    return weights


def _shards(index: Path, table: str) -> set[str]:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all(isinstance(shard, str) for shard in shards):
            raise TypeError("a file's name is a text")
        return shards
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Show1Error(
            f"A file of [{table}] is damaged or cut short: {index}.", "Remove it and fetch it again."
        ) from error


def variant(cascade: Cascade, table: str) -> str | None:
    """Return which variant of its weight files a table asks for."""
    return getattr(getattr(cascade, table), "variant", None)


def check_complete(folder: Path, table: str, variant: str | None) -> None:
    """Raise Show1Error, naming the table and the file, if a folder lacks something that the table needs."""
    _check_names(_inside(folder), table, variant, folder)
    for component in set(COMPONENTS[table]) & set(MODELS):
        weights_in(folder, table, component, variant)  # all shards, which only their index can tell


def _check_names(files: Collection[str], table: str, variant: str | None, where: Path | str) -> None:
    """Raise Show1Error if these files of a folder or repository, by their paths in it, lack something for the table."""
    for component in COMPONENTS[table]:
        names = {file.removeprefix(f"{component}/") for file in files if file.startswith(f"{component}/")}
        if component in MODELS:
            needed = ["config.json"]
        elif component.endswith("scheduler"):
            needed = ["scheduler_config.json"]
        else:
            needed = ["spiece.model"] if table == "keyframes" else ["vocab.json", "merges.txt"]
            needed = [] if "tokenizer.json" in names else needed
        for name in needed:
            if name not in names:
                raise _missing(table, f"{where}/{component}", name)
        if component in MODELS and not choose_weights(names, variant):
            raise _missing(table, f"{where}/{component}", WEIGHT_FILE)


def _missing(table: str, where: Path | str, what: str) -> Show1Error:
    return Show1Error(
        f"The model of [{table}] is incomplete: {where} lacks {what}.",
        "Put the missing part there, or set the table's `model` to a complete folder or a hub id.",
    )


def _inside(folder: Path) -> list[str]:
    return [f"{file.parent.name}/{file.name}" for file in folder.glob("*/*") if os.path.isfile(file)]  # follows links


def _size(folder: Path, table: str, variant: str | None) -> int:
    return sum((folder / name).stat().st_size for name in needed_files(_inside(folder), table, variant))


def _cache(repository: str) -> Path:
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"))


def _fetched_before(repository: str, revision: str | None, table: str, variant: str | None) -> Model | None:
    """Return the model as it is in the cache, if all that the table needs is there; asks no hub."""
    try:
        # Without patterns it would want the whole repository.
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[]))
        check_complete(folder, table, variant)
    except (LocalEntryNotFoundError, HFValidationError, Show1Error):
        return None  # of a name that cannot be, the hub's answer says more
    return Model(table, folder, _size(folder, table, variant))


def _at_hub(repository: str, revision: str | None, table: str, variant: str | None, patient: bool) -> Model:
    """Return the model as the hub lists it; raises Show1Error if the list lacks something that the table needs."""

    def ask():
        return in_time(lambda: model_info(repository, revision=revision, files_metadata=True, timeout=PATIENCE))

    info = _patiently(ask) if patient else ask()
    siblings = {file.rfilename: file for file in info.siblings or ()}
    _check_names(siblings, table, variant, repository)  # now, before gigabytes are fetched for nothing
    files = []
    for path in needed_files(siblings, table, variant):
        sibling = siblings[path]
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        files.append(File(repository, info.sha, path, sibling.size, digest))
    folder = _cache(repository) / "snapshots" / info.sha
    missing = tuple(file for file in files if not file.link.exists())
    return Model(table, folder, sum(file.size for file in files), missing, info.sha)


def _check_room(needed: int) -> None:
    """Make the cache's folder, and see that the disk it is on has this many bytes left."""
    cache = Path(constants.HF_HUB_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
    except OSError as error:
        raise _explained(error, "the models", "") from error
    if free < needed:
        raise Show1Error(
            f"The models still to fetch take {gigabytes(needed)}, and the disk of {cache} has {gigabytes(free)} left.",
            "Free some space there, or set HF_HUB_CACHE to a folder on a larger disk.",
        )


def gigabytes(size: float) -> str:
    """Return a number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"


class _Stopped(Exception):
    """The others have been told to end."""


class _Tally:
    """Counts the bytes of all files that are being fetched, from several threads."""

    def __init__(self, files: Iterable[File]):
        self._here = {file: file.size - file.missing for file in files}
        self.total = sum(file.size for file in self._here)
        self.stopped = False
        self._came = deque([(time.monotonic(), 0)], maxlen=40)  # of ten seconds, as reports come
        self._fetched = 0
        self._lock = threading.Lock()

    def set(self, file: File, here: int) -> None:
        with self._lock:
            self._here[file] = here

    def add(self, file: File, count: int) -> None:
        with self._lock:
            self._here[file] += count
            self._fetched += count
        if self.stopped:
            raise _Stopped

    def progress(self) -> Progress:
        with self._lock:
            done, now = sum(self._here.values()), time.monotonic()
            self._came.append((now, self._fetched))
            (since, before), after = self._came[0], self._fetched
        speed = (after - before) / max(now - since, 1e-3)
        return Progress(done, self.total, speed, (self.total - done) / speed if speed else None)


def _fetch_files(tables: dict[File, str], report: Report | None) -> None:
    """Bring all files into the cache, several at a time; the first that cannot be had ends it, naming its table."""
    tally, slots = _Tally(tables), threading.Semaphore(AT_ONCE)
    ended: queue.SimpleQueue = queue.SimpleQueue()

    def run(file: File) -> None:
        try:
            with slots:
                if not tally.stopped:
                    _fetch_file(file, tally)
            ended.put((file, None))
        except BaseException as error:
            ended.put((file, error))
            tally.stopped = True

    # Small ones first, so that a gate that is closed is met before gigabytes have come; then those that take longest.
    # Threads that Python does not wait for at its end: one may be waiting for a hub that has fallen silent.
    for file in sorted(tables, key=lambda file: (file.size > SMALL, -file.missing)):
        threading.Thread(target=run, args=(file,), daemon=True).start()
    try:
        left = len(tables)
        while left:
            try:
                file, error = ended.get(timeout=0.25)
            except queue.Empty:
                pass
            else:
                left -= 1
                if error is not None:
                    what = f"the model {file.repository} of [{tables[file]}]"
                    raise _explained(error, what, file.repository) from error
                if left:
                    continue
            if report is not None:
                report(tally.progress())
    finally:
        tally.stopped = True


def _fetch_file(file: File, tally: _Tally) -> None:
    """Bring a file into the cache, from where an earlier try has left off; its hash says whether it is good."""
    file.blob.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(constants.HF_HUB_CACHE, ".locks", _cache(file.repository).name, f"{file.digest}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # as huggingface_hub locks it
        for _ in range(2):
            if file.blob.exists() and _digest(file, file.blob) != file.digest:
                file.blob.unlink()  # damaged since it came
            if not file.blob.exists():
                _download(file, tally)
                if _digest(file, file.part) != file.digest:
                    file.part.unlink()
                    tally.set(file, 0)
                    continue
                os.replace(file.part, file.blob)
            _link(file)
            tally.set(file, file.size)
            return
    raise Show1Error(
        f"{file.path} of {file.repository} has arrived damaged twice: its content does not have the hash that the hub "
        "gives for it.",
        "Try again later, or over another connection; nothing of it is kept.",
    )


def _download(file: File, tally: _Tally) -> None:
    """Append what is missing to the part of a file that is here, however often the connection breaks."""
    with file.part.open("ab") as part:
        if part.tell() > file.size:
            part.truncate(0)
        tally.set(file, part.tell())

        def go_on() -> None:
            if part.tell() < file.size:
                _stream(file, part, tally)
            if part.tell() < file.size:
                raise RemoteProtocolError("the content ended early")

        _patiently(go_on, came=part.tell)
        part.flush()
        os.fsync(part.fileno())  # it is to be whole after a power cut too, once it bears its name


def _stream(file: File, part: BinaryIO, tally: _Tally) -> None:
    """Append to the part what one request brings."""
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # bytes are counted
    if part.tell():
        headers["Range"] = f"bytes={part.tell()}-"
    url = hf_hub_url(file.repository, file.path, revision=file.commit)
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        if part.tell() and response.status_code != 206:  # all of it, though not asked for
            part.seek(0)
            part.truncate()
            tally.set(file, 0)
        for piece in response.iter_bytes():
            part.write(piece)
            tally.add(file, len(piece))
            if part.tell() > file.size:
                return  # another file: its hash will say so


def _link(file: File) -> None:
    """Show a file's content under its name."""
    file.link.parent.mkdir(parents=True, exist_ok=True)
    file.link.unlink(missing_ok=True)  # a link to nothing
    try:
        file.link.symlink_to(os.path.relpath(file.blob, file.link.parent))
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.replace(file.blob, file.link)  # a disk without links, as huggingface_hub does there


def _note_commit(repository: str, revision: str | None, commit: str) -> None:
    """Have the cache know which commit a branch or tag is at, for when the hub cannot be asked."""
    ref = _cache(repository) / "refs" / (revision or constants.DEFAULT_REVISION)
    with contextlib.suppress(OSError):  # all else is here, beside notes that are another user's, or on a full disk
        if revision != commit and not (ref.is_file() and ref.read_text() == commit):
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(ref, commit.encode())


def _digest(file: File, place: Path) -> str:
    """Return the hash of what is there, of the kind that the hub gives: SHA-256, of small files git's SHA-1."""
    with place.open("rb") as content:
        if len(file.digest) == 64:
            return hashlib.file_digest(content, "sha256").hexdigest()
        return hashlib.sha1(b"blob %d\0" % file.size + content.read()).hexdigest()


def _patiently(ask: Callable[[], T], came: Callable[[], int] | None = None) -> T:
    """Return what `ask` returns, asked again where the hub is busy or fails for a moment, or the connection breaks.

    It is given up after as many tries as there are WAITS, counted from the last that brought something by `came`, the
    number of bytes that are here. A question, without `came`, that nobody answers is not repeated: there is no network.
    """
    tries, most = 0, came() if came else 0
    while True:
        try:
            return ask()
        except (HfHubHTTPError, TransportError) as error:
            if isinstance(error, UnsupportedProtocol) or (
                came is None and isinstance(error, ConnectError | TimeoutException)
            ):
                raise
            here = came() if came else 0
            tries = 1 if here > most else tries + 1  # what has come twice is no progress
            most = max(most, here)
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            asked = retry_after(error)
            if tries > len(WAITS) or (asked or 0) > LONGEST_WAIT or not (status in (None, 408, 429) or status >= 500):
                raise
            time.sleep(WAITS[tries - 1] if asked is None else asked)


def _explained(error: Exception, what: str, repository: str) -> Show1Error:
    """Return what an error means for people: those of the disk here, those of the hub there."""
    number = getattr(error, "errno", None)
    cache = constants.HF_HUB_CACHE
    if number in (errno.ENOSPC, errno.EDQUOT):
        return Show1Error(
            f"The disk of {cache} is full, and {what} is not here in full.",
            "Free some space there and start again, and it goes on; or set HF_HUB_CACHE to a folder on a larger disk.",
        )
    if isinstance(error, OSError) and number is not None:
        return Show1Error(
            f"{what[0].upper()}{what[1:]} cannot be kept in {cache}: {error.strerror}.",
            "Set HF_HUB_CACHE to a folder that can be written to.",
        )
    return explain(error, what, repository)
