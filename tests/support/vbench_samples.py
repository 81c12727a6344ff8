"""Make a small suite in the file layout of VBench-I2V, of prompts and pictures of our own."""

import json
from pathlib import Path

from PIL import Image

SUBJECTS = {"a red cat sits": "cat.png", "a blue boat sails": "boat.png"}
BACKGROUND, BACKGROUND_IMAGE = "a green hill", "hill.png"
CAMERA_WORDS = ("camera pans left", "camera zooms in", "camera static")
RATIOS = {"8-5": (80, 50), "16-9": (96, 54)}
COLORS = {"cat.png": "red", "boat.png": "blue", "hill.png": "green"}

_SUBJECT_DIMENSIONS = [
    "i2v_subject",
    "subject_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "temporal_flickering",
]
_BACKGROUND_DIMENSIONS = [
    "i2v_background",
    "background_consistency",
    "aesthetic_quality",
    "imaging_quality",
    "temporal_flickering",
]


def entries() -> list[dict[str, object]]:
    """Return the list of prompts: 2 of subjects, 1 of a background, and 3 of camera motions of that."""
    subjects = [
        {"prompt_en": text, "dimension": _SUBJECT_DIMENSIONS, "image_type": "animal", "image_name": image}
        for text, image in SUBJECTS.items()
    ]
    background = {"image_type": "scenery", "image_name": BACKGROUND_IMAGE}
    cameras = [
        {"prompt_en": f"{BACKGROUND}, {words}", "dimension": ["camera_motion"], **background} for words in CAMERA_WORDS
    ]
    return [*subjects, {"prompt_en": BACKGROUND, "dimension": _BACKGROUND_DIMENSIONS, **background}, *cameras]


def make_suite(checkout: Path) -> Path:
    """Write a checkout with the list of prompts and cropped pictures; return it."""
    package = checkout / "vbench2_beta_i2v"
    for ratio, size in RATIOS.items():
        folder = package / "data" / "crop" / ratio
        folder.mkdir(parents=True)
        for name, color in COLORS.items():
            Image.new("RGB", size, color).save(folder / name)
    (package / "vbench2_i2v_full_info.json").write_text(json.dumps(entries()))
    return checkout
