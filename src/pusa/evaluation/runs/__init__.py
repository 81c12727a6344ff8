"""Make the videos that a measurement needs: in a folder, by any number of workers, whatever happens to them.

Names are imported on first use.
"""

from typing import TYPE_CHECKING

from pusa.lazy import lazy_names

if TYPE_CHECKING:
    from pusa.evaluation.runs.folder import Failure, Problem, Record, RunFolder
    from pusa.evaluation.runs.items import Item, seed_of
    from pusa.evaluation.runs.make import Summary, make_videos
    from pusa.evaluation.runs.makers import LocalMaker, Maker
    from pusa.evaluation.runs.processes import make_in_processes

__all__ = [
    "Failure",
    "Item",
    "LocalMaker",
    "Maker",
    "Problem",
    "Record",
    "RunFolder",
    "Summary",
    "make_in_processes",
    "make_videos",
    "seed_of",
]
_MODULES = {
    "folder": ("Failure", "Problem", "Record", "RunFolder"),
    "items": ("Item", "seed_of"),
    "make": ("Summary", "make_videos"),
    "makers": ("LocalMaker", "Maker"),
    "processes": ("make_in_processes",),
}

__getattr__ = lazy_names(
    __name__, {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
)
