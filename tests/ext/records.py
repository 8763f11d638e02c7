"""Records, and strategies for them, that the tests of the compiled journal modules share."""

from hypothesis import strategies as st

from ext import journal_record

NOW = 1_795_284_094_426_911
KINDS = "dbxsctu"
i32 = st.integers(-(2**31), 2**31 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
any_text = st.text(st.characters(exclude_categories=()), max_size=20)
numbers = st.tuples(i64, i32, i32, i32, st.integers(0, 32767), i32, i32, i64, i64)
outcomes = st.builds(
    lambda kind, head, tail, texts: (kind, *head, *tail, *texts),
    st.sampled_from(KINDS), numbers, st.tuples(i64, i64, i64, i64), st.lists(any_text, min_size=10, max_size=10),
)  # fmt: skip


def outcome(kind: str = "d", *, number: int = 1, position: int | None = None, **fields: object) -> bytes:
    record = {
        "campaign_id": 7, "batch": 1, "number": number, "position": number - 1 if position is None else position, "attempt": 1, "epoch": 1,
        "connection": 3, "delivery_server_id": 2, "at": NOW, "queued_at": NOW - 5_000_000, "first_attempt_at": 0, "due_at": 0, "size": 100,
        "recipient": "a@example.com", "sender": "b@example.net", "status": "2.0.0", "diagnostic": "250 ok", "category": "",
        "mta": "mx.example.com (192.0.2.1)", "source_ip": "192.0.2.9", "destination_ip": "192.0.2.1",
        "esmtp": "PIPELINING,8BITMIME", "queue": "example.com/vmta1",
    } | fields  # fmt: skip
    return journal_record.pack_outcome(kind, *record.values())  # type: ignore[arg-type]
