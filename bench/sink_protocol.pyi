"""The SMTP side of the sink: `Sink` holds everything shared, one `SinkProtocol` per connection."""

from asyncio import AbstractEventLoop, BaseTransport
from collections.abc import Callable
from typing import Any, final

from typing_extensions import disjoint_base

from bench.sink import SinkOptions
from bench.sink_script import Answer, Script

@final
class DomainCount:
    def __new__(cls, name: str, answer: Answer | None) -> DomainCount: ...
    name: str
    answer: Answer | None
    accepted: int
    deferred: int
    refused: int
    dropped: int

@final
class Session:
    def __new__(cls, client: str, helo: str, extended: bool, tls: str, user: str) -> Session: ...
    client: str
    helo: str
    user: str
    tls: str
    extended: bool

@final
class Kept:
    number: int
    mail_from: bytes
    recipients: list[bytes]
    at: float
    session: Session
    size: int
    summary: Any
    @property
    def source(self) -> bytes: ...

@disjoint_base
class Sink:
    options: SinkOptions
    script: Script
    loop: AbstractEventLoop
    connections_total: int
    connections_now: int
    connections_max: int
    connections_refused: int
    messages: int
    recipients: int
    bytes: int
    accepted_lines: int
    deferred: int
    refused: int
    dropped: int
    hung: int
    duplicates: int
    duplicates_untracked: int
    without_message_id: int
    bare_newlines: int
    long_lines: int
    nul_octets: int
    undeclared_8bit: int
    protocol_errors: int
    reads: int
    replies: dict[str, int]
    domains: dict[Any, DomainCount]
    tick: int
    def __init__(
        self,
        options: SinkOptions,
        script: Script,
        loop: AbstractEventLoop,
        upgrade: Callable[[SinkProtocol], None],
        write_log: Callable[[Any], None] | None,
        prefixes: tuple[Any, ...],
    ) -> None: ...
    def rules_changed(self) -> None: ...
    def reset(self) -> None: ...
    def clear(self) -> None: ...
    def new_protocol(self) -> SinkProtocol: ...
    def kept(self) -> list[Kept]: ...
    def find(self, number: int) -> Kept | None: ...
    def open_protocols(self) -> list[SinkProtocol]: ...
    def sweep(self, idle_ticks: int) -> int: ...
    def flush_log(self) -> None: ...
    @property
    def tracked(self) -> int: ...
    def send_due(self) -> None: ...

@disjoint_base
class Replies:
    transport: Any
    number: int
    active: int
    def deliver(self, what: Any) -> None: ...

class Transaction(Replies): ...

@final
class SinkProtocol(Transaction):
    def __init__(self, sink: Sink) -> None: ...
    def connection_made(self, transport: BaseTransport) -> None: ...
    def data_received(self, data: Any) -> None: ...
    def eof_received(self) -> bool | None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def secured(self, transport: BaseTransport, description: str) -> None: ...
    def abandon(self) -> None: ...
    def goodbye(self, text: Any) -> None: ...
    def next_piece(self) -> None: ...

def describe_tls(ssl_object: Any) -> str: ...
