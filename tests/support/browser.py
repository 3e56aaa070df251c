"""A browser that shows pages, and what axe says of them."""

import contextlib
import shutil

import pytest


@contextlib.contextmanager
def chromium():
    """Chromium without a window, driven by playwright; skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox"]
        )
        yield opened
        opened.close()


def serious_violations(view):
    """What axe calls serious or critical on a page: rules and their first elements."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(view).response["violations"]
    return [
        (each["id"], each["nodes"][0]["html"])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
