"""Managing the cache of a running server, on the scheduler's side."""
