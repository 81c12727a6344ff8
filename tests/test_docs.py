"""Every command and every piece of Python in the README and the guides runs as it stands there."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from paths import ROOT

from pusa import zoo
from pusa.demo import PICTURES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS_A_SERVER = {"server.md"}  # its examples run in test_server_docs.py


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
        lines = [line for block in blocks for line in block.splitlines()]
        cells = re.findall(r"^\|.*\| `(pusa [^`]*)` \|$", text, re.M)
        found += [(page.name, line.split("  #")[0]) for line in [*lines, *cells] if line.startswith("pusa ")]
    return found


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


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_of_the_guides_runs(page: str, command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pusa.cli import main

    skip_without_mini(command)
    monkeypatch.chdir(folder)
    words = shlex.split(command)[1:]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, f"{page}: {command}\n{result.output}"
    if "-o" in words:
        assert (folder / words[words.index("-o") + 1]).stat().st_size > 1000


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in NEEDS_A_SERVER], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    skip_without_mini(code)
    exec(compile(code, page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        if target == "docs/demo.gif":
            skip_without_mini("made by mini")
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
