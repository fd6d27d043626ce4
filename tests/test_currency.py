"""Currency: the last state that is published is what the table holds, whatever two sessions do at once.

Each rule is shown with the wrong way beside it: the same story, told with a plain writer that breaks the rule, leaves
a stale state as the last one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.orm import Mapped, mapped_column, relationship

import outbox

pytestmark = pytest.mark.postgres

# The same tables twice: published by the library, and by a writer that knows no better.


def person_state(person: Any) -> dict[str, object]:
    return {"name": person.name, "email": person.email}


def basket_state(basket: Any) -> dict[str, object]:
    return {"lines": {str(line.id): line.text for line in basket.lines}}


class Right(orm.DeclarativeBase):
    pass


class Wrong(orm.DeclarativeBase):
    pass


@outbox.published(type="person", key="id", state=person_state)
class Person(Right):
    __tablename__ = "people"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str]


class WrongPerson(Wrong):
    __tablename__ = "people"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str]


@outbox.published(type="basket", key="id", state=basket_state, version="version")
class Basket(Right):
    __tablename__ = "baskets"
    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(default=1)
    lines: Mapped[list[Line]] = relationship(back_populates="basket", order_by=lambda: Line.id)


@outbox.part_of("basket")
class Line(Right):
    __tablename__ = "basket_lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    basket_id: Mapped[int] = mapped_column(sa.ForeignKey("baskets.id"))
    text: Mapped[str]
    basket: Mapped[Basket] = relationship(back_populates="lines")


def clerk_state(clerk: Any) -> dict[str, object]:
    return {"name": clerk.name, "bonus": clerk.bonus, "tasks": [task.text for task in clerk.tasks]}


class Employee(Right):
    __tablename__ = "employees"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "employee"}


@outbox.published(type="clerk", key="id", state=clerk_state)
class Clerk(Employee):
    """One object, two tables."""

    __tablename__ = "clerks"
    id: Mapped[int] = mapped_column(sa.ForeignKey("employees.id"), primary_key=True)
    bonus: Mapped[int]
    tasks: Mapped[list[Task]] = relationship(back_populates="clerk", order_by=lambda: Task.id)
    __mapper_args__ = {"polymorphic_identity": "clerk"}


@outbox.part_of("clerk")
class Task(Right):
    __tablename__ = "tasks"
    id: Mapped[int] = mapped_column(primary_key=True)
    clerk_id: Mapped[int] = mapped_column(sa.ForeignKey("clerks.id"))
    text: Mapped[str]
    clerk: Mapped[Clerk] = relationship(back_populates="tasks")


class WrongEmployee(Wrong):
    __tablename__ = "employees"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "employee"}


class WrongClerk(WrongEmployee):
    __tablename__ = "clerks"
    id: Mapped[int] = mapped_column(sa.ForeignKey("employees.id"), primary_key=True)
    bonus: Mapped[int]
    tasks: Mapped[list[WrongTask]] = relationship(order_by=lambda: WrongTask.id)
    __mapper_args__ = {"polymorphic_identity": "clerk"}


class WrongTask(Wrong):
    __tablename__ = "tasks"
    id: Mapped[int] = mapped_column(primary_key=True)
    clerk_id: Mapped[int] = mapped_column(sa.ForeignKey("clerks.id"))
    text: Mapped[str]


class WrongBasket(Wrong):
    __tablename__ = "baskets"
    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(default=1)
    lines: Mapped[list[WrongLine]] = relationship(back_populates="basket", order_by=lambda: WrongLine.id)


class WrongLine(Wrong):
    __tablename__ = "basket_lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    basket_id: Mapped[int] = mapped_column(sa.ForeignKey("baskets.id"))
    text: Mapped[str]
    basket: Mapped[WrongBasket] = relationship(back_populates="lines")


class Way:
    """The classes to work with, and what is done to publish after a change: nothing, or what the wrong way does."""

    def __init__(self, *, right: bool) -> None:
        self.right = right
        self.person: Any = Person if right else WrongPerson
        self.basket: Any = Basket if right else WrongBasket
        self.line: Any = Line if right else WrongLine
        self.clerk: Any = Clerk if right else WrongClerk
        self.task: Any = Task if right else WrongTask

    def publish(self, session: orm.Session, entity: Any, *, locked: bool = False) -> None:
        """Flush; the wrong way then publishes what the session remembers."""
        session.flush()
        if self.right:
            return
        if locked:
            # Locks the root, but does not bump it, and reads the parts anew.
            session.execute(sa.select(self.basket.id).where(self.basket.id == entity.id).with_for_update())
            session.expire_all()
        if isinstance(entity, WrongPerson):
            outbox.put(session, "person", entity.id, person_state(entity))
        elif isinstance(entity, WrongClerk):
            # It knows that the object must be read again.
            session.expire(entity)
            outbox.put(session, "clerk", entity.id, clerk_state(entity))
        else:
            outbox.put(session, "basket", entity.id, basket_state(entity))


@pytest.fixture(params=[True, False], ids=["right", "wrong"])
def way(request: pytest.FixtureRequest) -> Way:
    return Way(right=request.param)


@pytest.fixture
def database(outbox_database: str) -> str:
    with psycopg.connect(outbox_database) as connection:
        connection.execute(
            "INSERT INTO outbox.entity_types (name, topic) VALUES ('person', 'person'), ('basket', 'basket'), "
            "('clerk', 'clerk')"
        )
    return outbox_database


@pytest.fixture
def engine(database: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    Right.metadata.create_all(engine)
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO people VALUES (1, 'Ada', 'old@example.org')",
            "INSERT INTO employees VALUES (1, 'clerk', 'Ada')",
            "INSERT INTO clerks VALUES (1, 0)",
            "INSERT INTO tasks VALUES (1, 1, 'old')",
            "INSERT INTO baskets VALUES (1, 1), (2, 1)",
            "INSERT INTO basket_lines VALUES (1, 1, 'old'), (2, 1, 'old')",
        ):
            connection.exec_driver_sql(statement)
    yield engine
    engine.dispose()


def last_state(url: str) -> Any:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT state FROM outbox.entries ORDER BY id DESC LIMIT 1").fetchone()
    return None if row is None or row[0] is None else orjson.loads(row[0])


def table_state(engine: sa.Engine, way: Way) -> tuple[Any, Any]:
    """What the person's and the basket's state should be now."""
    with orm.Session(engine) as session:
        return person_state(session.get(way.person, 1)), basket_state(session.get(way.basket, 1))


def wait_until_blocked(url: str, pid: int, thread: threading.Thread) -> None:
    """Until the server process waits for a lock of another."""
    deadline = time.monotonic() + 30
    with psycopg.connect(url, autocommit=True) as connection:
        while not connection.execute("SELECT cardinality(pg_blocking_pids(%s)) > 0", [pid]).fetchone()[0]:  # type: ignore[index]  # one row always
            assert thread.is_alive(), "it went through without waiting"
            assert time.monotonic() < deadline, "it neither waits nor ends"


class Background:
    """A thread that works on a session of its own; the error it ends with, if any."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=[work], daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self.thread.join(30)
        assert not self.thread.is_alive()


def backend(session: orm.Session) -> int:
    return int(session.execute(sa.text("SELECT pg_backend_pid()")).scalar_one())


def test_an_object_that_another_session_changed_since_it_was_loaded(way: Way, engine: sa.Engine, database: str) -> None:
    """The UPDATE writes one column; the entry must carry the others as they are, not as they were loaded."""
    with orm.Session(engine) as session, orm.Session(engine) as other:
        person = session.get_one(way.person, 1)
        assert person.email == "old@example.org"
        changed = other.get_one(way.person, 1)
        changed.email = "new@example.org"
        way.publish(other, changed)
        other.commit()
        person.name = "Eve"
        way.publish(session, person)
        session.commit()
    published, in_table = last_state(database), table_state(engine, way)[0]
    assert in_table == {"name": "Eve", "email": "new@example.org"}
    assert (published == in_table) is way.right


def test_an_object_that_waited_for_the_row(way: Way, engine: sa.Engine, database: str) -> None:
    """The other session commits while the flush waits for its lock."""
    with orm.Session(engine) as first, orm.Session(engine) as second:
        person = second.get_one(way.person, 1)
        pid = backend(second)
        changed = first.get_one(way.person, 1)
        changed.email = "new@example.org"
        way.publish(first, changed)

        def work() -> None:
            person.name = "Eve"
            way.publish(second, person)
            second.commit()

        thread = Background(work)
        wait_until_blocked(database, pid, thread.thread)
        first.commit()
        thread.join()
        assert thread.error is None
    assert (last_state(database) == table_state(engine, way)[0]) is way.right


def test_an_object_dirty_without_a_net_change(way: Way, engine: sa.Engine, database: str) -> None:
    """No row is written and no lock taken: an entry would carry a state that nothing protects."""
    with orm.Session(engine) as session, orm.Session(engine) as other:
        person = session.get_one(way.person, 1)
        assert person.name == "Ada"
        person.name = "Eve"
        person.name = "Ada"
        assert person in session.dirty
        changed = other.get_one(way.person, 1)
        changed.email = "new@example.org"
        way.publish(other, changed)
        other.commit()
        way.publish(session, person)
        session.commit()
    assert (last_state(database) == table_state(engine, way)[0]) is way.right


def test_two_children_of_one_root_under_read_committed(way: Way, engine: sa.Engine, database: str) -> None:
    """The second waits for the root and then reads what the first committed."""
    with orm.Session(engine) as first, orm.Session(engine) as second:
        baskets = [session.get_one(way.basket, 1) for session in (first, second)]
        lines = [session.get_one(way.line, number) for number, session in ((1, first), (2, second))]
        assert all(len(basket.lines) == 2 for basket in baskets)
        pid = backend(second)
        lines[0].text = "new"
        way.publish(first, baskets[0])

        def work() -> None:
            lines[1].text = "new"
            way.publish(second, baskets[1])
            second.commit()

        thread = Background(work)
        if way.right:
            wait_until_blocked(database, pid, thread.thread)
            first.commit()
            thread.join()
        else:
            # Nothing makes it wait: it publishes without the first's change, and the first without its.
            thread.join()
            first.commit()
        assert thread.error is None
    in_table = table_state(engine, way)[1]
    assert in_table == {"lines": {"1": "new", "2": "new"}}
    assert (last_state(database) == in_table) is way.right


def test_two_children_of_one_root_under_repeatable_read(way: Way, engine: sa.Engine, database: str) -> None:
    """The second fails on the root and is tried again; a mere lock of the root lets a stale state through."""
    strict = engine.execution_options(isolation_level="REPEATABLE READ")
    with orm.Session(strict) as first, orm.Session(strict) as second:
        baskets = [session.get_one(way.basket, 1) for session in (first, second)]
        lines = [session.get_one(way.line, number) for number, session in ((1, first), (2, second))]
        pid = backend(second)
        lines[0].text = "new"
        way.publish(first, baskets[0], locked=True)

        def work() -> None:
            lines[1].text = "new"
            way.publish(second, baskets[1], locked=True)
            second.commit()

        thread = Background(work)
        wait_until_blocked(database, pid, thread.thread)
        first.commit()
        thread.join()
        if way.right:
            assert isinstance(thread.error, sa.exc.OperationalError)
            assert isinstance(thread.error.orig, psycopg.errors.SerializationFailure)
            second.rollback()
            second.get_one(way.line, 2).text = "new"
            second.commit()
        else:
            assert thread.error is None
    in_table = table_state(engine, way)[1]
    assert in_table == {"lines": {"1": "new", "2": "new"}}
    assert (last_state(database) == in_table) is way.right


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
def test_two_children_added_to_one_root(engine: sa.Engine, database: str, level: str) -> None:
    """By the foreign key alone, with nothing loaded: the root is locked before the children are inserted."""
    some = engine.execution_options(isolation_level=level)
    with orm.Session(some) as first, orm.Session(some) as second:
        pid = backend(second)
        first.add(Line(id=3, basket_id=1, text="three"))
        first.flush()

        def work() -> None:
            second.add(Line(id=4, basket_id=1, text="four"))
            second.commit()

        thread = Background(work)
        wait_until_blocked(database, pid, thread.thread)
        first.commit()
        thread.join()
        if level == "REPEATABLE READ":
            assert isinstance(thread.error, sa.exc.OperationalError)
            second.rollback()
            work()
        else:
            assert thread.error is None
    assert last_state(database) == {"lines": {"1": "old", "2": "old", "3": "three", "4": "four"}}


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
@pytest.mark.parametrize("second_change", ["the subclass's table", "a part"])
def test_two_tables_of_one_object(way: Way, engine: sa.Engine, database: str, second_change: str, level: str) -> None:
    """Joined inheritance: an UPDATE of one table does not wait for an UPDATE of the other; the base row is for both."""
    some = engine.execution_options(isolation_level=level)
    with orm.Session(some) as first, orm.Session(some) as second:
        clerks = [session.get_one(way.clerk, 1) for session in (first, second)]
        assert [(clerk.bonus, len(clerk.tasks)) for clerk in clerks] == [(0, 1), (0, 1)]
        pid = backend(second)
        if second_change == "a part":
            clerks[0].bonus = 7
        else:
            clerks[0].name = "Eve"
        way.publish(first, clerks[0])

        def work() -> None:
            clerk = second.get_one(way.clerk, 1)
            if second_change == "a part":
                clerk.tasks[0].text = "new"
            else:
                clerk.bonus = 7
            way.publish(second, clerk)
            second.commit()

        thread = Background(work)
        if way.right:
            wait_until_blocked(database, pid, thread.thread)
            first.commit()
            thread.join()
        else:
            thread.join()
            first.commit()
        if way.right and level == "REPEATABLE READ":
            assert isinstance(thread.error, sa.exc.OperationalError)
            second.rollback()
            work()
        else:
            assert thread.error is None
    with orm.Session(engine) as session:
        in_table = clerk_state(session.get_one(way.clerk, 1))
    assert (
        in_table
        == {
            "a part": {"name": "Ada", "bonus": 7, "tasks": ["new"]},
            "the subclass's table": {"name": "Eve", "bonus": 7, "tasks": ["old"]},
        }[second_change]
    )
    assert (last_state(database) == in_table) is way.right


def test_a_part_that_moved_while_its_root_was_awaited(engine: sa.Engine, database: str) -> None:
    """Roots are found before parts are locked: what moves meanwhile is looked up once more."""
    with orm.Session(engine) as first, orm.Session(engine) as second:
        line = second.get_one(Line, 1)
        pid = backend(second)
        first.get_one(Line, 1).basket_id = 2
        first.flush()

        def work() -> None:
            line.text = "new"
            second.commit()

        thread = Background(work)
        wait_until_blocked(database, pid, thread.thread)
        first.commit()
        thread.join()
        assert thread.error is None
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT key, state FROM outbox.entries ORDER BY id").fetchall()
    last = {key: orjson.loads(state) for key, state in rows}
    assert last == {"1": {"lines": {"2": "old"}}, "2": {"lines": {"1": "new"}}}


def test_a_change_of_a_part_and_the_deletion_of_its_root_do_not_deadlock(engine: sa.Engine, database: str) -> None:
    """Both come from above: they meet at the root, whoever is first."""
    with psycopg.connect(database) as blocker, orm.Session(engine) as deleting, orm.Session(engine) as changing:
        blocker.execute("UPDATE baskets SET version = version WHERE id = 1")
        pids = [backend(session) for session in (deleting, changing)]
        line = changing.get_one(Line, 1)
        basket = deleting.get_one(Basket, 1)
        lines = list(basket.lines)

        def delete() -> None:
            for each in (*lines, basket):
                deleting.delete(each)
            deleting.commit()

        def change() -> None:
            line.text = "new"
            changing.commit()

        threads = []
        for work, pid in zip((delete, change), pids, strict=True):
            threads.append(Background(work))
            wait_until_blocked(database, pid, threads[-1].thread)
        blocker.commit()
        for thread in threads:
            thread.join()
        assert threads[0].error is None
        assert isinstance(threads[1].error, orm.exc.StaleDataError), "the part is gone"
    assert last_state(database) is None


def test_the_same_child_and_root_in_two_orders_do_not_deadlock(engine: sa.Engine, database: str) -> None:
    """Rows are locked in the order of their keys, by every flush."""
    with orm.Session(engine) as first, orm.Session(engine) as second:
        pid = backend(second)
        for number in (1, 2):
            first.get_one(Line, number).text = "first"
        first.flush()

        def work() -> None:
            for number in (2, 1):
                second.get_one(Line, number).text = "second"
            second.commit()

        thread = Background(work)
        wait_until_blocked(database, pid, thread.thread)
        first.commit()
        thread.join()
        assert thread.error is None
    assert last_state(database) == {"lines": {"1": "second", "2": "second"}}


def test_a_row_that_is_gone_already_gets_no_second_tombstone(engine: sa.Engine, database: str) -> None:
    """It could come after the state of an entity that another session is making again under the same key."""
    with orm.Session(engine) as session, orm.Session(engine) as other:
        person = session.get_one(Person, 1)
        other.delete(other.get_one(Person, 1))
        other.commit()
        other.add(Person(id=1, name="Bob", email="bob@example.org"))
        other.flush()
        session.delete(person)
        with pytest.warns(sa.exc.SAWarning, match="0 were matched"):
            session.commit()
        other.commit()
    assert last_state(database) == {"name": "Bob", "email": "bob@example.org"}
