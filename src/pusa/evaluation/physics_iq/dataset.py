"""Find the scenes and files of a Physics-IQ download."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SECONDS = 5  # of every video that is scored
GIVEN_SECONDS = 3  # before them, that a model may see
STORED_FPS = (8, 16, 24, 30)  # of the download; other rates are made from 30
SOURCE_FPS = 30
SCENES = 198  # 66 scenarios, each from 3 perspectives

Conditioning = Literal["image", "video"]
Take = Literal[1, 2]

_FOLDERS = {  # as the download names them, and as the benchmark's description does
    "switch frame": ("switch-frames",),
    "conditioning video": ("split-videos/conditioning", "split-videos/conditioning-videos"),
    "testing video": ("split-videos/testing", "split-videos/testing-videos"),
    "motion mask": ("video-masks/real",),
}
_DESCRIPTIONS = ("descriptions.csv", "descriptions/descriptions.csv", "../descriptions.csv")
_COLUMNS = ("scenario", "description", "category")
_LISTED = 6  # missing files that an error names


@dataclass(frozen=True)
class Scene:
    """Hold one scenario seen from one perspective, which was filmed twice.

    A model sees the beginning of take 1 and continues it; take 2 tells how far reality repeats itself.

    Attributes:
        number: four digits, that of take 1 in the benchmark.
        second_number: that of take 2.
        view: ``perspective-left``, ``perspective-center`` or ``perspective-right``.
        scenario: its name, such as ``trimmed-ball-and-block-fall``.
        video_name: the name of the generated video without suffix, as the benchmark's evaluator wants it.
    """

    number: str
    second_number: str
    view: str
    scenario: str
    category: str
    prompt: str
    video_name: str

    def number_of(self, take: Take) -> str:
        """Return the number of a take."""
        return self.number if take == 1 else self.second_number


@dataclass(frozen=True)
class Gap:
    """Hold what a scene lacks in a download."""

    scene: Scene
    files: list[str]


@dataclass
class Dataset:
    """Find files of a download by the number that their names begin with.

    Attributes:
        root: the folder with ``switch-frames``, ``split-videos`` and ``video-masks``.
        scenes: those of take 1 in ``descriptions.csv``, by number.
    """

    root: Path
    scenes: list[Scene]
    _files: dict[Path, dict[str, Path]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, data: Path, descriptions: Path | None = None) -> "Dataset":
        """Read the scenes of a download.

        Args:
            data: its folder, or the one that holds it as ``physics-IQ-benchmark``.
            descriptions: the table of prompts; None looks for ``descriptions.csv`` in the folder and beside it.

        Raises:
            FileNotFoundError: there is no download, or no table.
            ValueError: the table is none of this benchmark.
        """
        roots = [data, data / "physics-IQ-benchmark", data / "physics-iq-benchmark"]
        root = next((path for path in roots if any((path / name).is_dir() for name in _top_folders())), None)
        if root is None:
            raise FileNotFoundError(
                f"{data} holds no Physics-IQ download: none of {', '.join(_top_folders())} is in it; give "
                "--data the folder that the benchmark's download script has filled"
            )
        table = descriptions or next((path for name in _DESCRIPTIONS if (path := root / name).is_file()), None)
        if table is None or not table.is_file():
            raise FileNotFoundError(
                f"{table or root / 'descriptions.csv'} is not here: the prompts are in descriptions/descriptions.csv "
                "of the benchmark's repository; copy it there or name it with --descriptions"
            )
        return cls(root.resolve(), read_scenes(table))

    def switch_frame(self, scene: Scene) -> Path | None:
        """Return the picture between what a model sees and what it makes; None where it is missing."""
        return self._find(self._folders("switch frame"), scene.number)

    def conditioning(self, scene: Scene, fps: int) -> Path | None:
        """Return the 3 seconds of take 1 that a model may see, at `fps` or else at 30; None where they are missing."""
        return self._video("conditioning video", scene.number, fps)

    def testing(self, scene: Scene, take: Take, fps: int) -> Path | None:
        """Return the 5 seconds that follow, at `fps` or else at 30; None where they are missing."""
        return self._video("testing video", scene.number_of(take), fps)

    def masks(self, scene: Scene, take: Take, fps: int) -> Path | None:
        """Return the video of motion masks that the download has for the testing video at `fps`, or None."""
        return self._at(fps, "motion mask", scene.number_of(take))

    def gaps(self, conditioning: Conditioning, fps: int) -> list[Gap]:
        """List the scenes that cannot be generated or scored, and what they lack; masks can be computed."""
        found = []
        for scene in self.scenes:
            if conditioning == "image":
                wanted = {f"switch frame {scene.number}": self.switch_frame(scene)}
            else:
                wanted = {f"conditioning video {scene.number}": self.conditioning(scene, fps)}
            wanted[f"testing video {scene.number} (take 1)"] = self.testing(scene, 1, fps)
            wanted[f"testing video {scene.second_number} (take 2)"] = self.testing(scene, 2, fps)
            if missing := [name for name, path in wanted.items() if path is None]:
                found.append(Gap(scene, missing))
        return found

    def complete_scenes(self, conditioning: Conditioning, fps: int, *, partial: bool = False) -> list[Scene]:
        """Return the scenes whose files are here: all of them, or with `partial` as many as there are.

        Raises:
            FileNotFoundError: files are missing; the message names the first ones and says how many scenes lack some.
        """
        gaps = self.gaps(conditioning, fps)
        missing = {gap.scene.number for gap in gaps}
        scenes = [scene for scene in self.scenes if scene.number not in missing]
        unlisted = max(SCENES - len(self.scenes), 0)
        if scenes and (partial or not (gaps or unlisted)):
            return scenes
        parts = [name for gap in gaps for name in gap.files]
        listed = ", ".join(parts[:_LISTED]) + (f" and {len(parts) - _LISTED} more" if len(parts) > _LISTED else "")
        lines = [f"{len(gaps) + unlisted} of {max(SCENES, len(self.scenes))} scenes are not complete in {self.root}"]
        lines += [f"missing at {fps} or {SOURCE_FPS} fps: {listed}"] if parts else []
        lines += [f"{unlisted} scenes are not in the table of descriptions"] if unlisted else []
        hint = f"; --partial goes on with the {len(scenes)} that are" if scenes else ""
        raise FileNotFoundError("; ".join(lines) + ". Download the rest" + hint)

    def _folders(self, kind: str) -> list[Path]:
        return [self.root / name for name in _FOLDERS[kind]]

    def _video(self, kind: str, number: str, fps: int) -> Path | None:
        """Find a video at a rate, or else at that from which others are made."""
        return self._at(fps, kind, number) or self._at(SOURCE_FPS, kind, number)

    def _at(self, fps: int, kind: str, number: str) -> Path | None:
        return self._find([folder / f"{fps}FPS" for folder in self._folders(kind)], number)

    def _find(self, folders: Iterable[Path], number: str) -> Path | None:
        return next((path for folder in folders if (path := self._listed(folder).get(number))), None)

    def _listed(self, folder: Path) -> dict[str, Path]:
        """List a folder once: its pictures and videos by the number that their names begin with."""
        if folder not in self._files:
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
            kept = [path for path in paths if path.suffix.lower() in (".mp4", ".jpg", ".jpeg", ".png")]
            self._files[folder] = {path.name.partition("_")[0]: path for path in kept if path.name[0] != "."}
        return self._files[folder]


def read_scenes(table: Path) -> list[Scene]:
    """Read ``descriptions.csv``: a row for each take of each scene.

    Raises:
        ValueError: it is no table, a column or a value is missing, a name has another form, or a take 1 has no take 2.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} is no table of Physics-IQ: it is no CSV in UTF-8 ({error})") from None
    if not rows or any(row.get(name) is None for row in rows for name in _COLUMNS):
        raise ValueError(
            f"{table} is no table of Physics-IQ: it needs rows, each with the columns {', '.join(_COLUMNS)}"
        )
    takes = [(_name_parts(row["scenario"], table), row) for row in rows]
    second = {(view, scenario): number for (number, view, take, scenario), _ in takes if take == "take-2"}
    scenes = []
    for (number, view, take, scenario), row in takes:
        if take != "take-1":
            continue
        if (view, scenario) not in second:
            raise ValueError(f"{table}: {row['scenario']} has no take 2, which the score is measured against")
        scenes.append(
            Scene(
                number,
                second[view, scenario],
                view,
                scenario,
                row["category"].strip(),
                row["description"].strip(),
                f"{number}_{view}_{scenario}",
            )
        )
    return sorted(scenes, key=lambda scene: scene.number)


def _name_parts(name: str, table: Path) -> Sequence[str]:
    parts = name.removesuffix(".mp4").split("_")
    if len(parts) != 4 or not parts[0].isdigit() or parts[2] not in ("take-1", "take-2"):
        raise ValueError(f"{table}: {name!r} is no NUMBER_VIEW_TAKE_SCENARIO.mp4 of Physics-IQ")
    return parts


def _top_folders() -> list[str]:
    return sorted({name.partition("/")[0] for names in _FOLDERS.values() for name in names})
