"""Write the state of your entities into the outbox, in your own transaction."""

from outbox._version import __version__

__all__ = ["__version__"]
