"""Sweeps: a question in YAML, asked of every combination of its axes, resumable at any point."""

from sparsekit.sweep.best import Best, best
from sparsekit.sweep.execute import Runner, Summary, run_sweep
from sparsekit.sweep.question import Question, load_question
from sparsekit.sweep.results import ResultFile, read_results
from sparsekit.sweep.runs import Run
from sparsekit.sweep.search import front

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
