"""One template with given data, through the compiled path that messages take; for `sluice template render` and for trying things out."""

import datetime as dt
from collections.abc import Mapping
from typing import Any, Final

from liquid.exceptions import LiquidError

from compose import link_rewriting, liquid
from compose.link_nodes import Splicer
from compose.tags import KINDS, Tags
from domain.errors import Invalid

FIELD: Final = "template"
_KEY: Final = bytes(32)  # hashed ids of a trial name nobody


def render(template: str, data: Mapping[str, Any], *, html: bool = False, sender_domain: str = "example.com") -> str:
    """What `template` says about `data`; `html` escapes values. `%Kind:Name%` tags look into `data`, too.

    Raises Invalid: with line and column for a template that cannot be compiled, else for data it cannot be rendered with.
    """
    constants = {kind: {"id": "", "name": "", **_mapping(data.get(kind))} for kind in KINDS}
    tags = Tags(_KEY, constants, sender_domain)
    compiled = liquid.compile_template(FIELD, template, liquid.HTML if html else liquid.TEXT, {}, tags.rewrite)
    if html:
        marked = link_rewriting.mark_addresses(template)
        if marked != template:
            compiled = liquid.compile_template(FIELD, marked, liquid.HTML, {}, tags.rewrite, Splicer(None))
    now = dt.datetime.now()
    scope = {"now": now, "today": now.date(), **data}
    if tags.used:
        scope["subscriber"] = {"id": "", "email": "", **_mapping(data.get("subscriber"))}
    try:
        text = compiled.program.render(scope)
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Invalid("data", "it holds half of a surrogate pair") from None
    except LiquidError as error:
        raise Invalid(FIELD, f"{compiled.place()}{Exception.__str__(error) or type(error).__name__}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise Invalid(FIELD, f"{compiled.place()}cannot be rendered: {error or type(error).__name__}") from error
    return text


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
