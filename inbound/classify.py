"""`python -m inbound.classify`: reads message files named on standard input, writes one JSON line each. What `sluice classify --eml` runs.

    {"file", "kind", "action", "recipients", "hard", "status", "category", "feedback_type", "read_as", "rule"}

`kind` is one of dsn, arf, autoreply, reply, other; `read_as` is finer (unsubscribe, challenge). A file that cannot be read has `error`.
"""

import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from inbound.mime_reader import MAX_BYTES
from inbound.triage import Failure, Reading, read

KINDS: Final = {"unsubscribe": "other", "challenge": "autoreply"}  # the five kinds labelled corpora know


def answer(reading: Reading) -> dict[str, Any]:
    """A reading as one flat object; where a report names several recipients, hard, status and category are the first one's."""
    about: tuple[Failure, ...] = reading.failed or reading.delayed
    first = about[0] if about else None
    failed = reading.kind == "dsn" and reading.action == "failed"
    recipients = [failure.recipient for failure in about if failure.recipient]
    if reading.feedback and reading.feedback.feedback_type != "auth-failure":
        recipients = list(reading.feedback.recipients)
    hard = None
    if reading.kind == "dsn":
        hard = bool(failed and first and first.means.hard)
    return {
        "kind": KINDS.get(reading.kind, reading.kind),
        "action": reading.action or None,
        "recipients": recipients,
        "hard": hard,
        "status": (first.status or None) if first else None,
        "category": first.means.category if first and failed else None,
        "feedback_type": reading.feedback.feedback_type if reading.feedback else None,
        "read_as": reading.kind,
        "rule": first.means.rule if first else None,
    }


def main() -> int:
    """Answer for each path on standard input, in order. Exit code 1 where a file could not be read."""
    failed = False
    for line in sys.stdin:
        name = line.rstrip("\r\n")
        if not name:
            continue
        result: dict[str, Any] = {"file": name}
        try:
            with Path(name).open("rb") as file:
                result |= answer(read(file.read(MAX_BYTES + 1)))
        except OSError as failure:
            failed = True
            result["error"] = f"cannot be read: {failure.strerror}"
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
