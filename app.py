"""The page: type a prompt, watch the stages, get a video. `python app.py --help` lists the launch flags."""

import argparse
import html
import logging
import os
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page asks nothing of the outside

import gradio as gr

from show_1 import Cascade, Show1Error, Show1Pipeline, Video
from show_1.pipeline import Event, Notice, StageStart, StepDone, check_device, check_request, default_cascade
from show_1.video import slug

STAGES = ("keyframes", "interpolation", "first_frame", "pixel_upscale", "latent_upscale")
SYSTEM_FONTS = ("system-ui", "sans-serif")  # Gradio's own theme would fetch one from the web
log = logging.getLogger("show-1")


def build(cascade: Cascade, device: str, pipeline: "Future[Show1Pipeline]", outputs: Path) -> gr.Blocks:
    """Return the page. `pipeline` may still be loading: who asks meanwhile waits and is told so."""

    def generate(prompt: str, seed: float | None) -> Iterator[tuple]:
        try:
            seed = None if seed in (None, "") else _whole_number(seed)
            out = outputs / f"{slug(prompt)}-{uuid.uuid4().hex[:12]}.mp4"
            check_request(prompt, seed, out)
            while not pipeline.done():
                yield gr.skip(), gr.skip(), _status("The models are loading", 0)
                time.sleep(0.5)
            messages, status = [], ""
            for event in pipeline.result().stream(prompt, seed=seed, path=out):
                if isinstance(event, Notice):
                    messages.append(event.message)
                elif isinstance(event, Video):
                    done = f"Done in {event.settings['seconds']} seconds"
                    yield str(out), event.settings["seed"], _status(done, 1, messages)
                elif status := _progress(event, messages) or status:
                    yield gr.skip(), gr.skip(), status
        except Show1Error as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
        except Exception as error:
            log.exception("a video failed")
            raise gr.Error(
                "Making this video failed; the server's log says why. Try again, or with other settings.",
                duration=None,
                print_exception=False,
            ) from error

    with gr.Blocks(title="Show-1: text to video") as page:
        gr.Markdown(
            "# Show-1: text to video\n"
            f"{html.escape(cascade.name)} on {device} · "
            "[paper](https://arxiv.org/abs/2309.15818) · [models](https://huggingface.co/showlab)"
        )
        with gr.Row():
            prompt = gr.Textbox(
                label="Prompt", placeholder="a panda jumping in the snow", max_lines=4, autofocus=True, scale=4
            )
            seed = gr.Number(
                label="Seed", info="Empty: a new one each time", value=None, precision=0, scale=1, min_width=140
            )
        submit = gr.Button("Make the video", variant="primary")
        status = gr.HTML(_status("Ready", 0), elem_id="status")
        video = gr.Video(label="Video", autoplay=True, loop=True, interactive=False, elem_id="video")
        used_seed = gr.Number(label="Seed of this video", precision=0, interactive=False, elem_id="used-seed")
        gr.on(
            [submit.click, prompt.submit],
            generate,
            inputs=[prompt, seed],
            outputs=[video, used_seed, status],
            api_name="show-1",
            show_progress="hidden",  # the status line says more than Gradio's overlay, which would hide the video
        )
    return page.queue(max_size=12, default_concurrency_limit=1)


def _whole_number(seed: float) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | float) or seed != int(seed):
        raise Show1Error(f"The seed cannot be {seed!r}.", "Give a whole number.")
    return int(seed)


def _progress(event: Event, messages: list[str]) -> str | None:
    match event:
        case StageStart(stage, steps):
            done = 0
        case StepDone(stage, done, steps):
            pass
        case _:
            return None
    number = STAGES.index(stage)
    text = f"Stage {number + 1} of {len(STAGES)}, {stage.replace('_', ' ')}: step {done} of {steps}"
    return _status(text, (number + done / steps) / len(STAGES), messages)


def _status(text: str, share: float, messages: list[str] = ()) -> str:
    lines = "".join(f"<p>{html.escape(message)}</p>" for message in messages)
    return (
        f'<div role="status">{html.escape(text)}</div>'
        f'<progress value="{share:.3f}" max="1" style="width: 100%" aria-label="Progress"></progress>{lines}'
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Open the Show-1 page.")
    parser.add_argument("--cascade", metavar="NAME|FILE", help=f"{', '.join(Cascade.names())}, or a TOML file")
    parser.add_argument("--device", help="cuda, cpu, mps, ...; default: cuda where there is one")
    parser.add_argument("--share", action=argparse.BooleanOptionalAction, default=False, help="make a public link")
    parser.add_argument("--server-name", default="127.0.0.1", help="0.0.0.0 lets other computers in")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="where the videos are kept")
    arguments = parser.parse_args()
    try:
        device = check_device(arguments.device)
        cascade = Cascade.load(arguments.cascade or default_cascade(device))
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
    except Show1Error as error:
        print(f"{error.problem}\n{error.remedy}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"The output folder {arguments.output_dir} cannot be made: {error.strerror}.", file=sys.stderr)
        print("Choose another with --output-dir.", file=sys.stderr)
        return 2
    pipeline = ThreadPoolExecutor(1).submit(Show1Pipeline.from_cascade, cascade, device)
    try:
        build(cascade, device.type, pipeline, arguments.output_dir.resolve()).launch(
            share=arguments.share,
            server_name=arguments.server_name,
            server_port=arguments.port,
            allowed_paths=[str(arguments.output_dir.resolve())],
            theme=gr.themes.Default(font=SYSTEM_FONTS, font_mono=("monospace",)),
        )
    except OSError as error:
        print(f"The page cannot be opened: {error}.\nChoose another port with --port.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
