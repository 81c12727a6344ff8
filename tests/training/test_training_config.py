"""Load and check configurations: ready ones, files, overrides, and errors that tell what to write instead."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from pusa import zoo
from pusa.training.config import DataConfig, OptimizerConfig, TrainConfig, config_from, load_config, ready_configs


def refusal(*overrides: str, source: str = "wan2.1-14b-vta") -> str:
    with pytest.raises(ValueError) as refused:
        load_config(source, overrides)
    return str(refused.value)


def test_ready_configurations_are_there_and_valid() -> None:
    wan = ["wan2.1-1.3b-vta", "wan2.1-14b-vta", "wan2.2-a14b-vta", "wan2.2-ti2v-5b-vta"]
    assert list(ready_configs()) == ["fvdm", "mini-vta", "pusa-v0.5", *wan]
    for name in ready_configs():
        config = load_config(name)
        assert config.name == name
        assert config.folder == Path("runs") / name


def test_the_14b_configuration_is_the_paper_s() -> None:
    config = load_config("wan2.1-14b-vta")
    assert (config.method.kind, config.method.rank, config.method.alpha) == ("lora", 512, 512)
    assert config.method.targets == ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    assert (config.optimizer.name, config.optimizer.lr, config.schedule.shape) == ("adamw", 1e-5, "constant")
    assert (config.steps, config.global_batch, config.objective.asynchronous) == (900, 8, 1.0)
    assert config.accumulation(8) == 1  # on the paper's eight cards


def test_the_a14b_configuration_trains_two_experts_that_share_the_noise_levels() -> None:
    assert load_config("wan2.2-a14b-vta").model.experts == {"transformer": (0.875, 1.0), "transformer_2": (0.0, 0.875)}


@pytest.mark.parametrize("name", ready_configs())
def test_the_clips_of_a_ready_configuration_are_as_large_as_its_model_makes_them(name: str) -> None:
    config = load_config(name)
    if config.model.source not in zoo.ZOO:
        pytest.skip(f"the weights of {config.model.source} are not here")
    made = zoo.defaults_of(config.model.source)
    assert (config.data.width, config.data.height) == (made.width, made.height)
    assert config.data.num_frames == made.num_frames
    assert config.objective.shift == made.shift


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    config = load_config("wan2.2-a14b-vta", {"data.folders": ["a", "b"], "ema_decay": 0.99})
    (tmp_path / "config.json").write_text(config.to_json())
    assert load_config(tmp_path / "config.json") == config
    assert load_config(tmp_path).folder == tmp_path  # a run may be moved
    assert load_config(tmp_path, {"output": None}) == config


def test_toml_and_python_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('seconds = 5\ndata = { folders = ["clips"] }\noptimizer = { lr = 1 }\n')
    expected = TrainConfig(seconds=5, data=DataConfig(folders=("clips",)), optimizer=OptimizerConfig(lr=1))
    assert load_config(tmp_path / "own.toml") == expected
    assert expected.steps is None


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("optimizer.lr=1e-4", "optimizer", "lr", 1e-4),
        ("ema_decay=0.999", None, "ema_decay", 0.999),
        ("data.lengths=[5, 9]", "data", "lengths", (5, 9)),
        ("data.folders=one,two", "data", "folders", ("one", "two")),
        ("optimizer.max_gradient_norm=null", "optimizer", "max_gradient_norm", None),
        ("objective.weighting=none", "objective", "weighting", "none"),
        ("parallel.fsdp=false", "parallel", "fsdp", False),
        ("model.experts.transformer=[0.5, 1]", "model", "experts", {"transformer": (0.5, 1.0)}),
    ],
)
def test_values_are_written_as_json_or_as_plain_words(
    override: str, section: str | None, field: str, value: object
) -> None:
    config = load_config("wan2.1-14b-vta", [override])
    assert getattr(getattr(config, section) if section else config, field) == value


def leaves(model: type[BaseModel], values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every field's name, annotation and value."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from leaves(inner, values[name], f"{prefix}{name}.")
        else:
            yield prefix + name, inner, values[name]


def another(name: str, annotation: Any, value: Any) -> Any:
    """A value of the same kind that the field does not have."""
    unset = {"output": "elsewhere", "start_from": "pusa_v1.pt", "report.validate_on": "pictures", "ema_decay": 0.9}
    if value is None:
        return unset.get(name, 2)
    if isinstance(value, bool):
        return not value
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != value)
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value / 2 or 0.25
    lists = {"data.folders": ["clips"], "data.lengths": [5], "method.targets": ["to_q"]}
    return lists.get(name, {"transformer_2": [0.0, 0.5]} if isinstance(value, dict) else "another")


def test_every_field_can_be_changed_by_name_and_no_other_changes(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("")
    plain = {name: value for name, _, value in leaves(TrainConfig, TrainConfig().model_dump(mode="json"))}
    assert len(plain) >= 60
    partners = {"seconds": "steps", "batch_frames": "batch_size"}
    for name, annotation, value in leaves(TrainConfig, TrainConfig().model_dump(mode="json")):
        wanted = another(name, annotation, value)
        changed = load_config(tmp_path / "own.toml", [f"{name}={json.dumps(wanted)}"]).model_dump(mode="json")
        found = {field: new for field, _, new in leaves(TrainConfig, changed)}
        expected = {**plain, name: wanted} | ({partners[name]: None} if name in partners else {})
        assert found == expected


def test_of_two_fields_that_exclude_each_other_the_named_one_holds() -> None:
    config = load_config("wan2.1-14b-vta", ["seconds=60", "global_batch=null", "batch_frames=40"])
    assert (config.steps, config.seconds, config.batch_size, config.batch_frames) == (None, 60, None, 40)
    config = load_config("mini-vta", ["steps=10"])
    assert (config.steps, config.seconds) == (10, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lrr=1"], "'optimizer.lrr' is unknown: did you mean lr?"),
        (["optimzer.lr=1"], "'optimzer' is unknown: did you mean optimizer?"),
        (["optimizer.lr=fast"], "optimizer.lr='fast' is not a number"),
        (["method.kind=loha"], "method.kind='loha' is none of lora, full"),
        (["steps=0"], "steps=0 is outside 1..100000000"),
        (["steps=null"], "give either steps or seconds, and null for the other one"),
        (["steps.more=1"], "steps.more is unknown: steps has no fields of its own"),
        (["lr"], "'lr' is not understood: write section.field=value, such as optimizer.lr=1e-4"),
        (["data.lengths=[0]"], "data.lengths=[0] has a length below 1"),
        (["batch_size=3"], "global_batch=8 is no multiple of batch_size=3"),
        (["batch_frames=40"], "global_batch counts clips of batch_size: it cannot be combined with batch_frames"),
        (
            ["model.experts.transformer=[0.9, 0.1]"],
            "noise range 0.9..0.1: give two levels in 0..1, the lower one first",
        ),
        (
            ["schedule.shape=cosine", "schedule.cooldown_share=0.2"],
            "schedule.cooldown_share goes with shape=constant; cosine falls by itself",
        ),
        (["optimizer.name=muon"], "muon needs whole matrices, which fsdp takes apart: take adamw, or fsdp=false"),
        (
            ["parallel.context_parallel=2", "model.attention=math"],
            "attention=math cannot be shared over processes: leave it at auto with context_parallel",
        ),
    ],
)
def test_errors_name_the_field_the_limit_and_the_way_out(overrides: list[str], message: str) -> None:
    assert refusal(*overrides) == message


def test_all_problems_are_named_at_once() -> None:
    assert refusal("optimizer.lr=-1", "method.rank=0").count("\n") == 1


def test_an_unknown_configuration_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refused:
        load_config("wan2.1-15b-vta")
    assert "one of fvdm, mini-vta, pusa-v0.5, wan2.1-1.3b-vta, wan2.1-14b-vta, wan2.2-a14b-vta, " in str(refused.value)
    (tmp_path / "broken.toml").write_text("steps = ")
    with pytest.raises(ValueError) as refused_file:
        load_config(tmp_path / "broken.toml")
    assert "broken.toml is not a readable configuration" in str(refused_file.value)


def test_gradients_are_accumulated_to_the_global_batch_on_any_number_of_processes() -> None:
    config = load_config("wan2.1-14b-vta")
    assert [config.accumulation(n) for n in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ValueError) as refused:
        config.accumulation(3)
    assert str(refused.value) == (
        "global_batch=8 cannot be shared by 3 processes with batch_size=1: take a multiple of 3"
    )
    assert load_config("mini-vta").clips_per_pass(9) == 8  # 80 latent frames
    assert load_config("mini-vta").clips_per_pass(100) == 1


def test_checking_a_configuration_needs_no_torch() -> None:
    code = "import sys, pusa.training.config as c; c.load_config('mini-vta'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_values_of_another_type_are_refused() -> None:
    refused = {
        "steps='9' is not a whole number": {"steps": "9"},
        "parallel.fsdp=1 is neither true nor false": {"parallel": {"fsdp": 1}},
        "seed=True is not a whole number": {"seed": True},
    }
    for message, values in refused.items():
        with pytest.raises(ValueError, match=f"^{message}$"):
            config_from(values)


def test_problems_of_every_kind_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        load_config(
            "mini-vta",
            [
                "nonsense",
                "seconds.more=1",
                "optimizer.lr=1e9",
                "method.rnk=1",
                "data.lengths=[0]",
                "schedule.shape=cosine",
                f"data.folders={tmp_path / 'nowhere'}",
                f"report.validate_on={tmp_path}",
                "model.source=mni",
            ],
            needs_files=True,
        )
    lines = str(refused.value).splitlines()
    for part in (
        "'nonsense' is not understood",
        "seconds.more is unknown",
        "optimizer.lr=1000000000.0 is not above 0 and at most 1",
        "'method.rnk' is unknown: did you mean",
        "data.lengths=[0] has a length below 1",
        "schedule.cooldown_share goes with shape=constant",
        f"{tmp_path / 'nowhere'} holds no dataset",
        f"{tmp_path} holds no dataset",
        "no model is called 'mni': did you mean 'mini'?",
    ):
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert len(lines) == 9


def numbers(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[float]]]:
    """Every number of the configuration with its limits."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from numbers(field.annotation, f"{prefix}{name}.")
        elif limits := [limit for m in field.metadata if (limit := limit_of(m)) is not None]:
            yield f"{prefix}{name}", limits


def limit_of(metadata: Any) -> float | None:
    return next((getattr(metadata, kind) for kind in ("ge", "gt", "le", "lt") if hasattr(metadata, kind)), None)


def test_every_number_out_of_its_limits_is_refused_with_them() -> None:
    found = dict(numbers(TrainConfig))
    assert len(found) >= 40
    for name, limits in found.items():
        for value in ("-1", "100000000000000000000"):
            message = refusal(f"{name}={value}")
            assert message.startswith(f"{name}={value}"), message
            assert " is outside " in message or " is not " in message, message
            for limit in limits:
                assert str(int(limit) if limit == int(limit) else limit) in message, message


def test_a_missing_folder_is_named_before_torch_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, pusa.cli.root as root\n"
        "from click.testing import CliRunner\n"
        "import pusa.training.config as config\n"
        "try:\n"
        "    config.load_config('mini-vta', ['data.folders=nowhere'], needs_files=True)\n"
        "except ValueError as error:\n"
        "    print(error, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "nowhere holds no dataset (dataset.json is missing): make one with `pusa data` False\n"
