"""The page: the search as `search` answers it, and a panel of everything that can be stopped and started."""

from __future__ import annotations

import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from devstack.processes import ServerError
from marketplace.http import get
from marketplace.load import Load
from marketplace.market import PARTS, Market
from marketplace.watch import Watch

_PAGE = Path(__file__).with_name("page.html")
# A machine that starts a broker beside it may be slow; whoever looks at the page would wait, too.
_SEARCH_SECONDS = 15.0


def app(market: Market, load: Load) -> Starlette:
    """The aggregator over a market."""
    watch = Watch(market)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        watch.start()
        try:
            yield
        finally:
            watch.stop()

    def page(_request: Request) -> Response:
        return FileResponse(_PAGE)

    def search(request: Request) -> Response:
        words = urllib.parse.quote(request.query_params.get("q", ""))
        found = get(f"{market.url('search')}/search?q={words}", seconds=_SEARCH_SECONDS)
        return JSONResponse(found, status_code=200 if found is not None else 503)

    def status(_request: Request) -> Response:
        said = {name: asdict(one) for name, one in watch.said().items()}
        return JSONResponse({"parts": said, "load": {"taken": load.taken, "refused": load.refused}})

    def change(request: Request) -> Response:
        name, what = request.path_params["name"], request.path_params["what"]
        if name not in PARTS or what not in {"start", "stop"}:
            return JSONResponse({"error": f"There is no {name} to {what}."}, status_code=404)
        try:
            (market.start if what == "start" else market.stop)(name)
        except ServerError as error:
            return JSONResponse({"error": str(error)}, status_code=500)
        return JSONResponse(market.running())

    routes = [
        Route("/", page),
        Route("/api/search", search),
        Route("/api/status", status),
        Route("/api/{name}/{what}", change, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)
