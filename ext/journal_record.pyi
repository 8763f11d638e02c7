from typing import final

LONGEST_RECORD: int

class Garbage(ValueError):
    offset: int
    def __init__(self, offset: int) -> None: ...

@final
class Records:
    def __len__(self) -> int: ...
    def append(self, record: bytes) -> None: ...
    def take(self) -> bytes: ...

class OpenIntents:
    def __len__(self) -> int: ...
    def feed(self, block: bytes, segment: int) -> None: ...
    def records(self) -> list[tuple[str, int, int, int, int, int, int, int, int, int]]: ...
    def before(self, segment: int) -> list[bytes]: ...

def crc32c(data: bytes) -> int: ...
def crc32c_by_table(data: bytes) -> int: ...
def pack_intent(
    campaign_id: int,
    batch: int,
    number: int,
    position: int,
    attempt: int,
    epoch: int,
    connection: int,
    delivery_server_id: int,
    at: int,
    /,
) -> bytes: ...
def pack_withdrawal(
    campaign_id: int,
    batch: int,
    number: int,
    position: int,
    attempt: int,
    epoch: int,
    connection: int,
    delivery_server_id: int,
    at: int,
    /,
) -> bytes: ...
def pack_outcome(
    kind: str,
    campaign_id: int,
    batch: int,
    number: int,
    position: int,
    attempt: int,
    epoch: int,
    connection: int,
    delivery_server_id: int,
    at: int,
    queued_at: int,
    first_attempt_at: int,
    due_at: int,
    size: int,
    recipient: str,
    sender: str,
    status: str,
    diagnostic: str,
    category: str,
    mta: str,
    source_ip: str,
    destination_ip: str,
    esmtp: str,
    queue: str,
    /,
) -> bytes: ...
def unpack(payload: bytes) -> tuple[str | int, ...]: ...
def whole(block: bytes, offset: int = 0) -> int: ...
def scan(block: bytes, offset: int = 0) -> tuple[list[tuple[str | int, ...]], int]: ...
def kinds(block: bytes) -> dict[str, int]: ...
def find(block: bytes, offset: int = 0) -> int: ...
