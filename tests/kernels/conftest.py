"""Makes `kernel_cases`, the plans and the comparison that CPU and GPU tests share, importable from the tests here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
