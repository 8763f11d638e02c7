"""`sluice bounce-pattern`, `bounces import`, `suppress` and what `classify` makes of them."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.control.test_cli import Sluice, sluice

__all__ = ["sluice"]

BLOCKED = "550 5.7.1 Unfortunately, messages from [192.0.2.25] weren't sent (S3140)."


def answer(done: "subprocess.CompletedProcess[str]") -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_patterns_are_added_ordered_tried_and_removed_and_classify_says_which_fired(sluice: Sluice, tmp_path: Path) -> None:
    assert sluice("bounce-pattern", "add", "550 5.7.1 Unfortunately, messages from==>Hard", "--note", "dead list").returncode == 0
    found = answer(sluice("classify", BLOCKED, "--json"))
    assert (found["hard"], found["bounce_pattern"]) == (True, "550 5.7.1 Unfortunately, messages from==>Hard")
    assert answer(sluice("classify", BLOCKED, "--shipped", "--json"))["hard"] is False
    (tmp_path / "patterns.txt").write_text("# ours\n\n/s3\\d{3}/==>policy-related|Soft\n550 5.7.1 Unfortunately, messages from==>Hard\n")
    assert "1 added" in sluice("bounce-pattern", "import", "patterns.txt").stdout
    listed = answer(sluice("bounce-pattern", "list", "--json"))
    assert [each["verdict"] for each in listed] == ["Hard", "policy-related|Soft"]
    sluice("bounce-pattern", "move", str(listed[1]["id"]), "1")
    assert sluice("bounce-pattern", "list", "--lines").stdout.splitlines() == [
        "/s3\\d{3}/==>policy-related|Soft",
        "550 5.7.1 Unfortunately, messages from==>Hard",
    ]
    assert answer(sluice("bounce-pattern", "test", BLOCKED, "--json"))["hard"] is False
    assert answer(sluice("bounce-pattern", "test", BLOCKED, "--with", "weren't==>Hard", "--json"))["bounce_pattern"] == "weren't==>Hard"
    assert sluice("bounce-pattern", "remove", str(listed[0]["id"])).returncode == 0
    refused = sluice("bounce-pattern", "add", "/(?<=a)b/==>Hard")
    assert refused.returncode == 2
    assert "RE2 refuses" in refused.stderr
    assert "line 1" in sluice("bounce-pattern", "import", "-", input="text==>Maybe\n").stderr


def test_powermta_s_files_are_imported_once(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "acct.csv").write_text(
        "type,timeLogged,orig,rcpt,bounceCat,dsnStatus,dsnAction,dsnDiag\n"
        "b,2026-11-01 10:00:00+0000,x@our.example,gone@news.example,bad-mailbox,5.1.1,failed,smtp;550 5.1.1 User unknown\n"
        "d,2026-11-01 10:00:00+0000,x@our.example,fine@news.example,,2.0.0,relayed,\n"
        "b,2026-11-01 10:00:00+0000,x@our.example,no-at,bad-mailbox,5.1.1,failed,smtp;550 5.1.1 User unknown\n"
    )
    for suppressed in (1, 0):
        report = answer(sluice("bounces", "import", "acct.csv", "--json"))
        assert (report["hard"], report["skipped"], report["refused"], report["suppressed"]) == (1, 1, 1, suppressed)
    assert "has no @" in sluice("bounces", "import", "acct.csv").stdout
    found = answer(sluice("suppress", "check", "Gone@news.example", "--json"))
    assert [entry["reason"] for entry in found["suppressions"]] == ["bounced"]


def test_domains_are_suppressed_exported_imported_and_ended(sluice: Sluice, tmp_path: Path) -> None:
    assert answer(sluice("suppress", "add", "bad.example", "info@*", "--json")) == {"given": 2, "added": 2}
    assert answer(sluice("suppress", "check", "anna@bad.example", "--json"))["suppressed"] is True
    assert sluice("suppress", "export", "--out", "all.csv").returncode == 0
    lines = (tmp_path / "all.csv").read_text().splitlines()
    assert lines[0] == "address,scope,list_id,source,text,when"
    assert lines[1].startswith("'@bad.example,user,,user,,")
    assert sluice("suppress", "remove", "*@bad.example").returncode == 0
    assert answer(sluice("suppress", "check", "anna@bad.example", "--json"))["suppressed"] is False
    assert answer(sluice("suppress", "import", "all.csv", "--system", "--json"))["suppressed"] == 2
    assert answer(sluice("suppress", "list", "--json"))["counts"] == {"import": 2, "manual": 1}
    refused = sluice("suppress", "add", "in*fo@bad.example")
    assert refused.returncode == 2
    assert "a star stands for" in refused.stderr


def test_classify_starts_nothing_to_be_answered(sluice: Sluice, tmp_path: Path) -> None:
    done = sluice("classify", BLOCKED, "--json", SLUICE_DATABASE_URL="embedded:")
    assert json.loads(done.stdout)["bounce_pattern"] is None
    assert "the database does not run" in done.stderr
    assert not (tmp_path / "state" / "postgres").exists()
