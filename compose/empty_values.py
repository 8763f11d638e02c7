"""Which values of the templates come out empty, and for whom: seen by composing a campaign for a sample of its list (pre-flight).

What is counted is what a reader would miss: not a variable inside an `if` that is not taken, nor one that has a default.
"""

import re
import time
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from compose.campaign import CompiledCampaign
from compose.preflight import Finding, plain
from domain.campaign import Recipient
from domain.errors import Invalid

LONGEST_SECONDS: Final = 2.0  # a template that is slow is looked at for fewer recipients
SOME_PERCENT: Final = 5.0  # so many recipients without a value are worth a word


class Counted(NamedTuple):
    """`empty`: what a template calls the value -> how many recipients have none, and the address of the first of them."""

    composed: int
    empty: dict[str, tuple[int, str]]


def count(compiled: CompiledCampaign, people: Sequence[Recipient], *, composed_at: float) -> Counted:
    """Compose for each; whoever gets no message is left out. Takes at most about `LONGEST_SECONDS`."""
    until = time.monotonic() + LONGEST_SECONDS
    composed, empty = 0, dict[str, tuple[int, str]]()
    before = compiled.empty_values()
    for person in people:
        [answer] = compiled.build([person], composed_at=composed_at, attempt=1)
        now = compiled.empty_values()
        if not isinstance(answer, Invalid):
            composed += 1
            for name in now:
                if now[name] > before.get(name, 0):
                    times, example = empty.get(name, (0, person.email))
                    empty[name] = times + 1, example
        before = now
        if time.monotonic() > until:
            break
    return Counted(composed, empty)


def findings(counted: Counted, others: Iterable[Finding]) -> list[Finding]:
    """One for each value that is empty for many, but for those that `others` call unknown already."""
    unknown = {(kind, plain(name)) for kind, _, name in (each.name.partition(":") for each in others)}
    found = []
    for name, (times, example) in counted.empty.items():
        percent = 100.0 * times / counted.composed
        root, *words = [*map(plain, re.findall(r"\w+", name))] or [""]
        if percent < SOME_PERCENT or ("variable_unknown", root) in unknown or any(("field_unknown", word) in unknown for word in words):
            continue
        shown = name if name.startswith("%") else f"{{{{ {name} }}}}"
        what = f"{shown} is empty for {percent:.0f} % of {counted.composed:,} recipients, for example {example}"
        advice = f"fill it in, or say what stands in for it: {_with_default(name)}"
        found.append(Finding(name=f"value_empty:{name}", severity="warning", what=what, advice=advice))
    return found


def _with_default(name: str) -> str:
    if name.startswith("%"):
        return f"{name[:-1]}|...%"
    variable, bar, filters = name.partition(" | ")
    return f"{{{{ {variable} | default: '...'{bar}{filters} }}}}"
