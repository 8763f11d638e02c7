"""control.name_server where there is nobody to ask."""

import dns.resolver
import pytest

from config.settings import Preflight
from control.name_server import NameServer


async def test_a_machine_without_name_servers_gets_no_answer_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise dns.resolver.NoResolverConfiguration

    monkeypatch.setattr(dns.resolver.BaseResolver, "read_resolv_conf", missing)
    assert await NameServer(Preflight()).records("mailer.example", "TXT") is None
