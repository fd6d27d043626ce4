"""What the docs say twice is compared with the code."""

from __future__ import annotations

import inspect
import re
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import MetaData, create_engine, select

from devstack.kafka import Kafka
from outbox import read_model
from outbox.kafka.subscription import GUARDED
from outbox.read_model import Copy, Declared, Follow, NeedsRebuildError, PostgresStore, ReadModel, SqliteStore
from outbox.read_model.conformance import change, put
from outbox.telemetry import EVENTS
from render_docs import DOCS, PAGES, commands
from test_read_model import Topic

ROOT = DOCS.parent
READ_MODEL = (DOCS / "read-model.md").read_text("utf-8")


def rows(page: str, heading: str) -> Iterator[list[str]]:
    """The rows of the tables that begin with such a cell, each as its cells."""
    inside = False
    for line in page.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if inside and cells and not set(cells[0]) <= {"-"}:
            yield cells
        inside = bool(cells) and (inside or cells[0] == heading)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_what_the_code_says(page: str) -> None:
    """`python tests/render_docs.py` writes it anew."""
    assert (DOCS / page).read_text("utf-8") == PAGES[page]()


def test_every_command_has_a_help_and_an_example_of_itself() -> None:
    """A command is learnt from an example."""
    for name, command in commands():
        assert command.help, name
        assert (command.epilog or "").startswith("Example: "), name
        if name != "completion":
            assert f"outbox {name}" in (command.epilog or ""), name


def test_every_test_that_the_guarantees_name_exists() -> None:
    """A guarantee without its test is a promise."""
    tests = DOCS.parent / "tests"
    for row in re.findall(r"^\| .* \| (`test_.*) \|$", (DOCS / "guarantees.md").read_text("utf-8"), re.MULTILINE):
        files = re.findall(r"`(test_\w+\.py)`", row)
        assert files
        for name in files:
            assert (tests / name).is_file(), name
        for prefix in re.findall(r"`(test_\w+?)_?\.\.\.`", row):
            assert f"def {prefix}" in (tests / files[0]).read_text("utf-8"), prefix


def test_the_index_leads_to_every_page() -> None:
    """A page that nothing leads to is not read."""
    index = (DOCS / "index.md").read_text("utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name


def test_every_word_of_the_design_has_one_meaning_in_the_glossary() -> None:
    """Each once."""
    words = re.findall(r"^\| ([a-z ]+) \|", (DOCS / "glossary.md").read_text("utf-8"), re.MULTILINE)[1:]
    assert len(words) == len(set(words))
    assert {"entity type", "key", "state", "tombstone", "entry", "outbox", "relay", "position", "epoch"} <= set(words)
    assert {"shard", "collapse", "cause", "read model"} <= set(words)


def test_the_files_that_pages_name_exist() -> None:
    """Modules and tests that the prose names in backticks."""
    root = DOCS.parent
    pages = [root / "README.md", root / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    for page in pages:
        for path in re.findall(r"`((?:outbox|tests|cli|migrations|examples|docs)/[\w./-]+)`", page.read_text("utf-8")):
            if "NNN" not in path:
                assert (root / path).exists(), f"{page.name} names {path}"


# -- the architecture ----------------------------------------------------------------------------------------------


def floors(heading: str) -> dict[str, int]:
    """The modules that a table of the architecture names, each with the number of its row, from above."""
    page = (DOCS / "architecture.md").read_text("utf-8")
    found: dict[str, int] = {}
    for number, cells in enumerate(rows(page, heading)):
        for name in re.findall(r"`(\w+)/?`", " ".join(cells)):
            assert name not in found, f"{name} is named twice"
            found[name] = number
    return found


def modules(package: Path) -> set[str]:
    """Modules and packages that lie in one."""
    return {
        path.stem
        for path in package.iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").is_file())
    }


@pytest.mark.parametrize(("heading", "package"), [("floor", "outbox"), ("floor of `read_model/`", "outbox.read_model")])
def test_the_architecture_names_every_module_on_the_floor_where_it_is(heading: str, package: str) -> None:
    """All that there are, none that there is not, and in the order that import-linter holds."""
    said = floors(heading)
    assert said.keys() == modules(ROOT / package.replace(".", "/"))
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [
        one["layers"] for one in contracts if one["type"] == "layers" and f"{package}.{min(said)}" in str(one["layers"])
    ]
    above = 0
    for layer in layers:
        here = [said[name] for one in layer.split(" | ") if (name := one.removeprefix(f"{package}.")) in said]
        assert not here or min(here) >= above, f"{layer} is named above what may import it"
        above = max(here, default=above)


# -- the read model ------------------------------------------------------------------------------------------------

PYTHON = re.findall(r"^```python\n(.*?)^```", READ_MODEL, re.MULTILINE | re.DOTALL)
# Each is executed below.
DECLARES, MAPS, REVISION, SUITE = PYTHON


def said_default(cell: str) -> Any:
    """What a cell says that a default is."""
    words: dict[str, Any] = {
        "none": None,
        "the search path's": None,
        "the topic's name": "",
        "": inspect.Parameter.empty,
        "`{}`": {},
    }
    if cell in words:
        return words[cell]
    if cell.startswith("`"):
        return cell.strip('`"')
    return float(cell.split(" (", maxsplit=1)[0].replace(",", ""))


def test_the_settings_of_a_read_model_are_those_that_it_takes() -> None:
    """Names, in order, and defaults as they are in force."""
    said = {cells[0].strip("`"): said_default(cells[1]) for cells in rows(READ_MODEL, "setting")}
    taken = inspect.signature(ReadModel).parameters
    assert list(said) == list(taken)
    table = read_model.copy_table(MetaData(), "t")
    settings = ReadModel("m", SqliteStore("m.db"), [Follow("t", Copy(table))], bootstrap="b:1").settings
    for name, default in said.items():
        required = taken[name].default is inspect.Parameter.empty
        assert default == (inspect.Parameter.empty if required else getattr(settings, name)), name


def test_the_settings_of_a_store_are_those_that_it_takes() -> None:
    """All of both stores that may be left out; and of what is declared those that the table has."""
    said = {cells[0].strip("`"): said_default(cells[1]) for cells in rows(READ_MODEL, "of a store")}
    versions = said.pop("version=")
    for kind in (read_model.Columns, read_model.Function, Follow):
        assert inspect.signature(kind).parameters["version"].default == versions
    for name, default in said.items():
        of, _, parameter = name.removesuffix("=)").partition("(")
        assert inspect.signature(getattr(read_model, of)).parameters[parameter].default == default, name
    for store in (PostgresStore, SqliteStore):
        for one in inspect.signature(store).parameters.values():
            if one.default is not inspect.Parameter.empty:
                assert f"{store.__name__}({one.name}=)" in said


def test_what_the_page_of_the_read_model_names_there_is() -> None:
    """Classes, where a service imports them from; events, commands, refused properties, an exit code."""
    for name in re.findall(r"`(?:outbox\.read_model\.)?([A-Z][a-z]\w*)", READ_MODEL):
        assert name in read_model.__all__, name
    assert set(re.findall(r"`(read_model\.\w+)`", READ_MODEL)) <= EVENTS.keys()
    there = {name for name, _ in commands()}
    for name in re.findall(r"`outbox ((?:(?:read-model|topics) )?[\w-]+)", READ_MODEL):
        assert name in there, name
    (refused,) = re.findall(r"refused by name \((.*?)\)", READ_MODEL)
    assert set(re.findall(r"`([\w.]+)`", refused)) <= GUARDED.keys()
    assert f"`NeedsRebuildError` (exit code {NeedsRebuildError.exit_code})" in READ_MODEL


def test_who_writes_a_store_imports_all_that_it_needs_from_one_place() -> None:
    """Whatever a method of a store or of a transaction takes or gives."""
    for protocol in (read_model.Store, read_model.Transaction):
        for method in vars(protocol).values():
            for kind in types_in(*get_type_hints(method).values()) if inspect.isfunction(method) else ():
                if kind.__module__.startswith("outbox."):
                    assert getattr(read_model, kind.__name__, None) is kind, kind


def types_in(*hints: Any) -> Iterator[type]:
    """The classes that types are made of."""
    for hint in hints:
        if isinstance(hint, type):
            yield hint
        yield from types_in(*(one for one in get_args(hint) if not isinstance(one, str)))


@pytest.mark.kafka
def test_the_first_block_of_the_read_model_keeps_a_copy(
    kafka: Kafka, outbox_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is printed, but for where Kafka is and what the topic is called; the tables are made in between."""
    monkeypatch.chdir(tmp_path)
    topic = Topic(kafka, outbox_name)
    topic.write({"7": {"name": "Ada"}})
    block = DECLARES
    for printed, here in (("localhost:9092", kafka.bootstrap), ("shop.customer", outbox_name)):
        assert printed in block
        block = block.replace(printed, here)
    declares, runs, last = block.partition("\nwith model.running()")
    names: dict[str, Any] = {}
    exec(declares, names)
    names["model"].store.create(names["model"].declared)
    exec(runs + last, names)
    with closing(sqlite3.connect("search.db")) as connection:
        assert connection.execute("SELECT key, state FROM customer_copy").fetchall() == [("7", '{"name":"Ada"}')]


@pytest.mark.postgres
def test_the_mappings_of_the_read_model_make_rows(database_url: str) -> None:
    """Columns of a state, with a converted and a made value; and a function, which is told of a deletion, too."""
    names: dict[str, Any] = {}
    exec(MAPS, names)
    advert, user = names["follows"]
    store = PostgresStore(database_url)
    store.create(Declared("market", names["follows"]))
    store.open(Declared("market", names["follows"]))
    state = {"title": "almost new piano", "address": {"city": "Turin"}, "price": "12.50"}
    put(store, advert, [change("1", state)])
    put(store, user, [change("7", {"name": "Ada", "adverts": [1]}), change("8", {"name": "Emmy", "adverts": []})])
    put(store, user, [change("8", None, 2)])
    with store.engine.connect() as connection:
        (row,) = connection.execute(select(names["adverts"])).mappings()
        sellers = connection.execute(select(names["sellers"])).fetchall()
    store.close()
    assert (row["id"], row["city"], str(row["price"]), row["words"]) == (1, "Turin", "12.50", 3)
    assert [tuple(one) for one in sellers] == [(7, "Ada", 1)]


def test_the_revision_of_the_read_model_makes_its_tables(tmp_path: Path) -> None:
    """A store finds all that it needs."""
    engine = create_engine(f"sqlite:///{tmp_path}/model.db")
    with engine.begin() as connection:
        names: dict[str, Any] = {"op": Operations(MigrationContext.configure(connection))}
        exec(REVISION, names)
        names["upgrade"]()
    engine.dispose()
    store = SqliteStore(tmp_path / "model.db")
    store.open(Declared("search", [Follow("t", Copy(read_model.copy_table(MetaData(), "customer_copy")))]))
    store.close()


def test_the_suite_for_a_store_of_ones_own_runs_as_it_is_printed(tmp_path: Path) -> None:
    """In a file of its own, with one of ours as the store; a part of it: test_read_model_store.py runs all."""
    file = tmp_path / "test_my_store.py"
    file.write_text(f"from outbox.read_model import SqliteStore as MyStore\n{SUITE}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "parked", str(file)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[3-9] passed", done.stdout, re.MULTILINE), done.stdout
