"""inbound.mailboxes over POP3 and IMAP: kept before deleted, counted once whatever breaks, several at once; a small server and Dovecot."""

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from domain.errors import ConfigurationError, Invalid
from domain.mailbox import parse
from inbound.mailbox_link import MailboxTrouble, password_of
from inbound.mailboxes import Collector, collectors
from inbound.policy import MailPolicy
from store.postgres import Pool
from tests.engine.test_connect import make_certificate
from tests.inbound.conftest import World
from tests.inbound.mail_store import PASSWORD, USER, MailStoreServer, mail_store

DOVECOT = shutil.which("dovecot", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") or ""


def bounce(world: World, text: str, number: int = 1) -> bytes:
    """A message as an MTA has delivered it."""
    fields = f"Return-Path: <>\r\nDelivered-To: catchall@mailer.example\r\nTo: {world.return_path(number=number)}\r\nSubject: failed\r\n"
    return f"{fields}\r\n{text}\r\n".encode()


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    return tmp_path / "password"


@pytest.fixture(params=["imap", "pop3"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def reading(pool: Pool, world: World, url: str) -> AsyncIterator[Collector]:
    """A collector that runs."""
    policy = MailPolicy(pool, world.keyring, ())
    await policy.refresh()
    [made] = collectors(pool, policy, [parse(url)], interval_seconds=0.1, max_message_bytes=200_000)
    task = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_kept(pool: Pool, count: int) -> list[bytes]:
    """The messages that were kept, when there are so many."""
    async with asyncio.timeout(60):
        while await pool.fetchval("select count(*) from inbound_messages") < count:
            await asyncio.sleep(0.02)
    return [row["raw"] for row in await pool.fetch("select raw from inbound_messages order by id")]


async def until_empty(server: MailStoreServer) -> None:
    """When the mailbox is."""
    async with asyncio.timeout(60):
        while server.messages:
            await asyncio.sleep(0.02)


def at(server: MailStoreServer, protocol: str, password_file: Path, more: str = "&tls=none") -> str:
    """The URL of its mailbox."""
    return f"{protocol}://{USER.replace('@', '%40')}@127.0.0.1:{server.ports[protocol]}?password_file={password_file}{more}"


async def test_mail_is_kept_with_whose_it_was_and_then_deleted(pool: Pool, world: World, protocol: str, password_file: Path) -> None:
    async with mail_store() as server:
        sent = [bounce(world, f"text {number}\r\n.\r\n..dots", number) for number in (1, 2, 3)]
        for each in sent:
            server.add(each)
        async with reading(pool, world, at(server, protocol, password_file)):
            assert await until_kept(pool, 3) == sent
            await until_empty(server)
            server.add(sent[0] + b"another\r\n")  # while it waits: IDLE says so, POP3 looks again
            await until_kept(pool, 4)
            await until_empty(server)
        rows = await pool.fetch("select recipient, mail_from, user_id, campaign_id, number from inbound_messages order by id limit 3")
        assert [(row["number"], row["mail_from"]) for row in rows] == [(1, ""), (2, ""), (3, "")]
        assert (rows[0]["user_id"], rows[0]["campaign_id"]) == (world.user_id, world.campaign_id)
        assert rows[0]["recipient"] == world.return_path()


async def test_mail_to_nobody_of_ours_is_kept_for_the_mailbox(pool: Pool, world: World, protocol: str, password_file: Path) -> None:
    async with mail_store() as server:
        server.add(b"From: Ada <ada@reader.example>\r\nTo: someone@elsewhere.example\r\n\r\nhello\r\n")
        async with reading(pool, world, at(server, protocol, password_file)):
            assert await until_kept(pool, 1) == [b"From: Ada <ada@reader.example>\r\nTo: someone@elsewhere.example\r\n\r\nhello\r\n"]
        row = await pool.fetchrow("select recipient, mail_from, user_id from inbound_messages")
        assert tuple(row) == (USER, "ada@reader.example", None)  # type: ignore[arg-type]


async def test_a_message_with_a_sender_nobody_can_store_does_not_hold_up_the_others(
    pool: Pool, world: World, protocol: str, password_file: Path
) -> None:
    async with mail_store() as server:
        server.add(bounce(world, "odd").replace(b"Return-Path: <>", b"Return-Path: <a\0b@reader.example>"))
        server.add(bounce(world, "behind it"))
        async with reading(pool, world, at(server, protocol, password_file)):
            await until_kept(pool, 2)
            await until_empty(server)


async def test_a_message_of_no_octets_does_not_hold_up_the_others(pool: Pool, world: World, protocol: str, password_file: Path) -> None:
    async with mail_store() as server:
        server.add(b"")
        server.add(bounce(world, "behind it"))
        async with reading(pool, world, at(server, protocol, password_file)):
            assert b"" in [message.strip() for message in await until_kept(pool, 2)]
            await until_empty(server)


@pytest.mark.parametrize(
    ("protocol", "break_at"),
    [("pop3", "RETR 3"), ("pop3", "DELE"), ("pop3", "QUIT"), ("imap", "UID FETCH 3"), ("imap", "STORE"), ("imap", "EXPUNGE")],
)
async def test_a_connection_that_breaks_anywhere_costs_and_doubles_nothing(
    pool: Pool, world: World, protocol: str, password_file: Path, break_at: str
) -> None:
    async with mail_store() as server:
        sent = [bounce(world, f"text {number}", number) for number in range(1, 6)]
        for each in sent:
            server.add(each)
        server.break_at = break_at
        async with reading(pool, world, at(server, protocol, password_file)):
            await asyncio.sleep(0.5)
            kept = await until_kept(pool, 0)
            assert set(kept) | set(server.messages.values()) == set(sent)  # nothing is deleted before it is kept
            server.break_at = ""
            await until_empty(server)
        assert sorted(await until_kept(pool, 5)) == sorted(sent)


async def test_nothing_is_deleted_while_the_store_is_away(pool: Pool, world: World, protocol: str, password_file: Path) -> None:
    async with mail_store() as server:
        server.add(bounce(world, "text"))
        await pool.execute("alter table inbound_messages rename to away")
        async with reading(pool, world, at(server, protocol, password_file)):
            async with asyncio.timeout(60):
                while not any(line.startswith(("RETR", "s")) and ("RETR" in line or "BODY.PEEK" in line) for line in server.commands):
                    await asyncio.sleep(0.02)
            await asyncio.sleep(0.3)
            assert len(server.messages) == 1
            await pool.execute("alter table away rename to inbound_messages")
            await until_kept(pool, 1)
            await until_empty(server)


async def test_a_server_that_renumbers_doubles_nothing(pool: Pool, world: World, protocol: str, password_file: Path) -> None:
    async with mail_store() as server:
        server.add(bounce(world, "text"))
        async with reading(pool, world, at(server, protocol, password_file, "&tls=none&keep=yes")) as collector:
            await until_kept(pool, 1)
            server.validity = 8
            server.add(bounce(world, "a new one"))
            await until_kept(pool, 2)
            await asyncio.sleep(0.3)
            assert collector.kept == 2
        assert len(server.messages) == 2  # keep=yes


async def test_what_is_kept_is_not_fetched_again(pool: Pool, world: World, protocol: str, password_file: Path) -> None:
    async with mail_store() as server:
        server.add(bounce(world, "text"))
        for _ in range(2):
            async with reading(pool, world, at(server, protocol, password_file, "&tls=none&keep=yes")):
                await until_kept(pool, 1)
                await asyncio.sleep(0.4)
        assert len([line for line in server.commands if "RETR" in line or "BODY.PEEK" in line]) == 1


async def test_a_message_that_is_too_large_stays_and_the_others_are_taken(
    pool: Pool, world: World, protocol: str, password_file: Path
) -> None:
    async with mail_store() as server:
        server.add(bounce(world, "x" * 300_000))
        server.add(bounce(world, "small"))
        async with reading(pool, world, at(server, protocol, password_file)):
            await until_kept(pool, 1)
            async with asyncio.timeout(60):
                while len(server.messages) > 1:
                    await asyncio.sleep(0.02)
        assert not any("BODY.PEEK" in line and " 1 " in line for line in server.commands)


@pytest.mark.parametrize("implicit", [False, True])
async def test_mailboxes_are_read_under_tls(
    pool: Pool, world: World, protocol: str, password_file: Path, tmp_path: Path, implicit: bool
) -> None:
    context = make_certificate(tmp_path, "localhost")
    async with mail_store(tls=None if implicit else context, implicit=context if implicit else None) as server:
        server.add(bounce(world, "text"))
        url = at(server, protocol, password_file, f"&ca_file={tmp_path}/localhost.pem").replace("127.0.0.1", "localhost")
        async with reading(pool, world, url.replace("://", "s://", 1) if implicit else url):
            await until_kept(pool, 1)


async def test_a_server_without_starttls_or_with_a_wrong_name_gets_no_password(
    pool: Pool, world: World, protocol: str, password_file: Path, tmp_path: Path
) -> None:
    context = make_certificate(tmp_path, "localhost")
    for tls, more in ((None, ""), (context, ""), (context, f"&ca_file={tmp_path}/localhost.pem")):  # none, not trusted, another name
        async with mail_store(tls=tls) as server:
            server.add(bounce(world, "text"))
            async with reading(pool, world, at(server, protocol, password_file, more)):
                async with asyncio.timeout(60):
                    while not server.commands:
                        await asyncio.sleep(0.02)
                await asyncio.sleep(0.3)
            assert not any(word in line for line in server.commands for word in ("PASS", "AUTH", "LOGIN", "USER"))
    assert await pool.fetchval("select count(*) from inbound_messages") == 0


async def test_a_wrong_password_is_said_without_it(pool: Pool, world: World, protocol: str, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("wr0ng-pa55word")
    async with mail_store() as server:
        server.add(bounce(world, "text"))
        url = at(server, protocol, tmp_path / "wrong")
        policy = MailPolicy(pool, world.keyring, ())
        [collector] = collectors(pool, policy, [parse(url)], interval_seconds=0.1, max_message_bytes=200_000)
        with pytest.raises(MailboxTrouble) as failure:
            await collector._session()
        assert "was refused" in str(failure.value)
        assert "wr0ng" not in repr(failure.value)
        assert len(server.messages) == 1


async def test_several_mailboxes_are_read_at_once(pool: Pool, world: World, password_file: Path) -> None:
    async with mail_store() as one, mail_store() as other:
        one.add(bounce(world, "one"))
        other.add(bounce(world, "one"))  # the same in another mailbox was delivered twice: both count
        async with reading(pool, world, at(one, "imap", password_file)), reading(pool, world, at(other, "pop3", password_file)):
            await until_kept(pool, 2)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("imap.example.com", "no scheme or host"),
        ("smtp://u@host?password_env=X", "no scheme or host"),
        ("imaps://host/INBOX?password_env=X", "names no user"),
        ("imaps://user:secret@host?password_env=X", "has a password in it"),
        ("imaps://user@host", "name the password's place"),
        ("imaps://user@host?password_env=X&password_file=/x", "name the password's place"),
        ("imaps://user@host?password_env=X&tls=none", "tls must be"),
        ("imap://user@host?password_env=X&tls=maybe", "tls must be"),
        ("imap://user@host?password_env=X&keep=1", "keep must be"),
        ("imap://user@host?password_env=X&x=1", "unknown option 'x'"),
        ("imap://user@host:99999?password_env=X", "is no URL"),
        ('imap://user@host/"x?password_env=X', "modified UTF-7"),
    ],
)
def test_urls_that_cannot_be_used_are_refused_without_being_quoted(url: str, reason: str) -> None:
    with pytest.raises(Invalid) as refused:
        parse(url)
    assert reason in refused.value.reason
    assert "secret" not in refused.value.reason


def test_a_password_that_is_not_there_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two").write_text("a\nb\n")
    for place in (f"password_file={tmp_path}/missing", f"password_file={tmp_path}/two", "password_env=BOUNCE_PASSWORD"):
        with pytest.raises(ConfigurationError, match=r"inbound.mailboxes: imap://u@h:993/INBOX: "):
            password_of(parse(f"imaps://u@h?{place}"))
    monkeypatch.setenv("BOUNCE_PASSWORD", PASSWORD)
    assert password_of(parse("imaps://u@h?password_env=BOUNCE_PASSWORD")) == PASSWORD
    monkeypatch.setenv("BOUNCE_PASSWORD", f"{PASSWORD}\r\nQUIT")
    with pytest.raises(ConfigurationError, match="the variable BOUNCE_PASSWORD must hold the password in one line"):
        password_of(parse("imaps://u@h?password_env=BOUNCE_PASSWORD"))


# --- Dovecot ----------------------------------------------------------------------------------------------------------------

DOVECOT_CONF = """\
base_dir = {root}/run
state_dir = {root}/state
log_path = {root}/log
protocols = imap pop3
listen = 127.0.0.1
ssl = required
ssl_cert = <{root}/localhost.pem
ssl_key = <{root}/localhost.pem
default_internal_user = dovecot
default_login_user = dovenull
mail_location = maildir:{root}/mail/%u
mail_uid = {uid}
mail_gid = {gid}
first_valid_uid = 1
auth_mechanisms = plain
passdb {{
  driver = static
  args = nopassword=n password={{PLAIN}}correct-horse
}}
userdb {{
  driver = static
  args = uid={uid} gid={gid} home={root}/mail/%u
}}
service imap-login {{
  inet_listener imap {{
    port = {imap}
  }}
  inet_listener imaps {{
    port = {imaps}
  }}
}}
service pop3-login {{
  inet_listener pop3 {{
    port = {pop3}
  }}
  inet_listener pop3s {{
    port = {pop3s}
  }}
}}
"""


class Dovecot:
    """An instance below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
        self.ports = dict(zip(("imap", "imaps", "pop3", "pop3s"), (each.getsockname()[1] for each in sockets), strict=True))
        for each in sockets:
            each.close()
        make_certificate(root, "localhost")
        user = pwd.getpwnam("nobody")
        self.maildir = root / "mail" / "bounce"
        for name in ("tmp", "new", "cur"):
            (self.maildir / name).mkdir(parents=True)
        for path in (root / "mail", self.maildir, *self.maildir.iterdir()):
            os.chown(path, user.pw_uid, user.pw_gid)
        self._owner = (user.pw_uid, user.pw_gid)
        conf = root / "dovecot.conf"
        conf.write_text(DOVECOT_CONF.format(root=root, uid=user.pw_uid, gid=user.pw_gid, **self.ports))
        (root / "password").write_text("correct-horse\n")
        self.process = subprocess.Popen([DOVECOT, "-F", "-c", str(conf)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def add(self, name: str, message: bytes) -> None:
        """Deliver a message as an MTA does."""
        path = self.maildir / "tmp" / name
        path.write_bytes(message.replace(b"\r\n", b"\n"))
        os.chown(path, *self._owner)
        path.rename(self.maildir / "new" / name)

    def left(self) -> int:
        """How many messages are there."""
        return sum(1 for folder in ("new", "cur") for _ in (self.maildir / folder).iterdir())

    def url(self, scheme: str, more: str = "") -> str:
        """Where it is."""
        return (
            f"{scheme}://bounce@localhost:{self.ports[scheme]}?password_file={self.root}/password&ca_file={self.root}/localhost.pem{more}"
        )

    def stop(self) -> None:
        """End it, and only it."""
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
async def dovecot() -> AsyncIterator[Dovecot]:
    if not DOVECOT or os.geteuid() != 0:
        pytest.skip("needs Dovecot (dovecot-imapd, dovecot-pop3d), and root to start an instance of its own")
    root = Path(tempfile.mkdtemp(prefix="sluice-dc-"))
    root.chmod(0o755)
    made = Dovecot(root)
    try:
        async with asyncio.timeout(60):
            while True:
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", made.ports["imap"])
                    assert await reader.readline()
                    writer.close()
                    break
                except (OSError, AssertionError):
                    assert made.process.poll() is None, (root / "log").read_text()
                    await asyncio.sleep(0.1)
        yield made
    finally:
        made.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("scheme", ["imap", "imaps", "pop3", "pop3s"])
async def test_dovecot_is_emptied_and_nothing_counts_twice(pool: Pool, world: World, dovecot: Dovecot, scheme: str) -> None:
    sent = [bounce(world, f"text {number}\r\n.\r\n..dots\r\n" + "long " * 500, number) for number in range(1, 9)]
    for number, each in enumerate(sent):
        dovecot.add(f"{number}.test", each)
    async with reading(pool, world, dovecot.url(scheme)) as collector:
        assert sorted(await until_kept(pool, 8)) == sorted(sent)
        dovecot.add("late.test", bounce(world, "late"))
        assert len(await until_kept(pool, 9)) == 9
        async with asyncio.timeout(60):
            while dovecot.left():
                await asyncio.sleep(0.05)
        assert collector.kept == 9
