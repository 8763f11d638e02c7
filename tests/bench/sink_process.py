"""The sink as a user starts it, and a raw SMTP client that shows every octet; shared by the tests of `bench/`."""

import json
import select
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 20.0  # when a test waits that long, something hangs


class SinkProcess:
    """`python -m bench.sink` on free ports. Use as a context manager; `final` holds the counters it printed at the end."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.sink", "--port", "0", "--http-port", "0", "--json", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read() if self.process.stderr else ""
        self.ready = json.loads(line)
        self.port = int(self.ready["smtp"].rsplit(":", 1)[1])
        self.http = f"http://{self.ready['http']}"
        self.final: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *what: object) -> None:
        self.stop()

    def stop(self) -> float:
        """SIGTERM; seconds until it was gone."""
        if self.process.poll() is not None and self.final:
            return 0.0
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        out, errors = self.process.communicate(timeout=PATIENCE_SECONDS)
        took = time.monotonic() - start
        assert self.process.returncode == 0, errors
        assert errors == ""
        self.final = json.loads(out)
        return took

    def get(self, path: str) -> Any:
        """A JSON answer of the API."""
        return json.loads(self.fetch(path)[1])

    def fetch(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers (names in lower case) of any request."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.http + path, method=method, data=body, headers=fields)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
                return answer.status, answer.read(), {name.lower(): value for name, value in answer.headers.items()}
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), {name.lower(): value for name, value in error.headers.items()}

    def reset(self) -> None:
        """Zero every counter, forget every message and rule."""
        assert self.fetch("/api/v1/script", "PUT", b'{"rule": []}')[0] == 200
        assert self.fetch("/api/v1/reset", "POST")[0] == 200

    def rules(self, *rules: dict[str, Any]) -> None:
        """Replace the script while it runs."""
        status, answer, _ = self.fetch("/api/v1/script", "PUT", json.dumps({"rule": rules}).encode())
        assert status == 200, answer

    def counters(self) -> dict[str, Any]:
        """The counters now."""
        found: dict[str, Any] = self.get("/api/v1/counters")
        return found

    def sources(self) -> list[str]:
        """The kept messages as text, oldest first."""
        listed = self.get("/api/v1/messages?limit=500")["messages"]
        return [self.fetch(f"/api/v1/messages/{one['id']}/source")[1].decode() for one in reversed(listed)]


class Wire:
    """One raw connection: sends octets, reads whole replies."""

    def __init__(self, sink: SinkProcess, *, greet: bool = True, port: int | None = None) -> None:
        self.socket: socket.socket | ssl.SSLSocket = socket.create_connection(("127.0.0.1", port or sink.port), timeout=PATIENCE_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""
        if greet:
            assert self.reply().startswith("220 ")
            self.ehlo = self.ask("EHLO client.example")
            assert self.ehlo.startswith("250")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *what: object) -> None:
        self.socket.close()

    def send(self, data: bytes | str) -> None:
        """Raw octets; a str goes out as UTF-8."""
        self.socket.sendall(data.encode() if isinstance(data, str) else data)

    def line(self) -> bytes:
        """One line with its end; b"" when the connection is closed (or reset)."""
        while b"\n" not in self.buffer:
            try:
                data = self.socket.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            if not data:
                rest, self.buffer = self.buffer, b""
                return rest
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line + b"\n"

    def reply(self) -> str:
        """One reply, continuation lines included; "" when the connection is closed."""
        lines = []
        while True:
            line = self.line().decode("latin-1")
            lines.append(line)
            if not line or line[3:4] != "-":
                return "".join(lines)

    def ask(self, command: str) -> str:
        """Send one command line and read its reply."""
        self.send(command + "\r\n")
        return self.reply()

    def codes(self, count: int) -> list[str]:
        """The codes of the next replies."""
        return [self.reply()[:3] for _ in range(count)]

    def mail(self, recipient: str, content: str = "Message-ID: <m@x>\r\n\r\nHello\r\n", sender: str = "s@x.example") -> list[str]:
        """A lock-step transaction; the codes got, "" where the connection ended."""
        got = []
        for command in (f"MAIL FROM:<{sender}>", f"RCPT TO:<{recipient}>", "DATA", content + "."):
            got.append(self.ask(command)[:3])
            if not got[-1].startswith(("2", "3")):
                break
        return got

    def silent(self, seconds: float = 0.15) -> bool:
        """True when nothing arrives for that long and the connection is still open."""
        return not self.buffer and not select.select([self.socket], [], [], seconds)[0]

    def closed(self) -> bool:
        """True when the peer closed or reset the connection and left nothing unread."""
        return self.line() == b""

    def start_tls(self, behind: bytes = b"") -> str:
        """STARTTLS with `behind` in the same segment; then the handshake. The reply to STARTTLS."""
        self.send(b"STARTTLS\r\n" + behind)
        reply = self.reply()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        assert isinstance(self.socket, socket.socket)
        self.socket = context.wrap_socket(self.socket)
        return reply
