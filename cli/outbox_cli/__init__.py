"""The command line of the outbox."""
