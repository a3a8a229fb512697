"""The client of a model that lives at a server: see `nnatomy.serve`."""
