"""The service `users`: people register, move, and leave."""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from marketplace.http import serve
from marketplace.users.models import User

url = os.environ["OUTBOX_DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://", 1)
Session = sessionmaker(create_engine(url, pool_pre_ping=True))


async def put(request: Request) -> JSONResponse:
    """Register, or change."""
    number = request.path_params["id"]
    await run_in_threadpool(_put, number, await request.json())
    return JSONResponse({"id": number})


def _put(number: int, given: dict[str, Any]) -> None:
    with Session.begin() as session:
        user = session.get(User, number, with_for_update=True)
        if user is None:
            user = User(id=number, name="", city="", password="secret")
            session.add(user)
        user.name, user.city = given["name"], given["city"]


def delete(request: Request) -> JSONResponse:
    """Leave."""
    with Session.begin() as session:
        user = session.get(User, request.path_params["id"])
        if user is not None:
            session.delete(user)
    return JSONResponse({})


def health(_request: Request) -> JSONResponse:
    """Whether the database answers."""
    with Session.begin() as session:
        count = session.query(User).count()
    return JSONResponse({"users": count})


if __name__ == "__main__":
    serve(
        [
            Route("/users/{id:int}", put, methods=["PUT"]),
            Route("/users/{id:int}", delete, methods=["DELETE"]),
            Route("/health", health),
        ]
    )
