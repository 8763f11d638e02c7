"""Rows 18, 19, 32 and 33: trouble before the first recipient is named. It belongs to the path; no recipient notices."""

import asyncio
import ssl
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from bench.chaos import world
from config import keys, load
from store.postgres import Pool
from tests.engine.test_connect import make_certificate
from tests.faults.peers import Fault, Verdict, add_campaign, end_of, sentences, taken, verdict
from tests.machine import Machine, campaign_state, until
from tests.peers import DROP, HANG, HONEST, RESET, Peer, Script, Step
from tests.store import seed

RECIPIENTS = 12


def twice(*steps: Step) -> list[Step]:
    """Bad on the first connections, then honest."""
    return [*steps, *steps]


PASSING: dict[str, Script] = {
    "reset at accept": {"banner": twice(RESET)},
    "dropped at accept": {"banner": twice(DROP)},
    "no banner": {"banner": twice(HANG)},
    "421 banner": {"banner": twice("421 4.3.2 too busy")},
    "554 banner": {"banner": twice("554 5.7.1 not you")},
    "no SMTP banner": {"banner": twice("hello there")},
    "banner flood": {"banner": twice(b"220-x\r\n" * 150_000)},
    "two banners": {"banner": twice("220 one\r\n220 two")},
    "EHLO dropped": {"ehlo": twice(DROP)},
    "EHLO unanswered": {"ehlo": twice(HANG)},
    "EHLO answered 421": {"ehlo": twice("421 4.3.2 bye")},
    "EHLO flood": {"ehlo": twice(b"250-x\r\n" * 150_000)},
    "EHLO answered twice": {"ehlo": twice((HONEST, "250 once more"))},
    "EHLO with nonsense": {"ehlo": twice("250-peer\r\n250-SIZE abc\r\n250-SIZE -1\r\n250-AUTH\r\n250 pipelining")},
    "MAIL dropped": {"mail": twice(DROP)},
    "MAIL reset": {"mail": twice(RESET)},
    "MAIL unanswered": {"mail": twice(HANG)},
    "MAIL answered 421": {"mail": twice("421 4.3.2 closing")},
    "MAIL answered with garbage": {"mail": twice(b"\x00\x01\x02\r\n")},
    "MAIL answered 503": {"mail": twice("503 5.5.1 what")},
}
WITH_TLS: dict[str, Script] = {
    "STARTTLS answered 454": {"starttls": twice("454 4.7.0 not now")},
    "STARTTLS unanswered": {"starttls": twice(HANG)},
    "STARTTLS dropped": {"starttls": twice(DROP)},
    "STARTTLS then garbage": {"starttls": twice(("220 go", "this is no TLS"))},
    "STARTTLS with injected replies": {"starttls": twice(b"220 go\r\n250-peer\r\n250 AUTH PLAIN\r\n")},
    "AUTH answered 454": {"auth": twice("454 4.7.0 later")},
    "AUTH dropped": {"auth": twice(DROP)},
}
LASTING: dict[str, tuple[Script, tuple[str, ...], str]] = {  # script, what is offered, words of the sentence
    "wrong password": ({"auth": "535 5.7.8 no"}, ("STARTTLS", "AUTH PLAIN"), "refused the user name or password"),
    "no AUTH": ({}, ("STARTTLS",), "does not offer authentication"),
    "no STARTTLS": ({}, ("AUTH PLAIN",), "does not offer STARTTLS"),
    "STARTTLS refused": ({"starttls": "502 5.5.1 no"}, ("STARTTLS", "AUTH PLAIN"), "refused STARTTLS"),
    "MAIL demands more": ({"mail": "530 5.7.0 Authentication required"}, ("STARTTLS", "AUTH PLAIN"), "530"),
}


async def begin(machine: Machine, pool: Pool, name: str, peer: Peer, *, secure: bool) -> int:
    """A campaign through `peer`; `secure`: STARTTLS and AUTH."""
    fault = Fault(name.replace(" ", "-").lower(), picked=0, recipients=RECIPIENTS)
    campaign = await add_campaign(pool, fault, "data", peer.port, state="draft")
    if secure:
        keyring = keys.load_keyring(load.load(None, machine.environment))
        server = await pool.fetchval("select delivery_server_id from campaigns where id = $1", campaign)
        sealed = keyring.seal(b"secret", b"delivery_servers:%d" % server)
        await pool.execute(
            "update delivery_servers set security = 'starttls', username = 'user', password_sealed = $2, version = version + 1 "
            "where id = $1", server, sealed,
        )  # fmt: skip
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)
    await pool.execute("update egress_version set version = version + 1")
    return campaign


def nobody_noticed(found: Verdict, name: str) -> None:
    found.must_hold()
    assert set(found.kinds.values()) == {"d"}, (name, found.kinds)
    assert set(found.copies.values()) == {1}, name


@pytest.fixture
def certificate(tmp_path: Path) -> ssl.SSLContext:
    return make_certificate(tmp_path, "localhost")


async def test_whatever_happens_before_the_first_recipient_costs_no_recipient_anything(
    machine: Machine, pool: Pool, certificate: ssl.SSLContext
) -> None:
    async with AsyncExitStack() as stack:
        peers = {name: await stack.enter_async_context(Peer(script=script)) for name, script in PASSING.items()}
        for name, script in WITH_TLS.items():
            offers = ("PIPELINING", "STARTTLS", "AUTH PLAIN LOGIN")
            peers[name] = await stack.enter_async_context(Peer(offers, script=script, context=certificate))
        engine = await machine.engine()
        campaigns = {name: await begin(machine, pool, name, peer, secure=name in WITH_TLS) for name, peer in peers.items()}
        await end_of(pool, list(campaigns.values()), 120.0)
        words = await sentences(pool, machine.environment["SLUICE_REDIS_URL"])
        for name, peer in peers.items():
            found = await verdict(pool, campaigns[name], taken(peer), words[f"{name.replace(' ', '-').lower()} data"])
            nobody_noticed(found, name)
            assert peer.violations == [], name
            if name in WITH_TLS:
                in_clear = peer.commands[: peer.commands.index("STARTTLS") + 1]
                assert not [line for line in in_clear if line.startswith(("AUTH", "MAIL"))], name
        attempts = await pool.fetchval("select max(attempt) from accounting")
        assert attempts == 1, "an attempt was used up"
        # Floods of 1 MB each in greeting and EHLO: read and thrown away, not kept
        status = Path(f"/proc/{engine.pid}/status").read_text()
        assert int(status.split("VmHWM:")[1].split()[0]) < 400 * 1024


async def test_what_only_an_operator_can_mend_is_said_and_tried_once_and_recipients_wait(
    machine: Machine, pool: Pool, certificate: ssl.SSLContext
) -> None:
    async with AsyncExitStack() as stack:
        peers = {
            name: await stack.enter_async_context(Peer(("PIPELINING", *offers), script=script, context=certificate))
            for name, (script, offers, _) in LASTING.items()
        }
        await machine.engine()
        campaigns = {name: await begin(machine, pool, name, peer, secure=True) for name, peer in peers.items()}

        async def all_suspended() -> bool:
            words = await sentences(pool, machine.environment["SLUICE_REDIS_URL"])
            return all(state == "suspended" for state, _ in words.values()) and len(words) == len(LASTING)

        await until(all_suspended, "all servers suspended", 20.0, machine)
        await asyncio.sleep(3.0)  # time for a lock-out loop to show
        words = await sentences(pool, machine.environment["SLUICE_REDIS_URL"])
        for name, peer in peers.items():
            state, sentence = words[f"{name.replace(' ', '-').lower()} data"]
            assert state == "suspended", name
            assert LASTING[name][2] in sentence
            assert "secret" not in sentence
            assert peer.accepted == [], name
            assert sum(line.startswith("AUTH") for line in peer.commands) <= 1, name
            assert len(peer.chunks) == 1, f"{name}: {len(peer.chunks)} connections"
        assert await pool.fetchval("select count(*) from accounting") == 0
        # The operator mends one of them: its recipients get their mail at once
        peers["wrong password"].script = {}
        await pool.execute("update delivery_servers set version = version + 1 where name like 'wrong-password%'")
        await pool.execute("update egress_version set version = version + 1")
        await end_of(pool, [campaigns["wrong password"]], 90.0)
        nobody_noticed(await verdict(pool, campaigns["wrong password"], taken(peers["wrong password"])), "wrong password")


async def test_a_server_that_ends_every_connection_is_neither_hammered_nor_costs_anybody_an_attempt(machine: Machine, pool: Pool) -> None:
    async with AsyncExitStack() as stack:
        peers = {
            stage: await stack.enter_async_context(Peer(script={stage: "421 4.7.0 Try later"})) for stage in ("banner", "mail", "rcpt")
        }
        await machine.engine()
        began = time.monotonic()
        campaigns = {stage: await begin(machine, pool, f"sick-{stage}", peer, secure=False) for stage, peer in peers.items()}

        async def said() -> bool:
            words = await sentences(pool, machine.environment["SLUICE_REDIS_URL"])
            return len(words) == 3 and all(state == "failing" and "421 4.7.0 Try later" in sentence for state, sentence in words.values())

        await until(said, "failing", 10.0, machine)
        await asyncio.sleep(4.0)
        assert await pool.fetchval("select count(*) from accounting") == 0
        seconds = time.monotonic() - began
        for peer in peers.values():
            assert 2 <= len(peer.chunks) <= 3 + seconds, f"connections in {seconds:.1f} seconds"
            peer.script = {}
        await end_of(pool, list(campaigns.values()), 90.0)
        for stage, peer in peers.items():
            nobody_noticed(await verdict(pool, campaigns[stage], taken(peer)), stage)
        assert await pool.fetchval("select max(attempt) from accounting") == 1


async def test_servers_whose_names_nobody_answers_for_hold_up_nobody_else(machine: Machine, pool: Pool) -> None:
    if lacking := world.why_not("named"):
        pytest.skip(lacking)
    names = world.NameServer(machine.directory / "resolv.conf")
    await names.start()
    names.mode = "silent"
    try:
        async with Peer() as peer:
            for number in range(20):  # two seconds each; one after the other they would take twenty
                await seed.campaign(pool, recipients=5, host=f"mx{number}.{world.ZONE}", port=25)
            machine.within = names.command
            await machine.engine()

            async def asked() -> bool:
                return names.asked > 0

            await until(asked, "names are looked up", 20.0, machine)
            campaign = await seed.campaign(pool, recipients=20, port=peer.port)

            async def completed() -> bool:
                return await campaign_state(pool, campaign) == "completed"

            await until(completed, "the campaign whose server has an address is sent", 10.0, machine)
    finally:
        await names.stop()
