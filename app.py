"""The page: type a prompt, watch the stages, get a video. `python app.py --help` lists the launch flags."""

import argparse
import errno
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse, urlunparse

from show_1 import hosts, versions

versions.require()  # first, as the imports below fail where something is too old
hosts.prepare()
from show_1 import errors

errors.tell_plainly()
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page asks nothing of the outside

import filelock
import gradio as gr
from gradio import networking

from show_1 import Cascade, Show1Error
from show_1.device import check_device, load_cascade
from show_1.errors import exit_code, first_line
from show_1.jobs import Jobs
from show_1.page import STYLE, build
from show_1.placement import device_memory, keep_freed_memory, parse_memory
from show_1.video import check_writable


def main() -> int:
    arguments = _parser().parse_args()
    return exit_code(lambda: _serve(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Open the Show-1 page.")
    parser.add_argument(
        "--cascade",
        metavar="NAME|FILE",
        help=f"{', '.join(Cascade.names())}, or a TOML file; default: show-1 on a CUDA GPU, else mini",
    )
    parser.add_argument("--device", help="cuda, cpu, mps, ...; default: cuda where there is one")
    parser.add_argument("--memory", metavar="12GB", help="how much of the GPU's memory to use; default: what is free")
    parser.add_argument(
        "--share",
        action=argparse.BooleanOptionalAction,
        default=hosts.detect().rented,
        help="make a public link; default: only on Paperspace, Colab and Kaggle",
    )
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="let in only who knows these")
    parser.add_argument("--server-name", default="127.0.0.1", help="0.0.0.0 lets other computers in")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--queue-size", type=int, default=12, help="how many videos may wait; default: 12")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=hosts.detect().outputs,
        help="where the videos are kept; default: %(default)s",
    )
    parser.add_argument("--models", metavar="DIR", type=Path, help="take hub models from DIR/owner/name")
    parser.add_argument("--offline", action="store_true", help="ask no network: what was fetched before must do")
    parser.add_argument("--mcp", action="store_true", help="also be a tool for assistants, by MCP; not with --auth")
    return parser


def _serve(arguments: argparse.Namespace) -> None:
    """Open the page, load the models behind it, serve until Ctrl-C."""
    device = check_device(arguments.device)
    if device.type == "cpu":
        keep_freed_memory()  # before there are the threads that make videos
    if arguments.memory is not None:
        parse_memory(arguments.memory, device_memory(device)[1])
    cascade = load_cascade(arguments.cascade, device)
    outputs = Path(os.path.realpath(arguments.output_dir))  # where resolve() would raise for a link to itself
    try:
        outputs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Show1Error(
            f"The output folder {outputs} cannot be made: {error.strerror}.", "Choose another with --output-dir."
        ) from None
    check_writable(outputs / "video.mp4")
    _check_address(arguments.server_name, arguments.port)
    if arguments.queue_size < 1:
        raise Show1Error(f"The queue size cannot be {arguments.queue_size}.", "Give --queue-size a number from 1 on.")

    auth = _auth(arguments.auth)
    if auth and arguments.mcp:
        raise Show1Error("--mcp does not go with --auth: assistants cannot log in.", "Leave one of them out.")
    notes: list[str] = []
    lock = _lock(outputs)  # kept until the end
    jobs = Jobs(cascade, device, outputs, arguments.queue_size, arguments.memory, arguments.models, arguments.offline)
    page = build(jobs, notes)
    gr.set_static_paths([outputs / "jobs"])  # what is served, and not copied; nothing else that the folder may hold
    _launch(
        page,
        share=False,  # see `_tunnel`
        auth=auth,
        server_name=f"[{host}]" if ":" in (host := arguments.server_name.strip("[]")) else host,
        server_port=arguments.port or None,
        max_file_size="100mb",
        max_threads=40 + arguments.queue_size,  # a program that waits holds one of Gradio's 40
        run_history=False,  # the gallery is ours, and one visitor's
        mcp_server=arguments.mcp,
        footer_links=["api"],
        prevent_thread_lock=True,
        **STYLE,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what stops a service ends it as Ctrl-C does
    try:
        jobs.start(head_start=3)  # not before: loading would keep the page from answering
        if arguments.share and not _tunnel(page):  # which may take a minute
            notes.append(
                "<strong>There is no public link: the tunnel could not be made.</strong> The page works at "
                f"{page.local_url} on the computer that runs it; for others, start it with "
                "<code>--server-name 0.0.0.0</code>, or forward the port."
            )
        page.block_thread()  # until Ctrl-C
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # one is enough
        jobs.close(patience=5)
        with suppress(OSError):  # nobody may read it any more
            sys.stdout.flush()
        with suppress(OSError):
            lock.release()
        # With a video still in work, an orderly end of Python would make torch abort.
        os._exit(0)


def _launch(page: gr.Blocks, **settings: Any) -> None:
    try:
        page.launch(**settings)
    except OSError as error:
        raise Show1Error(
            f"The page cannot be opened: {first_line(error)}.", "Choose another --port or --server-name."
        ) from error
    except Exception as error:  # Gradio asks its own page, and whatever it asks with may raise
        raise Show1Error(
            f"The page does not answer on this computer: {first_line(error)}.",
            "Set NO_PROXY=127.0.0.1 if there is a proxy, or try again when the computer is less busy.",
        ) from error


def _tunnel(page: gr.Blocks) -> str | None:
    """Return a public address of the page, None where none can be had; the terminal is told.

    `launch(share=True)` would make one, but its page then loads its script from another server (Gradio 6.31).
    """
    try:
        address = networking.setup_tunnel(
            local_host=page.server_name,
            local_port=page.server_port,
            share_token=page.share_token,
            share_server_address=page.share_server_address,
            share_server_tls_certificate=page.share_server_tls_certificate,
        )
    except Exception as error:  # of the network, or of the program that is fetched for it
        print(f"* There is no public link: {first_line(error)}.", flush=True)
        return None
    address = urlunparse((page.share_server_protocol, *urlparse(address)[1:]))
    print(f"* Running on public URL: {address}", flush=True)
    return address


def _lock(outputs: Path) -> filelock.BaseFileLock:
    """Have the folder for this server alone: two would take each other's jobs for those of a former run."""
    # The one before may be closing yet.
    lock = filelock.FileLock(outputs / ".lock", timeout=8, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise Show1Error(
            f"Another server works in the output folder {outputs}.", "Stop that, or choose another --output-dir."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # some network folders know no locks
            raise Show1Error(
                f"{lock.lock_file} cannot be locked: {error.strerror}.", "Remove it, or choose another --output-dir."
            ) from None
    return lock


def _auth(pair: str | None) -> tuple[str, str] | None:
    if pair is None:
        return None
    user, colon, password = pair.partition(":")
    if not (user and colon and password):
        raise Show1Error("The value of --auth is no user with a password.", "Write it as --auth USER:PASSWORD.")
    return user, password


def _check_address(name: str, port: int | None) -> None:
    """Ask the system, as Gradio tells a wrong name and a port in use by the same words, after minutes."""
    host = name.strip("[]")
    try:
        socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", error)).partition(" (")[0].rstrip(".")
        raise Show1Error(
            f"The page cannot be opened at {name}{f':{port}' if port else ''}: {reason}.",
            "Choose another --port or --server-name.",
        ) from None


if __name__ == "__main__":
    sys.exit(main())
