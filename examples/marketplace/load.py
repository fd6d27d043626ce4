"""People: they register, move, offer things, change prices, sell, leave. What a service does not take is counted."""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

THINGS = ("bicycle", "piano", "lamp", "desk", "tent", "camera", "violin", "sofa", "kettle", "globe")
KINDS = ("red", "old", "almost new", "heavy", "Danish", "folding", "broken", "beautiful")
NAMES = ("Ada", "Emmy", "Grace", "Lise", "Mary", "Rosalind", "Sofia", "Hypatia", "Chien-Shiung", "Maria")
CITIES = ("London", "Erlangen", "New York", "Vienna", "Paris", "Stockholm", "Alexandria", "Shanghai", "Turin", "Porto")
_USERS, _ADVERTS = 50, 400


class Load:
    """Asks the owners' services, so many times a second, in a thread. `url` says where a service answers."""

    def __init__(self, url: Callable[[str], str], *, rate: float = 20.0) -> None:
        self._url = url
        self._pause = 1 / rate
        self._draw = random.Random(7)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.taken = 0
        self.refused = 0

    def start(self) -> None:
        """Begin: everybody registers first."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def has_taken(self, more_than: int) -> bool:
        """Whether the owners have taken more than so many."""
        return self.taken > more_than

    def _run(self) -> None:
        for number in range(_USERS):
            self._user(number)
        while not self._over.wait(self._pause):
            self.once()

    def once(self) -> None:
        """One thing that somebody does."""
        chance = self._draw.random()
        if chance < 0.1:
            self._user(self._draw.randrange(_USERS))
        elif chance < 0.11:
            self._ask("users", "DELETE", f"/users/{self._draw.randrange(_USERS)}")
        elif chance < 0.2:
            self._ask("adverts", "DELETE", f"/adverts/{self._draw.randrange(_ADVERTS)}")
        else:
            draw = self._draw
            thing = draw.choice(THINGS)
            self._ask(
                "adverts",
                "PUT",
                f"/adverts/{draw.randrange(_ADVERTS)}",
                {
                    "seller": draw.randrange(_USERS),
                    "title": f"{draw.choice(KINDS)} {thing}",
                    "text": f"A {draw.choice(KINDS)} {thing}, hardly used.",
                    "price": f"{draw.randrange(100, 100_000) / 100:.2f}",
                },
            )

    def _user(self, number: int) -> None:
        name = NAMES[number % len(NAMES)]
        self._ask("users", "PUT", f"/users/{number}", {"name": name, "city": self._draw.choice(CITIES)})

    def _ask(self, service: str, method: str, path: str, given: Mapping[str, Any] | None = None) -> None:
        request = urllib.request.Request(
            self._url(service) + path, method=method, data=None if given is None else json.dumps(given).encode()
        )
        try:
            with urllib.request.urlopen(request, timeout=5):
                self.taken += 1
        except (OSError, http.client.HTTPException):
            self.refused += 1
