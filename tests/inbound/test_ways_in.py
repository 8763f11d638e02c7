"""The inbound process with everything on: two SMTP ports, LMTP, TLS, a mailbox; and settings that cannot be used."""

import asyncio
import os
import ssl
from pathlib import Path

import msgspec
import pytest
from redis.asyncio import Redis

from config import load
from domain.errors import ConfigurationError
from store.postgres import Pool
from tests.engine.test_connect import make_certificate
from tests.inbound.conftest import World
from tests.inbound.mail_store import PASSWORD, USER, mail_store
from tests.inbound.peer import Client
from tests.inbound.test_app import free_port, ready, start
from tests.inbound.test_mailboxes import bounce, until_empty, until_kept


async def test_mail_comes_in_by_every_way_that_is_set(
    tmp_path: Path, fresh_database_url: str, redis_url: str, pool: Pool, world: World, redis: Redis
) -> None:
    make_certificate(tmp_path, "mx.mailer.example")
    pem = tmp_path / "mx.mailer.example.pem"
    (tmp_path / "password").write_text(PASSWORD)
    async with mail_store() as store:
        store.add(bounce(world, "in a mailbox"))
        where = f"{USER.replace('@', '%40')}@127.0.0.1"
        good = f"imap://{where}:{store.ports['imap']}?password_file={tmp_path}/password&tls=none"
        away = f"pop3://{where}:{free_port()}?password_file={tmp_path}/password&tls=none"
        process = await start(
            tmp_path, fresh_database_url, redis_url,
            SLUICE_INBOUND_SUBMISSION_PORT=str(free_port()), SLUICE_INBOUND_LMTP_PORT=str(free_port()),
            SLUICE_INBOUND_TLS_CERTIFICATE_FILE=str(pem), SLUICE_INBOUND_MAILBOXES=f"{good},{away}",
        )  # fmt: skip
        try:
            places = await ready(process)
            assert os.getpriority(os.PRIO_PROCESS, process.pid) > os.getpriority(os.PRIO_PROCESS, 0)  # sending comes first
            for name, hello in (("smtp", "EHLO x"), ("submission", "EHLO x"), ("lmtp", "LHLO x")):
                client = Client(*await asyncio.open_connection(*places[name]))
                assert (await client.reply()).startswith("220")
                assert "STARTTLS" in await client.say(hello)
                assert (await client.say("STARTTLS")).startswith("220")
                async with asyncio.timeout(60):
                    await client.writer.start_tls(ssl.create_default_context(cafile=str(pem)), server_hostname="mx.mailer.example")
                assert (await client.say(hello)).startswith("250")
                assert (await client.deliver(world.return_path())).startswith("250")
                client.writer.close()
            assert len(await until_kept(pool, 4)) == 4
            await until_empty(store)
            async with asyncio.timeout(60):
                while True:
                    [said] = [msgspec.json.decode(await redis.get(key) or b"{}") for key in await redis.keys("*inbound*")] or [{}]
                    if any(sentence.startswith("a mailbox cannot be read: pop3://") for sentence in said.get("trouble", [])):
                        break
                    await asyncio.sleep(0.1)
            assert PASSWORD not in str(said)
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 60) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_a_password_or_certificate_that_is_not_there_is_named(tmp_path: Path, fresh_database_url: str, redis_url: str) -> None:
    for settings, sentence in (
        ({"SLUICE_INBOUND_MAILBOXES": "imaps://u@h?password_file=/nowhere/x"}, "inbound.mailboxes: imap://u@h:993/INBOX: cannot read"),
        ({"SLUICE_INBOUND_TLS_CERTIFICATE_FILE": "/nowhere/x.pem"}, "inbound.tls_certificate_file: cannot use /nowhere/x.pem"),
    ):
        process = await start(tmp_path, fresh_database_url, redis_url, **settings)  # type: ignore[arg-type]
        _, errors = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 2
        assert sentence in errors.decode()
        assert b"Traceback" not in errors


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"SLUICE_INBOUND_SUBMISSION_PORT": "2525"}, "inbound.submission_port: 2525 is the same as inbound.smtp_port"),
        ({"SLUICE_INBOUND_LMTP_PORT": "8080"}, "inbound.lmtp_port: 8080 is the same as inbound.http_port"),
        ({"SLUICE_INBOUND_TLS_KEY_FILE": "/k.pem"}, "inbound.tls_key_file: is a key without a certificate"),
        ({"SLUICE_INBOUND_PROXY_ADDRESSES": "10.0.0.0/8,proxy.example"}, "inbound.proxy_addresses: 'proxy.example' is no address"),
        ({"SLUICE_INBOUND_MAILBOXES": "imaps://u:hunter22@h"}, "inbound.mailboxes: imaps://h: has a password in it"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_with_the_reason(settings: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load.check(None, settings)
    assert any(sentence in problem for problem in refused.value.problems), refused.value.problems
    assert "hunter22" not in str(refused.value)
