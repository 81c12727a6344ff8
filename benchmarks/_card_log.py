"""Pass on what a stage prints, to the terminal and to a log; each JSON line says which card it was measured on.

    STAGE 2>&1 | python benchmarks/_card_log.py LOG CARD SECONDS

It ends with the stage, or after `SECONDS` if a process that the stage has left behind keeps its output open.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any


def with_card(line: str, card: str) -> str:
    """A line with its card, if it is a JSON object that does not name one."""
    if not line.startswith("{"):
        return line
    try:
        record = json.loads(line)
    except ValueError:
        return line  # only looks like JSON
    return json.dumps({"card": card, **record}) + "\n"


def _give_up(*_: Any) -> None:
    raise TimeoutError("a process of the stage was left behind and keeps its output open")


def main() -> None:
    log, card, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(seconds)
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    with log.open("a") as file:
        for line in sys.stdin:
            text = with_card(line, card)
            for target in (sys.stdout, file):
                target.write(text)
                target.flush()


if __name__ == "__main__":
    main()
