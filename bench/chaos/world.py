"""What surrounds a fleet and can be harmed, too: its clocks, its name server, its certificates, a network that loses packets, its memory.

Each needs something of the machine (`why_not` says what, and what to install); nothing is left behind when the fleet ends.
"""

import asyncio
import contextlib
import ipaddress
import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from domain.errors import Unavailable

ZONE: Final = "chaos.test"
_RESOLV: Final = Path("/etc/resolv.conf")
_MANY_RECORDS: Final = 1000
_UDP_OCTETS: Final = 512
_GROUPS: Final = (  # memory controller of version 1, then of version 2
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)


# --- clocks -----------------------------------------------------------------------------------------------------------------


def faketime_library() -> Path | None:
    """Where libfaketime is, in the form for programs with threads."""
    for pattern in ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib*/faketime/libfaketimeMT.so.1"):
        for found in sorted(Path("/").glob(pattern[1:])):
            return found
    return None


class Clock:
    """The wall clock of one process that was started with `environment`; its monotonic clock is left alone."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set("+0")

    def set(self, text: str) -> None:
        """`+3600` seconds ahead, `-3600` behind, or `2026-01-31 12:00:00` (UTC) for a clock that stands still."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self._file)  # never seen empty

    def environment(self) -> dict[str, str]:
        """For the process."""
        return {
            "LD_PRELOAD": str(faketime_library()),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",  # seconds; without it the file would be opened at every look at the clock
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "TZ": "UTC",
        }


# --- names ------------------------------------------------------------------------------------------------------------------


class NameServer(asyncio.DatagramProtocol):
    """Answers for every name below `ZONE`, well or badly: `mode` is good, servfail, silent, nxdomain, many or loop."""

    def __init__(self, resolv: Path) -> None:
        self.mode = "good"
        self.asked = 0
        self.address = ""
        self.resolv = resolv  # a resolv.conf that names this server
        self._transport: asyncio.DatagramTransport | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen at port 53 of a loopback address of our own. Raises Unavailable."""
        loop = asyncio.get_running_loop()
        for number in range(os.getpid(), os.getpid() + 100):
            address = f"127.53.{number >> 8 & 255}.{number % 254 + 1}"
            try:
                self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=(address, 53))
                self._server = await asyncio.start_server(self._stream, address, 53)
            except OSError:
                await self.stop()
                continue
            self.address = address
            self.resolv.write_text(f"nameserver {address}\noptions timeout:1 attempts:2\n")
            return
        raise Unavailable("no loopback address with a free port 53 for the name server")

    async def stop(self) -> None:
        """No more answers."""
        if self._transport is not None:
            self._transport.close()
        if self._server is not None:
            self._server.close()
        self._transport = self._server = None

    def command(self, argv: Sequence[str]) -> tuple[str, ...]:
        """`argv` in a mount namespace of its own in which this server is the one to ask."""
        script = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
        return ("unshare", "--mount", "sh", "-c", script, str(self.resolv), *argv)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """One question by UDP."""
        answer = self._answer(data)
        if answer is None or self._transport is None:
            return
        wire = answer.to_wire()
        if len(wire) > _UDP_OCTETS:
            answer.answer.clear()
            answer.flags |= dns.flags.TC
            wire = answer.to_wire()
        self._transport.sendto(wire, addr)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(10.0):
                while True:
                    length = int.from_bytes(await reader.readexactly(2), "big")
                    answer = self._answer(await reader.readexactly(length))
                    if answer is not None:
                        wire = answer.to_wire()
                        writer.write(len(wire).to_bytes(2, "big") + wire)
        except (OSError, EOFError, TimeoutError):
            pass
        finally:
            writer.close()

    def _answer(self, data: bytes) -> dns.message.Message | None:
        self.asked += 1
        try:
            question = dns.message.from_wire(data)
        except dns.exception.DNSException:
            return None
        if self.mode == "silent" or not question.question:
            return None
        answer = dns.message.make_response(question)
        answer.flags |= dns.flags.RA
        name, kind = question.question[0].name, question.question[0].rdtype
        if self.mode in ("servfail", "nxdomain"):
            answer.set_rcode(dns.rcode.from_text(self.mode))
        elif self.mode == "loop":
            other = f"loop.{name}"
            answer.answer = [dns.rrset.from_text(name, 1, "IN", "CNAME", other), dns.rrset.from_text(other, 1, "IN", "CNAME", str(name))]
        elif kind == dns.rdatatype.A:
            many = [f"127.44.{n >> 8}.{n & 255}" for n in range(1, _MANY_RECORDS)] if self.mode == "many" else []
            answer.answer = [dns.rrset.from_text_list(name, 1, "IN", "A", [*many, "127.0.0.1"])]
        return answer


# --- certificates -----------------------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority that only this fleet trusts (`file`, for SSL_CERT_FILE)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "chaos authority")])
        self.file = directory / "authority.pem"
        self.file.write_bytes(self._signed(self._name, self._key.public_key(), (), 30).public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, hosts: Sequence[str], days: int) -> tuple[str, ...]:
        """The options of a sink with a certificate for `hosts`; negative `days`: it expired that long ago."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
        chain, secret = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        chain.write_bytes(self._signed(subject, key.public_key(), hosts, days).public_bytes(serialization.Encoding.PEM))
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        secret.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
        return ("--certificate", str(chain), "--key", str(secret))

    def _signed(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, hosts: Sequence[str], days: int) -> x509.Certificate:
        end = datetime.now(UTC) + timedelta(days=days)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(datetime.now(UTC), end) - timedelta(days=1))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=not hosts, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


# --- packets ----------------------------------------------------------------------------------------------------------------


class Network:
    """A network namespace behind a pair of virtual interfaces, in which the sinks live and packets can be lost."""

    def __init__(self) -> None:
        self.name = ""
        self.address = ""  # of the inside
        self._outside = ""

    async def start(self) -> None:
        """Make it. Raises Unavailable."""
        for number in range(os.getpid(), os.getpid() + 50):
            net = ipaddress.ip_network(("198.18.0.0", 15)).network_address + 4 * (number % 32768)
            self.name, self._outside, inside = f"chaos-{number}", f"cho{number}", f"chi{number}"
            if (await _run("ip", "netns", "add", self.name))[0]:
                continue
            self.address = str(net + 2)
            for command in (
                f"ip link add {self._outside} type veth peer name {inside} netns {self.name}",
                f"ip address add {net + 1}/30 dev {self._outside}",
                f"ip link set {self._outside} up",
                f"ip -n {self.name} address add {net + 2}/30 dev {inside}",
                f"ip -n {self.name} link set {inside} up",
                f"ip -n {self.name} link set lo up",
            ):
                code, said = await _run(*command.split())
                if code:
                    await self.stop()
                    raise Unavailable(f"{command}: {said}")
            return
        raise Unavailable("no network namespace could be made")

    def command(self, argv: Sequence[str]) -> tuple[str, ...]:
        """`argv`, inside."""
        return ("ip", "netns", "exec", self.name, *argv)

    async def lose(self, percent: int, ports: Sequence[int]) -> None:
        """That many of a hundred packets from and to these ports vanish, each way. Raises Unavailable."""
        many = ", ".join(str(port) for port in ports)
        rules = "table inet chaos {\n"
        for hook, side in (("input", "dport"), ("output", "sport")):
            rules += (
                f"  chain {hook} {{ type filter hook {hook} priority 0; "
                f"tcp {side} {{ {many} }} numgen random mod 100 < {percent} counter drop; }}\n"
            )
        code, said = await _run("ip", "netns", "exec", self.name, "nft", "-f", "-", stdin=rules + "}\n")
        if code:
            raise Unavailable(f"nft: {said}")

    async def lost(self) -> int:
        """Packets that vanished since `lose`."""
        _, said = await _run("ip", "netns", "exec", self.name, "nft", "list", "table", "inet", "chaos")
        words = said.split()
        return sum(int(after) for word, after in itertools.pairwise(words) if word == "packets")

    async def heal(self) -> None:
        """Nothing is lost any more."""
        await _run("ip", "netns", "exec", self.name, "nft", "flush", "ruleset")

    async def stop(self) -> None:
        """Take it away."""
        if self.name:
            await _run("ip", "link", "delete", self._outside)
            await _run("ip", "netns", "delete", self.name)
            self.name = ""


# --- memory -----------------------------------------------------------------------------------------------------------------


class MemoryGroup:
    """A control group whose processes get no page more."""

    def __init__(self) -> None:
        self._directory = Path()

    def start(self) -> None:
        """Make it. Raises OSError."""
        root, limit = _memory_controller() or _GROUPS[0]
        self._directory = root / f"sluice-chaos-{os.getpid()}-{id(self):x}"
        self._directory.mkdir()
        (self._directory / limit).write_text("0")

    def take(self, pid: int) -> None:
        """From now on the kernel ends this process when it needs one more page. Raises OSError."""
        (self._directory / "cgroup.procs").write_text(str(pid))

    def stop(self) -> None:
        """Take it away once its processes are gone."""
        with contextlib.suppress(OSError):
            self._directory.rmdir()


def _memory_controller() -> tuple[Path, str] | None:
    for root, limit in _GROUPS:
        if limit == "memory.max":
            with contextlib.suppress(OSError):
                if "memory" in (root / "cgroup.subtree_control").read_text().split() and os.access(root, os.W_OK):
                    return root, limit
        elif (root / limit).exists() and os.access(root, os.W_OK):
            return root, limit
    return None


# --- what the machine can do ------------------------------------------------------------------------------------------------


def why_not(need: str) -> str:
    """What is missing here for a need of a fault; empty when nothing is."""
    root = os.geteuid() == 0
    if need == "faketime" and faketime_library() is None:
        return "needs libfaketime (Debian: apt-get install libfaketime)"
    if need in ("named", "verified"):
        if not root or shutil.which("unshare") is None or not _RESOLV.exists() or not _works("unshare", "--mount", "true"):
            return "needs root, unshare and the right to make a mount namespace (Debian: util-linux)"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("127.53.0.1", 53))
            except OSError as error:
                return f"needs port 53 of a loopback address: {error.strerror}"
    if need == "lossy":
        if shutil.which("nft") is None or shutil.which("ip") is None:
            return "needs nftables and iproute2 (Debian: apt-get install nftables iproute2)"
        if not root or not _works("unshare", "--net", "nft", "list", "ruleset"):
            return "needs root and the right to make a network namespace with packet filters"
    if need in ("small-journal", "small-postgres") and not (root and _works("unshare", "--mount", "mount", "-t", "tmpfs", "none", "/tmp")):
        return "needs root and the right to mount a tmpfs"
    if need == "strace" and not _can_trace():
        return "needs strace and the right to trace a process (Debian: apt-get install strace)"
    if need == "memory-group" and (not root or _memory_controller() is None):
        return "needs root and a writable memory controller in /sys/fs/cgroup"
    return ""


def _can_trace() -> bool:
    return _works("strace", "-qq", "-o", "/dev/null", "-e", "trace=none", "-e", "inject=fsync:error=EIO", "true")


def _works(*command: str) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


async def _run(*command: str, stdin: str = "") -> tuple[int, str]:
    """Exit code and what it said."""
    done = await asyncio.to_thread(
        subprocess.run, command, input=stdin.encode(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=20.0
    )
    return done.returncode, done.stdout.decode(errors="replace").strip()
