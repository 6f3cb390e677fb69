"""A model's facts without its weights: from its config, with the code that would run it."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from sparsekit.config import ArchFacts
from sparsekit.errors import SparsekitError
from sparsekit.models.embedded import EMBEDDED
from sparsekit.models.gguf import need_gguf
from sparsekit.models.names import check_counts, first_line, label, local_path, one_line_errors
from sparsekit.patch.model import facts_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def facts(source: str | os.PathLike[str] | PretrainedConfig | PreTrainedModel) -> ArchFacts:
    """What `apply` will find in a model, without weights: of a config, the model is made on the meta device.

    Args:
        source: a hub id, a local folder, a `config.json`, a `.gguf` file, an embedded name, a config or a model. Models
            with several parts (vision and text) answer for the text part.

    Raises:
        SparsekitError: there is no such model, or sparsekit cannot be applied to it, whatever the config.
    """
    if isinstance(source, str) and source in EMBEDDED:
        return EMBEDDED[source].facts
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        return _named(facts_of(_without_weights(_config(name), name)), label(name))
    given: Any = source
    config = getattr(given, "config", given)
    if not hasattr(config, "get_text_config"):
        raise SparsekitError(f"facts: {type(source).__name__} is not a model, a config, a path or a name.")
    model = given if config is not given else _without_weights(config, config.model_type)
    return _named(facts_of(model), label(getattr(config, "_name_or_path", "") or config.model_type))


def _named(found: ArchFacts, name: str) -> ArchFacts:
    return found.model_copy(update={"name": name})


def _without_weights(config: PretrainedConfig, name: str) -> PreTrainedModel:
    """The model that `load` would give, or else that of the config's text part, on the meta device."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel, AutoModelForCausalLM

    try:
        copy = deepcopy(config)  # a model sets its attention implementation in its config
        check_counts(copy.to_dict(), name)
        of = copy if type(copy) in MODEL_FOR_CAUSAL_LM_MAPPING else copy.get_text_config(decoder=True)
        auto: Any = AutoModelForCausalLM if type(of) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(of)
    except SparsekitError:
        raise
    except Exception as error:  # whatever the code of 400 families raises at sizes that do not go together
        raise SparsekitError(f"facts of {name}: its config makes no model ({first_line(error)}).") from error
    return model


def _config(source: str) -> PretrainedConfig:
    from transformers import AutoConfig, PretrainedConfig

    path = local_path(source)
    with one_line_errors(source):
        if path is not None and path.suffix == ".gguf":
            need_gguf(path.name)
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        given: Any = source if path is None else path
        check_counts(PretrainedConfig.get_config_dict(given)[0], source)
        return AutoConfig.from_pretrained(given)
