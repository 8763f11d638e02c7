"""What we say: a campaign compiled once, then message bytes per recipient."""
