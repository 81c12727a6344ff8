"""The product imports nothing of the embedded model when it is loaded: without the folder, all else remains."""

import re
from pathlib import Path

import pusa

PACKAGE = Path(pusa.__file__).parent
IMPORT = re.compile(r"^(?P<indent> *)(?:from|import) pusa\.mini\b", re.MULTILINE)


def test_only_commands_import_the_embedded_model_and_only_when_they_run() -> None:
    importers = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if found := IMPORT.findall(path.read_text(encoding="utf-8")):
            importers[name] = "" in found  # True: at the level of the module
    product = {name: at_top for name, at_top in importers.items() if not name.startswith("mini/")}
    assert product.pop("demo.py") is False  # is the demo of the embedded model itself, and imports it when it runs
    assert product
    assert all(name.startswith("cli/") and not at_top for name, at_top in product.items()), product
