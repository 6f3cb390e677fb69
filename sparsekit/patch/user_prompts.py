"""Prompts of one's own, as texts, token ids or chats: read from files, and made the ids that a model reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.call.geometry import whole
from sparsekit.errors import SparsekitError, nearest, read_text, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FilePrompt", "UserPrompt", "prompts_of", "read_prompts"]

MOST_BYTES = 64 << 20  # of a file of prompts
FORMS = "a text, a list of token ids, or a list of messages such as {'role': 'user', 'content': '...'}"
FIELDS = ("prompt", "messages", "ids")  # of an object in a JSONL file
BYTES = bytes | bytearray | memoryview  # sequences of numbers that are no ids


@dataclass(frozen=True)
class FilePrompt:
    """A prompt of a file: what the file says, and where."""

    content: Any
    name: str
    source: str


@dataclass(frozen=True)
class UserPrompt:
    """One prompt.

    Attributes:
        ids: what the model reads.
        name: what messages call it.
        source: the file it is from, or "Python".
    """

    ids: tuple[int, ...]
    name: str
    source: str


def prompts_of(prompts: Any, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> list[UserPrompt]:
    """The prompts as the model reads them.

    Args:
        prompts: a list; each a text, token ids (a list or a tensor of one row), chat messages, or one of
            `read_prompts`.
        tokenizer: of texts, which it gives its special tokens, and of chats, whose template it has.
        vocabulary: ids are below this.

    Raises:
        SparsekitError: none, or one that is nothing of that kind; texts without a tokenizer.
    """
    if isinstance(prompts, str | Mapping | BYTES) or not hasattr(prompts, "__iter__") or _ndim(prompts) == 0:
        raise SparsekitError(f"prompts = {shown(prompts)}: a list of prompts is needed, each {FORMS}.")
    made = []
    for i, given in enumerate(prompts):
        one = given if isinstance(given, FilePrompt) else FilePrompt(given, f"prompt {i}", "Python")
        made.append(UserPrompt(_ids(one, tokenizer, vocabulary), one.name, one.source))
    if not made:
        raise SparsekitError(f"prompts: at least one is needed, {FORMS}.")
    return made


def _ids(prompt: FilePrompt, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> tuple[int, ...]:
    content, name, of = prompt.content, prompt.name, ""
    if hasattr(content, "tolist") and _ndim(content):  # a tensor or an array
        content = content.tolist()
        if len(content) == 1 and isinstance(content[0], list):
            content = content[0]
    listed = isinstance(content, Sequence) and not isinstance(content, BYTES)
    chat = listed and len(content) > 0 and all(isinstance(one, Mapping) for one in content)
    if isinstance(content, str) or chat:
        if tokenizer is None:
            raise SparsekitError(
                f"{name} is a {'chat' if chat else 'text'}, and there is no tokenizer to read it: give tokenizer=, or "
                "token ids."
            )
        ids = _chat(content, name, tokenizer) if chat else _encoded(content, name, tokenizer)
        of = "the tokenizer gives "
    else:
        try:
            ids = tuple(whole(number) for number in content) if listed else ()
        except TypeError:
            ids = ()
        if not ids:
            raise SparsekitError(f"{name} = {shown(prompt.content)}: want {FORMS}.")
    wrong = next((number for number in ids if not 0 <= number < vocabulary), None)
    if wrong is not None:
        raise SparsekitError(f"{name}: {of}token id {shown(wrong)}; the model's are 0 to {vocabulary - 1:,}.")
    return ids


def _ndim(value: Any) -> Any:
    """Of a tensor or an array; None of anything else."""
    return getattr(value, "ndim", None)


def _chat(messages: Any, name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    for i, message in enumerate(messages):
        missing = next((key for key in ("role", "content") if key not in message), None)
        if missing is not None:
            raise SparsekitError(
                f"{name}: message {i} has no {missing!r}; it has {', '.join(map(shown, message))}."
                f"{nearest(missing, map(str, message))}"
            )
    if not tokenizer.chat_template:
        raise SparsekitError(f"{name} is a chat, and the model's tokenizer has no chat template: give its text.")
    try:
        text: Any = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes about roles and their order
        raise SparsekitError(f"{name}: the model's chat template refuses it: {error}.") from None
    return _encoded(text, name, tokenizer, add_special_tokens=False)


def _encoded(text: str, name: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> tuple[int, ...]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a pair, which JSON can write
        raise SparsekitError(
            f"{name}: its text cannot be encoded at character {error.start}: {error.reason}."
        ) from None
    return tuple(tokenizer(text, **options)["input_ids"])


def read_prompts(path: str | Path) -> list[FilePrompt]:
    """The prompts of a file.

    Of a `.jsonl` file one a line: a text, a list of token ids, a list of messages, or an object that has one of these
    under `prompt`, `ids` or `messages`. Any other file is one prompt, its text; `.json` is refused.

    Raises:
        SparsekitError: one line that names the file and the line.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".json":
        raise SparsekitError(f"prompts {shown(str(path))}: want a .jsonl file, one prompt a line, or a text file.")
    text = read_text(path, "prompts", MOST_BYTES)
    if kind != ".jsonl":
        if not text.strip():
            raise SparsekitError(f"prompts {shown(str(path))}: the file is empty.")
        return [FilePrompt(text, path.name, path.name)]
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            name = f"{path.name} line {number}"
            found.append(FilePrompt(_of_line(line, name), name, path.name))
    if not found:
        raise SparsekitError(f"prompts {shown(str(path))}: the file holds no prompt.")
    return found


def _of_line(line: str, name: str) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise SparsekitError(f"{name} is no JSON: {why}; want {FORMS}.") from None
    if not isinstance(value, dict):
        return value
    given = [field for field in FIELDS if field in value]
    if len(given) != 1:
        has = f"it has {', '.join(map(shown, value)) or 'none'}" if not given else f"it has {' and '.join(given)}"
        close = next((hint for key in value if (hint := nearest(key, FIELDS))), "") if not given else ""
        raise SparsekitError(f"{name}: an object needs one of {', '.join(FIELDS)}; {has}.{close}")
    return value[given[0]]
