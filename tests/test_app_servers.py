"""The page, where a test wants a server of its own; see serving."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import filelock
import pytest
from playwright.sync_api import expect

from show_1 import video
from tests.hub_server import Hub
from tests.serving import (
    APP,
    LONG,
    PATIENCE,
    ask,
    asking,
    needs_chromium,
    press,
    serve,
    visit,
    wait_for,
    wait_for_step,
)


@needs_chromium
def test_two_visitors_take_turns_and_their_jobs_outlive_a_server_that_is_killed(one_step_cascade, tmp_path, browser):
    with serve(one_step_cascade, tmp_path, "--queue-size", "3") as server:
        context = browser.new_context()
        first, second = visit(context, server), visit(browser, server)
        running = asking(first, "a cat", **LONG)
        wait_for(first, "Stage 1 of 5")
        asking(first, "a cat again")
        last = asking(first, "a last cat")
        wait_for(first, "In the queue: number 3")
        asking(second, "a dog")
        wait_for(second, "In the queue: number 2")  # before the first visitor's second
        wait_for(first, "In the queue: number 4")
        ask(second, "one dog too many")
        toast = second.get_by_test_id("toast-body").filter(has_text="The queue is full: 3 videos are waiting.")
        expect(toast).to_contain_text("Try again in")
        first.goto(f"{server.url}/?job={running}")
        press(first, "Cancel")
        wait_for(second, "Done")
        first.goto(f"{server.url}/?job={last}")
        wait_for(first, "Done")
        expect(first.locator("#gallery li")).to_have_count(2)
        expect(second.locator("#gallery li")).to_have_count(1)
        assert "dog" not in first.locator("#gallery").inner_text()
        running = asking(first, "a long cat", seed="3", **LONG)
        wait_for_step(first, 1)
        waiting = asking(first, "a late cat", seed="4")
        wait_for(first, "In the queue: number 2")
        storage = first.evaluate("() => JSON.stringify(localStorage)")

    # It is killed. After a restart, what was done is still there, and what was not runs and waits as before. (The
    # server has another port now, hence the storage carried over.)
    with serve(one_step_cascade, tmp_path) as server:
        context.add_init_script(f"if (!localStorage.length) Object.assign(localStorage, {storage})")
        page = visit(context, server, f"/?job={waiting}")
        wait_for(page, "In the queue: number 2")
        expect(page.locator("#status")).to_contain_text("Seed 4")
        page.goto(f"{server.url}/?job={running}")
        wait_for_step(page, 1)
        expect(page.locator("#gallery li")).to_have_count(4)
        page.locator("#gallery a").filter(has_text="a last cat").click()
        wait_for(page, "Done")
        page.wait_for_function("() => document.querySelector('#screen video')?.readyState >= 2")
        assert "Traceback" not in server.log.read_text()
    context.close(), second.close()


@needs_chromium
def test_a_page_whose_login_has_ended_with_the_server_asks_to_log_in_again(one_step_cascade, tmp_path, browser):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    flags = ("--auth", "me:secret")
    with serve(one_step_cascade, tmp_path, *flags) as server:
        page.goto(server.url)
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill("secret")
        page.get_by_role("button", name="Login").click()
        page.get_by_label("Prompt", exact=True).wait_for()
        port = int(server.url.rpartition(":")[2])
    expect(page.locator("#away")).to_contain_text("The server does not answer.", timeout=PATIENCE * 1000)
    with serve(one_step_cascade, tmp_path, *flags, port=port):
        page.get_by_label("password").wait_for()
    page.close()


@needs_chromium
def test_another_preset_is_chosen_before_and_after(tiny_cascade, one_step_cascade, tmp_path, browser, request):
    toml = one_step_cascade.read_text()
    request.addfinalizer(lambda: one_step_cascade.write_text(toml))  # other tests have it, too
    one_step_cascade.write_text(toml.replace('"Tiny"', '"One step"'))
    with serve(tiny_cascade, tmp_path) as server:
        page = visit(browser, server)
        page.get_by_role("button", name="Advanced").click()
        expect(page.get_by_label("Keyframes: steps")).to_have_attribute("placeholder", "3")
        page.get_by_role("radio", name="One step").check()
        expect(page.get_by_label("Keyframes: steps")).to_have_attribute("placeholder", "1")
        ask(page, "a cat", seed="5")
        wait_for(page, "Done")
        expect(page.locator("#status")).to_contain_text("Seed 5 · One step")
        before = page.url
        page.get_by_label("Preset for another try").click()
        page.get_by_role("option", name="Tiny", exact=True).click()
        press(page, "Again with this preset")
        page.wait_for_function("before => location.href !== before", arg=before)
        expect(page.locator("#status")).to_contain_text("Seed 5 · Tiny")
        wait_for(page, "Done")
        told = [video.read_metadata(file)["cascade"]["name"] for file in sorted(server.videos(), key=os.path.getmtime)]
        assert told == ["One step", "Tiny"]
        page.close()


@needs_chromium
def test_mini_is_offered_while_the_models_are_fetched(tiny_cascade, tmp_path, browser):
    (tmp_path / "elsewhere").mkdir()
    cascade = shutil.copy(tiny_cascade, tmp_path / "elsewhere")  # no models beside it: they come from the hub
    hub = Hub(tiny_cascade.parent)
    hub.pause = 8
    environment = hub.environment(tmp_path / "home") | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    with serve(cascade, tmp_path, environment=environment) as server:
        page = visit(browser, server, "/?")
        wait_for(page, "Fetching the models")
        expect(page.locator("#progress li").first).to_contain_text(re.compile(r"download.* of [\d.]+ MB", re.DOTALL))
        press(page, "Use Mini meanwhile")
        expect(page.get_by_role("radio", name="Mini", exact=True)).to_be_checked()
        expect(page.locator("#examples")).to_contain_text("a panda jumping in the snow")
        page.get_by_role("radio", name="Mini fast").check()
        ask(page, "a panda in the snow")
        page.wait_for_function("() => document.querySelectorAll('#clips figure').length >= 1")  # it works
        wait_for(visit(browser, server, "/?job=none"), "no such job")
        hub.pause = 0
        page.get_by_role("radio", name="Tiny", exact=True).check()
        ask(page, "a cat")
        wait_for(page, "Done")
        assert "Traceback" not in server.log.read_text()
        page.close()
    hub.stop()


@needs_chromium
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_one_ctrl_c_ends_all(tiny_cascade, tmp_path, browser, how):
    with serve(tiny_cascade, tmp_path) as server:
        page = visit(browser, server)
        asking(page, "a cat", **LONG)
        wait_for_step(page, 1)
        started = time.monotonic()
        server.process.send_signal(how)
        assert server.process.wait(60) == 0
        assert time.monotonic() - started < 20
        page.close()
        said = server.log.read_text()
        assert "Traceback" not in said and "terminate called" not in said
        assert server.videos() == set()
        assert {file.name for file in server.outputs.rglob(".*")} <= {".lock"}


def test_bad_flags_are_told_in_two_sentences(tiny_cascade, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            "minni": ["--cascade", "minni"],
            "cuda:9": ["--device", "cuda:9"],
            port: ["--port", port],
            "no.such.host": ["--server-name", "no.such.host"],
            "file/outputs": ["--output-dir", "file/outputs"],
            "--auth": ["--auth", "me"],
            "--mcp": ["--auth", "me:secret", "--mcp"],
            "queue size": ["--queue-size", "0"],
            "memory": ["--memory", "lots"],
            "locked": ["--output-dir", "locked"],
        }
        (tmp_path / "locked").mkdir()
        lock = filelock.FileLock(tmp_path / "locked" / ".lock")
        lock.acquire()  # as another server has it, until this name is gone
        (tmp_path / "file").touch()
        # One process for all, as each would take seconds to start.
        starts = [["app.py", "--cascade", str(tiny_cascade), "--device", "cpu", *flags] for flags in cases.values()]
        program = f"""
import sys, app
for sys.argv in {starts!r}:
    print("exit code", app.main(), file=sys.stderr)
"""
        environment = os.environ | {"PYTHONPATH": str(APP.parent)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, timeout=PATIENCE
        )
        assert "Traceback" not in done.stderr
        *told, rest = done.stderr.split("exit code 2\n")
        assert not rest and len(told) == len(cases), done.stderr
        for word, said in zip(cases, told, strict=True):
            problem, remedy = said.strip().splitlines()[-2:]
            assert word in problem, said
            assert remedy.endswith((".", "?", "PASSWORD")), said


@needs_chromium
def test_where_there_is_no_tunnel_the_page_says_so(one_step_cascade, tmp_path, browser):
    environment = os.environ | {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    with serve(one_step_cascade, tmp_path, "--share", environment=environment) as server:
        page = visit(browser, server)
        expect(page.locator("#banner")).to_contain_text("There is no public link: the tunnel could not be made.")
        expect(page.locator("#banner")).to_contain_text(server.url)
        page.close()


def test_a_public_link_loads_nothing_from_outside_either(one_step_cascade, tmp_path):
    """Gradio has a page of its own for it, whose script is elsewhere; neither it, nor while the link is being made."""
    program = tmp_path / "app.py"
    program.write_text(f"""
import runpy, sys, time
from gradio import networking

def setup_tunnel(**_):
    time.sleep(2)
    return "https://made-up.gradio.live"

networking.setup_tunnel = setup_tunnel
sys.path.insert(0, {str(APP.parent)!r})
runpy.run_path({str(APP)!r}, run_name="__main__")
""")
    with serve(one_step_cascade, tmp_path, "--share", program=program) as server:
        pages, end = [urlopen(server.url).read().decode()], time.monotonic() + PATIENCE
        while "https://made-up.gradio.live" not in server.log.read_text():
            assert time.monotonic() < end
            time.sleep(0.1)
        pages.append(urlopen(server.url).read().decode())
        for page in pages:
            sources = re.findall(r"""(?:src|href)=["']?(https?://[^"'> ]+)""", page)
            assert "<script" in page and [source for source in sources if not source.startswith(server.url)] == []
