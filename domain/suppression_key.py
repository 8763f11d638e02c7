"""What a suppression names: one address, or a star for a whole local part or domain. Pure.

    anna@example.com       this address                          kept as  anna@example.com
    example.com            every address at this very domain              @example.com
    @example.com           the same                                       @example.com
    *@example.com          the same                                       @example.com
    *@*.example.com        every address at any subdomain                 @*.example.com
    info@*                 this local part at any domain                  info@*

A key that begins with @ or ends in @* is no address's, so nothing that comes back for an address can suppress a domain.
There are no other forms, no negation and no operators: what is not one of these is refused when it is written, so nothing can be
kept that an engine would read as "not suppressed".
"""

from typing import Final

from domain import address
from domain.errors import Invalid

_FORMS: Final = "an address, a domain (example.com), its subdomains (*@*.example.com) or a local part at any domain (info@*)"


def parse(text: str, field: str = "email") -> str:
    """The key of an address or a pattern. Raises Invalid(field, reason)."""
    text = text.strip()
    local, at, domain = text.rpartition("@")
    if "*" not in text and local:
        return address.key(text, field)
    if not at and "*" not in text:
        if "." not in text:
            raise Invalid(field, f"is neither an address nor a domain; write {_FORMS}", text)
        return "@" + address.parse_domain(text, field)
    if local in ("", "*") and domain.startswith("*."):
        return "@*." + address.parse_domain(domain[2:], field)
    if local in ("", "*") and "*" not in domain:
        return "@" + address.parse_domain(domain, field)
    if domain == "*" and local and "*" not in local:
        return address.key(f"{local}@any.example", field).rpartition("@")[0] + "@*"
    raise Invalid(field, f"a star stands for a whole local part or a whole domain; write {_FORMS}", text)


def covering(key: str) -> list[str]:
    """Every key that covers the address with this key, itself first: what a look-up asks for."""
    local, _, domain = key.rpartition("@")
    labels = domain.split(".")
    parents = [".".join(labels[i:]) for i in range(1, len(labels))]
    return [key, f"@{domain}", f"{local}@*", *(f"@*.{parent}" for parent in parents)]
