"""Run the demo of the embedded model, `pusa.mini.demo`: ``python -m pusa.demo``."""

from pusa.mini.demo import PICTURES, main

__all__ = ["PICTURES", "main"]

if __name__ == "__main__":
    main()
