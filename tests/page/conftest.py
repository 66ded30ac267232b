"""Fixtures: headless Chromium, and the mock router of a scenario or the router at OVERFILL_PAGE_URL.

    apt-get install chromium chromium-driver
    pip install -r tests/page/requirements.txt
    pytest tests/page
    OVERFILL_PAGE_URL=http://localhost:8080 OVERFILL_PAGE_KEY=... pytest tests/page

The second run skips the tests that need invented data. OVERFILL_PAGE_KEY is needed if the router has API keys.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from driver import Page, browser
from mock import Router

REAL = os.environ.get("OVERFILL_PAGE_URL", "").rstrip("/").removesuffix("/page")


def pytest_configure(config):
    config.addinivalue_line("markers", "scenario(name, rate): the mock's scenario; without `anywhere`, the test needs the mock")
    config.addinivalue_line("markers", "anywhere: the test also runs against the router at OVERFILL_PAGE_URL")


def pytest_collection_modifyitems(items):
    for item in items:
        if REAL and not item.get_closest_marker("anywhere"):
            item.add_marker(pytest.mark.skip(reason="needs the mock"))


@pytest.fixture(scope="session")
def chromium():
    yield from opened()


@pytest.fixture
def traced_chromium():
    yield from opened(traced=True)


def opened(traced=False):
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver")
    driver = browser(traced)
    yield driver
    driver.quit()


@pytest.fixture
def router(request):
    """The mock, or None if the tests run against a real router."""
    if REAL:
        yield None
        return
    marker = request.node.get_closest_marker("scenario")
    name, rate = (*(marker.args if marker else ("busy",)), 400.0)[:2]
    mock = Router(name, rate=rate).start()
    yield mock
    mock.shutdown()
    mock.server_close()


@pytest.fixture
def page(chromium, router):
    yield from checked(chromium, router)


@pytest.fixture
def traced_page(traced_chromium, router):
    yield from checked(traced_chromium, router)


def checked(chromium, router):
    """A page. At the end, it must have had neither errors nor violations of the CSP."""
    page = Page(chromium, router.url if router else REAL)
    page.key = "" if router else os.environ.get("OVERFILL_PAGE_KEY", "")
    yield page
    faults = page.faults()
    page.close()
    assert faults == []
