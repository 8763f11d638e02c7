from collections.abc import Callable
from typing import Any, final

from ext.token import Signer

def loosely(name: str) -> str: ...

@final
class Names:
    def __init__(self) -> None: ...
    def slot(self, name: str, *, loose: bool = False) -> int: ...

@final
class Row:
    decode: Callable[[bytes], dict[str, Any]]
    decode_value: Callable[[bytes], Any]
    shared: dict[str, Any] | None
    unsubscribe_signer: Signer | None
    web_view_signer: Signer | None
    click_signer: Signer | None
    open_signer: Signer | None
    @property
    def subscriber_id(self) -> Any: ...
    def __init__(self, names: Names, base_url: bytes) -> None: ...
