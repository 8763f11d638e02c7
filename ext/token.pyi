from typing import final

@final
class Signer:
    def __init__(self, key: bytes, mac_octets: int, *, base32: bool = False, plain: bool = False) -> None: ...
    def sign(self, *numbers: int) -> str: ...

@final
class Sealer:
    def __init__(self, key: bytes, prefix: bytes, part: bytes, untouched: bool) -> None: ...
