"""`hub:owner/name`: a config in a repository of the Hugging Face Hub.

One YAML file is downloaded, into the cache of `huggingface_hub`, and read from there as any other. HF_HOME,
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean for models. Nothing of a repository is run.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from sparsekit.errors import MOST_BYTES, SparsekitError, nearest, shown

__all__ = ["HUB", "HubConfig", "cause", "downloaded"]

HUB = "hub:"
SUFFIXES = (".yaml", ".yml")
SECONDS = 10.0  # for the hub's answer, as huggingface_hub has it for a file's headers
LONGEST = 96  # characters of a repository's name on the hub, which has no `--` and no `..`
NAMED = 8  # files of a repository that an error names

_REPO = r"[A-Za-z0-9](?:[\w.-]*\w)?/[A-Za-z0-9](?:[\w.-]*\w)?"
_REVISION = r"refs/(?:pr|convert)/[\w.-]+|\w[\w.+-]*"
_SPEC = re.compile(rf"hub:(?P<repo>{_REPO})(?:@(?P<revision>{_REVISION}))?(?:/(?P<file>.*))?", re.ASCII | re.DOTALL)
_FILE = re.compile(r"\w[\w .+-]*(?:/\w[\w .+-]*)*", re.ASCII)  # neither `..` nor a hidden file
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubConfig:
    """What `hub:owner/name[@revision][/file.yaml]` says.

    Attributes:
        revision: a branch without a slash, a tag, a commit, or `refs/pr/N`; None: main.
        file: its path there; None: the only config of the repository.
    """

    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubConfig:
        """
        Raises:
            SparsekitError: it is none.
        """
        found = _SPEC.fullmatch(text)
        if found is None or re.search(r"--|\.\.", found["repo"]) or len(found["repo"]) > LONGEST:
            raise SparsekitError(
                f"config {shown(text)}: want hub:owner/name, hub:owner/name@revision, or either with /FILE.yaml."
            )
        if found["file"] is not None and not _is_config(found["file"]):
            raise SparsekitError(
                f"config {shown(text)}: {shown(found['file'])} names no config of a repository; want the path of a "
                ".yaml file there, of letters, digits and `_ . + -`."
            )
        return cls(**found.groupdict())

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{HUB}{self.repo}{revision}{'' if self.file is None else f'/{self.file}'}"


def _is_config(name: str) -> bool:
    """Whether a path of a repository can be a config: a .yaml file, and on no machine one outside of its folder."""
    return _FILE.fullmatch(name) is not None and name.lower().endswith(SUFFIXES)


def downloaded(text: str) -> Path:
    """The file that `hub:...` names, in the cache. Where the hub cannot be asked, what an earlier call brought there.

    A file of a commit (40 digits) that is there already is read without asking.

    Raises:
        SparsekitError: one line: no such repository, revision or file, access that is needed, several configs of which
            none is named, one that is too large, or a hub that cannot be reached and nothing in the cache.
    """
    from huggingface_hub import hf_hub_download

    asked = HubConfig.parse(text)
    where = f"config {asked}"
    pinned = asked.file is not None and asked.revision is not None and _COMMIT.fullmatch(asked.revision)
    if pinned and (there := _in_cache(asked)) is not None:
        return there
    try:
        sizes = _files(asked)
    except _NoAnswer as error:
        there = _in_cache(asked)
        if there is None:
            _not_there(where, error)
        if not (error.offline and asked.file):
            read = "it is read from the cache" if asked.file else f"{there.name} is read, the only config in the cache"
            warnings.warn(f"{where}: {error}; {read}.", stacklevel=2)
        return there
    name = _chosen(asked, sizes)
    if (size := sizes[name]) is not None and size > MOST_BYTES:
        raise SparsekitError(f"{where}: {shown(name)} has {size:,} bytes; a file of at most {MOST_BYTES:,} is read.")
    try:
        return Path(hf_hub_download(asked.repo, name, revision=asked.revision))
    except Exception as error:  # of huggingface_hub, of one of several HTTP libraries, of the file system
        raise SparsekitError(f"{where}: {cause(error, asked.repo)}.") from None


# ---- what the hub says


class _NoAnswer(Exception):
    """The hub could not be asked, or is not to be (`offline`)."""

    def __init__(self, why: str, offline: bool = False) -> None:
        super().__init__(why)
        self.offline = offline


def _files(asked: HubConfig) -> Mapping[str, int | None]:
    """Size of each file of the revision, where the hub tells it.

    Raises:
        _NoAnswer: it says nothing.
        SparsekitError: it refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(asked.repo, revision=asked.revision, files_metadata=True, timeout=SECONDS)
    except OfflineModeIsEnabled as error:
        raise _NoAnswer(cause(error, asked.repo), offline=True) from None
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, ValueError) or (status is not None and status < 500 and status != 429):
            raise SparsekitError(f"config {asked}: {cause(error, asked.repo)}.") from None
        raise _NoAnswer(cause(error, asked.repo)) from None
    return {file.rfilename: file.size for file in info.siblings or ()}


def cause(error: Exception, repo: str) -> str:
    """Why the hub, or the way there, failed: without a full stop."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, GatedRepoError):
        return f"access to {page} is restricted; ask for it there, then log in (`hf auth login`)"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no {page}, or it is private and needs a login (`hf auth login`)"
    if isinstance(error, RevisionNotFoundError):
        return f"{page} has no such revision"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        login = "; log in (`hf auth login`)" if status == 401 else ""
        return f"{constants.ENDPOINT} answered {status}: {shown(error.server_message or said)}{login}"
    if isinstance(error, ValueError | OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return f"{type(error).__name__}: {shown(said)}"
    return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {shown(said)})"


def _not_there(where: str, error: _NoAnswer) -> NoReturn:
    from huggingface_hub import constants

    raise SparsekitError(
        f"{where}: {error}, and it is not in the cache ({constants.HF_HUB_CACHE}); load it once with the hub in reach, "
        "or give the path of a file."
    )


# ---- which file


def _in_cache(asked: HubConfig) -> Path | None:
    """The file, if the cache has it."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with suppress(LocalEntryNotFoundError):
        if asked.file is not None:
            return Path(hf_hub_download(asked.repo, asked.file, revision=asked.revision, local_files_only=True))
        patterns = [f"*{suffix}" for suffix in SUFFIXES]
        folder = Path(
            snapshot_download(asked.repo, revision=asked.revision, allow_patterns=patterns, local_files_only=True)
        )
        there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        if any(map(_is_config, there)):
            return folder / _chosen(asked, there)
    return None


def _chosen(asked: HubConfig, names: Iterable[str]) -> str:
    """The file that is named, or the only config."""
    configs = sorted(filter(_is_config, names))
    listed = ", ".join(configs[:NAMED]) + (f" and {len(configs) - NAMED} more" if len(configs) > NAMED else "")
    if not configs:
        raise SparsekitError(
            f"config {asked}: {asked.repo} holds no config: no .yaml file whose path is letters, digits and `_ . + -`."
        )
    if asked.file is not None:
        if asked.file not in configs:
            beside = nearest(PurePosixPath(asked.file).name, configs)
            raise SparsekitError(f"config {asked}: no file {shown(asked.file)} there, but {listed}.{beside}")
        return asked.file
    if len(configs) > 1:
        one = HubConfig(asked.repo, asked.revision, configs[0])
        raise SparsekitError(f"config {asked}: it holds several configs, {listed}; name one, such as {one}.")
    return configs[0]
