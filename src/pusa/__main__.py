"""``python -m pusa``: the same as ``pusa``, where the package lies in a folder and is not installed."""

from pusa.cli import main

if __name__ == "__main__":
    main()
