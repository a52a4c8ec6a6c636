"""The page: type a prompt, watch the stages, get a video. `python app.py --help` lists the launch flags."""

import argparse
import asyncio
import html
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from show_1 import hosts, versions

versions.require()  # first, as the imports below fail where something is too old
hosts.prepare()
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page asks nothing of the outside

import gradio as gr
from gradio import processing_utils

from show_1 import Cascade, Show1Error
from show_1.cascade import STAGES
from show_1.errors import exit_code
from show_1.jobs import CANCELLED, CHANGEABLE, DONE, FAILED, RUNNING, STOPPED, WAITING, Job, Jobs, duration
from show_1.pipeline import MAX_SEED, check_device, default_cascade, draw_seed
from show_1.replay import differences, here, read
from show_1.timing import stage_steps
from show_1.video import check_writable

SYSTEM_FONTS = ("system-ui", "sans-serif")  # Gradio's own theme would fetch one from the web
TICK = 0.5  # seconds between two looks at a job
log = logging.getLogger("show-1")
# Our videos are. Gradio would ask an ffprobe, and fail where there is an ffmpeg without one.
processing_utils.video_is_playable = lambda path: True

# ---------------------------------------------------------------------------------------------------- what is drawn
# The address of the page says which job it shows. So a reload, the back button and another browser all find it.

WITH_JOB = "(job, ...others) => [new URLSearchParams(location.search).get('job') || '', ...others]"
GO_TO_JOB = """(job) => {
    if (!job) return;
    history.pushState(null, '', '?job=' + job);
    document.querySelector('#status').scrollIntoView({ behavior: 'smooth', block: 'nearest' });
}"""

HEADLINE = """
<div role="status" aria-live="polite">{{value.text}}</div>
{{#if value.prompt}}<p class="prompt">“{{value.prompt}}” · seed {{value.seed}}</p>{{/if}}
{{#each value.notices}}<p>{{this}}</p>{{/each}}
"""
HEADLINE_STYLE = """
[role=status] { font-size: var(--text-lg); font-weight: 600; }
p { margin: 6px 0 0; font-size: var(--text-sm); overflow-wrap: anywhere; }
.prompt { opacity: 0.75; }
"""
# The browser's own notice, where the visitor has allowed it: only for a job that this page saw at work.
NOTIFY = """
let before = props.value?.state;
watch('value', () => {
    const { state, text } = props.value;
    const worked = before === 'running' || before === 'waiting';
    if (worked && ['done', 'stopped', 'failed'].includes(state) && window.Notification?.permission === 'granted')
        new Notification('Show-1', { body: text });
    before = state;
});
"""
ASK_TO_NOTIFY = """async () => {
    if (!window.Notification) return alert('This browser shows no notifications here; the tab will tell.');
    if (await Notification.requestPermission() === 'granted')
        new Notification('Show-1', { body: 'This is how it will look.' });
}"""

PROGRESS = """
{{#if value.stages}}
<div class="overall"><progress value="{{value.share}}" max="1" aria-label="All of the video"></progress>
<span>{{value.percent}}</span></div>
<p>{{value.detail}}</p>
<ol>
{{#each value.stages}}
<li class="{{this.state}}"><span>{{this.name}}</span><progress value="{{this.share}}" max="1"
 aria-label="{{this.name}}"></progress><span class="steps">{{this.steps}}</span></li>
{{/each}}
</ol>
{{/if}}
"""
PROGRESS_STYLE = """
progress { appearance: none; width: 100%; height: 8px; border: 0; border-radius: 4px; overflow: hidden; }
progress, progress::-webkit-progress-bar { background: var(--border-color-primary); }
progress::-webkit-progress-value { background: var(--color-accent); }
progress::-moz-progress-bar { background: var(--color-accent); }
.overall { display: flex; align-items: center; gap: 12px; }
.overall progress { height: 14px; border-radius: 7px; }
.overall span { min-width: 3.5em; text-align: right; font-weight: 600; font-variant-numeric: tabular-nums; }
p { margin: 6px 0 10px; font-variant-numeric: tabular-nums; }
ol { list-style: none; margin: 0; padding: 0; font-size: var(--text-sm); }
li { display: grid; grid-template-columns: 8.5em 1fr 5.5em; align-items: center; gap: 12px; padding: 2px 0; }
li.ahead { opacity: 0.75; }
li.now { font-weight: 600; }
.steps { text-align: right; font-variant-numeric: tabular-nums; }
"""
TITLE = "watch('value', () => { document.title = props.value.title; });"

PREVIEW = '{{#if value}}<img src="{{value}}" alt="Preview of what is being drawn">{{/if}}'
PREVIEW_STYLE = "img { width: 100%; max-height: 60vh; object-fit: contain; border-radius: var(--radius-lg); }"

CLIPS = """
{{#if value}}<h3>Clips of the stages</h3>{{/if}}
<div>
{{#each value}}
<figure>
{{#if this.still}}<img src="{{this.url}}" alt="{{this.name}}">
{{else}}<video src="{{this.url}}" controls loop muted autoplay playsinline aria-label="Clip: {{this.name}}"></video>
{{/if}}
<figcaption>{{this.name}}</figcaption></figure>
{{/each}}
</div>
"""
CLIPS_STYLE = """
h3 { margin: 8px 0; font-size: var(--text-md); }
div { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 12px; }
figure { margin: 0; }
img, video { width: 100%; border-radius: var(--radius-md); }
figcaption { font-size: var(--text-sm); opacity: 0.75; }
"""

GALLERY = """
<h3>Your videos</h3>
{{#if value}}
<ul>
{{#each value}}
<li><a href="?job={{this.id}}"><video src="{{this.url}}#t=0.5" muted playsinline preload="metadata" loop
 aria-hidden="true"></video><span>{{this.prompt}}</span></a></li>
{{/each}}
</ul>
{{else}}<p>None yet. What you make is kept here, for this browser only.</p>{{/if}}
"""
GALLERY_STYLE = """
h3 { margin: 16px 0 8px; font-size: var(--text-lg); }
ul { list-style: none; margin: 0; padding: 0; display: grid; gap: 12px;
     grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
a { display: block; color: var(--body-text-color); text-decoration: none; font-size: var(--text-sm); }
a:hover span, a:focus-visible span { text-decoration: underline; }
video { width: 100%; aspect-ratio: 16 / 9; object-fit: cover; border-radius: var(--radius-md);
        background: var(--border-color-primary); }
span { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
       overflow-wrap: anywhere; }
p { opacity: 0.75; }
"""
# Into view without a new page; they play while they are pointed at.
GALLERY_SCRIPT = """
element.addEventListener('click', event => {
    const link = event.target.closest('a');
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    history.pushState(null, '', link.getAttribute('href'));
    window.scrollTo({ top: 0, behavior: 'smooth' });
});
for (const [kind, act] of [['mouseover', 'play'], ['mouseout', 'pause']])
    element.addEventListener(kind, event => event.target.closest('a')?.querySelector('video')[act]());
"""
LINE = "{{#if value}}<p role='status'>{{value}}</p>{{/if}}"
LINE_STYLE = "p { margin: 0; font-size: var(--text-sm); overflow-wrap: anywhere; }"


def build(jobs: Jobs, notes: list[str]) -> gr.Blocks:
    """Return the page; `notes` are sentences for its top, which may come later."""

    def submit(job: str, visitor: str | None, prompt: str, seed: str, *advanced: str):
        visitor = visitor or _new_visitor()
        with _told():
            return jobs.submit(visitor, prompt or "", _seed(seed), _changes(advanced)).id, visitor

    def again(id: str, visitor: str | None):
        visitor = visitor or _new_visitor()
        with _told():
            job = _known(jobs, id)
            return jobs.submit(visitor, job.prompt, None, job.changes).id, visitor

    def cancel(id: str, visitor: str | None) -> None:
        with _told():
            jobs.cancel(visitor or "", _known(jobs, id))

    def stop(id: str, visitor: str | None) -> None:
        with _told():
            jobs.stop(visitor or "", _known(jobs, id))

    def reuse(id: str):
        job = _known(jobs, id)
        return job.prompt, str(job.seed), *_texts(job.changes)

    def reuse_seed(id: str):
        job = jobs.get(id)
        return str(job.seed) if job else gr.skip()

    def restore(file: str):
        """Bring the settings of a video of ours back into the form, and say whether it can be made again here."""
        try:
            settings = read(file)
            changes, kept = _fitting(jobs, settings)
        except Show1Error as error:  # told here: an event that fails marks all that it was to fill in as failed
            return None, *[gr.skip()] * (2 + len(fields)), str(error)
        other = differences(settings, here(jobs.cascade, jobs.device, jobs.pipeline), kept)
        if other:
            line = f"The settings are back. Other frames are to be expected here: {'; '.join(other)}."
        else:
            line = "The settings are back, and the same frames can be expected here."
        if jobs.pipeline is None:
            line += " (The weights could not be compared, as the models are still loading.)"
        if stage := settings.get("stopped_after"):
            line += f" It was stopped after the {_name(stage)}: stop there to get the same clip."
        return None, settings["prompt"], str(settings["seed"]), *_texts(changes), line

    def enter(id: str, visitor: str | None):
        """Give a new visitor a secret; show the job that a visitor has at work, where the address names none."""
        visitor = visitor if isinstance(visitor, str) and len(visitor) > 20 else _new_visitor()
        at_work = [job.id for job in jobs.of(visitor) if not job.ended]
        return visitor, "" if id else (at_work or [""])[-1], "\n\n".join(notes)

    def look(id: str, visitor: str | None, seen: dict):
        """Say what has changed since the last look; most of the page stays as it is."""
        visitor = visitor or ""
        job = jobs.get(id)
        new = _view(jobs, id, job, visitor)
        return new, *(gr.skip() if seen.get(part) == value else gr.update(**value) for part, value in new.items())

    about = jobs.cascade.about
    with gr.Blocks(title="Show-1: text to video") as page:
        gr.Markdown(
            "# Show-1: text to video\n"
            f"{html.escape(jobs.cascade.name)} on {jobs.device.type} · "
            "[paper](https://arxiv.org/abs/2309.15818) · [models](https://huggingface.co/showlab)"
            + (f"\n\n{html.escape(about.note, quote=False)}" if about else "")
        )
        banner = gr.Markdown(elem_id="banner")
        visitor = gr.BrowserState(storage_key="show-1-visitor", secret="show-1")  # a fixed one outlives a restart
        shown, new_job = gr.Textbox(visible=False), gr.Textbox(visible=False)
        seen = gr.State({})
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(
                    label="Prompt",
                    placeholder="what the video should show",
                    max_lines=4,
                    autofocus=True,
                )
                submit_button = gr.Button("Make the video", variant="primary")
                if about:
                    gr.Examples([[example] for example in about.examples], prompt, label="Examples")
                with gr.Group():
                    # No gr.Number: it shows 0 where it has no value, and rounds. And no buttons of the box itself: they
                    # would be part of its name for a screen reader.
                    seed = gr.Textbox(label="Seed", placeholder="a new one each time", max_lines=1)
                    with gr.Row():
                        random_seed, same_seed = gr.Button("Random", size="sm"), gr.Button("Reuse", size="sm")
                with gr.Accordion("Advanced", open=False):
                    fields = _fields(jobs.cascade)
                with gr.Accordion("Settings from a video", open=False):
                    dropped = gr.File(
                        label="Drop an MP4 that was made here", file_types=[".mp4"], height=150, elem_id="drop"
                    )
                    told = gr.HTML(html_template=LINE, css_template=LINE_STYLE, elem_id="told")
            with gr.Column(scale=3, min_width=320):
                headline = gr.HTML(
                    html_template=HEADLINE, css_template=HEADLINE_STYLE, js_on_load=NOTIFY, elem_id="status"
                )
                progress = gr.HTML(
                    html_template=PROGRESS, css_template=PROGRESS_STYLE, js_on_load=TITLE, elem_id="progress"
                )
                with gr.Row(visible=False) as at_work:
                    stop_button = gr.Button("Stop here", visible=False, size="sm", min_width=90)
                    cancel_button = gr.Button("Cancel", variant="stop", size="sm", min_width=90)
                    notify_button = gr.Button("Notify me", size="sm", min_width=90)
                preview = gr.HTML(html_template=PREVIEW, css_template=PREVIEW_STYLE, visible=False, elem_id="preview")
                video = gr.Video(
                    label="Video",
                    autoplay=True,
                    loop=True,
                    interactive=False,
                    visible=False,
                    elem_id="video",
                    buttons=[],
                )
                with gr.Row(visible=False) as ended:
                    mp4 = gr.DownloadButton("Download MP4", visible=False, size="sm", min_width=140)
                    gif = gr.DownloadButton("Download GIF", visible=False, size="sm", min_width=140)
                    again_button = gr.Button("Again with another seed", size="sm", min_width=140)
                    reuse_button = gr.Button("Edit these settings", size="sm", min_width=140)
                clips = gr.HTML(html_template=CLIPS, css_template=CLIPS_STYLE, elem_id="clips")
                with gr.Accordion("Settings of this video", open=False, visible=False) as settings_part:
                    settings = gr.Code(
                        language="json", interactive=False, show_label=False, lines=5, max_lines=20, elem_id="settings"
                    )
        gallery = gr.HTML(
            html_template=GALLERY, css_template=GALLERY_STYLE, js_on_load=GALLERY_SCRIPT, elem_id="gallery"
        )

        private = {"api_visibility": "private", "show_progress": "hidden"}
        # Outside Gradio's queue nothing tells of an error: right for a look while the server is away, and for no more.
        at_once = private | {"queue": False}
        parts = {
            "headline": headline,
            "progress": progress,
            "preview": preview,
            "video": video,
            "clips": clips,
            "settings": settings,
            "settings_part": settings_part,
            "at_work": at_work,
            "stop": stop_button,
            "ended": ended,
            "mp4": mp4,
            "gif": gif,
            "gallery": gallery,
        }
        on_look = {"inputs": [shown, visitor, seen], "outputs": [seen, *parts.values()], "js": WITH_JOB} | at_once
        page.load(enter, [shown, visitor], [visitor, new_job, banner], js=WITH_JOB, **at_once).then(
            None, new_job, js=GO_TO_JOB, **private
        ).then(look, **on_look)
        gr.Timer(TICK).tick(look, **on_look)
        ways = [submit_button.click, prompt.submit, seed.submit, *(field.submit for field in fields)]
        for asked, act, inputs in (
            (ways, submit, [shown, visitor, prompt, seed, *fields]),
            ([again_button.click], again, [shown, visitor]),
        ):
            gr.on(asked, act, inputs, [new_job, visitor], js=WITH_JOB, **private).success(
                None, new_job, js=GO_TO_JOB, **private
            ).then(look, **on_look)
        cancel_button.click(cancel, [shown, visitor], js=WITH_JOB, **private)
        stop_button.click(stop, [shown, visitor], js=WITH_JOB, **private)
        notify_button.click(None, js=ASK_TO_NOTIFY, **private)
        random_seed.click(lambda: str(draw_seed()), outputs=seed, **at_once)
        same_seed.click(reuse_seed, shown, seed, js=WITH_JOB, **private)
        reuse_button.click(reuse, shown, [prompt, seed, *fields], js=WITH_JOB, **private)
        dropped.upload(restore, dropped, [dropped, prompt, seed, *fields, told], **private)

        _add_endpoint(jobs)
    return page.queue(default_concurrency_limit=None)


def _add_endpoint(jobs: Jobs) -> None:
    """Let programs make videos, through the same queue."""

    async def show_1(
        prompt: str,
        seed: str | None = None,
        settings: dict[str, Any] | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (Gradio wants it so)
    ) -> AsyncIterator[tuple]:
        """Make a silent three-second video (MP4) from a text prompt, with the Show-1 text-to-video cascade.

        It takes from under a minute to several, depending on the computer, and tells its progress meanwhile. Returns
        the video, the seed, the settings that made it, and a status.

        Args:
            prompt: What the video should show, in English, best one subject, one motion, one place: "a panda jumping in
                the snow". About 60 words are read.
            seed: A whole number from 0 on for the same video again; leave it out for a new one each time.
            settings: Changes to the stages, such as {"keyframes": {"steps": 20, "guidance": 7.5}}. The stages are
                keyframes, interpolation, first_frame, pixel_upscale and latent_upscale; leave it out for the defaults.
        """
        visitor, job = _new_visitor(), None
        try:
            with _told():
                job = await asyncio.to_thread(jobs.submit, visitor, prompt, _seed(seed), settings)
            changed = None
            while not job.ended:
                if changed != job.changed:
                    changed = job.changed
                    status = _status(jobs, job)
                    progress((round(100 * status["share"]), 100), desc=status["text"], unit="%")
                    yield None, str(job.seed), None, status
                await asyncio.sleep(0.1)
            if job.state in (FAILED, CANCELLED):
                raise gr.Error(html.escape(job.fault or "It was cancelled.", quote=False), print_exception=False)
            yield str(jobs.result(job)), str(job.seed), job.settings, _status(jobs, job)
        finally:
            if job and not job.ended:
                jobs.cancel(visitor, job)  # who asked has gone: nobody else could fetch it

    changes = gr.JSON(label="Settings", visible=False)
    changes.api_info = lambda: {"type": "object", "description": "changes to the stages"}  # Gradio's is no JSON schema
    gr.Button(visible=False).click(
        show_1,
        [
            gr.Textbox(label="Prompt", visible=False),
            gr.Textbox(label="Seed", visible=False),
            changes,
        ],
        [
            gr.Video(label="Video", visible=False),
            gr.Textbox(label="Seed", visible=False),
            gr.JSON(label="Settings", visible=False),
            gr.JSON(label="Status", visible=False),
        ],
        api_name="show-1",
        concurrency_limit=None,
    )


# ------------------------------------------------------------------------------------------------------ what is shown


def _view(jobs: Jobs, id: str, job: Job | None, visitor: str) -> dict[str, Any]:
    """Return the properties of each part of the page."""
    mine = job is not None and jobs.owns(visitor, job)
    result = jobs.result(job) if job else None
    working = job is not None and not job.ended
    gif = jobs.place(job) / "video.gif" if result else None
    return {
        "headline": {"value": _headline(jobs, id, job)},
        "progress": {"value": _progress(jobs, job)},
        "preview": {"value": job.preview if working else "", "visible": bool(working and job.preview)},
        "video": {"value": str(result) if result else None, "visible": result is not None},
        "clips": {"value": _clips(jobs, job)},
        "settings": {"value": json.dumps(job.settings, indent=2, ensure_ascii=False) if result else None},
        "settings_part": {"visible": result is not None},
        "at_work": {"visible": working and mine},
        "stop": {"visible": working and any(stage != "first_frame" for stage in job.clips)},
        "ended": {"visible": job is not None and job.ended},
        "mp4": {"visible": result is not None, "value": str(result) if result else None},
        "gif": _if_there(gif),
        "gallery": {"value": _gallery(jobs, visitor)},
    }


def _headline(jobs: Jobs, id: str, job: Job | None) -> dict[str, Any]:
    """Return what is going on, in words that change seldom enough to be read out."""
    if job is None and id:
        return {"text": "There is no such job here. Check the link, or make a new video.", "state": "none"}
    if job is None:
        loading = jobs.loading.get("text")
        return {"text": f"Ready when the models are: {loading}" if loading else "Ready", "state": "none"}
    notices = [_short(notice, 500) for notice in job.notices]
    shown = {"state": job.state, "prompt": _short(job.prompt, 200), "seed": job.seed, "notices": notices}
    return {"text": _what(jobs, job), **shown}


def _what(jobs: Jobs, job: Job) -> str:
    if job.state == WAITING:
        place = len(jobs.ahead(job)) + 1
        return f"In the queue: number {place}" if place > 1 or not jobs.loading else jobs.loading["text"]
    if job.state == RUNNING:
        if not job.stage:
            return jobs.loading.get("text") or "Reading the prompt"
        ending = {"cancel": "Cancelling", "stop": "Stopping"}.get(job.wish)
        return ending or f"Stage {STAGES.index(job.stage) + 1} of {len(STAGES)}: {_name(job.stage)}"
    if job.state == DONE:
        return f"Done in {job.seconds} seconds" if jobs.result(job) else "This video's file is gone from the server"
    if job.state == STOPPED:
        return f"Stopped after the {_name(job.settings['stopped_after'])}: this is the clip"
    return f"No video was made. {job.fault}" if job.state == FAILED else "Cancelled"


def _progress(jobs: Jobs, job: Job | None) -> dict[str, Any]:
    if job is None or job.ended:
        sign = {DONE: "✓ Done · ", STOPPED: "✓ Done · ", FAILED: "Failed · "}.get(job.state if job else "", "")
        return {"stages": [], "title": f"{sign}Show-1: text to video"}
    share = jobs.share(job)
    if job.state == WAITING or not job.stage:
        left, words = jobs.wait(job) if job.state == WAITING else jobs.loading_left(), "begins in about {}"
    else:
        left, words = jobs.left(job), "about {} left"
    steps = stage_steps(job.cascade)
    now = STAGES.index(job.stage) if job.stage else -1
    ready = not jobs.loading or jobs.pipeline is not None
    stages = [{"name": "loading", "state": "done" if ready else "now", "share": 1 if ready else 0, "steps": ""}]
    if expected := jobs.loading.get("expected"):
        stages[0]["share"] = round(1 - jobs.loading_left() / expected, 2) if not ready else 1
    for number, stage in enumerate(STAGES):
        done = steps[stage] if number < now else job.step if number == now else 0
        state = "done" if number < now else "now" if number == now else "ahead"
        told = f"{done} / {steps[stage]}"
        stages.append({"name": _name(stage), "state": state, "share": round(done / steps[stage], 3), "steps": told})
    percent = f"{100 * share:.0f} %"
    return {
        "share": round(share, 3),
        "percent": percent,
        "detail": words.format(duration(left)).capitalize() if left is not None else "The time left is not known yet",
        "stages": stages,
        "title": f"{percent} · Show-1" if job.state == RUNNING else "Waiting · Show-1",
    }


def _clips(jobs: Jobs, job: Job | None) -> list[dict[str, Any]]:
    if job is None:
        return []
    return [
        {"name": _name(stage), "url": _url(jobs.place(job) / name), "still": name.endswith(".png")}
        for stage, name in job.clips.items()
    ]


def _gallery(jobs: Jobs, visitor: str) -> list[dict[str, str]]:
    made = [(job, jobs.result(job)) for job in jobs.of(visitor)] if visitor else []
    return [{"id": job.id, "url": _url(file), "prompt": _short(job.prompt, 100)} for job, file in made if file]


def _status(jobs: Jobs, job: Job) -> dict[str, Any]:
    """Return what callers of the endpoint read while they wait."""
    text = _what(jobs, job)
    left = jobs.left(job) if job.state == RUNNING else jobs.wait(job) if job.state == WAITING else None
    if job.state == RUNNING and job.stage:
        text += f", step {job.step} of {stage_steps(job.cascade)[job.stage]}"
    return {
        "text": text,
        "share": round(jobs.share(job), 3),
        "seconds_left": None if left is None else round(left, 1),
        "job": job.id,
        "notices": job.notices,
    }


def _if_there(file: Path | None) -> dict[str, Any]:
    there = file is not None and file.is_file()
    return {"visible": there, "value": str(file) if there else None}


def _url(file: Path) -> str:
    return f"gradio_api/file={quote(str(file))}"  # relative: the page may lie behind a proxy


def _name(stage: str) -> str:
    return stage.replace("_", " ")


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


# ------------------------------------------------------------------------------------------------------- what is typed


def _fields(cascade: Cascade) -> list[gr.Textbox]:
    """Draw a box for each setting that a visitor may change, in the order of CHANGEABLE."""
    boxes = []
    for stage, keys in CHANGEABLE.items():
        with gr.Row():
            for key in keys:
                default = getattr(getattr(cascade, stage), key)
                label = f"{_name(stage).capitalize()}: {_name(key)}"
                boxes.append(gr.Textbox(label=label, placeholder=str(default) or "none", max_lines=1, min_width=130))
    return boxes


def _changes(texts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return what was typed into the boxes of `_fields`; the empty ones keep the cascade's own settings."""
    changes: dict[str, dict[str, Any]] = {}
    texts = iter(texts)
    for stage, keys in CHANGEABLE.items():
        for key in keys:
            if text := (next(texts) or "").strip():
                changes.setdefault(stage, {})[key] = text if key == "negative_prompt" else _number(text)
    return changes


def _texts(changes: dict[str, dict[str, Any]]) -> list[str]:
    """Return what `_changes` would read as these changes."""
    return [str(changes.get(stage, {}).get(key, "")) for stage, keys in CHANGEABLE.items() for key in keys]


def _fitting(jobs: Jobs, settings: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], Cascade]:
    """Return those of a video's settings that differ from the cascade's here and can be changed, and both together."""
    theirs, ours = settings["cascade"], jobs.cascade.settings()
    changes: dict[str, dict[str, Any]] = {}
    for stage, keys in CHANGEABLE.items():
        table = theirs.get(stage)
        for key in keys:
            if isinstance(table, dict) and key in table and table[key] != ours[stage][key]:
                changes.setdefault(stage, {})[key] = table[key]
    return changes, jobs.changed_cascade(changes)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text  # the cascade's own check tells what is wrong with it


def _seed(text: str | None) -> int | None:
    try:
        return int(text) if text and text.strip() else None
    except ValueError:
        raise Show1Error(
            f"The seed cannot be {_short(repr(text), 60)}.", f"Give a whole number from 0 to {MAX_SEED}."
        ) from None


def _new_visitor() -> str:
    return secrets.token_urlsafe(24)


def _known(jobs: Jobs, id: str) -> Job:
    if job := jobs.get(id):
        return job
    raise Show1Error("No video is shown.", "Make one, or choose one of yours below.")


class _told:
    """Turn what goes wrong into a sentence in the page; never a stack trace."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if not isinstance(error, Exception):
            return
        message = str(error)
        if not isinstance(error, Show1Error):
            log.exception("a request failed")
            message = "That failed; the server's log says why. Try again, or with other settings."
        raise gr.Error(html.escape(message, quote=False), duration=None, print_exception=False) from error


# ------------------------------------------------------------------------------------------------------------- launch


def main() -> int:
    arguments = _parser().parse_args()
    return exit_code(lambda: _serve(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Open the Show-1 page.")
    parser.add_argument("--cascade", metavar="NAME|FILE", help=f"{', '.join(Cascade.names())}, or a TOML file")
    parser.add_argument("--device", help="cuda, cpu, mps, ...; default: cuda where there is one")
    parser.add_argument("--memory", metavar="12GB", help="how much of the GPU's memory to use; default: what is free")
    parser.add_argument(
        "--share",
        action=argparse.BooleanOptionalAction,
        default=hosts.detect().rented,
        help="make a public link; default: only in notebooks of Paperspace, Colab and Kaggle",
    )
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="let in only who knows these")
    parser.add_argument("--server-name", default="127.0.0.1", help="0.0.0.0 lets other computers in")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--queue-size", type=int, default=12, help="how many videos may wait; default: 12")
    parser.add_argument("--output-dir", type=Path, default=hosts.detect().outputs, help="where the videos are kept")
    parser.add_argument("--models", metavar="DIR", type=Path, help="take hub models from DIR/owner/name")
    parser.add_argument("--offline", action="store_true", help="ask no network: what was fetched before must do")
    parser.add_argument("--mcp", action="store_true", help="also be a tool for assistants, by MCP")
    return parser


def _serve(arguments: argparse.Namespace) -> None:
    """Open the page, load the models behind it, serve until Ctrl-C."""
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
    if arguments.queue_size < 1:
        raise Show1Error(f"The queue size cannot be {arguments.queue_size}.", "Give --queue-size a number from 1 on.")

    auth = _auth(arguments.auth)

    notes: list[str] = []
    where = {"memory": arguments.memory, "models": arguments.models, "offline": arguments.offline}
    jobs = Jobs(cascade, device, outputs, arguments.queue_size, **where)
    page = build(jobs, notes)
    _launch(
        page,
        share=arguments.share,
        auth=auth,
        server_name=arguments.server_name,
        server_port=arguments.port,
        allowed_paths=[str(outputs)],
        max_file_size="100mb",
        run_history=False,  # the gallery is ours, and one visitor's
        mcp_server=arguments.mcp,
        footer_links=["api"],
        theme=gr.themes.Default(font=SYSTEM_FONTS, font_mono=("monospace",)),
        prevent_thread_lock=True,
    )
    jobs.start()  # not before: loading would keep the page from answering
    if arguments.share and not page.share_url:
        notes.append(
            f"**There is no public link: the tunnel could not be made.** The page works at {page.local_url} on the "
            "computer that runs it; for others, start it with `--server-name 0.0.0.0`, or forward the port."
        )
    try:
        page.block_thread()  # until Ctrl-C
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one Ctrl-C is enough
        jobs.close(patience=5)
        # With a video still in work, an orderly end of Python would make torch abort.
        sys.stdout.flush()
        os._exit(0)


def _launch(page: gr.Blocks, **settings: Any) -> None:
    try:
        page.launch(**settings)
    except ValueError as error:  # Gradio asks its own page, and has got no answer
        raise Show1Error(
            f"The page does not answer on this computer: {str(error).splitlines()[0]}",
            "Set NO_PROXY=127.0.0.1 if there is a proxy, or try again when the computer is less busy.",
        ) from error


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
