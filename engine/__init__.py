"""Leases batches, schedules, connects and sends."""
