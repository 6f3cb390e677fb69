"""Configs of a folder as a repository of the Hugging Face Hub: checked, with a card, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsekit.config.card import card, is_hub_id
from sparsekit.config.costs import facts_for
from sparsekit.config.facts import ModelFacts
from sparsekit.config.hub import HUB, SUFFIXES, HubConfig, cause
from sparsekit.config.schema import SparseConfig, load
from sparsekit.errors import SparsekitError, named_path, read_text, shown

__all__ = ["Parcel", "Pushed", "pack", "push"]

CARD = "README.md"


@dataclass(frozen=True)
class Parcel:
    """What a push uploads.

    Attributes:
        repo: where to, `owner/name`.
        files: text by name: the configs as they are in the folder, and the card.
        left: names in the folder that stay there.
    """

    repo: str
    files: Mapping[str, str]
    left: tuple[str, ...]

    @property
    def card(self) -> str:
        """README.md."""
        return self.files[CARD]


@dataclass(frozen=True)
class Pushed:
    """What a push did: the commit's address, and configs in the repository that were not in the folder."""

    url: str
    older: tuple[str, ...]


def pack(
    folder: str | Path,
    repo: str,
    *,
    model: ModelFacts | None = None,
    tokens: int = 32768,
    base_model: str | None = None,
    license: str | None = None,
) -> Parcel:
    """The configs of a folder, its .yaml files, each loaded and resolved; and their card. Nothing is uploaded.

    Args:
        repo: `owner/name`.
        model: facts of the model that they must fit (`sparsekit.models.facts(...)`); default what each says itself.
        tokens, base_model, license: of the `card`.

    Raises:
        SparsekitError: no config there, one that is none or fits no model, one that does not say for which model it is,
            configs of several models, or a name that the hub does not take.
    """
    where = HubConfig.parse(HUB + repo)
    if where.revision is not None or where.file is not None:
        raise SparsekitError(f"repository {shown(repo)}: want owner/name.")
    if base_model is not None and not is_hub_id(base_model):
        raise SparsekitError(f"base_model = {shown(base_model)}: want the model's repository, owner/name.")
    path = named_path(folder, "folder")
    if not path.is_dir():
        raise SparsekitError(f"folder {shown(str(folder))}: there is no such folder; want one that holds .yaml files.")
    texts, configs = {}, {}
    there = sorted(path.iterdir())
    for file in there:
        if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
            HubConfig.parse(f"{HUB}{repo}/{file.name}")
            texts[file.name] = read_text(file, "config")
            configs[file.name] = _checked(file, model)
    if not configs:
        raise SparsekitError(f"folder {shown(str(folder))} holds no .yaml file.")
    _check_one_model(configs)
    page = card(repo, configs, tokens=tokens, base_model=base_model, license=license)
    return Parcel(repo, {**texts, CARD: page}, tuple(file.name for file in there if file.name not in texts))


def _checked(file: Path, model: ModelFacts | None) -> SparseConfig:
    config = load(file)
    if missing := config.model.missing():
        raise SparsekitError(
            f"{file}: model.{', model.'.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; a config that "
            "others use says for which model it is."
        )
    try:
        config.resolve(facts_for(config, model)).own_layers(model)
    except SparsekitError as error:
        raise SparsekitError(f"{file}: {error}") from None
    return config


def _check_one_model(configs: Mapping[str, SparseConfig]) -> None:
    (first, one), *others = configs.items()
    for name, config in others:
        field = "name" if config.model.name != one.model.name else one.model.differs(config.model)
        if field:
            raise SparsekitError(
                f"{name}: model.{field} = {shown(getattr(config.model, field))}, but {first} has "
                f"{shown(getattr(one.model, field))}; a repository is for one model: push them from two folders."
            )


def push(parcel: Parcel, *, private: bool = False) -> Pushed:
    """Upload it, as one commit on the repository's main branch; the repository is made where there is none.

    Args:
        private: make a private one; one that is there already must be private.

    Raises:
        SparsekitError: in one line what the hub refuses, or that it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        api.create_repo(parcel.repo, private=private or None, exist_ok=True)
        info = api.model_info(parcel.repo)
        if private and not info.private:
            raise SparsekitError(f"push to {parcel.repo}: --private, but it is there already, and public.")
        operations = [CommitOperationAdd(name, text.encode()) for name, text in parcel.files.items()]
        done = api.create_commit(parcel.repo, operations, commit_message=f"sparsekit: {', '.join(parcel.files)}"[:200])
    except SparsekitError:
        raise
    except Exception as error:  # of huggingface_hub, or of one of several HTTP libraries
        raise SparsekitError(f"push to {parcel.repo}: {cause(error, parcel.repo)}.") from None
    there = (file.rfilename for file in info.siblings or ())
    older = (name for name in there if name.lower().endswith(SUFFIXES) and name not in parcel.files)
    return Pushed(str(done.commit_url), tuple(sorted(older)))
