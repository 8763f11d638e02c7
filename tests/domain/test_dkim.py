"""domain.dkim: whose keys sign, and the record that receivers read."""

import datetime as dt
import re
from typing import Any

import pytest

from domain import dkim
from domain.dkim import DkimKey
from domain.errors import Invalid

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def key(number: int = 1, **changes: Any) -> DkimKey:
    fields: dict[str, Any] = {
        "id": number, "user_id": 1, "domain": "garden.example", "selector": f"s{number}", "algorithm": "rsa-sha256", "bits": 2048,
        "public_key": b"p" * 294, "private_key_sealed": b"", "state": "active", "created_at": NOW, "activated_at": NOW, "retired_at": None,
    }  # fmt: skip
    return DkimKey(**{**fields, **changes})


def test_the_record_of_an_rsa_key_is_cut_into_strings_that_fit():
    made = key()
    assert made.record_name == "s1._domainkey.garden.example"
    assert made.record.startswith("v=DKIM1; k=rsa; p=cHBw")
    strings = re.findall(r'"([^"]*)"', made.zone_line)
    assert "".join(strings) == made.record
    assert len(strings) == 2
    assert max(map(len, strings)) == 255
    assert made.zone_line.startswith('s1._domainkey.garden.example. IN TXT ("v=DKIM1')


def test_the_record_of_an_ed25519_key_is_one_string():
    made = key(algorithm="ed25519-sha256", public_key=bytes(32))
    assert made.record == "v=DKIM1; k=ed25519; p=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
    assert made.zone_line.endswith(f'IN TXT "{made.record}"')


def test_the_from_domain_comes_before_those_above_it_and_those_before_the_return_path():
    assert dkim.signing_domains("news.Garden.example", "b.mail.example") == [
        "news.garden.example", "garden.example", "b.mail.example", "mail.example"
    ]  # fmt: skip
    assert dkim.signing_domains("example", "") == []


def test_the_active_keys_of_the_best_domain_sign_rsa_first():
    keys = [
        key(1, algorithm="ed25519-sha256"), key(2), key(3, state="retiring"), key(4, domain="news.garden.example", state="waiting"),
        key(5, domain="mail.example"),
    ]  # fmt: skip
    domains = ["news.garden.example", "garden.example", "mail.example"]
    assert [each.id for each in dkim.choose(keys, domains)] == [2, 1]
    assert [each.id for each in dkim.choose(keys, ["mail.example"])] == [5]
    assert dkim.choose(keys, ["other.example"]) == []


def test_selectors_are_host_names():
    assert dkim.check_selector("S1.Mail", "garden.example") == "s1.mail"
    for bad in ("", ".", "a..b", "-a", "a_b", "a b", "a;b", "ä", "x" * 64, "a\r\n"):
        with pytest.raises(Invalid, match="selector"):
            dkim.check_selector(bad, "garden.example")
    with pytest.raises(Invalid, match="longer"):
        dkim.check_selector(".".join(["s" * 60] * 4), "garden.example")


def test_a_key_is_sealed_for_its_row():
    assert dkim.seal_context(1) != dkim.seal_context(2)
