"""The page: type a prompt, watch the stages, get a video. `python app.py --help` lists the launch flags."""

import argparse
import html
import json
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page asks nothing of the outside

import gradio as gr
from gradio import processing_utils

from show_1 import Cascade, Show1Error, Show1Pipeline, Video
from show_1.pipeline import MAX_SEED, Notice, StageStart, StepDone, check_device, check_request, default_cascade
from show_1.video import check_writable, slug

STAGES = ("keyframes", "interpolation", "first_frame", "pixel_upscale", "latent_upscale")
SYSTEM_FONTS = ("system-ui", "sans-serif")  # Gradio's own theme would fetch one from the web
STATUS = """
<div role="status">{{value.text}}</div>
<progress value="{{value.share}}" max="1" aria-label="Progress"></progress>
{{#each value.notices}}<p>{{this}}</p>{{/each}}
"""
STATUS_STYLE = """
progress { appearance: none; width: 100%; height: 8px; border: 0; border-radius: 4px; overflow: hidden; }
progress, progress::-webkit-progress-bar { background: var(--border-color-primary); }
progress::-webkit-progress-value { background: var(--color-accent); }
progress::-moz-progress-bar { background: var(--color-accent); }
"""
log = logging.getLogger("show-1")
# Our videos are. Gradio would ask an ffprobe, and fail where there is an ffmpeg without one.
processing_utils.video_is_playable = lambda path: True


def build(cascade: Cascade, device: str, pipeline: "Future[Show1Pipeline]", outputs: Path) -> gr.Blocks:
    """Return the page. `pipeline` may still be loading: who asks meanwhile waits and is told so."""

    def generate(prompt: str, seed: str | None = None) -> Iterator[tuple]:
        try:
            seed = _seed(seed)
            out = outputs / f"{slug(prompt or '')}-{uuid.uuid4().hex[:12]}.mp4"
            check_request(prompt or "", seed, out)
            while not pipeline.done():
                yield gr.skip(), gr.skip(), _status("The models are loading")
                time.sleep(0.5)
            notices = []
            for event in pipeline.result().stream(prompt, seed=seed, path=out):
                if isinstance(event, Notice):
                    notices.append(event.message)
                elif isinstance(event, Video):
                    done = f"Done in {event.settings['seconds']} seconds"
                    yield str(out), event.settings["seed"], _status(done, 1, notices)
                elif isinstance(event, StageStart):
                    began = time.monotonic()
                    yield gr.skip(), gr.skip(), _progress(event.stage, 0, event.steps, None, notices)
                elif isinstance(event, StepDone):
                    left = (time.monotonic() - began) / event.step * (event.steps - event.step)
                    yield gr.skip(), gr.skip(), _progress(event.stage, event.step, event.steps, left, notices)
        except Exception as error:
            yield gr.skip(), gr.skip(), _status("No video was made")  # rather than the stage it had come to
            if isinstance(error, Show1Error):
                message = str(error)
            else:
                log.exception("a video failed")
                message = "Making this video failed; the server's log says why. Try again, or with other settings."
            raise gr.Error(html.escape(message, quote=False), duration=None, print_exception=False) from error

    with gr.Blocks(title="Show-1: text to video") as page:
        gr.Markdown(
            "# Show-1: text to video\n"
            f"{html.escape(cascade.name)} on {device} · "
            "[paper](https://arxiv.org/abs/2309.15818) · [models](https://huggingface.co/showlab)"
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(
                    label="Prompt", placeholder="a panda jumping in the snow", max_lines=4, autofocus=True
                )
                # No gr.Number: it shows 0 where it has no value, and rounds.
                seed = gr.Textbox(label="Seed", placeholder="a new one each time", max_lines=1)
                submit = gr.Button("Make the video", variant="primary")
                status = gr.HTML(
                    _status("Ready"), html_template=STATUS, css_template=STATUS_STYLE, label="Status", elem_id="status"
                )
            with gr.Column(scale=3, min_width=320):
                video = gr.Video(label="Video", autoplay=True, loop=True, interactive=False, elem_id="video")
                used_seed = gr.Textbox(
                    label="Seed of this video", interactive=False, buttons=["copy"], elem_id="used-seed"
                )
        asked = [submit.click, prompt.submit, seed.submit]
        # At once and in the browser: in the queue `generate` has nothing to say yet.
        gr.on(asked, js=f"() => ({json.dumps(_status('In the queue'))})", outputs=status, api_visibility="private")
        gr.on(
            asked,
            generate,
            inputs=[prompt, seed],
            outputs=[video, used_seed, status],
            api_name="show-1",
            show_progress="hidden",  # the status line says more than Gradio's overlay, which would hide the video
        )
    return page.queue(max_size=12, default_concurrency_limit=1)


def _seed(text: str | None) -> int | None:
    try:
        return int(text) if text and text.strip() else None
    except ValueError:
        raise Show1Error(f"The seed cannot be {text!r}.", f"Give a whole number from 0 to {MAX_SEED}.") from None


def _progress(stage: str, done: int, steps: int, left: float | None, notices: list[str]) -> dict:
    """Say how far the stage is; `left` is the seconds to its end, once that can be told."""
    number = STAGES.index(stage)
    text = f"Stage {number + 1} of {len(STAGES)}, {stage.replace('_', ' ')}: step {done} of {steps}"
    if left is not None:
        text += f", {left:.0f} s left in this stage"
    return _status(text, (number + done / steps) / len(STAGES), notices)


def _status(text: str, share: float = 0, notices: Sequence[str] = ()) -> dict:
    """Return what the page draws by the template STATUS, and what callers of the endpoint read as it is."""
    return {"text": text, "share": round(share, 3), "notices": list(notices)}


def main() -> int:
    try:
        _serve(_parser().parse_args())
    except Show1Error as error:
        print(f"{error.problem}\n{error.remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Cancelled.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Open the Show-1 page.")
    parser.add_argument("--cascade", metavar="NAME|FILE", help=f"{', '.join(Cascade.names())}, or a TOML file")
    parser.add_argument("--device", help="cuda, cpu, mps, ...; default: cuda where there is one")
    parser.add_argument("--memory", metavar="12GB", help="how much of the GPU's memory to use; default: what is free")
    parser.add_argument("--share", action=argparse.BooleanOptionalAction, default=False, help="make a public link")
    parser.add_argument("--server-name", default="127.0.0.1", help="0.0.0.0 lets other computers in")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="where the videos are kept")
    return parser


def _serve(arguments: argparse.Namespace) -> None:
    """Open the page, load the models, serve until Ctrl-C."""
    device = check_device(arguments.device)
    cascade = Cascade.load(arguments.cascade or default_cascade(device))
    outputs = arguments.output_dir.resolve()
    try:
        outputs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Show1Error(
            f"The output folder {outputs} cannot be made: {error.strerror}.", "Choose another with --output-dir."
        ) from None
    check_writable(outputs / "video.mp4")
    _check_address(arguments.server_name, arguments.port)

    pipeline = Future()
    page = build(cascade, device.type, pipeline, outputs)
    page.launch(
        share=arguments.share,
        server_name=arguments.server_name,
        server_port=arguments.port,
        allowed_paths=[str(outputs)],
        theme=gr.themes.Default(font=SYSTEM_FONTS, font_mono=("monospace",)),
        prevent_thread_lock=True,
    )
    pipeline.set_result(Show1Pipeline.from_cascade(cascade, device, memory=arguments.memory))
    try:
        page.block_thread()  # until Ctrl-C
    finally:
        # With a video in work, an orderly end of Python would make torch abort.
        sys.stdout.flush()
        os._exit(0)


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
