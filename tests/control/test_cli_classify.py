"""`sluice classify`: which rule fired and why; whole corpora through standard input."""

import json
import subprocess
import sys
from pathlib import Path


def sluice(*words: str, input: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "control.cli", *words], input=input, capture_output=True, text=True, timeout=60)


def test_a_reply_is_explained() -> None:
    found = json.loads(sluice("classify", "550 5.1.1 <anna@b.example>: User unknown", "--json").stdout)
    assert (found["category"], found["hard"], found["status"], found["rule"]) == ("bad-mailbox", True, "5.1.1", "unknown")
    assert found["pattern"]
    assert found["seen_as"] == "550 5.1.1 | 550 5.1.1 @ user unknown"


def test_replies_are_read_line_by_line() -> None:
    rows = [{"id": "a", "text": "452 4.2.2 Mailbox full"}, {"id": 7, "text": "no code"}]
    done = sluice("classify", "--replies", input="\n".join(json.dumps(row) for row in rows))
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers[0] == {"id": "a", "hard": False, "category": "quota-issues", "status": "4.2.2"}
    assert (answers[1]["id"], answers[1]["status"]) == (7, None)
    refused = sluice("classify", "--replies", input="{}\n")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "line 1" in refused.stderr


def test_messages_are_read_by_path(tmp_path: Path) -> None:
    (tmp_path / "a.eml").write_text("From: MAILER-DAEMON@b.example\nSubject: failure notice\n\n<anna@b.example>:\nno such user (#5.1.1)\n")
    done = sluice("classify", "--eml", input=f"{tmp_path / 'a.eml'}\n{tmp_path / 'none.eml'}\n")
    found, missing = (json.loads(line) for line in done.stdout.splitlines())
    assert {name: found[name] for name in ("kind", "action", "recipients", "hard", "status", "category", "feedback_type")} == {
        "kind": "dsn", "action": "failed", "recipients": ["anna@b.example"], "hard": True, "status": "5.1.1", "category": "bad-mailbox",
        "feedback_type": None,
    }  # fmt: skip
    assert done.returncode == 1
    assert "cannot be read" in missing["error"]


def test_one_kind_of_input_at_a_time() -> None:
    assert sluice("classify").returncode == 2
    assert sluice("classify", "550 no", "--eml").returncode == 2
