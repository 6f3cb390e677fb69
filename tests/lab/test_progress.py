"""Where there is no terminal, long work speaks in lines: at most one every `EVERY_S` seconds of its own."""

import pytest

from sparsekit.lab import progress as module
from sparsekit.lab.progress import progress


def test_silent_work_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with progress("prompts", 3) as step:
        step(1)
    assert capsys.readouterr().err == ""  # too soon
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    with progress("prompts", 3) as step:
        step(1)
        step(1, "other prompts")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("prompts: 1/3 (") and second.startswith("other prompts: 2/3 (")


def test_work_that_speaks_is_not_spoken_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY_S", 3600.0)
    with progress("prompts", None) as step:
        step.spoken -= 3601.0
        step.says("one is read")
        step(1)
    assert capsys.readouterr().err == "one is read\n"


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    with progress("prompts", 3, quiet=True) as step:
        step(1)
    assert capsys.readouterr().err == ""
