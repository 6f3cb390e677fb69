"""Tasks: prompts of a given length with known answers. Importing this package registers all of them."""

from sparsekit.tasks.base import Sample, Task, prompt_ids, prompt_text, recall, register, task, task_names
from sparsekit.tasks.needle import NEEDLE4, PASSKEY, Needle, Passkey

__all__ = [
    "NEEDLE4",
    "PASSKEY",
    "Needle",
    "Passkey",
    "Sample",
    "Task",
    "prompt_ids",
    "prompt_text",
    "recall",
    "register",
    "task",
    "task_names",
]
