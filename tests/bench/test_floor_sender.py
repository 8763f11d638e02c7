"""The floor sender against the sink: every message it says it sent has arrived, and a refusal ends it."""

import pytest

from bench import floor_sender
from bench.bench_sink import open_links
from tests.bench.sink_process import SinkProcess

ENVELOPE = b"MAIL FROM:<a@brand.example>\r\nRCPT TO:<b@people.example>\r\n"
CONTENT = b"Subject: x\r\n\r\n" + b"one line of seventy octets that is repeated until it is long enough\r\n" * 140


@pytest.mark.parametrize(("window", "connections"), [(0, 3), (0, 1), (8, 2)])
def test_every_message_it_counts_has_arrived(window: int, connections: int):
    with SinkProcess() as sink:
        links = open_links(sink.port, connections)
        cpu, wall, sent = floor_sender.run([link.fileno() for link in links], ENVELOPE, CONTENT, 480, window)
        for link in links:
            link.close()
        found = sink.get("/api/v1/counters")
    assert (sent, found["messages"]) == (480, 480)
    assert found["bytes"] == 480 * len(CONTENT)
    assert 0.0 < cpu <= wall + 0.05


def test_a_refusal_ends_it():
    with SinkProcess() as sink:
        links = open_links(sink.port, 2)
        with pytest.raises(ConnectionError, match="refused"):
            floor_sender.run([link.fileno() for link in links], ENVELOPE.replace(b"b@", b"bounce@"), CONTENT, 100, 0)
        for link in links:
            link.close()


def test_fewer_messages_than_connections_are_refused():
    with SinkProcess() as sink:
        links = open_links(sink.port, 2)
        with pytest.raises(ValueError, match="at least one message"):
            floor_sender.run([link.fileno() for link in links], ENVELOPE, CONTENT, 1, 0)
        for link in links:
            link.close()
