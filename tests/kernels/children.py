"""Child processes of the kernel tests: one in Triton's interpreter, one that compiles for cards that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MOST_AT_ONCE = 4  # children


def interpret(name: str) -> None:
    """Run the tests of a file here with TRITON_INTERPRET set before anything imports triton; all of them must pass.

    The interpreter is Python on one core, so each core takes every n-th test (conftest.py deals them out). Where
    pytest-xdist's workers keep the cores busy there is one child: each imports everything anew.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    parts = max(min((os.cpu_count() or 1) // workers, MOST_AT_ONCE), 1)
    with ThreadPoolExecutor(parts) as pool:
        for ran in pool.map(lambda part: _interpret(name, part, parts), range(parts)):
            assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
            assert "passed" in ran.stdout
            assert "skipped" not in ran.stdout


def _interpret(name: str, part: int, parts: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", name],
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1", "INTERPRETED_PART": f"{part}/{parts}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


def compiled(name: str, cache: Path, *args: str) -> list[dict[str, Any]]:
    """What a script here prints in its last line: one object for every kernel that it compiled, into an empty cache."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)
    folders = [str(folder) for folder in (HERE, HERE / "select", HERE / "attend")]
    env["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [env.get("PYTHONPATH")])])  # and this checkout
    ran = subprocess.run([sys.executable, name, *args], cwd=HERE, env=env, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-4000:]
    made: list[dict[str, Any]] = json.loads(ran.stdout.splitlines()[-1])
    return made
