"""Render the pages of evaluations, which share colours, tables and the dark mode of `templates/page.html`."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_TEMPLATES = Path(__file__).with_name("templates")


def render_page(template: Path, **values: Any) -> str:
    """Render a template that extends ``page.html``, as HTML. All values are escaped."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, _TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(values)
