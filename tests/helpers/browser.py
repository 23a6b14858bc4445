"""A real browser that opens pages from files."""

import os
import shutil
from contextlib import contextmanager
from importlib.util import find_spec


CHROMIUM = os.environ.get("LLAMAFACTORY_ADAPTIVE_CHROMIUM") or shutil.which("chromium") or ""
HAS_BROWSER = bool(CHROMIUM) and find_spec("playwright") is not None


@contextmanager
def opened_files():
    """A function that opens a file in a window of a width, in light or dark, and gives its page.

    What goes wrong there is in ``page.faults``: errors of scripts, dialogs, requests for anything but the file.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)

        def open_file(path, width=1280, scheme="light"):
            page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
            page.faults = faults = []
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda message: message.type == "error" and faults.append(message.text))
            page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
            allowed = (path.as_uri(), "data:")
            page.on("request", lambda asked: asked.url.startswith(allowed) or faults.append(asked.url))
            page.goto(path.as_uri())
            return page

        yield open_file
        browser.close()
