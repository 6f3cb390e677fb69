"""What the site adds to the plain pages of docs/, for mkdocs (`hooks:` in mkdocs.yml).

- Pages, configs and notebooks of the repository's root, and links to them as a Git host has them.
- The mask of every registered pattern, drawn; what was measured of it; and the list of them.
- Docstrings, in the place of the reference's tables.
- The leaderboard.

Nothing here is fetched: all comes from the repository.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
ASSETS = ("site.css", "leaderboard.js")
CONFIGS = "configs.md"  # the page for links to a folder of configs
DRAWN = ROOT / "build" / "masks"  # kept between builds, by the digest of the code
PICTURES = "patterns/masks"


# ---- files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """`patterns/` and `reference/` in `nav` become all pages of that folder; pages that it does not name come last."""

    def filled(item: Any) -> Any:
        [(title, value)] = item.items()
        if isinstance(value, list):
            return {title: [filled(one) for one in value]}
        return {title: _pages_of(value)} if value.endswith("/") else item

    config.nav = [filled(item) for item in config.nav or []]
    named = json.dumps(config.nav)
    rest = [page.name for page in sorted(DOCS.glob("*.md")) if f'"{page.name}"' not in named]
    if rest:
        config.nav.append({"More": rest})
    return config


def _pages_of(folder: str) -> list[Any]:
    pages = sorted(page.name for page in (DOCS / folder).glob("*.md") if page.name != "README.md")
    if folder == "reference/":  # in the order of its own list
        pages = re.findall(r"\]\((\w+\.md)\)", (DOCS / folder / "README.md").read_text())
    return [{"Overview": f"{folder}README.md"}, *(f"{folder}{page}" for page in pages)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    def add(uri: str, source: Path | None = None, text: str | None = None) -> None:
        if source is not None:
            files.append(File.generated(config, uri, abs_src_path=str(source)))
        else:
            files.append(File.generated(config, uri, content=text))

    for name in ROOT_PAGES:
        add(name, ROOT / name)
    for name in ASSETS:
        add(f"assets/{name}", ROOT / "website" / name)
    configs = sorted((ROOT / "configs").rglob("*.yaml"))
    for path in configs:
        add(path.relative_to(ROOT).as_posix(), path)
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        add(path.relative_to(ROOT).as_posix(), path)
    add(CONFIGS, text=_configs_page(configs))
    for name, path in _masks().items():
        add(f"{PICTURES}/{name}.png", path)
    return files


def _configs_page(paths: Iterable[Path]) -> str:
    """A section a folder; beside each file the comment that it begins with."""
    lines = ["# Configs", "", "The configs of the repository, as files."]
    folder = None
    for path in paths:
        own = path.parent.relative_to(ROOT / "configs").as_posix()
        if own != folder:
            lines += ["", f"## {own} {{#{own}}}", ""]
            folder = own
        comment = re.match(r"#\s*(.*)", path.read_text())
        said = f": {comment[1]}" if comment else ""
        lines.append(f"- [{path.name}]({path.relative_to(ROOT).as_posix()}){said}")
    return "\n".join(lines) + "\n"


# ---- pages


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    if uri == "leaderboard.md":
        page.meta["hide"] = ["navigation", "toc"]  # the table takes the width
    text = _outside_code(markdown, lambda line: _site_links(line, uri))
    if re.fullmatch(r"patterns/\w+\.md", uri) and not uri.endswith("README.md"):
        text = _with_mask(text, page.file.name)
    for mark, fill in MARKS.items():
        text = re.sub(mark, lambda found, fill=fill: fill(*found.groups()), text, flags=re.DOTALL)
    return text


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    lines, fence = [], ""
    for line in markdown.split("\n"):
        opened = re.match(r"\s*(`{3,})", line)
        if opened and not fence:
            fence = opened[1]
        elif fence and line.strip() == fence:
            fence = ""
        lines.append(line if fence or opened else change(line))
    return "\n".join(lines)


def _site_links(line: str, uri: str) -> str:
    """Links of a page as the site has them: pages of the root beside those of docs/, and a folder as its page."""
    there = (ROOT / uri if uri in ROOT_PAGES or uri == CONFIGS else DOCS / uri).parent

    def moved(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if re.match(r"[a-z]+:", target):
            return found[0]
        path = (there / target).resolve()
        if path == ROOT / "configs" or path.parent == ROOT / "configs":
            site, anchor = CONFIGS, "" if path.name == "configs" else f"#{path.name}"
        elif path.is_dir() and path.is_relative_to(DOCS):
            site = f"{path.relative_to(DOCS).as_posix()}/README.md"
        else:
            site = path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()
        return f"]({posixpath.relpath(site, posixpath.dirname(uri) or '.')}{anchor})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", moved, line)


# ---- patterns


@cache
def _masks() -> dict[str, Path]:
    """Pattern -> its picture; drawn where the code changed since it was."""
    from sparsekit.lab.pattern_plot import draw_pattern
    from sparsekit.patterns import pattern_names

    digest = hashlib.blake2b(digest_size=8)
    for room in ("call", "kernels", "lab/bench", "patterns", "plan"):
        for path in sorted((ROOT / "sparsekit" / room).rglob("*.py")):
            digest.update(path.read_bytes())
    for name in ("plots", "pattern_plot"):
        digest.update((ROOT / "sparsekit" / "lab" / f"{name}.py").read_bytes())
    folder = DRAWN / digest.hexdigest()
    found = {name: folder / f"{name}.png" for name in pattern_names()}
    for name, path in found.items():
        if not path.is_file():
            draw_pattern(name, path)
    return found


def _with_mask(text: str, name: str) -> str:
    """The picture before the formula, unless the page has one; and the records at the end."""
    if name not in _masks():
        raise PluginError(f"docs/patterns/{name}.md: no pattern is called {name!r}.")
    picture = (
        f"![Which pairs {name} keeps](masks/{name}.png)\n\n"
        f'<p class="caption">Drawn by <code>sparsekit plots pattern {name}</code>: a square of queries (down) and keys '
        "(right). A dynamic pattern chooses from the synthetic heads of the benches.</p>\n\n"
    )
    if "**Formula.**" not in text:
        raise PluginError(f"docs/patterns/{name}.md: no **Formula.** to put the picture before.")
    own = "![" in text.partition("**Formula.**")[0]
    return text.replace("**Formula.**", f"{'' if own else picture}**Formula.**", 1) + _measured(name)


def _measured(name: str) -> str:
    """Rows of the committed benches for a pattern: a table for each device, for none is compared with another."""
    tables = []
    for file in sorted((DOCS / "results").glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        own = [row for row in rows if row.get("method") == name and row.get("input") == "structured" and "ms" in row]
        own = [row for row in own if row["case"] in ("dynamic", "peer")]
        if own:
            tables.append(_bench_table(file.name, own))
    board = f"[leaderboard](../leaderboard.md?pattern={name})"
    if not tables:
        return f"\n\n## Measured\n\nAnswers and whole prompts are on the {board}.\n"
    return (
        "\n\n## Measured\n\nOne attention layer of synthetic heads (32 query heads, 8 key heads, head size 128, "
        "bfloat16), from the committed records. Index is choosing and planning, all is index and attention; the ratios "
        "are to the dense kernels of the same run. [Fields](../results/README.md#rows-of-bench-dynamic); answers are "
        f"on the {board}.\n\n" + "\n\n".join(tables) + "\n"
    )


def _bench_table(file: str, rows: list[dict[str, Any]]) -> str:
    def cell(row: dict[str, Any], field: str, form: str) -> str:
        return "" if row.get(field) is None else format(row[field], form)

    head = ["tokens", "setting", "tile density", "index, ms", "all, ms"]
    head += ["times cuDNN's dense", "times our dense", "error L1"]
    lines = [f"**{rows[0]['device']}**, [{file}](../results/{file}):", ""]
    lines += [f"| {' | '.join(head)} |", "|---:|---|" + "---:|" * 6]
    for row in sorted(rows, key=lambda row: (row["tokens"], row["case"], str(row.get("label")))):
        what = row["label"] if row["case"] == "dynamic" else f"the authors' code: {row.get('peer') or row['source']}"
        fields = (("tile_density", ".2f"), ("index_ms", ".2f"), ("ms", ".2f"), ("times_dense", ".2f"))
        fields += (("times_own_dense", ".2f"), ("error_l1", ".3f"))
        cells = [f"{row['tokens']:,}", str(what), *(cell(row, field, form) for field, form in fields)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _pattern_list() -> str:
    from sparsekit.cli import describe_patterns
    from sparsekit.patterns import StaticPattern, pattern_class

    cards = []
    for found in describe_patterns():
        name = found["name"]
        kind = "static" if issubclass(pattern_class(name), StaticPattern) else "dynamic"
        cards.append(
            f"-   **[{name}]({name}.md)**, {kind}\n\n    [![]({PICTURES.split('/')[1]}/{name}.png)]({name}.md)\n\n"
            f"    {found['summary']}\n"
        )
    return '<div class="grid cards" markdown>\n\n' + "\n".join(cards) + "\n</div>\n"


# ---- reference and leaderboard


def _docstrings(module: str, table: str) -> str:
    """mkdocstrings' directives for the names of a table, after the table."""
    names = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    linked = re.sub(r"^\| `(\w+)` \|", rf"| [`\1`](#{module}.\1) |", table, flags=re.MULTILINE)
    return f"{linked}\n" + "\n".join(f"::: {module}.{name}\n" for name in names)


def _leaderboard() -> str:
    from sparsekit.lab.leaderboard import leaderboard, read_rows

    rows = leaderboard(read_rows(sorted((DOCS / "results").glob("*.jsonl"))))
    linked = re.sub(r"\| ([\w.-]+\.jsonl) \|$", r"| [\1](results/\1) |", rows, flags=re.MULTILINE)
    return f'<div id="leaderboard" markdown>\n\n{linked}\n</div>\n'


MARKS: dict[str, Callable[..., str]] = {
    r"<!-- reference (\S+) -->\n(.*?)<!-- end -->": _docstrings,
    r"<!-- leaderboard -->.*?<!-- end -->": _leaderboard,
    r"<!-- patterns -->.*?<!-- end -->": _pattern_list,
}
