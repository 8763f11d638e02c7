"""inbound.session and inbound.listener: STARTTLS (bad input 16), the PROXY protocol, LMTP, and certificates that are renewed."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from domain.errors import ConfigurationError
from inbound.listener import Certificate
from store.postgres import Pool
from tests.engine.test_connect import make_certificate
from tests.inbound.conftest import World
from tests.inbound.peer import BODY, QUICK, Client, Server, serving, stored


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    make_certificate(tmp_path, "mx.mailer.example")
    return tmp_path / "mx.mailer.example.pem"


@pytest.fixture
async def server(pool: Pool, world: World, pem: Path) -> AsyncIterator[Server]:
    quick = QUICK._replace(handshake=0.5)
    async with serving(pool, world, patience=quick, tls=Certificate(str(pem), "").context) as made:
        yield made


def trusting(pem: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(pem))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


async def secured(client: Client, pem: Path) -> None:
    """STARTTLS, and the handshake."""
    assert (await client.say("STARTTLS")).startswith("220 2.0.0")
    async with asyncio.timeout(60):
        await client.writer.start_tls(trusting(pem), server_hostname="mx.mailer.example")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_mail_comes_in_under_starttls(server: Server, pool: Pool, world: World, pem: Path, version: ssl.TLSVersion) -> None:
    client = await server.connect()
    await client.reply()
    assert "STARTTLS" in await client.say("EHLO mx.example")
    assert (await client.say("STARTTLS")).startswith("220")
    context = trusting(pem)
    context.minimum_version = context.maximum_version = version
    async with asyncio.timeout(60):
        await client.writer.start_tls(context, server_hostname="mx.mailer.example")
    assert (await client.say("MAIL FROM:<>")).startswith("503")  # what was said before does not count
    assert "STARTTLS" not in await client.say("EHLO mx.example")
    big = BODY + b"a line of some length, many times over\r\n" * 4000
    assert (await client.deliver(world.return_path(), big)).startswith("250")
    assert (await client.deliver(world.return_path())).startswith("250")
    assert [row["raw"] for row in await stored(pool)] == [big, BODY]
    assert (await client.say("QUIT")).startswith("221")
    assert await client.reply() == ""
    async with asyncio.timeout(60):
        while server.listener.limits.sessions:
            await asyncio.sleep(0.02)


async def test_the_greeting_of_a_fast_client_behind_its_handshake_is_not_lost(server: Server, pem: Path) -> None:
    for _ in range(10):
        client = await server.greeted()
        assert (await client.say("STARTTLS")).startswith("220")
        async with asyncio.timeout(60):
            await client.writer.start_tls(trusting(pem), server_hostname="mx.mailer.example")
        client.send(b"EHLO mx.example\r\n")  # with a TLS 1.3 client it may travel together with Finished
        assert (await client.reply()).startswith("250-")
        await client.say("QUIT")


BEHIND = [b"MAIL FROM:<a@x.example>\r\n", b"EHLO x\r\n", b"x", b"\r\n", b"\x16\x03\x01"]


async def test_bad_input_16_what_stands_behind_starttls_is_not_executed(server: Server) -> None:
    for behind in BEHIND:
        client = await server.greeted()
        client.send(b"STARTTLS\r\n" + behind)
        replies = [reply[:3] for reply in await client.rest()]
        assert replies in (["554"], ["220"])  # 220 only where it came in a segment of its own; then the handshake fails


async def test_bad_input_16_a_second_starttls_is_refused(server: Server, pool: Pool, world: World, pem: Path) -> None:
    client = await server.greeted()
    await secured(client, pem)
    assert (await client.say("STARTTLS")).startswith("503")
    assert (await client.say("EHLO mx.example")).startswith("250-")
    assert (await client.say("STARTTLS")).startswith("503 5.5.1")
    assert (await client.deliver(world.return_path())).startswith("250")
    assert len(await stored(pool)) == 1


JUNK = [b"", b"EHLO x\r\n", b"\x16\x03\x01\x00\x05hello", b"\0" * 4096, b"\x80\x2e\x01\x00\x02", b"GET / HTTP/1.1\r\n\r\n"]


async def test_bad_input_16_silence_and_garbage_for_the_handshake_end_the_connection(server: Server) -> None:
    for junk in JUNK:
        client = await server.greeted()
        assert (await client.say("STARTTLS")).startswith("220")
        client.send(junk)
        async with asyncio.timeout(60):
            try:
                assert b"250" not in await client.reader.read()
            except ConnectionResetError:
                pass
            while server.listener.limits.sessions:
                await asyncio.sleep(0.02)


async def test_bad_input_16_a_client_that_vanishes_in_the_handshake_leaves_nothing(server: Server) -> None:
    for cut in (b"", b"\x16\x03\x01\x02\x00\x01"):
        client = await server.greeted()
        assert (await client.say("STARTTLS")).startswith("220")
        client.send(cut)
        await client.writer.drain()
        client.writer.transport.abort()
    async with asyncio.timeout(60):
        while server.listener.limits.sessions:
            await asyncio.sleep(0.02)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_old_versions_of_tls_are_refused(server: Server, pem: Path) -> None:
    client = await server.greeted()
    assert (await client.say("STARTTLS")).startswith("220")
    context = trusting(pem)
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        async with asyncio.timeout(60):
            await client.writer.start_tls(context, server_hostname="mx.mailer.example")


async def test_limits_hold_under_tls_and_a_peer_that_goes_on_sending_is_dropped(server: Server, pem: Path) -> None:
    client = await server.greeted()
    await secured(client, pem)
    assert (await client.say("EHLO x")).startswith("250-")
    client.send(b"XYZZY\r\n" * 40)
    replies = await client.rest()
    assert len(replies) <= 21
    async with asyncio.timeout(60):
        while server.listener.limits.sessions:  # its socket is gone although it never said goodbye
            try:
                client.send(b"NOOP\r\n")
            except (OSError, RuntimeError):
                pass
            await asyncio.sleep(0.05)


async def test_sockets_are_given_back(server: Server, pem: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(20):
        client = await server.greeted()
        if number % 2:
            await secured(client, pem)
        client.writer.transport.abort()
    async with asyncio.timeout(60):
        while server.listener.limits.sessions or len(list(Path("/proc/self/fd").iterdir())) > before + 2:
            await asyncio.sleep(0.05)


async def test_a_renewed_certificate_is_used_and_one_that_does_not_fit_is_not(pool: Pool, world: World, tmp_path: Path) -> None:
    make_certificate(tmp_path, "mx.mailer.example")
    make_certificate(tmp_path, "new.mailer.example")
    files = [tmp_path / "mx.mailer.example.pem", tmp_path / "new.mailer.example.pem"]
    used = tmp_path / "used.pem"
    used.write_bytes(files[0].read_bytes())
    certificate = Certificate(str(used), "")
    async with serving(pool, world, tls=certificate.context) as server:
        await secured(await server.greeted(), files[0])
        used.write_bytes(b"half a file")
        os.utime(used, (1, 1))
        with pytest.raises(ssl.SSLError):
            certificate.refresh()
        certificate.refresh()  # not looked at twice
        await secured(await server.greeted(), files[0])
        used.write_bytes(files[1].read_bytes())
        os.utime(used, (2, 2))
        certificate.refresh()
        client = await server.greeted()
        assert (await client.say("STARTTLS")).startswith("220")
        async with asyncio.timeout(60):
            await client.writer.start_tls(trusting(files[1]), server_hostname="new.mailer.example")


def test_files_that_are_no_certificate_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("nothing")
    for name in ("x.pem", "missing.pem"):
        with pytest.raises(ConfigurationError, match="inbound.tls_certificate_file: cannot use"):
            Certificate(str(tmp_path / name), "")


# --- PROXY protocol --------------------------------------------------------------------------------------------------------

V2 = b"\r\n\r\n\0\r\nQUIT\n"
V2_INET = V2 + b"\x21\x11\x00\x0c" + bytes([203, 0, 113, 7, 127, 0, 0, 1]) + b"\x30\x39\x00\x19"
HEADERS = [
    (b"PROXY TCP4 203.0.113.7 127.0.0.1 12345 25\r\n", "203.0.113.7"),
    (b"PROXY TCP6 2001:db8::7 ::1 12345 25\r\n", "2001:db8::7"),
    (b"PROXY UNKNOWN\r\n", "127.0.0.1"),
    (V2_INET, "203.0.113.7"),
    (V2 + b"\x21\x21\x00\x24" + bytes.fromhex("20010db8000000000000000000000007") + bytes(16) + b"\x30\x39\x00\x19", "2001:db8::7"),
    (V2 + b"\x21\x11\x00\x0f" + V2_INET[16:] + b"\x04\x00\x00", "203.0.113.7"),  # with an attribute behind it
    (V2 + b"\x20\x00\x00\x00", "127.0.0.1"),  # LOCAL: the proxy looks whether we live
]


@pytest.mark.parametrize(("header", "peer"), HEADERS)
async def test_the_peer_is_who_the_proxy_says(pool: Pool, world: World, header: bytes, peer: str) -> None:
    async with serving(pool, world, proxies=(ip_network("127.0.0.0/8"),)) as server:
        client = await server.connect()
        client.send(header)
        assert (await client.reply()).startswith("220")
        await client.say("EHLO mx.example")
        assert (await client.deliver(world.return_path())).startswith("250")
        assert str((await stored(pool))[0]["peer"]) == peer


NO_HEADERS = [b"EHLO x\r\n", b"PROXY\r\n", b"PROXY TCP4 203.0.113.7\r\n", b"PROXY TCP4 203.0.113.777 127.0.0.1 1 25\r\n",
     b"PROXY TCP4 ::1 ::1 1 25\r\n", b"PROXY TCP4 1.1.1.1 2.2.2.2 99999 25\r\n", b"PROXY TCP4 1.1.1.1 2.2.2.2 1 25 x\r\n",
     b"PROXY TCP4 1.1.1.1 2.2.2.2 1 25\n", b"PROXY " + b"x" * 8000, b"PROXY TCP4 " + b"1" * 200 + b"\r\n", V2[:8], V2 + b"\x31\x11\0\0",
     V2 + b"\x21\x11\x00\x04abcd", V2 + b"\x2f\x11\x00\x0c" + bytes(12), b""]  # fmt: skip


async def test_a_proxy_that_does_not_say_who_it_is_for_gets_nothing(pool: Pool, world: World) -> None:
    for header in NO_HEADERS:
        async with serving(pool, world, proxies=(ip_network("127.0.0.1"),), patience=QUICK._replace(proxy=0.4)) as server:
            client = await server.connect()
            client.send(header)
            assert [reply[:3] for reply in await client.rest()] in (["421"], [])


async def test_peers_behind_a_proxy_are_counted_by_their_own_addresses(pool: Pool, world: World) -> None:
    async with serving(pool, world, connections=60, proxies=(ip_network("127.0.0.1"),)) as server:

        async def through(address: str) -> Any:
            client = await server.connect()
            client.send(f"PROXY TCP4 {address} 127.0.0.1 1 25\r\n".encode())
            return client, await client.reply()

        taken = [await through("203.0.113.7") for _ in range(12)]
        assert {reply[:3] for _, reply in taken} == {"220"}
        assert (await through("203.0.113.7"))[1].startswith("421")
        assert (await through("203.0.113.8"))[1].startswith("220")
        assert server.listener.limits.peers["203.0.113.7"] == 12


async def test_of_ipv6_the_network_counts_and_mapped_addresses_are_plain_ones(pool: Pool, world: World) -> None:
    async with serving(pool, world, proxies=(ip_network("127.0.0.1"),)) as server:
        for address in ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", "::ffff:203.0.113.7"):
            client = await server.connect()
            client.send(f"PROXY TCP6 {address} ::1 1 25\r\n".encode())
            assert (await client.reply()).startswith("220")
        assert server.listener.limits.peers == {"2001:db8:1:2::/64": 2, "203.0.113.7": 1}


async def test_from_anybody_else_proxy_is_no_command(pool: Pool, world: World) -> None:
    async with serving(pool, world, proxies=(ip_network("10.0.0.0/8"),)) as server:
        client = await server.greeted()
        assert (await client.say("PROXY TCP4 203.0.113.7 127.0.0.1 12345 25")).startswith("500")
        early = await server.connect()
        early.send(HEADERS[0][0])
        assert [reply[:3] for reply in await early.rest()] == ["554"]


# --- LMTP ------------------------------------------------------------------------------------------------------------------


async def test_lmtp_answers_each_recipient(pool: Pool, world: World) -> None:
    async with serving(pool, world, lmtp=True) as server:
        client = await server.connect()
        assert (await client.reply()).startswith("220 mx.mailer.example LMTP")
        for wrong in ("EHLO x", "HELO x"):
            assert (await client.say(wrong)).startswith("500 5.5.1")
        offers = await client.say("LHLO mx.example")
        assert "PIPELINING" in offers
        assert "ENHANCEDSTATUSCODES" in offers
        ours, duty = world.return_path(), "abuse@bounce.mailer.example"
        recipients = "".join(f"RCPT TO:<{each}>\r\n" for each in (ours, "a@b.example", duty, ours))
        client.send(f"MAIL FROM:<>\r\n{recipients}DATA\r\n".encode())
        assert [(await client.reply())[:3] for _ in range(6)] == ["250", "250", "550", "250", "250", "354"]
        client.send(BODY + b".\r\n")
        assert [(await client.reply())[:3] for _ in range(3)] == ["250"] * 3  # one for each RCPT that was taken
        assert [row["recipient"] for row in await stored(pool)] == [ours, duty]
        client.send(f"MAIL FROM:<>\r\nRCPT TO:<{ours}>\r\nRCPT TO:<{duty}>\r\nDATA\r\n".encode())
        for _ in range(4):
            await client.reply()
        client.send(b"bare\nline\r\n.\r\n")
        assert [(await client.reply())[:3] for _ in range(2)] == ["550"] * 2
        assert (await client.say("QUIT")).startswith("221")


async def test_lhlo_is_for_lmtp_only(server: Server) -> None:
    client = await server.connect()
    await client.reply()
    assert (await client.say("LHLO x")).startswith("500 5.5.1")
    assert (await client.say("MAIL FROM:<>")).startswith("503")
