"""PostgreSQL and Redis: the only room that knows a table, a query or a key."""
