"""The verdict: what the sinks accepted against what the ledger says, recipient by recipient. Pure: facts in, counts out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from domain import states

ASSUMED: Final = "assumed delivered"  # how a `d` begins that rests on `on_uncertain = assume_delivered`
GIVEN_UP: Final = "given up"  # and an `x` that rests on `on_uncertain = fail`
_EXAMPLES: Final = 3


class Verdict(msgspec.Struct, kw_only=True):
    """Counts of one load. The first five are promises: P1 and P2 (lost), P5 (false), P3 and P4 (duplicates)."""

    recipients: int = 0
    lost: int = 0
    false_delivered: int = 0
    false_bounced: int = 0
    duplicates_announced: int = 0
    duplicates_unexplained: int = 0
    uncertain: int = 0  # `u` records
    assumed: int = 0  # recorded as delivered by assumption, a `u` names each
    examples: list[str] = []  # one sentence each, a few per kind


def reconcile(
    addresses: Sequence[str],
    copies: Mapping[str, Sequence[str]],
    records: Iterable[tuple[str, str, str]],
    *,
    may_refuse: Callable[[str], bool] = lambda address: False,
) -> Verdict:
    """Compare. `copies`: recipient -> Message-ID of each accepted copy; `records`: (kind, recipient, diagnostic).

    lost: no end, more than one end, or one that was no answer of anybody (expired, suppressed, cancelled).
    false_delivered: a `d` no sink knows of, unless it says that it is an assumption and a `u` record names it.
    false_bounced: a `b` or `x` for a recipient that no sink refused (`may_refuse`), or that a sink accepted.
    A second copy is announced when it has the same Message-ID as the first and a `u` record of its recipient stands for it.
    """
    verdict = Verdict(recipients=len(addresses), examples=[])
    ends: dict[str, list[tuple[str, str]]] = {}
    doubts: dict[str, int] = {}
    said: dict[str, int] = {}

    def example(kind: str, sentence: str) -> None:
        said[kind] = said.get(kind, 0) + 1
        if said[kind] <= _EXAMPLES:
            verdict.examples.append(f"{kind}: {sentence}")

    for kind, recipient, diagnostic in records:
        if kind in states.TERMINAL_KINDS:
            ends.setdefault(recipient, []).append((kind, diagnostic))
        elif kind == states.KIND_UNCERTAIN:
            doubts[recipient] = doubts.get(recipient, 0) + 1
            verdict.uncertain += 1
    for address in addresses:
        taken = copies.get(address, ())
        found = ends.get(address, [])
        doubt = doubts.get(address, 0)
        if len(found) != 1:
            verdict.lost += 1
            what = "no end" if not found else f"ends {' '.join(kind for kind, _ in found)}"
            example("lost", f"{address}: {what}, {len(taken)} copies accepted, {doubt} in doubt")
        else:
            ((kind, diagnostic),) = found
            if kind == states.KIND_DELIVERY:
                verdict.assumed += bool(diagnostic.startswith(ASSUMED) and doubt)
                if not taken and not (diagnostic.startswith(ASSUMED) and doubt):
                    verdict.false_delivered += 1
                    example("false delivered", f"{address}: recorded as delivered ({diagnostic[:100]!r}), no sink accepted it")
            elif kind in (states.KIND_BOUNCE, states.KIND_EXPIRY):
                given_up = diagnostic.startswith(GIVEN_UP) and doubt
                if not given_up and (taken or not may_refuse(address)):
                    verdict.false_bounced += 1
                    example("false bounced", f"{address}: {kind} ({diagnostic[:100]!r}), {len(taken)} copies accepted")
            else:
                verdict.lost += 1
                example("lost", f"{address}: ended as {kind} without a reason")
        extra = len(taken) - 1
        if extra > 0:
            announced = min(extra, doubt) if len(set(taken)) == 1 else 0
            verdict.duplicates_announced += announced
            verdict.duplicates_unexplained += extra - announced
            if announced < extra:
                ids = f"{len(set(taken))} Message-IDs" if len(set(taken)) > 1 else "one Message-ID"
                example("unexplained", f"{address}: {len(taken)} copies with {ids}, {doubt} in doubt")
    known = set(addresses)
    strangers = [address for address in copies if address not in known]
    if strangers:
        verdict.duplicates_unexplained += len(strangers)
        example("unexplained", f"{strangers[0]}: nobody asked for it")
    return verdict
