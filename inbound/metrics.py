"""What one inbound process says of itself: the heartbeat that `sluice status` reads, and Prometheus metrics."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector as Metrics

from domain.errors import ConfigurationError
from inbound.mailboxes import Collector
from inbound.unsubscribe_copies import UnsubscribeCopies
from inbound.worker import Worker
from journal.feedback_files import FeedbackFiles
from journal.visits import Visits


class Status:
    """Gathers the state of one inbound process; `heartbeat` is what is published, a JSON object."""

    def __init__(
        self, process_id: str, node: str, worker: Worker, visits: Visits, requests: Visits, files: FeedbackFiles,
        copies: UnsubscribeCopies, mailboxes: Sequence[Collector] = (),
    ) -> None:  # fmt: skip
        self.id = process_id
        self._node = node
        self._worker = worker
        self._visits = visits
        self._requests = requests
        self._files = files
        self._copies = copies
        self._mailboxes = mailboxes
        self._started = time.time()

    def heartbeat(self) -> dict[str, Any]:
        """Counters since the start."""
        visits = self._visits
        trouble = [self._worker.trouble, f"opens and clicks wait on disk: {visits.trouble}" if visits.trouble else ""]
        if self._requests.trouble:
            trouble.append(f"unsubscribes and reports of abuse over HTTP are safe on disk and wait: {self._requests.trouble}")
        if self._files.trouble:
            trouble.append(f"bounces and complaints are not in the accounting files: {self._files.trouble}")
        trouble += [*self._copies.trouble, *(each.trouble for each in self._mailboxes)]
        if visits.lost:
            trouble.append(f"{visits.lost} opens and clicks were lost since the start: {visits.lost_because}")
        return {
            "id": self.id,
            "node": self._node,
            "at": time.time(),
            "started_at": self._started,
            "visits_recorded": visits.recorded,
            "visits_lost": visits.lost,
            "visits_waiting_bytes": visits.waiting_bytes,
            "trouble": [sentence for sentence in trouble if sentence],
        }


class InboundCollector(Metrics):
    """The counters of worker and visits as they stand."""

    def __init__(self, worker: Worker, visits: Visits, requests: Visits, copies: UnsubscribeCopies) -> None:
        self._worker = worker
        self._visits = visits
        self._requests = requests
        self._copies = copies

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
        yield CounterMetricFamily("sluice_visits", "Opens and clicks", value=self._visits.recorded)
        yield CounterMetricFamily("sluice_visits_lost", "Opens and clicks that the disk did not take", value=self._visits.lost)
        yield GaugeMetricFamily("sluice_visits_waiting_bytes", "Opens and clicks not in PostgreSQL yet", value=self._visits.waiting_bytes)
        waiting = int(bool(self._requests.trouble))
        yield GaugeMetricFamily("sluice_requests_trouble", "1 while unsubscribes and abuse reports over HTTP wait on disk", value=waiting)
        copies = GaugeMetricFamily("sluice_unsubscribe_copies", "Copies of unsubscribes for a URL, of all processes", labels=["state"])
        if (found := self._copies.report) is not None:
            copies.add_metric(["waiting"], found.waiting)
            copies.add_metric(["given_up"], found.given_up)
        yield copies


def serve(port: int, worker: Worker, visits: Visits, requests: Visits, copies: UnsubscribeCopies) -> None:
    """Answer Prometheus on loopback, in a thread of the client library's. Raises ConfigurationError when the port is taken."""
    registry = CollectorRegistry()
    registry.register(InboundCollector(worker, visits, requests, copies))
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as failure:
        raise ConfigurationError([f"inbound.metrics_port: cannot listen on 127.0.0.1:{port}: {failure.strerror or failure}"]) from failure
