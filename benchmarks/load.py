"""Measure the latency of a working server and the growth of its memory.

    python benchmarks/load.py                     # 100 clients poll 20 jobs of the embedded model; 1,000 jobs of a fake
    python benchmarks/load.py --model fake        # the same with the fake engine, which needs no CPU of its own

First part: every client polls one of the jobs as often as the server asks, until all have ended; what is measured are
single ``GET /v1/videos/{id}``, from before the request is sent to the whole answer, on kept-alive connections. Clients
and server share the machine. Second part: jobs of the fake engine with an upload each are created, polled, downloaded;
what is measured is the resident memory of the process that answers (the model is in another one).
"""

import argparse
import asyncio
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from _support import ServerProcess
from PIL import Image

GOAL_P95_MS = 50.0
BATCH = 20  # jobs of the second part that wait at once


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, 100 * share))


# -- many clients


async def poll_until_ended(
    client: httpx.AsyncClient, video_id: str, latencies: list[tuple[float, float, str]], start: float
) -> str:
    """Ask as often as the server says; (moment, milliseconds, status) of each answer."""
    await asyncio.sleep(random.uniform(0, 1))  # clients do not all come at the same moment
    while True:
        sent = time.perf_counter()
        response = await client.get(f"/v1/videos/{video_id}")
        took = time.perf_counter() - sent
        response.raise_for_status()
        status: str = response.json()["status"]
        latencies.append((sent - start, 1000 * took, status))
        if status in ("completed", "failed"):
            return status
        await asyncio.sleep(float(response.headers.get("openai-poll-after-ms", 1000)) / 1000)


async def many_clients(url: str, clients: int, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=clients + 10, max_keepalive_connections=clients + 10)
    latencies: list[tuple[float, float, str]] = []
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120.0) as client:
        await client.get("/health")
        start = time.perf_counter()
        creates, ids = [], []
        for body in bodies:
            sent = time.perf_counter()
            response = await client.post("/v1/videos", json=body)
            creates.append(1000 * (time.perf_counter() - sent))
            response.raise_for_status()
            ids.append(response.json()["id"])
        ends = await asyncio.gather(
            *(poll_until_ended(client, ids[n % len(ids)], latencies, start) for n in range(clients))
        )
        seconds = time.perf_counter() - start
    took = [ms for _, ms, _ in latencies]
    return {
        "clients": clients,
        "jobs": len(ids),
        "completed": len({ids[n % len(ids)] for n, end in enumerate(ends) if end == "completed"}),
        "seconds": round(seconds, 1),
        "gets": len(took),
        "gets_per_second": round(len(took) / seconds, 1),
        "get_ms_p50": round(percentile(took, 0.5), 1),
        "get_ms_p95": round(percentile(took, 0.95), 1),
        "get_ms_p99": round(percentile(took, 0.99), 1),
        "get_ms_max": round(max(took), 1),
        "create_ms_p50": round(percentile(creates, 0.5), 1),
        "create_ms_max": round(max(creates), 1),
    }


def first_part(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    fake = args.model == "fake"
    bodies: list[dict[str, Any]]
    if fake:
        prompt = json.dumps({"steps": args.steps, "step_seconds": args.step_seconds})
        bodies = [{"prompt": prompt, "seed": n} for n in range(args.jobs)]
    else:
        words = {"prompt": "a rabbit bounces at the beach", "num_inference_steps": args.steps}
        bodies = [{**words, "seed": n} for n in range(args.jobs)]
    model = "tiny" if fake else args.model  # the fake engine loads nothing; sizes and lengths are the tiny model's
    settings = settings_for(args.jobs, studio=args.studio)
    with ServerProcess(folder / "polled", fake=fake, model=model, **settings) as server:
        wait_until_ready(server)
        before = server.cpu_seconds()
        found = asyncio.run(many_clients(server.url, args.clients, bodies))
        spent = server.cpu_seconds() - before
    return {"model": args.model, **found, "cpu_ms_per_get": round(1000 * spent / found["gets"], 2)}


def settings_for(jobs: int, *, studio: bool = False) -> dict[str, str]:
    limit = str(jobs + 1)
    return {"queue_limit": limit, "key_queue_limit": limit, "log_level": "warning", "studio": str(studio).lower()}


def wait_until_ready(server: ServerProcess) -> None:
    while httpx.get(f"{server.url}/ready", timeout=60.0).status_code != 200:
        time.sleep(0.1)


# -- memory


def picture(number: int) -> bytes:
    """A PNG of 256 x 256 pixels of noise, 200 kB: what a job brings along."""
    target = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(noise).save(target, "PNG")
    return target.getvalue()


def second_part(folder: Path, jobs: int, *, studio: bool) -> dict[str, Any]:
    """Resident memory of the answering process after each batch of jobs, which were created, polled, downloaded."""
    samples: list[tuple[int, float]] = []
    with (
        ServerProcess(folder / "many", fake=True, model="tiny", **settings_for(BATCH, studio=studio)) as server,
        httpx.Client(base_url=server.url, timeout=120.0) as client,
    ):
        wait_until_ready(server)
        samples.append((0, server.rss_mb()))
        start = time.perf_counter()
        for done in range(0, jobs, BATCH):
            count = min(BATCH, jobs - done)
            ids = []
            for number in range(done, done + count):
                files = {"input_reference": (f"{number}.png", picture(number), "image/png")}
                response = client.post(
                    "/v1/videos", data={"prompt": json.dumps({"steps": 2, "n": number})}, files=files
                )
                ids.append(response.raise_for_status().json()["id"])
            for video_id in ids:
                while (video := client.get(f"/v1/videos/{video_id}").json())["status"] != "completed":
                    if video["status"] == "failed":
                        raise RuntimeError(f"{video_id} failed: {video['error']}")
                    time.sleep(0.02)
                client.get(f"/v1/videos/{video_id}/content").raise_for_status()
            samples.append((done + count, server.rss_mb()))
        seconds = time.perf_counter() - start
    return {
        "jobs": jobs,
        "seconds": round(seconds, 1),
        "rss_mb_at_start": round(samples[0][1], 1),
        "rss_mb_at_half": round(next(mb for n, mb in samples if n >= jobs / 2), 1),
        "rss_mb_at_end": round(samples[-1][1], 1),
        "rss_mb_most": round(max(mb for _, mb in samples), 1),
        "rss_mb_per_1000_jobs": round(growth_mb_per_1000(samples, jobs), 2),
        "rss_mb": [(n, round(mb, 1)) for n, mb in samples[:: max(1, len(samples) // 20)]],
    }


def growth_mb_per_1000(samples: Sequence[tuple[int, float]], jobs: int) -> float:
    """Slope of a line through (jobs done, MB) in their second half, when caches are filled."""
    settled = [(n, mb) for n, mb in samples if n >= jobs / 2]
    return 1000 * statistics.linear_regression(*zip(*settled, strict=True)).slope if len(settled) > 1 else 0.0


# -- what is printed


def show(title: str, found: dict[str, Any]) -> None:
    print(f"\n{title}", file=sys.stderr)
    for name, value in found.items():
        if not isinstance(value, list):
            print(f"  {name:<24} {value}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="mini", help="of the polled jobs; fake: an engine that only sleeps")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--step-seconds", type=float, default=0.1, help="of the fake engine")
    parser.add_argument("--memory-jobs", type=int, default=1000, help="0 leaves the second part out")
    parser.add_argument("--studio", action="store_true", help="with the studio in the same process")
    parser.add_argument("--folder", type=Path, help="for the servers' data; a temporary one without it")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {"benchmark": "load", "cores": psutil.cpu_count(), "goal_p95_ms": GOAL_P95_MS}
    result["load_average_before"] = round(psutil.getloadavg()[0], 2)  # above the cores, others are measured as well
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        result["polling"] = first_part(folder, args)
        show(f"{args.clients} polling clients, {args.jobs} jobs", result["polling"])
        if args.memory_jobs:
            result["memory"] = second_part(folder, args.memory_jobs, studio=args.studio)
            show(f"memory over {args.memory_jobs} jobs of the fake engine", result["memory"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
