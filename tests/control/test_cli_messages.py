"""`sluice message`: sent, listed and shown from the command line, with the API's own refusals."""

import json
from pathlib import Path

from tests.control.test_cli import Sluice, answer, sluice

__all__ = ["sluice"]


def test_a_message_is_sent_and_shown(sluice: Sluice, tmp_path: Path) -> None:
    answer(sluice("server", "add", "relay", "--host", "127.0.0.1", "--port", "2526", "--security", "none", "--json"))
    (tmp_path / "t.txt").write_text("Hello {{ subscriber.name }}")
    usual = ("message", "send", "--server", "relay", "--subject", "Hi", "--text", "t.txt", "--from-email", "a@shop.example")
    made = answer(sluice(*usual, "--to", "ann@a.example", "--to", "ben@b.example", "--data", "name=Ann", "--header", "X-A=1", "--json"))
    assert isinstance(made, dict)
    assert made["outcomes"] == {"queued": 2}
    rows = "".join(json.dumps({"email": f"p{n}@a.example"}) + "\n" for n in range(3))
    assert "taken for 3 recipients" in sluice(*usual, "--recipients", "-", input=rows).stdout
    shown = answer(sluice("message", "show", str(made["id"]), "--json"))
    assert isinstance(shown, dict)
    assert [each["email"] for each in shown["recipients"]] == ["ann@a.example", "ben@b.example"]
    listed = answer(sluice("message", "list", "--json"))
    assert isinstance(listed, list)
    assert len(listed) == 2
    wrong = sluice(*usual, "--recipients", "-", input=rows + '{"email": "x"}\n')
    assert wrong.returncode == 2
    assert "recipients[3].email" in wrong.stderr
    (tmp_path / "order.pdf").write_bytes(b"%PDF-1.7")
    files = ("--attach", "order.pdf", "--attach", "t.txt")
    assert sluice(*usual, "--to", "ann@a.example", *files, "--preheader", "Your order").returncode == 0
    assert sluice(*usual).returncode == 2
    assert sluice("message", "show", "99").returncode == 2


def test_preflight_says_what_is_wrong_and_ends_with_1(sluice: Sluice, tmp_path: Path) -> None:
    answer(sluice("server", "add", "relay", "--host", "127.0.0.1", "--port", "2526", "--security", "none", "--json"))
    (tmp_path / "p.csv").write_text("email,city\nann@a.example,Rome\n")
    (tmp_path / "t.txt").write_text("Hello {{ subscriber.city }}")
    assert sluice("import", "p.csv", "--list", "L", "--create").returncode == 0
    usual = ("campaign", "create", "--list", "L", "--server", "relay", "--subject", "x", "--text", "t.txt", "--json")
    made = answer(sluice(*usual, "--name", "a", "--from-email", "me@gmail.com"))
    assert isinstance(made, dict)
    done = sluice("preflight", str(made["id"]), "--no-dns")
    assert done.returncode == 1
    assert "nobody but gmail.com may send" in done.stdout
    assert "Microsoft: 550 5.7.515" in done.stdout
    held = sluice("campaign", "start", str(made["id"]))
    assert held.returncode == 2
    assert "start with force" in held.stderr
    assert sluice("campaign", "start", str(made["id"]), "--force").returncode == 0
    good = answer(sluice(*usual, "--name", "b", "--from-email", "me@shop.example"))
    assert isinstance(good, dict)
    found = answer(sluice("preflight", str(good["id"]), "--no-dns", "--json"))
    assert isinstance(found, dict)
    assert found["ready"]
