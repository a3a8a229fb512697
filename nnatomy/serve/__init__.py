"""A server that holds a model for clients elsewhere: see `nnatomy.remote`."""
