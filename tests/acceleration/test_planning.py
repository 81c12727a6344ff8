"""A plan fits the machine, follows the user's wish, and says why; where nothing fits it says what would."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from plan_table import CARDS, MODELS, TI2V_5B, cell, machine_of, plan_of, plans_of, sizes_of, table

from pusa import zoo
from pusa.acceleration.decisions import WISHES, Card, LoadOptions, Machine, Plan, Storage, Wish
from pusa.acceleration.machine import described_machine
from pusa.acceleration.planning import plan, plans, usable_bytes

TABLE = Path(__file__).with_name("plans.txt")
GB = 10**9
SOME_RAM = (16, 64, 256)
MANY = [
    (model, size, cards, ram) for model in MODELS for size in sizes_of(model) for cards in CARDS for ram in SOME_RAM
]


def test_common_machines_run_as_the_table_says() -> None:
    """A change of the rules shows here as a change of plans.txt: see `plan_table.table`."""
    assert "\n".join(table()) == TABLE.read_text()


# ---- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", WISHES)
def test_every_plan_fits_and_every_fallback_is_smaller(wish: Wish) -> None:
    for model, size, cards, ram in MANY:
        machine = machine_of(cards, ram)
        found = plans_of(model, size, cards, ram, wish)
        if found[0].problem:
            assert len(found) == 1
            assert not found[0].parts
            continue
        for one in found:
            assert one.peak_bytes <= usable_bytes(machine.cards[0]) < machine.cards[0].memory_bytes
            assert one.ram_peak_bytes <= machine.ram_bytes
            assert set(one.gpu_peak_bytes) - {"load"} == {"encode", "denoise", "decode"}
            assert one.parallel.ranks <= len(machine.cards)
            assert all(part.reason for part in one.parts.values())
        assert all(later.peak_bytes < earlier.peak_bytes for earlier, later in pairwise(found))


def test_wishes_are_kept() -> None:
    for model, size, cards, ram in MANY:
        fastest, balanced, smallest = (plan_of(model, size, cards, ram, wish) for wish in WISHES)
        assert bool(fastest.problem) == bool(balanced.problem) == bool(smallest.problem)
        if not balanced.problem:
            assert fastest.relative_speed >= balanced.relative_speed
            assert smallest.peak_bytes <= balanced.peak_bytes
            assert smallest.peak_bytes <= fastest.peak_bytes


def is_exact(found: Plan) -> bool:
    return found.parts["transformer"].storage == "bfloat16"


def offload(found: Plan) -> str:
    return found.parts["transformer"].offload


def test_more_memory_never_makes_it_slower_but_for_exact_weights_or_to_spare_the_disk() -> None:
    wishes: tuple[Wish, ...] = ("fastest", "balanced")
    for model, wish in product(MODELS, wishes):
        rows = [
            [plan_of(model, size, cards, ram, wish) for ram in SOME_RAM] for size in sizes_of(model) for cards in CARDS
        ]
        for ram, count, capability in product((32, 128), (1, 2, 4), ((8, 6), (9, 0))):
            machines = [machine_of(f"{count}x{gb}", ram, capability) for gb in (8, 16, 24, 48, 80)]
            options = LoadOptions(memory=wish)
            rows.append([plan(MODELS[model], machine=machine, options=options) for machine in machines])
        for less, more in (pair for row in rows for pair in pairwise(row)):
            if not less.problem:
                assert not more.problem
                becomes_exact = wish == "balanced" and is_exact(more) and not is_exact(less)
                spares_disk = wish == "balanced" and offload(less) == "disk" != offload(more)
                assert more.relative_speed >= less.relative_speed or becomes_exact or spares_disk


# ---- decisions -------------------------------------------------------------------------------------------------------


def test_balanced_is_exact_where_the_bus_keeps_up_and_quantised_where_it_does_not() -> None:
    machine = machine_of("1x24", 64)
    streamed = plan("wan2.1-14b", machine=machine)
    assert cell(streamed) == "bf16-blocks"
    assert streamed.relative_speed > 0.95  # a block is copied in less time than one computes
    slow = plan("wan2.1-14b", machine=replace(machine, offload_bytes_per_second=1e9))
    assert cell(slow) == "fp8"
    assert any("another alpha merges again" in note for note in slow.notes)
    kept = plan(
        "wan2.1-14b",
        machine=replace(machine, offload_bytes_per_second=1e9),
        options=LoadOptions(quantize="none"),
    )
    assert is_exact(kept)
    assert kept.relative_speed < 0.5


def test_eight_bits_follow_the_generation_of_the_card() -> None:
    fastest = LoadOptions(memory="fastest")
    storages = {
        capability: plan("wan2.1-14b", machine=described_machine(gpu_gb=80, capability=capability), options=fastest)
        .parts["transformer"]
        .storage
        for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
    }
    assert storages == {(8, 0): "int8", (8, 6): "int8", (8, 9): "fp8", (9, 0): "fp8", (12, 0): "fp8"}
    forced = plan("wan2.1-14b", machine=machine_of("1x80", 64), options=LoadOptions(quantize="int8"))
    assert forced.parts["transformer"].storage == "int8"


def test_two_cards_share_guidance_or_without_it_the_tokens() -> None:
    machine = machine_of("2x48", 64)
    both = plan("wan2.1-14b", machine=machine)
    assert (both.parallel.guidance, both.parallel.ulysses) == (2, 1)
    assert both.relative_speed > 1.9
    for guidance in (False, 1.0):
        alone = plan("wan2.1-14b", machine=machine, guidance=guidance)
        assert (alone.parallel.guidance, alone.parallel.ulysses) == (1, 2)
    assert plan("wan2.1-14b", machine=machine, guidance=3.0) == both
    one = plan("wan2.1-14b", machine=machine, options=LoadOptions(gpus=1))
    assert one.parallel.ranks == 1


def test_two_experts_have_a_card_each_where_both_do_not_fit_one() -> None:
    found = plan("wan2.2-a14b", machine=machine_of("2x48", 64))
    assert [found.parts[part].card for part in ("transformer", "transformer_2")] == [0, 1]
    assert found.parallel.ranks == 1
    assert found.parts["transformer"].offload == "none"


def test_an_adapter_stays_live_where_weights_cannot_be_merged() -> None:
    options = LoadOptions(transformer=Path("wan2.1-t2v-14b-Q8_0.gguf"))
    machine = machine_of("1x32", 64)
    found = plan("wan2.1-14b", machine=machine, options=options)
    assert (found.parts["transformer"].storage, found.parts["transformer"].kept) == ("gguf", True)
    assert found.parts["transformer"].offload == "none"
    assert not found.merge
    small = replace(options, file_bytes={"transformer": 9 * GB})
    smaller, larger = (
        min(way.gpu_peak_bytes["denoise"] for way in plans(found.model, machine=machine, options=each) if is_whole(way))
        for each in (small, options)
    )
    assert smaller < larger - 5 * GB
    low_rank = plan("wan2.1-14b", machine=machine, options=options, lora_ranks={"transformer": 128})
    assert found.gpu_peak_bytes["denoise"] - low_rank.gpu_peak_bytes["denoise"] == pytest.approx(3.7 * GB, rel=0.01)
    in_eight_bits = plan("wan2.1-14b", machine=machine, options=replace(options, quantize="fp8"))
    assert in_eight_bits.parts == found.parts
    assert any("quantize=fp8 has no effect on a file in gguf" in note for note in in_eight_bits.notes)


def is_whole(found: Plan) -> bool:
    return found.parts["transformer"].offload == "none"


STORED: dict[str, Any] = {
    "transformer": Path("wan.gguf"),
    "file_storage": {"transformer": "gguf", "text_encoder": "fp8"},
    "file_bytes": {"transformer": 9 * GB, "text_encoder": 7 * GB},
}


def test_a_quantised_file_grows_only_where_full_weights_fit_the_card() -> None:
    for cards, storage, offload in (("1x12", "gguf", "blocks"), ("1x24", "gguf", "none"), ("1x48", "bfloat16", "none")):
        found = plan("wan2.1-14b", machine=machine_of(cards, 32), options=LoadOptions(**STORED))
        transformer = found.parts["transformer"]
        assert (transformer.storage, transformer.offload) == (storage, offload), cards
        assert found.merge == (not transformer.kept) == (storage == "bfloat16")
        assert (found.parts["text_encoder"].storage, found.parts["text_encoder"].kept) == ("fp8", True)
    full = plan("wan2.1-14b", machine=machine_of("1x12", 64), options=LoadOptions(**STORED, quantize="none"))
    assert {part.storage for part in full.parts.values()} == {"bfloat16"}
    assert not any(part.kept for part in full.parts.values())


def test_fallbacks_of_full_weights_are_the_file_as_it_is() -> None:
    ways = plans("wan2.1-14b", machine=machine_of("1x48", 64), options=LoadOptions(**STORED))
    storages = list(dict.fromkeys(way.parts["transformer"].storage for way in ways))
    assert storages == ["bfloat16", "gguf"]
    assert {way.parts["transformer"].offload for way in ways} >= {"none", "blocks", "leaves"}


@pytest.mark.parametrize(
    ("storage", "size_gb", "is_problem"),
    [("gguf", 8, False), ("gguf", 15, True), ("fp8", 15, True), ("int8", 15, True)],
)
def test_a_file_that_stays_quantised_must_fit_into_ram_as_it_is_read(
    storage: Storage, size_gb: int, is_problem: bool
) -> None:
    sizes = {"transformer": size_gb * GB}
    options = LoadOptions(transformer=Path("wan"), file_storage={"transformer": storage}, file_bytes=sizes)
    found = plan("wan2.1-14b", machine=machine_of("1x12", 16), options=options, lora_ranks={})
    assert bool(found.problem) == is_problem


def test_without_a_card_a_file_stays_quantised_where_ram_is_short() -> None:
    for ram, storage in ((128, "bfloat16"), (32, "gguf")):
        found = plan("wan2.1-14b", machine=Machine(ram_bytes=ram * GB), options=LoadOptions(**STORED))
        assert found.parts["transformer"].storage == storage
        assert found.parts["transformer"].kept == (storage == "gguf")
        assert found.merge == (storage == "bfloat16")
    asked = LoadOptions(**STORED, quantize="fp8")
    assert plan("wan2.1-14b", machine=Machine(ram_bytes=128 * GB), options=asked).parts["transformer"].kept


def test_no_lora_is_nothing_to_merge() -> None:
    machine = machine_of("1x48", 64)
    assert plan("wan2.1-14b", machine=machine).merge
    for none in ({}, (), (0,)):
        assert not plan("wan2.1-14b", machine=machine, lora_ranks=none).merge
    two = plan("wan2.1-14b", machine=machine, lora_ranks=(512, 64))
    assert two == plan("wan2.1-14b", machine=machine, lora_ranks={"transformer": 576})


def test_the_5b_model_is_planned_from_its_shapes() -> None:
    found = plan(TI2V_5B, machine=machine_of("1x24", 32))
    assert cell(found) == "bf16"
    assert found.gpu_peak_bytes["denoise"] == pytest.approx(13.7 * GB, rel=0.1)  # 10.0 of weights, 2.1 at work, the VAE
    assert found.gpu_peak_bytes["decode"] == pytest.approx(21.2 * GB, rel=0.1)


def test_a_folder_is_planned_from_its_own_shapes(tmp_path: Path) -> None:
    from pusa import PusaPipeline

    PusaPipeline.from_pretrained("tiny").save_pretrained(tmp_path / "tiny-wan")
    found = plan(str(tmp_path / "tiny-wan"), machine=Machine(ram_bytes=16 * GB))
    assert found.model == "tiny-wan"
    assert found.parts["transformer"].dtype == "float32"
    unknown = plan("somebody/some-model", machine=machine_of("1x48", 64))
    assert unknown.model == "wan2.1-14b"


def test_cards_of_two_kinds_count_as_the_smaller_one() -> None:
    large, small = machine_of("1x80", 256).cards[0], machine_of("1x8", 256).cards[0]
    mixed = replace(machine_of("1x80", 256), cards=(large, small))
    alone = plan("wan2.1-14b", machine=mixed, options=LoadOptions(gpus=1))
    assert cell(alone) == "bf16"
    both = plan("wan2.1-14b", machine=mixed, options=LoadOptions(gpus=2))
    assert both.peak_bytes <= usable_bytes(small)


# ---- without a card --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "has_bf16", "dtypes"),
    [
        ("tiny", True, ("float32", "float32", "float32")),
        ("mini", False, ("float32", "float32", "float32")),
        ("mini", True, ("bfloat16", "float32", "bfloat16")),
        ("wan2.1-1.3b", False, ("bfloat16", "bfloat16", "float32")),
    ],
)
def test_a_machine_without_a_card_computes_on_its_cpu(model: str, has_bf16: bool, dtypes: tuple[str, ...]) -> None:
    if model not in zoo.ZOO:
        pytest.skip("the weights of the embedded model are not here")
    machine = Machine(ram_bytes=32 * GB, cpu_has_bf16=has_bf16)
    (found,) = plans(model, machine=machine)
    parts = [found.parts[part] for part in ("transformer", "text_encoder", "vae")]
    assert tuple(part.dtype for part in parts) == dtypes
    assert {part.device for part in parts} == {"cpu"}
    assert found.peak_bytes == 0
    assert 0 < found.ram_peak_bytes <= machine.ram_bytes
    assert found.merge is False
    assert plans(model, machine=machine, options=LoadOptions(gpus=1)) == [found]
    no_cuda = replace(machine, cards=(Card(16 * GB, "another vendor's", None),))
    assert plans(model, machine=no_cuda) == [found]


def test_small_models_stay_whole_on_one_card() -> None:
    for model in {"tiny", "mini"} & zoo.ZOO.keys():
        for options in (LoadOptions(), LoadOptions(memory="fastest", quantize="fp8", gpus=2)):
            found = plan(model, machine=machine_of("2x24", 32), options=options)
            assert {part.offload for part in found.parts.values()} == {"none"}
            assert found.parallel.ranks == 1
            assert found.parts["transformer"].storage == ("bfloat16" if model == "mini" else "float32")


# ---- where nothing fits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "options", "words", "lacks", "way"),
    [
        (
            machine_of("1x8", 64),
            {},
            ("needs 9", "of GPU memory for 1280x720", "832x480 with 81 frames fits"),
            "gpu",
            "smaller",
        ),
        (
            machine_of("1x12", 16),
            {},
            ("of RAM", "15 GB is free", "or take a smaller model"),
            "ram",
            "memory",
        ),
        (Machine(ram_bytes=30 * GB), {}, ("of RAM", "without a GPU, and 30 GB is free"), "ram", "memory"),
        (machine_of("1x24", 64), {"gpus": 2}, ("gpus=2", "usable cards here: 1", "take one of 1"), "cards", "gpus"),
        (machine_of("4x48", 256), {"gpus": 3}, ("cannot be shared by 3 cards", "take one of 1, 2, 4"), "cards", "gpus"),
        (replace(machine_of("1x12", 32), disk_bytes=GB), {}, ("of disk", "1.0 GB is free"), "disk", "memory"),
    ],
)
def test_a_problem_names_need_supply_and_a_way_out(
    machine: Machine, options: dict, words: tuple[str, ...], lacks: str, way: str
) -> None:
    (found,) = plans("wan2.1-14b", size=(1280, 720, 81), machine=machine, options=LoadOptions(**options))
    for word in words:
        assert word in found.problem
    assert found.summary == found.problem
    values = found.problem_values
    assert (values["lacks"], values["way"]) == (lacks, way)
    if lacks != "cards":
        assert values["needs"] > values["has"]
        assert f"{values['has']:.{0 if values['has'] >= 10 else 1}f} GB" in found.problem
    if way == "smaller":
        assert f"{values['size']} with {values['frames']} frames fits" in found.problem


def test_the_way_out_is_true() -> None:
    machine = machine_of("1x12", 64)
    options = LoadOptions(quantize="none")
    found = plan("wan2.1-14b", size=(1920, 1088, 81), machine=machine, options=options)
    assert "832x480 with 81 frames fits" in found.problem
    assert not plan("wan2.1-14b", size=(832, 480, 81), machine=machine, options=options).problem
    portrait = plan("wan2.1-14b", size=(1088, 1920, 81), machine=machine)
    assert "480x832 with 81 frames fits" in portrait.problem


def test_planning_imports_no_torch() -> None:
    program = (
        "import sys; from pusa.acceleration import plan; from pusa.acceleration.machine import described_machine as m; "
        "plan('wan2.1-14b', machine=m(gpu_gb=24)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory": "most"}, "memory='most' is none of fastest, balanced, smallest"),
        ({"quantize": "fp4"}, "quantize='fp4' is none of auto, none, fp8, int8"),
        ({"gpus": 0}, "gpus=0 is below 1"),
    ],
)
def test_impossible_wishes_are_errors(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoadOptions(**values)


def test_a_size_has_three_numbers() -> None:
    with pytest.raises(ValueError, match=r"has 2 numbers: give width, height and frames"):
        plan("wan2.1-14b", size=(832, 480), machine=described_machine(gpu_gb=24))  # type: ignore[arg-type]


# ---- frames that are left out of steps -------------------------------------------------------------------------------


@pytest.mark.parametrize(("cards", "still", "computes_all"), [("1x141", 10, False), ("1x48", 10, True)])
def test_frames_are_stored_where_there_is_room_for_them_and_computed_elsewhere(
    cards: str, still: int, computes_all: bool
) -> None:
    machine = machine_of(cards, 128)
    ways = plans("wan2.1-14b", machine=machine, still_frames=still)
    (best, *_), without = ways, plans("wan2.1-14b", machine=machine)[0]
    assert best.computes_all == computes_all
    assert best.relative_speed == without.relative_speed
    frame = 40 * 2 * 1560 * 5120 * 2  # layers, keys and values, tokens, width, bytes
    more = 0 if computes_all else 2 * still * frame
    assert best.gpu_peak_bytes["denoise"] - without.gpu_peak_bytes["denoise"] == more
    assert any("no room for the keys and values of 10 latent frames" in note for note in best.notes) == computes_all
    peaks = [way.peak_bytes for way in ways]
    assert peaks == sorted(peaks, reverse=True)
    kinds = [way.computes_all for way in ways]
    assert kinds == sorted(kinds)  # those that make the same video come first


def test_two_cards_store_one_pass_each_and_four_store_none() -> None:
    machines = machine_of("2x141", 512, (9, 0)), machine_of("4x141", 512, (9, 0))
    halved, shared = (plans("wan2.1-14b", machine=machine, still_frames=4)[0] for machine in machines)
    assert halved.parallel.guidance == shared.parallel.guidance == 2
    assert shared.parallel.ulysses == 2
    alone, among = (plans("wan2.1-14b", machine=machine)[0] for machine in machines)
    assert halved.gpu_peak_bytes["denoise"] - alone.gpu_peak_bytes["denoise"] == 4 * 40 * 2 * 1560 * 5120 * 2
    assert shared.gpu_peak_bytes["denoise"] == among.gpu_peak_bytes["denoise"]
