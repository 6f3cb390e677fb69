"""JSONL that survives a kill: a torn last line is dropped with a word, anything else that is no row is an error."""

from __future__ import annotations

import json
import logging
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest

from sparsekit import SparsekitError
from sparsekit.lab import demo
from sparsekit.lab.calibrate.records import Records
from sparsekit.lab.journal import Journal, replacing

ROWS = [{"n": n, "text": "é\u2028" * n} for n in range(4)]


def journal(path: Path) -> Journal:
    return Journal(path, "rows", "a test")


def filled(path: Path) -> bytes:
    for row in ROWS:
        journal(path).append(row)
    return path.read_bytes()


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    assert journal(tmp_path / "x").read() == ([], b"") and journal(tmp_path / "x").mended() == []
    filled(tmp_path / "x")
    assert journal(tmp_path / "x").read() == (ROWS, b"") and journal(tmp_path / "x").mended() == ROWS


@pytest.mark.parametrize("zeros", [0, 100])
def test_cut_anywhere(tmp_path: Path, zeros: int, caplog: pytest.LogCaptureFixture) -> None:
    whole, rng = filled(tmp_path / "x"), random.Random(0)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in (*(rng.randrange(len(whole)) for _ in range(20)), *ends, *(end - 1 for end in ends)):
        caplog.clear()
        (tmp_path / "x").write_bytes(whole[:cut] + b"\0" * zeros)
        kept = sum(end <= cut for end in ends) + (not zeros and cut + 1 in ends)
        rows = journal(tmp_path / "x").mended()
        assert rows == ROWS[:kept]
        torn = bool(zeros) or cut not in (0, *ends, *(end - 1 for end in ends))
        assert ["unfinished" in record.message for record in caplog.records] == [True] * torn
        for row in ROWS[kept:]:
            journal(tmp_path / "x").append(row)
        assert (tmp_path / "x").read_bytes() == whole


@pytest.mark.parametrize(
    "data", [b"notes", b"[1]\n", b'{"n": 1}\noops\n', b"\xff\n", b'{\n  "n": 1\n}', b"[" * 9999 + b"\n"]
)
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(SparsekitError, match=r"rows '.*x', line \d: no record of a test \(no JSON") as error:
        journal(tmp_path / "x").mended()
    assert "\n" not in str(error.value) and (tmp_path / "x").read_bytes() == data


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_no_room() -> None:
    with pytest.raises(SparsekitError, match="rows '/dev/full': No space left on device; make room"):
        journal(Path("/dev/full")).append({})


def test_replaced_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    whole = filled(tmp_path / "x")
    with suppress(KeyboardInterrupt), replacing(journal(tmp_path / "x")) as add:
        add({"n": 9})
        raise KeyboardInterrupt
    assert (tmp_path / "x").read_bytes() == whole
    with replacing(journal(tmp_path / "x"), kept='{"n": 0}\n') as add:
        add({"n": 9})
        with pytest.raises(SparsekitError, match="being written by another process"), journal(tmp_path / "x").held():
            pass
    assert journal(tmp_path / "x").read()[0] == [{"n": 0}, {"n": 9}]
    with pytest.raises(SparsekitError, match="must be a file"), replacing(journal(tmp_path)):
        pass
    with replacing(journal(Path("/dev/null"))) as add:
        add({"n": 9})


def test_nothing_is_left_but_the_rows_of_a_block_that_did_not_end(tmp_path: Path) -> None:
    with replacing(journal(tmp_path / "x")) as add:
        assert (tmp_path / "x.lock").exists()
        add({"n": 0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.lock"]
    for rows in (0, 1):
        with suppress(KeyboardInterrupt), replacing(journal(tmp_path / "x"), kept='{"n": 0}\n') as add:
            for n in range(rows):
                add({"n": n})
            raise KeyboardInterrupt
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.lock", "x.part"][: 2 + rows]


def test_one_writer_at_a_time_however_often_it_was_held(tmp_path: Path) -> None:
    """The lock's file is never removed: who opened it before its holder let it go has the same one."""
    with journal(tmp_path / "x").held():
        lock = (tmp_path / "x.lock").open()
        with pytest.raises(SparsekitError, match="being written by another process"), journal(tmp_path / "x").held():
            pass
    with lock, journal(tmp_path / "x").held():  # open, lest a file in its place get its number
        assert os.path.samestat((tmp_path / "x.lock").stat(), os.fstat(lock.fileno()))


def test_a_lock_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    """As one that another user left; the rows' own file may be fit to be written."""
    (tmp_path / "x.lock").mkdir()
    with pytest.raises(SparsekitError, match=r"rows '.*x\.lock' cannot be written: "), journal(tmp_path / "x").held():
        pass


def test_the_demo_reads_what_a_kill_left(tmp_path: Path) -> None:
    row = {
        "setting": "dense", "config": None, "task": "passkey", "tokens": 8, "score": 1.0, "kl_nats_per_token": 0.0,
        "ttft_s": 1.0, "density": 1.0,
    }  # fmt: skip
    (tmp_path / "r.jsonl").write_text(f'{json.dumps(row)}\n{{"setting": "den')
    [outcome] = demo.read_outcomes(tmp_path / "r.jsonl")
    assert outcome.passkey == [1.0]
    (tmp_path / "r.jsonl").write_text('{"setting": "dense"}\n')
    with pytest.raises(SparsekitError, match=r"line 1: no record of `sparsekit demo` .*without config, task"):
        demo.read_outcomes(tmp_path / "r.jsonl")
    assert logging.getLogger("sparsekit.lab.journal").isEnabledFor(logging.WARNING)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    for read in (journal(tmp_path / "x").read, lambda: Records(tmp_path / "x")):
        with pytest.raises(SparsekitError, match="x' cannot be read: it is no regular file"):
            read()


def test_an_id_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"id": "a", "value": 1}\n{"id": ["a"], "value": 1}\n')
    with pytest.raises(SparsekitError, match=r"line 2: no record of .* \(id = \['a'\]\)"):
        Records(tmp_path / "x")
