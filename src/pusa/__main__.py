"""``python -m pusa``, which launchers of several processes want."""

from pusa.cli import main

main()
