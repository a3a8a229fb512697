"""Larger than one machine, by Ray: a server's application as replicas of Ray Serve, and collecting by Ray Data."""
