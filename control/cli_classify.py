"""`sluice classify`: how a reply or a returned message is understood, and which rule says so."""

import sys
from typing import TYPE_CHECKING, Final

from control.cli_base import EPILOG, USAGE, become, click, facts, json_option, load_settings, say, write_json

if TYPE_CHECKING:
    from domain.bounce import BounceRules, Explained

_STORE_SECONDS: Final = 3.0


@click.command("classify", epilog=EPILOG)
@click.argument("reply", required=False)
@click.option("--eml", is_flag=True, help="Read paths of message files on standard input; write one JSON line each.")
@click.option(
    "--replies", is_flag=True, help='Read JSON lines {"id", "text"} on standard input; write {"id", "hard", "category", "status"}.'
)
@click.option("--shipped", is_flag=True, help="By the shipped rules alone, without the bounce patterns of this installation.")
@json_option
def classify(reply: str | None, eml: bool, replies: bool, shipped: bool, as_json: bool) -> None:
    """Show how a reply is understood: `sluice classify "550 5.7.1 Message rejected"`.

    Names the category, whose fault it is, whether the address is unusable for good, and the rule and pattern that decided. The bounce
    patterns of this installation come first (`sluice bounce-pattern`), if its database runs; then the rules of
    config/bounce_rules.toml, in order. --eml and --replies read by the shipped rules alone. Nothing is recorded: it only tells.
    """
    if [reply is not None, eml, replies].count(True) != 1:
        raise click.UsageError('give one reply in quotes, or --eml, or --replies (see "sluice classify --help")')
    if eml:
        become("inbound.classify")
    if replies:
        sys.exit(_replies())
    show_explained(_rules(shipped).explain(0, reply or ""), as_json)


def show_explained(found: "Explained", as_json: bool) -> None:
    """How a reply is understood, and why."""
    from msgspec.structs import asdict

    if as_json:
        write_json(found)
    else:
        facts((name.replace("_", " "), value) for name, value in asdict(found).items())


def _rules(shipped: bool) -> "BounceRules":
    """The rules of this installation. Nothing is started to be asked: where the database does not run, the shipped ones."""
    import asyncio
    import json

    from config.load import state_directory
    from domain.bounce import shipped_rules
    from store import bounce_patterns, postgres
    from store.trouble import STORE_ERRORS

    if shipped:
        return shipped_rules()
    settings = load_settings()

    async def asked() -> "BounceRules":
        url = settings.database.url
        if url == "embedded:":
            url = json.loads((state_directory(settings) / "embedded.json").read_text())["database_url"]
        async with asyncio.timeout(_STORE_SECONDS):
            pool = await postgres.open_pool(url, 1, _STORE_SECONDS, connect_timeout_seconds=_STORE_SECONDS)
            try:
                return await bounce_patterns.rules(pool)
            finally:
                pool.terminate()

    unusable: tuple[type[Exception], ...] = (*STORE_ERRORS, ValueError, KeyError)  # the last two: the record of private servers
    try:
        return asyncio.run(asked())
    except unusable:
        say("the database does not run: by the shipped rules alone")
        return shipped_rules()


def _replies() -> int:
    import msgspec

    from domain.bounce import shipped_rules, stated_status

    rules = shipped_rules()
    for number, line in enumerate(sys.stdin.buffer, 1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line)
            name, text = row["id"], str(row["text"])
        except (msgspec.DecodeError, KeyError, TypeError):
            say(f'line {number}: not a JSON object with "id" and "text"')
            return USAGE
        means = rules.classify(0, text)
        answer = {"id": name, "hard": means.hard, "category": means.category, "status": stated_status(0, text)}
        sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
    return 0


COMMANDS: Final = (classify,)
