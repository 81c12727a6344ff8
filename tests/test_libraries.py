"""Commands write nothing that libraries say about each other."""

import subprocess
import sys

import pytest


def test_a_command_writes_no_advice_of_torchao() -> None:
    pytest.importorskip("torchao", reason="the advice is about torchao")
    command = [sys.executable, "-m", "pusa", "generate", "a cat", "--model", "tiny", "--lora", "none.safetensors"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert [line[:5] for line in finished.stderr.splitlines()] == ["pusa:"]


def test_other_messages_pass(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    from pusa.libraries import quiet_libraries

    quiet_libraries()
    logger = logging.getLogger("torch.utils._pytree")
    logger.warning("<enum X> is now natively supported by torch.compile")
    logger.warning("a node type is registered twice")
    assert [record.getMessage() for record in caplog.records] == ["a node type is registered twice"]
