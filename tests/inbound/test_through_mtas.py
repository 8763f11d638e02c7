"""What comes back by way of real MTAs: a Postfix and an Exim that accept our mail and then bounce it, and carry what people write.

Engine, MTA, sink and inbound process are real. Each message ends in the right row, state, event and accounting line.
"""

import csv
import os
import re
import shutil
import smtplib
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.relays import POSTFIX_MASTER
from store.postgres import Pool
from tests.engine.test_campaign_end_to_end import completed
from tests.engine.test_connect import make_certificate
from tests.engine.test_signed_mail import SECRET, sources
from tests.engine.test_signed_through_postfix import MAIN, POSTFIX, Relay
from tests.machine import Machine, machine, until
from tests.store import seed

DOMAIN = "bounces.sender.example"  # the MFROM domain of `seed`
EXIM = os.environ.get("EXIM") or shutil.which("exim4", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""

pytestmark = pytest.mark.slow

EXIM_CONF = """\
exim_path = {exim}
primary_hostname = relay.example
spool_directory = {root}/spool
log_file_path = {root}/log-%s
pid_file_path = {root}/exim.pid
local_interfaces = 127.0.0.1
daemon_smtp_ports = {port}
acl_smtp_rcpt = take
acl_smtp_data = take
tls_advertise_hosts =
keep_environment =
deliver_drop_privilege = true
smtp_accept_max = 50
smtp_accept_queue_per_connection = 1000
queue_run_max = 4
recipients_max = 1000
begin acl
take:
  accept
begin routers
ours:
  driver = manualroute
  domains = {domain}
  route_list = * 127.0.0.1
  self = send
  transport = inbound
rest:
  driver = manualroute
  route_list = * 127.0.0.1
  self = send
  transport = sink
begin transports
inbound:
  driver = smtp
  allow_localhost
  port = {inbound}
sink:
  driver = smtp
  allow_localhost
  port = {sink}
begin retry
* * F,1h,5s
"""


class Postfix(Relay):
    """Hands everything to the sink, and what is for our return paths to us, by SMTP or LMTP and under TLS."""

    lmtp = False

    def start_between(self, sink: int, inbound: int) -> None:
        """Start."""
        for name in ("conf", "queue", "data"):
            (self.root / name).mkdir()
        shutil.chown(self.root / "data", "postfix")
        place = f"lmtp:inet:127.0.0.1:{inbound}" if self.lmtp else f"smtp:[127.0.0.1]:{inbound}"
        more = f"transport_maps = inline:{{ {DOMAIN}={place} }}\n"
        more += "".join(f"{kind}_tls_security_level = may\n{kind}_tls_loglevel = 1\n" for kind in ("smtp", "lmtp"))
        main = MAIN.format(root=self.root, sink=sink).replace("smtp_tls_security_level = none\n", "")
        (self.root / "conf" / "main.cf").write_text(main + more)
        (self.root / "conf" / "master.cf").write_text(POSTFIX_MASTER.format(port=self.port) + "lmtp unix - - n - - lmtp\n")
        self._run("start", check=True)

    def said(self) -> str:
        """Its log."""
        log = self.root / "log"
        return log.read_text() if log.exists() else ""


class Exim:
    """An instance below one directory, in a mount namespace where its user exists."""

    lmtp = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.process: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port: int = found.getsockname()[1]

    def start_between(self, sink: int, inbound: int) -> None:
        """Start."""
        conf = self.root / "exim.conf"
        conf.write_text(EXIM_CONF.format(exim=EXIM, root=self.root, port=self.port, sink=sink, inbound=inbound, domain=DOMAIN))
        for name, line in (("passwd", "Debian-exim:x:65000:65000::/:/bin/false\n"), ("group", "Debian-exim:x:65000:\n")):
            (self.root / name).write_text(Path("/etc", name).read_text() + line)
        (self.root / "spool").mkdir()
        os.chown(self.root / "spool", 65000, 65000)
        os.chown(self.root, 65000, 65000)
        mount = " && ".join(f"mount --bind {self.root}/{name} /etc/{name}" for name in ("passwd", "group"))
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", f"{mount} && exec {EXIM} -C {conf} -bdf -q5s"],
            stdout=subprocess.DEVNULL, stderr=(self.root / "errors").open("wb"),
        )  # fmt: skip

    def stop(self) -> None:
        """End it, and only it."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)

    def said(self) -> str:
        """Its logs."""
        return "".join(path.read_text() for path in (*self.root.glob("log-*"), self.root / "errors") if path.exists())


@pytest.fixture(params=["postfix", "postfix with lmtp", "exim"])
def relay(request: pytest.FixtureRequest) -> Iterator[Postfix | Exim]:
    if os.geteuid() != 0 or not (EXIM if request.param == "exim" else POSTFIX):
        pytest.skip(f"needs {request.param} (for Exim also as EXIM=/path/to/exim4), and root to start an instance of its own")
    root = Path(tempfile.mkdtemp(prefix="sluice-mta-"))
    root.chmod(0o755)
    made: Postfix | Exim = Exim(root) if request.param == "exim" else Postfix(root)
    made.lmtp = "lmtp" in request.param
    yield made
    made.stop()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
async def fleet(tmp_path: Path, fresh_database_url: str, redis_url: str, redis: Any) -> AsyncIterator[Machine]:
    async with machine(tmp_path, fresh_database_url, redis_url) as made:
        yield made


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def header(source: bytes, name: str) -> str:
    found = re.search(rb"^" + name.encode() + rb":((?:[^\n]*\n[ \t])*[^\n]*)", source, re.IGNORECASE | re.MULTILINE)
    assert found is not None, name
    return re.sub(r"\s+", " ", found[1].decode()).strip()


def write(port: int, sender: str, recipient: str, mail: str) -> None:
    """A person's or provider's mail, by way of the MTA."""
    with smtplib.SMTP("127.0.0.1", port, local_hostname="reader.example", timeout=30) as client:
        client.sendmail(sender, [recipient], mail.replace("\r\n", "\n").replace("\n", "\r\n").encode())


def lines(directory: Path, kind: str) -> list[dict[str, str]]:
    """The records of one kind in all accounting files."""
    return [
        row for path in sorted(directory.rglob("*.csv")) for row in csv.DictReader(path.read_text().splitlines()) if row.get("type") == kind
    ]


async def test_what_a_real_mta_brings_back_ends_where_it_belongs(fleet: Machine, pool: Pool, relay: Postfix | Exim) -> None:
    fleet.environment |= {"SLUICE_SECRETS__KEY": SECRET, "SLUICE_NODE__NAME": "mx.sender.example"}
    await fleet.sink()
    smtp_port, lmtp_port = free_port(), free_port()
    make_certificate(fleet.directory, "mx.sender.example")
    await pool.execute("insert into forwarding (aliases) values ($1)", f"reply@{DOMAIN}:support@ours.example\n")
    await fleet.start(
        "inbound", "inbound", SLUICE_INBOUND__SMTP_PORT=str(smtp_port), SLUICE_INBOUND__LMTP_PORT=str(lmtp_port),
        SLUICE_INBOUND__HTTP_PORT=str(free_port()), SLUICE_INBOUND__TLS_CERTIFICATE_FILE=str(fleet.directory / "mx.sender.example.pem"),
    )  # fmt: skip
    relay.start_between(fleet.sink_port, lmtp_port if relay.lmtp else smtp_port)
    campaign = await seed.campaign(pool, recipients=40, port=relay.port, state="draft", subject="News", text="Hello")
    await pool.execute("update subscribers set email = 'bounce+' || email, email_key = 'bounce+' || email_key where id % 10 = 0")
    await pool.execute("update subscribers set email = 'full+' || email, email_key = 'full+' || email_key where id % 10 = 5 and id < 8")
    await fleet.engine()
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)
    await completed(fleet, pool, campaign)

    async def handled(count: int) -> list[Any]:
        async def enough() -> list[Any]:
            rows = await pool.fetch("select * from inbound_messages where handled_at is not null order by id")
            return rows if len(rows) >= count else []

        try:
            return list(await until(enough, f"{count} messages handled", 60, fleet))
        except AssertionError as failure:
            raise AssertionError(f"{failure}\n{relay.said()}") from None

    # Bounces: the MTA took the mail, the next server refused it
    rows = await handled(5)
    assert {(row["kind"], row["mail_from"]) for row in rows} == {("dsn", "")}
    assert sorted(row["outcome"] for row in rows) == ["acted"] * 4 + ["recorded"], [row["reason"] for row in rows]  # one is soft
    events = await pool.fetch("select f.*, s.state, s.email from feedback f join recipients r using (campaign_id, number) "
                              "join subscribers s on s.id = r.subscriber_id where f.kind = 'rb' order by s.id")  # fmt: skip
    assert len(events) == 5
    for event in events:
        hard = event["email"].startswith("bounce+")
        assert event["effect"] == ("hard" if hard else "soft"), dict(event)
        assert event["state"] == ("bounced" if hard else "subscribed")
        assert event["status"] == ("5.1.1" if hard else "5.2.2")
        assert event["category"] == ("bad-mailbox" if hard else "quota-issues")
    assert await pool.fetchval("select count(*) from suppressions where reason = 'bounced'") == 4

    port = lmtp_port if relay.lmtp else smtp_port
    under_tls = rf"TLS connection established to 127\.0\.0\.1\[127\.0\.0\.1\]:{port}:|=> b-[^\n]* X=TLS"
    assert re.search(under_tls, relay.said()), relay.said()

    # A complaint with the message as it arrived, by a provider that reports to abuse@
    arrived = {header(source, "To"): source for source in await sources(fleet)}
    complained = next(source for to, source in arrived.items() if "p21@" in to)
    write(relay.port, "feedback@provider.example", f"abuse@{DOMAIN}", (
        f"From: feedback@provider.example\nTo: abuse@{DOMAIN}\nSubject: FW: News\nMIME-Version: 1.0\n"
        'Content-Type: multipart/report; report-type=feedback-report; boundary="y"\n\n'
        "--y\nContent-Type: text/plain\n\nThis is an abuse report.\n--y\nContent-Type: message/feedback-report\n\n"
        "Feedback-Type: abuse\nUser-Agent: Provider/1\nVersion: 1\nSource-IP: 192.0.2.7\n\n"
        "--y\nContent-Type: message/rfc822\n\n" + complained.decode() + "\n--y--\n"
    ))  # fmt: skip
    # A request to be taken off the list, to the address in List-Unsubscribe
    asked = next(source for to, source in arrived.items() if "p22@" in to)
    mailto = re.search(r"mailto:([^?>]+)", header(asked, "List-Unsubscribe"))
    assert mailto is not None
    write(relay.port, "p22@people.example", mailto[1], f"From: p22@people.example\nTo: {mailto[1]}\nSubject: unsubscribe\n\n\n")
    # An answer of a person
    answered = next(source for to, source in arrived.items() if "p23@" in to)
    write(relay.port, "p23@people.example", f"reply@{DOMAIN}", (
        f"From: p23@people.example\nTo: reply@{DOMAIN}\nSubject: Re: News\nIn-Reply-To: {header(answered, 'Message-ID')}\n\nThank you!\n"
    ))  # fmt: skip
    rows = await handled(8)
    found = {row["kind"]: row for row in rows[5:]}
    assert {kind: row["outcome"] for kind, row in found.items()} == {"arf": "acted", "unsubscribe": "acted", "reply": "kept"}, [
        (row["kind"], row["outcome"], row["reason"]) for row in rows[5:]
    ]
    rows = await pool.fetch("select split_part(email, '@', 1) as name, state from subscribers where email ~ '^p2[1234]@'")
    states = {row["name"]: row["state"] for row in rows}
    assert states == {"p21": "unsubscribed", "p22": "unsubscribed", "p23": "subscribed", "p24": "subscribed"}
    assert await pool.fetchval("select count(*) from suppressions where reason = 'complained'") == 1

    # The answer goes on to who reads it, through the same delivery server, under a sender of ours
    async def forwarded() -> list[Any]:
        listed = (await fleet.sink_json("/api/v1/messages?query=support@ours.example"))["messages"]
        return [each for each in listed if each["recipients"] == ["support@ours.example"]]

    [message] = await until(forwarded, "the answer forwarded", 30, fleet)
    assert re.fullmatch(rf"SRS0=[A-Z2-7]{{8}}=[A-Z2-7]{{2}}=people\.example=p23@{re.escape(DOMAIN)}", message["mail_from"])

    # And in the accounting files: one line for each, with what was found
    async def written() -> bool:
        return len(lines(fleet.directory, "rb")) == 5 and len(lines(fleet.directory, "f")) == 1

    await until(written, "accounting lines", 30, fleet)
    assert sorted(row["bounceCat"] for row in lines(fleet.directory, "rb")) == ["bad-mailbox"] * 4 + ["quota-issues"]
    [complaint] = lines(fleet.directory, "f")
    assert (complaint["feedbackType"], complaint["rcpt"]) == ("abuse", "p21@people.example")
