"""Start the processes of a run with every launcher and with the guide's script for Slurm."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from pusa.training.config import load_config
from pusa.training.distributed import connect_processes

GUIDE = ROOT / "docs" / "training.md"


@pytest.mark.parametrize(
    ("variable", "remedy"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "use FSDP2 instead: parallel.fsdp=true"),
        ("ACCELERATE_USE_FSDP", "the trainer shards by itself: set parallel.fsdp=true"),
    ],
)
def test_a_launcher_that_wraps_the_model_is_refused(
    variable: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError) as refused:
        connect_processes()
    assert str(refused.value) == (
        f"accelerate is configured to wrap the model ({variable}): launch without it, and {remedy}"
    )


def test_alone_there_is_one_process_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = connect_processes()
    assert (processes.rank, processes.world, processes.is_main, processes.data_parallel) == (0, 1, True, 1)
    assert processes.mean([1.0, 2.0]) == [1.0, 2.0]
    assert processes.agree(7) == 7


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_the_guides_slurm_script_starts_one_process_per_card(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands and for python, which notes how it was called."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", GUIDE.read_text(), re.S)
    program(
        tmp_path / "scontrol", '#!/bin/bash\n[ "$*" = "show hostnames first,second" ] && printf "first\\nsecond\\n"\n'
    )
    tasks = 'for i in 0 1 2 3; do SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "$@"; done'
    program(tmp_path / "srun", f"#!/bin/bash\n{tasks}\n")
    note = (
        "import json, os, sys\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')\n"
        "print(json.dumps([*(os.environ[name] for name in names), sys.argv[1:]]))\n"
    )
    program(tmp_path / "python", f"#!{sys.executable}\n{note}")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= {"SLURM_JOB_NODELIST": "first,second", "SLURM_NTASKS": "4"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, check=True)
    calls = [json.loads(line) for line in done.stdout.splitlines()]
    assert [call[:5] for call in calls] == [[str(i), str(i % 2), "4", "first", "29500"] for i in range(4)]
    *command, first, folders, second, batch, resume = calls[0][5]
    assert command == ["-m", "pusa", "train", "wan2.1-14b-vta"]
    assert (first, second, resume) == ("--set", "--set", "--resume")
    assert load_config("wan2.1-14b-vta", [folders, batch]).accumulation(16) == 1
