"""Name folders that tests need: the repository's root, its benchmarks, helpers for child processes, recorded data."""

import os
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
BENCHMARKS = ROOT / "benchmarks"
SHARED = Path(os.environ.get("PUSA_SHARED", ROOT.parent / "shared"))  # recorded data; tests skip where it is absent
