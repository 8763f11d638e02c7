"""What one engine says of itself: the heartbeat that `sluice status` and `sluice top` read, and Prometheus metrics."""

import asyncio
import resource
import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from domain.errors import ConfigurationError
from engine.egress_path import EgressPath
from engine.feeder import Feeder
from engine.intake import Intake
from engine.turn import Turn
from engine.watchdog import Watchdog
from journal.ledger import Ledger
from journal.segments import Journal


class Status:
    """Gathers the state of one engine; `heartbeat` is what is published, a JSON object."""

    def __init__(
        self, engine_id: str, node: str, turn: Turn, intake: Intake, feeder: Feeder, paths: dict[int, EgressPath],
        journal: Journal, trouble: Callable[[], list[str]],
    ) -> None:  # fmt: skip
        self._engine_id = engine_id
        self._node = node
        self._turn = turn
        self._intake = intake
        self._feeder = feeder
        self._paths = paths
        self._journal = journal
        self._started = time.time()
        self._last = (time.monotonic(), 0)
        self._last_delivered: dict[int, int] = {}
        self.state = "starting"
        self._trouble = trouble

    def heartbeat(self) -> dict[str, Any]:
        """Counters since the start, rates since the last call."""
        now = time.monotonic()
        then, messages = self._last
        elapsed = max(1e-6, now - then)
        self._last = (now, self._turn.messages)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "id": self._engine_id,
            "node": self._node,
            "state": self.state,
            "started_at": self._started,
            "at": time.time(),
            "feeder": self._feeder.leading,
            "messages": self._turn.messages,
            "messages_per_second": round((self._turn.messages - messages) / elapsed, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
            "max_rss_bytes": usage.ru_maxrss * 1024,
            "tasks": len(asyncio.all_tasks()),
            "held_batches": len(self._intake.held),
            "journal_bytes": self._journal.used_bytes,
            "journal_sync_failures": self._journal.sync_failures,
            "trouble": self._trouble(),
            "paths": [self._path(path, now, elapsed) for path in self._paths.values()],
        }

    def _path(self, path: EgressPath, now: float, elapsed: float) -> dict[str, Any]:
        path.describe()
        before = self._last_delivered.get(path.server.id, path.delivered)
        self._last_delivered[path.server.id] = path.delivered
        return {
            "delivery_server_id": path.server.id,
            "name": path.server.name,
            "state": path.state,
            "sentence": path.sentence,
            "since": path.since,
            "connections": len(path.sessions),
            "in_flight": sum(session.in_flight for session in path.sessions),
            "ready": path.ready,
            "delivered": path.delivered,
            "bounced": path.bounced,
            "deferred": path.deferred,
            "uncertain": path.uncertain,
            "delivered_per_second": round((path.delivered - before) / elapsed, 1),
        }


class EngineCollector(Collector):
    """Reads the counters when Prometheus asks, so the hot path pays nothing for them."""

    def __init__(
        self, turn: Turn, paths: dict[int, EgressPath], watchdog: Watchdog, ledger: Ledger, journal: Journal,
        trouble: Callable[[], list[str]],
    ) -> None:  # fmt: skip
        self._turn = turn
        self._paths = paths
        self._watchdog = watchdog
        self._ledger = ledger
        self._journal = journal
        self._trouble = trouble

    def collect(self) -> Iterable[Metric]:
        """One family a counter, labelled by delivery server; then what tells whether something is stuck."""
        # A copy: this runs in a thread of the client library's
        paths = list(self._paths.values())
        yield CounterMetricFamily("sluice_messages", "Attempts that reached a server", value=self._turn.messages)
        for name in ("delivered", "bounced", "deferred", "uncertain"):
            family = CounterMetricFamily(f"sluice_{name}", f"Recipients {name}", labels=["delivery_server"])
            for path in paths:
                family.add_metric([path.server.name], getattr(path, name))
            yield family
        connections = GaugeMetricFamily("sluice_connections", "Open connections", labels=["delivery_server"])
        ready = GaugeMetricFamily("sluice_recipients_ready", "Leased recipients that wait for a connection", labels=["delivery_server"])
        for path in paths:
            connections.add_metric([path.server.name], len(path.sessions))
            ready.add_metric([path.server.name], path.ready)
        yield connections
        yield ready
        stuck = GaugeMetricFamily("sluice_stuck", "Things the progress watchdog calls stuck", labels=["kind"])
        for kind, count in self._watchdog.stuck.items():
            stuck.add_metric([kind], count)
        yield stuck
        yield GaugeMetricFamily("sluice_trouble", "Sentences in `sluice status` that need an operator", value=len(self._trouble()))
        yield GaugeMetricFamily("sluice_ledger_lag_bytes", "Journal that is not in PostgreSQL yet", value=self._ledger.lag_bytes)
        yield GaugeMetricFamily("sluice_journal_bytes", "Journal on disk", value=self._journal.used_bytes)
        yield CounterMetricFamily(
            "sluice_journal_sync_failures", "Times the disk failed to keep the journal", value=self._journal.sync_failures
        )
        yield GaugeMetricFamily(
            "sluice_event_loop_stall_seconds", "Longest the event loop kept a timer waiting", value=self._watchdog.longest_stall_seconds
        )


def serve(
    port: int, turn: Turn, paths: dict[int, EgressPath], watchdog: Watchdog, ledger: Ledger, journal: Journal,
    trouble: Callable[[], list[str]],
) -> None:  # fmt: skip
    """Answer Prometheus on loopback, in a thread of the client library's. Raises ConfigurationError when the port is taken."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(turn, paths, watchdog, ledger, journal, trouble))
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as failure:
        raise ConfigurationError([f"engine.metrics_port: cannot listen on 127.0.0.1:{port}: {failure.strerror or failure}"]) from failure
