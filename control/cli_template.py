"""`sluice template`: try templates without a campaign."""

import json
import sys
from typing import Any, Final

from control.cli_base import EPILOG, click


@click.group("template", epilog=EPILOG)
def template_group() -> None:
    """Templates: docs/templates.md says what they can."""


@template_group.command("render", epilog=EPILOG)
@click.argument("file", type=click.File("r", encoding="utf-8"), default="-")
def template_render(file: Any) -> None:
    """Render JSON lines, one answer for each, as a message would be rendered.

    FILE (- or none: standard input) holds {"template": "...", "data": {...}, "html": false} in each line. The answer is
    {"result": "..."} or {"error": "..."}, with line and column of a mistake in the template. "html": true escapes values for HTML.
    """
    for number, line in enumerate(file, 1):
        if line.strip():
            sys.stdout.write(json.dumps(_answer(line, number), ensure_ascii=False) + "\n")
            sys.stdout.flush()


def _answer(line: str, number: int) -> dict[str, str]:
    from compose.rendering import render
    from domain.errors import Invalid

    try:
        wanted = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {"error": f"line {number} is not valid JSON: {error}"}
    if not isinstance(wanted, dict) or not isinstance(wanted.get("template"), str):
        return {"error": f"line {number}: write an object with a template, a text"}
    data, html = wanted.get("data", {}), wanted.get("html", False)
    if not isinstance(data, dict) or not isinstance(html, bool) or wanted.keys() - {"template", "data", "html"}:
        return {"error": f"line {number}: besides template there is data, an object, and html, true or false; nothing else"}
    try:
        return {"result": render(wanted["template"], data, html=html)}
    except Invalid as refused:
        return {"error": f"{refused.field}: {refused.reason}"}


COMMANDS: Final = (template_group,)
