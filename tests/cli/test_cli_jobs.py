"""`pusa jobs` lists a server's jobs and has failed ones made once more."""

import json
from collections.abc import Iterator

import pytest
from api_samples import Served, serving
from click.testing import CliRunner, Result

from pusa.cli import main


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("jobs")) as server:
        yield server


def jobs(server: Served, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["jobs", *arguments, "--server", server.url])


def test_jobs_are_listed_with_the_reason_of_a_failure(server: Served) -> None:
    done, failed = server.finished()["id"], server.finished(prompt="fail")["id"]
    lines = jobs(server, "list").stdout.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [[failed, "failed"], [done, "completed"]]
    assert "out_of_memory: out of memory: ask for a smaller size" in lines[0]
    assert jobs(server, "list", "--limit", "1").stdout.splitlines() == lines[:1]
    found = jobs(server, "list", "--status", "failed", "--json")
    assert [json.loads(line)["id"] for line in found.stdout.splitlines()] == [failed]


def test_failed_jobs_are_made_once_more(server: Served) -> None:
    failed = server.finished(prompt="fail")["id"]
    assert jobs(server, "retry", failed).stdout.split() == [failed, "queued"]
    assert server.ended(failed)["status"] == "failed"
    assert server.job(failed).attempt == 2
    assert failed in jobs(server, "retry", "--all-failed").stdout
    server.ended(failed)


def test_what_cannot_be_done_is_said(server: Served) -> None:
    done = server.finished()["id"]
    refused = jobs(server, "retry", done)
    assert refused.exit_code == 1
    assert f"{done} is completed: only a failed video can be made once more" in refused.stderr
    assert jobs(server, "retry").exit_code == 2
    assert "give the ids of jobs, or --all-failed" in jobs(server, "retry", done, "--all-failed").stderr
