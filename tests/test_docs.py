"""Run the commands and the Python of the README and the guides; parse the commands that a test cannot run.

What runs is as it is written, but with few steps and small pictures, and once where several pages have the same line.
"""

import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from documented_commands import CommandError, check_command, code_blocks, commands_in, commands_of, logical_lines
from paths import ROOT
from small_models import make_smaller

from pusa import zoo
from pusa.demo import PICTURES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODEL_CARD = ROOT / "src" / "pusa" / "mini" / "README.md"
NEEDS_A_SERVER = {"server.md"}  # its examples run in test_server_docs.py
LARGEST = {"--steps": 2, "--count": 2, "steps": 3}  # options and settings that ask for more of the same


def commands_to_run() -> list[tuple[str, str]]:
    """Return page and line of each `pusa` command in a ``bash`` block or a table of tasks; ``sh`` is only parsed."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text()
        lines = [line for language, block in code_blocks(text) if language == "bash" for line in logical_lines(block)]
        cells = re.findall(r"^\|.*\| `(pusa [^`]*)` \|$", text, re.M)
        for line in [*lines, *cells]:
            if line.startswith("pusa "):
                found.setdefault(line, page.name)
    return [(page, line) for line, page in found.items()]


def shortened(words: Sequence[str]) -> list[str]:
    """Lower the numbers of a command that are above `LARGEST`, unless it only estimates."""
    short = list(words)
    for k, word in enumerate(words if "estimate" not in words else ()):
        name, equals, number = word.rpartition("=") if "=" in word else (words[k - 1], "", word)
        if name in LARGEST and number.isdigit():
            short[k] = f"{name if equals else ''}{equals}{min(int(number), LARGEST[name])}"
    return short


@pytest.fixture(autouse=True)
def _quick_mini(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the embedded model make small pictures in few steps where nothing else is asked for."""
    if "mini" in zoo.ZOO:
        fast = zoo.ZOO["mini"].defaults.fast
        assert fast is not None
        make_smaller(monkeypatch, "mini", width=64, height=64, steps=2, fast=replace(fast, steps=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: three pictures, two videos, saved latents, and captioned videos to train on.

    The pictures are those of the package.
    """
    from pusa.generate import save_latents
    from pusa.media import VideoWriter
    from pusa.request import GenerationRequest

    folder = tmp_path_factory.mktemp("user")
    for name, picture in (("start", "whale-start.png"), ("middle", "rabbit.png"), ("end", "whale-end.png")):
        shutil.copy(PICTURES / picture, folder / f"{name}.png")
    noise = np.random.default_rng(0).integers(0, 256, (24, 64, 96, 3), np.uint8)
    for name in ("clip", "other"):
        with VideoWriter(folder / f"{name}.mp4", width=96, height=64) as writer:
            writer.write(noise)
    request = GenerationRequest(model="tiny", prompt="a whale", seed=0)
    save_latents(
        folder / "whale.latents.safetensors", torch.zeros(1, 16, 5, 8, 12), {"request": request.model_dump(mode="json")}
    )
    (folder / "videos").mkdir()
    for number in range(3):
        with VideoWriter(folder / "videos" / f"{number}.mp4", width=96, height=64) as writer:
            writer.write(np.random.default_rng(number).integers(0, 256, (40, 64, 96, 3), np.uint8))
        (folder / "videos" / f"{number}.txt").write_text("a cat spins")
    (folder / "prompts.txt").write_text("a cat spins\na rabbit bounces in the snow\n")
    return folder


def skip_without_mini(text: str) -> None:
    if "mini" in text and "mini" not in zoo.ZOO:
        pytest.skip("the weights of the embedded model are not here")


@pytest.mark.parametrize(("page", "command"), commands_to_run())
def test_a_command_of_the_guides_runs(page: str, command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pusa.cli import main

    skip_without_mini(command)
    monkeypatch.chdir(folder)
    words = shlex.split(command, comments=True)[1:]
    result = CliRunner().invoke(main, shortened(words))
    assert result.exit_code == 0, f"{page}: {command}\n{result.output}"
    if "-o" in words:
        assert (folder / words[words.index("-o") + 1]).stat().st_size > 1000


@pytest.mark.parametrize("page", [*PAGES, MODEL_CARD], ids=lambda page: page.name)
def test_every_command_of_a_page_could_run(page: Path) -> None:
    for place, words, folder in commands_of(page.read_text()):
        try:
            check_command(words, folder=folder, whole=place == "block")
        except CommandError as error:
            pytest.fail(f"{page.name}: {shlex.join(words)}\n{error}")


def test_commands_are_found_wherever_a_page_has_them() -> None:
    page = """
`python a.py` and `CUDA_VISIBLE_DEVICES=0 pusa worker`, not `num_frames`
```bash
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m pusa.x \\
    --work "two words"  # a comment
cd deploy && docker compose up
echo "KEY=$(python3 -c 'print(1); print(2)')" > .env
srun bash -c 'RANK=$SLURM_PROCID exec python -m pusa train x \\
    --resume'
curl --json '{
  "prompt": "pusa info"
}' | jq .
```
```
make demo; accelerate launch b.py
benchmarks/card.sh train
```
```python
pusa = python
```
"""
    assert [(place, shlex.join(words)) for place, words, _ in commands_of(page)] == [
        ("block", "torchrun --nproc-per-node 2 -m pusa.x --work 'two words'"),
        ("block", "docker compose up"),
        ("block", "python3 -c 'print(1); print(2)'"),
        ("block", "python -m pusa train x --resume"),
        ("block", "make demo"),
        ("block", "accelerate launch b.py"),
        ("block", "benchmarks/card.sh train"),
        ("prose", "python a.py"),
        ("prose", "pusa worker"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("pusa generat x", "No such command 'generat'"),
        ("pusa extend", "Missing argument 'VIDEO'"),
        ("pusa generate x --stpes 4", "No such option '--stpes'"),
        ("pusa generate x --steps four", "'four' is not a valid integer"),
        ("pusa train mini-vta --set optimizer.rate=1", "'optimizer.rate' is unknown"),
        ("pusa serve --prot 80", "No such option '--prot'"),
        ("python benchmarks/nothing.py", "there is no benchmarks/nothing.py"),
        ("python benchmarks/joints.py --seed 3 --size 4", "unrecognized arguments: --size 4"),
        ("python benchmarks/carry.py unpack", "the following arguments are required"),
        ("python -m pusa.training.mini_recipe --work practice", "there is no module pusa.training.mini_recipe"),
        ("python -m pusa.events", "events.py is no program"),
        ("python -m pusa.server.worker.healthcheck --now", "healthcheck.py takes no arguments"),
        ("python -c 'print('", "was never closed"),
        ("torchrun --processes 8 -m pusa train mini-vta", "unrecognized arguments"),
        (
            "torchrun -m pusa.mini.recipe.recipe --work w --budget cpu --shards 40",
            "unrecognized arguments: --shards 40",
        ),
        ("accelerate start -m pusa train mini-vta", "accelerate starts programs with launch"),
        ("accelerate launch -m pusa train nothing", "nothing"),
        ("make tests", "the Makefile has no target tests"),
        ("docker compose -f nothing.yaml up", "nothing.yaml"),
        ("docker compose up --rebuild", "--rebuild"),
        ("benchmarks/nothing.sh", "there is no benchmarks/nothing.sh"),
    ],
)
def test_a_command_that_could_not_run_is_found(line: str, reason: str) -> None:
    [words] = commands_in(line)
    with pytest.raises(CommandError, match=re.escape(reason)):
        check_command(words, folder="deploy")


def python_of(page: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in NEEDS_A_SERVER and python_of(p)], ids=lambda page: page.name
)
def test_the_python_of_a_page_runs(page: Path) -> None:
    code = python_of(page)
    skip_without_mini(code)
    exec(compile(code, page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        if target == "docs/demo.gif":
            skip_without_mini("made by mini")
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_shows_every_folder_of_the_code() -> None:
    tree = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert tree is not None
    shown = re.findall(r"^  (\S+)  +\S", tree[1], re.M)
    assert not [name for name in shown if not (ROOT / "src" / "pusa" / name).exists()]
    folders = {f"{path.parent.name}/" for path in (ROOT / "src" / "pusa").glob("*/__init__.py")}
    assert folders == {name for name in shown if name.endswith("/")}


def test_architecture_names_what_is_in_the_code() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    path = re.search(r"## From a request to a file\n(.*?)\n## ", text, re.S)
    assert path is not None
    assert len(re.findall(r"^\d+\. ", path[1], re.M)) == 10
    for file, name in re.findall(r"`([\w/]+\.py)`(?:\s+`(\w+)`)?", path[1]):
        code = (ROOT / "src" / "pusa" / file).read_text()
        assert re.search(rf"^\s*(?:async )?(?:def|class) {name}\b" if name else "", code, re.M), f"{file} has no {name}"
