"""Fixtures of `tests/bench`: one sink with default options for all tests, emptied for each."""

from collections.abc import Iterator

import pytest

from tests.bench.sink_process import SinkProcess


@pytest.fixture(scope="session")
def running_sink() -> Iterator[SinkProcess]:
    with SinkProcess() as sink:
        yield sink


@pytest.fixture
def sink(running_sink: SinkProcess) -> SinkProcess:
    running_sink.reset()
    return running_sink
