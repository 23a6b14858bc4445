"""LLaMA Board in a process of its own, on loopback, and a browser that drives it."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.browser import browser
from tests.helpers.commands import BIN


_START_SECONDS = 600.0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def board(folder: Path, **environment):
    """The address of a board whose working folder is ``folder``; its log is board.log there."""
    port = free_port()
    env = {
        **os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "BROWSER": "true",
        "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False",
        **environment,
    }  # fmt: skip
    with (folder / "board.log").open("wb") as log:
        process = subprocess.Popen(["llamafactory-cli", "webui"], cwd=folder, env=env, stdout=log, stderr=log,
                                   start_new_session=True)  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(address, process, folder / "board.log")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(address, process, log):
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            assert process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(0.5)
        else:
            return


@contextmanager
def browser_page(address, width=1280, height=1000):
    """A page of the board in a real browser: no request leaves the machine, ``page.faults`` has errors of scripts."""
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        page.route("**/*", lambda route: route.continue_() if route.request.url.startswith(address) else route.abort())
        page.faults = faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))  # before the page's own scripts run
        page.set_default_timeout(60_000)
        page.goto(address)
        yield page


def field(page, label):
    """The visible field under that label; the host gives its components no ids."""
    title = page.get_by_test_id("block-info").get_by_text(label, exact=True).locator("visible=true").first
    block = title.locator("xpath=ancestor::div[contains(concat(' ', @class, ' '), ' block ')][1]")
    return block.locator("input, textarea").first


def choose(page, label, text):
    """Choose from the dropdown under that label, by what is typed there."""
    box = field(page, label)
    box.click()
    box.fill(text)
    page.get_by_role("option", name=text, exact=True).locator("visible=true").first.click()


def fill(page, label, text):
    """Fill the field under that label, and leave it."""
    box = field(page, label)
    box.fill(text)
    box.press("Tab")
