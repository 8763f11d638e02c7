"""`python -m control` as a process: it says when it is ready, answers over a socket, and stops at once when told."""

import asyncio
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from config.serving import MAX_HEAD_BYTES

ROOT = Path(__file__).parents[2]


class Process:
    """A control process and where it listens."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, key: str) -> None:
        self.process = process
        self.port = port
        self.headers = {"authorization": f"Bearer {key}"}
        self.url = f"http://127.0.0.1:{port}"


@pytest.fixture
async def control(fresh_database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Process]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SLUICE_DATABASE_URL": fresh_database_url,
        "SLUICE_REDIS_URL": redis_url,
        "SLUICE_NODE__STATE_DIRECTORY": str(tmp_path),
        "SLUICE_CONTROL__PORT": str(port),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "control", env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
    match = re.fullmatch(r"control ready http=127\.0\.0\.1:(\d+)\n", line)
    if match is None:
        process.kill()
        assert process.stderr is not None
        pytest.fail((await process.stderr.read()).decode())
    yield Process(process, int(match[1]), (tmp_path / "admin.key").read_text().strip())
    if process.returncode is None:
        process.kill()
        await process.wait()


async def test_it_answers_streams_and_stops(control: Process) -> None:
    async with httpx.AsyncClient(base_url=control.url, headers=control.headers, timeout=30) as http:
        assert (await http.get("/api/v1/me")).json()["scope"] == "admin"
        made = (await http.post("/api/v1/lists", json={"name": "news"})).json()

        async def rows() -> AsyncIterator[bytes]:
            yield b"email,name\n"
            for start in range(0, 20_000, 1000):
                yield b"".join(b"u%d@x.example,some name of usual length\n" % i for i in range(start, start + 1000))

        report = await http.post(f"/api/v1/lists/{made['id']}/imports", content=rows(), headers={"content-type": "text/csv"})
        assert report.json()["imported"] == 20_000
        # an import that is still sending when the process is told to stop
        _, writer = await asyncio.open_connection("127.0.0.1", control.port)
        head = f"POST /api/v1/lists/{made['id']}/imports HTTP/1.1\r\nHost: x\r\nAuthorization: {control.headers['authorization']}\r\n"
        writer.write(f"{head}Content-Type: text/csv\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nemail\n\r\n".encode())
        await writer.drain()
        await asyncio.sleep(0.2)
        began = time.monotonic()
        control.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(control.process.wait(), 60) == 0
        assert time.monotonic() - began < 30, "the import would go on for ever"
        writer.close()


async def test_headers_without_end_are_cut_off(control: Process) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", control.port)
    writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-Long: ")
    sent = 0
    try:
        while sent < 50 * MAX_HEAD_BYTES:
            writer.write(b"x" * 16384)
            sent += 16384
            await asyncio.wait_for(writer.drain(), 60)
        answer = await asyncio.wait_for(reader.read(), 60)
        assert answer.startswith(b"HTTP/1.1 431 ")
    except (ConnectionError, RuntimeError):  # uvloop says of a transport that is gone by RuntimeError
        pass
    writer.close()
    async with httpx.AsyncClient(base_url=control.url) as http:
        assert (await http.get("/health/live")).status_code == 200
        body = b'{"name": "' + b"x" * 200_000 + b'"}'
        response = await http.post("/api/v1/lists", content=body, headers={**control.headers, "content-type": "application/json"})
        assert response.status_code == 422


async def test_a_port_that_is_taken_is_said_so(control: Process, fresh_database_url: str, redis_url: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SLUICE_DATABASE_URL": fresh_database_url,
        "SLUICE_REDIS_URL": redis_url,
        "SLUICE_NODE__STATE_DIRECTORY": str(tmp_path),
        "SLUICE_CONTROL__PORT": str(control.port),
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "control", env=environment, stderr=asyncio.subprocess.PIPE)
    _, said = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2
    assert f"cannot listen on 127.0.0.1:{control.port}".encode() in said
