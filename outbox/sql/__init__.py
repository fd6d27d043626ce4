"""Named queries, in files.

A file holds queries, each after a line `-- name: NAME` and comments that say what it is for. `{schema}` in a query
stands for the quoted name of the outbox's schema.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


@cache
def load(name: str) -> dict[str, str]:
    """The queries of the file `name`.sql, by their names; comments are left out."""
    text = files("outbox.sql").joinpath(f"{name}.sql").read_text("utf-8")
    parts = _NAME.split(text)
    return {
        query: "\n".join(line for line in body.splitlines() if not line.lstrip().startswith("--")).strip().rstrip(";")
        for query, body in zip(parts[1::2], parts[2::2], strict=True)
    }
