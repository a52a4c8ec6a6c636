"""The page's layout and what its controls do."""

import asyncio
import time
import zlib
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from show_1.errors import Show1Error
from show_1.jobs import Job, Jobs
from show_1.page import form, views
from show_1.page.api import Assistants, ByPosition, add_endpoint, refuse
from show_1.page.frames import FewerFrames
from show_1.pipeline import draw_seed
from show_1.replay import differences, here, read

PAUSE = 1.0  # seconds after which a page that looks is answered, news or not; previews come sooner
FONTS = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # none from the web
CSS, SCRIPT = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
STYLE = {  # for `gr.Blocks.launch`
    "app_kwargs": {
        "middleware": [Middleware(FewerFrames), Middleware(Assistants), Middleware(ByPosition)],
        "exception_handlers": {TypeError: refuse},
    },
    "theme": gr.themes.Base(primary_hue="indigo", neutral_hue="zinc", **FONTS),
    # In the head, as Gradio would rewrite the selectors of what it takes as `css`.
    "head": f"<style>{CSS}</style><script>{SCRIPT}</script>",
}

# The address of the page says which job it shows. So a reload, the back button and another browser all find it.
WITH_JOB = "(job, visitor, ...others) => [show1.job(), show1.visitor(), ...others]"
JOB = "() => [show1.job()]"
GO_TO_JOB = "job => show1.goTo(job)"
ENTER_JOB = "job => show1.goTo(job, true)"


def build(jobs: Jobs, notes: list[str]) -> gr.Blocks:
    """Return the page; `notes` are sentences in HTML for its top, which may come later."""
    names = [(preset.name, name) for name, preset in jobs.presets.items()]
    default = names[0][1]

    def submit(id: str, visitor: str, prompt: str, seed: str, preset: str, *advanced: str) -> str:
        with form.errors_as_toasts():
            return jobs.submit(visitor, prompt or "", form.seed(seed), form.changes(advanced), preset).id

    def again(id: str, visitor: str) -> str:
        with form.errors_as_toasts():
            job = _known(jobs, id)
            return jobs.submit(visitor, job.prompt, None, job.changes, job.preset).id

    def again_with(id: str, visitor: str, preset: str) -> str:
        with form.errors_as_toasts():
            job = _known(jobs, id)
            return jobs.submit(visitor, job.prompt, job.seed, None, preset).id

    def cancel(id: str, visitor: str) -> None:
        with form.errors_as_toasts():
            jobs.cancel(visitor, _known(jobs, id))

    def stop(id: str, visitor: str) -> None:
        with form.errors_as_toasts():
            jobs.stop(visitor, _known(jobs, id))

    def reuse(id: str):
        with form.errors_as_toasts():
            job = _known(jobs, id)
            preset = job.preset if job.preset in jobs.presets else default
            return job.prompt, str(job.seed), preset, *form.texts(job.changes)

    def reuse_seed(id: str):
        with form.errors_as_toasts():
            return str(_known(jobs, id).seed)

    def choose(preset: str):
        """Show what a preset's settings are, and what can be asked of it."""
        cascade = jobs.presets[preset]
        return views.examples(cascade), *(gr.update(placeholder=text) for text in form.placeholders(cascade))

    def restore(file: str):
        """Bring the settings of a video of ours back into the form, and say whether it can be made again here."""
        try:
            settings = read(file)
            preset, changes, kept = form.fitting(jobs, settings)
        except Show1Error as error:  # told here: an event that fails marks all that it was to fill in as failed
            return None, *[gr.skip()] * (3 + len(fields)), views.line(str(error))
        engine = jobs.engine_for(preset)
        other = differences(settings, here(engine.device, engine.pipeline), kept)
        if other:
            line = f"The settings are back. Other frames are to be expected here: {'; '.join(other)}."
        else:
            line = "The settings are back, and the same frames can be expected here."
        if engine.pipeline is None:
            line += " (The weights could not be compared, as the models are not loaded.)"
        if stage := settings.get("stopped_after"):
            line += f" It was stopped after the {form.words(str(stage))}: stop there to get the same clip."
        return None, settings["prompt"], str(settings["seed"]), preset, *form.texts(changes), views.line(line)

    def enter(id: str, visitor: str) -> str:
        """Show the job that a visitor has at work, where the address names none."""
        at_work = [job.id for job in jobs.of(visitor) if not job.ended]
        return "" if id else (at_work or [""])[-1]

    async def look(asked: dict[str, Any]) -> dict[str, Any]:
        """Tell a page what of it has changed, when there is news of its job or after a while; page.js asks.

        It says by marks what it has of each part, and gets a mark with each part that is another now.
        """
        id, visitor, marks = str(asked["job"]), str(asked["visitor"]), dict(asked["marks"])
        job, started = jobs.get(id), time.monotonic()
        while asked["news"] == _news(id, job) and time.monotonic() - started < PAUSE:
            await asyncio.sleep(0.05)
        if job and not job.ended:
            jobs.watch(job)
        news = _news(id, job)  # first: what comes while the parts are written will be news
        # In a thread: it looks at files, and a disk that does not answer is not to keep everybody waiting.
        parts = await asyncio.to_thread(views.view, jobs, id, job, visitor)
        parts |= {"banner": "".join(f"<p>{note}</p>" for note in notes)}
        told = {part: (zlib.crc32(repr(content).encode()), content) for part, content in parts.items()}
        return {"news": news, "parts": {part: new for part, new in told.items() if str(new[0]) != marks.get(part)}}

    with gr.Blocks(title="Show-1: text to video", delete_cache=(86_400, 86_400)) as page:
        _html(views.header(jobs.engine.cascade, jobs.engine.device), elem_id="header")
        _part("banner", js_on_load="show1.begin(server)", server_functions=[look])
        _part("away")
        shown, visitor, new_job = (gr.Textbox(visible=False) for _ in range(3))  # the first two as WITH_JOB fills them
        with gr.Row(elem_id="main"):
            with gr.Column(scale=2, min_width=320, elem_id="form"):
                prompt = gr.Textbox(
                    label="Prompt",
                    placeholder="What should it show?",
                    max_lines=4,
                    autofocus=True,
                    elem_id="prompt",
                )
                submit_button = gr.Button("Make the video", variant="primary", size="lg")
                examples = _html(views.examples(jobs.engine.cascade), elem_id="examples")
                preset = gr.Radio(names, value=default, label="Preset", visible=len(names) > 1, elem_id="preset")
                with gr.Row(elem_id="seed"):
                    # No gr.Number: it shows 0 where it has no value, and rounds. And no buttons of the box itself: they
                    # would be part of its name for a screen reader.
                    seed = gr.Textbox(label="Seed", placeholder="New each time", max_lines=1, scale=3, min_width=100)
                    random_seed = gr.Button("Random", size="sm", scale=1, min_width=60)
                    same_seed = gr.Button("Reuse", size="sm", scale=1, min_width=60)
                with gr.Accordion("Advanced", open=False):
                    fields = form.fields()
                for box, text in zip(fields, form.placeholders(jobs.engine.cascade), strict=True):
                    box.placeholder = text
                with gr.Accordion("Settings from a video", open=False, elem_id="restore"):
                    dropped = gr.File(
                        label="Drop an MP4 that Show-1 made", file_types=[".mp4"], height=140, elem_id="drop"
                    )
                    told = _html(elem_id="told")
            with gr.Column(scale=3, min_width=320, elem_id="job"):
                _part("screen")
                _part("status")
                _part("progress")
                with gr.Row(elem_id="offer", elem_classes=["actions", "on-demand"]):
                    _html("<p class='note'>Mini, a small stand-in that comes with the program, runs meanwhile.</p>")
                    offer_button = gr.Button("Use Mini meanwhile", size="sm", min_width=140)
                with gr.Row(elem_id="at_work", elem_classes=["actions", "on-demand"]):
                    cancel_button = gr.Button("Cancel", variant="stop", size="sm", min_width=90)
                    notify_button = gr.Button("Notify me", size="sm", min_width=90)
                    stop_button = gr.Button("Stop here", size="sm", min_width=90, elem_id="stop")
                _part("downloads")
                with gr.Column(elem_id="ended", elem_classes="on-demand"):
                    with gr.Row(elem_classes="actions"):
                        again_button = gr.Button("Again with another seed", size="sm", min_width=150)
                        reuse_button = gr.Button("Edit these settings", size="sm", min_width=150)
                    with gr.Row(elem_classes="actions", visible=len(names) > 1):
                        other_preset = gr.Dropdown(
                            names, value=default, label="Preset for another try", container=False, min_width=150
                        )
                        again_with_button = gr.Button("Again with this preset", size="sm", min_width=150)
                _part("clips")
                _part("settings")
        _part("gallery")

        private = {"api_visibility": "private", "show_progress": "hidden"}
        at_once = private | {"queue": False}  # where errors are not told
        page.load(enter, [shown, visitor], new_job, js=WITH_JOB, **at_once).then(None, new_job, js=ENTER_JOB, **private)
        ways = [submit_button.click, prompt.submit, seed.submit, *(field.submit for field in fields)]
        for asked, act, inputs in (
            (ways, submit, [shown, visitor, prompt, seed, preset, *fields]),
            ([again_button.click], again, [shown, visitor]),
            ([again_with_button.click], again_with, [shown, visitor, other_preset]),
        ):
            gr.on(asked, act, inputs, new_job, js=WITH_JOB, **private).success(None, new_job, js=GO_TO_JOB, **private)
        cancel_button.click(cancel, [shown, visitor], js=WITH_JOB, **private)
        stop_button.click(stop, [shown, visitor], js=WITH_JOB, **private)
        notify_button.click(None, js="() => show1.askToNotify()", **private)
        offer_button.click(lambda: "mini", outputs=preset, **at_once)
        preset.change(choose, preset, [examples, *fields], **at_once)
        random_seed.click(lambda: str(draw_seed()), outputs=seed, **at_once)
        same_seed.click(reuse_seed, shown, seed, js=JOB, **private)
        edit = reuse_button.click(reuse, shown, [prompt, seed, preset, *fields], js=JOB, **private)
        edit.success(None, js="() => document.querySelector('#prompt textarea').focus()", **private)
        dropped.upload(restore, dropped, [dropped, prompt, seed, preset, *fields, told], **private)

        add_endpoint(jobs)
    # Not open: a call past the queue would get the first status for a result, and have its video cancelled.
    page.queue(default_concurrency_limit=None, api_open=False)
    # Gradio looks into its queue a thousand times a second, which takes from the models (6 % of a core, measured).
    page._queue.sleep_when_free = page._queue.progress_update_sleep_when_free = 0.05
    return page


def _html(value: str = "", **settings: Any) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, **settings)


def _part(name: str, **settings: Any) -> None:
    """Make a place for a part of the page that `views.view` writes, empty at first."""
    _html('<div class="part"></div>', elem_id=name, **settings)


def _news(id: str, job: Job | None) -> list:
    """Return what a visitor wants to hear of at once; steps, times, stages and clips are told with it, or by PAUSE.

    Each look takes a browser some hundredths of a second, of the models' where it runs beside them.
    """
    return [id, *((job.state, job.wish, len(job.notices), job.previewed) if job else ())]


def _known(jobs: Jobs, id: str) -> Job:
    if job := jobs.get(id):
        return job
    raise Show1Error("No video is shown.", "Make one, or choose one of yours below.")
