"""Run a rank other than 0: load the models that rank 0 names, and compute its share of every step.

`pusa.acceleration.launch.launch` starts this module:

    python -m pusa.generate.follower --rank 1 --size 2 --port 4711
"""

import argparse
import logging
import signal
import sys

import torch

from pusa.acceleration import launch, parallel
from pusa.acceleration.ranks import RankError, Ranks
from pusa.errors import first_line
from pusa.events import Events, Stage, Step
from pusa.generate.sharing import SharedModel


def follow(ranks: Ranks) -> None:
    """Follow one run of rank 0 after another, until it closes the group. Raises as `follow_run` does."""
    while True:
        for _ in follow_run(ranks):
            pass
        if ranks.is_closed:
            return


@torch.no_grad()
def follow_run(ranks: Ranks) -> Events:
    """Do what rank 0 asks for during one call of `generate`; it ends with that call, or when rank 0 closes the group.

    Yields:
        `Stage` and `Step`, for those who watch this rank.

    Raises:
        RankError: another rank has failed.
        Exception: this one has, and the others know it.
    """
    try:
        if not ranks.is_connected:
            ranks.wait_until_all_are_here()
        yield from _follow_run(ranks)
    except RankError:
        raise
    except BaseException as error:
        ranks.report_failure(parallel.describe_failure(error))
        raise


def _follow_run(ranks: Ranks) -> Events:
    model: SharedModel | None = None
    while True:
        ranks.stage = "waiting"
        message, _ = ranks.receive()
        kind = message["kind"]
        ranks.is_closed = kind == "close"
        if kind in ("close", "done"):
            return
        if kind == "model":
            ranks.stage = "load"
            yield Stage("load")
            model = SharedModel(ranks, message)
        elif model is None:
            raise RuntimeError(f"rank 0 sends {kind!r} before a model")
        elif kind == "share":
            model.share(ranks, message)
        else:
            ranks.stage = "denoise"
            yield Stage("denoise")
            assert isinstance(model.pipe.passes, parallel.SharedPasses)
            for inputs in model.pipe.passes.follow_call(model.pipe):
                yield Step(inputs.index + 1, inputs.steps)


def main(arguments: list[str] | None = None) -> int:
    """Join a group and follow its rank 0; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pusa.generate.follower", description=__doc__)
    for name, kind in (("rank", int), ("size", int), ("port", int), ("threads", int)):
        parser.add_argument(f"--{name}", type=kind, required=name != "threads")
    parser.add_argument("--device-type", choices=["cuda", "cpu"], default="cuda")
    for name in ("timeout", "silence", "grace"):
        parser.add_argument(f"--{name}-seconds", type=float, default=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: rank 0 decides
    logging.disable(logging.WARNING)  # rank 0 has them all
    if threads := options.pop("threads"):
        torch.set_num_threads(threads)
    ranks = launch.join(**options)
    try:
        follow(ranks)
    except Exception as error:
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
        return 1
    finally:
        ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
