"""Relays that a newsletter could be sent through: Postfix (with and without opendkim), Haraka. Each runs privately, below one directory.

smtp-source hands them constant octets, they keep them on disk, and the sink takes them; what counts is the CPU of all processes of
the relay from the first message until the sink has the last one. Receiving and the disk queue are in it: that is how a relay is used.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench import measure
from bench.measure import Sample
from bench.peers import Peers, new_key

SIGNING_DOMAIN: Final = "harbour.example"  # of smtp-source's sender
_PATIENCE_SECONDS: Final = 120.0
_START_SECONDS: Final = 20.0
WARM_UP: Final = 100

POSTFIX_MASTER: Final = """\
127.0.0.1:{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
smtp unix - - n - - smtp
relay unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""

# Postfix's own defaults but for where it lies and where it sends
POSTFIX_MAIN: Final = """\
compatibility_level = 3.6
queue_directory = {root}/queue
data_directory = {root}/data
maillog_file = {root}/log
maillog_file_prefixes = {root}
mail_owner = postfix
myhostname = relay.example
mydestination =
local_recipient_maps =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
smtpd_relay_restrictions = permit_mynetworks, reject
relayhost = [127.0.0.1]:{sink}
smtp_tls_security_level = none
smtp_dns_support_level = disabled
smtp_host_lookup = native
"""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _program(name: str) -> str:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") or ""


class Relay:
    """A relay that runs: where it takes mail, and its processes (what they start counts, too)."""

    def __init__(self, port: int, processes: list[subprocess.Popen[bytes]]) -> None:
        self.port = port
        self._processes = processes

    def pids(self) -> list[int]:
        """Of everything that belongs to it now."""
        return [pid for process in self._processes for pid in measure.descendants(process.pid)]


def _answers(port: int, process: subprocess.Popen[bytes], what: str) -> None:
    """Wait until something listens. Raises RuntimeError when it does not."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.1)
    raise RuntimeError(f"{what} did not start within {_START_SECONDS:g} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def postfix(root: Path, sink: int, *, signed: bool = False) -> Iterator[Relay]:
    """A Postfix instance of its own that hands everything to `sink`, with `signed` by way of opendkim. Raises RuntimeError: cannot run."""
    program = _program("postfix")
    if not program:
        raise RuntimeError("Postfix is not installed (Debian: apt install postfix)")
    if os.geteuid() != 0:
        raise RuntimeError("Postfix of its own can be started by root only")
    more, processes, port = "", [], _free_port()
    root.mkdir()
    root.chmod(0o755)
    for name in ("conf", "queue", "data"):
        (root / name).mkdir()
    shutil.chown(root / "data", "postfix")
    try:
        if signed:
            filter_port = _free_port()
            processes.append(_opendkim(root, filter_port))
            _answers(filter_port, processes[0], "opendkim")
            more = f"smtpd_milters = inet:127.0.0.1:{filter_port}\nmilter_default_action = tempfail\n"
        (root / "conf" / "main.cf").write_text(POSTFIX_MAIN.format(root=root, sink=sink) + more)
        (root / "conf" / "master.cf").write_text(POSTFIX_MASTER.format(port=port))
        command = [program, "-c", str(root / "conf"), "start-fg"]
        # It ends its process group when it is stopped, so it gets one of its own
        processes.append(subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        _answers(port, processes[-1], "Postfix")
        yield Relay(port, processes)
    finally:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run([program, "-c", str(root / "conf"), "stop"], capture_output=True, timeout=30, check=False)
        for process in reversed(processes):
            _end(process)
        shutil.rmtree(root, ignore_errors=True)


def _opendkim(root: Path, port: int) -> subprocess.Popen[bytes]:
    program = _program("opendkim")
    if not program:
        raise RuntimeError("opendkim is not installed (Debian: apt install opendkim)")
    key = root / "dkim.pem"
    key.write_text(new_key())
    key.chmod(0o600)
    (root / "opendkim.conf").write_text(
        f"Domain {SIGNING_DOMAIN}\nSelector s1\nKeyFile {key}\nMode s\nCanonicalization relaxed/relaxed\nInternalHosts 127.0.0.1\n"
        f"Socket inet:{port}@127.0.0.1\nPidFile {root / 'opendkim.pid'}\nSyslog no\nRequireSafeKeys no\n"
    )
    return subprocess.Popen([program, "-f", "-x", str(root / "opendkim.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def haraka(root: Path, sink: int, node_directory: Path | None) -> Iterator[Relay]:
    """One Haraka process that hands everything to `sink`. Raises RuntimeError: cannot run."""
    beside = node_directory / "node_modules" / ".bin" / "haraka" if node_directory is not None else None
    program = str(beside) if beside is not None and beside.exists() else _program("haraka")
    if not program:
        raise RuntimeError("Haraka is not installed (npm install -g Haraka, or into the directory given with --node-directory)")
    port = _free_port()
    # Its own defaults, whole: it does not do without some of them
    shutil.copytree(Path(program).resolve().parents[1] / "config", root / "config")
    (root / "queue").mkdir()
    for name, text in {
        "smtp.ini": f"listen=127.0.0.1:{port}\nnodes=0\n",
        "plugins": "relay\n",
        "relay.ini": "[relay]\nacl=true\nforce_routing=true\n",
        "relay_acl_allow": "127.0.0.0/8\n",
        "relay_dest_domains.ini": f'[domains]\nany={{"action":"accept","nexthop":"127.0.0.1:{sink}"}}\n',
        "outbound.ini": "enable_tls=false\nlocal_mx_ok=true\n",
        "loglevel": "WARN\n",
        "me": "relay.example\n",
        "host_list": "",
    }.items():
        (root / "config" / name).write_text(text)
    process = subprocess.Popen([program, "-c", str(root)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _answers(port, process, "Haraka")
        yield Relay(port, [process])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        _end(process)
        shutil.rmtree(root, ignore_errors=True)


def once(relay: Relay, others: Peers, messages: int) -> Sample:
    """Hand over so many messages, wait until the sink has them. Raises RuntimeError when not everything arrives."""
    before, began, watch = others.arrived(), time.perf_counter(), measure.Watch()
    spent, sink = measure.cpu_seconds(*relay.pids()), measure.cpu_seconds(others.sink_pid)
    others.smtp_source(messages, port=relay.port, sender=f"a@{SIGNING_DOMAIN}")
    end = time.monotonic() + _PATIENCE_SECONDS
    while (arrived := others.arrived() - before) < messages:
        if time.monotonic() > end:
            raise RuntimeError(f"{arrived} of {messages} messages came out of it within {_PATIENCE_SECONDS:g} s")
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    spent, sink = measure.cpu_seconds(*relay.pids()) - spent, measure.cpu_seconds(others.sink_pid) - sink
    _, foreign = watch.stop()
    return Sample(messages=messages, seconds=seconds, cpu_seconds=spent, sink_seconds=sink, foreign=foreign)
