"""What happened: the append-only journal on local disk and the readers that carry it on."""
