"""connect: an open, silent transport and what the server offers, or one sentence that says what to do; never the password."""

import asyncio
import datetime
import errno
import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from domain.egress import DeliveryServer, DeliveryServerLimits
from domain.errors import ConnectFailed
from engine import connect as connect_module
from engine.connect import Connected, connect, own_name
from ext.smtp_session import STAGE_CONTENT, Message, Outcome, SmtpSession
from tests.peers import DROP, HANG, HONEST, RESET, Peer, Script

PASSWORD = "correct horse battery"
AUTH = "AUTH PLAIN LOGIN"


def server(port: int, **changes: Any) -> DeliveryServer:
    fields: dict[str, Any] = {"id": 1, "user_id": 1, "name": "relay", "host": "127.0.0.1", "port": port, "connect_timeout_seconds": 2.0}
    return DeliveryServer(**fields | changes)


async def opened(peer: Peer, password: str = PASSWORD, context: ssl.SSLContext | None = None, **changes: Any) -> Connected:
    return await connect(server(peer.port, **changes), password=password, ehlo_name="me.example", ssl_context=context)


def make_certificate(directory: Path, name: str, *, days: int = 1, subject_name: str = "") -> ssl.SSLContext:
    """A self-signed certificate for `name`; its file is `directory`/`name`.pem. Several in one file of trust need different subjects."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject_name or name)])
    now = datetime.datetime.now(datetime.UTC)
    start, end = sorted((now - datetime.timedelta(days=1), now + datetime.timedelta(days=days)))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - datetime.timedelta(days=1))
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(path)
    return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def localhost(certificates: Path) -> ssl.SSLContext:
    return make_certificate(certificates, "localhost")


@pytest.fixture(autouse=True)
def no_password_in_any_error(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every failure made in a test is looked at, with all it was caused by."""
    made: list[ConnectFailed] = []
    original = ConnectFailed.__init__

    def record(self: ConnectFailed, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(ConnectFailed, "__init__", record)
    yield
    for failure in made:
        assert PASSWORD not in f"{failure} {failure.reply} {failure.__cause__!r}"


# --- success ----------------------------------------------------------------------------------------------------------


async def test_what_the_server_offers_is_told() -> None:
    words = ("PIPELINING", "SIZE 1000000", "chunking", "8BITMIME", "SMTPUTF8", "bad/word x", "")
    async with Peer(words) as peer:
        connected = await opened(peer)
        assert connected.capabilities == ("PIPELINING", "SIZE", "CHUNKING", "8BITMIME", "SMTPUTF8")
        assert (connected.pipelining, connected.chunking, connected.eightbitmime, connected.smtputf8) == (True, True, True, True)
        assert (connected.size, connected.peer_ip, connected.source_ip) == (1_000_000, "127.0.0.1", "127.0.0.1")
        assert (connected.banner, connected.tls, connected.verified) == ("peer.example ESMTP", "", False)
        assert peer.commands == ["EHLO me.example"]
        assert not connected.transport.is_closing()
        connected.transport.abort()


@pytest.mark.parametrize("words", [("SIZE abc",), ("SIZE -1",), ("SIZE",), ("SIZE 99999999999999999999",), ("AUTH",), ("", "")])
async def test_odd_keywords_are_ignored(words: tuple[str, ...]) -> None:
    async with Peer(words) as peer:
        connected = await opened(peer)
        assert (connected.size, connected.pipelining) == (0, False)
        connected.transport.abort()


async def test_a_server_without_ehlo_is_greeted_with_helo() -> None:
    async with Peer((), script={"ehlo": "500 what?"}) as peer:
        connected = await opened(peer)
        assert connected.capabilities == ()
        assert peer.commands == ["EHLO me.example", "HELO me.example"]
        connected.transport.abort()


async def test_the_source_address_is_used() -> None:
    async with Peer(()) as peer:
        connected = await connect(server(peer.port), password="", ehlo_name="me.example", source_address="127.0.0.9")
        assert connected.source_ip == "127.0.0.9"
        connected.transport.abort()


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
async def test_a_user_name_is_used(mechanism: str) -> None:
    async with Peer((f"AUTH {mechanism}",), user="me", password=PASSWORD) as peer:
        connected = await opened(peer, username="me")
        assert peer.commands[-1].startswith(f"AUTH {mechanism}")
        connected.transport.abort()


@pytest.mark.parametrize("security", ["starttls", "tls"])
async def test_tls_then_authentication_then_mail_over_the_handed_over_transport(security: str, localhost: ssl.SSLContext) -> None:
    words = ("STARTTLS", AUTH, "PIPELINING")
    async with Peer(words, context=localhost, implicit_tls=security == "tls", user="me", password=PASSWORD) as peer:
        connected = await opened(peer, username="me", security=security)
        assert connected.tls.startswith("TLSv1.")
        assert "STARTTLS" not in connected.capabilities
        outcomes: list[Outcome] = []
        done = asyncio.Event()

        class Turn:
            def __init__(self) -> None:
                self.outcomes = outcomes

            def ready(self, session: SmtpSession) -> None:
                asyncio.get_running_loop().call_soon(self.run, session)

            def run(self, session: SmtpSession) -> None:
                if session.sent < 3:
                    session.submit([Message(b"", b"r@d.example", b"X: y\r\n\r\nz\r\n", None) for _ in range(session.room)])
                session.flush()
                if session.sent == 3 and session.idle:
                    session.quit()

            def closed(self, session: SmtpSession, reason: str) -> None:
                done.set()

        SmtpSession(Turn(), None, pipelining=connected.pipelining, chunking=connected.chunking).start(connected.transport)
        await asyncio.wait_for(done.wait(), 60)
        assert [(o.stage, o.code) for o in outcomes] == [(STAGE_CONTENT, 250)] * 3
        assert len(peer.accepted) == 3
        await closed(peer)


async def test_a_certificate_that_is_trusted_and_fits_is_verified(certificates: Path, localhost: ssl.SSLContext) -> None:
    trust = ssl.create_default_context(cafile=certificates / "localhost.pem")
    async with Peer(("STARTTLS",), context=localhost) as peer:
        connected = await opened(peer, security="starttls", host="localhost", context=trust)
        assert connected.verified
        connected.transport.abort()


# --- failures ---------------------------------------------------------------------------------------------------------


async def closed(peer: Peer) -> None:
    """Return when the peer has no connection any more."""
    async with asyncio.timeout(60):
        while peer.open:
            await asyncio.sleep(0.01)


async def refused(peer: Peer | int, **changes: Any) -> ConnectFailed:
    """The failure; also sees to it that no socket is left open and that it came in time."""
    port = peer if isinstance(peer, int) else peer.port
    context = changes.pop("context", None)
    source = changes.pop("source_address", None)
    with pytest.raises(ConnectFailed) as caught:
        async with asyncio.timeout(60):
            await connect(server(port, **changes), password=PASSWORD, ehlo_name="me.example", ssl_context=context, source_address=source)
    if isinstance(peer, Peer):
        await closed(peer)
    return caught.value


async def test_an_unknown_host_is_named() -> None:
    failure = await refused(25, host="no-such-host.invalid")
    assert failure.stage == "resolve"
    assert "no-such-host.invalid" in str(failure)


@pytest.mark.parametrize("trouble", [socket.gaierror(socket.EAI_AGAIN, "try again"), TimeoutError()])
async def test_a_name_server_that_is_away_does_not_stop_mail_to_a_host_that_was_known(
    monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    answer = asyncio.get_running_loop().getaddrinfo

    async def away(host: str, *rest: Any, **named: Any) -> Any:
        if host[:1].isdigit() or ":" in host:
            return await answer(host, *rest, **named)
        raise trouble

    async with Peer(()) as peer:
        (await opened(peer, host="localhost")).transport.abort()
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", away)
        (await opened(peer, host="localhost")).transport.abort()
        failure = await refused(peer, host="ip6-localhost")
    assert (failure.stage, failure.permanent) == ("resolve", False)


@contextmanager
def no_descriptor() -> Iterator[None]:
    """This process can open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("host", "security", "stage"),
    [("ip6-localhost", "none", "resolve"), ("mail.example", "none", "resolve"), ("127.0.0.1", "none", "connect"), ("127.1", "tls", "tls")],
)
async def test_what_this_machine_lacks_is_never_read_as_the_servers_fault(host: str, security: str, stage: str) -> None:
    connect_module._context.cache_clear()
    await asyncio.to_thread(int)  # the resolver's thread is there
    with no_descriptor(), pytest.raises(ConnectFailed) as caught:
        await connect(server(25, host=host, security=security), password="", ehlo_name="me.example")
    assert (caught.value.stage, caught.value.permanent) == (stage, False)
    assert "Too many open files" in str(caught.value)


async def test_certificates_that_could_not_be_read_once_are_read_again() -> None:
    connect_module._context.cache_clear()
    with no_descriptor(), pytest.raises(ConnectFailed, match="trusted certificates"):
        connect_module._context(True)
    assert connect_module._context(True).cert_store_stats() == ssl.create_default_context().cert_store_stats()


@pytest.mark.parametrize("trouble", [socket.gaierror(socket.EAI_FAIL, "failed"), OSError(errno.ENOMEM, "no memory")])
async def test_a_resolver_in_trouble_says_nothing_about_the_host(monkeypatch: pytest.MonkeyPatch, trouble: Exception) -> None:
    async def failing(*_: Any, **__: Any) -> Any:
        raise trouble

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", failing)
    failure = await refused(25, host="never-seen.example")
    assert (failure.stage, failure.permanent) == ("resolve", False)
    assert str(trouble.args[1]) in str(failure)


async def test_a_refused_connection_is_named() -> None:
    async with Peer(()) as peer:
        port = peer.port
    failure = await refused(port)
    assert (failure.stage, failure.permanent) == ("connect", False)
    assert "refused the connection" in str(failure)


async def test_an_address_that_is_not_ours_is_named() -> None:
    async with Peer(()) as peer:
        failure = await refused(peer, source_address="192.0.2.1")
    assert failure.stage == "connect"


@pytest.mark.parametrize(
    ("script", "stage", "words"),
    [
        ({"banner": "421 4.3.2 too busy"}, "greeting", "421 4.3.2 too busy"),
        ({"banner": "554 5.7.1 not you"}, "greeting", "554 5.7.1 not you"),
        ({"banner": "hello there"}, "greeting", "greet"),
        ({"banner": DROP}, "greeting", "closed the connection before its greeting"),
        ({"banner": RESET}, "greeting", "closed the connection before its greeting"),
        ({"banner": HANG}, "greeting", "no greeting within"),
        ({"banner": b"220 " + b"x" * 200_000}, "greeting", "greet"),
        ({"banner": "220 one\r\n220 two"}, "ehlo", "EHLO"),
        ({"ehlo": "550 5.7.1 no"}, "ehlo", "refused EHLO: 550 5.7.1 no"),
        ({"ehlo": "421 4.3.2 bye"}, "ehlo", "421 4.3.2 bye"),
        ({"ehlo": DROP}, "ehlo", "closed the connection at EHLO"),
        ({"ehlo": HANG}, "ehlo", "did not answer EHLO within"),
        ({"ehlo": b"250-x\r\n" * 20_000}, "ehlo", "EHLO"),
        ({"ehlo": (HONEST, "250 once more")}, "ehlo", "more than its reply to EHLO"),
        ({"ehlo": "500 what?", "helo": "500 what?"}, "ehlo", "refused EHLO and HELO"),
    ],
)
async def test_a_server_that_does_not_greet_is_named(script: Script, stage: str, words: str) -> None:
    limits = DeliveryServerLimits(command_timeout_seconds=0.3)
    async with Peer((), script=script) as peer:
        failure = await refused(peer, limits=limits, connect_timeout_seconds=0.3)
    assert (failure.stage, failure.permanent) == (stage, False)
    assert words in str(failure)


@pytest.mark.parametrize(
    ("script", "permanent", "words"),
    [
        ({"starttls": "454 4.7.0 not now"}, False, "454 4.7.0 not now"),
        ({"starttls": "502 5.5.1 no"}, True, "502 5.5.1 no"),
        ({"starttls": DROP}, False, "closed the connection at STARTTLS"),
        ({"starttls": HANG}, False, "did not answer STARTTLS within"),
        ({"starttls": ("220 go", DROP)}, False, "closed the connection at STARTTLS"),
        ({"starttls": ("220 go", "hello, this is not TLS")}, False, "STARTTLS"),
        ({"starttls": b"220 go\r\n250-injected\r\n250 AUTH PLAIN\r\n"}, False, "more than its reply to STARTTLS"),
    ],
)
async def test_starttls_that_fails_never_goes_on_in_plain_text(
    script: Script, permanent: bool, words: str, localhost: ssl.SSLContext
) -> None:
    limits = DeliveryServerLimits(command_timeout_seconds=0.5)
    async with Peer(("STARTTLS", AUTH), script=script, context=localhost) as peer:
        failure = await refused(peer, security="starttls", username="me", limits=limits)
        assert not any(command.startswith(("AUTH", "MAIL")) for command in peer.commands)
    assert (failure.stage, failure.permanent) == ("tls", permanent)
    assert words in str(failure)


async def test_tls_required_but_not_offered() -> None:
    async with Peer(("PIPELINING", AUTH)) as peer:
        failure = await refused(peer, security="starttls", username="me")
        assert peer.commands == ["EHLO me.example"]
    assert (failure.stage, failure.permanent) == ("tls", True)
    assert "TLS is required but" in str(failure)


async def test_a_certificate_nobody_vouches_for_is_named(localhost: ssl.SSLContext) -> None:
    for security in ("starttls", "tls"):
        async with Peer(("STARTTLS",), context=localhost, implicit_tls=security == "tls") as peer:
            # 127.1 is the loopback to the resolver and a name to us: it is checked like any name
            failure = await refused(peer, security=security, host="127.1")
        assert (failure.stage, failure.permanent) == ("tls", True)
        assert "the certificate of 127.1" in str(failure)
        assert "self" in str(failure)


@pytest.mark.parametrize(("name", "days", "words"), [("other.example", 1, "mismatch"), ("localhost", -2, "expired")])
async def test_a_certificate_for_another_name_or_time_is_named(tmp_path: Path, name: str, days: int, words: str) -> None:
    context = make_certificate(tmp_path, name, days=days)
    trust = ssl.create_default_context(cafile=tmp_path / f"{name}.pem")
    async with Peer(("STARTTLS",), context=context) as peer:
        failure = await refused(peer, security="starttls", host="localhost", context=trust)
    assert (failure.stage, failure.permanent) == ("tls", True)
    assert words in str(failure)


async def test_a_plain_port_taken_for_tls_is_named() -> None:
    async with Peer(()) as peer:
        failure = await refused(peer, security="tls", connect_timeout_seconds=1.0)
    assert failure.stage == "tls"


async def test_a_silent_port_taken_for_tls_is_given_up() -> None:
    async with Peer((), script={"banner": HANG}) as peer:
        failure = await refused(peer, security="tls", connect_timeout_seconds=0.3)
    assert failure.stage == "tls"


@pytest.mark.parametrize("mechanisms", ["AUTH PLAIN LOGIN CRAM-MD5", "AUTH LOGIN"])
async def test_a_wrong_password_is_tried_once_and_named(mechanisms: str, localhost: ssl.SSLContext) -> None:
    async with Peer(("STARTTLS", mechanisms), context=localhost, user="me", password="other") as peer:
        failure = await refused(peer, security="starttls", username="me")
        assert sum(command.startswith("AUTH") for command in peer.commands) == 1
    assert (failure.stage, failure.permanent) == ("auth", True)
    assert failure.reply == "535 5.7.8 authentication credentials invalid"
    assert "refused the user name or password of 'me'" in str(failure)


@pytest.mark.parametrize(
    ("words", "script", "permanent", "sentence"),
    [
        ((), {}, True, "does not offer authentication"),
        (("AUTH",), {}, True, "offers none of"),
        (("AUTH XOAUTH2 NTLM",), {}, True, "it offers: xoauth2 ntlm"),
        ((AUTH,), {"auth": "454 4.7.0 try later"}, False, "454 4.7.0 try later"),
        ((AUTH,), {"auth": DROP}, False, "closed the connection at AUTH"),
        ((AUTH,), {"auth": HANG}, False, "did not answer AUTH within"),
        ((AUTH,), {"auth": (HONEST, "250 and more")}, False, "more than its reply to AUTH"),
    ],
)
async def test_authentication_that_fails_is_named(words: tuple[str, ...], script: Script, permanent: bool, sentence: str) -> None:
    limits = DeliveryServerLimits(command_timeout_seconds=0.3)
    async with Peer(words, script=script, user="me", password=PASSWORD) as peer:
        failure = await refused(peer, username="me", limits=limits)
    assert (failure.stage, failure.permanent) == ("auth", permanent)
    assert sentence in str(failure)


async def test_the_password_is_not_sent_over_unchecked_tls(localhost: ssl.SSLContext) -> None:
    unchecked = ssl.create_default_context()
    unchecked.check_hostname = False
    unchecked.verify_mode = ssl.CERT_NONE
    async with Peer(("STARTTLS", AUTH), context=localhost) as peer:
        failure = await refused(peer, security="starttls", host="127.1", username="me", context=unchecked)
        assert not any(command.startswith("AUTH") for command in peer.commands)
    assert (failure.stage, failure.permanent) == ("auth", True)
    assert "not sent" in str(failure)


async def test_an_ehlo_name_that_would_break_the_command_is_refused() -> None:
    async with Peer(()) as peer:
        with pytest.raises(ConnectFailed, match="cannot say EHLO"):
            await connect(server(peer.port), password="", ehlo_name="me\r\nMAIL", ssl_context=None)


async def test_a_cancelled_attempt_leaves_no_socket() -> None:
    async with Peer((), script={"ehlo": HANG}) as peer:
        task = asyncio.create_task(opened(peer))
        while not peer.commands:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await closed(peer)


async def test_a_machine_whose_name_servers_are_silent_says_what_it_calls_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def full_name() -> str:
        answered.wait(60)
        return "mx.sender.example"

    monkeypatch.setattr(socket, "getfqdn", full_name)
    monkeypatch.setattr(connect_module, "_OWN_NAME_SECONDS", 0.05)
    assert await own_name() == socket.gethostname()
    answered.set()
    monkeypatch.setattr(connect_module, "_OWN_NAME_SECONDS", 60.0)
    assert await own_name() == "mx.sender.example"
