"""Run the demo of the embedded model, `pusa.mini.demo`: ``python -m pusa.demo``."""

from typing import TYPE_CHECKING

from pusa.lazy import lazy_names
from pusa.libraries import quiet_libraries

if TYPE_CHECKING:
    from pusa.mini.demo import PICTURES, main

__all__ = ["PICTURES", "main"]

__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "pusa.mini.demo"))

if __name__ == "__main__":
    quiet_libraries()  # before the demo imports them
    from pusa.mini.demo import main

    main()
