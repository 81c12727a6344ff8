"""A group of ranks is one executor: what happens to one of its processes happens to the task and to all of them."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from server_samples import House, fake_executor, is_running, request, submit, uninterrupted, video_of, wait_until

from pusa.events import Checkpoint, Done, Step
from pusa.server.worker.engine_process import PUSA_ENGINE, make_engine
from pusa.server.worker.local import LocalExecutor
from pusa.server.worker.messages import Cancelled, Error, Task

Start = Callable[..., LocalExecutor]


def task(folder: Path, attempt: int = 1, **said: Any) -> Task:
    folder.mkdir(exist_ok=True)
    return Task(job_id="video_1", attempt=attempt, request=request(**said), folder=folder, checkpoint_every=2)


@pytest.fixture
def started() -> Iterator[Start]:
    """``started(**options)``: a group of two ranks that is ready; in the end none of its processes is left."""
    made: list[LocalExecutor] = []
    pids: set[int] = set()

    def start(model: str = "fake", **options: Any) -> LocalExecutor:
        executor = fake_executor(model, **{"ranks": 2, "join_seconds": 0.5, **options})
        made.append(executor)
        ready(executor)
        pids.update(executor.state.pids)
        return executor

    yield start
    for executor in made:
        pids.update(executor.state.pids)
        executor.close()
    assert pids
    assert not [pid for pid in pids if is_running(pid)]


def ready(executor: LocalExecutor) -> LocalExecutor:
    def is_ready() -> bool:
        executor.start()
        return executor.state.ready

    wait_until(is_ready)
    return executor


def test_a_group_is_one_executor_whose_first_rank_speaks(started: Start, tmp_path: Path) -> None:
    executor = started(ranks=3)
    assert (executor.state.world_size, len(set(executor.state.pids))) == (3, 3)
    messages = list(executor.run(task(tmp_path / "a", steps=4)))
    assert [m.step for m in messages if isinstance(m, Step)] == [1, 2, 3, 4]
    assert [m.step for m in messages if isinstance(m, Checkpoint)] == [2, 4]
    assert isinstance(messages[-1], Done)
    before = executor.state.pids
    assert isinstance(list(executor.run(task(tmp_path / "b")))[-1], Done)
    assert executor.state.pids == before


def test_cancel_ends_all_ranks_between_the_same_two_steps(started: Start, tmp_path: Path) -> None:
    executor = started()
    before, seen = executor.state.pids, []
    for message in executor.run(task(tmp_path / "a", steps=1000, step_seconds=0.01)):
        seen.append(message)
        if isinstance(message, Step) and message.step == 2:
            executor.cancel()
    assert isinstance(seen[-1], Cancelled)
    steps = {path.name.split(".")[1] for path in (tmp_path / "a").glob(".1-*.1")}
    decided = {path.name.split(".")[1] for path in (tmp_path / "a").glob(".1-*.decision")}
    assert steps == decided  # no rank went further than the other
    assert isinstance(list(executor.run(task(tmp_path / "b")))[-1], Done)
    assert executor.state.pids == before


@pytest.mark.parametrize("stage", ["load", "encode", "denoise", "decode"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_attempt_and_the_group_in_every_stage(
    rank: int, stage: str, started: Start, tmp_path: Path
) -> None:
    executor = started()
    pids = executor.state.pids
    end = list(executor.run(task(tmp_path / "a", at_stage=stage, then="kill", rank=rank, decode_seconds=5.0)))[-1]
    assert isinstance(end, Error)
    assert (end.code, end.retry) == ("worker_lost", True)
    assert end.message.startswith(f"rank {rank} of 2 (pid {pids[rank]}) was killed by signal 9")
    assert not executor.state.ready
    wait_until(lambda: not any(is_running(pid) for pid in pids))
    again = list(ready(executor).run(task(tmp_path / "a", attempt=2, at_stage=stage, then="kill")))[-1]
    assert isinstance(again, Done)


def test_a_rank_that_ends_by_itself_is_named(started: Start, tmp_path: Path) -> None:
    executor = started()
    pids = executor.state.pids
    end = list(executor.run(task(tmp_path / "a", at_step=1, then="exit", rank=1)))[-1]
    assert end == Error("worker_lost", f"rank 1 of 2 (pid {pids[1]}) ended with status 3", retry=True)


def test_a_stopped_rank_is_named_and_the_whole_group_is_ended(started: Start, tmp_path: Path) -> None:
    executor = started(silent_seconds=2.5)
    pids = executor.state.pids
    end = list(executor.run(task(tmp_path / "a", steps=6, at_step=4, then="stop", rank=1)))[-1]
    assert end == Error("worker_lost", f"rank 1 of 2 (pid {pids[1]}) has not answered for 2.5 s", retry=True)
    again = list(ready(executor).run(task(tmp_path / "a", attempt=2, steps=6)))
    assert [m.step for m in again if isinstance(m, Step)] == [5, 6]
    assert not any(is_running(pid) for pid in pids)


def test_a_rank_that_stops_between_two_tasks_or_while_it_loads_is_noticed(started: Start) -> None:
    executor = started(silent_seconds=2.5)
    psutil.Process(executor.state.pids[1]).send_signal(signal.SIGSTOP)
    wait_until(lambda: not executor.state.ready)
    assert "rank 1 of 2" in (executor.state.error or "")
    assert "has not answered for 2.5 s" in (executor.state.error or "")

    loading = fake_executor('{"then": "stop", "rank": 1}', ranks=2, silent_seconds=2.5)
    loading.start()
    wait_until(lambda: loading.state.stage == "failed")
    assert "has not answered for 2.5 s" in (loading.state.error or "")
    loading.close()


def test_ranks_that_report_nothing_are_ended_with_a_line_that_says_where_each_is(
    started: Start, tmp_path: Path
) -> None:
    executor = started(stall_seconds=1.5)
    end = list(executor.run(task(tmp_path / "a", at_step=2, then="hang", rank=1)))[-1]
    assert (end.code, end.retry) == ("stalled", True)
    assert end.message == "no rank of 2 has reported anything for 1.5 s (rank 0 after 2 steps, rank 1 after 2 steps)"
    assert isinstance(list(ready(executor).run(task(tmp_path / "a", attempt=2)))[-1], Done)


def test_an_error_of_one_rank_is_the_task_s_and_costs_the_group(started: Start, tmp_path: Path) -> None:
    executor = started()
    pids = executor.state.pids
    end = list(executor.run(task(tmp_path / "a", at_step=1, then="out_of_memory", rank=1)))[-1]
    assert (end.code, end.retry) == ("out_of_memory", False)
    assert end.message == f"rank 1 of 2 (pid {pids[1]}): not enough memory"
    assert not executor.state.ready

    ready(executor)
    end = list(executor.run(task(tmp_path / "b", at_step=1, then="out_of_memory", rank=0)))[-1]
    assert end == Error("out_of_memory", "not enough memory", retry=False)
    assert not executor.state.ready  # the other rank waited for it


def test_an_error_of_all_ranks_keeps_the_group(started: Start, tmp_path: Path) -> None:
    executor = started()
    before = executor.state.pids
    end = list(executor.run(task(tmp_path / "a", at_step=1, then="invalid", rank=None)))[-1]
    assert (end.code, end.retry) == ("invalid_request", False)
    assert isinstance(list(executor.run(task(tmp_path / "b")))[-1], Done)
    assert executor.state.pids == before


@pytest.mark.parametrize(
    ("how", "expected"), [("kill", "was killed by signal 9"), ("exit", "ended with status 3"), ("raise", "broke")]
)
def test_a_rank_that_cannot_load_is_named_and_no_process_is_left(how: str, expected: str) -> None:
    executor = fake_executor(f'{{"then": "{how}", "rank": 1, "load_seconds": 0.2}}', ranks=2)
    executor.start()
    wait_until(lambda: executor.state.pids)
    pids = executor.state.pids
    wait_until(lambda: executor.state.stage == "failed")
    assert executor.state.error is not None
    assert executor.state.error.startswith(f"rank 1 of 2 (pid {pids[1]})")
    assert expected in executor.state.error
    wait_until(lambda: not any(is_running(pid) for pid in pids))
    executor.close()


@pytest.mark.parametrize("harm", ["kill", "stop"])
def test_a_job_continues_from_its_checkpoint_on_a_new_group(harm: str, house: House) -> None:
    instructions = {"steps": 8, "step_seconds": 0.02, "at_step": 5, "then": harm, "rank": 1}
    job = submit(house.queue, **instructions)
    worker = house.hire(fake_executor(ranks=2, silent_seconds=2.5))
    done = house.ended(job)
    assert (done.status, done.attempt) == ("completed", 2)
    assert video_of(house, done) == uninterrupted(house, **instructions)
    (record,) = house.queue.workers()
    assert record.state["world_size"] == 2
    assert record.state["pids"] == list(worker.state.pids)


@pytest.mark.slow
def test_two_ranks_of_the_real_engine_make_the_video_that_one_makes_whatever_happens_to_them(tmp_path: Path) -> None:
    asked = {"model": "tiny", "prompt": "a red ball", "conditions": [], "seed": 1, "steps": 4, "frames": 5}

    def task_in(name: str) -> Task:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return Task(job_id="video_1", attempt=1, request=asked, folder=folder, checkpoint_every=1)

    def steps_of(messages: list[Any]) -> list[int]:
        return [m.step for m in messages if isinstance(m, Step) and m.stage == "denoise"]

    executor = LocalExecutor("tiny", ranks=2)
    try:
        pids = ready(executor).state.pids
        cancelled = []
        for message in executor.run(task_in("a")):
            cancelled.append(message)
            if isinstance(message, Step) and message.step == 1:
                executor.cancel()
        assert isinstance(cancelled[-1], Cancelled)
        assert executor.state.pids == pids

        killed = []
        for message in executor.run(task_in("a")):
            killed.append(message)
            if isinstance(message, Step) and message.stage == "denoise":
                psutil.Process(pids[1]).kill()
        assert isinstance(killed[-1], Error)
        assert killed[-1].message.startswith(f"rank 1 of 2 (pid {pids[1]}) was killed by signal 9")
        wait_until(lambda: not any(is_running(pid) for pid in pids))

        rest = list(ready(executor).run(task_in("a")))
        assert isinstance(rest[-1], Done)
        assert steps_of(rest) == list(range(steps_of(killed)[-1] + 1, 5))
        made = rest[-1].files["video"].read_bytes()
    finally:
        executor.close()

    *_, done = make_engine(PUSA_ENGINE, "tiny").run(task_in("b"), lambda: False)
    assert isinstance(done, Done)
    assert made == done.files["video"].read_bytes()
