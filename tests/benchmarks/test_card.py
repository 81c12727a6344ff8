"""Rehearse `card.sh` without a network, with nothing but the packages of such a machine."""

import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import _results
import carry
import pytest
from _card_log import with_card
from card_environment import closure, make_environment, make_tiny_pack, make_wheel
from diffusers import AutoencoderKLWan
from needs import missing
from packaging.requirements import Requirement
from paths import ROOT
from peft import LoraConfig
from safetensors.torch import save_file

from pusa.mini.recipe.base import TextToVideo
from pusa.mini.recipe.card import CARD_BUDGETS
from pusa.mini.recipe.folder import LORA_FILE, write_folder
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.training.config import LORA_TARGETS
from pusa.zoo import MINI_FOLDER

Run = Callable[..., "subprocess.CompletedProcess[str]"]
MOST_SECONDS = 900  # of a rehearsal; on two quiet cores it takes a minute


def offline() -> list[str]:
    """The words before a command that take its network away."""
    for words in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and not subprocess.run([*words, "true"], capture_output=True).returncode:
            return words
    missing("unshare", "neither as root nor in a namespace of one's own can the network be taken away here")


@pytest.fixture(scope="session")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``tree`` (the tracked files), ``carry`` and two environments, ``env`` and ``env-without-pip``."""
    folder = tmp_path_factory.mktemp("card")
    carried_only = set(carry.CARRIED) - set(carry.CARD_HAS)
    for name, pip in (("env", ["pip"]), ("env-without-pip", [])):
        make_environment(folder / name, closure([*carry.CARD_HAS, *pip], without=carried_only).values())
    (folder / "carry").mkdir()
    for name in carry.CARRIED:
        make_wheel(name, folder / "carry")
    make_tiny_pack(folder / "carry" / carry.PICTURES)
    copy_tree(folder / "tree")
    return folder


def copy_tree(target: Path) -> None:
    for path in carry.tracked_sizes():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target / path)


@pytest.fixture
def run(card: Path, tmp_path: Path) -> Run:
    """Run `card.sh` offline in one of the environments; nothing may be left in the places where programs write."""

    def call(
        *arguments: str, tree: Path = card / "tree", environment: str = "env", **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        places = {name: tmp_path / name.lower() for name in ("TMPDIR", "HOME")}
        for place in places.values():
            place.mkdir(exist_ok=True)
        clean = {
            "PATH": f"{card / environment / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "CARRY": str(card / "carry"),
            "LANG": "C.UTF-8",
            **{name: str(place) for name, place in places.items()},
            **{name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ},
            **variables,
        }
        command = [*offline(), str(tree / "benchmarks" / "card.sh"), *arguments]
        done = subprocess.run(
            command, env=clean, cwd=tmp_path, timeout=MOST_SECONDS, text=True, capture_output=True, check=False
        )
        for place in places.values():
            assert not list(place.iterdir()), f"left in {place.name}"
        return done

    return call


def stages(log: Path) -> dict[str, int]:
    """The exit code of each stage, in their order."""
    records = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert all("card" in record for record in records)
    return {record["stage"]: record["exit"] for record in records if record["case"] == "stage"}


def listing(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


# ---- card.sh ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_is_rehearsed_with_what_a_card_has_and_without_a_network(card: Path, run: Run, tmp_path: Path) -> None:
    before = listing(card)
    done = run("--rehearse", "train", "out")
    assert listing(card) == before
    out = tmp_path / "out"
    assert stages(out / "train.log") == dict.fromkeys(("wheels", "machine", "recipe", "results"), 0), done.stdout
    assert done.returncode == 0
    assert done.stdout.splitlines() == (out / "train.log").read_text().splitlines()
    assert "every stage ended well" in done.stdout
    files = list(out.iterdir())
    assert len(files) <= 8
    assert max(file.stat().st_size for file in files) <= 14_000_000

    _results.unpack(out, tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "report.json").is_file()
    assert list((tmp_path / "unpacked").rglob("*.jpg"))
    from pusa import PusaPipeline
    from pusa.lora.layouts import read_lora

    pipe = PusaPipeline.from_pretrained(tmp_path / "unpacked" / "model")
    lora = tmp_path / "unpacked" / "model" / "pusa_lora.safetensors"
    assert pipe.load_pusa(lora) == len(read_lora(lora).pairs)


@pytest.mark.slow
def test_measuring_is_rehearsed_where_even_pip_is_missing(run: Run, tmp_path: Path) -> None:
    done = run("measure", "out", environment="env-without-pip", PUSA_CARD_REHEARSAL="1")
    assert stages(tmp_path / "out" / "measure.log") == {"wheels": 0, "gpu": 0, "train_gpu": 0}, done.stdout
    assert done.returncode == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["measure.log"]


@pytest.mark.slow
def test_a_stage_that_hangs_or_fails_is_logged_and_the_next_one_runs(card: Path, run: Run, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("benchmarks", "src/pusa"):
        shutil.copytree(card / "tree" / name, tree / name, ignore=shutil.ignore_patterns("*.safetensors", "*.mp4"))
    (tree / "benchmarks" / "gpu.py").write_text('import time\nprint(\'{"case": "begun"}\')\ntime.sleep(600)\n')
    (tree / "benchmarks" / "train_gpu.py").write_text("raise RuntimeError('out of memory')\n")
    carried = tmp_path / "carry"  # a wheel, as little as there must be: it takes none of the time
    carried.mkdir()
    for pattern in (carry.PICTURES, "ftfy-*.whl"):
        shutil.copy(next((card / "carry").glob(pattern)), carried)
    # All but what is reserved for the stage after it is left to the one that hangs.
    done = run(
        *("--rehearse", "measure", "out"),
        tree=tree,
        environment="env-without-pip",
        CARRY=str(carried),
        PUSA_CARD_SECONDS="57",
    )
    assert done.returncode == 1
    assert stages(tmp_path / "out" / "measure.log") == {"wheels": 0, "gpu": 124, "train_gpu": 1}
    log = (tmp_path / "out" / "measure.log").read_text()
    assert '{"card": "cpu", "case": "begun"}' in log
    assert "card.sh: gpu was stopped after" in log
    assert "RuntimeError: out of memory" in log
    assert "a stage failed, see above" in log


def test_without_the_carried_folder_it_says_how_to_make_it(run: Run, tmp_path: Path) -> None:
    done = run("train", "out", CARRY=str(tmp_path))
    assert done.returncode == 2
    remedy = "make that folder with benchmarks/carry.py, or set CARRY"
    assert done.stderr == f"card.sh: {tmp_path}/pictures.safetensors is not there: {remedy}\n"
    assert run("dance").returncode == 2


def test_lines_of_json_name_the_card_and_others_stay_as_they_are() -> None:
    assert with_card('{"case": "matmul"}\n', "X") == '{"card": "X", "case": "matmul"}\n'
    assert with_card('{"card": "Y"}\n', "X") == '{"card": "Y"}\n'
    for line in ("step 1\n", "{broken\n"):
        assert with_card(line, "X") == line


def test_the_environments_have_nothing_that_a_card_s_machine_may_lack(card: Path) -> None:
    """Or the rehearsals would not show that the scripts do without."""
    absent = {"av", "datasets", "fastapi", "matplotlib", "ray", "skimage", "sqlalchemy", "tensorboard"}
    for environment in ("env", "env-without-pip"):
        names = {path.name for path in (card / environment).glob("lib/python*/site-packages/*")}
        assert {"torch", "transformers"} <= names
        assert names.isdisjoint(absent)


# ---- what is carried -------------------------------------------------------------------------------------------------


def test_all_that_pusa_needs_is_on_the_card_or_carried_but_for_reading_videos() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {Requirement(text).name for text in project["dependencies"]}
    assert needed - {*carry.CARD_HAS, *carry.CARRIED} == {"av"}


def test_the_tree_leaves_room_for_wheels_and_pictures() -> None:
    from pusa.mini.world.picture_pack import LARGEST_BYTES

    assert sum(carry.tracked_sizes().values()) + LARGEST_BYTES + 12_000_000 < carry.MOST_BYTES


@pytest.mark.slow
def test_the_real_wheels_can_be_had_fit_together_and_are_small_enough(card: Path, tmp_path: Path) -> None:
    folder = tmp_path / "carry"
    folder.mkdir()
    try:
        carry.download_wheels(folder)
    except RuntimeError as error:
        missing("pip", str(error).splitlines()[-1])
    shutil.copyfile(card / "carry" / carry.PICTURES, folder / carry.PICTURES)
    carry.check(folder)
    assert sum(wheel.stat().st_size for wheel in folder.glob("*.whl")) < 12_000_000

    # Those for any Python can be tried in this one.
    pure = sorted(wheel for wheel in folder.glob("*.whl") if wheel.name.endswith("-none-any.whl"))
    assert len(pure) >= len(carry.CARRIED) - 2
    for wheel in pure:
        shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    script = "import annotated_types, click, diffusers, importlib_metadata, lazy_importer, typing_inspection, zipp\n"
    script += "from diffusers import AutoencoderKLWan, WanTransformer3DModel\nprint(diffusers.__file__)"
    done = subprocess.run(
        [card / "env" / "bin" / "python", "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(tmp_path / "site"))


def test_a_carried_folder_with_a_gap_is_refused(card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "carry"
    shutil.copytree(card / "carry", folder)
    remedy = f"make it anew: python benchmarks/carry.py {folder}"
    carry.check(folder)

    monkeypatch.setattr(carry, "MOST_BYTES", 1000)
    with pytest.raises(ValueError) as error:
        carry.check(folder)
    assert str(error.value).startswith(f"{sum(sizes(folder))} bytes would travel and 1000 may; the largest files: ")
    monkeypatch.undo()

    twin = next(folder.glob("ftfy-*.whl"))
    shutil.copy(twin, folder / "ftfy-1.0-py3-none-any.whl")
    with pytest.raises(ValueError) as error:
        carry.check(folder)
    assert str(error.value) == f"{folder} has two wheels of ftfy: {remedy}"
    (folder / "ftfy-1.0-py3-none-any.whl").unlink()

    core = next(folder.glob("pydantic_core-*.whl"))
    version = core.name.split("-")[1]
    core.rename(folder / core.name.replace(version, "1.0"))
    with pytest.raises(ValueError) as error:
        carry.check(folder)
    assert str(error.value) == f"pydantic needs pydantic-core=={version} and the wheel carried is 1.0"

    (folder / core.name.replace(version, "1.0")).unlink()
    with pytest.raises(ValueError) as error:
        carry.check(folder)
    assert str(error.value) == f"{folder} lacks the wheels of pydantic-core: {remedy}"


def sizes(folder: Path) -> list[int]:
    return [*carry.tracked_sizes().values(), *(path.stat().st_size for path in folder.iterdir())]


# ---- results ---------------------------------------------------------------------------------------------------------


def make_work(folder: Path, large: int = 40_000) -> Path:
    """Write a small stand-in for the files of a recipe."""
    files = {
        "model/model_index.json": b"{}",
        "model/transformer/weights.safetensors": bytes(range(256)) * (large // 256),
        "report.json": b"{}",
        "sheets/text.jpg": b"jpg",
        "base.pt": b"a checkpoint",
        "dataset/clips.jsonl": b"{}",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_results_are_cut_into_parts_and_come_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_results, "PART_BYTES", 30_720)
    work, out, back = make_work(tmp_path / "work"), tmp_path / "out", tmp_path / "back"
    out.mkdir()
    assert _results.gather(work, out) == []
    names = sorted(path.name for path in out.iterdir())
    parts = [f"model.transformer.weights.safetensors.part{number}" for number in range(2)]
    assert names == [*parts, "results.tar"]
    assert max(path.stat().st_size for path in out.iterdir()) <= 30_720
    assert _results.unpack(out, back) == {"base.pt": 12, "dataset/clips.jsonl": 2}
    kept = {path.relative_to(back).as_posix() for path in back.rglob("*") if path.is_file()}
    assert len(kept) == 4
    assert all((back / path).read_bytes() == (work / path).read_bytes() for path in kept)

    with pytest.raises(FileExistsError) as exists:
        _results.unpack(out, back)
    assert str(exists.value) == f"{back} is not empty: give another folder"

    content = bytearray((out / parts[1]).read_bytes())
    content[5] ^= 1
    (out / parts[1]).write_bytes(content)
    with pytest.raises(ValueError) as damaged:
        _results.unpack(out, tmp_path / "again")
    assert str(damaged.value) == (
        "model/transformer/weights.safetensors is damaged (its hash is another): copy the results from the card again"
    )
    (out / parts[0]).unlink()
    with pytest.raises(FileNotFoundError) as lacks:
        _results.unpack(out, tmp_path / "once-more")
    assert str(lacks.value) == f"{out} lacks {parts[0]}, which model/transformer/weights.safetensors is made of"


def test_a_card_s_model_comes_back_in_eight_files_and_fits_into_the_package(tmp_path: Path) -> None:
    budget = CARD_BUDGETS["card"]
    base = TextToVideo(heads=budget.heads, layers=budget.layers, head_channels=budget.head_channels)
    vae = AutoencoderKLWan.from_pretrained(MINI_FOLDER / "vae")
    model = tmp_path / "work" / "model"
    write_folder(model, vae, base, budget)
    targets = LoraConfig(r=budget.vta.rank, target_modules=list(LORA_TARGETS))
    base.transformer.add_adapter(targets)
    lora = {name: p.bfloat16() for name, p in base.transformer.named_parameters() if "lora_" in name}
    save_file(lora, model / LORA_FILE)
    for name, count in (("text-to-video.jpg", 1_500_000), ("image-to-video.jpg", 500_000), ("base.jsonl", 100_000)):
        (tmp_path / "work" / name).write_bytes(os.urandom(count))
    files = [path for path in model.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 14_000_000
    assert sum(path.stat().st_size for path in files) <= 60_000_000

    out = tmp_path / "out"
    out.mkdir()
    (out / "train.log").write_text("log")
    assert _results.gather(tmp_path / "work", out) == []
    _results.unpack(out, tmp_path / "back")
    loaded = PusaWanTransformer3DModel.from_pretrained(tmp_path / "back" / "model" / "transformer")
    assert sum(p.numel() for p in loaded.parameters()) > 18_000_000


def test_results_that_are_too_many_or_lack_the_model_are_written_and_complained_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_results, "PART_BYTES", 28_000)
    work, out = make_work(tmp_path / "work", large=200_000), tmp_path / "out"
    out.mkdir()
    (out / "train.log").write_text("log")
    complaints = _results.gather(work, out)
    assert len(complaints) == 1
    assert complaints[0].startswith("10 files, and 8 may come back: model.transformer.weights")
    assert len(_results.unpack(out, tmp_path / "back")) == 2

    shutil.rmtree(work / "model")
    bare = tmp_path / "bare"
    bare.mkdir()
    complaints = _results.gather(work, bare)
    assert complaints == ["there is no model among the results: the recipe did not come so far, see its log"]
    with pytest.raises(FileNotFoundError) as nothing:
        _results.unpack(tmp_path / "work", tmp_path / "other")
    assert "does not hold the results of a training run on a card" in str(nothing.value)
