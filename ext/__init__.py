"""The Cython hot path: one job per module; knows bytes, replies and transports, never campaigns or stores."""
