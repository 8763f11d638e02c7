"""The fault harness: a real fleet, faults on purpose, and a count of what became of every message (docs/delivery-contract.md)."""
