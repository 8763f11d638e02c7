"""`python -m bench.bench_dkim`: what a DKIM signature costs, in microseconds of one core, beside one signature of OpenSSL in the same run.

The letter is that of every bench, about 10 kB, in groups of eight, as the engine composes it. `ratio` is what a signed message costs
over one bare RSA-2048 signature: whatever is above 1 is ours, or other work on the message. Making and parsing keys is outside the
timed window. No timing is asserted anywhere: this prints numbers.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256

from bench import goals, newsletter
from bench.measure import Row, Watch
from compose import dkim_keys, signing_lanes
from compose.campaign import CompiledCampaign
from compose.signing import DkimSigner, SigningKey
from domain.errors import Invalid
from ext.dkim import Fields

GROUP: Final = 8
DISTINCT: Final = 20  # key pairs made; the others of the many are objects of their own with the same numbers
MANY: Final = 10_000


def key(pair: dkim_keys.KeyPair, number: int = 0, *, domain: str = "", lanes: signing_lanes.Lanes | None = None) -> SigningKey:
    """A key object of its own."""
    domain = domain or newsletter.FROM_EMAIL.partition("@")[2]
    return SigningKey(domain, f"s{number}", pair.algorithm, dkim_keys.parse(pair.private_key), lanes=lanes)


def timed(rows: list[tuple[str, Callable[[], int]]], runs: int) -> list[dict[str, Any]]:
    """Microseconds of CPU for each of the things the work of a row says it did, and the ratio to the first row: medians of `runs`.

    Every run goes through all rows, so that what else the machine does falls on all of them; a ratio is of one run.
    """
    found: list[list[float]] = [[] for _ in rows]
    for run in range(-1, runs):
        for kept, (_, work) in zip(found, rows, strict=True):
            begun = time.process_time()
            count = work()
            if run >= 0:
                kept.append((time.process_time() - begun) * 1e6 / count)
    ratios = [statistics.median(mine / first for mine, first in zip(kept, found[0], strict=True)) for kept in found]
    return [
        {"name": name, "us": round(statistics.median(kept), 2), "ratio": round(ratio, 3)}
        for (name, _), kept, ratio in zip(rows, found, ratios, strict=True)
    ]


def many_keys(messages: int, runs: int, lanes: signing_lanes.Lanes | None, way: str) -> list[Row]:
    """Composing signed messages with one key, with 100 keys of 100 domains each, and with 10,000 keys in turn, a group of eight each."""
    pairs = [dkim_keys.make("rsa-sha256") for _ in range(DISTINCT)]
    compiled = newsletter.compiled()
    groups = [newsletter.recipients(messages)[at : at + GROUP] for at in range(0, messages // GROUP * GROUP, GROUP)]

    def signers(count: int, domains: int) -> list[DkimSigner]:
        made = []
        for number in range(count):
            domain = newsletter.FROM_EMAIL.partition("@")[2] if domains == 1 else f"signed{number % domains}.example"
            made.append(DkimSigner([key(pairs[number % DISTINCT], number, domain=domain, lanes=lanes)]))
            made[-1].keys[0].sign([bytes(32)])  # what OpenSSL computes once for a key, when it first signs
        return made

    def in_turn(count: int, domains: int) -> Callable[[], int]:
        of, turn = signers(count, domains), iter(range(10**9))

        def work() -> int:
            for group in groups:
                compiled.signer = of[next(turn) * 7919 % count]
                for answer in compiled.build(group, composed_at=1.7e9, attempt=1):
                    assert not isinstance(answer, Invalid)
            return len(groups) * GROUP

        return work

    watch = Watch()
    works = [
        (goals.ONE_KEY, in_turn(1, 1)),
        ("composition, signed, 100 domains x 100 keys, {}", in_turn(MANY, 100)),
        (goals.MANY_KEYS, in_turn(MANY, MANY)),
    ]
    found = timed(works, runs)
    _, foreign = watch.stop()
    return [
        Row(name=row["name"].format(way), messages=len(groups) * GROUP, cpu_us_per_message=row["us"], foreign_cpu=foreign, runs=runs)
        for row in found
    ]


def measure(messages: int, runs: int) -> list[dict[str, Any]]:
    """The rows, the bare signature first."""
    pairs = [dkim_keys.make("rsa-sha256") for _ in range(DISTINCT)]
    small, edwards = dkim_keys.make("rsa-sha256", 1024), dkim_keys.make("ed25519-sha256")
    groups = [newsletter.recipients(messages)[at : at + GROUP] for at in range(0, messages, GROUP)]
    compiled: CompiledCampaign = newsletter.compiled()
    bare = dkim_keys.parse(pairs[0].private_key)
    assert isinstance(bare, rsa.RSAPrivateKey)
    padding, prehashed = PKCS1v15(), Prehashed(SHA256())

    def signature() -> int:
        for number in range(messages):
            bare.sign(number.to_bytes(32, "big"), padding, prehashed)
        return messages

    def build() -> int:
        for group in groups:
            for answer in compiled.build(group, composed_at=1.7e9, attempt=1):
                assert not isinstance(answer, Invalid)
        return messages

    wires = [answer[2] for answer in compiled.build(groups[0], composed_at=1.7e9, attempt=1) if isinstance(answer, tuple)]
    fields = Fields([(b"rsa-sha256", b"harbour.example", b"s1", 256)])
    blank = [[bytes(256)] * len(wires)]

    def around() -> int:
        for _ in groups:
            fields.complete(wires, fields.prepare(wires, 1_700_000_000)[1], blank)
        return messages

    many = [DkimSigner([key(pairs[number % DISTINCT], number)]) for number in range(MANY)]
    for each in many:
        each.keys[0].sign([bytes(32)])  # what a key computes once, when it signs first
    turn = iter(range(10**9))

    def rotating() -> int:
        for group in groups:
            compiled.signer = many[next(turn) * 7919 % MANY]
            compiled.build(group, composed_at=1.7e9, attempt=1)
        return messages

    lanes = signing_lanes.load()

    def signed(*keys: SigningKey) -> Callable[[], int]:
        def work() -> int:
            compiled.signer = DkimSigner(keys) if keys else None
            return build()

        return work

    rows: list[tuple[str, Callable[[], int]]] = [
        ("one RSA-2048 signature by OpenSSL", signature),
        ("canonical forms, hashes and field of one message", around),
        ("message, unsigned", signed()),
        ("message, RSA-2048, OpenSSL", signed(key(pairs[0], lanes=None))),
        (f"message, RSA-2048, OpenSSL, {MANY:,} keys in turn", rotating),
        ("message, RSA-2048 and Ed25519, OpenSSL", signed(key(pairs[0], lanes=None), key(edwards))),
        ("message, Ed25519", signed(key(edwards))),
        ("message, RSA-1024, OpenSSL", signed(key(small, lanes=None))),
    ]
    if lanes is not None:
        rows.append(("message, RSA-2048, 8 lanes", signed(key(pairs[0], lanes=lanes))))
        rows.append(("message, RSA-1024, 8 lanes", signed(key(small, lanes=lanes))))
    else:
        print("8 lanes: skipped, no ipp-crypto (pip install 'sluice[dkim-lanes]') or no AVX-512 IFMA", file=sys.stderr)
    return timed(rows, runs)


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_dkim", description="What a DKIM signature costs.")
    parser.add_argument("--messages", type=int, default=2000, help="per run and row, a multiple of 8")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.messages // GROUP * GROUP, options.runs)
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return
    for row in rows:
        print(f"{row['name']:<50} {row['us']:>9.2f} us  {row['ratio']:>6.3f} of one signature")


if __name__ == "__main__":
    main()
