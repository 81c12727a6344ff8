"""The load benchmark runs as documented, and what it reports is what happened."""

import importlib
import json

import pytest

load = importlib.import_module("load")


def test_the_load_benchmark_polls_all_jobs_to_their_end_and_watches_memory(capsys: pytest.CaptureFixture[str]) -> None:
    load.main(["--model", "fake", "--clients", "4", "--jobs", "2", "--steps", "3", "--memory-jobs", "4"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    polling, memory = found["polling"], found["memory"]
    assert (polling["clients"], polling["jobs"], polling["completed"]) == (4, 2, 2)
    assert polling["gets"] >= 4
    assert polling["gets_per_second"] == pytest.approx(polling["gets"] / polling["seconds"], rel=0.2)
    assert 0 < polling["get_ms_p50"] <= polling["get_ms_p95"] <= polling["get_ms_max"]
    assert [jobs for jobs, _ in memory["rss_mb"]] == [0, 4]
    assert 20 < memory["rss_mb_at_end"] < 2000


def test_memory_that_grows_is_seen() -> None:
    grows = [(jobs, 80 + 0.01 * jobs) for jobs in range(0, 1001, 20)]
    settles = [(jobs, 80.0 + min(5, jobs / 40)) for jobs in range(0, 1001, 20)]  # caches that fill, then stay
    assert load.growth_mb_per_1000(grows, 1000) == pytest.approx(10)
    assert load.growth_mb_per_1000(settles, 1000) == pytest.approx(0, abs=1e-6)
