"""DKIM keys through the API and the command: the record is shown, the private half never."""

import base64
import json
import logging
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from compose import dkim_keys
from config.keys import Keyring
from domain.dkim import seal_context
from store import dkim as stored
from store.postgres import Pool
from tests.compose.test_dkim_keys import RSA_512, pem, rsa_key
from tests.control.conftest import Client
from tests.control.test_cli import Sluice, answer, sluice

__all__ = ["sluice"]

ED25519 = {"domain": "garden.example", "algorithm": "ed25519-sha256"}  # quick to make


async def private_half(pool: Pool, keyring: Keyring, key_id: int) -> bytes:
    sealed: bytes = await pool.fetchval("select private_key_sealed from dkim_keys where id = $1", key_id)
    return keyring.open(sealed, seal_context(key_id))


async def test_a_new_key_shows_its_record_and_engines_are_told(ada: Client, pool: Pool, keyring: Keyring, redis: Any) -> None:
    listening = redis.pubsub()
    await listening.subscribe("sluice:changes")
    await listening.get_message(timeout=1)
    made = await ada.ok("POST", "/dkim-keys", json={"domain": "GÄRTEN.example", "selector": "S1"})
    assert (await listening.get_message(timeout=2))["data"] == b"dkim"
    await listening.aclose()
    assert (made["domain"], made["selector"], made["algorithm"], made["bits"]) == ("xn--grten-gra.example", "s1", "rsa-sha256", 2048)
    assert (made["state"], made["warnings"], made["retired_at"]) == ("active", [], None)
    assert made["record_name"] == "s1._domainkey.xn--grten-gra.example"
    public = base64.b64decode(made["record"].removeprefix("v=DKIM1; k=rsa; p="))
    private = dkim_keys.parse(await private_half(pool, keyring, made["id"]))
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    assert private.public_key().public_bytes(serialization.Encoding.DER, spki) == public
    assert await ada.ok("GET", f"/dkim-keys/{made['id']}") == made


async def test_a_selector_is_made_up_and_rotation_has_an_overlap(ada: Client) -> None:
    first, second = [await ada.ok("POST", "/dkim-keys", json=ED25519) for _ in range(2)]
    assert first["selector"].startswith("ed20")
    assert second["selector"] == first["selector"] + "-2"
    assert (first["state"], second["state"]) == ("active", "waiting")
    assert "RSA" in first["warnings"][0]
    assert (await ada.ok("POST", f"/dkim-keys/{second['id']}/activate"))["state"] == "active"
    page = await ada.ok("GET", "/dkim-keys?domain=Garden.example")
    assert [(key["id"], key["state"]) for key in page["items"]] == [(first["id"], "retiring"), (second["id"], "active")]
    await ada.refused(409, "DELETE", f"/dkim-keys/{second['id']}")
    assert (await ada.ok("POST", f"/dkim-keys/{second['id']}/retire"))["state"] == "retiring"
    await ada.ok("DELETE", f"/dkim-keys/{second['id']}")
    await ada.refused(404, "GET", f"/dkim-keys/{second['id']}")
    taken = await ada.refused(409, "POST", "/dkim-keys", json={**ED25519, "selector": first["selector"]})
    assert "selector" in taken["detail"]


async def test_an_imported_key_tells_its_own_kind_and_size(ada: Client, pool: Pool, keyring: Keyring) -> None:
    made = await ada.ok("POST", "/dkim-keys", json={**ED25519, "selector": "old", "private_key": pem(rsa_key(1024), traditional=True)})
    assert (made["algorithm"], made["bits"]) == ("rsa-sha256", 1024)
    assert "2048" in made["warnings"][0]
    private = dkim_keys.parse(await private_half(pool, keyring, made["id"]))
    assert private.public_key() == rsa_key(1024).public_key()


GOOD = pem(rsa_key(2048))

BAD: list[tuple[str, dict[str, Any]]] = [
    ("domain", {"domain": "nodot"}),
    ("domain", {"domain": "a b.example"}),
    ("domain", {}),
    ("selector", {"domain": "garden.example", "selector": "a_b"}),
    ("selector", {"domain": "garden.example", "selector": "a\r\nb"}),
    ("algorithm", {"domain": "garden.example", "algorithm": "rsa-sha1"}),
    ("bits", {"domain": "garden.example", "bits": 512}),
    ("private_key", {"domain": "garden.example", "private_key": "\n"}),
    ("private_key", {"domain": "garden.example", "private_key": RSA_512}),
    ("private_key", {"domain": "garden.example", "private_key": GOOD[:900]}),
    ("private_key", {"domain": "garden.example", "private_key": GOOD[:900] + "\n-----END PRIVATE KEY-----\n"}),
    ("private_key", {"domain": "garden.example", "private_key": pem(rsa_key(2048), password=b"secret")}),
    ("private_key", {"domain": "garden.example", "private_key": "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----"}),
    ("key", {"domain": "garden.example", "key": GOOD}),
]


@pytest.mark.parametrize(("field", "body"), BAD, ids=range(len(BAD)))
async def test_what_is_refused_names_its_field_and_leaves_nothing(ada: Client, pool: Pool, field: str, body: dict[str, Any]) -> None:
    problem = await ada.refused(422, "POST", "/dkim-keys", json=body)
    assert problem["errors"][0]["field"] == field
    assert GOOD.splitlines()[3] not in json.dumps(problem)
    assert await pool.fetchval("select count(*) from dkim_keys") == 0


async def test_nothing_secret_is_stored_shown_or_logged(
    ada: Client, pool: Pool, keyring: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    made = await ada.ok("POST", "/dkim-keys", json={"domain": "garden.example", "private_key": GOOD}, headers={"idempotency-key": "one"})
    again = await ada.ok("POST", "/dkim-keys", json={"domain": "garden.example", "private_key": GOOD}, headers={"idempotency-key": "one"})
    assert again == made
    secret = await private_half(pool, keyring, made["id"])
    public_part = 330  # of PKCS #8 for RSA-2048 the modulus comes first, which the record shows too
    parts = [secret[at : at + 24] for at in range(public_part, len(secret) - 24, 24)]
    seen = json.dumps([made, await ada.ok("GET", "/dkim-keys")]) + caplog.text
    assert "PRIVATE" not in seen
    assert not any(line in seen for line in GOOD.splitlines()[14:-1])
    dump = b""
    for table in await pool.fetch("select tablename from pg_tables where schemaname = 'public'"):
        for row in await pool.fetch(f"select t::text from {table[0]} t"):
            dump += row[0].encode()
    assert len(parts) > 20
    for part in parts:
        assert part.hex().encode() not in dump
        assert base64.b64encode(part) not in dump
    # For another row it cannot be opened (S11)
    sealed = await pool.fetchval("select private_key_sealed from dkim_keys where id = $1", made["id"])
    with pytest.raises(Exception, match="cannot be opened"):
        keyring.open(sealed, seal_context(made["id"] + 1))


async def test_the_keys_of_others_do_not_exist(ada: Client, eve: Client, pool: Pool) -> None:
    made = await ada.ok("POST", "/dkim-keys", json=ED25519)
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/activate"), ("POST", "/retire")):
        await eve.refused(404, method, f"/dkim-keys/{made['id']}{path}")
    assert (await eve.ok("GET", "/dkim-keys"))["items"] == []
    assert (await eve.ok("POST", "/dkim-keys", json=ED25519))["state"] == "active"
    assert len(await stored.active(pool, [ada.user_id], ["garden.example"])) == 1


def test_the_command_prints_the_record_and_rotates(sluice: Sluice, tmp_path: Any) -> None:
    done = sluice("dkim", "new", "Garden.example", "--selector", "s1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('s1._domainkey.garden.example. IN TXT ("v=DKIM1; k=rsa; p=')
    assert len(done.stdout.splitlines()) == 1
    assert "from now on" in done.stderr
    (tmp_path / "own.pem").write_text(GOOD)
    waiting = sluice("dkim", "new", "garden.example", "--selector", "s2", "--import", "own.pem")
    assert "sluice dkim activate garden.example s2" in waiting.stderr
    assert "PRIVATE" not in waiting.stdout + waiting.stderr
    active = answer(sluice("dkim", "activate", "garden.example", "s2", "--json"))
    assert isinstance(active, dict)
    assert active["state"] == "active"
    listed = answer(sluice("dkim", "list", "--domain", "garden.example", "--json"))
    assert isinstance(listed, list)
    assert [(key["selector"], key["state"]) for key in listed] == [("s1", "retiring"), ("s2", "active")]
    assert "s2" in sluice("dkim", "list").stdout
    missing = sluice("dkim", "show", "garden.example", "s9")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "s9._domainkey.garden.example" in missing.stderr
    (tmp_path / "empty.pem").write_text("")
    refused = sluice("dkim", "new", "garden.example", "--import", "empty.pem")
    assert refused.returncode != 0
    assert "no PEM text" in refused.stderr
    shown = sluice("dkim", "retire", "garden.example", "s2")
    assert shown.returncode == 0, shown.stderr
    assert "retiring" in shown.stdout
