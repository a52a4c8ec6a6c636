"""Jobs on the tiny cascade, in the server's own thread, without a page."""

import json
import os
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from show_1 import Cascade, Show1Error, video
from show_1 import jobs as jobs_module
from show_1.cascade import STAGES
from show_1.jobs import CANCELLED, DONE, FAILED, RUNNING, STOPPED, WAITING, Jobs, duration, enlarge
from show_1.models import UNet3DConditionModel
from show_1.page import form, views
from show_1.pipeline import Clip, Show1Pipeline, StageStart, StepDone, Video
from show_1.timing import PHASES, RELATIVE, Calibration, Cost, Forecast, stage_steps

PATIENCE = 240  # seconds; a guard against hanging, far from what is normal
CPU = torch.device("cpu")
LONG = {"keyframes": {"steps": 900}, "pixel_upscale": {"steps": 900}}  # many minutes, if nothing ends it


calibration = ""  # what the first test has measured: to measure is not what the others are about


@contextmanager
def jobs_in(folder, cascade, limit=12):
    global calibration
    if calibration:
        folder.mkdir(exist_ok=True)
        (folder / "calibration.json").write_text(calibration)
    jobs = Jobs(Cascade.load(cascade), CPU, folder, limit)
    jobs.start()
    try:
        yield jobs
    finally:
        jobs.close(PATIENCE)
        if (folder / "calibration.json").is_file():
            calibration = (folder / "calibration.json").read_text()


@pytest.fixture
def jobs(one_step_cascade, tmp_path):
    with jobs_in(tmp_path, one_step_cascade) as jobs:
        yield jobs


def until(condition, what=""):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def test_a_job_leaves_a_video_clips_a_gif_and_a_record(jobs, tmp_path):
    job = jobs.submit("me", "a cat", 7, {"keyframes": {"steps": 2}})
    until(lambda: job.ended and len(job.clips) == 4)
    assert (job.state, job.fault) == (DONE, "")
    assert jobs.result(job).read_bytes() == (tmp_path / job.file).read_bytes()
    settings = video.read_metadata(jobs.result(job))
    assert (settings["prompt"], settings["seed"], settings["cascade"]["keyframes"]["steps"]) == ("a cat", 7, 2)
    assert job.settings == {key: value for key, value in settings.items() if key != "program"}
    assert list(job.clips) == list(STAGES[:-1])
    for stage, frames in (("keyframes", 3), ("interpolation", 9), ("pixel_upscale", 9)):
        file = jobs.folder_of(job) / job.clips[stage]
        assert len(video.read_frames(file)) == frames
    until(jobs.gif(job).is_file)
    assert (jobs.folder_of(job) / "poster.webp").is_file()
    assert jobs.gif(job).read_bytes().startswith(b"GIF8")
    until(lambda: not list(tmp_path.rglob("*.part")))  # the record is written once more at the end


def test_a_restart_brings_finished_jobs_back_and_takes_up_the_others(tiny_cascade, one_step_cascade, tmp_path):
    with jobs_in(tmp_path, tiny_cascade) as before:
        done = before.submit("me", "a cat")
        until(lambda: done.ended)
        running = before.submit("me", "a dog", None, LONG)
        waiting = before.submit("me", "a fox", 5, {"keyframes": {"steps": 2}}, "one-step")
        called = before.submit("program", "an owl", caller="198.51.100.7")
        until(lambda: running.step)
    record = json.loads((before.folder_of(done) / "job.json").read_text())
    damaged = json.dumps(record | {"created": None}), json.dumps(record | {"file": None}), '{"id": "dam', "[" * 5000
    for number, text in enumerate(damaged):
        (tmp_path / "jobs" / f"damaged-{number}").mkdir()
        (tmp_path / "jobs" / f"damaged-{number}" / "job.json").write_text(text)
    after = Jobs(Cascade.load(tiny_cascade), CPU, tmp_path, 12)
    assert [job.id for job in after.of("me")] == [waiting.id, running.id, done.id]
    assert after.get(done.id).settings == done.settings and after.result(after.get(done.id)).is_file()
    assert after.engine.calibration.has_all(after.engine.cascade)
    again, last = after.get(running.id), after.get(waiting.id)
    assert (again.state, again.seed, again.tries, again.cascade.keyframes.steps) == (WAITING, running.seed, 0, 900)
    assert (last.seed, last.cascade.interpolation.steps, last.cascade.keyframes.steps) == (5, 1, 2)
    assert [job.id for job in after.ahead(last)] == [running.id]
    assert after.get(called.id).state == FAILED and "is gone" in after.get(called.id).fault
    after.cancel("me", again)
    after.start()
    until(lambda: last.ended)
    after.close(PATIENCE)
    assert last.state == DONE and video.read_metadata(after.result(last))["seed"] == 5
    # The secret that makes a visitor is nowhere on the disk.
    assert not any('"me"' in file.read_text() for file in tmp_path.rglob("*.json"))


def test_a_job_that_took_the_server_down_twice_is_not_taken_up_again(tiny_cascade, tmp_path):
    with jobs_in(tmp_path, tiny_cascade) as jobs:
        job = jobs.submit("me", "a cat", None, LONG)
        until(lambda: job.step)
        record = json.loads((jobs.folder_of(job) / "job.json").read_text())
        before = jobs.submit("me", "a dog")
        before.created = 0.0  # asked for longer ago, and yet behind
    for tries, state in ((1, WAITING), (2, FAILED)):
        assert record["state"] == RUNNING  # as a server that is killed leaves it
        (jobs.folder_of(job) / "job.json").write_text(json.dumps(record | {"tries": tries}))
        jobs._save(before)
        again = Jobs(Cascade.load(tiny_cascade), CPU, tmp_path, 12)
        after = again.get(job.id)
        assert after.state == state and again.ahead(after) == []
    assert after.fault.startswith("The server ended 2 times while it made this video.")


def test_what_is_broken_off_is_left_to_the_next_start_and_what_was_cancelled_is_not(tiny_cascade, tmp_path):
    def stored() -> dict:
        return json.loads((jobs.folder_of(job) / "job.json").read_text())

    for wish, patience, left in (("", 0, WAITING), ("cancel", 0, CANCELLED), ("cancel", PATIENCE, CANCELLED)):
        jobs = Jobs(Cascade.load(tiny_cascade), CPU, tmp_path, 12)
        jobs.start()
        job = jobs.submit("me", "a cat", None, LONG)
        until(lambda job=job: job.step)
        if wish:
            jobs.cancel("me", job)
        jobs.close(patience)
        assert (stored()["state"], stored()["tries"]) == (left, 0 if patience == 0 else 1)
        jobs.close(PATIENCE)  # a step that took longer than the patience ends nothing once more
        assert (stored()["state"], stored()["tries"]) == (left, 0 if patience == 0 else 1)
        (jobs.folder_of(job) / "job.json").unlink()


def test_a_start_clears_away_what_the_end_of_the_server_left_behind(one_step_cascade, tmp_path):
    with jobs_in(tmp_path, one_step_cascade) as before:
        job = before.submit("me", "a cat")
        until(lambda: job.ended and len(job.clips) == 4)
    record = before.folder_of(job) / "job.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"state": CANCELLED}))
    (before.folder_of(job) / ".show-1-half").mkdir()
    (before.folder_of(job) / ".show-1-half" / "video.gif").touch()
    (before.folder_of(job) / ".poster.webp.part").touch()
    for name, age in (("old", 7200), ("new", 60)):  # the new one may be the command line's
        (tmp_path / f".show-1-{name}").mkdir()
        os.utime(tmp_path / f".show-1-{name}", (time.time() - age,) * 2)
    after = Jobs(Cascade.load(one_step_cascade), CPU, tmp_path, 12)
    until(lambda: [file.name for file in after.folder_of(job).iterdir()] == ["job.json"])
    until(lambda: after.get(job.id).clips == {})
    assert [file.name for file in tmp_path.glob(".*")] == [".show-1-new"]


def test_a_preset_that_is_gone_is_told(tiny_cascade, tmp_path):
    jobs = Jobs(Cascade.load(tiny_cascade), CPU, tmp_path, 12)
    job = jobs.submit("me", "a cat")
    record = json.loads((jobs.folder_of(job) / "job.json").read_text())
    (jobs.folder_of(job) / "job.json").write_text(json.dumps(record | {"preset": "show-1"}))
    after = Jobs(Cascade.load(tiny_cascade), CPU, tmp_path, 12).get(job.id)
    assert (after.state, after.fault[:34]) == (FAILED, "There is no preset 'show-1' here. ")
    assert json.loads((jobs.folder_of(job) / "job.json").read_text())["state"] == WAITING  # for when it is here again


def test_a_restart_in_mid_job_takes_nobodys_turn(tiny_cascade, tmp_path):
    jobs = Jobs(Cascade.load(tiny_cascade), CPU, tmp_path, 12)  # not started: all wait
    mine = [jobs.submit("me", "a cat") for _ in range(3)]
    yours = [jobs.submit("you", "a cat") for _ in range(3)]
    mine[0].state, mine[0].tries = RUNNING, 1
    jobs._save(mine[0])
    again = Jobs(Cascade.load(tiny_cascade), CPU, tmp_path, 12)
    turns = [job for pair in zip(mine, yours, strict=True) for job in pair]
    assert [len(again.ahead(again.get(job.id))) for job in turns] == list(range(6))


def test_presets_are_the_cascades_of_the_same_models_and_mini(tiny_cascade, one_step_cascade, tmp_path):
    (tiny_cascade.with_name("other.toml")).write_text(
        tiny_cascade.read_text().replace('model = "showlab/show-1-base"', 'model = "showlab/another"')
    )
    jobs = Jobs(Cascade.load(tiny_cascade), CPU, tmp_path, 12)
    assert list(jobs.presets) == ["cascade", "one-step", "mini", "mini-fast"]
    assert list(Jobs(Cascade.load("mini-fast"), CPU, tmp_path, 12).presets) == ["mini-fast", "mini"]
    assert list(Jobs(Cascade.load("show-1"), CPU, tmp_path, 12).presets)[:2] == ["show-1", "show-1-fast"]
    assert jobs.submit("me", "a cat", preset="one-step").cascade.keyframes.steps == 1
    for wrong in ("show-1", 7):
        with pytest.raises(Show1Error, match=r"no preset .* Take one of cascade, one-step, mini, mini-fast\."):
            jobs.submit("me", "a cat", preset=wrong)


def test_a_browser_goes_before_loading_and_a_job_before_a_browser(one_step_cascade, tmp_path):
    jobs = Jobs(Cascade.load(one_step_cascade), CPU, tmp_path, 12)
    before = jobs.engine.preparation
    jobs.start(head_start=PATIENCE)
    try:
        time.sleep(0.5)
        assert jobs.engine.preparation is before
        job = jobs.submit("me", "a cat")
        until(lambda: job.ended)
        assert job.state == DONE
    finally:
        jobs.close(PATIENCE)


def test_a_new_computer_is_measured_before_anybody_asks(one_step_cascade, tmp_path):
    jobs = Jobs(Cascade.load(one_step_cascade), CPU, tmp_path, 12)
    assert not jobs.engine.calibration.has_all(jobs.engine.cascade)
    jobs.start()
    try:
        until(lambda: jobs.engine.preparation is None)
        assert jobs.engine.calibration.has_all(jobs.engine.cascade)
        assert (tmp_path / "calibration.json").is_file() and not list(tmp_path.glob("*.mp4"))
    finally:
        jobs.close(PATIENCE)


def test_mini_runs_while_the_models_are_still_coming(one_step_cascade, tmp_path, monkeypatch):
    real, may_load = Show1Pipeline.from_cascade, threading.Event()
    tiny = Cascade.load(one_step_cascade)

    def load(cascade, *arguments, **options):
        if cascade.name == "Mini":  # which is too slow for a test: only what happens around it counts
            return real(tiny, *arguments, **options)
        assert may_load.wait(PATIENCE)
        return real(cascade, *arguments, **options)

    monkeypatch.setattr(Show1Pipeline, "from_cascade", load)
    monkeypatch.setattr(
        jobs_module.Jobs, "changed_cascade", lambda self, preset, changes: self.presets[preset] and tiny
    )
    with jobs_in(tmp_path, one_step_cascade) as jobs:
        large, small = jobs.submit("me", "a cat"), jobs.submit("me", "a cat", preset="mini")
        until(lambda: small.ended)
        assert small.state == DONE and large.state == WAITING and jobs.engine.preparation.phase == "loading"
        may_load.set()
        until(lambda: large.ended)
        assert large.state == DONE


def test_cancel_ends_it_within_a_step_and_the_next_one_runs(jobs):
    first, second = jobs.submit("me", "a cat", None, LONG), jobs.submit("you", "a dog")
    third = jobs.submit("you", "a fox")
    until(lambda: first.step > 2)
    with pytest.raises(Show1Error, match="somebody else's"):
        jobs.cancel("you", first)
    jobs.cancel("you", third)
    assert third.state == CANCELLED  # at once, as it only waited
    jobs.cancel("me", first)
    step = first.step
    until(lambda: second.step)
    assert first.state == CANCELLED and first.step <= step + 1
    assert jobs.result(first) is None
    until(lambda: [file.name for file in jobs.folder_of(first).iterdir()] == ["job.json"])  # that it was, no more
    until(lambda: second.ended)
    assert second.state == DONE


def test_the_next_job_is_a_step_and_a_second_behind_a_cancel(jobs):
    def seconds_beside_a_step() -> float:
        first, second = jobs.submit("me", "a cat", None, LONG), jobs.submit("you", "a dog", None, LONG)
        until(lambda: first.forecast and first.forecast.timed_steps)
        step = first.forecast.timed / first.forecast.timed_steps
        started = time.monotonic()
        jobs.cancel("me", first)
        until(lambda: second.step)
        seconds = time.monotonic() - started
        jobs.cancel("you", second)
        until(lambda: second.ended)
        return seconds - step

    assert any(seconds_beside_a_step() < 1 for _ in range(3))  # thrice, where others hold it up


def test_a_cancel_while_the_video_is_written_leaves_none(jobs, monkeypatch):
    write = video.write

    def cancelled_meanwhile(path, *rest, **options):
        write(path, *rest, **options)
        for job in jobs.of("me"):
            if path == jobs.folder / job.file:
                jobs.cancel("me", job)

    monkeypatch.setattr(video, "write", cancelled_meanwhile)
    job = jobs.submit("me", "a cat")
    until(lambda: job.ended)
    assert (job.state, job.settings, jobs.result(job)) == (CANCELLED, None, None)
    until(lambda: [file.name for file in jobs.folder_of(job).iterdir()] == ["job.json"])
    assert list(jobs.folder.glob("*.mp4")) == []


def test_stop_keeps_the_last_clip_as_the_result(jobs):
    job = jobs.submit("me", "a cat", 7, {"first_frame": {"steps": 900}})
    with pytest.raises(Show1Error, match="no clip yet"):
        jobs.stop("me", job)
    until(lambda: job.stage == "first_frame" and job.step)
    jobs.stop("me", job)
    until(lambda: job.ended)
    assert (job.state, job.fault) == (STOPPED, "")
    assert job.settings["stopped_after"] == "interpolation"
    assert video.read_metadata(jobs.result(job))["seed"] == 7
    assert len(video.read_frames(jobs.result(job))) == 9
    jobs.stop("me", job)  # clicked once more, a moment too late
    said = views.what(jobs, job)
    (jobs.folder / job.file).unlink()
    assert said.startswith("Stopped after the interpolation")
    assert views.what(jobs, job) == "This video's file is gone from the server"


def test_turns_are_fair_and_the_queue_is_bounded(tiny_cascade, tmp_path):
    jobs = Jobs(Cascade.load(tiny_cascade), CPU, tmp_path, 6)  # not started: all wait
    mine = [jobs.submit("me", "a cat") for _ in range(3)]
    yours = [jobs.submit("you", "a cat") for _ in range(3)]
    turns = [job for pair in zip(mine, yours, strict=True) for job in pair]
    assert [len(jobs.ahead(job)) for job in turns] == list(range(6))
    with pytest.raises(Show1Error, match=r"The queue is full: 6 videos are waiting\. Try again in"):
        jobs.submit("them", "a cat")
    jobs.cancel("me", mine[1])
    jobs.submit("them", "a cat")


def test_who_asks_anew_each_time_does_not_keep_others_waiting(jobs):
    mine = [jobs.submit("me", "a cat", None, LONG) for _ in range(2)]
    running = mine[0]
    for visitor, others in (("you", []), ("them", [])):  # each has its first turn before the second of mine
        following = jobs.submit(visitor, "a dog", None, LONG)
        until(lambda running=running: running.step)
        assert jobs.ahead(following) == [running, *others]
        jobs.cancel("me" if running is mine[0] else "you", running)
        running = following
    until(lambda: running.step)
    again = jobs.submit("you", "a dog", None, LONG)
    assert jobs.ahead(again) == [running, mine[1]]
    for visitor, job in (("them", running), ("me", mine[1]), ("you", again)):
        jobs.cancel(visitor, job)


def test_programs_at_one_address_take_turns_as_one(tiny_cascade, tmp_path):
    jobs = Jobs(Cascade.load(tiny_cascade), CPU, tmp_path, 6)  # not started: all wait
    first, second, third = (jobs.submit(f"call {number}", "a cat", caller="198.51.100.7") for number in range(3))
    mine, theirs = jobs.submit("me", "a cat"), jobs.submit("another call", "a cat", caller="198.51.100.8")
    assert [len(jobs.ahead(job)) for job in (first, mine, theirs, second, third)] == list(range(5))


def test_many_at_once_never_exceed_the_queue(tiny_cascade, tmp_path):
    jobs = Jobs(Cascade.load(tiny_cascade), CPU, tmp_path, 3)
    refused = []

    def ask():
        try:
            jobs.submit("me", "a cat")
        except Show1Error:
            refused.append(1)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(jobs.of("me")) == 3 and len(refused) == 5


@pytest.mark.parametrize(
    "prompt, seed, changes, words",
    [
        ("  \n", None, {}, "The prompt is empty"),
        ("a" * 10_001, None, {}, "10,001 characters"),
        ("half an \ud83d", None, {}, "half a character"),
        ("a cat", 1, {"latent_upscale": {"negative_prompt": "\ud83d"}}, "negative_prompt cannot be"),
        ("a cat", 1, {"latent_upscale": {"negative_prompt": "a" * 10_001}}, "at most 10,000 characters"),
        ("a cat", -1, {}, "seed cannot be -1"),
        ("a cat", 2**60, {}, "seed cannot be"),
        ("a cat", "seven", {}, "seed cannot be 'seven'"),
        ("a cat", 1, {"keyframes": {"steps": 0}}, "steps cannot be 0. Give steps a whole number from 1 to 1000"),
        ("a cat", 1, {"keyframes": {"steps": 10_000}}, "steps cannot be 10000"),
        ("a cat", 1, {"keyframes": {"guidance": float("nan")}}, "guidance cannot be NaN"),
        ("a cat", 1, {"keyframes": {"height": 4000}}, "no 'height' that could be changed"),
        ("a cat", 1, {"painting": {"steps": 1}}, "no stage 'painting'"),
        ("a cat", 1, {"latent_upscale": {"steps": 1}}, "leaves no step to run"),
        ("a cat", 1, {"keyframes": 3}, "no stage 'keyframes' with a table"),
        ("a cat", 1, ["keyframes"], "no table of stages"),
    ],
)
def test_bad_input_is_refused_in_two_sentences(tiny_cascade, tmp_path, prompt, seed, changes, words):
    jobs = Jobs(Cascade.load(tiny_cascade), CPU, tmp_path, 12)
    with pytest.raises(Show1Error) as error:
        jobs.submit("me", prompt, seed, changes)
    assert words in str(error.value)
    assert not jobs.of("me") and not list(tmp_path.iterdir())


def test_odd_prompts_are_kept_as_they_are(jobs):
    prompts = ["قطة تقفز في الثلج", "🐼 in the ❄️", "one\ntwo\tthree", "<script>alert(1)</script> ../../etc\0/passwd"]
    made = [jobs.submit("me", prompt) for prompt in prompts]
    for job, prompt in zip(made, prompts, strict=True):
        until(lambda job=job: job.ended)
        assert job.state == DONE, job.fault
        assert video.read_metadata(jobs.result(job))["prompt"] == prompt
        assert (jobs.folder / job.file).parent == jobs.folder and jobs.result(job).parent == jobs.folder_of(job)


def test_a_failure_in_a_stage_ends_its_job_and_not_the_queue(jobs, monkeypatch):
    real, calls = UNet3DConditionModel.forward, []

    def broken(self, *arguments, **options):
        if jobs.of("me")[-1].stage == "interpolation":
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("a kernel died")
        return real(self, *arguments, **options)

    def broken_too():
        raise RuntimeError("a kernel died")  # as CUDA says of all that is asked of it after that

    monkeypatch.setattr(torch.cuda, "empty_cache", broken_too)
    monkeypatch.setattr(UNet3DConditionModel, "forward", broken)
    first, second = jobs.submit("me", "a cat", changes={"interpolation": {"steps": 2}}), jobs.submit("me", "a dog")
    until(lambda: second.ended)
    assert first.state == FAILED and first.fault.startswith("Making this video failed; ")
    assert (first.stage, first.step) == ("interpolation", 1)
    assert second.state == DONE


def test_the_output_folder_may_go_and_come(one_step_cascade, tmp_path):
    with jobs_in(tmp_path / "outputs", one_step_cascade) as jobs:
        job = jobs.submit("me", "a cat", None, LONG)
        until(lambda: job.step)
        for file in sorted((tmp_path / "outputs").rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (tmp_path / "outputs").rmdir()
        (tmp_path / "outputs").touch()
        with pytest.raises(Show1Error, match=r"The output folder .* is gone"):
            jobs.submit("me", "a dog")
        jobs.cancel("me", job)
        until(lambda: job.ended)
        (tmp_path / "outputs").unlink()
        second = jobs.submit("me", "a dog", None, {"keyframes": {"steps": 60}})
        until(lambda: second.step)
        shutil.rmtree(tmp_path / "outputs")
        until(lambda: second.ended)
        assert second.state == DONE and jobs.result(second), second.fault
        third = jobs.submit("me", "a fox", None, {"first_frame": {"steps": 900}})
        until(lambda: third.step and "interpolation" in third.clips)
        shutil.rmtree(tmp_path / "outputs")
        jobs.stop("me", third)
        until(lambda: third.ended)
        assert third.state == STOPPED and jobs.result(third), third.fault


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 24 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_ends_a_job_with_a_sentence_and_leaves_nothing_half_written(tiny_cascade, small_disk):
    with jobs_in(small_disk, tiny_cascade) as jobs:
        job = jobs.submit("me", "a cat", None, {"interpolation": {"steps": 30}})
        unwanted = jobs.submit("me", "an owl", None, LONG)
        until(lambda: job.stage == "interpolation")
        until(lambda: "keyframes" in job.clips)
        with (small_disk / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space left"):
            while True:
                ballast.write(bytes(4096))
        jobs.cancel("me", unwanted)
        assert not (jobs.folder_of(unwanted) / "job.json").exists()  # as it was, it would be made after a restart
        until(lambda: job.ended)
        assert job.state == FAILED and "No space left on device. Free some space there" in job.fault
        assert any("first_frame.png cannot be written" in notice for notice in job.notices), job.notices
        with pytest.raises(Show1Error, match="No space left on device"):
            jobs.submit("me", "a dog")
        whole = {"ballast", "calibration.json", "job.json", "keyframes.mp4"}
        until(lambda: {file.name for file in small_disk.rglob("*") if file.is_file()} <= whole)  # once writers gave up
        (small_disk / "ballast").unlink()
        second = jobs.submit("me", "a dog")
        until(lambda: second.ended)
        assert second.state == DONE, second.fault


def test_models_that_do_not_load_are_told_and_tried_again(one_step_cascade, tmp_path, monkeypatch):
    real, loads = Show1Pipeline.from_cascade, []

    def refused(*_, **__):
        loads.append(len(loads))
        raise Show1Error("Gated.", "Log in.")

    monkeypatch.setattr(Show1Pipeline, "from_cascade", refused)
    waited = Jobs(Cascade.load(one_step_cascade), CPU, tmp_path, 12).submit("me", "an owl").id
    with jobs_in(tmp_path, one_step_cascade) as jobs:
        until(lambda: jobs.get(waited).ended)
        assert loads == [0]  # not again for the very job that it was for
        first = jobs.submit("me", "a cat")
        until(lambda: first.ended)
        assert (first.state, first.fault) == (FAILED, "Gated. Log in.")
        assert jobs.engine.preparation.text.endswith("Gated. Log in.")
        monkeypatch.setattr(Show1Pipeline, "from_cascade", real)
        second = jobs.submit("me", "a cat")
        until(lambda: second.ended)
        assert second.state == DONE and jobs.engine.preparation is None


def test_a_failure_to_load_is_not_told_to_who_comes_later(one_step_cascade, tmp_path, monkeypatch):
    real = Show1Pipeline.from_cascade

    def refused(*_, **__):
        jobs.cancel("me", first)
        monkeypatch.setattr(Show1Pipeline, "from_cascade", real)
        raise Show1Error("Gated.", "Log in.")

    monkeypatch.setattr(Show1Pipeline, "from_cascade", refused)
    jobs = Jobs(Cascade.load(one_step_cascade), CPU, tmp_path, 12)
    first = jobs.submit("me", "a cat")
    jobs.start()
    try:
        until(lambda: first.ended and jobs.engine.preparation.phase == "failed")
        later = jobs.submit("me", "a dog")
        until(lambda: later.ended)
        assert (first.state, later.state) == (CANCELLED, DONE), later.fault
    finally:
        jobs.close(PATIENCE)


# ---------------------------------------------------------------------------------------------------------- the time


def simulate(cascade, real, costs, pace=1.0, calls=None):
    """Return (time, left) at each event of a video whose phases cost what `real` says, and how long it took.

    `calls` says for stages whose steps are not alike for how many clips each step calls the UNet.
    """
    clock, told = 0.0, []
    forecast = Forecast(cascade, costs, clock)
    clock += pace * real["prompt"].finish
    for stage, steps in stage_steps(cascade).items():
        forecast.follow(StageStart(stage, steps), clock)
        each = (calls or {}).get(stage, [1] * steps)
        for number in range(steps):
            share = each[number] * steps / sum(each)
            clock += pace * (share * real[stage].step + (0 if number else real[stage].setup))
            forecast.follow(StepDone(stage, number + 1, steps, None), clock)
            told.append((clock, forecast.left(clock)))
        clock += pace * real[stage].finish
        phase, cost = forecast.follow(Clip(stage, None), clock)
        assert phase == stage
        assert steps == 1 or cost.step == pytest.approx(pace * real[stage].step)
        told.append((clock, forecast.left(clock)))
    assert cost.finish == pytest.approx(pace * real[STAGES[-1]].finish)
    clock += pace * real["file"].finish
    assert forecast.follow(Video(None, {}, {}), clock)[0] == "file"
    return told, clock


@pytest.mark.parametrize("pace", [0.3, 0.7, 0.8, 1.0, 1.3, 3.0])
def test_the_time_left_is_right_at_a_quarter_of_the_way_whatever_else_the_device_does(pace):
    cascade = Cascade.load("show-1")
    real = {stage: Cost(number, 0.1 * (number + 1) ** 2, 3) for number, stage in enumerate(STAGES)}
    real |= {"prompt": Cost(0, 0, 4), "file": Cost(0, 0, 5)}
    told, total = simulate(cascade, real, real, pace)
    for clock, left in told:
        if clock > total / 4:
            assert left == pytest.approx(total - clock, rel=0.2, abs=1)


def test_without_costs_the_first_steps_tell_the_pace():
    cascade = Cascade.load("mini")
    real = {phase: Cost(7 * cost.setup, 7 * cost.step, 7 * cost.finish) for phase, cost in RELATIVE.items()}
    told, total = simulate(cascade, real, None)
    assert told[3][1] == pytest.approx(total - told[3][0], rel=0.05)


def test_without_costs_the_very_first_step_which_warms_up_tells_nothing():
    cascade = Cascade.load("mini")
    real = RELATIVE | {"keyframes": Cost(20, 1, 0)}
    told, total = simulate(cascade, real, None)
    assert told[0][1] is None
    assert told[1][1] == pytest.approx(total - told[1][0], rel=0.05)


def test_a_guided_step_counts_twice():
    """With costs and a pace that are right the time left is right at each step, guided or not."""
    cascade = Cascade.load("mini").override(["keyframes.guidance_interval=[500, 999]"])
    calls = {"keyframes": [2] * 7 + [1] * 5}  # its twelve timesteps: 999, 916, … 500, and 416, … 83
    told, total = simulate(cascade, RELATIVE, RELATIVE, calls=calls)
    for clock, left in told:
        assert left == pytest.approx(total - clock, rel=0.01, abs=0.01)


def test_what_one_preset_costs_is_known_from_another():
    calibration = Calibration(Path("none.json"), "gpu")
    cascade, fast = Cascade.load("show-1"), Cascade.load("show-1-fast")
    for stage in STAGES:
        calibration.learn(cascade, stage, Cost(1, 2, 3))
    costs, unguided = calibration.costs(fast), calibration.costs(cascade.override(["keyframes.guidance=1"]))
    assert unguided["keyframes"] == Cost(1, 1, 3) and unguided["interpolation"] == Cost(1, 2, 3)
    assert costs["keyframes"].step < 2 and costs["first_frame"].finish == 3
    assert not calibration.has_all(fast)


def test_costs_are_kept_by_device_and_damage_only_means_to_learn_anew(tmp_path):
    cascade, file = Cascade.load("mini"), tmp_path / "calibration.json"
    gpu, cpu = Calibration(file, "gpu"), Calibration(file, "cpu")
    assert gpu.costs(cascade) is None
    gpu.learn(cascade, "keyframes", Cost(1, 2, 3))
    gpu.learn(cascade, "keyframes", Cost(3, 4, 5))
    gpu.learn_loading(cascade, 12.5)
    gpu.save()
    cpu.learn(cascade, "keyframes", Cost(10, 20, 30))
    cpu.save()
    again = Calibration(file, "gpu")
    assert again.costs(cascade)["keyframes"] == Cost(2, 3, 4) and again.loading(cascade) == 12.5
    assert again.costs(cascade)["first_frame"].step == pytest.approx(3 * RELATIVE["first_frame"].step)
    for damage in ("", "[]", '{"gpu": 3}', '{"gpu": {"a": {"b": 1}}}', json.dumps({"gpu": {"a": None}})):
        file.write_text(damage)
        assert Calibration(file, "gpu").costs(cascade) is None


def test_words_for_times():
    times = {
        0.2: "1 s",
        42: "42 s",
        61: "1 min",
        89: "1 min 30 s",
        203: "3 min 25 s",
        620: "10 min",
        4800: "1 h 20 min",
    }
    assert {seconds: duration(seconds) for seconds in times} == times


def test_a_phase_does_not_end_while_the_time_left_is_counted():
    ends = []

    class Costs(dict):
        def __getitem__(self, phase):
            if ends and not ends[0].is_alive():
                ends[0].start()  # in another thread, as the video's is; it has to wait for the answer
                ends[0].join(0.2)
            return super().__getitem__(phase)

    forecast = Forecast(Cascade.load("mini"), Costs.fromkeys(PHASES, Cost(1, 1, 1)), 0.0)
    forecast.follow(StageStart("keyframes", 12), 1.0)
    forecast.follow(StepDone("keyframes", 1, 12, None), 2.0)
    ends.append(threading.Thread(target=forecast.follow, args=(Clip("keyframes", None), 3.0)))
    with_the_phase = forecast.left(2.0)
    ends.pop().join()
    assert forecast.left(3.0) < with_the_phase


def test_sharp_clips():
    for height, width, factor in ((5, 7, 32), (33, 7, 6), (40, 64, 4), (200, 300, 1)):
        frames = torch.arange(2 * height * width * 3).view(2, height, width, 3).to(torch.uint8).numpy()
        larger = enlarge(frames)
        assert larger.shape == (2, factor * height, factor * width, 3)
        assert (larger[:, ::factor, ::factor] == frames).all() and (larger[:, -1, -1] == frames[:, -1, -1]).all()


def test_the_gallery_tells_how_many_older_videos_it_leaves_out(tiny_cascade, tmp_path, monkeypatch):
    monkeypatch.setattr(views, "IN_GALLERY", 2)
    jobs = Jobs(Cascade.load(tiny_cascade), CPU, tmp_path, 12)
    made = [jobs.submit("me", "a cat") for _ in range(5)]
    jobs.cancel("me", made[0])
    gallery = views.view(jobs, "", None, "me")["gallery"]
    assert gallery.count("<li") == 2 and "Older videos, not shown here: 2. Each is kept" in gallery
    for job in made[1:3]:
        jobs.cancel("me", job)
    assert "Older" not in views.view(jobs, "", None, "me")["gallery"]
    made[3].state = FAILED
    assert '<span class="badge">failed</span>' in views.view(jobs, "", None, "me")["gallery"]


def test_a_job_with_settings_of_its_own_still_names_the_words_that_mini_does_not_know(tmp_path):
    jobs = Jobs(Cascade.load("mini"), CPU, tmp_path, 12)
    for changes in ({}, {"keyframes": {"steps": 2}}):
        job = jobs.submit("me", "a cute panda", changes=changes)
        assert job.cascade.unknown_words(job.prompt) == ["cute"]


def test_settings_are_written_into_the_form_as_it_reads_them():
    changes = {"keyframes": {"guidance": 1.5}, "latent_upscale": {"steps": 3, "negative_prompt": ""}}
    assert form.changes(tuple(form.texts(changes))) == changes
    assert not any(form.texts({}))
