"""The example's story, in a real browser: all is killed and started in any order, and search serves throughout."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import uvicorn
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from devstack.processes import Child, free_port
from marketplace import market as markets
from marketplace.load import Load
from marketplace.market import EXAMPLES, PARTS, Market
from marketplace.web.app import app
from relays import eventually

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(600)]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
COMMAND = [sys.executable, "-m", "marketplace"]


class Page:
    """The page, as somebody sees and uses it."""

    def __init__(self, browser: webdriver.Chrome, address: str) -> None:
        self._browser = browser
        browser.get(address)

    def _row(self, name: str) -> WebElement:
        return self._browser.find_element(By.CSS_SELECTOR, f"tr[data-part='{name}']")

    def state(self, name: str) -> str | None:
        """What the page says of a part."""
        return self._row(name).get_attribute("data-state")

    def click(self, name: str, what: str) -> None:
        """Press a part's button, once it says what is meant, and wait until the page says that it is done."""
        button = self._row(name).find_element(By.TAG_NAME, "button")
        eventually(lambda: button.is_enabled() and button.text == what, what=f"the button {what} of {name}")
        button.click()
        # A relay without its database, or its Kafka, does not say anything.
        done = {"stopped"} if what == "stop" else {"serving", "silent"}
        eventually(lambda: self.state(name) in done, seconds=120, what=f"{name} to {what}")
        assert not self.wrong

    def search(self, words: str) -> None:
        """Type into the field."""
        field = self._browser.find_element(By.ID, "q")
        field.clear()
        field.send_keys(words)

    @property
    def wrong(self) -> str:
        """What the page says went wrong."""
        return self._browser.find_element(By.ID, "wrong").text

    @property
    def titles(self) -> list[str]:
        """Of the offers that are shown; the list is drawn anew all the time."""
        script = "return [...document.querySelectorAll('li.offer div')].map(one => one.firstChild.textContent)"
        return list(self._browser.execute_script(script))

    def _said(self, name: str) -> str:
        return self._browser.find_element(By.TAG_NAME, "body").get_attribute(f"data-{name}") or ""

    @property
    def searches(self) -> tuple[int, int]:
        """How many were answered, how many failed."""
        return int(self._said("answered") or 0), int(self._said("failed") or 0)

    @property
    def age(self) -> float | None:
        """How old the copy is said to be, in seconds."""
        return float(self._said("age")) if self._said("age") else None

    @property
    def total(self) -> int:
        """How many offers there are, as it says."""
        return int(self._said("total") or -1)

    def is_old(self, than: float) -> bool:
        """Whether the copy is said to be older."""
        return self.age is not None and self.age > than

    def is_served(self) -> None:
        """Three more searches are answered, with offers, whatever is down."""
        answered = self.searches[0]
        eventually(lambda: self.searches[0] > answered + 2, what="searches to be answered")
        assert self.titles

    def picture(self, file: Path) -> None:
        """Save what it looks like."""
        self._browser.save_screenshot(str(file))


@contextmanager
def served(market: Market, load: Load, port: int) -> Iterator[None]:
    """The page of a market, as `python -m marketplace` serves it."""
    server = uvicorn.Server(uvicorn.Config(app(market, load), host="127.0.0.1", port=port, log_level="warning"))
    serving = threading.Thread(target=server.run, daemon=True)
    serving.start()
    try:
        eventually(lambda: server.started)
        yield
    finally:
        server.should_exit = True
        serving.join(30)


@pytest.fixture
def page_and_market(tmp_path: Path) -> Iterator[tuple[Page, Market, Load]]:
    """All of it, and a browser."""
    if CHROMIUM is None or DRIVER is None:
        # What `make test` is to show is not shown without: only a person may leave it out.
        assert "MARKETPLACE_BROWSER" not in os.environ, "install chromium and chromium-driver"
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    tmp_path.chmod(0o711)
    options = Options()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
    ):
        options.add_argument(flag)
    port = free_port()
    with ExitStack() as stack:
        market = stack.enter_context(Market(tmp_path))
        load = Load(market.url, rate=50)
        load.start()
        stack.callback(load.stop)
        stack.enter_context(served(market, load, port))
        browser = webdriver.Chrome(options=options, service=Service(DRIVER))
        stack.callback(browser.quit)
        yield Page(browser, f"http://127.0.0.1:{port}/"), market, load


def test_search_serves_whatever_is_down_and_converges(page_and_market: tuple[Page, Market, Load]) -> None:
    """Owners, relays and Kafka are killed and started by the page's buttons, in an order that is drawn.

    After each of them search answers; with Kafka down its copy says that it is old, and it starts without Kafka.
    """
    page, market, load = page_and_market
    eventually(lambda: len(page.titles) > 10, what="offers on the page")
    seed = random.randrange(1 << 32)
    logging.getLogger("marketplace").warning("seed %d", seed)  # shown when it fails
    draw = random.Random(seed)
    names = ["kafka", "adverts", "users", "relay-adverts", "relay-users"]
    down: set[str] = set()
    for name in [*draw.choices(names, k=6), *names]:
        page.click(name, "start" if name in down else "stop")
        down ^= {name}
        page.is_served()
    for name in sorted(set(names) - down):
        page.click(name, "stop")
    page.is_served()
    eventually(partial(page.is_old, 2), what="the copy to be said to be old while Kafka is down")
    assert page.searches[1] == 0
    if where := os.environ.get("MARKETPLACE_PICTURE"):
        page.picture(Path(where))  # the README's
    # What search serves it has in its own database: it needs nobody to start, either.
    page.click("search", "stop")
    page.click("search", "start")
    page.search("piano")
    eventually(lambda: bool(page.titles) and all("piano" in title for title in page.titles), what="pianos alone")
    page.search("")
    failed = page.searches[1]
    for name in draw.sample(names, len(names)):
        page.click(name, "start")
        page.is_served()
    taken = load.taken
    eventually(partial(load.has_taken, taken + 50), what="changes that the owners take again")
    load.stop()
    eventually(lambda: offers(market) == truth(market), seconds=120, what="that search has what the owners have")
    eventually(lambda: page.total == len(truth(market)), what="that the page says so")
    eventually(lambda: page.age is not None and page.age < 5, what="that the copy is said to be new again")
    assert page.searches[1] == failed
    assert truth(market)


def offers(market: Market) -> dict[int, tuple[Any, ...]]:
    with psycopg.connect(market.databases["search"].url()) as connection:
        rows = connection.execute("SELECT id, title, price, seller_name, city FROM offers")
        return {row[0]: row[1:] for row in rows}


def truth(market: Market) -> dict[int, tuple[Any, ...]]:
    with psycopg.connect(market.databases["users"].url()) as connection:
        users = {row[0]: row[1:] for row in connection.execute("SELECT id, name, city FROM users")}
    with psycopg.connect(market.databases["adverts"].url()) as connection:
        adverts = connection.execute("SELECT id, title, price, seller FROM adverts").fetchall()
    return {row[0]: (row[1], row[2], *users.get(row[3], (None, None))) for row in adverts}


def test_the_command_starts_it_prints_the_address_and_ends_in_order(tmp_path: Path) -> None:
    """And the terminal stops and starts parts of it."""
    port = free_port()
    env = environment(port)
    log = tmp_path / "log"
    running = Child(COMMAND, log=log, env=env)
    try:
        eventually(lambda: f"http://127.0.0.1:{port}" in log.read_text(), seconds=120, what="the address")
        assert '"users": false' in asked(env, "stop", "users").stdout
        assert '"users": true' in asked(env, "start", "users").stdout
    finally:
        ended = running.stop(seconds=60)
    assert (ended, running.exit_code()) == (True, 0), log.read_text()
    gone = asked(env, "status")
    assert (gone.returncode, "is it up?" in gone.stderr) == (69, True)


def environment(port: int) -> dict[str, str]:
    """What the command is given, in a terminal beside the one where it runs."""
    return dict(os.environ) | {"MARKETPLACE_PORT": str(port), "PYTHONPATH": str(EXAMPLES)}


def asked(env: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """What the command says."""
    return subprocess.run([*COMMAND, *arguments], env=env, capture_output=True, text=True, check=False)


def test_a_part_that_cannot_start_is_said_with_its_reason(tmp_path: Path) -> None:
    """By what is up: the terminal does not say that nothing answers."""
    tmp_path.chmod(0o711)
    market, port = Market(tmp_path), free_port()
    search = market.parts["search"]
    assert isinstance(search, markets.Service)
    search.program.command = [sys.executable, "-c", "raise SystemExit('its disk is gone')"]
    try:
        with served(market, Load(market.url), port):
            refused = asked(environment(port), "start", "search")
    finally:
        market.stop("search")
    assert refused.returncode == 1
    assert "search-service does not answer" in refused.stderr
    assert "its disk is gone" in refused.stderr
    assert "is it up?" not in refused.stderr
    assert market.running() == dict.fromkeys(PARTS, False)


def test_a_part_that_takes_long_to_start_keeps_no_other_from_being_stopped(tmp_path: Path) -> None:
    """Itself it is stopped once it has started."""
    began, goes_on = threading.Event(), threading.Event()
    done: list[str] = []

    class Slow:
        running = True

        def start(self) -> None:
            began.set()
            assert goes_on.wait(60)
            done.append("start")

        def stop(self) -> None:
            done.append("stop")

    class Quick(Slow):
        def stop(self) -> None:
            done.append("another")

    market = Market(tmp_path)
    market.parts |= {"search": Slow(), "users": Quick()}
    calls = [(market.start, "search"), (market.stop, "search"), (market.stop, "users")]
    starting, stopping, another = (threading.Thread(target=call, args=(name,)) for call, name in calls)
    starting.start()
    assert began.wait(60)
    stopping.start()
    another.start()
    try:
        another.join(30)
        assert done == ["another"]
    finally:
        goes_on.set()
        starting.join()
        stopping.join()
    assert done == ["another", "start", "stop"]
