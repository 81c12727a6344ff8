"""The fault run, in small: what was accepted survives SIGKILLs of server, worker and their children."""

import json

import faults
import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("engine", "ranks", "kills", "every"), [("fake", 1, 12, 1.0), ("fake", 2, 12, 1.0), ("tiny", 1, 4, 4.0)]
)
def test_nothing_is_lost_corrupt_or_made_twice(engine, ranks, kills, every, tmp_path, capsys):
    numbers = ["--ranks", str(ranks), "--kills", str(kills), "--every", str(every), "--lease", "8"]
    assert faults.main(["--engine", engine, *numbers, "--folder", str(tmp_path / "run")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["lost"], result["corrupt"], result["duplicated"], result["orphans"]) == (0, 0, 0, 0)
    assert result["kills"] == kills
    assert result["accepted"] == result["completed"] > 0


def test_a_changed_and_a_missing_video_are_found(tmp_path):
    """Or the run could not fail."""
    from server_samples import House, quick_settings, submit, wait_until

    house = House(quick_settings(tmp_path / "data"))
    jobs = [submit(house.queue, steps=2, number=number) for number in range(3)]
    house.hire()
    wait_until(lambda: house.queue.counts()["completed"] == 3)
    house.dismiss()
    done = [house.job(job) for job in jobs]
    assert faults.corrupt(done, house.files, tmp_path, "fake") == []
    other, cut = (house.files.local(job.results["video"]) for job in done[1:])
    assert other is not None
    assert cut is not None
    other.write_bytes(house.files.get_bytes(done[0].results["video"]))
    cut.write_bytes(cut.read_bytes()[:300])
    found = faults.corrupt(done, house.files, tmp_path, "fake")
    assert [line.partition(":")[0] for line in found] == [done[1].id, done[2].id]
    assert faults.duplicated([done[0], done[0]], {}, house.files) == [f"{done[0].idempotency_key}: 2 jobs"]
    house.queue.close()
