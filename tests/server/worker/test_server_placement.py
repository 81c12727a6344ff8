"""Each worker has cards of its own, as many as the settings or the plan say."""

import json
from pathlib import Path
from typing import Any

import pytest
from server_samples import quick_settings

from pusa.acceleration.decisions import Card, LoadOptions, Machine, Parallel, PartPlan, Plan
from pusa.server.worker.engine_ranks import PARALLEL_VARIABLE
from pusa.server.worker.placement import cards_of, find_machine, has_gpu, place

CARDS = tuple(Card(80 * 10**9, f"card {number}", (9, 0)) for number in range(4))


def plan(model: str, size: tuple[int, int, int], machine: Machine, options: LoadOptions, guidance: float) -> list[Plan]:
    """Use all cards that the options allow."""
    count = options.gpus or len(machine.cards)
    part = PartPlan("bfloat16", "bfloat16", "cuda")
    problem = "" if model != "wan2.1-1.3b" else "nothing fits: take a smaller model"
    return [Plan(model, "balanced", {"transformer": part}, parallel=Parallel(ulysses=count), problem=problem)]


def placed(folder: Path, number: int = 0, cards: int = 4, visible: str = "", **settings: Any) -> Any:
    machine = Machine(CARDS[:cards], 10**12)
    environ = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    chosen = quick_settings(folder, **{"model": "wan2.1-14b", **settings})
    return place(chosen, number, find=lambda: machine, plan=plan, environ=environ)


def test_workers_of_a_machine_share_its_cards(tmp_path: Path) -> None:
    for number, cards in ((0, "0,1"), (1, "2,3")):
        found = placed(tmp_path, number, workers=2)
        assert found.env["CUDA_VISIBLE_DEVICES"] == cards
        assert found.ranks == 2
        assert json.loads(found.env[PARALLEL_VARIABLE]) == {
            "guidance": 1, "ulysses": 2, "ring": 1, "shard": False, "reason": "",
        }  # fmt: skip
        assert [card.name for card in found.machine.cards] == [f"card {index}" for index in cards.split(",")]


def test_the_settings_limit_the_cards_of_a_worker(tmp_path: Path) -> None:
    one = placed(tmp_path, 1, workers=2, gpus=1)
    assert (one.ranks, one.env) == (1, {"CUDA_VISIBLE_DEVICES": "1", "PUSA_GPUS": "0"})
    assert placed(tmp_path, 1, cards=2, workers=2, gpus=1, visible="2,GPU-5").env["CUDA_VISIBLE_DEVICES"] == "GPU-5"
    three = placed(tmp_path, gpus=3)
    assert (three.ranks, three.env["PUSA_GPUS"]) == (3, "3")


def test_one_process_that_uses_two_cards_plans_for_one_rank(tmp_path: Path) -> None:
    """Wan2.2 has two experts: a card for each is a plan of one rank."""
    experts = {
        name: PartPlan("bfloat16", "bfloat16", "cuda", card=card) for card, name in enumerate(("first", "second"))
    }
    settings = quick_settings(tmp_path, model="wan2.2-14b", gpus=2)
    plans = [Plan("wan2.2-14b", "balanced", experts)]
    found = place(settings, find=lambda: Machine(CARDS[:2], 10**12), plan=lambda *_: plans, environ={})
    assert (found.ranks, found.env) == (1, {"CUDA_VISIBLE_DEVICES": "0,1", "PUSA_GPUS": "0"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 5}, "gpus=5: this machine has 4: set gpus to at most 4, or leave it out"),
        ({"gpus": 3, "workers": 2, "number": 1}, "needs 6 cards and this machine has 4: set workers to at most 1"),
        ({"gpus": 1, "cards": 0}, "gpus=1: this machine has no GPU: leave it out"),
    ],
)
def test_too_few_cards_are_an_error_with_a_way_out(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        placed(tmp_path, **settings)


def test_more_workers_than_cards_take_turns() -> None:
    assert [cards_of(number, 3, None, 2) for number in range(3)] == [[0], [1], [0]]


def test_a_plan_that_does_not_work_starts_one_process_which_says_so(tmp_path: Path) -> None:
    assert placed(tmp_path, model="wan2.1-1.3b").ranks == 1


def test_a_machine_without_a_gpu_has_as_many_ranks_as_tests_ask_for(tmp_path: Path) -> None:
    assert placed(tmp_path, cards=0).ranks == 1
    assert placed(tmp_path, cards=0, cpu_ranks=2).ranks == 2


def test_a_gpu_is_found_by_its_device(tmp_path: Path) -> None:
    assert not has_gpu(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not has_gpu(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert has_gpu(tmp_path)
    assert find_machine().ram_bytes > 0


@pytest.mark.parametrize("name", ["gpus", "cpu_ranks"])
def test_ranks_and_ray_exclude_each_other(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}=2 and executor=ray"):
        quick_settings(tmp_path, executor="ray", **{name: 2})
