"""Why something does not work is told in the visitor's language; what the program itself says stands beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from studio_samples import Visitor, studio

from pusa.acceleration.decisions import LoadOptions, Machine, Plan
from pusa.server.plans import Size

pytest.importorskip("playwright")

from playwright.sync_api import expect

expect.set_options(timeout=30_000)


@pytest.mark.parametrize(
    ("locale", "said"),
    [
        ("en-US", "The model could not be loaded, so nothing can be made. Tell the server’s operator"),
        ("fr-FR", "Le modèle n’a pas pu être chargé : rien ne peut être créé. Signalez au responsable du serveur"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_so_and_generate_is_off(
    browser: Any, tmp_path: Path, locale: str, said: str
) -> None:
    with studio(tmp_path, "studio_engine:FailsToLoad") as running:
        visitor = Visitor(browser, running, locale=locale)
        visitor.page.goto(running.url)
        banner = visitor.page.locator(".banner.bad")
        expect(banner).to_contain_text(said)
        expect(banner.locator("code[lang=en]")).to_have_text(
            "ValueError: the weights are not there: download them first"
        )
        expect(visitor.page.locator("#generate")).to_be_disabled()
        visitor.close()


def never_fits(model: str, size: Size, machine: Machine, options: LoadOptions, guidance: float) -> Sequence[Plan]:
    problem = "mini needs 9.5 GB of RAM, and 1.0 GB is free: 64x64 with 17 frames fits"
    values = {"lacks": "ram", "needs": 9.5, "has": 1, "way": "smaller", "size": "64x64", "frames": 17}
    return [Plan(model, "balanced", {}, problem=problem, problem_values=values)]


def test_what_does_not_fit_is_told_in_french_before_and_after_the_press(browser: Any, tmp_path: Path) -> None:
    with studio(tmp_path, machine=Machine(ram_bytes=10**9), plan=never_fits) as running:
        visitor = Visitor(browser, running, locale="fr-FR")
        visitor.open()
        visitor.tab("text")
        visitor.write("prompt", "un chat")
        said = "Il faudrait 9,5 Go de mémoire, et 1 Go sont libres : 64x64 avec 17 images convient."
        expect(visitor.page.locator("#estimate")).to_have_text(said)
        visitor.page.click("#generate")
        expect(visitor.page.locator(".problem")).to_contain_text(said)
        visitor.close()
