"""The golden Liquid suite, written by others, through `sluice template render`: every case but those about files.

Cases and licence: tests/data/golden_liquid.ndjson and .LICENSE.
"""

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.compose.test_rendering import ROOT

LINES = (Path(__file__).parents[1] / "data" / "golden_liquid.ndjson").read_text("utf-8").splitlines()
CASES: list[dict[str, Any]] = [json.loads(line) for line in LINES]

# python-liquid, whose parser is ours, takes a broken tag inside a comment for what it is: not parsed
OTHERWISE = {"comment_tag: incomplete tags are not parsed"}


def test_the_golden_suite_passes_through_the_command() -> None:
    given = "\n".join(json.dumps({"template": case["template"], "data": case.get("data", {})}) for case in CASES)
    before = dt.datetime.now()
    done = subprocess.run(
        [sys.executable, "-m", "control.cli", "template", "render"], input=given, capture_output=True, text=True, cwd=ROOT, timeout=300,
        check=True, env={"PATH": "", "PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"},
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(CASES) > 950
    failed = {}
    for case, answer in zip(CASES, answers, strict=True):
        wanted = case.get("result", "")
        if "'%d/%m/%Y'" in case["template"] and ("now" in case["template"] or "today" in case["template"]):
            wanted = before.strftime("%d/%m/%Y")  # the suite was written down on another day
        good = "error" in answer if case.get("error") else answer.get("result") == wanted
        if not good and case["name"] not in OTHERWISE:
            failed[case["name"]] = answer
    assert failed == {}
