"""What is shown: a job as HTML. All that came from people goes through `_text`."""

import html
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from show_1.cascade import STAGES, Cascade
from show_1.engine import Preparation
from show_1.hub import gigabytes
from show_1.jobs import CANCELLED, DONE, FAILED, RUNNING, STOPPED, WAITING, Job, Jobs, duration
from show_1.page.form import short, words
from show_1.timing import stage_steps

IN_GALLERY = 60  # the newest
BADGES = {RUNNING: "at work", FAILED: "failed"}
PLAY = '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M8 5.5v13l11-6.5z"/></svg>'


def view(jobs: Jobs, id: str, job: Job | None, visitor: str) -> dict[str, str | bool]:
    """Return each part of the page as HTML, and of those that are Gradio's whether they are shown."""
    mine = job is not None and jobs.owns(visitor, job)
    result = jobs.result(job) if job else None
    working = job is not None and not job.ended
    preparation = jobs.engine.preparation
    offered = "mini" in jobs.presets and "mini" not in jobs.engine.presets and preparation is not None
    offered = offered and (job is None or (job.state == WAITING and jobs.engine_for(job.preset) is jobs.engine))
    return {
        "status": _status(jobs, id, job),
        "screen": _screen(jobs, job, result),
        "progress": _progress(jobs, job),
        "downloads": _downloads(jobs, job, result),
        "clips": _clips(jobs, job),
        "settings": _settings(job) if result else "",
        "gallery": _gallery(jobs, visitor, id) if visitor else "",
        "offer": offered and preparation.phase != "measuring",
        "at_work": working and mine,
        "stop": working and job.can_stop,
        "ended": job is not None and job.ended,
    }


def what(jobs: Jobs, job: Job) -> str:
    """Return what is going on, in words that change seldom enough to be read out."""
    preparation = jobs.engine_for(job.preset).preparation
    if job.state == WAITING:
        place = len(jobs.ahead(job)) + 1
        return f"In the queue: number {place}" if place > 1 or not preparation else preparation.text
    if job.state == RUNNING:
        if ending := {"cancel": "Cancelling", "stop": "Stopping"}.get(job.wish):
            return ending
        if not job.stage:
            return "Reading the prompt"
        return f"Stage {STAGES.index(job.stage) + 1} of {len(STAGES)}: {words(job.stage)}"
    if job.state in (DONE, STOPPED) and not jobs.result(job):
        return "This video's file is gone from the server"
    if job.state == DONE:
        return f"Done in {job.seconds} seconds"
    if job.state == STOPPED:
        return f"Stopped after the {words(job.settings['stopped_after'])}: this is the clip"
    return f"No video was made. {job.fault}" if job.state == FAILED else "Cancelled"


def report(jobs: Jobs, job: Job) -> dict[str, Any]:
    """Return what programs read while they wait."""
    text, left = what(jobs, job), None if job.ended else jobs.left(job)
    if job.state == RUNNING and job.stage:
        text += f", step {job.step} of {stage_steps(job.cascade)[job.stage]}"
    return {
        "text": text,
        "share": round(jobs.share(job), 3),
        "seconds_left": None if left is None else round(left, 1),
        "job": job.id,
        "preset": job.preset,
        "notices": job.notices,
    }


def header(cascade: Cascade, device: torch.device) -> str:
    return (
        '<header><div><h1>Show-1</h1><p>Type a prompt, get a three-second video.</p></div><p class="facts">'
        f'<span class="chip">{_text(cascade.name)} on {device.type.upper()}</span>'
        '<a href="https://arxiv.org/abs/2309.15818" target="_blank" rel="noopener">Paper</a>'
        '<a href="https://huggingface.co/showlab" target="_blank" rel="noopener">Models</a></p></header>'
    )


def examples(cascade: Cascade) -> str:
    """Return the examples of a preset as buttons, and what people should know of it."""
    if cascade.about is None:
        return ""
    buttons = [
        f'<button type="button" data-prompt="{_text(example)}">{_text(example)}</button>'
        for example in cascade.about.examples
    ]
    return (
        f'<div class="examples" role="group" aria-label="Examples">{"".join(buttons)}</div>'
        f'<p class="note">{_text(cascade.about.note)}</p>{_known_words(cascade)}'
    )


def _known_words(cascade: Cascade) -> str:
    known = cascade.known_words()
    if not known:
        return ""
    told = _text(", ".join(known))
    return f'<details class="note"><summary>The {len(known)} words that it knows</summary>{told}</details>'


def line(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>' if text else ""


def _status(jobs: Jobs, id: str, job: Job | None) -> str:
    lines = []
    if job is None and id:
        text, state = "There is no such job here. Check the link, or make a new video.", "none"
    elif job is None:
        preparation, state = jobs.engine.preparation, "none"
        text = "Ready" if preparation is None else preparation.text
    else:
        text, state = what(jobs, job), job.state
        preset = jobs.presets[job.preset].name if job.preset in jobs.presets else job.preset
        lines.append(
            f'<p class="prompt" dir="auto">“{_text(short(job.prompt, 200))}”</p>'
            f'<p class="note">Seed {job.seed} · {_text(preset)}</p>'
        )
        lines += [f'<p class="notice">{_text(short(notice, 500))}</p>' for notice in job.notices]
    return (
        f'<div class="status {state}" tabindex="-1" data-state="{state}" data-title="{_text(_title(jobs, job))}">'
        f'<div role="status" aria-live="polite">{_text(text)}</div>{"".join(lines)}</div>'
    )


def _title(jobs: Jobs, job: Job | None) -> str:
    state = job.state if job else CANCELLED  # read once: it may change meanwhile
    if state == CANCELLED:
        return "Show-1: text to video"
    about = short(" ".join(job.prompt.split()), 40)
    if state == RUNNING:
        return f"{_percent(jobs.share(job))} · {about}"
    return {WAITING: "Waiting", DONE: "✓ Done", STOPPED: "✓ Done", FAILED: "✕ Failed"}[state] + f" · {about}"


def _screen(jobs: Jobs, job: Job | None, result: Path | None) -> str:
    size = (job.cascade if job and job.cascade else jobs.engine.cascade).latent_upscale
    inside = f"{PLAY}<p>Your video appears here</p>"
    kind = "empty"
    if result:
        kind = "filled"
        inside = (
            f'<video src="{_url(result)}" autoplay loop muted playsinline controls '
            f'aria-label="Video: {_text(short(job.prompt, 100))}"></video>'
        )
    elif job and not job.ended:
        kind, inside = "busy", f"{PLAY}<p>The first preview comes with the first steps</p>"
        if job.state == WAITING:
            inside = f"{PLAY}<p>It begins when its turn comes; this page can be closed meanwhile</p>"
        if job.preview:
            kind, inside = "filled", f'<img src="{job.preview}" alt="Preview of what is being drawn">'
    elif job:
        inside = f"{PLAY}<p>There is no video here</p>"
    return f'<div class="screen {kind}" style="aspect-ratio: {size.width} / {size.height}">{inside}</div>'


def _progress(jobs: Jobs, job: Job | None) -> str:
    if job is None:
        preparation = jobs.engine.preparation
        return f"<ol>{''.join(_preparing(preparation))}</ol>" if preparation else ""
    if job.ended:
        return ""
    preparation = jobs.engine_for(job.preset).preparation
    share, left = jobs.share(job), jobs.left(job)
    detail = "The time left is not known yet" if left is None else f"About {duration(left)} left"
    if job.state == WAITING and jobs.ahead(job):
        wait = jobs.seconds_until_start(job)
        detail = "It begins after those before it" if wait is None else f"Begins in about {duration(wait)}"
        if left is not None:
            detail += f", done in about {duration(left)}"
    rows = _preparing(preparation)
    steps = stage_steps(job.cascade)
    now = STAGES.index(job.stage) if job.stage else -1
    for number, stage in enumerate(STAGES):
        done = steps[stage] if number < now else job.step if number == now else 0
        state = "done" if number < now else "now" if number == now else "ahead"
        rows.append(_row(words(stage), state, done / steps[stage], f"{done} / {steps[stage]}"))
    return (
        f'<div class="overall"><progress value="{share:.3f}" max="1" aria-label="All of the video"></progress>'
        f"<span>{_percent(share)}</span></div>"
        f'<p class="left">{detail}</p><ol>{"".join(rows)}</ol>'
    )


def _preparing(preparation: Preparation | None) -> list[str]:
    """Return the rows of what comes before the stages."""
    if preparation is None:
        return [_row("loading", "done", 1, "")]
    rows, fetched = [], preparation.fetched
    if fetched:
        here = f"{gigabytes(fetched.done)} of {gigabytes(fetched.total)}"
        if preparation.phase == "fetching" and fetched.speed:
            here += f" · {gigabytes(fetched.speed)}/s"
            here += f" · {duration(fetched.left)}" if fetched.left else ""
        state = "now" if preparation.phase == "fetching" else "done"
        rows.append(_row("download", state, fetched.done / max(fetched.total, 1), here))
    if preparation.phase in ("fetching", "failed"):
        return [*rows, _row("loading", "ahead", 0, "")]
    left = f"{duration(preparation.left)}" if preparation.left else ""
    loading = preparation.phase == "loading"
    rows.append(_row("loading", "now" if loading else "done", preparation.share if loading else 1, left * loading))
    if not loading:
        rows.append(_row("measuring", "now", preparation.share, left))
    return rows


def _row(name: str, state: str, share: float, told: str) -> str:
    return (
        f'<li class="{state}"><span class="name">{name}</span>'
        f'<progress value="{share:.3f}" max="1" aria-label="{name}"></progress><span class="steps">{told}</span></li>'
    )


def _downloads(jobs: Jobs, job: Job | None, result: Path | None) -> str:
    if not result:
        return ""
    gif = jobs.gif(job)
    links = [f'<a class="button" href="{_url(result)}" download="{_text(result.name)}">Download MP4</a>']
    if os.path.isfile(gif):
        links.append(f'<a class="button" href="{_url(gif)}" download="{_text(gif.name)}">Download GIF</a>')
    return f'<div class="downloads">{"".join(links)}</div>'


def _clips(jobs: Jobs, job: Job | None) -> str:
    if job is None or not job.clips:
        return ""
    figures = []
    for stage, name in job.clips.items():
        url, stage = _url(jobs.folder_of(job) / name), words(stage)
        still = f'<img src="{url}" alt="{stage}">'
        # They play when they are pointed at: drawing them all would take time from the video itself.
        clip = f'<video src="{url}" preload="auto" controls loop muted playsinline aria-label="{stage}"></video>'
        figures.append(f"<figure>{still if name.endswith('.png') else clip}<figcaption>{stage}</figcaption></figure>")
    return f'<h2>Clips of the stages</h2><div class="clips">{"".join(figures)}</div>'


def _settings(job: Job) -> str:
    told = _text(json.dumps(job.settings, indent=2, ensure_ascii=False))
    return (
        "<details><summary>Settings of this video</summary>"
        f'<button type="button" data-copy>Copy</button><pre tabindex="0">{told}</pre></details>'
    )


def _gallery(jobs: Jobs, visitor: str, id: str) -> str:
    cards, older = [], 0
    for job in jobs.of(visitor):
        if len(cards) == IN_GALLERY:
            older += job.state != CANCELLED  # not looked up on the disk: they may be many
            continue
        result = jobs.result(job)
        if not result and job.ended and job.state != FAILED:  # why it failed is told there
            continue
        poster = jobs.folder_of(job) / "poster.webp"
        inside = f'<span class="badge">{BADGES.get(job.state, "waiting")}</span>'
        if result:
            picture = f'src="{_url(poster)}"' if os.path.isfile(poster) else ""
            inside = f'<img {picture} loading="lazy" alt="" aria-hidden="true" data-video="{_url(result)}">'
        shown = ' aria-current="true"' if job.id == id else ""
        title = f' data-text="{_text(_title(jobs, job))}"' if job.ended else ""
        cards.append(
            f'<li id="{job.id}" data-state="{job.state}"{title}>'
            f'<a href="?job={job.id}"{shown}><span class="thumb">{inside}</span>'
            f'<span class="caption" dir="auto">{_text(short(job.prompt, 100))}</span></a></li>'
        )
    if not cards:
        return "<h2>Your videos</h2><p class='note'>None yet. What you make is kept here, for this browser only.</p>"
    rest = f"Older videos, not shown here: {older}. Each is kept in the server's output folder and opens by its link."
    rest = f'<p class="note">{rest}</p>' if older else ""
    return f"<h2>Your videos</h2><ul>{''.join(cards)}</ul>{rest}"


def _percent(share: float) -> str:
    return f"{int(100 * share)} %"  # 100 only at the end


def _url(file: Path) -> str:
    return f"gradio_api/file={quote(str(file))}"  # relative: the page may lie behind a proxy


def _text(text: Any) -> str:
    return html.escape(str(text))
