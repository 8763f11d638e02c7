"""What python-liquid alone renders: the slow, obvious twin of `compose.liquid` and `ext.template`."""

from typing import Any

from liquid import Environment

HTML = Environment(autoescape=True)
TEXT = Environment(autoescape=False)


def render(source: str, scope: dict[str, Any], *, html: bool) -> str:
    """The text of `source` for `scope`; raises what python-liquid raises."""
    return (HTML if html else TEXT).from_string(source).render(**scope)
