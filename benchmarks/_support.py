"""Import the server process and the fake engine from tests/support, for the scripts that start servers."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from server_process import FAKE_ENGINE, ServerProcess, start_python

__all__ = ["FAKE_ENGINE", "ServerProcess", "start_python"]
