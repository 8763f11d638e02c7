"""The Litestar API, the console and the `sluice` command."""
