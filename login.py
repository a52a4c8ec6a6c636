"""Log in to Hugging Face, and say of each model whether it can be had: `python login.py --help`.

The token is taken from --token, else from HF_TOKEN, else asked for without being shown; huggingface_hub keeps it.
"""

import argparse
import getpass
import os
import sys
import warnings

from show_1 import hosts, versions

versions.require()  # first, as the imports below fail where something is too old
hosts.prepare()
from show_1 import errors

errors.tell_plainly()

import huggingface_hub
import psutil
from httpx2 import RequestError
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from show_1 import access
from show_1.cascade import STAGES, Cascade
from show_1.errors import Show1Error, exit_code, first_line


def main() -> int:
    parser = argparse.ArgumentParser(description="Log in to Hugging Face; say which models can be had.")
    parser.add_argument("--token", help="better leave it out and be asked, or set HF_TOKEN: here it can be seen")
    parser.add_argument("--check", action="store_true", help="save nothing, only say how things are")
    parser.add_argument("--cascade", metavar="NAME|FILE", default="show-1", help="whose models; default: show-1")
    arguments, others = parser.parse_known_args()
    if others:  # not to be shown: one may be the token
        parser.error("only these flags are known, and a token comes after --token")
    return exit_code(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    cascade = Cascade.load(arguments.cascade)
    token, account = _account(arguments)
    if not arguments.check:
        _save(token)
    print(f"{'The token is' if arguments.check else 'Logged in with the token'} of {account.name}.")
    return _report(cascade, token, account)


def _account(arguments: argparse.Namespace) -> tuple[str, access.Account]:
    """Return a token that the hub accepts, and whose it is."""
    given = arguments.token
    if given and given.strip().startswith("<"):
        given = None  # "<your_huggingface_token>", as the notebook has it before one is put there
    kept = access.kept_token() if not given else None
    if given or os.environ.get("HF_TOKEN"):
        token = access.check_form(given or os.environ["HF_TOKEN"])
    elif kept and (arguments.check or not _can_ask()):
        token = kept
    else:
        token = access.check_form(_ask(kept is not None) or kept or "")
    return token, access.account(token)


def _can_ask() -> bool:
    """Whether somebody could answer a prompt: in a kernel, which asks by a field, or at a terminal."""
    if "ipykernel" in sys.modules:
        return True
    # In a notebook, `!` gives its program a terminal that nobody types into; Colab's shows a field instead.
    host = hosts.detect()
    in_notebook = host.in_notebook or any("ipykernel" in w for p in psutil.Process().parents() for w in _command(p))
    return bool(sys.stdin and sys.stdin.isatty()) and (not in_notebook or host.name == "Colab")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # another user's, or gone
        return []


def _ask(logged_in: bool) -> str:
    """Ask for the token without showing it; raise Show1Error where nobody could answer."""
    nobody = Show1Error(
        "No token was given, and there is no terminal to ask for one.",
        "Put it into the variable HF_TOKEN; or, in a notebook, run %run login.py in a cell, which asks for it.",
    )
    if not _can_ask():
        raise nobody
    print(f"Make a token of type “Read” at {access.TOKENS} and paste it here; it is not shown.")
    if logged_in:
        print("You are logged in already: press Enter alone to keep that token.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", getpass.GetPassWarning)  # else it would go on and show it
            return getpass.getpass("Token: ").strip()
    except EOFError:  # Ctrl-D
        raise KeyboardInterrupt from None
    except (getpass.GetPassWarning, RuntimeError) as error:  # RuntimeError: a notebook whose front end cannot ask
        raise nobody from error


def _save(token: str) -> None:
    try:
        access.in_time(lambda: huggingface_hub.login(token))  # it asks the hub once more
    except (HfHubHTTPError, RequestError, TimeoutError) as error:
        raise access.explain(error, "the account of the token") from error
    except ValueError as error:  # huggingface_hub keeps tokens by the names that they have at the hub
        raise Show1Error(
            f"The token cannot be saved under its name: {first_line(error)}.",
            f"Give it another name at {access.TOKENS}, or put it into HF_TOKEN each time.",
        ) from error
    except OSError as error:
        raise Show1Error(
            f"The token cannot be saved in {constants.HF_HOME}: {error.strerror or first_line(error)}.",
            "Set HF_HOME to a folder that can be written to, or put the token into HF_TOKEN each time.",
        ) from error


def _report(cascade: Cascade, token: str, account: access.Account) -> int:
    """Say of each model whether it can be had; return 0 if all can, else 2."""
    sources = (cascade.model_source(table) for table in STAGES)
    needed = dict.fromkeys(source for source in sources if isinstance(source, str))
    if not needed:
        print(f"{cascade.name} needs no model from the hub.")
    code = 0
    for repository in needed:
        try:
            access.check_model(repository, token, account)
            print(f"{repository}: can be had.")
        except Show1Error as error:
            print(f"{repository}: cannot be had. {error}")
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
