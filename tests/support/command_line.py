"""Run the command line: in this process, or in a new one to see what it imports."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from pusa.cli import main
from pusa.media import read_video


def pusa(*args: object) -> Result:
    """Run `pusa` with these arguments in this process."""
    return CliRunner().invoke(main, [str(a) for a in args])


def made_by(*args: object, output: Path) -> np.ndarray:
    """Run a command of `pusa` that makes a video, which it has to; return the frames, [n, H, W, 3]."""
    made = pusa(*args, "-o", output)
    assert made.exit_code == 0, made.output
    return read_video(output)


def imports_of(args: Sequence[str]) -> set[str]:
    """Return the modules that `pusa` has loaded when it ends with success, in a process of its own."""
    code = "import sys\nfrom pusa.cli import main\ntry: main(sys.argv[1:])\nfinally: print('\\n', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())
