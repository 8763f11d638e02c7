"""`python -m bench.sink`: the SMTP sink that plays the mailbox providers, with its mailbox page and JSON API.

Owns the options, the listeners, the certificate, the accepted log and the life of the process. The protocol is
`bench.sink_protocol`, the scripted answers `bench.sink_script`, the HTTP side `bench.mailbox`. docs/sink.md is its manual.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import ssl
import sys
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from bench import sink_script
from bench.sink_protocol import Sink, SinkProtocol, describe_tls
from domain.errors import ConfigurationError

LOG_FLUSH_SECONDS: Final = 0.2
SWEEP_SECONDS: Final = 5.0
HANDSHAKE_SECONDS: Final = 10.0
# Entries of the duplicate set, 8 octets each in a table that is at most half full: 16,777,216 need 256 MiB, 1,000,000 need 16 MiB.
DEFAULT_MAX_TRACKED: Final = 1 << 24


class SinkOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be chosen at start. Sizes in octets; ports 0 = any free one."""

    host: str = "127.0.0.1"
    port: int = 1025
    http_port: int = 1080
    tls_port: int | None = None  # a second listener with TLS from the first octet
    hostname: str = "sink.example"
    pipelining: bool = True
    chunking: bool = True
    eightbitmime: bool = True
    smtputf8: bool = True
    size: bool = True
    starttls: bool = True
    auth: bool = True
    enhancedstatuscodes: bool = True
    users: dict[str, str] = msgspec.field(default_factory=dict)
    auth_needs_tls: bool = False
    require_tls: bool = False
    allow_bare_newlines: bool = False
    certificate: Path | None = None
    key: Path | None = None
    certificate_name: str = "localhost"
    certificate_days: int = 30  # negative: expired that long ago
    write_certificate: Path | None = None
    reply_delay_ms: float = 0.0
    idle_timeout_seconds: float = 300.0
    max_connections: int = 10_000
    max_message_bytes: int = 32 << 20
    max_recipients: int = 1_000
    max_messages_per_connection: int = 0  # 0 = no limit
    script: Path | None = None
    tokens: bool = True
    keep: int = 500
    keep_bytes: int = 128 << 20
    track_duplicates: bool = True
    max_tracked: int = DEFAULT_MAX_TRACKED
    accepted: Path | None = None
    accepted_before_reply: bool = False


class RunningSink:
    """One sink with its sockets open. `start` opens them, `stop` closes them; `counters` may be asked at any time."""

    def __init__(self, options: SinkOptions, loop: asyncio.AbstractEventLoop) -> None:
        self.options = options
        self.loop = loop
        self.started = time.time()
        script = sink_script.load(options.script)
        script.tokens_on = options.tokens
        self._log = -1
        if options.accepted is not None:
            self._log = os.open(options.accepted, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._context: ssl.SSLContext | None = None
        if options.starttls or options.tls_port is not None:
            self._context = make_context(options)
        self._handshakes: set[asyncio.Task[None]] = set()
        self.sink = Sink(options, script, loop, self._upgrade, None if self._log < 0 else self._write_log, sink_script.TOKEN_PREFIXES)
        self._servers: list[asyncio.Server] = []
        self._timers: list[asyncio.TimerHandle] = []
        self.port = 0
        self.tls_port = 0

    async def start(self) -> None:
        """Open the SMTP listeners. Raises OSError where a port is taken."""
        backlog = 4096  # thousands of connections may come at once
        server = await self.loop.create_server(self._new_protocol, self.options.host, self.options.port, backlog=backlog)
        self._servers.append(server)
        self.port = server.sockets[0].getsockname()[1]
        if self.options.tls_port is not None:
            server = await self.loop.create_server(
                self._new_protocol,
                self.options.host,
                self.options.tls_port,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                backlog=backlog,
            )
            self._servers.append(server)
            self.tls_port = server.sockets[0].getsockname()[1]
        self._flush_again()
        self._sweep_again()

    async def stop(self) -> None:
        """Say 421 to everybody, write the rest of the accepted log and close."""
        for server in self._servers:
            server.close()
        for timer in self._timers:
            timer.cancel()
        for protocol in self.sink.open_protocols():
            protocol.goodbye(b"421 4.3.2 The sink stops\r\n")
        for task in list(self._handshakes):
            task.cancel()
        await asyncio.sleep(0.02)  # the 421s leave at the end of this turn of the loop
        for protocol in self.sink.open_protocols():
            if protocol.transport is not None:
                protocol.transport.abort()
        if self._log >= 0:
            self.sink.flush_log()
            os.close(self._log)
            self._log = -1

    def counters(self) -> dict[str, Any]:
        """Everything counted since start or the last reset, as plain JSON types. Times in seconds, sizes in octets."""
        sink, usage = self.sink, resource.getrusage(resource.RUSAGE_SELF)
        busiest = sorted(sink.domains.values(), key=lambda one: -(one.accepted + one.deferred + one.refused + one.dropped))[:100]
        return {
            "connections": {
                "now": sink.connections_now,
                "max": sink.connections_max,
                "total": sink.connections_total,
                "refused": sink.connections_refused,
            },
            "messages": sink.messages,
            "recipients": sink.recipients,
            "bytes": sink.bytes,
            "verdicts": {
                "accepted": sink.recipients,
                "deferred": sink.deferred,
                "refused": sink.refused,
                "dropped": sink.dropped,
                "hung": sink.hung,
            },
            "replies": dict(sorted(sink.replies.items())),
            "domains": {
                one.name: {"accepted": one.accepted, "deferred": one.deferred, "refused": one.refused, "dropped": one.dropped}
                for one in busiest
            },
            "domains_seen": len(sink.domains),
            "duplicates": sink.duplicates,
            "duplicates_tracked": sink.tracked,
            "duplicates_untracked": sink.duplicates_untracked,
            "without_message_id": sink.without_message_id,
            "violations": {
                "bare_newlines": sink.bare_newlines,
                "long_lines": sink.long_lines,
                "nul_octets": sink.nul_octets,
                "undeclared_8bit": sink.undeclared_8bit,
                "protocol_errors": sink.protocol_errors,
            },
            "reads": sink.reads,
            "accepted_lines": sink.accepted_lines,
            "kept": len(sink.kept()),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 6),
            "max_rss_bytes": usage.ru_maxrss * 1024,
            "uptime_seconds": round(time.time() - self.started, 3),
        }

    def set_rules(self, rules: list[sink_script.Rule]) -> None:
        """Replace the script's rules while running."""
        self.sink.script.set_rules(rules)
        self.sink.rules_changed()

    def _new_protocol(self) -> asyncio.Protocol:
        # Duck-typed: a Cython class cannot inherit from asyncio.Protocol, and the loop only asks for the methods.
        return self.sink.new_protocol()  # type: ignore[return-value]

    def _write_log(self, lines: bytes) -> None:
        view = memoryview(lines)
        while view:
            view = view[os.write(self._log, view) :]

    def _flush_again(self) -> None:
        self.sink.flush_log()
        self._timers = [self.loop.call_later(LOG_FLUSH_SECONDS, self._flush_again), *self._timers[1:]]

    def _sweep_again(self) -> None:
        self.sink.sweep(max(1, int(self.options.idle_timeout_seconds / SWEEP_SECONDS)))
        self._timers = [*self._timers[:1], self.loop.call_later(SWEEP_SECONDS, self._sweep_again)]

    def _upgrade(self, protocol: SinkProtocol) -> None:
        task = self.loop.create_task(self._handshake(protocol))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _handshake(self, protocol: SinkProtocol) -> None:
        assert self._context is not None
        try:
            transport = await self.loop.start_tls(
                protocol.transport,
                protocol,  # type: ignore[arg-type]
                self._context,
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
            )
        except (OSError, ssl.SSLError, asyncio.CancelledError):
            protocol.abandon()
            return
        if transport is None:
            protocol.abandon()
            return
        protocol.secured(transport, describe_tls(transport.get_extra_info("ssl_object")))


def make_context(options: SinkOptions) -> ssl.SSLContext:
    """The TLS server context: the given certificate, or one made now. Raises ConfigurationError where the files do not fit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if options.certificate is not None:
        try:
            context.load_cert_chain(options.certificate, options.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError([f"--certificate {options.certificate}: cannot be used: {error}"]) from error
        return context
    import tempfile

    certificate, key = make_certificate(options.certificate_name, options.certificate_days)
    # load_cert_chain takes files only; this one is gone again before anybody connects.
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write(key + certificate)
        file.flush()
        context.load_cert_chain(file.name)
    if options.write_certificate is not None:
        options.write_certificate.write_bytes(certificate)
    return context


def make_certificate(name: str, days: int) -> tuple[bytes, bytes]:
    """A self-signed certificate for `name`, localhost and the loopback addresses; (certificate, key) as PEM.

    Negative `days`: it expired that long ago. With another name than localhost the loopback names are left out, so that a
    client that checks names refuses it.
    """
    from datetime import UTC, datetime, timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    if name == "localhost":
        names += [x509.IPAddress(ip_address(text)) for text in ("127.0.0.1", "::1")]
    end = datetime.now(UTC) + timedelta(days=days)
    start = min(datetime.now(UTC), end) - timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return (
        certificate.public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def parser() -> argparse.ArgumentParser:
    """The options of `python -m bench.sink`; `sluice sink` hands the same ones on."""
    defaults = SinkOptions()
    made = argparse.ArgumentParser(
        prog="sluice sink", usage="%(prog)s [options]", description="Takes all mail, answers as scripted, shows what came."
    )
    add = made.add_argument
    add("--host", default=defaults.host, help="address to listen on (%(default)s); 0.0.0.0 shows the mail to the whole network")
    add("--port", type=_port, default=defaults.port, help="SMTP port (%(default)s); 0 = any free one")
    add("--http-port", type=_port, default=defaults.http_port, help="port of the mailbox page and the API (%(default)s); 0 = any free one")
    add("--tls-port", type=_port, help="a second SMTP port with TLS from the first octet (off)")
    add("--hostname", default=defaults.hostname, help="name in the greeting (%(default)s)")
    for name in ("pipelining", "chunking", "8bitmime", "smtputf8", "size", "starttls", "auth", "enhancedstatuscodes"):
        add(f"--no-{name}", dest="eightbitmime" if name == "8bitmime" else name, action="store_false", help=f"do not offer {name.upper()}")
    add(
        "--user",
        dest="users",
        action="append",
        default=[],
        metavar="USER:PASSWORD",
        help="require this login (repeatable); else any is taken, none required",
    )
    add("--auth-needs-tls", action="store_true", help="offer AUTH inside TLS only")
    add("--require-tls", action="store_true", help="refuse MAIL outside TLS")
    add("--allow-bare-newlines", action="store_true", help="take messages with a bare CR, bare LF or NUL (still counted)")
    add("--certificate", type=Path, help="PEM certificate chain (default: a self-signed one made at start)")
    add("--key", type=Path, help="PEM key of --certificate")
    add("--certificate-name", default=defaults.certificate_name, help="name in the self-signed certificate (%(default)s)")
    add("--certificate-days", type=int, default=defaults.certificate_days, help="its validity (%(default)s); negative = expired")
    add("--write-certificate", type=Path, help="write the self-signed certificate here, for clients that shall trust it")
    add(
        "--reply-delay",
        dest="reply_delay_ms",
        type=_not_negative,
        default=defaults.reply_delay_ms,
        metavar="MS",
        help="every answer comes that much later",
    )
    add(
        "--idle-timeout",
        dest="idle_timeout_seconds",
        type=_not_negative,
        default=defaults.idle_timeout_seconds,
        metavar="SECONDS",
        help="close silent connections (%(default)s)",
    )
    add("--max-connections", type=_count, default=defaults.max_connections, help="421 beyond (%(default)s)")
    add("--max-message-bytes", type=_count, default=defaults.max_message_bytes, help="552 beyond; announced as SIZE (%(default)s)")
    add("--max-recipients", type=_count, default=defaults.max_recipients, help="452 beyond, per message (%(default)s)")
    add(
        "--max-messages-per-connection",
        type=_count,
        default=defaults.max_messages_per_connection,
        help="421 beyond; 0 = no limit (%(default)s)",
    )
    add("--script", type=Path, help="TOML file with [[rule]] tables")
    add("--no-tokens", dest="tokens", action="store_false", help="addresses such as defer2+x@… mean nothing special")
    add("--keep", type=_count, default=defaults.keep, help="messages kept for the mailbox page (%(default)s)")
    add("--keep-bytes", type=_count, default=defaults.keep_bytes, help="octets kept for it at most (%(default)s)")
    add("--track-duplicates", action=argparse.BooleanOptionalAction, default=True, help="count second copies by Message-ID and recipient")
    add("--max-tracked", type=_count, default=defaults.max_tracked, help="pairs remembered for that, 16 octets each (%(default)s)")
    add("--accepted", type=Path, metavar="FILE", help="append one JSON line per accepted message and recipient")
    add("--accepted-before-reply", action="store_true", help="write those lines before the 250 leaves, not every 0.2 s")
    add("--json", action="store_true", help="ready line and final counters as JSON objects")
    return made


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is no port; use 0 to 65535")
    return port


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more")
    return number


def options_from(arguments: argparse.Namespace) -> SinkOptions:
    """Checked options. Raises ConfigurationError with a sentence per problem."""
    values = {name: value for name, value in vars(arguments).items() if name != "json"}
    users: dict[str, str] = {}
    problems: list[str] = []
    for entry in values["users"]:
        name, colon, password = entry.partition(":")
        if not (colon and name and password):
            problems.append("--user: write USER:PASSWORD")
        users[name] = password
    if (values["certificate"] is None) != (values["key"] is None) and values["certificate"] is None:
        problems.append("--key: needs --certificate")
    if values["require_tls"] and not values["starttls"] and values["tls_port"] is None:
        problems.append("--require-tls: nobody could send with --no-starttls and without --tls-port")
    if users and not values["auth"]:
        problems.append("--user: nobody could log in with --no-auth")
    if problems:
        raise ConfigurationError(problems)
    values["users"] = users
    return SinkOptions(**values)


async def serve(options: SinkOptions, *, as_json: bool) -> None:
    """Run until SIGTERM or SIGINT. Prints the ready line when both ports answer, and with `as_json` the counters at the end."""
    from bench.mailbox import MailboxServer

    loop = asyncio.get_running_loop()
    running = RunningSink(options, loop)
    await running.start()
    listener = socket.create_server((options.host, options.http_port), family=socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    http_port = listener.getsockname()[1]
    mailbox = MailboxServer(running, listener)
    await mailbox.start()
    finished = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, finished.set)
    host = f"[{options.host}]" if ":" in options.host else options.host
    if as_json:
        ready = {"ready": True, "smtp": f"{host}:{running.port}", "http": f"{host}:{http_port}", "pid": os.getpid()}
        if options.tls_port is not None:
            ready["smtps"] = f"{host}:{running.tls_port}"
        print(json.dumps(ready), flush=True)
    else:
        more = "" if options.tls_port is None else f" smtps={host}:{running.tls_port}"
        print(f"sink ready smtp={host}:{running.port} http={host}:{http_port}{more}", flush=True)
    await finished.wait()
    await mailbox.stop()
    await running.stop()
    if as_json:
        print(json.dumps(running.counters()), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 stopped by a signal, 1 a port cannot be opened, 2 options or script refused."""
    parsed = parser().parse_args(arguments)
    import uvloop

    try:
        options = options_from(parsed)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, contextlib.suppress(KeyboardInterrupt):
            runner.run(serve(options, as_json=parsed.json))
    except ConfigurationError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        ports = f"ports {parsed.port} and {parsed.http_port} of {parsed.host}"
        print(f"the sink cannot listen on {ports}: {why}; stop what uses them, or choose with --port and --http-port", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
