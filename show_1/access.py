"""Who we are at the hub, and which models that lets us have; where it does not, which page to open and what to click.

What the hub answers, and in which words, is told in https://huggingface.co/docs/hub/models-gated and was read from its
answers; where its words change, the sentences here become less exact, not wrong.
"""

import contextlib
import math
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from json import JSONDecodeError
from typing import TypeVar

from httpx2 import RequestError, TimeoutException, UnsupportedProtocol
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from show_1.errors import Show1Error, first_line

SITE = "https://huggingface.co"
TOKENS = f"{SITE}/settings/tokens"
PATIENCE = 6  # seconds; huggingface_hub itself sets no limit to these questions, nor can it to a silent name server
T = TypeVar("T")


@dataclass(frozen=True)
class Account:
    """Whose token it is, and whether it may read gated models: not every fine-grained token may."""

    name: str
    reads_gated: bool


def check_form(token: str) -> str:
    """Return the token without space around it; raise Show1Error, which does not show it, if it cannot be one."""
    token = token.strip()
    remedy = f"Copy it whole, in one piece, from {TOKENS}."
    if len(token.split()) > 1:
        raise Show1Error("The token has a line break or a space in it.", remedy)
    if not re.fullmatch(r"hf_[\w.-]+", token, re.ASCII):  # those of a log-in by the browser have dots and hyphens
        raise Show1Error('This is no Hugging Face token: one begins with "hf_", then come letters and digits.', remedy)
    return token


def account(token: str) -> Account:
    """Return whose token this is; raise Show1Error if the hub does not accept it or does not answer."""
    try:
        user = in_time(lambda: HfApi().whoami(token))
        grants = (user.get("auth") or {}).get("accessToken") or {}
        fine_grained = grants.get("fineGrained") or {}
        reads_gated = grants.get("role") != "fineGrained" or bool(fine_grained.get("canReadGatedRepos"))
        return Account(user["name"], reads_gated)
    except Exception as error:
        raise explain(error, "the account of the token") from error


def check_model(repository: str, token: str | None, account: Account | None = None) -> None:
    """Raise Show1Error, with the page to open and what to click there, if this token cannot have the model.

    Where the `account` of the token is known, so is whether the token itself is what is missing.
    """
    try:
        in_time(lambda: HfApi().auth_check(repository, token=token or False))
    except Exception as error:
        reads_gated = account is None or account.reads_gated
        raise explain(error, f"the model {repository}", repository, reads_gated=reads_gated) from error


def explain(error: Exception, what: str, repository: str = "", *, reads_gated: bool = True) -> Show1Error:
    """Return what an error of huggingface_hub means: `what` could not be had, for example "the model a/b".

    `reads_gated` is false where the token is known to have no right to gated models.
    """
    subject = what[0].upper() + what[1:]
    page = f"{SITE}/{repository}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = (getattr(error, "server_message", None) or "") if status else ""
    words = said.lower()
    if isinstance(error, Show1Error):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return Show1Error(
            f"The hub is not to be asked for {what}: HF_HUB_OFFLINE is set.", "Unset it, and start this again."
        )
    if status == 403 and ("fine-grained" in words or (isinstance(error, GatedRepoError) and not reads_gated)):
        return Show1Error(
            f"{subject} is gated, and the token has no right to read gated models.",
            f"Open {TOKENS}, edit the token, tick “Read access to contents of all public gated repos you can access”, "
            f"and save it; if you have not yet, open {page} too and accept its licence.",
        )
    if isinstance(error, GatedRepoError):
        return _explain_gate(subject, page, status, words)
    if isinstance(error, RevisionNotFoundError):
        return Show1Error(f"{subject} has no such revision at the hub.", "Correct the table's `revision`.")
    of_token = status == 401 and ("token" in words or "credentials" in words)  # which may come as no such repository
    at_api = status == 404 and error.response.url.path.startswith("/api/")
    if (isinstance(error, RepositoryNotFoundError | HFValidationError) or at_api) and not of_token:
        return Show1Error(
            f"The hub does not have {what}, or it is private; nor is it a folder here.",
            "Correct the table's `model`, or log in with an account that may see it: python login.py.",
        )
    if status == 401:
        why = "it has expired" if "expired" in words else "it is wrong, expired or revoked"
        return Show1Error(
            f"The hub does not accept the token (401): {why}.",
            f"Make a new one at {TOKENS}, then log in again: python login.py.",
        )
    if status == 403:
        because = ": " + said.splitlines()[0].rstrip(".") if said else ""
        return Show1Error(
            f"The hub refuses to give {what} (403){because}.",
            f"Open {page} as the account of the token, and see what it says." if repository else f"Look at {TOKENS}.",
        )
    if status == 429:
        return Show1Error(
            f"The hub has had too many requests from here (429) and does not give {what} now.",
            f"Wait {_shown(retry_after(error))}, log in if you are not (python login.py), and start again: what has "
            "come is kept.",
        )
    if status == 404:
        return Show1Error(
            f"The hub lists a file of {what} that it does not have (404): {error.response.url.path}.",
            "Name another `revision` or `model` for that table, or tell the model's authors.",
        )
    if status and status >= 500:
        return Show1Error(
            f"The hub fails ({status}) when asked for {what}.",
            "Start again in some minutes: what has come is kept.",
        )
    if isinstance(error, UnsupportedProtocol):
        return Show1Error(
            f"The hub's address is none: {constants.ENDPOINT or 'it is empty'}.",
            "Correct HF_ENDPOINT, which begins with https://, or unset it.",
        )
    if status is None and isinstance(error, RequestError | TimeoutError):
        silent = isinstance(error, TimeoutException | TimeoutError)
        why = "it does not answer" if silent else re.sub(r"^\[.*?\] *", "", first_line(error))
        return Show1Error(
            f"The hub cannot be reached for {what}: {why[:1].lower()}{why[1:]}.",
            "Connect to the internet and start again (what has come is kept), or choose a cascade that is here: "
            "--cascade mini.",
        )
    # JSON that is none, or of another kind:
    if isinstance(error, JSONDecodeError | UnicodeDecodeError | KeyError | TypeError | AttributeError):
        return Show1Error(
            f"The hub's answer about {what} cannot be understood.",
            "A proxy or a log-in page may stand in between: open a page of the hub in a browser, and try again.",
        )
    return Show1Error(f"Fetching {what} failed: {first_line(error)}.", "Try again: what has come is kept.")


def _explain_gate(subject: str, page: str, status: int, words: str) -> Show1Error:
    """Return what a gated model's answer, in lower case, means."""
    if status == 401:
        return Show1Error(
            f"{subject} is gated, and nobody is logged in here.",
            f"Open {page}, accept its licence by “Agree and access repository”, then log in: python login.py.",
        )
    if "awaiting" in words:
        return Show1Error(
            f"{subject} is gated, and your request for it waits for its authors.",
            f"Wait for their answer; {SITE}/settings/gated-repos shows how it stands.",
        )
    if "rejected" in words:
        return Show1Error(
            f"{subject} is gated, and its authors have declined your request.",
            f"Ask them on {page}/discussions, or name another model in the cascade.",
        )
    return Show1Error(
        f"{subject} is gated, and your account has not asked for it yet.",
        f"Open {page} as the account of the token, and accept its licence by “Agree and access repository”.",
    )


def retry_after(error: Exception) -> int | None:
    """Return the seconds that a busy hub asks to wait, where it says so."""
    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    after, limit = headers.get("Retry-After", ""), parse_ratelimit_headers(headers)
    if after.isdigit():
        return int(after)
    with contextlib.suppress(ValueError):  # it may be a date as well
        return max(0, math.ceil(parsedate_to_datetime(after).timestamp() - time.time()))
    return limit.reset_in_seconds if limit and limit.remaining == 0 else None


def _shown(seconds: int | None) -> str:
    if seconds is None:
        return "some minutes"
    return f"{seconds} seconds" if seconds < 120 else f"{-(-seconds // 60)} minutes"


def kept_token() -> str | None:
    """Return the token that huggingface_hub keeps, or None; raise Show1Error where its file cannot be read."""
    try:
        return get_token()
    except (OSError, UnicodeDecodeError) as error:
        raise Show1Error(
            f"The token cannot be read from {constants.HF_TOKEN_PATH}: {first_line(error)}.",
            "Remove that, or make it yours; or put a token into HF_TOKEN.",
        ) from error


def in_background(ask: Callable[[], T]) -> Future[T]:
    """Return what will hold what `ask` returns or raises; Python does not wait for it at its end, as it does a pool."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer


def in_time(ask: Callable[[], T], patience: float = PATIENCE) -> T:
    """Return what `ask` returns, in so many seconds; raise what it raises, or TimeoutError."""
    return in_background(ask).result(timeout=patience)
