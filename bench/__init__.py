"""The sink that plays the mailbox providers, and measurements against it."""
