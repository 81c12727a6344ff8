"""Measure a run on one and on two nodes of a Ray cluster, and what the death of a node costs.

    python benchmarks/eval_runs.py                     # 24 videos of 20 steps of 0.1 s
    python benchmarks/eval_runs.py --items 8 --steps 10

The nodes are processes of this machine with addresses of the loopback, each with room for one actor. The engine is a
stand-in whose steps sleep, so that the cores of this machine do not limit what two nodes do: measured is what claims,
messages, checks and files cost, not a model. Three runs: one node, two nodes, and two nodes of which one is killed
after a third of the videos. A video is lost if it is missing, damaged, or not the one of an uninterrupted engine;
made twice if the run counts more than one finished attempt.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import table
from _support import FAKE_ENGINE
from fake_engine import FakeEngine
from ray_cluster import Machines, running_machines
from run_samples import make_fake_items

from pusa.evaluation.runs import Item, RunFolder, make_videos
from pusa.evaluation.runs.ray import ExecutorMaker, ray_makers
from pusa.events import Event, Note
from pusa.server.worker.messages import Task


class CountingMaker:
    """Count the videos that a maker finishes."""

    survives_crashes = True

    def __init__(self, maker: ExecutorMaker, finished: list[str]) -> None:
        self._maker, self._finished = maker, finished
        self.is_ready = maker.is_ready

    def make(self, item: Item, output: Path, stop: Any) -> None:
        self._maker.make(item, output, stop)
        if output.exists():
            self._finished.append(item.name)


def measure(machines: Machines, folder: Path, nodes: int, items: Sequence[Item], *, kill: bool) -> dict[str, Any]:
    """Make the videos of a run on so many nodes; kill one of them after a third of the videos."""
    run = RunFolder.create(folder / "run", "benchmark", {}, items)
    finished: list[str] = []
    failed_attempts, killed_at = 0, 0

    def watch(event: Event) -> None:
        nonlocal failed_attempts, killed_at
        if isinstance(event, Note):
            failed_attempts += 1
            print(event.message, file=sys.stderr)
        if kill and not killed_at and len(finished) >= len(items) // 3:
            killed_at = len(finished)
            machines.pull_the_plug()

    options: dict[str, Any] = {"target": FAKE_ENGINE, "gpus": 0, "resources": {"video": 1}}
    with ray_makers(None, run, nodes, checkpoint_seconds=0.0, **options) as makers:
        deadline = time.monotonic() + 120
        while not all([maker.is_ready() for maker in makers]):  # noqa: C419 (starts all of them)
            if time.monotonic() > deadline:
                raise RuntimeError("the actors do not start")
            time.sleep(0.1)
        start = time.perf_counter()
        summary = make_videos(run, [CountingMaker(maker, finished) for maker in makers], report=watch, poll_seconds=0.2)
        seconds = time.perf_counter() - start
    bad = {problem.name for problem in run.problems(decode=True)}
    bad |= {item.name for item in items[:: max(1, len(items) // 4)] if is_another(run, item, folder)}
    return {
        "nodes": f"{nodes}, one killed after {killed_at} videos" if kill else str(nodes),
        "videos": summary.made,
        "seconds": round(seconds, 1),
        "videos_per_minute": round(60 * summary.made / seconds, 1),
        "attempts_that_failed": failed_attempts,
        "lost": len(bad),
        "made_twice": len(finished) - len(set(finished)),
    }


def is_another(run: RunFolder, item: Item, folder: Path) -> bool:
    """Tell if an item's video differs from that of an engine without interruption."""
    place = folder / item.id
    place.mkdir()
    task = Task(job_id="x", attempt=1, request=item.request.model_dump(mode="json"), folder=place)
    for _ in FakeEngine("fake").run(task, lambda: False):
        pass
    return run.video_of(item).read_bytes() != (place / "video.mp4").read_bytes()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step-seconds", type=float, default=0.1)
    options = parser.parse_args(arguments)
    items = make_fake_items(options.items, steps=options.steps, step_seconds=options.step_seconds)
    found = []
    with tempfile.TemporaryDirectory() as work, running_machines() as machines:
        for number, (nodes, kill) in enumerate([(1, False), (2, False), (2, True)]):
            if number < 2:
                machines.add(places=1)
            folder = Path(work) / str(number)
            folder.mkdir()
            found.append(measure(machines, folder, nodes, items, kill=kill))
            print(json.dumps(found[-1]), file=sys.stderr)
    columns = list(found[0])
    print(table([name.replace("_", " ") for name in columns], [[str(one[name]) for name in columns] for one in found]))
    print(json.dumps({"options": vars(options), "runs": found}))
    return int(any(one["lost"] or one["made_twice"] or one["videos"] != options.items for one in found))


if __name__ == "__main__":
    sys.exit(main())
