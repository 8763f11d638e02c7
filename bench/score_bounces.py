"""Scores bounce recognition against a labelled corpus (`../shared/corpus`, its README has the labels).

    python -m bench.score_bounces [CORPUS] [--wrong] [--matrix]

Messages are fed with LF and with CRLF line ends: both must read the same.
"""

import argparse
import collections
import json
import sys
import time
from pathlib import Path
from typing import Any

from domain.bounce import shipped_rules
from inbound.classify import answer
from inbound.triage import read

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "corpus"


def score_messages(corpus: Path, wrong: list[str]) -> dict[str, Any]:
    """Read every message and count. Lines about wrong answers are added to `wrong`."""
    records = [json.loads(line) for line in (corpus / "bounces" / "expected.jsonl").read_text("utf-8").splitlines()]
    count: collections.Counter[str] = collections.Counter()
    confusion: collections.Counter[tuple[str, str]] = collections.Counter()
    kinds: collections.Counter[tuple[str, str]] = collections.Counter()
    messages = [(corpus / "bounces" / record["file"]).read_bytes() for record in records]
    for record, raw in zip(records, messages, strict=True):
        lf = raw.replace(b"\r\n", b"\n")
        got = answer(read(raw))
        if got != answer(read(lf)) or got != answer(read(lf.replace(b"\n", b"\r\n"))):
            count["depends on line ends"] += 1
            wrong.append(f"line ends {record['file']}")
        judge(record, got, count, confusion, kinds, wrong, raw)
    shipped_rules().classify.cache_clear()
    started = time.process_time()
    for raw in messages:
        read(raw)
    seconds = time.process_time() - started
    return {"count": count, "confusion": confusion, "kinds": kinds, "messages_per_second": len(messages) / seconds}


def judge(record: dict[str, Any], got: dict[str, Any], count: collections.Counter[str], confusion: collections.Counter[tuple[str, str]],
          kinds: collections.Counter[tuple[str, str]], wrong: list[str], raw: bytes) -> None:  # fmt: skip
    """Compare one answer with its label."""

    def say(what: str, right: object, given: object) -> None:
        wrong.append(f"{what:10} {record['file'][7:]} right={right} got={given} {got}")

    kinds[record["kind"], got["kind"]] += 1
    count["messages"] += 1
    count["kind right"] += got["kind"] in record["kind_ok"]
    if got["kind"] not in record["kind_ok"]:
        say("kind", record["kind_ok"], got["kind"])
    if "dsn" not in record["kind_ok"] and "arf" not in record["kind_ok"]:
        count["not reports"] += 1
        bad = got["kind"] in ("dsn", "arf")
        count["false positives"] += bad
    if record["kind"] in ("arf", "autoreply"):
        count[record["kind"]] += 1
        count[f"{record['kind']} right"] += got["kind"] in record["kind_ok"]
    if record["kind"] == "arf":
        count["feedback type right"] += got["feedback_type"] == record["feedback_type"]
        count["arf recipients right"] += set(got["recipients"]) == set(record["recipients"])
        if set(got["recipients"]) != set(record["recipients"]) or got["feedback_type"] != record["feedback_type"]:
            say("arf", (record["feedback_type"], record["recipients"]), (got["feedback_type"], got["recipients"]))
    if record["kind"] != "dsn" or (got["kind"] != "dsn" and got["kind"] in record["kind_ok"]):
        return
    count["action"] += 1
    count["action right"] += got["action"] == record["action"]
    if got["action"] != record["action"]:
        say("action", record["action"], got["action"])
    if record["action"] != "failed":
        return
    named = set(got["recipients"])
    spelled = {right: {right, *record["recipients_alt"].get(right, ())} for right in record["recipients"]}
    allowed = set().union(*spelled.values(), record.get("recipients_delayed", ()))
    found = sum(1 for names in spelled.values() if names & named)
    count["recipients"] += len(spelled)
    count["recipients found"] += found
    exact = found == len(spelled) and named <= allowed
    count["failed"] += 1
    count["exact"] += exact
    if not exact:
        say("recipients", record["recipients"], sorted(named))
    if record["hard"] is not None:
        count["hardness"] += 1
        count["hardness right"] += got["hard"] == record["hard"]
        count["soft"] += not record["hard"]
        count["false hard"] += bool(got["hard"] and not record["hard"])
        if got["hard"] != record["hard"]:
            say("hard", record["hard"], got["hard"])
    if record["status_ok"]:
        count["status"] += 1
        count["status right"] += got["status"] in record["status_ok"]
        if got["status"] not in record["status_ok"]:
            say("status", record["status_ok"], got["status"])
    elif got["status"] and got["status"].encode() not in raw:
        count["status invented"] += 1
        say("invented", None, got["status"])
    if record["category_ok"]:
        count["category"] += 1
        good = got["category"] in record["category_ok"]
        count["category right"] += good
        confusion[record["category"], record["category"] if good else str(got["category"])] += 1
        if not good:
            say("category", record["category_ok"], got["category"])


def score_replies(corpus: Path, wrong: list[str]) -> collections.Counter[str]:
    """Classify every reply and count."""
    count: collections.Counter[str] = collections.Counter()
    rules = shipped_rules()
    for line in (corpus / "replies.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        means = rules.classify(0, record["text"])
        count["replies"] += 1
        count["category right"] += means.category in record["category_ok"]
        if record["hard"] is not None:
            count["hardness"] += 1
            count["hardness right"] += means.hard == record["hard"]
            count["false hard"] += means.hard and not record["hard"]
        if means.category not in record["category_ok"] or (record["hard"] is not None and means.hard != record["hard"]):
            wrong.append(f"reply {record['id']} right={record['category_ok']},{record['hard']} got={means} {record['text'][:160]}")
    return count


def matrix(confusion: collections.Counter[tuple[str, str]]) -> str:
    """The confusion of categories as a Markdown table: a row for each label, a column for each answer."""
    answers = sorted({given for _, given in confusion})
    labels = sorted({label for label, _ in confusion})
    lines = ["| label \\ answer | " + " | ".join(answers) + " |", "|---" * (len(answers) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(str(confusion[label, given] or "") for given in answers) + " |" for label in labels]
    return "\n".join(lines)


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:6.2f} %  ({part} of {whole})" if whole else "   none"


def main(arguments: list[str] | None = None) -> int:
    """Print the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--wrong", action="store_true", help="name every wrong answer")
    parser.add_argument("--matrix", action="store_true", help="print labels against answers as a table")
    options = parser.parse_args(arguments)
    if not (options.corpus / "bounces" / "expected.jsonl").is_file():
        print(f"no corpus at {options.corpus}: name the folder that holds bounces/expected.jsonl and replies.jsonl", file=sys.stderr)
        return 2
    wrong: list[str] = []
    result = score_messages(options.corpus, wrong)
    replies = score_replies(options.corpus, wrong)
    count = result["count"]
    rows = (
        ("recipients found", count["recipients found"], count["recipients"]),
        ("recipients exactly", count["exact"], count["failed"]),
        ("hard or soft", count["hardness right"], count["hardness"]),
        ("false hard", count["false hard"], count["soft"]),
        ("status", count["status right"], count["status"]),
        ("category", count["category right"], count["category"]),
        ("action", count["action right"], count["action"]),
        ("kind", count["kind right"], count["messages"]),
        ("false positives", count["false positives"], count["not reports"]),
        ("complaints (ARF)", count["arf right"], count["arf"]),
        ("  feedback type", count["feedback type right"], count["arf"]),
        ("  recipients", count["arf recipients right"], count["arf"]),
        ("autoreplies", count["autoreply right"], count["autoreply"]),
        ("replies: category", replies["category right"], replies["replies"]),
        ("replies: hard or soft", replies["hardness right"], replies["hardness"]),
        ("replies: false hard", replies["false hard"], replies["hardness"]),
    )
    for name, part, whole in rows:
        print(f"{name:24}{percent(part, whole)}")
    for name in ("status invented", "depends on line ends"):
        print(f"{name:24}{count[name]:6}")
    print(f"{'messages a second':24}{result['messages_per_second']:6.0f}  (of one core, by processor time)")
    if options.matrix:
        print(matrix(result["confusion"]) + "\n\n" + matrix(result["kinds"]))
    if options.wrong:
        print("\n".join(wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())
