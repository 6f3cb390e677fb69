"""Load a model and its tokenizer, read a model's facts without its weights, and make tiny random models for tests.

`load` takes a hub id, a local folder, a GGUF file, or the name of an embedded model. Here: `names` is what a model may
be called, `embedded` what comes in packages, `loading` and `gguf` bring it, `reading` tells its facts, `small` makes
random ones.
"""

from sparsekit.errors import cache_folder
from sparsekit.models.embedded import EMBEDDED, EmbeddedModel, parts_found
from sparsekit.models.gguf import is_converted
from sparsekit.models.loading import can_shorten, check_device, fast_dtype, load
from sparsekit.models.reading import facts
from sparsekit.models.small import tiny

__all__ = [
    "EMBEDDED",
    "EmbeddedModel",
    "cache_folder",
    "can_shorten",
    "check_device",
    "facts",
    "fast_dtype",
    "is_converted",
    "load",
    "parts_found",
    "tiny",
]
