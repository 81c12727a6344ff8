"""Carry machines between workers and the server as JSON, and the settings that say how a model is loaded."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from pusa.acceleration.decisions import Card, LoadOptions, Machine, Plan
from pusa.server.settings import ServerSettings

Size = tuple[int, int, int]
"""Width, height and frames of what a model makes at once."""

PlanFunction = Callable[[str, Size, Machine, LoadOptions], Plan]
"""Plans how a model (a source, as in a request) makes a clip on a machine."""


def plan_model(model: str, size: Size, machine: Machine, options: LoadOptions) -> Plan:
    """Call `pusa.acceleration.plan`, which is imported when it is needed first."""
    from pusa.acceleration import plan

    found: Plan = plan(model, size=size, machine=machine, options=options)
    return found


def load_options(settings: ServerSettings) -> LoadOptions:
    """Return the settings that say how a model is loaded."""
    return LoadOptions(gpus=settings.gpus)


def machine_as_json(machine: Machine) -> dict[str, Any]:
    """Convert a machine to plain values."""
    return asdict(machine)


def machine_from_json(values: Mapping[str, Any]) -> Machine:
    """Convert what `machine_as_json` returned, after a way through JSON. Raises TypeError for other values."""
    cards = []
    for card in values.get("cards", ()):
        capability = card.get("capability")
        cards.append(Card(**{**card, "capability": None if capability is None else tuple(capability)}))
    return Machine(**{**values, "cards": tuple(cards)})
