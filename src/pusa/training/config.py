"""Define and load the configuration of a training run.

A configuration is a TOML file, or the JSON that a run keeps; ready ones are in ``configs/``. It needs no torch, so a
run can be checked, and its cost estimated, on a machine that could never train it.
"""

import copy
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError, ValidationInfo, model_validator

from pusa import zoo
from pusa.data.format import holds_dataset, missing_dataset
from pusa.fields import ProblemsError, StrictModel, explain, field, shown
from pusa.models.bases import Base
from pusa.training.sections import (
    LORA_TARGETS,
    CheckpointConfig,
    DataConfig,
    Expert,
    MethodConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    ReportConfig,
    ScheduleConfig,
)
from pusa.zoo import is_hub_id

__all__ = [
    "CONFIG_FILE",
    "CONFIG_FOLDER",
    "LORA_TARGETS",
    "NO_FOLDERS",
    "CheckpointConfig",
    "DataConfig",
    "Expert",
    "MethodConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ReportConfig",
    "ScheduleConfig",
    "TrainConfig",
    "config_from",
    "leaves",
    "load_config",
    "missing_files",
    "public_name",
    "ready_configs",
    "set_field",
]

CONFIG_FOLDER = Path(__file__).parent / "configs"
CONFIG_FILE = "config.json"  # in a run's folder
NO_FOLDERS = "data.folders is empty: name a folder that `pusa data prepare` has made"

_EXCLUSIVE = (
    ("steps", "seconds"),
    ("seconds", "steps"),
    ("batch_size", "batch_frames"),
    ("batch_frames", "batch_size"),
)

_FIELDS_ALONE = {"fields": "alone"}  # as the context of a validation: fields are not compared with each other


class TrainConfig(StrictModel):
    """Configure one training run."""

    name: str = field("vta", "Name of the run.", pattern=r"^[\w][\w.-]*$", max_length=100)
    output: str | None = field(None, "Folder of the run.", unset="runs/NAME")
    start_from: str | None = field(
        None,
        "An adapter to go on from, at the strength it was trained at: a file in any known layout, a run's folder, a "
        "Hub id, or a model of the zoo, for its own adapter.",
        unset="nothing: the adapted model begins as the base",
        min_length=1,
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    method: MethodConfig = MethodConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    report: ReportConfig = ReportConfig()
    parallel: ParallelConfig = ParallelConfig()
    steps: int | None = field(900, "Optimizer steps. Pusa V1.0: 900.", unset="by seconds", ge=1, le=100_000_000)
    seconds: float | None = field(
        None, "A budget of training time instead of steps.", unset="by steps", unit="seconds", gt=0, le=1e8
    )
    batch_size: int | None = field(1, "Clips per process and pass.", unset="by batch_frames", ge=1, le=4096)
    batch_frames: int | None = field(
        None,
        "Latent frames per process and pass instead of clips: as many clips as fit, so that long and short ones cost "
        "the same.",
        unset="by batch_size",
        ge=1,
        le=1_000_000,
    )
    global_batch: int | None = field(
        None,
        "Clips per step over all processes; gradients are accumulated to reach it, on any number of cards. "
        "Pusa V1.0: 8.",
        unset="batch_size times processes",
        ge=1,
        le=1_000_000,
    )
    ema_decay: float | None = field(
        None, "Keep a moving average of the trained weights and export it.", unset="none", gt=0, lt=1
    )
    max_nonfinite: int = field(
        10, "Steps in a row that may be skipped because loss or gradient is not finite.", ge=0, le=10_000
    )
    seed: int = field(0, "Seed of everything random.", ge=0, le=2**53)

    @model_validator(mode="before")
    @classmethod
    def _unset_exclusive(cls, values: Any) -> Any:
        """Drop the default of a field whose exclusive counterpart is set."""
        if not isinstance(values, Mapping):
            return values
        unset = {other: None for one, other in _EXCLUSIVE if values.get(one) is not None and other not in values}
        return {**values, **unset}

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> "TrainConfig":
        if info.context is not _FIELDS_ALONE and (problems := list(self.problems())):
            raise ValueError("\n".join(problems))
        return self

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with fields together, each of which is within its own limits."""
        for one, other in _EXCLUSIVE[::2]:
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                yield f"give either {one} or {other}, and null for the other one"
        if self.global_batch is not None and self.batch_frames is not None:
            yield "global_batch counts clips of batch_size: it cannot be combined with batch_frames"
        elif self.global_batch is not None and self.batch_size is not None and self.global_batch % self.batch_size:
            yield f"global_batch={self.global_batch} is no multiple of batch_size={self.batch_size}"
        if self.schedule.cooldown_share and self.schedule.shape != "constant":
            yield f"schedule.cooldown_share goes with shape=constant; {self.schedule.shape} falls by itself"
        if self.optimizer.name == "muon" and self.parallel.fsdp:
            yield "muon needs whole matrices, which fsdp takes apart: take adamw, or fsdp=false"
        if any(length < 1 for length in self.data.lengths):
            yield f"data.lengths={list(self.data.lengths)} has a length below 1"
        if self.parallel.context_parallel > 1 and self.model.attention == "math":
            yield "attention=math cannot be shared over processes: leave it at auto with context_parallel"

    def resolved(self, base: Base) -> "TrainConfig":
        """Give the fields that were not set the defaults of a base.

        Raises:
            ValueError: the base does not take the value of a field.
        """
        values, problems = self.model_dump(), []
        for name, default in {"method.targets": base.lora_targets, **base.training}.items():
            section, _, field_name = name.partition(".")
            if field_name not in getattr(self, section).model_fields_set:
                values[section][field_name] = default
        for name, allowed in base.training_limits.items():
            section, _, field_name = name.partition(".")
            value = values[section][field_name]
            if value not in allowed:
                ways = " or ".join(map(str, allowed))
                problems.append(f"{name}={value}: {base.name} is trained with {ways}")
        if problems:
            raise ProblemsError("\n".join(problems))
        return config_from(values)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output) if self.output else Path("runs") / self.name

    def expert_folder(self, run_folder: Path, expert: str) -> Path:
        """Return the folder of an expert's checkpoints and metrics: the run's own, or one inside if there are two."""
        return run_folder / expert if len(self.model.experts) > 1 else run_folder

    def clips_per_pass(self, latent_frames: int) -> int:
        """Count the clips of one process and pass, each of `latent_frames` latent frames."""
        return self.batch_size or max(1, (self.batch_frames or 1) // latent_frames)

    def accumulation(self, data_parallel: int) -> int:
        """Count the passes per step of `data_parallel` processes, or context-parallel groups, with clips of their own.

        Raises:
            ValueError: `global_batch` cannot be divided among them.
        """
        if self.global_batch is None or self.batch_size is None:
            return 1
        passes, left = divmod(self.global_batch, self.batch_size * data_parallel)
        if left:
            raise ValueError(
                f"global_batch={self.global_batch} cannot be shared by {data_parallel} processes with "
                f"batch_size={self.batch_size}: take a multiple of {self.batch_size * data_parallel}"
            )
        return passes

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    def shareable(self) -> dict[str, Any]:
        """Return plain values without paths of this machine: each folder by its own name, and no output."""
        values = self.model_dump(mode="json")
        values["output"] = None
        values["data"]["folders"] = [Path(name).name for name in self.data.folders]
        values["model"]["source"] = public_name(self.model.source)
        if self.start_from is not None:
            values["start_from"] = public_name(self.start_from)
        if self.report.validate_on is not None:
            values["report"]["validate_on"] = Path(self.report.validate_on).name
        return values


def public_name(source: str) -> str:
    """Return a Hub id or zoo name unchanged and a folder's own name without its path."""
    return source if is_hub_id(source) and not Path(source).exists() else Path(source).name


# ---- files and overrides -------------------------------------------------------------------------------------------


def ready_configs() -> dict[str, Path]:
    """Return the files of the configurations in this package by name."""
    return {path.stem: path for path in sorted(CONFIG_FOLDER.glob("*.toml"))}


def load_config(
    source: str | Path, overrides: Sequence[str] | Mapping[str, Any] = (), *, needs_files: bool = False
) -> TrainConfig:
    """Read a configuration and change fields of it.

    Args:
        source: the name of a ready one, a ``.toml`` or ``.json`` file, or the folder of a run.
        overrides: ``section.field=value`` each, the value in JSON (``1e-4``, ``null``, ``[5, 9]``) or plain text; or a
            mapping from ``section.field`` to values. Setting one of two exclusive fields (steps and seconds,
            batch_size and batch_frames) unsets the other.
        needs_files: the folders and files that training reads must be there, too; see `missing_files`.

    Raises:
        FileNotFoundError: no such file or name.
        ValueError: the file cannot be read, a field is unknown or out of its range, or a file that training needs is
            missing; every problem is named, one a line.
    """
    values = _read(source)
    problems: list[str] = []
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else []
    for text in () if isinstance(overrides, Mapping) else overrides:
        with _collecting(problems):
            pairs.append(_parse_override(text))
    for name, value in pairs:
        with _collecting(problems):
            set_field(values, name, value)
            for one, other in _EXCLUSIVE:
                if name == one and value is not None:
                    values[other] = None
    config, more = _validate(values)
    problems += more
    if needs_files and config is not None:
        problems += missing_files(config)
    if problems or config is None:
        raise ProblemsError("\n".join(problems))
    return config


@contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    """Append the message of a ValueError to `problems` instead of raising it."""
    try:
        yield
    except ValueError as error:
        problems.append(str(error))


def missing_files(config: TrainConfig) -> list[str]:
    """List what training would read and is not there, a line each; loads no torch and asks no server."""
    problems = [] if config.data.folders else [NO_FOLDERS]
    datasets = [*config.data.folders, *([config.report.validate_on] if config.report.validate_on else [])]
    problems += [missing_dataset(Path(name)) for name in datasets if not holds_dataset(Path(name).expanduser())]
    source = config.model.source
    if not Path(source).expanduser().exists() and not is_hub_id(source):
        with _collecting(problems):
            zoo.get(zoo.with_fallback(source))
    start = config.start_from
    is_begun = any(config.folder.glob("**/checkpoints/step-*"))  # a resumed run does not read it again
    if start and not is_begun and not (Path(start).expanduser().exists() or start in zoo.ZOO or is_hub_id(start)):
        problems.append(f"start_from={start}: there is no such file, folder, Hub id or model of the zoo")
    return problems


def set_field(values: dict[str, Any], name: str, value: Any) -> None:
    """Set ``section.field`` in nested values. Raises ValueError for a section that is a field."""
    *sections, field = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"{name} is unknown: {section} has no fields of its own")
    values[field] = value


def leaves(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of nested values, named ``section.field``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, separator, f"{prefix}{name}{separator}")
        else:
            yield f"{prefix}{name}", value


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """Validate nested plain values as a configuration. Raises ValueError, which names every problem."""
    config, problems = _validate(values)
    if problems or config is None:
        raise ProblemsError("\n".join(problems))
    return config


def _validate(values: Mapping[str, Any]) -> tuple[TrainConfig | None, list[str]]:
    """Validate nested plain values; return every problem, and the configuration without the fields that are wrong."""
    remaining = copy.deepcopy(dict(values))
    problems: list[str] = []
    for _ in range(2):
        try:
            config = TrainConfig.model_validate(remaining, context=_FIELDS_ALONE)
        except ValidationError as error:
            problems += [line for line in explain(error).splitlines() if line not in problems]
            _remove_wrong(remaining, [tuple(map(str, one["loc"])) for one in error.errors()])
        else:
            return config, [*problems, *config.problems()]
    return None, problems


def _remove_wrong(values: dict[str, Any], wrong: list[tuple[str, ...]]) -> None:
    """Remove the fields that the paths name, and what says that the exclusive counterpart of one is unset."""
    for section, *inside in filter(None, wrong):
        inner = values.get(section)
        if inside and isinstance(inner, dict):
            inner.pop(inside[0], None)
        else:
            values.pop(section, None)
    for one, other in _EXCLUSIVE:
        if (one,) in wrong and values.get(other) is None:
            values.pop(other, None)


def _read(source: str | Path) -> dict[str, Any]:
    path = ready_configs().get(str(source)) or Path(source)
    if (path / CONFIG_FILE).is_file():
        return {**_read(path / CONFIG_FILE), "output": str(path)}  # the run may have been moved
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no configuration {str(source)!r}: give a .toml file, the folder of a run, or one of "
            f"{', '.join(ready_configs())}"
        )
    try:
        text = path.read_text()
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable configuration: {error}") from error


def _parse_override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"{shown(text)} is not understood: write section.field=value, such as optimizer.lr=1e-4")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value.strip()
