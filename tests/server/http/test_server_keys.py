"""Wrong keys are counted and slowed down, right ones never; a changed file of keys is read again."""

import os
from pathlib import Path

import pytest
from api_samples import refusal, serving
from server_samples import wait_until

from pusa.server.http.keys import ApiKeys, WrongKeys

ANNS, BOBS, CARLS = "anns-key-0123456789", "bobs-key-0123456789", "carls-key-0123456789"


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


# ---- wrong keys ----


def test_the_first_wrong_keys_cost_nothing_and_each_further_one_twice_as_much():
    wrong = WrongKeys(free=3, first_seconds=0.1, longest_seconds=1.0, clock=Time())
    pauses = [wrong.count("1.2.3.4") for _ in range(8)]
    assert pauses == pytest.approx([0, 0, 0, 0.1, 0.2, 0.4, 0.8, 1.0])
    assert wrong.count("5.6.7.8") == 0
    assert wrong.total == 9


def test_an_address_is_forgiven_with_time():
    time = Time()
    wrong = WrongKeys(free=3, half_life_seconds=60, clock=time)
    for _ in range(6):
        wrong.count("a")
    time.now += 120
    assert wrong.count("a") == 0


def test_memory_is_bounded_however_many_addresses_there_are():
    wrong = WrongKeys(most_addresses=100, clock=Time())
    for number in range(1000):
        wrong.count(str(number))
    assert len(wrong) == 100
    assert wrong.total == 1000


def test_few_of_an_address_wait_at_once():
    wrong = WrongKeys(at_once=2)
    assert [wrong.may_wait("a") for _ in range(3)] == [True, True, False]
    assert wrong.may_wait("b")
    wrong.end_wait("a")
    assert wrong.may_wait("a")


def test_a_right_key_is_never_refused_and_wrong_ones_show_in_the_metrics(tmp_path, caplog):
    with serving(tmp_path, workers=0, api_keys=(ANNS,)) as server:
        server.service.wrong_keys._first_seconds = 0.01  # what is tested is no time
        server.service.wrong_keys._longest_seconds = 0.02
        for _ in range(12):
            answer = server.http.get("/v1/videos", headers={"authorization": "Bearer wrong"})
            assert refusal(answer, 401)["code"] == "invalid_api_key"
        right = {"authorization": f"Bearer {ANNS}"}
        assert server.http.get("/v1/videos", headers=right).status_code == 200
        assert "pusa:wrong_api_keys_total 12.0" in server.http.get("/metrics", headers=right).text
        assert server.http.get("/v1/videos").status_code == 401  # without any key: a browser that asks for one
        assert server.service.wrong_keys.total == 12
    assert caplog.text.count("127.0.0.1 has presented more than 5 wrong API keys: it is slowed down") == 1


def test_who_guesses_in_parallel_is_told_to_wait(tmp_path):
    with serving(tmp_path, workers=0, api_keys=(ANNS,)) as server:
        server.service.wrong_keys._free, server.service.wrong_keys._at_once = 0, 0
        answer = server.http.get("/v1/videos", headers={"authorization": "Bearer wrong"})
        assert refusal(answer, 429)["code"] == "too_many_wrong_keys"
        assert int(answer.headers["retry-after"]) >= 1


# ---- the file ----


def write(path: Path, *keys: str) -> None:
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text("# keys\n" + "\n".join(keys) + "\n")
    os.utime(path, ns=(before + 10**9, before + 10**9))  # whatever the resolution of the file system


def test_a_changed_file_of_keys_counts_without_a_restart(tmp_path):
    file = tmp_path / "keys"
    write(file, ANNS)
    keys = ApiKeys([BOBS, ANNS], file, look_seconds=0.0)
    assert keys.owner(ANNS)
    assert keys.owner(CARLS) is None
    write(file, CARLS)
    assert keys.owner(CARLS)
    assert keys.owner(BOBS)  # not from the file
    assert keys.owner(ANNS) is None


@pytest.mark.parametrize("content", ["", "# nothing\n", "short\n", None], ids=["empty", "comment", "short", "gone"])
def test_a_file_that_cannot_be_used_changes_nothing(tmp_path, content, caplog):
    file = tmp_path / "keys"
    write(file, ANNS)
    keys = ApiKeys([ANNS], file, look_seconds=0.0)
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    for _ in range(3):
        assert keys.owner(ANNS)
    assert caplog.text.count("the API keys stay as they were: ") == 1
    assert "short\n" not in caplog.text.replace("short`", "")
    write(file, BOBS)
    assert keys.owner(BOBS)


def test_the_server_reads_its_file_of_keys_again(tmp_path):
    file = tmp_path / "keys"
    write(file, ANNS)
    with serving(tmp_path, workers=0, api_keys=(ANNS,), api_keys_file=str(file)) as server:

        def status(key: str) -> int:
            return server.http.get("/v1/videos", headers={"authorization": f"Bearer {key}"}).status_code

        assert (status(ANNS), status(CARLS)) == (200, 401)
        write(file, CARLS)
        wait_until(lambda: status(CARLS) == 200)
        assert status(ANNS) == 401
