"""Tasks: prompts of a given length with known answers. Importing this package registers all of them."""

from sparsekit.lab.tasks.base import Sample, Task, prompt_ids, prompt_text, recall, register, task, task_names
from sparsekit.lab.tasks.corpus import PYDOC, read_corpus
from sparsekit.lab.tasks.counted_words import CommonWords, FrequentWords
from sparsekit.lab.tasks.key_value import KeyValue
from sparsekit.lab.tasks.needle import Needle, Passkey
from sparsekit.lab.tasks.niah import Niah
from sparsekit.lab.tasks.passkeys import Passkeys
from sparsekit.lab.tasks.perplexity import Perplexity
from sparsekit.lab.tasks.variables import VariableTracking

__all__ = [
    "PYDOC",
    "CommonWords",
    "FrequentWords",
    "KeyValue",
    "Needle",
    "Niah",
    "Passkey",
    "Passkeys",
    "Perplexity",
    "Sample",
    "Task",
    "VariableTracking",
    "prompt_ids",
    "prompt_text",
    "read_corpus",
    "recall",
    "register",
    "task",
    "task_names",
]
