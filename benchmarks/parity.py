"""Parity with the original implementation: component, error and tolerance of each recorded number, as one table.

The recorded tensors (`golden/`) are what the original Pusa V1.0, V0.5 on Mochi and FVDM computed from tiny random
weights. Each check runs our code on their inputs and gives the largest absolute difference, next to what it may be:
twice the error that a faithful implementation reached when they were recorded, or what the claim itself says (equal to
the bit, 1e-5 of the range).

    python benchmarks/parity.py --golden FOLDER

Prints the table, what cannot match and why, and one JSON line; exits 1 if a check is out of tolerance.
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

import _component_checks  # noqa: F401 (registers its checks)
import _fvdm_checks  # noqa: F401
import _mochi_checks  # noqa: F401
import _mochi_loop_checks  # noqa: F401
import _pipeline_checks  # noqa: F401
import _wan22_checks  # noqa: F401
from _common import table
from _golden import CHECKS, DEPARTURES, Golden


def main(arguments: list[str] | None = None) -> int:
    shared = Path(os.environ.get("PUSA_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    parser = argparse.ArgumentParser(description="Parity with the original, component by component and end to end.")
    parser.add_argument("--golden", type=Path, default=shared / "golden", help="folder of the recorded data")
    golden = Golden(parser.parse_args(arguments).golden)
    if not golden.folder.is_dir():
        parser.error(f"{golden.folder} is no folder: give the recorded data with --golden")
    rows, failed, worst = [], [], dict.fromkeys((c.component for c in CHECKS), 0.0)
    for check in CHECKS:
        measured = check.measure(golden)
        verdict = "ok" if measured.is_within else "OUT"
        rows.append((check.component, check.case, f"{measured.error:.2e}", f"{measured.tolerance:.2e}", verdict))
        worst[check.component] = max(worst[check.component], measured.error)
        if not measured.is_within:
            failed.append(f"{check.component}: {check.case}")
    print(table(("component", "case", "error", "tolerance", ""), rows))

    print("\nDifferent on purpose, or out of reach; no tolerance:\n")
    departures = [(d.component, d.case, f"{d.measure(golden):.2e}", d.reason) for d in DEPARTURES]
    print(table(("component", "case", "difference", "because"), departures))

    print(f"\n{len(CHECKS) - len(failed)} of {len(CHECKS)} within tolerance")
    print(json.dumps({"benchmark": "parity", "checks": len(CHECKS), "failed": failed, "largest_errors": worst}))
    return 1 if failed else 0


if __name__ == "__main__":
    logging.getLogger("pusa").setLevel(logging.ERROR)  # the roundings that are meant
    sys.exit(main())
