"""What the engine is compared with runs as it says: idle connections are open ones, and a relay hands on what it was given."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from bench import peers, relays
from bench.peers import Peers
from compose import dkim_keys
from tests.bench.sink_process import SinkProcess

POSTFIX = shutil.which("postfix", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def peers_of(sink: SinkProcess, directory: Path) -> Peers:
    return Peers(sink.port, sink.ready["http"], sink.process.pid, directory)


def test_idle_connections_are_open_ones_with_nothing_sent(sink: SinkProcess, tmp_path: Path) -> None:
    before = sink.counters()["connections"]["total"]
    found = json.loads(
        peers_of(sink, tmp_path).run([sys.executable, "-m", "bench.idle_connections", "--port", str(sink.port), "--connections", "150"])
    )
    assert found["connections"] == 150
    assert 0 < found["bytes_per_connection"] < 200_000
    after = sink.counters()
    assert after["connections"]["total"] - before == 150
    assert after["messages"] == 0


def test_a_key_for_other_signers_is_pem_that_can_be_read() -> None:
    assert dkim_keys.read_pem(peers.new_key()).bits == 2048


@pytest.mark.slow
@pytest.mark.skipif(not POSTFIX or os.geteuid() != 0 or not peers.smtp_source_path(), reason="needs Postfix, and root to start it")
def test_what_a_relay_is_given_arrives_and_nothing_of_it_stays(sink: SinkProcess, tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents[:3]):
        directory.chmod(0o755)  # Postfix's own user has to pass
    others, root = peers_of(sink, tmp_path), tmp_path / "relay"
    with relays.postfix(root, sink.port) as relay:
        relays.once(relay, others, 100)
        sample = relays.once(relay, others, 30)
        assert sample.messages == 30
        assert sample.cpu_seconds > 0
        pids = relay.pids()
    assert sink.counters()["messages"] == 130
    assert not root.exists()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):  # they end when they see that their master has
        assert time.monotonic() < end
        time.sleep(0.1)
