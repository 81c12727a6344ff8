"""Measure the cost of event streams: the server's CPU time while one job runs and many clients follow jobs.

    python benchmarks/streams.py                     # 0, 300 and 1,000 streams
    python benchmarks/streams.py --streams 0 100

One job of the fake engine takes a step every 0.1 s; fifty jobs wait behind it. "waiting": the streams follow the jobs
that wait. "running": all follow the one that runs, and get every change. "all": they follow all jobs, as the studio's
pages do, and get every change too. Measured is the CPU time of the process that
answers, in cores, over some seconds; the clients are in another process. Goal: below 0.2 cores for 1,000 streams more
than without any.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from _common import table
from _support import ServerProcess

STREAMS = (0, 300, 1000)
WAITING_JOBS = 50
STEP_SECONDS = 0.1


async def follow(port: int, path: str, counts: list[int], number: int) -> None:
    """Read one stream and count its bytes; a bare connection, so that the clients leave the machine to the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
    try:
        while data := await reader.read(65_536):
            counts[number] += len(data)
    finally:
        writer.close()


async def follow_all(server: ServerProcess, paths: Sequence[str], streams: int, seconds: float) -> dict[str, float]:
    counts = [0] * streams
    tasks = []
    for number in range(streams):
        tasks.append(asyncio.create_task(follow(server.port, paths[number % len(paths)], counts, number)))
        if number % 50 == 49:
            await asyncio.sleep(0.2)
    while not all(counts):
        await asyncio.sleep(0.1)
    await asyncio.sleep(2.0)
    cpu, bytes_before, start = server.cpu_seconds(), sum(counts), time.perf_counter()
    await asyncio.sleep(seconds)
    took = time.perf_counter() - start
    found = {
        "cores": (server.cpu_seconds() - cpu) / took,
        "kb_per_second": (sum(counts) - bytes_before) / took / 1000,
        "rss_mb": server.rss_mb(),
    }
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, OSError):
            await task
    return found


def run(folder: Path, streams: int, which: str, seconds: float) -> dict[str, float]:
    limits = {"queue_limit": "1000", "log_level": "warning", "studio": "0", "max_connections": "4000"}
    with ServerProcess(folder / f"{which}-{streams}", fake=True, model="tiny", **limits) as server:
        while httpx.get(f"{server.url}/ready").status_code != 200:
            time.sleep(0.1)

        def create(**prompt: Any) -> str:
            answer = httpx.post(f"{server.url}/v1/videos", json={"prompt": json.dumps(prompt)})
            return str(answer.raise_for_status().json()["id"])

        running = create(steps=100_000, step_seconds=STEP_SECONDS)
        while httpx.get(f"{server.url}/v1/videos/{running}").json()["status"] != "in_progress":
            time.sleep(0.05)
        waiting = [create(steps=1) for _ in range(WAITING_JOBS)]
        ids = {"running": [running], "waiting": waiting, "all": []}[which]
        paths = [f"/v1/videos/{id}/events" for id in ids] or ["/v1/events"]
        found = asyncio.run(follow_all(server, paths, streams, seconds))
        httpx.post(f"{server.url}/v1/videos/{running}/cancel")
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    options = parser.parse_args(arguments)
    found = {}
    with tempfile.TemporaryDirectory(prefix="pusa-streams-") as temporary:
        for which in ("waiting", "running", "all"):
            for streams in options.streams:
                found[which, streams] = run(Path(temporary), streams, which, options.seconds)
                print(f"{streams} streams of {which}: {found[which, streams]['cores']:.3f} cores", file=sys.stderr)
    columns = ["streams of", "number", "cores", "kB/s", "RSS MB"]
    rows = [
        [which, n, f"{of['cores']:.3f}", f"{of['kb_per_second']:.0f}", f"{of['rss_mb']:.0f}"]
        for (which, n), of in found.items()
    ]
    print(table(columns, rows))
    result = {
        "benchmark": "streams",
        "cores": psutil.cpu_count(),
        "load_average": round(psutil.getloadavg()[0], 2),
        "found": {f"{which}-{n}": {k: round(v, 4) for k, v in of.items()} for (which, n), of in found.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
