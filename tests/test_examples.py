"""Every block of code in the pages is checked, or says here why it is not.

- Python runs, with SmolLM2-135M as `model` and its `tokenizer`.
- YAML is loaded (tests/test_docs.py), a sweep's (`yml`) too (tests/lab/sweep/test_sweep.py).
- Of a command of sparsekit, all options and arguments are parsed; nothing is run.
- Of other commands, what this repository has to hold for them: a target of the Makefile, an extra, a JSON option.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekit import models
from sparsekit.cli import app
from sparsekit.config import parse_yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# (page, how the block begins) -> where it is checked, or why it is not.
ELSEWHERE = {
    (
        "README.md",
        "sparsekit.apply(model",
    ): "needs an 8B model; tests/test_readme.py tries another",
    ("README.md", "import torch, sparsekit"): "tests/test_readme.py runs it",
    ("README.md", "from typing import Literal"): "tests/test_readme.py runs them",
    ("CONTRIBUTING.md", '"""loud_blocks'): "tests/test_contributing.py adds it to a copy of the repository",
    ("CONTRIBUTING.md", "from sparsekit.patterns.loud_blocks"): "tests/test_contributing.py, the same",
    ("CONTRIBUTING.md", "# loud_blocks"): "tests/test_contributing.py, the same",
    ("docs/architecture.md", " YAML ──►"): "a drawing",
    ("docs/convert.md", "error: table.py line 2"): "tests/config/test_convert.py has such tables",
    ("docs/config.md", "error: c.yaml: dense_impl"): "tests/test_docs.py compares it word by word",
    ("docs/hub.md", "handle = sparsekit.apply(model"): "asks the hub; tests/config/test_hub.py asks one of its own",
    ("docs/hub.md", "error: config hub:owner/none"): "tests/config/test_hub.py compares it word by word",
    (
        "docs/contract.md",
        "handle = sparsekit.apply(model",
    ): "minutes of prefills; tests/patch/test_contract.py has a tiny one",
    ("docs/contract.md", "error: too short to run sparse"): "tests/patch/test_contract.py raises it",
    ("docs/head-choice.md", "out  = alpha"): "a formula",
    ("docs/patterns/s2o.md", "import torch"): "a minute of captures of a real model; the table beside it is its output",
    (
        "docs/tutorial.md",
        'model.save_pretrained("smollm2")',
    ): "writes 540 MB; tests/serve/vllm/test_server.py serves such a folder",
    ("docs/tutorial.md", "... sparsekit 0.1.0 over"): "a line of a server's log",
    ("docs/tutorial.md", " 71432"): "what the block before printed",
    ("docs/tutorial.md", '{"id"'): "a server's answer",
    ("docs/serving.md", "sparsekit 0.1.0 over"): "a line of a server's log",
    (
        "docs/serving.md",
        "time to the first token, median",
    ): "what a bench of servers printed; its form is tested in tests/lab/bench",
    ("docs/serving.md", "sparsekit='fsat'"): "tests/serve/test_page.py compares it",
}
# Programs that are not this repository's.
FOREIGN = {
    "curl": "asks a server that runs",
    "git": "the address is the reader's",
    "cd": "the reader's folder",
    "source": "the reader's shell",
    "python3": "the reader's Python",
}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Blocks between fences, those within lists too, without the indent of their fence."""
    found, fence, kept = [], None, []
    name = page.relative_to(ROOT).as_posix()
    for number, line in enumerate(page.read_text().splitlines(), 1):
        opened = re.match(r"( *)(`{3,})(\w*)$", line)
        if fence is None and opened:
            fence, start, kept = opened, number, []
        elif fence is not None and line.strip() == fence[2]:
            found.append(Block(name, start, fence[3], "\n".join(kept) + "\n"))
            fence = None
        elif fence is not None:
            kept.append(line.removeprefix(fence[1]))
    assert fence is None, f"{name}: the fence of line {start} is not closed"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
OPEN = [block for block in BLOCKS if not any((block.page, begin) in ELSEWHERE and block.text.startswith(begin)
        for page, begin in ELSEWHERE if page == block.page)]  # fmt: skip


def commands_of(block: Block) -> list[list[str]]:
    """Words of the commands of a block of shell: after `$ ` where it shows answers too, else every line."""
    text = re.sub(r" *\\\n\s*", " ", block.text)
    text = re.sub(r"(?<=[{,])\n\s*", " ", text)  # JSON between quotes, over several lines
    lines = text.splitlines()
    if not block.language:
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line]


def test_what_is_checked_elsewhere_is_there() -> None:
    for page, begin in ELSEWHERE:
        assert any(block.page == page and block.text.startswith(begin) for block in BLOCKS), f"{page}: {begin}"


@pytest.mark.parametrize("block", OPEN, ids=str)
def test_every_block_is_of_a_kind_that_is_checked(block: Block) -> None:
    assert block.language in ("python", "yaml", "yml", "bash") or commands_of(block), (
        f"{block}: say in tests/test_examples.py where this block is checked, or why it is not"
    )


@pytest.mark.parametrize("block", [b for b in OPEN if b.language in ("bash", "")], ids=str)
def test_commands_are_as_the_program_has_them(block: Block) -> None:
    for words in commands_of(block):
        while re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        check_command(words)


def check_command(words: list[str]) -> None:
    program, arguments = Path(words[0]).name, words[1:]
    if program == "python" and arguments[:2] == ["-m", "vllm.entrypoints.openai.api_server"]:
        program, arguments = "vllm", ["serve", *arguments[2:]]
    if program == "sparsekit":
        parse(arguments)
    elif program == "python" and arguments[:2] == ["-m", "sparsekit"]:
        parse(arguments[2:])
    elif program == "python" and arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/")), words
    elif program == "python" and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).is_file(), words
    elif program == "make":
        assert all(re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for word in arguments), words
    elif program == "pip":
        extras = re.search(
            r"\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL
        )
        assert extras is not None
        named = [name for word in arguments for name in re.findall(r"\[([\w,]+)\]", word)]
        assert all(re.search(rf"^{name} = ", extras[1], re.MULTILINE) for one in named for name in one.split(",")), (
            words
        )
    elif program == "vllm":
        assert arguments[0] == "serve"
        for option, value in pairwise(arguments):
            if option == "--additional-config":
                assert json.loads(value).keys() == {"sparsekit"}, words
    else:
        assert program in FOREIGN, f"{program!r}: say in tests/test_examples.py what holds it"


@cache
def tree() -> Any:
    return typer.main.get_command(app)


def parse(arguments: list[str]) -> None:
    """All of a command line, as click reads it; a usage error is raised."""
    command: Any = tree()
    context, rest = None, list(arguments)
    while True:
        name = command.name or "sparsekit"
        context = command.make_context(name, rest, parent=context)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*context._protected_args, *context.args]
        _, command, rest = command.resolve_command(context, rest)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("eval model --modle m", "No such option: --modle"),
        ("plots mask --tokens", "requires an argument"),
        ("calibrat probe m", "No such command 'calibrat'"),
    ],
)
def test_a_wrong_command_is_found(arguments: str, said: str) -> None:
    with pytest.raises(Exception, match=said):
        parse(arguments.split())


@pytest.mark.parametrize("block", [b for b in OPEN if b.language == "python"], ids=str)
def test_python_runs(
    block: Block,
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the repository's root; the model is the session's, and is itself again afterwards."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(models, "load", lambda name: {"smollm2-135m": smollm2}[name])
    scope: dict[str, Any] = {"model": smollm2[0], "tokenizer": smollm2[1]}
    exec(compile(block.text, str(block), "exec", dont_inherit=True), scope)
    assert smollm2[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("yaml", "yml")], ids=str)
def test_yaml_is_yaml(block: Block) -> None:
    assert isinstance(parse_yaml(block.text, str(block)), dict)
