"""What daemon and keeper agree on: the keeper may be older than the daemon that finds it."""

VERSION = 1
"""Of the keeper's requests; a daemon that speaks another version starts a keeper of its own."""
