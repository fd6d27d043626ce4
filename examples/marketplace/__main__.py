"""`python -m marketplace`: start all of it with load, print the address; `stop NAME`, `start NAME`, `status` ask it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import uvicorn

from devstack.processes import ServerError
from marketplace.load import Load
from marketplace.market import PARTS, Market
from marketplace.web.app import app

PORT = 8700


def main() -> int:
    """Parse and do; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m marketplace", description=__doc__)
    parser.add_argument("what", nargs="?", default="up", choices=["up", "stop", "start", "status"])
    parser.add_argument("name", nargs="?", choices=PARTS, help="of stop and start: what")
    parser.add_argument("--port", type=int, default=int(os.environ.get("MARKETPLACE_PORT", PORT)))
    parser.add_argument("--rate", type=_positive, default=20.0, help="changes a second that people make (default 20)")
    chosen = parser.parse_args()
    if chosen.what in {"stop", "start"} and chosen.name is None:
        parser.error(f"{chosen.what} what? One of {', '.join(PARTS)}")
    if chosen.what == "up":
        return _up(chosen.port, chosen.rate)
    path = "status" if chosen.what == "status" else f"{chosen.name}/{chosen.what}"
    method = "GET" if chosen.what == "status" else "POST"
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{chosen.port}/api/{path}", method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            print(json.dumps(json.loads(answer.read()), indent=1))
    except urllib.error.HTTPError as error:
        # Before the other: it is one of those, and whoever says it is up.
        with error:
            print(_reason(error), file=sys.stderr)
        return 1
    except OSError as error:
        print(f"Nothing answers at port {chosen.port} ({error}): is it up?", file=sys.stderr)
        return 69
    return 0


def _reason(error: urllib.error.HTTPError) -> str:
    """What the answer says went wrong; the HTTP status where it says nothing."""
    try:
        return str(json.loads(error.read())["error"])
    except (ValueError, KeyError, TypeError):
        return str(error)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _up(port: int, rate: float) -> int:
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with socket.socket() as listening, tempfile.TemporaryDirectory(prefix="marketplace-") as made:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
        except OSError as error:
            another = f'make example ARGS="--port {port + 1}"'
            print(f"Port {port} cannot be had ({error.strerror}); choose another: {another}", file=sys.stderr)
            return 78
        directory = Path(made)
        # PostgreSQL may run as another user, who must be able to enter.
        directory.chmod(0o711)
        print("starting three services, their databases, two relays and Kafka ...", file=sys.stderr)
        try:
            with Market(directory) as market:
                load = Load(market.url, rate=rate)
                load.start()
                listening.listen()
                print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
                print(f'elsewhere: make example ARGS="stop kafka" (start; {", ".join(PARTS)}; status)', file=sys.stderr)
                try:
                    uvicorn.Server(uvicorn.Config(app(market, load), log_level="warning")).run([listening])
                finally:
                    load.stop()
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("Stopped; nothing is left behind.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
