"""The abuse report form: a reader says that he does not want this mail or never asked for it, without a mail program's help.

It hangs on the token of the unsubscribe link, so it needs no link of its own in messages: `/a/` instead of `/u/`. GET shows the form, POST
acts: a complaint like any other, which suppresses the address for all mail of this user.
"""

from typing import Final
from urllib.parse import parse_qs

from domain import feedback
from domain.links import LinkParts
from store import bounces
from store.postgres import PooledConnection

REASONS: Final = {
    "unasked": "I never asked for this mail",
    "unwanted": "I do not want it any more",
    "deceptive": "It is deceptive or dangerous",
    "other": "Something else",
}
MAX_COMMENT: Final = 1000


def said_in(body: bytes) -> dict[str, str]:
    """The fields of the form. Raises ValueError: it is none."""
    return {name: values[0] for name, values in parse_qs(body.decode("utf-8", "replace"), max_num_fields=20).items()}


async def report(conn: PooledConnection, parts: LinkParts, body: bytes) -> bool | None:
    """Record the complaint of the recipient. True: done now; False: he complained before; None: there is no such recipient.

    Raises ValueError where `said_in` does.
    """
    said = said_in(body)
    reason = said.get("reason", "")
    details = {
        "reason": reason if reason in REASONS else "other",
        "comment": "".join(c for c in said.get("comment", "") if c.isprintable() or c == "\n")[:MAX_COMMENT],
    }
    event = bounces.Event(
        kind=feedback.COMPLAINT, action="abuse", user_id=parts.user_id, campaign_id=parts.campaign_id, number=parts.number,
        effect="complained", diagnostic=f"reported by the reader: {REASONS[details['reason']]}", format="web", details=details,
    )  # fmt: skip
    [(outcome, _)] = await bounces.record(conn, [event], bounces.Rules(), bounces.Changes())
    return None if outcome == feedback.UNPROVEN else outcome != feedback.REPEATED
