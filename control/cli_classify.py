"""`sluice classify`: how a reply or a returned message is understood, and which rule says so."""

import sys
from typing import Final

from control.cli_base import EPILOG, USAGE, become, click, facts, json_option, say, write_json


@click.command("classify", epilog=EPILOG)
@click.argument("reply", required=False)
@click.option("--eml", is_flag=True, help="Read paths of message files on standard input; write one JSON line each.")
@click.option(
    "--replies", is_flag=True, help='Read JSON lines {"id", "text"} on standard input; write {"id", "hard", "category", "status"}.'
)
@json_option
def classify(reply: str | None, eml: bool, replies: bool, as_json: bool) -> None:
    """Show how a reply is understood: `sluice classify "550 5.7.1 Message rejected"`.

    Names the category, whose fault it is, whether the address is unusable for good, and the rule and pattern that decided. Rules are in
    config/bounce_rules.toml, tried in order. Nothing is recorded: it only tells.
    """
    if [reply is not None, eml, replies].count(True) != 1:
        raise click.UsageError('give one reply in quotes, or --eml, or --replies (see "sluice classify --help")')
    if eml:
        become("inbound.classify")
    if replies:
        sys.exit(_replies())
    _explain(reply or "", as_json)


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


def _explain(reply: str, as_json: bool) -> None:
    from domain.bounce import shipped_rules, stated_status

    rules = shipped_rules()
    means = rules.classify(0, reply)
    seen, matches = rules.explain(0, reply)
    also = list(dict.fromkeys(name for name, _ in matches if name not in (means.rule, "other")))
    found = {
        "category": means.category,
        "fault": means.fault,
        "hard": means.hard,
        "transient": means.transient,
        "status": stated_status(0, reply),
        "rule": means.rule,
        "pattern": matches[0][1] if matches else None,
        "seen_as": seen,
        "also": also,
    }
    if as_json:
        write_json(found)
    else:
        facts((name, ", ".join(value) if isinstance(value, list) else value) for name, value in found.items())


COMMANDS: Final = (classify,)
