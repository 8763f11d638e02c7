"""Other senders against the same sink: the floor, Postfix's smtp-source, Python's libraries, nodemailer.

Each runs in a process of its own on the core the engine has, so that its CPU can be told apart. A peer that is not installed is a row
with the reason. smtp-source's CPU is that of the whole process (it starts in milliseconds); the others time themselves.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench import measure, newsletter
from bench.measure import Row, Sample
from compose import dkim_keys

ROOT: Final = Path(__file__).resolve().parents[1]
NO_SMTP_SOURCE: Final = "smtp-source is not installed (Debian: apt install postfix)"
CANNOT_RUN: Final = (RuntimeError, OSError, subprocess.SubprocessError, ValueError)  # what a peer that is not there raises
_LIMIT_SECONDS: Final = 120.0
_NPM_SECONDS: Final = 60.0
_PACKAGES: Final = ("nodemailer", "handlebars")

_NODEMAILER: Final = r"""
const nodemailer = require('nodemailer'), handlebars = require('handlebars'), fs = require('fs');
const given = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const [html, text, subject] = [given.html, given.text, given.subject].map(source => handlebars.compile(source));
const pool = nodemailer.createTransport({host: '127.0.0.1', port: given.port, pool: true, maxConnections: given.connections,
  maxMessages: Infinity, ignoreTLS: true,
  ...(given.key ? {dkim: {domainName: given.domain, keySelector: 's1', privateKey: given.key}} : {})});
(async () => {
  const began = process.cpuUsage(), wall = process.hrtime.bigint();
  let next = 0;
  const worker = async () => {
    while (next < given.rows.length) {
      const [address, data] = given.rows[next++];
      const values = {subscriber: {...data, email: address}, links: {unsubscribe: 'http://127.0.0.1:8080/u/' + address}};
      await pool.sendMail({from: given.sender, to: address, subject: subject(values), text: text(values), html: html(values),
        headers: {'List-Unsubscribe': '<' + values.links.unsubscribe + '>'}});
    }
  };
  await Promise.all(Array.from({length: 2 * given.connections}, worker));
  const spent = process.cpuUsage(began);
  console.log(JSON.stringify({messages: given.rows.length, cpu_seconds: (spent.user + spent.system) / 1e6,
    seconds: Number(process.hrtime.bigint() - wall) / 1e9}));
  pool.close();
})();
"""


class Peers:
    """Runs peers against one sink: its port, the address of its counters, its process.

    `node_directory`: where npm packages are installed already; without it they are installed below `directory`, for this run.
    """

    def __init__(self, port: int, http: str, sink_pid: int, directory: Path, node_directory: Path | None = None) -> None:
        self.port = self._port = port
        self.sink_pid = self._sink = sink_pid
        self._http = http
        self._directory = directory
        self._node_directory = node_directory
        cores = measure.cores()
        self._core = cores[:1]
        if len(cores) > 1:
            measure.pin(sink_pid, cores[1:])

    def arrived(self) -> int:
        """Messages the sink has taken so far."""
        with urllib.request.urlopen(f"http://{self._http}/api/v1/counters", timeout=10) as answer:
            return int(json.load(answer)["messages"])

    def _start(self, argv: list[str], more: dict[str, str] | None = None) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", **(more or {})}
        # taskset's work done here: the child is on its core before its first instruction of its own
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, set(self._core))
        try:
            return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment)
        finally:
            os.sched_setaffinity(0, before)

    def run(self, argv: list[str], environment: dict[str, str] | None = None) -> str:
        """What a child of ours prints. Raises SubprocessError when it fails or takes too long."""
        child = self._start(argv, environment or {})
        try:
            said, _ = child.communicate(timeout=_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            raise
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, argv)
        return said

    def _timed(self, argv: list[str], environment: dict[str, str] | None = None) -> Sample:
        """Run a child that prints its own CPU and wall seconds."""
        watch, sink = measure.Watch(), measure.cpu_seconds(self._sink)
        spent = json.loads(self.run(argv, environment))
        _, foreign = watch.stop()
        return Sample(
            messages=spent["messages"], seconds=spent["seconds"], cpu_seconds=spent["cpu_seconds"],
            sink_seconds=measure.cpu_seconds(self._sink) - sink, foreign=foreign,
        )  # fmt: skip

    def floor(self, messages: int, *, window: int = 0) -> Sample:
        """Constant message, C level: pipelined DATA on 20 connections, or BDAT windows on 10."""
        connections = "10" if window else "20"
        return self._timed(
            [sys.executable, "-m", "bench.floor", "--port", str(self._port), "--messages", str(messages), "--connections", connections,
             "--window", str(window)]
        )  # fmt: skip

    def smtp_source(self, messages: int, *, connections: int = 20, port: int = 0, sender: str = newsletter.FROM_EMAIL) -> Sample:
        """Postfix's load generator: C, constant octets, connections kept, not pipelined. Raises RuntimeError where there is none."""
        program = smtp_source_path()
        if not program:
            raise RuntimeError(NO_SMTP_SOURCE)
        argv = [program, "-d", "-s", str(connections), "-m", str(messages), "-l", str(len(newsletter.wire()[2])),
                "-f", sender, "-t", "b@shore.example", f"inet:127.0.0.1:{port or self._port}"]  # fmt: skip
        watch, sink, wall = measure.Watch(), measure.cpu_seconds(self._sink), time.perf_counter()
        child = self._start(argv)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - wall
        _, foreign = watch.stop()
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, argv)
        return Sample(
            messages=messages, seconds=seconds, cpu_seconds=usage.ru_utime + usage.ru_stime,
            sink_seconds=measure.cpu_seconds(self._sink) - sink, foreign=foreign,
        )  # fmt: skip

    def python(self, name: str, messages: int, *, connections: int = 20) -> Sample:
        """One of `bench.python_peers`."""
        return self._timed(
            [sys.executable, "-m", "bench.python_peers", name, "--port", str(self._port), "--messages", str(messages), "--connections",
             str(connections)]
        )  # fmt: skip

    def nodemailer(self, messages: int, *, signed: bool = False) -> Sample:
        """nodemailer's pool with Handlebars, `signed` with its own DKIM. Raises RuntimeError with the reason where it cannot run."""
        if shutil.which("node") is None:
            raise RuntimeError("node is not installed (Debian: apt install nodejs npm)")
        place = self._node_directory or self._directory / "node"
        if not all((place / "node_modules" / name).exists() for name in _PACKAGES):
            _install(place)
        given = {
            "port": self._port, "connections": 20, "rows": newsletter.rows(messages), "sender": newsletter.FROM_EMAIL,
            "html": newsletter.HTML.replace('{% if subscriber.plan == "pilot" %}', "").replace("{% endif %}", ""),
            "text": newsletter.TEXT, "subject": newsletter.SUBJECT, "key": new_key() if signed else "",
            "domain": newsletter.FROM_EMAIL.partition("@")[2],
        }  # fmt: skip
        here = self._directory / "nodemailer"
        here.mkdir(exist_ok=True)
        (here / "send.js").write_text(_NODEMAILER)
        (here / "given.json").write_text(json.dumps(given))
        return self._timed(["node", str(here / "send.js"), str(here / "given.json")], {"NODE_PATH": str(place / "node_modules")})


def _install(place: Path) -> None:
    how = f"install it with npm install --prefix DIRECTORY {' '.join(_PACKAGES)} and give --node-directory DIRECTORY"
    if shutil.which("npm") is None:
        raise RuntimeError(f"nodemailer is missing and so is npm (Debian: apt install npm); {how}")
    place.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--prefix", str(place), "--no-audit", "--no-fund", *_PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NPM_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"npm could not install nodemailer within {_NPM_SECONDS:g} s; {how}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("npm error")] or ["no reason given"]
        raise RuntimeError(f"npm could not install nodemailer ({said[0]}); {how}")


def new_key() -> str:
    """An RSA-2048 key for the signers of others, PEM."""
    text = base64.encodebytes(dkim_keys.make("rsa-sha256").private_key).decode()
    return f"-----BEGIN PRIVATE KEY-----\n{text}-----END PRIVATE KEY-----\n"


def smtp_source_path() -> str:
    """Where smtp-source is; empty when it is not installed. Distributions keep it outside an ordinary user's PATH."""
    return shutil.which("smtp-source", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") or ""


def rows_of(name: str, work: Callable[[], list[Sample]], *, note: str = "") -> Row:
    """A row of medians, or one that says why there is none."""
    try:
        return measure.row(name, work(), note=note)
    except CANNOT_RUN as error:
        return measure.skipped(name, str(error))
