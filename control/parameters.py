"""Pieces of requests and answers that every resource shares: ids, pages, and text fit for a header or a name."""

import re
from typing import Annotated, Generic, TypeAlias, TypeVar

import msgspec
from litestar.params import PathParameter, QueryParameter

from domain.errors import Invalid

T = TypeVar("T")

MAX_ID = 2**63 - 1
MAX_PAGE = 1000

Id: TypeAlias = Annotated[int, PathParameter(ge=1, le=MAX_ID)]
Limit: TypeAlias = Annotated[int, QueryParameter(ge=1, le=MAX_PAGE, description="How many at most.")]
After: TypeAlias = Annotated[int, QueryParameter(ge=0, le=MAX_ID, description="The `next` of the page before; 0 begins.")]
Before: TypeAlias = Annotated[
    int | None, QueryParameter(ge=1, le=MAX_ID, description="The `next` of the page before; without it, the newest.")
]

# C0, DEL, C1, line and paragraph separators: what could end a line somewhere (S2)
_LINE_BREAKING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Page(msgspec.Struct, Generic[T], frozen=True):
    """One page. `next` is what continues it, null on the last."""

    items: list[T]
    next: int | None


def one_line(field: str, value: str, *, minimum: int = 0, maximum: int = 255) -> str:
    """Text that may stand in a header or a name. Raises Invalid(field, reason): refused, never cleaned."""
    if found := _LINE_BREAKING.search(value):
        raise Invalid(field, f"contains the control character U+{ord(found[0]):04X}; it must be one line of text")
    if not minimum <= len(value) <= maximum:
        raise Invalid(field, f"must have {minimum} to {maximum} characters, not {len(value)}")
    if minimum and not value.strip():
        raise Invalid(field, "is blank")
    return value


def given(data: msgspec.Struct) -> dict[str, object]:
    """The fields of an XUpdate that the caller wrote."""
    return {name: value for name in data.__struct_fields__ if (value := getattr(data, name)) is not msgspec.UNSET}
