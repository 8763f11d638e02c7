"""The words of `config/report_words.toml` as searches: one RE2 expression for each list, compiled once."""

import functools
import importlib.resources
import tomllib
from collections.abc import Callable

import msgspec
import re2  # type: ignore[import-untyped]

from domain.errors import Invalid


@functools.cache
def _lists() -> dict[str, list[str]]:
    text = importlib.resources.files("config").joinpath("report_words.toml").read_text("utf-8")
    return msgspec.convert(tomllib.loads(text), dict[str, list[str]])


@functools.cache
def words(name: str, before: str = "", after: str = "") -> Callable[[str], object]:
    """A search for any entry of a list: one pass in time linear in the text, where `re` would try each word at each letter.

    `before` and `after` are what must stand around the word, as RE2.

    Raises Invalid naming the list whose entry RE2 refuses.
    """
    options = re2.Options()
    options.case_sensitive = False
    options.log_errors = False
    try:
        search: Callable[[str], object] = re2.compile(f"{before}(?:{'|'.join(_lists()[name])}){after}", options).search
    except re2.error as failure:
        raise Invalid(f"report words {name}", f"RE2 refuses an entry: {failure}") from None
    return search
