"""schemathesis reads the OpenAPI and finds nothing that the server does otherwise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from api_samples import Served, png, serving, work

pytest.importorskip("schemathesis")

# A request may fit the schema and still ask for what cannot be made (two places of one picture), which no schema says.
NOT_CHECKED = "positive_data_acceptance"
# A stream; what waits for all jobs before its own; what answers 501 or 503 here, which counts as the server's error.
ELSEWHERE = "/events$|/sync$|/characters|/ready$|/enhance$"
LIKE_CREATE = "/edits$|/extensions$"  # the same fields, read by the same code: without systematic coverage of their own


@pytest.mark.slow
@pytest.mark.parametrize(
    "which",
    [
        ["--exclude-path-regex", f"{ELSEWHERE}|{LIKE_CREATE}", "--phases", "coverage,fuzzing"],
        ["--include-path-regex", LIKE_CREATE, "--phases", "fuzzing"],
    ],
    ids=["most routes", "edits and extensions"],
)
def test_schemathesis_finds_nothing(tmp_path: Path, which: list[str]) -> None:
    with serving(tmp_path, queue_limit=1_000_000, workers=0) as server:
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(configuration(server, tmp_path))),
            *("run", f"{server.url}/openapi.json", *which),
            *("--checks", "all", "--exclude-checks", NOT_CHECKED),
            *("--max-examples", "10", "--seed", "1", "--generation-database", "none", "--no-color"),
            *("--request-timeout", "20"),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert " passed" in done.stdout


def configuration(server: Served, folder: Path) -> Path:
    """Half of the ids that are asked for are there."""
    videos = [server.create()["id"] for _ in range(10)]
    work(server.service, len(videos))
    sent = [server.http.post("/v1/files", files={"file": ("a.png", png(grey=level))}) for level in range(20)]
    files = [answer.raise_for_status().json()["id"] for answer in sent]
    path = folder / "schemathesis.toml"
    path.write_text(
        f"[dictionaries.videos]\nvalues = {json.dumps(videos)}\n"
        f"[dictionaries.files]\nvalues = {json.dumps(files)}\n"
        '[parameters]\n"path.id" = { dictionary = "videos", probability = 0.5 }\n'
        '[[operations]]\ninclude-path-regex = "^/v1/files/"\n'
        'parameters = { "path.id" = { dictionary = "files", probability = 0.5 } }\n'
    )
    return path
