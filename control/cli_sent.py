"""`sluice resend --dry` and `sluice seed`: what was sent, octet for octet; and who gets a copy of every campaign."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from control.cli_base import EPILOG, Stores, call, click, convert, fail, json_option, number, say, table, with_stores, write_json

if TYPE_CHECKING:
    from control.sent import MadeAgain
    from store.seeds import Seed


@click.command("resend", epilog=EPILOG)
@number("campaign_id", "CAMPAIGN")
@click.argument("recipient", metavar="RECIPIENT")
@click.option("--dry", is_flag=True, required=True, help="Make it again and look at it; send nothing. There is no other way.")
@click.option("--eml", "file", type=click.Path(dir_okay=False), help="Write the message to this file.")
@json_option
def resend(campaign_id: int, recipient: str, dry: bool, file: str | None, as_json: bool) -> None:
    """Make a sent message again, to the same octets, and verify its signatures.

    RECIPIENT is a number in the campaign or an address. Writes the message to standard output. Exit code 1 when its size is not the one
    that was recorded, which is all that is kept of a sent message, or a signature does not verify.
    """
    import base64

    del dry  # required: the name says that nothing leaves

    async def work(stores: Stores) -> "MadeAgain":
        from control.sent import SentController

        made: MadeAgain = await call(stores, SentController.message, campaign_id=campaign_id, recipient=recipient)
        return made

    made = with_stores(work)
    wire = base64.b64decode(made.message)
    if file:
        Path(file).write_bytes(wire)
    if as_json:
        write_json(made)
    elif not file:
        click.echo(wire.decode("utf-8", "replace"), nl=False)
    for each in made.signatures:
        say(f"signature of {each.selector}._domainkey.{each.domain} ({each.algorithm}): {'good' if each.good else each.reason}")
    say(f"{made.size:,} octets, {made.recorded_size:,} recorded when it was sent ({made.kind}, attempt {made.attempt})")
    if not made.same_size or not all(each.good for each in made.signatures):
        fail("this is not what was sent: settings, delivery server or keys have changed since, or a signature does not verify")


@click.group("seed", epilog=EPILOG)
def seed_group() -> None:
    """The seed list: addresses that get one extra copy of every marketing campaign, outside its figures."""


@seed_group.command("add", epilog=EPILOG)
@click.argument("email", metavar="ADDRESS")
@click.option("--everybody", is_flag=True, help="For the campaigns of all users.")
@json_option
def seed_add(email: str, everybody: bool, as_json: bool) -> None:
    """Add an address; campaigns that start from now on are copied to it."""

    async def work(stores: Stores) -> "Seed":
        from control import seeds as api

        made: Seed = await call(stores, api.SeedController.create, data=convert({"email": email, "everybody": everybody}, api.SeedCreate))
        return made

    made = with_stores(work)
    if as_json:
        write_json(made)
    else:
        click.echo(f"{made.email} gets a copy of every campaign")


@seed_group.command("list", epilog=EPILOG)
@json_option
def seed_list(as_json: bool) -> None:
    """Show the seed list."""
    found = with_stores(_seeds)
    if as_json:
        write_json(found)
    else:
        rows = ((each.id, each.email, "everybody" if each.user_id is None else each.user_id) for each in found)
        table("seed list", (">id", "address", "campaigns of"), rows)


async def _seeds(stores: Stores) -> "list[Seed]":
    from store import postgres, seeds

    async with postgres.connection(stores.pool) as conn:
        return await seeds.list_seeds(conn, None)


@seed_group.command("remove", epilog=EPILOG)
@click.argument("email", metavar="ADDRESS")
def seed_remove(email: str) -> None:
    """Take an address off the seed list."""

    async def work(stores: Stores) -> int:
        from store import postgres, seeds

        gone = [each.id for each in await _seeds(stores) if each.email.lower() == email.lower()]
        async with postgres.transaction(stores.pool) as conn:
            for seed_id in gone:
                await seeds.remove(conn, None, seed_id)
        return len(gone)

    if not with_stores(work):
        fail(f"{email} is not on the seed list")


COMMANDS: Final = (resend, seed_group)
