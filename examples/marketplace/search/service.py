"""The service `search`: answers from its own database, whoever else is down."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import create_engine, func, select
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from marketplace.http import serve
from marketplace.search.copies import model
from marketplace.search.tables import offers

_MOST = 50
_SHOWN = ("id", "title", "text", "price", "seller_name", "city")
reading = create_engine(
    os.environ["SEARCH_DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://", 1), pool_pre_ping=True
)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """The read model runs as long as the service does; the service does not wait for it."""
    async with model.running_async() as copies:
        app.state.copies = copies
        yield


def search(request: Request) -> JSONResponse:
    """How many offers have all of the words, and the first of them by their numbers."""
    # A text of PostgreSQL's has no NUL, so no offer has.
    words = request.query_params.get("q", "").replace("\0", " ").strip()
    query = select(offers)
    if words:
        query = query.where(offers.c.words.op("@@")(func.websearch_to_tsquery("english", words)))
    with reading.connect() as connection:
        total = connection.execute(select(func.count()).select_from(query.subquery())).scalar_one()
        found = connection.execute(query.order_by(offers.c.id).limit(_MOST)).mappings().all()
    shown = [{name: str(row[name]) if name == "price" else row[name] for name in _SHOWN} for row in found]
    return JSONResponse({"total": total, "offers": shown})


def health(request: Request) -> JSONResponse:
    """How old the copy is, and how much there is."""
    with reading.connect() as connection:
        count = connection.execute(select(func.count()).select_from(offers)).scalar_one()
    copies = request.app.state.copies
    return JSONResponse(
        {"offers": count, "ready": copies.ready, "loaded": copies.loaded, "staleness": copies.staleness()}
    )


if __name__ == "__main__":
    serve([Route("/search", search), Route("/health", health)], lifespan=lifespan)
