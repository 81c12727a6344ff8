"""Kill the server and its workers at random while they work, and see what is left of what was accepted.

    python benchmarks/faults.py                                       # 200 kills, the real server, the tiny model
    python benchmarks/faults.py --engine fake --kills 200             # quicker: its child runs no model
    python benchmarks/faults.py --ranks 2                             # each job is shared by two processes
    python benchmarks/faults.py --database postgresql://user:password@host/empty

A server (`pusa serve`, with a worker in it) and a worker beside it (`pusa worker`) share a queue. Clients keep it full
of requests of a few kinds (words, a picture, a long video of several windows, a loop) and send one again, under the
same Idempotency-Key, for as long as they get no answer. Meanwhile SIGKILL hits one of four processes, drawn at random,
at a random moment: the server, the child that holds its model, the worker, or that one's child. Whatever was killed is
started again. With `--ranks` a job is shared by several children, of which a harm hits one, any of them. Instead of a
kill one in ten of them is stopped (SIGSTOP) for some seconds, once in a while for longer
than its lease, and one in ten times a bit of a stored checkpoint is flipped. In the end, when all is done:

    lost        accepted jobs (the client has got an id) that are not completed
    corrupt     videos that cannot be decoded, or differ by a byte from one that was made without interruption
    duplicated  keys with more than one job, and jobs with more than one video
    orphans     children that outlive the server or the worker that started them by more than ten seconds

The table's last column must be 0. Kills are not the jobs' fault, so `max_failures` is out of reach here.
"""

import argparse
import base64
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
from _support import FAKE_ENGINE, ServerProcess, start_python
from PIL import Image

from pusa import media
from pusa.server.jobs.housekeeping import sweep_orphans
from pusa.server.jobs.queue import Job, JobQueue
from pusa.server.jobs.store import FileStore
from pusa.server.settings import ServerSettings
from pusa.server.settings_sources import load_settings

STOPPED_SHARE = DAMAGED_SHARE = 0.1  # of the harms that are no kills
VICTIMS = ("server", "server's child", "worker", "worker's child")
CLIENTS = 3
WAITING_JOBS = 6  # that the clients keep in the queue
_START_SECONDS = 300.0  # for a process to be there again; a machine may be busy
_END_SECONDS = 1800.0  # for the last jobs
_ORPHAN_SECONDS = 10.0  # that a child may take to notice the end of its parent
_RANK_SECONDS = 8  # after which a stopped rank is taken for hung: some of the pauses are longer


# ---- what is asked for -----------------------------------------------------------------------------------------------


def kinds_of(engine: str, step_seconds: float) -> list[dict[str, Any]]:
    """Requests as JSON; the seed is added."""
    if engine == "fake":
        prompts = [{"steps": steps, "step_seconds": step_seconds} for steps in (6, 12)]
        prompts.append({"steps": 3, "step_seconds": step_seconds, "decode_seconds": 4 * step_seconds})
        return [{"prompt": json.dumps(prompt)} for prompt in prompts]
    picture = io.BytesIO()
    Image.radial_gradient("L").resize((64, 48)).save(picture, "PNG")
    given = {"image_b64": base64.b64encode(picture.getvalue()).decode(), "time": 0}
    small = {"width": 48, "height": 32, "num_frames": 9, "num_inference_steps": 8}
    return [
        {**small, "prompt": "a red ball"},
        {**small, "prompt": "a red ball", "keyframes": [given]},
        {**small, "prompt": "a river", "num_frames": 21, "window": 9, "overlap": 1, "num_inference_steps": 4},
        {**small, "prompt": "a wheel", "task": "loop", "num_frames": 17, "window": 17, "overlap": 5},
    ]


class Clients:
    """Threads that keep the queue filled and remember which job each of their keys got."""

    def __init__(self, url: str, kinds: Sequence[dict[str, Any]], seed: int) -> None:
        self.accepted: dict[str, str] = {}  # id by key
        self.sent_again = 0
        self._url, self._kinds, self._seed = url, kinds, seed
        self._lock = threading.Lock()
        self._number = 0
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CLIENTS)]
        self.waiting: Callable[[], int] = lambda: 0

    def start(self, waiting: Callable[[], int]) -> None:
        self.waiting = waiting
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No new requests; those under way are sent until they are answered."""
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=20.0) as client:
            while not self._enough.is_set():
                if self.waiting() >= WAITING_JOBS:
                    time.sleep(0.2)
                    continue
                with self._lock:
                    self._number += 1
                    number = self._number
                self._send(client, f"key-{self._seed}-{number}", number)

    def _send(self, client: httpx.Client, key: str, number: int) -> None:
        body = {**self._kinds[number % len(self._kinds)], "seed": number % 3}
        while True:
            try:
                answer = client.post("/v1/videos", json=body, headers={"Idempotency-Key": key})
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.is_success:
                with self._lock:
                    self.accepted[key] = answer.json()["id"]
                return
            if answer is not None and answer.status_code < 500 and answer.status_code != 429:
                raise RuntimeError(f"{answer.status_code}: {answer.text}")
            with self._lock:
                self.sent_again += 1
            time.sleep(0.2)


# ---- who is killed ---------------------------------------------------------------------------------------------------


class Processes:
    """The server and the worker beside it; either is started again after it has been killed."""

    def __init__(self, folder: Path, engine: str, settings: dict[str, str]) -> None:
        self.server = ServerProcess(folder / "data", fake=engine == "fake", **settings)
        self._settings = {"data": str(folder / "data"), **settings}
        self._engine, self._log = engine, folder / "worker.log"
        self._worker: subprocess.Popen[bytes] | None = None
        self._seen: set[psutil.Process] = set()  # children, also of processes that are gone
        self._pauses: list[threading.Timer] = []

    def start(self) -> None:
        self.server.start()
        self.server.wait_until_alive(_START_SECONDS)
        self._start_worker()

    def _start_worker(self) -> None:
        command = [str(Path(__file__).resolve()), "--be-worker"] if self._engine == "fake" else ["-m", "pusa", "worker"]
        self._worker = start_python(command, self._settings, self._log)

    def _children(self, parent: int, chance: random.Random) -> list[psutil.Process]:
        """Choose one of the processes that hold a model; none if there is none."""
        found = _children(parent)
        self._seen.update(found)
        return [chance.choice(found)] if found else []

    def orphans(self) -> list[str]:
        """List the children that have been seen and still run, some seconds after both parents have ended.

        A child that was stopped before it could tie its life to its parent's ends when it goes on.
        """
        for pause in self._pauses:
            pause.join()
        _, alive = psutil.wait_procs(self._seen, timeout=_ORPHAN_SECONDS)
        return [str(child.pid) for child in alive if child.is_running() and child.status() != "zombie"]

    def kill(self, victim: str, chance: random.Random) -> bool:
        """SIGKILL it; whether it was there. A server or worker that was killed is started again."""
        assert self._worker is not None
        parent = self.server.pid if victim.startswith("server") else self._worker.pid
        self._seen.update(_children(parent))
        if victim.endswith("child"):
            children = self._children(parent, chance)
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            return bool(children)
        psutil.Process(parent).kill()
        if victim == "server":
            self.server.wait()
            self.server.start()
        else:
            self._worker.wait()
            self._start_worker()
        return True

    def pause(self, victim: str, seconds: float, chance: random.Random) -> bool:
        """Stop it for some seconds, as a machine that swaps does; whether it was there."""
        assert self._worker is not None
        parent = psutil.Process(self.server.pid if victim.startswith("server") else self._worker.pid)
        found = self._children(parent.pid, chance) if victim.endswith("child") else [parent]
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
                self._pauses.append(threading.Timer(seconds, _resume, [process]))
                self._pauses[-1].start()
        return bool(found)

    def stop(self) -> None:
        """In good order."""
        assert self._worker is not None
        for parent in (self.server.pid, self._worker.pid):
            self._seen.update(_children(parent))
        self._worker.send_signal(signal.SIGTERM)
        self.server.stop()
        self._worker.wait(60)


def _resume(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.resume()


def damage_checkpoint(files: FileStore, chance: random.Random) -> bool:
    """Flip one bit of a stored checkpoint; whether there was one."""
    keys = sorted(key for key, _ in files.keys("checkpoints"))
    if not keys:
        return False
    path = files.local(chance.choice(keys))
    assert path is not None
    with suppress(FileNotFoundError), path.open("r+b") as file:  # replaced by a later one
        position = chance.randrange(max(1, path.stat().st_size))
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1 << chance.randrange(8)]) if byte else b"")
        return bool(byte)
    return False


def _children(parent: int) -> list[psutil.Process]:
    """The processes that hold a model."""
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(parent).children()
        return [child for child in found if "pusa.server.worker.engine_start" in child.cmdline()]
    return []


def be_worker() -> None:
    """``pusa worker`` with the fake engine."""
    from functools import partial

    from pusa.server.logs import configure_logging
    from pusa.server.worker import worker

    configure_logging()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    worker.make_executor = partial(worker.make_executor, target=FAKE_ENGINE)  # type: ignore[assignment]
    worker.run_worker(load_settings(), stop)


# ---- the run ---------------------------------------------------------------------------------------------------------


def run(
    folder: Path,
    *,
    engine: str,
    ranks: int,
    kills: int,
    every_seconds: float,
    lease_seconds: int,
    database: str | None,
    seed: int,
) -> dict[str, Any]:
    settings = {
        "model": "tiny" if engine == "tiny" else "fake",
        "studio": "0",
        "lease_seconds": str(lease_seconds),
        "backoff_seconds": "0.1",
        "poll_seconds": "0.1",
        "checkpoint_steps": "2",
        "checkpoint_seconds": "0",
        "max_failures": "100",
        "queue_limit": "1000",
        "key_queue_limit": "1000",
        "cpu_ranks": str(ranks),
        "rank_seconds": str(_RANK_SECONDS),
        **({"database": database} if database else {}),
    }
    chance = random.Random(seed)
    processes = Processes(folder, engine, settings)
    processes.start()
    checked = ServerSettings.model_validate({"data": str(folder / "data"), "database": database, "model": "tiny"})
    queue, files = JobQueue(checked.database_url), FileStore(checked.files_url)
    clients = Clients(processes.server.url, kinds_of(engine, every_seconds / 20), seed)
    clients.start(lambda: queue.counts()["queued"])
    killed: Counter[str] = Counter()
    others: Counter[str] = Counter()
    began = time.monotonic()
    try:
        _until(lambda: queue.counts()["completed"] >= 1, _START_SECONDS, "the first job is not completed")
        while sum(killed.values()) < kills:
            time.sleep(chance.uniform(0.1, 1.9) * every_seconds)
            victim, harm = chance.choice(VICTIMS), chance.random()
            if harm < STOPPED_SHARE:
                seconds = chance.uniform(1.0, 5.0) if chance.random() < 0.8 else 1.3 * lease_seconds
                others["stopped"] += processes.pause(victim, seconds, chance)
            elif harm < STOPPED_SHARE + DAMAGED_SHARE:
                others["checkpoints damaged"] += damage_checkpoint(files, chance)
            else:
                killed[victim] += processes.kill(victim, chance)
        clients.stop()
        _until(lambda: not any(queue.counts()[s] for s in ("queued", "in_progress")), _END_SECONDS, "jobs do not end")
    finally:
        took_seconds = time.monotonic() - began
        processes.stop()
    jobs = {job.id: job for job in _all_jobs(queue)}
    left_over = sweep_orphans(queue, files, now=time.time() + 1, older_than_seconds=0)
    problems = {
        "lost": [key for key, id in clients.accepted.items() if id not in jobs or jobs[id].status != "completed"],
        "corrupt": corrupt(list(jobs.values()), files, folder, engine),
        "duplicated": duplicated(list(jobs.values()), clients.accepted, files),
        "orphans": processes.orphans(),
    }
    return {
        "engine": engine,
        "ranks": ranks,
        "database": "postgresql" if database and database.startswith("postgresql") else "sqlite",
        "kills": sum(killed.values()),
        "killed": dict(killed),
        "others": dict(others),
        "restarted_from_the_beginning": sum(any("damaged" in note for note in job.notes) for job in jobs.values()),
        "seconds": round(took_seconds, 1),
        "accepted": len(clients.accepted),
        "sent_again": clients.sent_again,
        "completed": sum(job.status == "completed" for job in jobs.values()),
        "interrupted": sum(job.attempt > 1 for job in jobs.values()),
        "attempts": sum(job.attempt for job in jobs.values()),
        "most_attempts": max((job.attempt for job in jobs.values()), default=0),
        "left_over_files": left_over,
        **{name: len(found) for name, found in problems.items()},
        "problems": {name: found[:5] for name, found in problems.items() if found},
    }


def _until(condition: Callable[[], bool], seconds: float, told: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"{told} within {seconds:g} s")
        time.sleep(0.2)


def _all_jobs(queue: JobQueue) -> list[Job]:
    found, after = [], None
    while True:
        page, more = queue.page(after=after, limit=100, order="asc")
        found += page
        if not more:
            return found
        after = page[-1].id


# ---- the check -------------------------------------------------------------------------------------------------------


def corrupt(jobs: Sequence[Job], files: FileStore, folder: Path, engine: str) -> list[str]:
    """Jobs whose video is not that of an uninterrupted run, byte by byte."""
    (folder / "check").mkdir(exist_ok=True)
    found, wanted = [], dict[str, str]()
    for job in jobs:
        if job.status != "completed":
            continue
        key = job.results["video"]
        path = files.local(key)
        assert path is not None
        try:
            pictures = media.read_video(path)
            made = hashlib.sha256(path.read_bytes()).hexdigest()
        except (ValueError, OSError) as error:
            found.append(f"{job.id}: {error}")
            continue
        request = _with_plain_names(job)
        name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        if name not in wanted:
            wanted[name] = uninterrupted(job, files, folder / "check", engine)
        if made != wanted[name] or len(pictures) < 1:
            found.append(f"{job.id}: another video than without interruption")
    return found


def _with_plain_names(job: Job) -> dict[str, Any]:
    request = dict(job.resolved or job.request)
    conditions = [{**spec, "file": Path(spec["file"]).name} for spec in request["conditions"]]
    return {**request, "conditions": conditions}


def uninterrupted(job: Job, files: FileStore, folder: Path, engine: str) -> str:
    """sha256 of the video of the same request, made at once in this process."""
    from pusa.events import Done
    from pusa.server.worker.messages import Task

    task = Task(
        job_id=job.id,
        attempt=1,
        request=dict(job.resolved or job.request),
        folder=folder,
        inputs={key: files.fetch(key, folder) for key in job.inputs},
    )
    *_, done = _engine(engine).run(task, lambda: False)
    assert isinstance(done, Done)
    made = hashlib.sha256(done.files["video"].read_bytes()).hexdigest()
    for path in folder.iterdir():
        path.unlink()
    return made


@cache
def _engine(engine: str) -> Any:
    """Make the engine whose videos are compared with; it loads its model once."""
    from pusa.server.worker.engine_process import PUSA_ENGINE, make_engine

    return make_engine(FAKE_ENGINE if engine == "fake" else PUSA_ENGINE, "tiny")


def duplicated(jobs: Sequence[Job], accepted: dict[str, str], files: FileStore) -> list[str]:
    """Keys with several jobs, and jobs with several videos (what a killed attempt left over has been swept away)."""
    keys = Counter(job.idempotency_key for job in jobs)
    found = [f"{key}: {count} jobs" for key, count in keys.items() if count > 1]
    found += [f"{id}: two keys" for id, count in Counter(accepted.values()).items() if count > 1]
    videos = Counter(key.split("/")[1] for key, _ in files.keys("results") if key.endswith(".mp4"))
    found += [f"{id}: {count} videos" for id, count in videos.items() if count > 1]
    return found


def table(result: dict[str, Any]) -> str:
    rows = [
        ("kills", f"{result['kills']} in {result['seconds']:.0f} s, on {result['database']}", ""),
        *((f"  of the {name}", str(count), "") for name, count in sorted(result["killed"].items())),
        *((name, str(count), "") for name, count in sorted(result["others"].items())),
        ("jobs begun anew after damage", str(result["restarted_from_the_beginning"]), ""),
        ("requests sent again", str(result["sent_again"]), ""),
        ("attempts", f"{result['attempts']} (at most {result['most_attempts']} for a job)", ""),
        ("jobs that were interrupted", str(result["interrupted"]), ""),
        ("files left over and swept", str(result["left_over_files"]), ""),
        ("accepted jobs / lost", str(result["accepted"]), str(result["lost"])),
        ("videos / corrupt", str(result["completed"]), str(result["corrupt"])),
        ("keys / duplicated", str(result["accepted"]), str(result["duplicated"])),
        ("ranks of a worker / orphans", str(result["ranks"]), str(result["orphans"])),
    ]
    return "\n".join(f"{name:30} {count:34} {bad:>4}" for name, count, bad in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--engine", choices=("tiny", "fake"), default="tiny")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share each job, on the CPU")
    parser.add_argument("--every", type=float, default=4.0, help="mean seconds between two kills")
    parser.add_argument("--lease", type=int, default=20, help="seconds after which a silent worker's job is another's")
    parser.add_argument("--database", help="postgresql://... with no tables in it; default: SQLite in the folder")
    parser.add_argument("--folder", type=Path, help="kept for a look at it; default: a temporary one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--be-worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.be_worker:
        be_worker()
        return 0
    with tempfile.TemporaryDirectory(prefix="pusa-faults-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = run(
            folder,
            engine=options.engine,
            ranks=options.ranks,
            kills=options.kills,
            every_seconds=options.every,
            lease_seconds=options.lease,
            database=options.database,
            seed=options.seed,
        )
    print(table(result))
    print(json.dumps(result))
    return int(any(result[name] for name in ("lost", "corrupt", "duplicated", "orphans")))


if __name__ == "__main__":
    sys.exit(main())
