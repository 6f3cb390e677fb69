"""Sweeps: a question in YAML, asked of every combination of its axes, resumable at any point."""

from sparsekit.lab.sweep.best import Best, best
from sparsekit.lab.sweep.execute import Runner, Summary, run_sweep
from sparsekit.lab.sweep.question import Question, load_question
from sparsekit.lab.sweep.results import ResultFile, read_results
from sparsekit.lab.sweep.runs import Run
from sparsekit.lab.sweep.search import front

__all__ = [
    "Best",
    "Question",
    "ResultFile",
    "Run",
    "Runner",
    "Summary",
    "best",
    "front",
    "load_question",
    "read_results",
    "run_sweep",
]
