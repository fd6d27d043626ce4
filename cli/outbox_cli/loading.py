"""What MODULE:ATTRIBUTE names: a thing of the service's own, imported in its environment."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from outbox.errors import ConfigError


def load_attribute(name: str, *, what: str, example: str) -> object:
    """Import it, from the working directory as well. `what` it is to be, and an `example` of how it is named."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{name!r} is no MODULE:ATTRIBUTE.", cure=f"Write for example: {example}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: object = import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"The module {module} cannot be imported: {error}.",
            cure="Run it in the service's environment, in the directory that its modules are imported from.",
        ) from error
    except Exception as error:
        raise ConfigError(
            f"The module {module} fails while it is imported: {error.__class__.__name__}: {error}.",
            cure="Give it what it needs (a variable of the environment, a setting); --debug shows where it fails.",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"The module {module} has no {attribute}.", cure=f"Define it: {what}.")
        found = getattr(found, part)
    return found
