"""The same jobs for programs: gradio_client, plain HTTP, and assistants by MCP."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, ClassVar

import gradio as gr
from gradio import processing_utils
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from show_1.cascade import STAGES
from show_1.jobs import CANCELLED, FAILED, Jobs
from show_1.page import form, views

ARGUMENTS = 4  # prompt, seed, settings, preset
# Our videos are. Gradio would ask an ffprobe, and fail where there is an ffmpeg without one.
processing_utils.video_is_playable = lambda path: True


class Assistants:
    """Middleware that knows the requests of assistants that are still open, by a name that it gives to each.

    Gradio answers them by calling itself, hands their headers on, and does not end its call when they hang up (6.31).
    Their addresses go with them, too.
    """

    waiting: ClassVar[set[str]] = set()

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") not in ("/gradio_api/mcp", "/gradio_api/mcp/http"):
            await self.app(scope, receive, send)
            return
        name = secrets.token_urlsafe(16)
        self.waiting.add(name)
        headers = [pair for pair in scope["headers"] if pair[0] != b"x-forwarded-for"]
        headers += [(b"x-assistant", name.encode()), (b"x-forwarded-for", scope["client"][0].encode())]
        try:
            await self.app(scope | {"headers": headers}, receive, send)
        finally:
            self.waiting.discard(name)


class ByPosition:
    """Middleware that lets calls of Gradio's older kind, {"data": [prompt, …]}, leave out what may be left out."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        called = scope["type"], scope.get("method"), scope.get("path", "").rstrip("/")
        if called != ("http", "POST", "/gradio_api/call/show-1"):
            await self.app(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        with suppress(ValueError, KeyError, TypeError, RecursionError):  # what is none of these calls, Gradio refuses
            asked = json.loads(body)
            asked["data"] += [None] * (ARGUMENTS - len(asked["data"]))
            body = json.dumps(asked).encode()
        whole = [{"type": "http.request", "body": body}]

        async def given() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, given, send)


async def refuse(request: Request, error: TypeError) -> JSONResponse:
    """Tell a call by HTTP what is wrong with its arguments: Gradio raises that, and answers nothing (6.31)."""
    if request.url.path.rstrip("/") != "/gradio_api/call/v2/show-1":
        raise error
    told = 'The call has no "prompt", or an argument of another name. Give "prompt" and, as you like, '
    return JSONResponse({"detail": told + '"seed", "settings" and "preset".'}, 422)


def add_endpoint(jobs: Jobs) -> None:
    """Let programs make videos, through the same queue; to be called inside the page's Blocks."""

    async def show_1(
        request: gr.Request,
        prompt: str,
        seed: str | None = None,
        settings: dict[str, Any] | None = None,
        preset: str | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (Gradio wants it so)
    ) -> AsyncIterator[tuple]:
        """Make a silent three-second video (MP4) from a text prompt, with the Show-1 text-to-video cascade.

        It takes from seconds to several minutes, depending on the computer, and tells its progress meanwhile. Returns
        the video, the seed, the settings that made it, and a status.

        Args:
            prompt: What the video should show, in English; best one subject, motion and place: "a panda in the snow".
            seed: A whole number from 0 on, for the same video again; leave it out for a new one each time.
            settings: Changes to stages, such as {"keyframes": {"steps": 20}}; the stages are STAGES.
            preset: Which settings to start from: PRESETS. Leave it out for the first.
        """
        visitor, job = secrets.token_urlsafe(24), None
        assistant = request.headers.get("x-assistant")
        try:
            with form.errors_as_toasts(escaped=False):
                asked = prompt, form.seed(seed), settings, None if preset == "" else preset
                made = asyncio.ensure_future(
                    asyncio.to_thread(jobs.submit, visitor, *asked, caller=request.client.host)
                )
                try:
                    job = await asyncio.shield(made)
                except asyncio.CancelledError:  # the thread goes on: it ends with a job that nobody wants
                    made.add_done_callback(lambda made: made.exception() or jobs.cancel(visitor, made.result()))
                    raise
            changed = told_at = None
            while not job.ended:
                if assistant and assistant not in Assistants.waiting:
                    return
                now = asyncio.get_running_loop().time()
                if changed != job.changed or now - told_at >= 1:  # the time runs on between two steps too
                    changed, told_at = job.changed, now
                    status = views.report(jobs, job)
                    progress((round(100 * status["share"]), 100), desc=status["text"], unit="%")
                    yield None, str(job.seed), None, status
                await asyncio.sleep(0.1)
            if job.state in (FAILED, CANCELLED):
                raise gr.Error(job.fault or "It was cancelled.", print_exception=False)
            yield str(jobs.result(job)), str(job.seed), job.settings, views.report(jobs, job)
        finally:
            if job and not job.ended:
                jobs.cancel(visitor, job)  # who asked has gone: nobody else could fetch it

    for word, names in (("PRESETS", jobs.presets), ("STAGES", STAGES)):  # an argument's description is one line
        show_1.__doc__ = show_1.__doc__.replace(word, ", ".join(names))
    # Assistants are held to these by MCP, where many send null for what they leave out; Gradio's for JSON is no schema.
    prompt, seed, preset = (gr.Textbox(label=label, visible=False) for label in ("Prompt", "Seed", "Preset"))
    changes = gr.JSON(label="Settings", visible=False)
    for given, kinds in ((seed, ("string", "integer")), (changes, ("object",)), (preset, ("string",))):
        schema = {"anyOf": [{"type": kind} for kind in (*kinds, "null")]}
        given.api_info = lambda schema=schema: schema
    for text in (prompt, seed, preset):
        text.preprocess = lambda given: given  # Gradio would make a text of a list, and a prompt of that
    gr.Button(visible=False).click(
        show_1,
        [prompt, seed, changes, preset],
        [
            gr.Video(label="Video", visible=False),
            gr.Textbox(label="Seed", visible=False),
            gr.JSON(label="Settings", visible=False),
            gr.JSON(label="Status", visible=False),
        ],
        api_name="show-1",
        concurrency_limit=None,
    )
