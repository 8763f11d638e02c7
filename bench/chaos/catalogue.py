"""Every fault there is, the rows of the matrix that are not played, and the groups in which results are told."""

from typing import Final

from bench.chaos import isolation, peer_faults, process_faults, store_faults, world_faults
from bench.chaos.fault import CannotRun, Fault

FAULTS: Final[tuple[Fault, ...]] = (
    *process_faults.FAULTS, *store_faults.FAULTS, *peer_faults.FAULTS, *world_faults.FAULTS, *isolation.FAULTS
)  # fmt: skip
CANNOT: Final = (CannotRun(39, "webhooks", "there are none yet"),)
# What a group is called, and its rows of the matrix
GROUPS: Final[tuple[tuple[str, frozenset[int]], ...]] = (
    ("engines killed, stopped, terminated; without descriptors or memory", frozenset({1, 2, 3, 4, 5, 36})),
    ("`sluice up`, API and inbound killed; reload; API flood", frozenset({6, 37, 38})),
    ("Redis killed, wiped, rolled back, hanging, full; its link", frozenset(range(7, 13))),
    ("PostgreSQL stopped, locked, hanging, full; its link", frozenset({13, 14, 15})),
    ("journal: disk full, fsync fails", frozenset({16, 17})),
    ("delivery servers refuse, hang, drop in each phase", frozenset({18, 19, 20, 28, 29})),
    ("taken, then the link dies", frozenset({21})),
    ("421s, refusals, answers out of step, odd ones, floods", frozenset(range(22, 27))),
    ("tarpits and slow links; one server dead, slow or lying", frozenset({27})),
    ("30 of 100 packets lost", frozenset({30})),
    ("greylists, limits, full mailboxes", frozenset({31})),
    ("TLS, certificates and AUTH fail", frozenset({32, 33})),
    ("DNS: SERVFAIL, silence, NXDOMAIN, 1,000 records, a loop of names", frozenset({34})),
    ("an engine's clock jumps or stands still", frozenset({35})),
    ("opens and clicks while PostgreSQL is away", frozenset({40})),
)
