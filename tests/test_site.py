"""The documentation site, built as `make docs` does: strict, from this repository alone, and right in a browser.

`python tests/test_site.py FOLDER PAGE...` writes a picture of pages of site/ into a folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from chromium import Chromium, need_chromium
from test_reference import PUBLIC

from sparsekit.patterns import pattern_names

ROOT = Path(__file__).parents[1]
# One of each kind.
KINDS = (
    *("index.html", "tutorial.html", "concepts.html", "config.html", "compatibility.html", "leaderboard.html"),
    *("patterns/index.html", "patterns/triangle.html", "patterns/flexprefill.html", "results/index.html"),
    *("reference/index.html", "reference/sparsekit.html", "CONTRIBUTING.html", "CHANGELOG.html", "configs.html"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed: `make docs` installs it"),
]


def _build(repository: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(out)]
    env = {**os.environ, "PYTHONPATH": str(repository), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    built = _build(ROOT, out)
    assert built.returncode == 0, built.stderr[-3000:]
    return out


class _Loads(HTMLParser):
    """What a page makes a browser load, which links that a reader follows are not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.found.append(given.get("src") or "")
        if tag == "link" and given.get("rel") != "canonical":
            self.found.append(given.get("href") or "")


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        loads = _Loads()
        loads.feed(page.read_text())
        assert not [url for url in loads.found if re.match(r"(https?:)?//", url)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text()), style


def test_lists_are_lists(site: Path) -> None:
    """What a Git host reads as a list, and the site's Markdown as lines of a paragraph: its indent is not four."""
    for page in site.rglob("*.html"):
        for paragraph in re.findall(r"<p>(.*?)</p>", page.read_text(), re.DOTALL):
            assert not re.search(r"^\s*([-*]|\d+\.) ", paragraph, re.MULTILINE), f"{page}: {paragraph[:200]}"


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    shown = set(re.findall(r'<h2 id="(sparsekit[\w.]+)" class="doc ', text))
    assert shown == {f"{module}.{name}" for module, names in PUBLIC.items() for name in names}


def test_every_pattern_has_its_mask(site: Path) -> None:
    overview = (site / "patterns" / "index.html").read_text()
    for name in pattern_names():
        assert (site / "patterns" / "masks" / f"{name}.png").stat().st_size > 5000
        own = "![" in (ROOT / "docs" / "patterns" / f"{name}.md").read_text()
        assert own or f'src="masks/{name}.png"' in (site / "patterns" / f"{name}.html").read_text()
        assert f'src="masks/{name}.png"' in overview


def test_a_broken_link_is_an_error(tmp_path: Path) -> None:
    """To a page, to a section, and to a file beside the pages: one build warns of each, and a warning is an error."""
    copy = tmp_path / "repository"
    for name in ("docs", "website", "configs", "examples", "sparsekit", "build/masks"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        shutil.copy(ROOT / name, copy / name)
    page = copy / "docs" / "tasks.md"
    broken = ("nowhere.md", "config.md#no-such-section", "../configs/no-such-folder/file.yaml")
    page.write_text("\n\n".join([page.read_text(), *(f"[there]({link})" for link in broken)]))
    built = _build(copy, tmp_path / "site")
    assert built.returncode != 0
    warnings = [line for line in built.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == len(broken), built.stderr[-2000:]
    for said in ("'nowhere.md'", "no-such-section", "no-such-folder"):
        assert [line for line in warnings if "tasks.md" in line and said in line], built.stderr[-2000:]


# ---- in a browser


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Chromium]:
    need_chromium()
    found = Chromium(tmp_path / "chromium")
    yield found
    found.close()


def test_pages_in_a_browser(site: Path, chromium: Chromium) -> None:
    """A page of each kind: nothing on the console, nothing from elsewhere, no picture missing, nothing cut off."""
    with _served(site) as root:
        for page in KINDS:
            chromium.open(f"{root}/{page}")
            assert chromium.complaints() == [], page
            assert all(url.startswith(root) for url in chromium.loaded()), page
            pictures = "[...document.images].filter((one) => !one.complete || !one.naturalWidth).map((one) => one.src)"
            assert chromium.run(pictures) == [], page
            assert chromium.run("document.documentElement.scrollWidth <= innerWidth"), page


ROWS = "[...document.querySelectorAll('#leaderboard tbody tr')].filter((row) => !row.hidden)"
HEADINGS = "[...document.querySelectorAll('#leaderboard th')]"


def _column(chromium: Chromium, name: str) -> list[str]:
    index = chromium.run(f"{HEADINGS}.findIndex((one) => one.textContent === '{name}')")
    return list(chromium.run(f"{ROWS}.map((row) => row.cells[{index}].textContent)"))


def test_the_leaderboard_sorts_and_filters(site: Path, chromium: Chromium) -> None:
    with _served(site) as root:
        chromium.open(f"{root}/leaderboard.html")
        rows = chromium.run(f"{ROWS}.length")
        assert rows > 200
        assert (
            chromium.run("document.querySelector('#leaderboard [role=status]').textContent") == f"{rows} of {rows} rows"
        )
        for ascending in (True, False):
            chromium.run(f"{HEADINGS}.find((one) => one.textContent === 'KL').firstChild.click()")
            cells = _column(chromium, "KL")
            numbers = [float(cell.split()[0]) for cell in cells if cell]
            assert numbers == sorted(numbers, reverse=not ascending) and len(set(numbers)) > 50
            assert not any(cells[len(numbers) :])
        chromium.open(f"{root}/leaderboard.html?pattern=xattention")
        patterns = _column(chromium, "pattern")
        assert 0 < len(patterns) < rows and all("xattention" in cell.split(" + ") for cell in patterns)
        chromium.run(
            "(box => { box.value = 'NO such setting'; box.dispatchEvent(new Event('input')); })"
            "(document.querySelector('#leaderboard input'))"
        )
        assert chromium.run(f"{ROWS}.length") == 0


def test_the_search_finds_a_page(site: Path, chromium: Chromium) -> None:
    with _served(site) as root:
        chromium.open(f"{root}/index.html")
        chromium.run("document.querySelector('[data-md-component=search-query]').focus()")
        chromium.ask("Input.insertText", text="antidiagonals")
        found = "[...document.querySelectorAll('.md-search-result__link')].map((one) => one.href)"
        look = f"() => {found}.length ? done({found}) : setTimeout(look, 50)"
        urls = chromium.run(f"new Promise((done) => {{ const look = {look}; look(); }})")
        assert any("xattention.html" in url for url in urls)
        assert chromium.complaints() == []


def main(out: str, *pages: str) -> None:
    need_chromium()
    window = Chromium(Path(out) / "profile")
    with _served(ROOT / "site") as root:
        for page in pages or KINDS:
            window.open(f"{root}/{page}")
            name = re.sub(r"\W+", "-", page.removesuffix(".html"))
            (Path(out) / f"{name}.png").write_bytes(window.png())
    window.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
