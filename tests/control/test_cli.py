"""The `sluice` command as people and scripts see it: a real process, real stores, exit codes, one sentence per error."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from control import cli_base
from control.supervise import ready_words

Sluice = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def sluice(fresh_database_url: str, redis_url: str, tmp_path: Path) -> Sluice:
    """Runs `sluice WORDS…` on stores of its own."""

    def run(*words: str, input: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")} | {
            "PYTHONPATH": str(ROOT),
            "SLUICE_DATABASE_URL": fresh_database_url,
            "SLUICE_REDIS_URL": redis_url,
            "SLUICE_NODE__STATE_DIRECTORY": str(tmp_path / "state"),
        }
        return subprocess.run([sys.executable, "-m", "control.cli", *words], input=input, capture_output=True, text=True,
                              env=own | environment, cwd=tmp_path, timeout=60, check=False)  # fmt: skip

    return run


def answer(done: subprocess.CompletedProcess[str]) -> object:
    """The JSON value a command wrote; it must have ended well."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_lists_every_command_and_the_exit_codes() -> None:
    done = subprocess.run([sys.executable, "-m", "control.cli", "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    for word in ("audit", "campaign", "check-config", "completion", "control", "demo", "dkim", "engine", "header", "import", "inbound",
                 "journal", "key", "list", "server", "sink", "status", "suppress", "template", "top", "up"):  # fmt: skip
        assert f"\n  {word} " in done.stdout
    assert "Exit codes: 0 = ok" in done.stdout


def test_help_imports_neither_stores_nor_web_framework() -> None:
    code = "import sys, control.cli; print([name for name in sys.modules if name.split('.')[0] in sys.argv[1:]])"
    heavy = ("asyncio", "asyncpg", "redis", "litestar", "uvloop", "rich", "msgspec", "aiohttp", "liquid", "cryptography")
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("words", [("nonsense",), ("campaign", "start"), ("import", "/nonexistent.csv", "--list", "x"), ("audit", "seven")])
def test_wrong_usage_ends_with_code_2_and_without_a_traceback(sluice: Sluice, words: tuple[str, ...]) -> None:
    done = sluice(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_database_that_does_not_answer_is_one_sentence_and_code_2(sluice: Sluice) -> None:
    done = sluice("list", "list", SLUICE_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    assert done.returncode == 2
    assert done.stderr.startswith("sluice: PostgreSQL at 127.0.0.1:1/none is not available")
    assert len(done.stderr.splitlines()) == 1


def test_a_list_that_does_not_exist_is_named(sluice: Sluice) -> None:
    done = sluice("list", "show", "Nobody")
    assert done.returncode == 2
    assert done.stderr == "sluice: there is no list 'Nobody'; `sluice list list` shows what there is\n"


def test_an_import_keeps_good_rows_and_reports_the_others(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "people.csv").write_text(
        "email,first_name\r\nana@one.example,Ana\r\nno-at.example,Bo\r\nANA@one.example,Again\r\nbø@two.example,Bø\r\n", encoding="utf-8"
    )
    done = sluice("import", "people.csv", "--list", "Readers", "--json")
    assert done.returncode == 2, "without --create there is no such list"

    report = answer(sluice("import", "people.csv", "--list", "Readers", "--create", "--refusals", "refused.csv", "--json"))
    assert isinstance(report, dict)
    assert {name: report[name] for name in ("rows", "imported", "updated", "refused")} == {
        "rows": 4,
        "imported": 2,
        "updated": 0,
        "refused": 2,
    }
    assert [(refusal["row"], refusal["field"]) for refusal in report["refusals"]] == [(2, "email"), (3, "email")]
    assert "duplicate of row 1" in report["refusals"][1]["reason"]
    assert (tmp_path / "refused.csv").read_text().splitlines()[0] == "row,field,reason"
    assert len((tmp_path / "refused.csv").read_text().splitlines()) == 3

    again = answer(sluice("import", "-", "--list", "Readers", "--json", input=(tmp_path / "people.csv").read_text(encoding="utf-8")))
    assert isinstance(again, dict)
    assert (again["imported"], again["updated"]) == (0, 2)

    shown = answer(sluice("list", "show", "Readers", "--json"))
    assert isinstance(shown, dict)
    assert shown["subscribers"] == {"subscribed": 2}
    assert [field["name"] for field in shown["fields"]] == ["first_name"]


def test_a_file_that_cannot_be_imported_is_named_and_leaves_no_list_behind(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "people.csv").write_text("email,First Name\na@one.example,Ana\n")
    refused = sluice("import", "people.csv", "--list", "New", "--create")
    assert refused.returncode == 2
    assert refused.stderr.startswith("sluice: people.csv: 'first name' cannot be a field: ")
    assert refused.stderr.endswith("; call it first_name\n")
    nowhere = sluice("import", "-", "--list", "New", "--create", "--refusals", "nowhere/refused.csv", input="email\na@one.example\n")
    assert (nowhere.returncode, nowhere.stderr) == (2, "sluice: No such file or directory (nowhere/refused.csv)\n")
    assert answer(sluice("list", "list", "--json")) == []


def test_lists_can_be_made_with_fields_and_found_by_name_or_id(sluice: Sluice) -> None:
    made = answer(sluice("list", "create", "Club", "--sender-email", "club@one.example", "--field", "points:number", "--json"))
    assert isinstance(made, dict)
    by_id = answer(sluice("list", "show", str(made["id"]), "--json"))
    assert by_id == answer(sluice("list", "show", "Club", "--json"))
    twice = sluice("list", "create", "Club")
    assert (twice.returncode, twice.stderr) == (1, "sluice: a list named 'Club' exists already; choose another name\n")
    wrong = sluice("list", "create", "Other", "--sender-email", "not an address")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("sluice: sender_email: ")
    table = sluice("list", "list")
    assert "Club" in table.stdout
    assert "club@one.example" in table.stdout


def test_suppressions_are_added_checked_and_removed(sluice: Sluice) -> None:
    assert answer(sluice("suppress", "add", "Gone@one.example", "gone@ONE.example", "--note", "asked by phone", "--json")) == {
        "given": 2,
        "added": 1,
    }
    found = answer(sluice("suppress", "check", "gone@one.example", "--json"))
    assert isinstance(found, dict)
    assert found["suppressed"] is True
    assert [(entry["reason"], entry["note"], entry["list_id"]) for entry in found["suppressions"]] == [("manual", "asked by phone", None)]
    assert sluice("suppress", "remove", "gone@one.example").stdout == "1 removed; the address may be mailed again\n"
    assert answer(sluice("suppress", "check", "gone@one.example", "--json")) == {"suppressed": False, "suppressions": []}
    assert answer(sluice("suppress", "add", "--file", "-", "--json", input="a@x.example\n\nb@x.example\n")) == {"given": 2, "added": 2}
    assert sluice("suppress", "add").returncode == 2


def test_a_key_is_shown_once_listed_without_its_secret_and_revoked(sluice: Sluice) -> None:
    made = sluice("key", "new", "laptop")
    assert made.returncode == 0
    key = made.stdout.strip()
    assert key.startswith("slk_")
    assert made.stderr == "keep it safe: it is shown only now\n"
    listed = sluice("key", "list", "--json")
    entry = next(entry for entry in json.loads(listed.stdout) if entry["name"] == "laptop")
    assert key not in listed.stdout
    assert (entry["scope"], entry["prefix"], entry["revoked_at"]) == ("user", key.split("_")[1], None)
    assert sluice("key", "revoke", str(entry["id"])).stdout == f"key {entry['id']} revoked\n"
    assert next(entry for entry in json.loads(sluice("key", "list", "--json").stdout) if entry["name"] == "laptop")["revoked_at"]


def test_check_config_names_file_key_and_reason_and_fails(sluice: Sluice, tmp_path: Path) -> None:
    good = tmp_path / "good.toml"
    good.write_text("[engine]\nprocesses = 2\n")
    assert answer(sluice("check-config", "good.toml", "--json")) == {
        "ok": True, "file": "good.toml", "problems": [], "warnings": [], "state_directory": str(tmp_path / "state"),
    }  # fmt: skip
    bad = tmp_path / "bad.toml"
    bad.write_text("[engine]\nprocesess = 2\n")
    done = sluice("check-config", "bad.toml")
    assert done.returncode == 1
    assert "bad.toml" in done.stderr
    assert "engine.procesess" in done.stderr
    done = sluice("--config", "bad.toml", "list", "list")
    assert done.returncode == 2
    assert "engine.procesess" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_the_shell(sluice: Sluice, shell: str) -> None:
    done = sluice("completion", shell)
    assert done.returncode == 0
    assert "_SLUICE_COMPLETE" in done.stdout


def test_completion_offers_commands(sluice: Sluice) -> None:
    done = sluice(_SLUICE_COMPLETE="bash_complete", COMP_WORDS="sluice camp", COMP_CWORD="1")
    assert done.stdout.strip() == "plain,campaign"


def test_output_to_a_closed_pipe_makes_no_noise() -> None:
    shell = f"{sys.executable} -m control.cli completion bash | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr == ""


def test_status_says_what_is_missing_and_fails(sluice: Sluice) -> None:
    done = sluice("status", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert (found["postgresql"], found["redis"], found["engines"]) == ("ok", "ok", [])
    assert any("no engine is running" in sentence for sentence in found["trouble"])


def test_top_writes_a_line_per_look_without_a_terminal(sluice: Sluice) -> None:
    began = time.monotonic()
    done = sluice("top", "--count", "2", "--interval", "0.2")
    assert done.returncode == 0
    assert [" messages_per_second=0.0 " in line for line in done.stdout.splitlines()] == [True, True]
    assert time.monotonic() - began < 30
    (look,) = sluice("top", "--count", "1", "--json").stdout.splitlines()
    assert json.loads(look)["engines"] == []


@pytest.fixture
def sink() -> Iterator[str]:
    """`host:port` of a running sink."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.sink", "--port", "0", "--http-port", "0"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    yield ready_words(process.stdout.readline())["smtp"]
    process.terminate()
    process.wait(10)
    process.stdout.close()


def test_a_delivery_server_is_added_tried_and_changed(sluice: Sluice, sink: str) -> None:
    host, _, port = sink.rpartition(":")
    made = answer(sluice("server", "add", "Sink", "--host", host, "--port", port, "--mfrom", "bounces.one.example", "--limit",
                         "max_connections=3", "--limit", "retry_schedule_seconds=1,2.5", "--json"))  # fmt: skip
    assert isinstance(made, dict)
    assert (made["port"], made["security"], made["limits"]["max_connections"]) == (int(port), "none", 3)
    assert made["limits"]["retry_schedule_seconds"] == [1.0, 2.5]

    passed = sluice("server", "test", "Sink", "--to", "you@inbox.example")
    assert passed.returncode == 0
    assert passed.stdout.startswith("Email Delivery: PASSED")
    refused = sluice("server", "test", "Sink", "--to", "bounce@inbox.example", "--json")
    assert refused.returncode == 1
    assert (json.loads(refused.stdout)["stage"], json.loads(refused.stdout)["email_delivery"]) == ("rcpt", "failed")

    changed = answer(
        sluice("server", "update", "Sink", "--name", "Relay", "--username", "me", "--password-file", "-", "--json", input="s3cret\n")
    )
    assert isinstance(changed, dict)
    assert (changed["name"], changed["username"], changed["has_password"], changed["limits"]) == ("Relay", "me", True, made["limits"])
    assert "s3cret" not in sluice("server", "show", "Relay").stdout
    assert sluice("server", "update", "Relay", "--fallback", "Relay").returncode != 0
    assert "fallback_after_seconds" in sluice("server", "update", "Relay", "--fallback", "none", "--json").stdout
    assert [server["name"] for server in json.loads(sluice("server", "list", "--json").stdout)] == ["Relay"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--host", "not a host"), "sluice: host: must be a host name or an IP address"),
        (
            ("--host", "x.example", "--limit", "max_conections=3"),
            "sluice: limits.max_conections: there is no such field; did you mean max_connections?",
        ),
        (("--host", "x.example", "--link-domain", "http://x.example/"), "sluice: link_domain: must be a domain alone"),
        (("--host", "x.example", "--limit", "bdat_window=many"), "sluice: limits.bdat_window: must be "),
        (("--host", "x.example", "--username", "me"), "sluice: password: user name and password belong together"),
    ],
)
def test_a_delivery_server_that_is_refused_names_the_field(sluice: Sluice, words: tuple[str, ...], sentence: str) -> None:
    done = sluice("server", "add", "Bad", *words)
    assert done.returncode == 2
    assert done.stderr.startswith(sentence)


def test_a_campaign_is_written_started_steered_and_audited(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "people.csv").write_text("email,city\r\nana@one.example,Graz\r\nbob@two.example,Bern\r\n", encoding="utf-8")
    (tmp_path / "letter.txt").write_text("Hello {{ subscriber.city }}\n{{ links.unsubscribe }}\n", encoding="utf-8")
    assert sluice("import", "people.csv", "--list", "Readers", "--create").returncode == 0
    assert sluice("server", "add", "Nowhere", "--host", "127.0.0.1", "--port", "9", "--mfrom", "b.one.example").returncode == 0
    words = ("campaign", "create", "--name", "May", "--list", "Readers", "--server", "Nowhere", "--from-email", "us@one.example", "--text")

    (tmp_path / "broken.txt").write_text("one\n{{ subscriber.city", encoding="utf-8")
    broken = sluice(*words, "broken.txt", "--subject", "Hi")
    assert broken.returncode == 2
    assert broken.stderr.startswith("sluice: text: ")
    assert "line 2" in broken.stderr

    made = answer(sluice(*words, "letter.txt", "--subject", "News for {{ subscriber.city }}", "--json"))
    assert isinstance(made, dict)
    number = str(made["id"])
    assert made["state"] == "draft"
    wrong = sluice("campaign", "pause", number)
    assert (wrong.returncode, wrong.stderr) == (1, f"sluice: campaign {number} is draft; it cannot be paused\n")

    assert json.loads(sluice("campaign", "start", number, "--json").stdout)["state"] == "preparing"
    assert json.loads(sluice("campaign", "pause", number, "--json").stdout)["state"] == "paused"
    assert json.loads(sluice("campaign", "resume", number, "--json").stdout)["state"] == "preparing"
    assert json.loads(sluice("campaign", "cancel", number, "--json").stdout)["state"] == "cancelling"
    assert "May" in sluice("campaign", "list").stdout
    assert json.loads(sluice("campaign", "show", number, "--json").stdout)["progress"]["state"] == "cancelling"
    assert json.loads(sluice("campaign", "report", number, "--json").stdout)["totals"]["delivered"] == 0

    audit = answer(sluice("audit", number, "--json"))
    assert isinstance(audit, dict)
    assert list(audit) == ["input", "delivered", "bounced", "expired", "suppressed", "cancelled", "queued", "missing",
                           "multiple_terminal", "disagreeing", "possible_duplicates"]  # fmt: skip
    assert sluice("audit", number).stdout.endswith("clean\n")
    unknown = sluice("audit", "999999")
    assert (unknown.returncode, unknown.stderr) == (2, "sluice: there is no campaign 999999; `sluice campaign list` shows what there is\n")


def test_a_campaign_without_content_or_with_an_impossible_number_is_refused(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "empty.html").write_text("\n")
    empty = sluice("campaign", "create", "--name", "x", "--list", "x", "--server", "x", "--subject", "x", "--html", "empty.html")
    assert (empty.returncode, empty.stderr.splitlines()[-1]) == (2, "Error: empty.html is empty: there is nothing to send")
    large = sluice("campaign", "show", "99999999999999999999")
    assert large.returncode == 2
    assert "Traceback" not in large.stderr


def test_what_is_not_needed_any_more_can_be_deleted(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Hello\n")
    assert sluice("list", "create", "Readers").returncode == 0
    assert sluice("server", "add", "Nowhere", "--host", "127.0.0.1").returncode == 0
    nothing = sluice("server", "update", "Nowhere")
    assert nothing.returncode == 2
    assert "nothing to change is given" in nothing.stderr
    held = sluice("campaign", "create", "--name", "May", "--list", "Readers", "--server", "Nowhere", "--from-email", "us@one.example",
                  "--subject", "x", "--text", "letter.txt", "--start")  # fmt: skip
    assert held.returncode == 2, "a list without subscribers cannot be mailed"
    assert "campaign 1 is there as a draft, but was not started" in held.stderr
    assert sluice("list", "delete", "Readers").returncode == 1
    assert sluice("campaign", "delete", "1").stdout == "campaign 1 deleted\n"
    assert sluice("list", "delete", "Readers").stdout == "list 1 deleted: Readers\n"
    assert sluice("server", "delete", "Nowhere").stdout == "delivery server 1 deleted: Nowhere\n"
    assert sluice("server", "delete", "Nowhere").returncode == 2


def test_what_has_no_number_is_shown_as_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    cli_base.facts([("fallback_server_id", None), ("port", 18025), ("count", 18025)])
    assert capsys.readouterr().out.splitlines() == ["fallback_server_id  ", "port                18025", "count               18,025"]


def test_values_are_shown_without_control_characters() -> None:
    assert cli_base.show("a\x1b[31mb\r\nc") == "a [31mb  c"
    assert cli_base.show(1234567) == "1,234,567"


def test_custom_headers_and_followed_links_from_the_command_line(sluice: Sluice, tmp_path: Path) -> None:
    made = answer(sluice("header", "add", "X-Campaign", "%Campaign:ID%", "--class", "marketing", "--json"))
    assert isinstance(made, dict)
    assert (made["name"], made["mail_classes"], made["delivery_server_id"]) == ("X-Campaign", ["marketing"], None)
    refused = sluice("header", "add", "Subject", "x")
    assert refused.returncode != 0
    assert "name" in refused.stderr
    (tmp_path / "list.csv").write_text("email\na@b.example\n")
    (tmp_path / "page.html").write_text('<body><a href="https://a.example/">a</a></body>')
    answer(sluice("server", "add", "relay", "--host", "127.0.0.1", "--json"))
    imported = sluice("import", "list.csv", "--list", "readers", "--create")
    assert imported.returncode == 0, imported.stderr
    campaign = answer(
        sluice("campaign", "create", "--name", "n", "--list", "readers", "--server", "relay", "--subject", "s",
               "--from-email", "n@s.example", "--html", "page.html", "--track-links", "--track-opens", "--utm-source", "news", "--start",
               "--json")
    )  # fmt: skip
    assert isinstance(campaign, dict)
    shown = answer(sluice("campaign", "tracking", str(campaign["id"]), "--json"))
    assert isinstance(shown, dict)
    assert [link["url"] for link in shown["links"]] == ["https://a.example/?utm_source=news"]
    assert sluice("header", "remove", str(made["id"])).returncode == 0
    assert answer(sluice("header", "list", "--json")) == []
