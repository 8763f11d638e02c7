"""Delivery servers through the API."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from config.keys import Keyring
from store import engines
from store.postgres import Pool
from tests.control.conftest import Client

SERVER = {"name": "relay", "host": "127.0.0.1", "port": 2525, "mfrom": "bounce.news.example"}


async def test_what_is_stored_is_what_engines_read(ada: Client, pool: Pool, keyring: Keyring) -> None:
    version = await engines.egress_version(pool)
    made = await ada.ok(
        "POST",
        "/delivery-servers",
        json={
            **SERVER,
            "username": "ada",
            "password": "pass wörd",
            "limits": {"max_connections": 3},
            "enforced_from": "News@BÜCHER.example",
        },
    )
    assert "password" not in made
    assert made["has_password"] is True
    config = await engines.egress_config(pool)
    server = config.servers[made["id"]]
    assert config.version > version
    assert (server.host, server.limits.max_connections, server.enforced_from) == ("127.0.0.1", 3, "News@bücher.example")
    assert b"pass" not in server.password_sealed
    assert keyring.open(server.password_sealed, b"delivery_servers:%d" % server.id).decode() == "pass wörd"


async def test_a_change_keeps_what_it_does_not_name(ada: Client, pool: Pool) -> None:
    made = await ada.ok("POST", "/delivery-servers", json={**SERVER, "limits": {"max_connections": 3, "bdat_window": 2}})
    before = await engines.egress_version(pool)
    changed = await ada.ok("PATCH", f"/delivery-servers/{made['id']}", json={"limits": {"max_connections": 0}, "port": 25})
    assert (changed["limits"]["max_connections"], changed["limits"]["bdat_window"]) == (0, 2)
    assert (changed["port"], changed["host"]) == (25, "127.0.0.1")
    assert await engines.egress_version(pool) == before + 1
    assert changed["version"] == made["version"] + 1


async def test_a_change_is_announced(ada: Client, redis: object) -> None:
    listening = redis.pubsub()  # type: ignore[attr-defined]
    await listening.subscribe("sluice:changes")
    await listening.get_message(timeout=1)
    await ada.ok("POST", "/delivery-servers", json=SERVER)
    message = await listening.get_message(timeout=2)
    assert message["data"] == b"egress"
    await listening.aclose()


BAD: list[tuple[str, object]] = [
    ("name", ""),
    ("name", "a\r\nb"),
    ("name", 7),
    ("host", "smtp://relay.example"),
    ("host", "relay.example:25"),
    ("host", "rel ay"),
    ("host", "256.1.1.1"),
    ("host", "a" * 300),
    ("port", 0),
    ("port", 65536),
    ("port", 1.5),
    ("port", "25"),
    ("enabled", 1),
    ("enabled", "true"),
    ("port", 2**70),
    ("security", "ssl"),
    ("connect_timeout_seconds", 0),
    ("connect_timeout_seconds", 1e9),
    ("username", "a\0b"),
    ("mfrom", "a@b@c.example"),
    ("mfrom", "nodot"),
    ("mfrom", "x.example\r\nRCPT TO:<y@z.example>"),
    ("enforced_from", "someone"),
    ("link_domain", "https://x.example"),
    ("link_domain", "x..example"),
    ("limits.max_connections", -1),
    ("limits.max_connections", 10**9),
    ("limits.max_messages_per_second", 1e12),
    ("limits.final_dot_timeout_seconds", 59),
    ("limits.bdat_window", 0),
    ("limits.bdat_window", 51),
    ("limits.retry_schedule_seconds", []),
    ("limits.retry_growth", 0.5),
    ("limits.retry_longest_seconds", 0),
    ("limits.on_uncertain", "perhaps"),
    ("limits.unknown", 1),
    ("unknown", 1),
]


async def test_a_bad_value_is_refused_by_name(ada: Client) -> None:
    for field, value in BAD:
        outer, _, inner = field.partition(".")
        body = {**SERVER, outer: {inner: value} if inner else value}
        answer = await ada.refused(422, "POST", "/delivery-servers", json=body)
        assert [error["field"] for error in answer["errors"]] == [field], value
    assert await ada.ok("GET", "/delivery-servers") == {"items": [], "next": None}


async def test_user_name_and_password_belong_together(ada: Client, pool: Pool) -> None:
    await ada.refused(422, "POST", "/delivery-servers", json={**SERVER, "username": "ada"})
    made = await ada.ok("POST", "/delivery-servers", json={**SERVER, "username": "ada", "password": "x"})
    path = f"/delivery-servers/{made['id']}"
    await ada.refused(422, "PATCH", path, json={"password": ""})
    assert (await ada.ok("PATCH", path, json={"username": "eva"}))["has_password"] is True
    assert (await ada.ok("PATCH", path, json={"username": ""}))["has_password"] is False
    await ada.refused(422, "PATCH", path, json={"username": "eva"})


async def test_a_fallback_is_another_server_of_the_same_user(ada: Client, eve: Client, pool: Pool) -> None:
    spare = await ada.ok("POST", "/delivery-servers", json={**SERVER, "name": "spare"})
    foreign = await eve.ok("POST", "/delivery-servers", json=SERVER)
    made = await ada.ok("POST", "/delivery-servers", json={**SERVER, "fallback_server_id": spare["id"]})
    assert made["fallback_server_id"] == spare["id"]
    assert (await engines.egress_config(pool)).servers[made["id"]].fallback_server_id == spare["id"]
    for wrong in (made["id"], foreign["id"], 4711, 2**80, 0, "spare"):
        refusal = await ada.refused(422, "PATCH", f"/delivery-servers/{made['id']}", json={"fallback_server_id": wrong})
        assert "fallback_server_id" in str(refusal)
    await ada.refused(422, "POST", "/delivery-servers", json={**SERVER, "name": "third", "fallback_server_id": foreign["id"]})
    kept = await ada.ok("PATCH", f"/delivery-servers/{made['id']}", json={"port": 26, "limits": {"fallback_after_seconds": 60}})
    assert (kept["fallback_server_id"], kept["limits"]["fallback_after_seconds"]) == (spare["id"], 60)
    cleared = await ada.ok("PATCH", f"/delivery-servers/{made['id']}", json={"fallback_server_id": None})
    assert cleared["fallback_server_id"] is None


async def test_a_fallback_that_is_deleted_is_none_any_more(ada: Client, pool: Pool) -> None:
    spare = await ada.ok("POST", "/delivery-servers", json={**SERVER, "name": "spare"})
    made = await ada.ok("POST", "/delivery-servers", json={**SERVER, "fallback_server_id": spare["id"]})
    await ada.ok("DELETE", f"/delivery-servers/{spare['id']}")
    assert (await engines.egress_config(pool)).servers[made["id"]].fallback_server_id is None


async def test_names_are_taken_once_per_user(ada: Client, eve: Client) -> None:
    made = await ada.ok("POST", "/delivery-servers", json=SERVER)
    await ada.refused(409, "POST", "/delivery-servers", json=SERVER)
    await eve.ok("POST", "/delivery-servers", json=SERVER)
    await ada.ok("DELETE", f"/delivery-servers/{made['id']}")
    await ada.refused(404, "GET", f"/delivery-servers/{made['id']}")
    await ada.ok("POST", "/delivery-servers", json=SERVER)


class Script:
    """An SMTP server that answers each line it reads with the next of its replies."""

    def __init__(self) -> None:
        self.replies: dict[str, str] = {}
        self.lines: list[str] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        writer.write(f"{self.replies.get('greeting', '220 hello')}\r\n".encode())
        data = False
        try:
            while line := (await reader.readline()).decode().rstrip("\r\n"):
                self.lines.append(line)
                if data:
                    if line != ".":
                        continue
                    data = False
                    verb = "dot"
                else:
                    verb = line.split()[0].upper()
                default = {"EHLO": "250-script\r\n250 8BITMIME", "DATA": "354 go on", "QUIT": "221 bye"}.get(verb, "250 ok")
                reply = self.replies.get(verb, default)
                data = verb == "DATA" and reply.startswith("354")
                if reply == "hang":
                    await asyncio.sleep(30)
                if reply == "drop":
                    break
                writer.write(f"{reply}\r\n".encode())
                while data:  # an empty line in the message is no end
                    line = (await reader.readline()).decode().rstrip("\r\n")
                    self.lines.append(line)
                    if line == ".":
                        data = False
                        writer.write(f"{self.replies.get('dot', '250 2.0.0 queued')}\r\n".encode())
        finally:
            writer.close()


@pytest.fixture
async def script() -> AsyncIterator[Script]:
    script = Script()
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    script.port = server.sockets[0].getsockname()[1]
    yield script
    server.close()


async def test_the_test_really_sends(ada: Client, script: Script) -> None:
    made = await ada.ok("POST", "/delivery-servers", json={**SERVER, "port": script.port})
    answer = await ada.ok("POST", f"/delivery-servers/{made['id']}/test", json={"to": "me@example.org"})
    assert (answer["email_delivery"], answer["stage"], answer["reply"]) == ("passed", "done", "250 2.0.0 queued")
    assert "MAIL FROM:<test@bounce.news.example>" in script.lines[1]
    assert "RCPT TO:<me@example.org>" in script.lines
    assert "Subject: Test message of Sluice" in script.lines


STAGES: list[tuple[dict[str, str], str, str]] = [
    ({"greeting": "554 go away"}, "greeting", "turned us away at the greeting: 554 go away"),
    ({"EHLO": "drop"}, "ehlo", "closed the connection at EHLO"),
    ({"MAIL": "550 5.7.1 who are you"}, "mail", "refused MAIL FROM test@bounce.news.example: 550 5.7.1 who are you"),
    ({"RCPT": "550 5.1.1 unknown"}, "rcpt", "refused RCPT TO me@example.org: 550 5.1.1 unknown"),
    ({"DATA": "451 later"}, "data", "refused the message: 451 later"),
    ({"dot": "554 5.7.1 spam"}, "data", "refused the message: 554 5.7.1 spam"),
]


async def test_the_test_says_at_which_stage_it_failed(ada: Client, script: Script) -> None:
    made = await ada.ok("POST", "/delivery-servers", json={**SERVER, "port": script.port})
    for replies, stage, words in STAGES:
        script.replies = replies
        answer = await ada.ok("POST", f"/delivery-servers/{made['id']}/test", json={"to": "me@example.org"})
        assert answer["email_delivery"] == "failed"
        assert (answer["stage"], answer["sentence"].endswith(words)) == (stage, True), answer


async def test_the_test_says_what_an_operator_can_do(ada: Client, script: Script) -> None:
    async def tried(**changes: object) -> tuple[str, str]:
        made = await ada.ok("POST", "/delivery-servers", json={**SERVER, "name": str(changes), "port": script.port, **changes})
        answer = await ada.ok("POST", f"/delivery-servers/{made['id']}/test", json={"to": "me@example.org"})
        assert answer["email_delivery"] == "failed"
        return answer["stage"], answer["sentence"]

    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert await tried(port=port) == ("connect", f"127.0.0.1:{port} refused the connection; check that an SMTP server listens there")
    stage, sentence = await tried(security="starttls")
    assert stage == "tls"
    assert "does not offer STARTTLS" in sentence
    stage, sentence = await tried(username="ada", password="x")
    assert stage == "auth"
    assert "does not offer authentication" in sentence
    stage, sentence = await tried(security="tls")
    assert stage == "tls"
    assert "does this port speak TLS from the start?" in sentence
    stage, sentence = await tried(host="no-such-host.invalid")
    assert (stage, "check the host name" in sentence) == ("resolve", True)
    script.replies = {"EHLO": "hang"}
    stage, sentence = await tried(limits={"command_timeout_seconds": 1})
    assert (stage, "did not answer EHLO within 1 seconds" in sentence) == ("ehlo", True)
