"""The files of the page, without a browser."""

import hashlib
import re

import pytest
from mock import STATIC

OWN = sorted(p for p in STATIC.iterdir() if p.is_file())
VENDOR = STATIC / "vendor"


@pytest.mark.anywhere
@pytest.mark.parametrize("path", OWN, ids=lambda p: p.name)
def test_own_files(path):
    text = path.read_text()
    assert len(text.splitlines()) < 500
    # The page loads nothing from elsewhere. A namespace is a name, not an address.
    assert re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", text.replace("http://www.w3.org/2000/svg", "")) == []
    # Each of these would need a weaker CSP.
    assert re.findall(r"\bstyle=\"|\son[a-z]+=\"|innerHTML|\beval\(|new Function|data:[a-z]+/", text) == []


@pytest.mark.anywhere
def test_each_module_is_there():
    for path in OWN:
        for name in re.findall(r"(?:from|import) '\./([^']+)'", path.read_text()):
            assert (STATIC / name).is_file(), f"{path.name} imports {name}"


@pytest.mark.anywhere
def test_vendored_files_are_what_the_readme_says():
    sums = dict(reversed(line.split()) for line in re.findall(r"^    ([0-9a-f]{64}  \S+)$", (VENDOR / "README.md").read_text(), re.M))
    code = {p.name for p in VENDOR.iterdir() if p.suffix in (".js", ".css")}
    assert set(sums) == code
    for name, expected in sums.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == expected
