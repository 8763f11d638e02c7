"""Prometheus metrics of one inbound process: what was received, how it was read, what was done."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inbound.worker import Worker


class InboundCollector(Collector):
    """The worker's counters as they stand."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterable[Metric]:
        """One sample a kind and outcome; then what tells whether something is stuck."""
        worker = self._worker
        messages = CounterMetricFamily("sluice_inbound_messages", "Received messages that were handled", labels=["kind", "outcome"])
        for (kind, outcome), count in list(worker.outcomes.items()):
            messages.add_metric([kind, outcome], count)
        yield messages
        yield CounterMetricFamily("sluice_inbound_refusals", "Refusals while sending whose consequences were drawn", value=worker.refusals)
        yield CounterMetricFamily("sluice_inbound_triage_restarts", "Messages that took too much to be read", value=worker.restarts)
        yield GaugeMetricFamily("sluice_inbound_trouble", "1 while received mail is kept but not read", value=int(bool(worker.trouble)))


def serve(port: int, worker: Worker) -> None:
    """Answer Prometheus on loopback, in a thread of the client library's."""
    registry = CollectorRegistry()
    registry.register(InboundCollector(worker))
    start_http_server(port, addr="127.0.0.1", registry=registry)
