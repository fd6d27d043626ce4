"""The service `adverts`: people offer things, change their minds about the price, and sell."""

from __future__ import annotations

import os
from decimal import Decimal
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from marketplace.adverts.models import Advert
from marketplace.http import serve

url = os.environ["OUTBOX_DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://", 1)
Session = sessionmaker(create_engine(url, pool_pre_ping=True))


async def put(request: Request) -> JSONResponse:
    """Offer, or change."""
    number = request.path_params["id"]
    await run_in_threadpool(_put, number, await request.json())
    return JSONResponse({"id": number})


def _put(number: int, given: dict[str, Any]) -> None:
    with Session.begin() as session:
        advert = session.get(Advert, number, with_for_update=True)
        if advert is None:
            advert = Advert(id=number, seller=0, title="", text="", price=Decimal(0))
            session.add(advert)
        advert.seller, advert.title, advert.text = given["seller"], given["title"], given["text"]
        advert.price = Decimal(given["price"])


def delete(request: Request) -> JSONResponse:
    """Sold."""
    with Session.begin() as session:
        advert = session.get(Advert, request.path_params["id"])
        if advert is not None:
            session.delete(advert)
    return JSONResponse({})


def health(_request: Request) -> JSONResponse:
    """Whether the database answers."""
    with Session.begin() as session:
        count = session.query(Advert).count()
    return JSONResponse({"adverts": count})


if __name__ == "__main__":
    serve(
        [
            Route("/adverts/{id:int}", put, methods=["PUT"]),
            Route("/adverts/{id:int}", delete, methods=["DELETE"]),
            Route("/health", health),
        ]
    )
