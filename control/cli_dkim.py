"""`sluice dkim`: keys that sign the mail of a domain. Rules and checks are those of the API's own handlers, called in process."""

from typing import TYPE_CHECKING, Any, Final

from control.cli_base import EPILOG, Stores, call, click, convert, facts, fail, json_option, say, table, with_stores, write_json

if TYPE_CHECKING:
    from control.dkim import DkimKeyShown, DkimRecordCheck

_DOMAIN = click.argument("domain", metavar="DOMAIN")
_SELECTOR = click.argument("selector", metavar="SELECTOR")

_PAGE: Final = 1000


@click.group("dkim", epilog=EPILOG)
def dkim_group() -> None:
    """DKIM keys: mail from a domain with an active key is signed."""


async def _all(stores: Stores, domain: str | None) -> "list[DkimKeyShown]":
    from control import dkim as api

    found: list[DkimKeyShown] = []
    after: int | None = 0
    while after is not None:
        page = await call(stores, api.DkimKeyController.page, after=after, limit=_PAGE, domain=domain)
        found += page.items
        after = page.next
    return found


async def _find(stores: Stores, domain: str, selector: str) -> "DkimKeyShown":
    """The key of this user, else anybody's. Raises NotFound."""
    from domain.errors import NotFound

    found = [key for key in await _all(stores, domain) if key.selector == selector.lower()]
    if not found:
        raise NotFound("DKIM key", f"{selector}._domainkey.{domain}")
    return next((key for key in found if key.user_id == stores.user_id), found[0])


@dkim_group.command("new", epilog=EPILOG)
@_DOMAIN
@click.option("--selector", default="", help="Name of the key in the DNS. Default: kind and month, as rsa202611.")
@click.option("--algorithm", type=click.Choice(["rsa", "ed25519"]), default="rsa", show_default=True,
              help="ed25519 signs beside an RSA key: not every receiver knows it.")  # fmt: skip
@click.option("--bits", type=click.Choice(["1024", "2048", "3072", "4096"]), default="2048", show_default=True, help="Size of an RSA key.")
@click.option("--import", "private_key", type=click.File("r", encoding="utf-8", errors="replace"), metavar="FILE",
              help="Take this private key (PEM, no password; - = standard input) instead of making one.")  # fmt: skip
@click.option("--activate/--wait", "activate", default=None,
              help="Sign with it at once, or not yet. Default: at once unless the domain has a key of its kind.")  # fmt: skip
@json_option
def dkim_new(domain: str, as_json: bool, private_key: Any, algorithm: str, bits: str, **given: Any) -> None:
    """Make a key for DOMAIN and print the DNS record to publish."""

    async def work(stores: Stores) -> "DkimKeyShown":
        from control import dkim as api

        fields = {"domain": domain, "algorithm": f"{algorithm}-sha256", "bits": int(bits), **given}
        if private_key is not None:
            fields["private_key"] = private_key.read() or "\n"  # an empty file is no wish for a new key
        return await call(stores, api.DkimKeyController.create, data=convert(fields, api.DkimKeyCreate))  # type: ignore[no-any-return]

    key = with_stores(work)
    if as_json:
        write_json(key)
        return
    click.echo(key.zone_line)
    for warning in key.warnings:
        say(f"warning: {warning}")
    if key.state == "active":
        say(f"Publish this record now: mail from {key.domain} is signed with it from now on.")
    else:
        say(f"Publish this record; when it can be seen: sluice dkim activate {key.domain} {key.selector}")


@dkim_group.command("list", epilog=EPILOG)
@click.option("--domain", metavar="DOMAIN", help="Only those of this domain.")
@json_option
def dkim_list(domain: str | None, as_json: bool) -> None:
    """Show all keys."""

    async def work(stores: Stores) -> "list[DkimKeyShown]":
        return await _all(stores, domain)

    found = with_stores(work)
    if as_json:
        write_json(found)
        return
    rows = ((k.id, k.domain, k.selector, k.algorithm, str(k.bits), k.state, k.retired_at or k.activated_at or k.created_at) for k in found)
    table("DKIM keys", (">id", "domain", "selector", "algorithm", ">bits", "state", "since"), rows)


@dkim_group.command("show", epilog=EPILOG)
@_DOMAIN
@_SELECTOR
@json_option
def dkim_show(domain: str, selector: str, as_json: bool) -> None:
    """Show a key and its DNS record; never its private half."""

    async def work(stores: Stores) -> "DkimKeyShown":
        return await _find(stores, domain, selector)

    _show(with_stores(work), as_json)


@dkim_group.command("activate", epilog=EPILOG)
@_DOMAIN
@_SELECTOR
@json_option
@click.option("--check", is_flag=True, help="Only if the DNS shows its record.")
def dkim_activate(domain: str, selector: str, as_json: bool, check: bool) -> None:
    """Sign with this key from now on. The key of its kind that signed so far retires; leave its record published for a week."""

    async def work(stores: Stores) -> "DkimKeyShown":
        from control import dkim as api

        key = await _find(stores, domain, selector)
        return await call(stores, api.DkimKeyController.activate, key_id=key.id, check=check)  # type: ignore[no-any-return]

    _show(with_stores(work), as_json)


@dkim_group.command("check", epilog=EPILOG)
@_DOMAIN
@_SELECTOR
@json_option
def dkim_check(domain: str, selector: str, as_json: bool) -> None:
    """Look for the record of a key in the DNS. Exit code 1 when it is not there, or says something else."""

    async def work(stores: Stores) -> "DkimRecordCheck":
        from control import dkim as api

        key = await _find(stores, domain, selector)
        return await call(stores, api.DkimKeyController.check, key_id=key.id)  # type: ignore[no-any-return]

    found = with_stores(work)
    if as_json:
        write_json(found)
    if not found.published:
        fail(f"{found.record_name} {found.says}")
    if not as_json:
        click.echo(f"{found.record_name} {found.says}")


@dkim_group.command("retire", epilog=EPILOG)
@_DOMAIN
@_SELECTOR
@json_option
def dkim_retire(domain: str, selector: str, as_json: bool) -> None:
    """Sign with this key no more. Leave its record published for a week."""

    async def work(stores: Stores) -> "DkimKeyShown":
        from control import dkim as api

        key = await _find(stores, domain, selector)
        return await call(stores, api.DkimKeyController.retire, key_id=key.id)  # type: ignore[no-any-return]

    _show(with_stores(work), as_json)


def _show(key: "DkimKeyShown", as_json: bool) -> None:
    if as_json:
        write_json(key)
        return
    facts((name, getattr(key, name)) for name in ("id", "domain", "selector", "state", "created_at", "activated_at", "retired_at"))
    facts([("algorithm", f"{key.algorithm}, {key.bits} bits")])
    click.echo(key.zone_line)
    for warning in key.warnings:
        say(f"warning: {warning}")


COMMANDS: Final = (dkim_group,)
