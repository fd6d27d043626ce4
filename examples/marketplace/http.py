"""What the services share: nothing but how HTTP is served and asked."""

from __future__ import annotations

import http.client
import json
import os
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def serve(routes: Sequence[Route], *, lifespan: Lifespan | None = None) -> None:
    """Serve on the port that the environment names, on this machine alone, until stopped."""
    uvicorn.run(
        Starlette(routes=list(routes), lifespan=lifespan),
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        log_level="warning",
    )


def get(url: str, *, seconds: float) -> Any:
    """What a service answers; None when it does not, within that time."""
    try:
        with urllib.request.urlopen(url, timeout=seconds) as answer:
            return json.loads(answer.read())
    except (OSError, ValueError, http.client.HTTPException):
        return None
