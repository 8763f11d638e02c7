"""`python -m bench.bench_classify`: how many replies a second one core classifies, distinct ones and repeated ones apart.

    python -m bench.bench_classify [CORPUS] [--patterns N] [--json]

Distinct: every reply is read anew (the cache of whole replies is emptied before each round). As they come: the same replies with other
recipients, queue ids and times in them, which no cache of whole replies helps. Repeated: the cache answers. CPU of this process,
the best of the rounds; the automata are warm, as they are after the first replies of their kind. No timing is asserted anywhere.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

from bench.score_bounces import DEFAULT
from domain.bounce import CATEGORIES, BounceRules, shipped_rules
from domain.bounce_patterns import read_line

ROUNDS = 60
VARIANTS = 8


def microseconds(texts: list[str], classify: Callable[[int, str], object], before: Callable[[], None]) -> float:
    """CPU for each text, the best round."""
    spent = []
    for _ in range(ROUNDS):
        before()
        started = time.process_time()
        for text in texts:
            classify(0, text)
        spent.append(time.process_time() - started)
    return min(spent) / len(texts) * 1e6


def varied(texts: list[str]) -> list[str]:
    """The replies as they come from a provider: numbers of four digits and more, and local parts, are others each time."""
    choose = random.Random(1)

    def number(found: re.Match[str]) -> str:
        return "".join(choose.choice("123456789") for _ in found[0])

    made = []
    for _ in range(VARIANTS):
        for text in texts:
            text = re.sub(r"\b[\w.+-]+@", lambda _: f"reader{choose.randrange(10**9)}@", text)
            made.append(re.sub(r"\d{4,}", number, text))
    return made


def measure(corpus: Path, patterns: int) -> dict[str, float]:
    """Microseconds for each kind, with `patterns` of an operator in front."""
    texts = [json.loads(line)["text"] for line in (corpus / "replies.jsonl").read_text("utf-8").splitlines()]
    rules: BounceRules = shipped_rules()
    if patterns:
        words = frozenset(CATEGORIES)
        rules = rules.with_patterns([read_line(f"550 5.7.1 text number {i} of an operator==>Hard", words) for i in range(patterns)])
    distinct = list(dict.fromkeys(texts))
    return {
        "distinct": microseconds(distinct, rules.classify, rules.classify.cache_clear),
        "as they come": microseconds(varied(distinct), rules.classify, rules.classify.cache_clear),
        "repeated": microseconds(distinct, rules.classify, lambda: None),
    }


def main() -> None:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--patterns", type=int, default=100, help="So many patterns of an operator in the second table (default 100).")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {f"{count} patterns": measure(options.corpus, count) for count in (0, options.patterns)}
    if options.json:
        print(json.dumps({name: {kind: round(cost, 3) for kind, cost in costs.items()} for name, costs in found.items()}))
        return
    for name, costs in found.items():
        for kind, cost in costs.items():
            print(f"{name:14}{kind:14}{cost:8.2f} us{1e6 / cost:14,.0f} replies/s of one core")


if __name__ == "__main__":
    main()
