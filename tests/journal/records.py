"""Records for the tests of the journal's readers."""

import time

from ext import journal_record

NOW = time.time_ns() // 1000


def intent(number: int, *, campaign: int = 7, server: int = 1) -> bytes:
    """The intent of the first attempt at one recipient; batches of 4."""
    return journal_record.pack_intent(campaign, (number - 1) // 4 + 1, number, (number - 1) % 4, 1, 1, 3, server, NOW)


def outcome(kind: str, number: int, *, campaign: int = 7, due_at: int = 0, diagnostic: str = "250 ok") -> bytes:
    """The outcome of the first attempt at one recipient; batches of 4."""
    return journal_record.pack_outcome(
        kind, campaign, (number - 1) // 4 + 1, number, (number - 1) % 4, 1, 1, 3, 1, NOW, NOW, 0, due_at, 100,
        f"r{number}@example.com", "b@example.net", "2.0.0", diagnostic, "", "mx.example.com (192.0.2.1)", "192.0.2.2", "192.0.2.1",
        "PIPELINING", "example.com/v",
    )  # fmt: skip
