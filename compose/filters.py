"""Liquid filters that python-liquid's own would answer too slowly, too largely, or by the clock of the wall.

Every one answers as python-liquid's does; `date` takes the time of composition for "now", so that a message rendered again
has the same text. Registered over the standard filters by `compose.liquid`.
"""

import contextlib
import datetime as dt
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from dateutil import parser
from liquid import Environment, RenderContext, is_undefined
from liquid.exceptions import FilterArgumentError, ResourceLimitError
from liquid.filter import liquid_filter, with_context, with_environment
from liquid.stringify import to_liquid_string
from markupsafe import Markup

from ext import template as ops

ISO_DATE: Final = re.compile(r"[1-9]\d{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])")
MAX_FORMAT_CHARACTERS: Final = 500  # strftime takes up to 256 octets for each
MAX_STRIPPED_CHARACTERS: Final = 50_000
MAX_COMPARED_ITEMS: Final = 500

_SIMPLE: Final = (str, int, float, bool, type(None))


def _instant(value: object, now: dt.datetime) -> dt.datetime | None:
    """What python-liquid takes `value` for; what a partial date leaves open comes from `now`."""
    if isinstance(value, dt.datetime):
        return value
    if isinstance(value, dt.date):
        return dt.datetime.combine(value, dt.time.min)
    try:
        if isinstance(value, str):
            if value.isdigit():
                return dt.datetime.fromtimestamp(int(value))
            if len(value) > MAX_FORMAT_CHARACTERS:
                return None
            if ISO_DATE.fullmatch(value):
                with contextlib.suppress(ValueError):  # 30 February: dateutil's answer counts
                    return dt.datetime(int(value[:4]), int(value[5:7]), int(value[8:]))
            parsed: dt.datetime = parser.parse(value, default=now.replace(hour=0, minute=0, second=0, microsecond=0))
            return parsed
        if isinstance(value, int):
            return dt.datetime.fromtimestamp(value)
    except parser.ParserError:
        return None
    except (OverflowError, OSError):
        if isinstance(value, str):
            raise
        return None
    return None


def date_at(value: Any, form: Any, *, scope: Mapping[str, Any], autoescape: bool) -> str:
    """`value` in the strftime form `form`, as python-liquid's filter `date` with `scope["now"]` for the wall clock."""
    if is_undefined(value):
        return ""
    if is_undefined(form):
        return str(value)
    if not isinstance(form, str):
        raise FilterArgumentError(f"date expected a format string, found {type(form).__name__}", token=None)
    if len(form) > MAX_FORMAT_CHARACTERS:
        raise ResourceLimitError(f"a date format has more than {MAX_FORMAT_CHARACTERS} characters", token=None)
    now = scope.get("now")
    if not isinstance(now, dt.datetime):
        now = dt.datetime.now()
    instant = now if value in ("now", "today") else _instant(value, now)
    if instant is None:
        if isinstance(value, (str, int)):
            return str(value)
        raise FilterArgumentError(f"date expected a date, found {type(value).__name__}", token=None)
    try:
        text = instant.strftime(form)
    except ValueError as error:
        if form == "%s":
            return str(instant.timestamp()).split(".")[0]
        raise FilterArgumentError(str(error), token=None) from error
    return Markup(text) if autoescape and isinstance(form, Markup) else text


@with_context
@liquid_filter
def date(value: Any, form: Any, *, context: RenderContext) -> str:
    """`date_at` as python-liquid calls it."""
    return date_at(value, form, scope=context.globals, autoescape=context.env.autoescape)


@with_environment
def raw(value: Any, *, environment: Environment) -> Any:
    """`value` as it is: not escaped in HTML, and in an address escaped but not encoded (`compose.link_nodes`)."""
    return Markup(to_liquid_string(value, False)) if environment.autoescape else value


def _before(function: Callable[..., Any], look: Callable[..., None]) -> Callable[..., Any]:
    """`function`, after `look` has seen its arguments and not raised; keeps what python-liquid reads from a filter."""

    def looked_at(value: Any, *arguments: Any, **named: Any) -> Any:
        look(value, *arguments)
        return function(value, *arguments, **named)

    for mark in ("with_context", "with_environment", "validate"):
        if hasattr(function, mark):
            setattr(looked_at, mark, getattr(function, mark))
    return looked_at


def _replacement(value: Any, sought: Any = "", put: Any = "", *_rest: Any) -> None:
    """Refuse a replacement whose result is too large, before it is made."""
    text, sought, put = str(value), str(sought), str(put)
    if len(put) > len(sought) and len(text) + text.count(sought) * len(put) > 4 * ops.VALUE_LIMIT:
        raise ResourceLimitError("a replacement would be too long", token=None)


def _join(value: Any, separator: Any = " ", *_rest: Any) -> None:
    if isinstance(value, (list, tuple)) and len(value) * len(str(separator)) > 4 * ops.VALUE_LIMIT:
        raise ResourceLimitError("the joined text would be too long", token=None)


def _markup(value: Any, *_rest: Any) -> None:
    """A parser of the standard library reads it, whose time can grow with the square of the length."""
    if isinstance(value, str) and len(value) > MAX_STRIPPED_CHARACTERS:
        raise ResourceLimitError(f"strip_html takes at most {MAX_STRIPPED_CHARACTERS} characters", token=None)


def _comparisons(value: Any, *_rest: Any) -> None:
    """Each item is compared with each: bound their number."""
    if isinstance(value, (list, tuple)) and len(value) > MAX_COMPARED_ITEMS:
        raise ResourceLimitError(f"uniq takes at most {MAX_COMPARED_ITEMS} items that are not plain values", token=None)


def _uniq(slow: Callable[..., Any]) -> Callable[..., Any]:
    careful = _before(slow, _comparisons)

    def uniq(value: Any, *arguments: Any, **named: Any) -> Any:
        if not arguments and not named and isinstance(value, list) and all(isinstance(item, _SIMPLE) for item in value):
            return list(dict.fromkeys(value))
        return careful(value, *arguments, **named)

    return uniq


def register(env: Environment) -> None:
    """Put these filters over python-liquid's own of the same names."""
    env.add_filter("date", date)
    env.add_filter("raw", raw)
    env.add_filter("replace", _before(env.filters["replace"], _replacement))
    env.add_filter("join", _before(env.filters["join"], _join))
    env.add_filter("strip_html", _before(env.filters["strip_html"], _markup))
    env.add_filter("uniq", _uniq(env.filters["uniq"]))
