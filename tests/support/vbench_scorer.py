"""Stand in for VBench's scorer: its arguments, its progress and its results; scores come from the files' contents.

python vbench_scorer.py [--fail DIMENSION] [--leave-out-one DIMENSION] [--calls FILE] [--wait-for FILE] ARGUMENTS
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from statistics import fmean


def value_of(path: Path, dimension: str) -> float:
    """Return 0..1, another one for each video and dimension."""
    return hashlib.sha256(path.read_bytes() + dimension.encode()).digest()[0] / 255


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("fail", "leave-out-one", "calls", "wait-for"):
        parser.add_argument(f"--{name}", default="")
    for name in ("suite", "dimension", "videos", "info", "images", "ratio", "weights", "device", "work", "out"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    if given.calls:
        with open(given.calls, "a", encoding="utf-8") as calls:
            calls.write(f"{given.dimension} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\n")
    fails = bool(given.fail) and Path(given.fail).exists() and Path(given.fail).read_text() == given.dimension
    prompts = [entry for entry in json.loads(Path(given.info).read_text()) if given.dimension in entry["dimension"]]
    assert all((Path(given.images) / entry["image_name"]).is_file() for entry in prompts)
    videos = [Path(given.videos) / f"{entry['prompt_en']}-{index}.mp4" for entry in prompts for index in range(5)]
    videos = [video for video in videos if video.is_file()]
    if given.dimension == given.leave_out_one:
        videos = videos[1:]
    results = []
    scale = 100 if given.dimension == "imaging_quality" else 1
    for done, video in enumerate(videos, start=1):
        if fails:
            print(f"50%|####| 1/2\r100%|########| 2/2\nCUDA out of memory <b>in {given.dimension}</b>", file=sys.stderr)
            sys.exit(3)
        value = value_of(video, given.dimension)
        results.append({"video_path": str(video), "video_results": round(scale * value, 6)})
        print(json.dumps({"done": done, "total": len(videos)}), flush=True)
        while given.wait_for and done == 1 and not Path(given.wait_for).exists():
            time.sleep(0.01)
    middle = [{"static": 1.0}] if given.dimension == "camera_motion" else []
    mean = fmean(result["video_results"] for result in results) / scale
    Path(given.out).write_text(json.dumps({given.dimension: [mean, *middle, results]}))


if __name__ == "__main__":
    main()
