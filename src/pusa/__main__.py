"""Run ``python -m pusa`` as ``pusa``, for a package that lies in a folder and is not installed."""

from pusa.cli import main

if __name__ == "__main__":
    main()
