"""Signatures survive a relay: engine, a real Postfix of its own, sink, and the verifier agrees with what comes out."""

import os
import random
import shutil
import smtplib
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import Envelope

from bench.relays import POSTFIX_MAIN, POSTFIX_MASTER
from compose.verifying import verdicts as plain
from store.postgres import Pool
from tests.compose.test_campaign import COMPOSED_AT, recipient
from tests.compose.test_signing import records
from tests.compose.test_ten_thousand_signatures import said, varied
from tests.engine.test_campaign_end_to_end import completed
from tests.engine.test_signed_mail import SECRET, make_key, sources
from tests.machine import Machine, until
from tests.reference.dkim_verdicts import verdicts
from tests.store import seed

POSTFIX = shutil.which("postfix", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") or ""

MANY = 10_000
SAMPLE = 10  # every one of so many is shown to dkimpy, which takes milliseconds; all are shown to our own verifier

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not POSTFIX or os.geteuid() != 0, reason="needs Postfix, and root to start an instance of its own"),
]

MAIN = POSTFIX_MAIN + "smtputf8_enable = yes\n"


class Relay:
    """A Postfix instance below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port: int = found.getsockname()[1]

    def start(self, sink: int, more: str = "") -> None:
        """Take mail for everybody and hand it to `sink`; `more` is added to main.cf."""
        for name in ("conf", "queue", "data"):
            (self.root / name).mkdir()
        shutil.chown(self.root / "data", "postfix")
        (self.root / "conf" / "main.cf").write_text(MAIN.format(root=self.root, sink=sink) + more)
        (self.root / "conf" / "master.cf").write_text(POSTFIX_MASTER.format(port=self.port))
        self._run("start", check=True)

    def stop(self) -> None:
        """End it, and only it."""
        self._run("stop", check=False)

    def _run(self, word: str, *, check: bool) -> None:
        done = subprocess.run([POSTFIX, "-c", str(self.root / "conf"), word], capture_output=True, text=True, timeout=60, check=False)
        log = self.root / "log"
        assert done.returncode == 0 or not check, done.stdout + done.stderr + (log.read_text() if log.exists() else "")


@pytest.fixture
def relay() -> Iterator[Relay]:
    """Not started; below a path that Postfix's own user can pass."""
    root = Path(tempfile.mkdtemp(prefix="sluice-pf-"))
    root.chmod(0o755)
    made = Relay(root)
    yield made
    made.stop()
    shutil.rmtree(root, ignore_errors=True)


async def test_both_signatures_verify_after_a_relay_has_had_the_mail(machine: Machine, pool: Pool, relay: Relay) -> None:
    machine.environment["SLUICE_SECRETS__KEY"] = SECRET
    await machine.sink()
    relay.start(machine.sink_port)
    campaign = await seed.campaign(
        pool, recipients=120, port=relay.port, state="draft", subject="Grüße  an {{ subscriber.first_name }}",
        text="{{ subscriber.first_name }}  \n.\n..\n" + "Łódź " * 300 + "\n\n", html="<p>{{ subscriber.first_name }}</p>\n \n",
    )  # fmt: skip
    await pool.execute("update subscribers set data = json_build_object('first_name', 'Zoë ' || repeat('ß ', (id % 40)::int))")
    keys = [await make_key(pool, "s1"), await make_key(pool, "e1", "ed25519-sha256")]
    await machine.engine()
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)
    await completed(machine, pool, campaign)

    async def arrived() -> bool:
        return int((await machine.sink_json("/api/v1/counters"))["messages"]) == 120

    await until(arrived, "all mail through the relay", 60, machine)
    records = {key.record_name: key.record for key in keys}
    for message in await sources(machine):
        assert b"by relay.example (Postfix)" in message
        assert verdicts(message, records) == [True, True]


class Mailbox:
    """What a relay hands on, for aiosmtpd."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    async def handle_DATA(self, server: object, session: object, envelope: Envelope) -> str:
        assert envelope.original_content is not None
        self.messages.append(envelope.original_content)
        return "250 ok"


def test_ten_thousand_varied_messages_verify_behind_a_relay(relay: Relay) -> None:
    box = Mailbox()
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    sink = Controller(box, hostname="127.0.0.1", port=port, enable_SMTPUTF8=True, data_size_limit=0)
    sink.start()
    try:
        relay.start(port, "in_flow_delay = 0\nsmtpd_client_connection_rate_limit = 0\n")
        rng = random.Random(8463)
        client = smtplib.SMTP("127.0.0.1", relay.port, timeout=60)
        for _ in range(MANY // 50):
            people = [recipient(n, f"p{rng.randint(1, 10**9)}@shore.example", first_name=said(rng, 200, line=True)) for n in range(1, 51)]
            for answer in varied(rng).build(people, composed_at=COMPOSED_AT, attempt=1):
                assert isinstance(answer, tuple)
                client.sendmail(answer[0].decode(), [answer[1].decode()], answer[2])
        client.quit()
        until = time.monotonic() + 300
        while len(box.messages) < MANY and time.monotonic() < until:
            time.sleep(0.2)
    finally:
        sink.stop()
    assert len(box.messages) == MANY
    keys = records("rsa", "ed")
    for place, message in enumerate(box.messages):
        assert b"by relay.example (Postfix)" in message
        assert [verdict.reason for verdict in plain(message, keys)] == ["", ""]
        if place % SAMPLE == 0:
            assert verdicts(message, keys) == [True, True]
