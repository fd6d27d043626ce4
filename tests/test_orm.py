"""Published classes: what a flush writes is published, as it is in the database, once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, cast
from uuid import uuid4

import orjson
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import Mapped, mapped_column, relationship

import outbox
from outbox.errors import BypassError, ConfigError, StateError, UnknownTypeError

pytestmark = pytest.mark.postgres


class Base(orm.DeclarativeBase):
    pass


@outbox.published(type="customer", key="id", state=lambda it: {"name": it.name, "city": it.city, "seen": it.seen})
class Customer(Base):
    __tablename__ = "customers"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    city: Mapped[str] = mapped_column(server_default="Paris")
    seen: Mapped[int] = mapped_column(default=0, onupdate=sa.text("customers.seen + 1"))
    secret: Mapped[str | None]


@outbox.published(type="advert", key=("tenant", "slug"), state=lambda it: {"kind": it.kind, "text": it.text})
class Advert(Base):
    __tablename__ = "adverts"
    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    slug: Mapped[str]
    kind: Mapped[str]
    text: Mapped[str] = mapped_column(default="")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "plain"}


class Single(Advert):
    __mapper_args__ = {"polymorphic_identity": "single"}


class Joined(Advert):
    __tablename__ = "joined_adverts"
    id: Mapped[int] = mapped_column(sa.ForeignKey("adverts.id"), primary_key=True)
    extra: Mapped[str]
    __mapper_args__ = {"polymorphic_identity": "joined"}


@outbox.published(type="page", key=lambda it: f"{it.site}/{it.path}", state=lambda it: {"path": it.path})
class Page(Base):
    __tablename__ = "pages"
    id: Mapped[int] = mapped_column(primary_key=True)
    site: Mapped[str]
    path: Mapped[str]


def order_state(order: Order) -> dict[str, object]:
    return {
        "version": order.version,
        "lines": {line.id: [line.text, [note.text for note in line.notes]] for line in order.lines},
    }


@outbox.published(type="order", key="id", state=order_state, version="version")
class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(default=1)
    lines: Mapped[list[Line]] = relationship(
        back_populates="order", cascade="all, delete-orphan", order_by=lambda: Line.id
    )


@outbox.part_of("order")
class Line(Base):
    __tablename__ = "lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(sa.ForeignKey("orders.id"))
    text: Mapped[str] = mapped_column(default="")
    order: Mapped[Order] = relationship(back_populates="lines")
    notes: Mapped[list[Note]] = relationship(back_populates="line", order_by=lambda: Note.id)


@outbox.part_of("line")
class Note(Base):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    line_id: Mapped[int] = mapped_column(sa.ForeignKey("lines.id"))
    text: Mapped[str] = mapped_column(default="")
    line: Mapped[Line] = relationship(back_populates="notes")


@outbox.published(type="order", key="id", state=lambda it: {"version": it.version, "items": [i.id for i in it.items]})
class Cart(Base):
    """An aggregate whose mapper counts versions itself, and whose parts know no way back in Python."""

    __tablename__ = "carts"
    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(nullable=False)
    owner_id: Mapped[int | None] = mapped_column(sa.ForeignKey("plains.id"))
    owner: Mapped[Plain | None] = relationship()
    items: Mapped[list[Item]] = relationship(cascade="all, delete-orphan", order_by=lambda: Item.id)
    __mapper_args__ = {"version_id_col": version}


@outbox.part_of("cart")
class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    cart_id: Mapped[int] = mapped_column(sa.ForeignKey("carts.id"))
    cart: Mapped[Cart] = relationship(viewonly=True)


class Document(Base):
    """A base that is not published; the relationship of its parts leads to it."""

    __tablename__ = "documents"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    version: Mapped[int] = mapped_column(default=1)
    pieces: Mapped[list[Piece]] = relationship(back_populates="document")
    __mapper_args__ = {
        "polymorphic_on": "kind",
        "polymorphic_identity": "draft",
        "with_polymorphic": "*",
    }


@outbox.published(type="page", key="id", state=lambda it: {"pieces": len(it.pieces)}, version="version")
class Invoice(Document):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(sa.ForeignKey("documents.id"), primary_key=True)
    __mapper_args__ = {"polymorphic_identity": "invoice"}


@outbox.part_of("document")
class Piece(Base):
    __tablename__ = "pieces"
    tenant: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    document_id: Mapped[int | None] = mapped_column(sa.ForeignKey("documents.id"))
    document: Mapped[Document | None] = relationship(back_populates="pieces")


class Plain(Base):
    __tablename__ = "plains"
    id: Mapped[int] = mapped_column(primary_key=True)


TYPES = ("customer", "advert", "page", "order")


@pytest.fixture
def database(outbox_database: str) -> str:
    with psycopg.connect(outbox_database) as connection:
        connection.cursor().executemany(
            "INSERT INTO outbox.entity_types (name, topic) VALUES (%s, %s)", [(name, name) for name in TYPES]
        )
    return outbox_database


def sqlalchemy_url(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture
def engine(database: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(sqlalchemy_url(database))
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: sa.Engine) -> Iterator[orm.Session]:
    with orm.Session(engine) as session:
        yield session


class Log:
    """What was committed since the last look: (type, key, state)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.last = 0

    def __call__(self) -> list[tuple[str, str, Any]]:
        with psycopg.connect(self.url) as connection:
            rows = connection.execute(
                "SELECT id, type, key, state FROM outbox.entries WHERE id > %s ORDER BY id", [self.last]
            ).fetchall()
        self.last = max([self.last, *(row[0] for row in rows)])
        return [(row[1], row[2], None if row[3] is None else orjson.loads(row[3])) for row in rows]


@pytest.fixture
def log(database: str) -> Log:
    return Log(database)


@pytest.fixture
def statements(engine: sa.Engine) -> list[str]:
    """What is sent from now on."""
    sent: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda _c, _k, statement, *_: sent.append(statement))
    return sent


# -- one class -------------------------------------------------------------------------------------------------------


def test_insert_update_and_delete_are_published(session: orm.Session, log: Log) -> None:
    """With generated keys, server defaults and what an UPDATE sets by itself."""
    customer = Customer(name="Ada")
    session.add(customer)
    session.commit()
    assert log() == [("customer", "1", {"name": "Ada", "city": "Paris", "seen": 0})]
    customer.name = "Eve"
    session.commit()
    assert log() == [("customer", "1", {"name": "Eve", "city": "Paris", "seen": 1})]
    session.delete(customer)
    session.commit()
    assert log() == [("customer", "1", None)]


def test_each_flush_publishes_an_object_once(session: orm.Session, log: Log) -> None:
    """Whatever was changed in it, and however many sessions and subclasses of sessions there are."""
    customer = Customer(name="Ada")
    session.add(customer)
    session.flush()
    customer.name, customer.city = "Eve", "Rome"
    session.flush()
    session.commit()
    assert [state["name"] for _, _, state in log()] == ["Ada", "Eve"]


def test_a_subclass_of_session_publishes_once(engine: sa.Engine, log: Log) -> None:
    """The listeners are on the base class only."""

    class Own(orm.Session):
        pass

    with orm.sessionmaker(engine, class_=Own)() as session:
        session.add(Customer(name="Ada"))
        session.commit()
    assert len(log()) == 1


def test_an_object_dirty_without_a_net_change_is_not_published(session: orm.Session, log: Log) -> None:
    """No UPDATE is sent, so no row is locked: its state could be stale."""
    customer = Customer(name="Ada")
    session.add(customer)
    session.commit()
    log()
    assert customer.name == "Ada"
    customer.name = "Eve"
    customer.name = "Ada"
    assert customer in session.dirty
    session.flush()
    session.commit()
    assert log() == []


def test_a_sql_expression_is_a_change(session: orm.Session, log: Log) -> None:
    """Its value is known after the flush only."""
    customer = Customer(name="Ada")
    session.add(customer)
    session.commit()
    log()
    customer.name = sa.func.upper(Customer.name)
    session.commit()
    assert log()[0][2]["name"] == "ADA"


def test_merge_is_published(session: orm.Session, log: Log) -> None:
    """As an insert or as an update."""
    session.merge(Customer(id=7, name="Ada"))
    session.commit()
    session.merge(Customer(id=7, name="Eve"))
    session.commit()
    assert [(key, state["name"]) for _, key, state in log()] == [("7", "Ada"), ("7", "Eve")]


def test_rollback_takes_the_entries_with_it(session: orm.Session, log: Log) -> None:
    """Of the transaction, and of a savepoint."""
    session.add(Customer(id=1, name="Ada"))
    session.flush()
    session.rollback()
    session.add(Customer(id=2, name="Eve"))
    with session.begin_nested() as inner:
        session.add(Customer(id=3, name="Bob"))
        session.flush()
        inner.rollback()
    session.commit()
    assert [key for _, key, _ in log()] == ["2"]


def test_delete_and_insert_of_one_key_in_a_flush_is_a_state(session: orm.Session, log: Log) -> None:
    """The row is there in the end."""
    customer = Customer(id=1, name="Ada")
    session.add(customer)
    session.commit()
    log()
    session.delete(customer)
    session.add(Customer(id=1, name="Eve"))
    session.commit()
    assert [(key, state["name"]) for _, key, state in log()] == [("1", "Eve")]


def test_an_async_session_publishes(engine: sa.Engine, database: str, log: Log) -> None:
    """Lazy loads of the state function happen where they are allowed."""

    async def work() -> None:
        async_engine = create_async_engine(sqlalchemy_url(database))
        async with AsyncSession(async_engine) as session:
            session.add(Order(id=1, lines=[Line(text="a")]))
            await session.commit()
            line = (await session.execute(sa.select(Line))).scalar_one()
            line.text = "b"
            await session.commit()
        await async_engine.dispose()

    asyncio.run(work())
    assert [state for _, _, state in log()] == [
        {"version": 1, "lines": {"1": ["a", []]}},
        {"version": 2, "lines": {"1": ["b", []]}},
    ]


def test_an_inherited_class_is_published_as_its_base(session: orm.Session, log: Log) -> None:
    """Single-table and joined; a change of a column of the subclass's own table counts."""
    single, joined = Single(tenant="a", slug="s"), Joined(tenant="a", slug="j", extra="x")
    session.add_all([single, joined])
    session.commit()
    assert sorted(log()) == [
        ("advert", "a:j", {"kind": "joined", "text": ""}),
        ("advert", "a:s", {"kind": "single", "text": ""}),
    ]
    joined.extra = "y"
    session.commit()
    session.delete(single)
    session.delete(joined)
    session.commit()
    assert [(key, state and state["kind"]) for _, key, state in log()] == [
        ("a:j", "joined"),
        ("a:s", None),
        ("a:j", None),
    ]


def test_many_objects_are_read_and_written_in_few_statements(engine: sa.Engine, log: Log) -> None:
    """Not one by one."""
    statements: list[str] = []
    with orm.Session(engine) as session:
        session.add_all([Customer(id=number, name="x") for number in range(1, 501)])
        sa.event.listen(engine, "before_cursor_execute", lambda _c, _k, statement, *_: statements.append(statement))
        session.commit()
    assert len([s for s in statements if "FROM customers" in s]) == 1
    assert len([s for s in statements if "outbox" in s and "INSERT" in s]) == 1
    assert len(log()) == 500


# -- keys -----------------------------------------------------------------------------------------------------------


def test_a_change_of_the_key_is_a_tombstone_and_a_state(session: orm.Session, log: Log) -> None:
    """A composite key, a primary key, a key that a function makes."""
    advert, customer, page = (
        Advert(tenant="a", slug="old", kind="plain"),
        Customer(id=1, name="Ada"),
        Page(site="s", path="old"),
    )
    session.add_all([advert, customer, page])
    session.commit()
    log()
    for target, name, value in ((advert, "slug", "new"), (customer, "id", 2), (page, "path", "new")):
        setattr(target, name, value)
        session.commit()
    assert [(type, key, state is None) for type, key, state in log()] == [
        ("advert", "a:old", True),
        ("advert", "a:new", False),
        ("customer", "1", True),
        ("customer", "2", False),
        ("page", "s/old", True),
        ("page", "s/new", False),
    ]


def test_two_objects_that_swap_keys_are_two_states(session: orm.Session, log: Log) -> None:
    """No tombstone hides a live entity."""
    one, other = Page(site="s", path="1"), Page(site="s", path="2")
    session.add_all([one, other])
    session.commit()
    log()
    one.path, other.path = "2", "1"
    session.commit()
    assert sorted(log()) == [("page", "s/1", {"path": "1"}), ("page", "s/2", {"path": "2"})]


def test_the_old_key_is_the_one_in_the_database(engine: sa.Engine, session: orm.Session, log: Log) -> None:
    """Another session may have changed the key since the object was loaded."""
    page = Page(site="s", path="1")
    session.add(page)
    session.commit()
    assert page.path == "1"
    session.expire_on_commit = False
    session.commit()
    with orm.Session(engine) as other:
        other.get_one(Page, page.id).path = "2"
        other.commit()
    log()
    page.path = "3"
    session.commit()
    assert log() == [("page", "s/2", None), ("page", "s/3", {"path": "3"})]
    with orm.Session(engine) as other:
        other.get_one(Page, page.id).path = "4"
        other.commit()
    log()
    session.delete(page)
    session.commit()
    assert log() == [("page", "s/4", None)]


class Slugged:
    """A page whose key is made of its title by somebody else than the service's code."""

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


def slug_of(context: Any) -> str:
    return str(context.get_current_parameters()["title"]).lower()


def slugged(name: str, slug: Any) -> Any:
    class Own(orm.DeclarativeBase):
        pass

    cls = type(name, (Slugged, Own), {"__tablename__": name.lower(), "slug": slug})
    return outbox.published(cls, type="page", key="slug", state=lambda it: {"title": it.title})


def make_slug(*arguments: Any) -> None:
    arguments[-1].slug = arguments[-1].title.lower()


def by_listener() -> Any:
    cls = slugged("ByListener", mapped_column(sa.String))
    for name in ("before_insert", "before_update"):
        sa.event.listen(cls, name, make_slug)
    return cls


def by_onupdate() -> Any:
    return slugged("ByOnupdate", mapped_column(sa.String, default=slug_of, onupdate=slug_of))


def by_computed_column() -> Any:
    return slugged("ByComputed", mapped_column(sa.String, sa.Computed("lower(title)")))


def by_trigger() -> Any:
    cls = slugged("ByTrigger", mapped_column(sa.String, server_default=""))
    for text in (
        """CREATE FUNCTION slug() RETURNS trigger LANGUAGE plpgsql AS $$
           BEGIN NEW.slug = lower(NEW.title); RETURN NEW; END $$""",
        "CREATE TRIGGER slug BEFORE INSERT OR UPDATE ON bytrigger FOR EACH ROW EXECUTE FUNCTION slug()",
    ):
        sa.event.listen(cls.metadata, "after_create", sa.DDL(text))  # type: ignore[no-untyped-call]  # SQLAlchemy's
    return cls


def by_listener_of_the_session() -> Any:
    cls = slugged("BySession", mapped_column(sa.String, default=slug_of))

    @sa.event.listens_for(Listening, "before_flush")
    def before_flush(session: orm.Session, *_: Any) -> None:
        for target in session.dirty:
            if isinstance(target, cls):
                make_slug(target)

    return cls


class Listening(orm.Session):
    """A session class of the service, with listeners of its own."""


@pytest.mark.parametrize("make", [by_listener, by_onupdate, by_computed_column, by_trigger, by_listener_of_the_session])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_key_that_changes_inside_the_flush(
    engine: sa.Engine, log: Log, make: Callable[[], Any], *, loaded: bool
) -> None:
    """Nothing tells before the flush that it will: the old key is read, whatever the session is about to change."""
    cls = make()
    cls.metadata.create_all(engine)
    with Listening(engine) as session:
        page = cls(id=1, title="One")
        session.add(page)
        session.commit()
        if loaded:
            assert page.slug == "one"
        page.title = "Two"
        session.commit()
        session.delete(page)
        session.commit()
    assert [(key, state is None) for _, key, state in log()] == [
        ("one", False),
        ("one", True),
        ("two", False),
        ("two", True),
    ]


def test_a_listener_that_changes_an_object_without_a_change(engine: sa.Engine, log: Log) -> None:
    """It is in the flush since it is marked dirty; the listener makes the change."""
    cls = by_listener()
    cls.metadata.create_all(engine)
    with orm.Session(engine) as session:
        page = cls(id=1, title="One")
        session.add(page)
        session.commit()
        session.connection().exec_driver_sql("UPDATE bylistener SET slug = 'other'")
        assert page.title == "One"
        page.title = "Two"
        page.title = "One"
        session.commit()
    assert [(key, state is None) for _, key, state in log()] == [("one", False), ("other", True), ("one", False)]


class Named:
    """Everything that a key can be made of."""

    id: Mapped[int] = mapped_column(primary_key=True)
    site: Mapped[str] = mapped_column(default="s")
    path: Mapped[str]

    @hybrid_property
    def hybrid(self) -> str:
        return self.site + "/" + self.path

    @property
    def plain(self) -> str:
        return self.method()

    @cached_property
    def cached(self) -> str:
        return f"{self.site}/{self.path}"

    def method(self) -> str:
        return f"{self.site}/{self.path}"


def named(key: Any, state: Any = lambda it: {}, **members: Any) -> Any:
    class Own(orm.DeclarativeBase):
        pass

    members = {"__tablename__": "named", "synonym": orm.synonym("path"), **members}
    return outbox.published(type("Name", (Named, Own), members), type="page", key=key, state=state)


@pytest.mark.parametrize(
    "key",
    [
        "hybrid",
        "plain",
        "cached",
        "synonym",
        ("hybrid", "id"),
        lambda it: it.hybrid,
        lambda it: it.cached,
        lambda it: it.synonym,
        lambda it: it.method(),
    ],
)
def test_what_a_key_can_be_made_of(engine: sa.Engine, log: Log, key: Any) -> None:
    """It is evaluated on what the object was, not on what it is."""
    cls = named(key)
    cls.metadata.create_all(engine)
    with orm.Session(engine, expire_on_commit=False) as session:
        target = cls(id=1, path="old")
        session.add(target)
        session.commit()
        assert target.cached == "s/old"
        target.path = "new"
        session.commit()
        session.delete(target)
        session.commit()
    old, old_gone, new, new_gone = log()
    assert "old" in old[1]
    assert old_gone == ("page", old[1], None)
    assert "new" in new[1]
    assert new_gone == ("page", new[1], None)


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("method", r"Name\.method .* a method"),
        ("expression", r"Name\.expression .* computed by the database"),
        ("other", r"Name\.other .* a relationship"),
        ("nothing", r"Name\.nothing .* no attribute"),
        (lambda it: it.expression, r"Name\.expression .* computed by the database"),
        (lambda it: it.other.id, r"Name\.other .* a relationship"),
    ],
)
def test_a_key_that_cannot_be_evaluated_on_what_was_is_refused(engine: sa.Engine, key: Any, word: str) -> None:
    """With the first object that is written, and with the cure."""
    cls = named(
        key,
        expression=orm.column_property(sa.literal_column("path || 'x'")),
        other_id=mapped_column(sa.ForeignKey("named.id")),
        other=relationship("Name", remote_side="Name.id"),
    )
    cls.metadata.create_all(engine)
    with orm.Session(engine) as session:
        session.add(cls(id=1, path="old"))
        with pytest.raises(ConfigError, match=word) as caught:
            session.commit()
        assert "name a column" in caught.value.cure


def test_what_a_cached_property_holds_is_not_published(engine: sa.Engine, log: Log) -> None:
    """It was computed before the change."""
    cls = named("id", lambda it: {"cached": it.cached})
    cls.metadata.create_all(engine)
    with orm.Session(engine, expire_on_commit=False) as session:
        target = cls(id=1, path="old")
        session.add(target)
        session.commit()
        assert target.cached == "s/old"
        target.path = "new"
        session.commit()
    assert log()[-1][2] == {"cached": "s/new"}


def test_an_object_that_takes_the_row_of_a_deleted_one(session: orm.Session, log: Log) -> None:
    """The unit of work makes an UPDATE of the two; the key of the deleted one goes all the same."""
    page = Page(id=1, site="s", path="old")
    session.add(page)
    session.commit()
    log()
    session.delete(page)
    session.add(Page(id=1, site="s", path="new"))
    session.commit()
    assert sorted(log(), key=lambda entry: entry[1]) == [("page", "s/new", {"path": "new"}), ("page", "s/old", None)]


# -- aggregates -------------------------------------------------------------------------------------------------------


@pytest.fixture
def orders(session: orm.Session, log: Log) -> tuple[Order, Order]:
    """Order 1 with line 1 (note 1) and line 2, order 2 without lines; nothing is loaded."""
    session.add_all(
        [Order(id=1, lines=[Line(id=1, text="a", notes=[Note(id=1, text="n")]), Line(id=2, text="b")]), Order(id=2)]
    )
    session.commit()
    assert log() == [
        ("order", "1", {"version": 1, "lines": {"1": ["a", ["n"]], "2": ["b", []]}}),
        ("order", "2", {"version": 1, "lines": {}}),
    ]
    return session.get_one(Order, 1), session.get_one(Order, 2)


def test_a_changed_child_updates_and_publishes_its_root(session: orm.Session, log: Log, orders: Any) -> None:
    """The root's version grows: that locks it, and conflicts under REPEATABLE READ."""
    session.get_one(Line, 2).text = "c"
    session.commit()
    assert log() == [("order", "1", {"version": 2, "lines": {"1": ["a", ["n"]], "2": ["c", []]}})]


def test_a_child_added_by_its_foreign_key_alone_publishes_its_root(session: orm.Session, log: Log, orders: Any) -> None:
    """The session holds the root's old collection: it is read again."""
    assert len(orders[1].lines) == 0
    session.add(Line(id=3, order_id=2, text="c"))
    session.commit()
    assert log() == [("order", "2", {"version": 2, "lines": {"3": ["c", []]}})]


@pytest.mark.parametrize("how", ["object", "foreign key", "collection"])
def test_a_child_that_moves_publishes_both_roots(session: orm.Session, log: Log, orders: Any, how: str) -> None:
    """However it is moved."""
    line = session.get_one(Line, 2)
    match how:
        case "object":
            line.order = orders[1]
        case "foreign key":
            line.order_id = 2
        case _:
            orders[1].lines.append(line)
    session.commit()
    assert sorted(log()) == [
        ("order", "1", {"version": 2, "lines": {"1": ["a", ["n"]]}}),
        ("order", "2", {"version": 2, "lines": {"2": ["b", []]}}),
    ]


def test_a_child_that_another_session_moved_publishes_the_root_it_is_in(
    engine: sa.Engine, session: orm.Session, log: Log, orders: Any
) -> None:
    """The foreign key that the session remembers is old."""
    session.expire_on_commit = False
    line = session.get_one(Line, 2)
    session.commit()
    with orm.Session(engine) as other:
        other.get_one(Line, 2).order_id = 2
        other.commit()
    log()
    assert line.order_id == 1
    line.text = "c"
    session.commit()
    assert log() == [("order", "2", {"version": 3, "lines": {"2": ["c", []]}})]


@pytest.mark.parametrize("how", ["delete", "collection"])
def test_a_child_that_goes_publishes_its_root(session: orm.Session, log: Log, orders: Any, how: str) -> None:
    """Deleted, or removed from the collection."""
    line = session.get_one(Line, 2)
    if how == "delete":
        session.delete(line)
    else:
        orders[0].lines.remove(line)
    session.commit()
    assert log() == [("order", "1", {"version": 2, "lines": {"1": ["a", ["n"]]}})]


def test_a_part_of_a_part_publishes_the_root_above(session: orm.Session, log: Log, orders: Any) -> None:
    """Up to what is published."""
    session.get_one(Note, 1).text = "m"
    session.add(Note(id=2, line_id=2, text="new"))
    session.commit()
    assert log() == [("order", "1", {"version": 2, "lines": {"1": ["a", ["m"]], "2": ["b", ["new"]]}})]


def test_a_deleted_root_is_a_tombstone_only(session: orm.Session, log: Log, orders: Any) -> None:
    """Its parts go with it."""
    with session.no_autoflush:
        session.delete(session.get_one(Note, 1))
        session.delete(orders[0])
    session.commit()
    assert log() == [("order", "1", None)]


def test_a_root_and_its_child_changed_in_one_flush_are_one_entry(session: orm.Session, log: Log, orders: Any) -> None:
    """Once for each entity and flush."""
    session.get_one(Line, 2).text = "c"
    orders[0].version = 10
    session.commit()
    assert [(key, state["version"]) for _, key, state in log()] == [("1", 10)]


def test_the_version_of_the_mapper_is_used(session: orm.Session, log: Log) -> None:
    """And parts that know no way back in Python are found through their foreign key."""
    cart = Cart(id=1, items=[Item(id=1), Item(id=2)])
    session.add(cart)
    session.commit()
    assert log() == [("order", "1", {"version": 1, "items": [1, 2]})]
    cart.items.remove(cart.items[0])
    session.commit()
    assert log() == [("order", "1", {"version": 2, "items": [2]})]
    cart.items.append(Item(id=3))
    session.commit()
    assert log() == [("order", "1", {"version": 3, "items": [2, 3]})]
    session.delete(cart)
    session.commit()
    assert log() == [("order", "1", None)]


def test_a_relationship_of_a_root_that_changes_with_a_part(
    session: orm.Session, log: Log, statements: list[str]
) -> None:
    """The unit of work sets the foreign key and counts the version: nothing else may count it before."""
    session.add_all([Cart(id=1, items=[]), Plain(id=1)])
    session.commit()
    log()
    cart = session.get_one(Cart, 1)
    cart.owner = session.get_one(Plain, 1)
    session.add(Item(id=1, cart_id=1))
    statements.clear()
    session.commit()
    assert log() == [("order", "1", {"version": 2, "items": [1]})]
    assert len([statement for statement in statements if statement.startswith("UPDATE")]) == 1


def test_a_root_that_is_a_published_subclass(session: orm.Session, log: Log) -> None:
    """The relationship leads to its base, of which other subclasses are not published; keys of parts are composite."""
    invoice, draft = Invoice(id=1), Document(id=2)
    session.add_all([invoice, draft])
    session.commit()
    assert log() == [("page", "1", {"pieces": 0})]
    pieces = [Piece(tenant=1, number=number, document_id=document) for number, document in enumerate((1, 1, 2, None))]
    session.add_all(pieces)
    session.commit()
    assert log() == [("page", "1", {"pieces": 2})]
    assert invoice.version == 2
    pieces[0].document = draft
    pieces[3].document_id = 1
    session.delete(pieces[1])
    session.commit()
    assert log() == [("page", "1", {"pieces": 1})]


def test_a_savepoint_that_is_rolled_back_leaves_the_root_as_it_was(session: orm.Session, log: Log) -> None:
    """The version that the session holds is the database's: the next flush must not fail on it."""
    session.add(Cart(id=1, items=[]))
    session.commit()
    log()
    cart = session.get_one(Cart, 1)
    with session.begin_nested() as inner:
        session.add(Item(id=1, cart_id=1))
        session.flush()
        inner.rollback()
    assert cart.version == 1
    session.add(Item(id=2, cart_id=1))
    session.commit()
    assert log() == [("order", "1", {"version": 2, "items": [2]})]


class Shelf(Base):
    """Knows its books; they do not know it in Python."""

    __tablename__ = "shelves"
    id: Mapped[int] = mapped_column(primary_key=True)
    books: Mapped[list[Book]] = relationship(order_by=lambda: Book.id, cascade="all, delete-orphan")


@outbox.part_of("shelf")
class Book(Base):
    __tablename__ = "books"
    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_id: Mapped[int] = mapped_column(sa.ForeignKey("shelves.id"))
    shelf: Mapped[Shelf] = relationship(overlaps="books")


outbox.published(Shelf, type="page", key="id", state=lambda it: {"books": [book.id for book in it.books]})


@pytest.mark.parametrize("how", ["moved meanwhile", "expired", "removed meanwhile", "moved"])
def test_a_part_that_changes_through_a_collection_without_a_way_back(
    engine: sa.Engine, session: orm.Session, log: Log, how: str
) -> None:
    """Nothing of the part is dirty before the flush: the unit of work sets its foreign key."""
    session.add_all([Shelf(id=1, books=[Book(id=1), Book(id=2)]), Shelf(id=2), Shelf(id=3)])
    session.commit()
    log()
    session.expire_on_commit = False
    book = session.get_one(Book, 1)
    shelves = [session.get_one(Shelf, number) for number in (1, 2, 3)]
    assert [len(shelf.books) for shelf in shelves] == [2, 0, 0]
    if "meanwhile" in how:
        with orm.Session(engine) as other:
            other.get_one(Book, 1).shelf_id = 3
            other.commit()
    match how:
        case "expired":
            session.expire(book)
            shelves[1].books.append(book)
        case "removed meanwhile":
            shelves[0].books.remove(book)
        case _:
            shelves[1].books.append(book)
    session.commit()
    last = {key: state["books"] for _, key, state in log()}
    with orm.Session(engine) as other:
        in_table = {str(shelf.id): [book.id for book in shelf.books] for shelf in other.scalars(sa.select(Shelf))}
    assert last == {key: books for key, books in in_table.items() if key in last}
    assert set(last) == {"1", "2"} if how in ("expired", "moved") else set(last) >= {"1", "3"}


@pytest.mark.parametrize("kind", ["version that the server counts", "version of another kind"])
def test_a_root_with_a_version_that_is_no_number_to_count(engine: sa.Engine, log: Log, kind: str) -> None:
    """The row is written as it is, or with what the mapper's generator makes."""

    class Own(orm.DeclarativeBase):
        pass

    class Root(Own):
        __tablename__ = "roots"
        id: Mapped[int] = mapped_column(primary_key=True)
        if kind == "version of another kind":
            version: Mapped[str] = mapped_column()
            __mapper_args__ = {"version_id_col": version, "version_id_generator": lambda _: uuid4().hex}
        else:
            version: Mapped[int] = mapped_column(  # type: ignore[no-redef]  # one of the two
                "xmin", sa.Integer, system=True, server_default=sa.FetchedValue()
            )
            __mapper_args__ = {"version_id_col": version, "version_id_generator": False}
        leaves: Mapped[list[Any]] = relationship("Leaf", back_populates="root", order_by="Leaf.id")

    class Leaf(Own):
        __tablename__ = "leaves"
        id: Mapped[int] = mapped_column(primary_key=True)
        root_id: Mapped[int] = mapped_column(sa.ForeignKey("roots.id"))
        text: Mapped[str] = mapped_column(default="")
        root: Mapped[Any] = relationship("Root", back_populates="leaves")

    outbox.published(Root, type="order", key="id", state=lambda it: {"leaves": [leaf.text for leaf in it.leaves]})
    outbox.part_of("root")(Leaf)
    Own.metadata.create_all(engine)
    with orm.Session(engine, expire_on_commit=False) as session:
        roots = [Root(id=number, leaves=[Leaf(id=number)]) for number in (1, 2)]
        session.add_all(roots)
        session.commit()
        log()
        before = [root.version for root in roots]
        for leaf in session.scalars(sa.select(Leaf)):
            leaf.text = "new"
        session.commit()
        assert all(root.version != old for root, old in zip(roots, before, strict=True))
        assert kind == "version that the server counts" or roots[0].version != roots[1].version
        # The session knows the version: the next flush does not fail on it.
        roots[0].leaves[0].text = "newer"
        session.delete(roots[1].leaves[0])
        session.delete(roots[1])
        session.commit()
    assert [(key, state) for _, key, state in log()] == [
        ("1", {"leaves": ["new"]}),
        ("2", {"leaves": ["new"]}),
        ("2", None),
        ("1", {"leaves": ["newer"]}),
    ]


def test_a_root_that_changes_its_primary_key_with_a_part(engine: sa.Engine, log: Log) -> None:
    """The row that was found for the part has another name after the flush."""

    class Own(orm.DeclarativeBase):
        pass

    class Root(Own):
        __tablename__ = "roots"
        id: Mapped[int] = mapped_column(primary_key=True)
        leaves: Mapped[list[Any]] = relationship("Leaf", back_populates="root", order_by="Leaf.id")

    class Leaf(Own):
        __tablename__ = "leaves"
        id: Mapped[int] = mapped_column(primary_key=True)
        root_id: Mapped[int] = mapped_column(sa.ForeignKey("roots.id", onupdate="CASCADE"))
        text: Mapped[str]
        root: Mapped[Any] = relationship("Root", back_populates="leaves")

    outbox.published(Root, type="order", key="id", state=lambda it: [leaf.text for leaf in it.leaves])
    outbox.part_of("root")(Leaf)
    Own.metadata.create_all(engine)
    with orm.Session(engine) as session:
        session.add_all([Root(id=number, leaves=[Leaf(id=number, text="old")]) for number in (1, 2)])
        session.commit()
        log()
        root = session.get_one(Root, 1)
        leaves = session.scalars(sa.select(Leaf).order_by(Leaf.id)).all()
        for leaf in leaves:
            leaf.text = "new"
        root.id = 5
        session.commit()
    assert sorted(log()) == [("order", "1", None), ("order", "2", ["new"]), ("order", "5", ["new"])]


def test_a_version_in_a_table_of_a_subclass_is_refused(engine: sa.Engine) -> None:
    """The row that everybody updates is the one in the base table."""

    class Own(orm.DeclarativeBase):
        pass

    class Root(Own):
        __tablename__ = "roots"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "root"}

    class Sub(Root):
        __tablename__ = "subs"
        id: Mapped[int] = mapped_column(sa.ForeignKey("roots.id"), primary_key=True)
        version: Mapped[int] = mapped_column(default=1)
        __mapper_args__ = {"polymorphic_identity": "sub"}

    outbox.published(Sub, type="page", key="id", state=lambda it: {}, version="version")
    Own.metadata.create_all(engine)
    with orm.Session(engine) as session:
        sub = Sub(id=1)
        session.add(sub)
        session.commit()
        sub.version = 2
        with pytest.raises(ConfigError, match=r"Root\.version is no whole number in the table roots"):
            session.commit()


def test_parts_that_the_root_holds_in_no_collection(engine: sa.Engine, log: Log) -> None:
    """The state function finds them by a query, and sees what the database holds."""

    class Own(orm.DeclarativeBase):
        pass

    class Root(Own):
        __tablename__ = "roots"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Leaf(Own):
        __tablename__ = "leaves"
        id: Mapped[int] = mapped_column(primary_key=True)
        root_id: Mapped[int] = mapped_column(sa.ForeignKey("roots.id"))
        text: Mapped[str]
        root: Mapped[Root] = relationship()

    def state(root: Root) -> object:
        session = cast("orm.Session", orm.object_session(root))
        query = sa.select(Leaf).where(Leaf.root_id == root.id).order_by(Leaf.id)
        return [leaf.text for leaf in session.scalars(query)]

    outbox.published(Root, type="order", key="id", state=state)
    outbox.part_of("root")(Leaf)
    Own.metadata.create_all(engine)
    with orm.Session(engine, expire_on_commit=False) as session:
        leaves = [Leaf(id=number, root_id=1, text="old") for number in (1, 2)]
        session.add(Root(id=1))
        session.flush()
        session.add_all(leaves)
        session.commit()
        with orm.Session(engine) as other:
            other.get_one(Leaf, 2).text = "new"
            other.commit()
        log()
        leaves[0].text = "new"
        session.commit()
    assert log() == [("order", "1", ["new", "new"])]


@pytest.mark.parametrize("level", [1, 2])
def test_savepoints_that_are_rolled_back_one_after_the_other(session: orm.Session, log: Log, level: int) -> None:
    """What the inner one keeps, the outer one may take back."""
    session.add(Cart(id=1, items=[Item(id=1)]))
    session.commit()
    log()
    cart = session.get_one(Cart, 1)
    with session.begin_nested() as outer:
        session.add(Item(id=2, cart_id=1))
        session.flush()
        assert cart.version == 2
        with session.begin_nested() as inner:
            session.add(Item(id=3, cart_id=1))
            session.flush()
            (inner.rollback if level == 1 else inner.commit)()
        assert (cart.version, len(cart.items)) == ((2, 2) if level == 1 else (3, 3))
        outer.rollback()
    assert (cart.version, len(cart.items)) == (1, 1)
    cart.version = 7
    session.commit()
    assert [state["version"] for _, _, state in log()] == [7]


# -- the session of the service --------------------------------------------------------------------------------------


def test_a_flush_of_other_objects_leaves_parts_alone(session: orm.Session, statements: list[str], log: Log) -> None:
    """It neither reads them nor lets the session forget them."""
    session.add(Order(id=1, lines=[Line(id=number, text="a") for number in range(1, 1001)]))
    session.commit()
    order = session.get_one(Order, 1)
    lines = list(order.lines)
    session.add(Customer(id=0, name="warm"))
    session.flush()
    statements.clear()
    for number in range(1, 21):
        session.add(Customer(id=number, name="x"))
        session.flush()
    # The INSERT, the object read again, the entry.
    assert len(statements) == 3 * 20
    assert [line.text for line in lines] == ["a"] * 1000
    assert (order.version, len(order.lines)) == (1, 1000)
    assert len(statements) == 3 * 20


class Shop(Base):
    """Published, with neighbours that are no parts."""

    __tablename__ = "shops"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    text: Mapped[str] = mapped_column(default="text", deferred=True)
    street_id: Mapped[int | None] = mapped_column(sa.ForeignKey("streets.id"))
    street: Mapped[Street | None] = relationship()
    signs: Mapped[list[Sign]] = relationship(lazy="raise")


class Street(Base):
    __tablename__ = "streets"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Sign(Base):
    __tablename__ = "signs"
    id: Mapped[int] = mapped_column(primary_key=True)
    shop_id: Mapped[int] = mapped_column(sa.ForeignKey("shops.id"))


outbox.published(Shop, type="page", key="id", state=lambda it: {"name": it.name, "street": it.street.name})


def test_what_the_service_had_loaded_stays_loaded(engine: sa.Engine, statements: list[str], log: Log) -> None:
    """Eagerly loaded relationships, deferred columns, lines of an order; an AsyncSession could not load them again."""
    with orm.Session(engine, expire_on_commit=False) as session:
        streets = [Street(id=1, name="High Street"), Street(id=2, name="Low Street")]
        session.add_all([*streets, Shop(id=1, name="a", street_id=1, signs=[Sign(id=1)])])
        session.add(Order(id=1, lines=[Line(id=1, text="a", notes=[Note(id=1)])]))
        session.commit()
    with orm.Session(engine, expire_on_commit=False) as session:
        loaded = [orm.selectinload(Shop.street), orm.selectinload(Shop.signs), orm.undefer(Shop.text)]
        shop = session.scalars(sa.select(Shop).options(*loaded)).one()
        order = session.scalars(sa.select(Order).options(orm.selectinload(Order.lines).selectinload(Line.notes))).one()
        line = order.lines[0]
        assert line.order is order
        shop.name, shop.street_id, line.text = "b", 2, "b"
        session.commit()
        statements.clear()
        assert (shop.text, shop.street and shop.street.name, len(shop.signs)) == ("text", "Low Street", 1)
        assert (order.version, order.lines[0].text, len(line.notes), line.order) == (2, "b", 1, order)
        assert statements == []
    assert ("page", "1", {"name": "b", "street": "Low Street"}) in log()


def test_changes_that_another_listener_leaves_pending_are_kept(engine: sa.Engine, log: Log) -> None:
    """They are written by the next flush."""

    class Own(orm.Session):
        pass

    # Before the library's.
    @sa.event.listens_for(Own, "after_flush_postexec", insert=True)
    def postexec(session: orm.Session, _context: object) -> None:
        for target in list(session.identity_map.values()):
            if isinstance(target, Customer) and target.name == "Eve" and target.secret is None:
                target.secret = "set"

    with Own(engine) as session:
        customer = Customer(id=1, name="Ada")
        session.add(customer)
        session.commit()
        customer.name = "Eve"
        session.commit()
        assert customer.secret == "set"


def test_a_listener_that_hides_rows_hides_none_from_entries(engine: sa.Engine, log: Log) -> None:
    """`with_loader_criteria`, for a tenant or for what is deleted softly: the state is what the tables hold."""

    class Own(orm.DeclarativeBase):
        pass

    class Root(Own):
        __tablename__ = "roots"
        id: Mapped[int] = mapped_column(primary_key=True)
        hidden: Mapped[bool] = mapped_column(default=False)
        leaves: Mapped[list[Any]] = relationship("Leaf", back_populates="root", order_by="Leaf.id")

    class Leaf(Own):
        __tablename__ = "leaves"
        id: Mapped[int] = mapped_column(primary_key=True)
        root_id: Mapped[int] = mapped_column(sa.ForeignKey("roots.id"))
        hidden: Mapped[bool] = mapped_column(default=False)
        root: Mapped[Any] = relationship("Root", back_populates="leaves")

    class Hiding(orm.Session):
        pass

    @sa.event.listens_for(Hiding, "do_orm_execute")
    def hide(execution: orm.ORMExecuteState) -> None:
        if execution.is_select:
            for cls in (Root, Leaf):
                execution.statement = execution.statement.options(
                    orm.with_loader_criteria(cls, lambda it: it.hidden.is_(False), include_aliases=True)
                )

    outbox.published(
        Root, type="order", key="id", state=lambda it: [it.hidden, [[leaf.id, leaf.hidden] for leaf in it.leaves]]
    )
    outbox.part_of("root")(Leaf)
    Own.metadata.create_all(engine)
    with Hiding(engine) as session:
        root = Root(id=1, leaves=[Leaf(id=1), Leaf(id=2)])
        session.add(root)
        session.commit()
        root.leaves[0].hidden = True
        session.commit()
        assert len(root.leaves) == 1, "the listener is there again"
        root.hidden = True
        session.commit()
    with Hiding(engine) as session:
        assert session.scalars(sa.select(Root)).all() == []
        session.add(Leaf(id=3, root_id=1))
        session.commit()
    assert [state for _, _, state in log()] == [
        [False, [[1, False], [2, False]]],
        [False, [[1, True], [2, False]]],
        [True, [[1, True], [2, False]]],
        [True, [[1, True], [2, False], [3, False]]],
    ]


def test_a_row_that_cannot_be_read_again_undoes_the_flush(session: orm.Session, engine: sa.Engine, log: Log) -> None:
    """A written object without an entry would be a change that nobody hears of."""
    customer = Customer(id=1, name="Ada")
    session.add(customer)
    session.commit()
    log()
    with engine.begin() as connection:
        for text in (
            """CREATE FUNCTION vanish() RETURNS trigger LANGUAGE plpgsql AS $$
               BEGIN DELETE FROM customers; RETURN NULL; END $$""",
            "CREATE TRIGGER vanish AFTER UPDATE ON customers FOR EACH ROW EXECUTE FUNCTION vanish()",
        ):
            connection.exec_driver_sql(text)
    customer.name = "Eve"
    with pytest.raises(StateError, match=r"Customer 1 was written by this flush, and cannot be read again.* row-level"):
        session.commit()
    assert log() == []


def test_parts_cost_a_bounded_number_of_statements(engine: sa.Engine, statements: list[str], log: Log) -> None:
    """Not one for each root or part: 200 roots cost what 2 do, but for the loading of SQLAlchemy in chunks of 500."""

    def count(numbers: range) -> int:
        with orm.Session(engine) as session:
            session.add_all([Order(id=n, lines=[Line(id=2 * n), Line(id=2 * n + 1)]) for n in numbers])
            session.commit()
            lines = session.scalars(sa.select(Line).where(Line.order_id.in_(numbers))).all()
            for line in lines:
                line.text = "new"
            statements.clear()
            session.commit()
        updates = [statement for statement in statements if statement.startswith("UPDATE orders")]
        assert len(updates) == 1
        return len(statements)

    few, many = count(range(1, 3)), count(range(1000, 1200))
    assert many == few
    assert many <= 16
    log()
    assert count(range(2000, 3000)) <= 20
    assert len(log()) == 2000


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        sa.update(Customer).values(name="x"),
        sa.delete(Customer),
        sa.insert(Customer).values(name="x"),
        sa.update(Line).values(text="x"),
        sa.update(Joined).values(extra="x"),
        sa.update(cast("sa.Table", Customer.__table__)).values(name="x"),
        sa.delete(cast("sa.Table", Line.__table__)),
    ],
)
def test_a_bulk_statement_on_a_published_class_is_refused(session: orm.Session, statement: Any, log: Log) -> None:
    """It goes around the unit of work; who means it says so, and writes the entries."""
    with pytest.raises(BypassError, match="put_many"):
        session.execute(statement)
    session.execute(statement.execution_options(outbox_bypass=True))
    session.execute(sa.delete(Plain))
    session.commit()
    assert log() == []


def test_a_bulk_statement_with_its_entries(session: orm.Session, log: Log) -> None:
    """As docs/writing.md tells to do it."""
    session.add_all([Customer(id=1, name="Ada"), Customer(id=2, name="Eve", city="Rome")])
    session.commit()
    log()
    query = sa.update(Customer).where(Customer.city == "Paris").values(name="Bob").returning(Customer.id)
    ids = session.scalars(query, execution_options={"outbox_bypass": True}).all()
    changed = session.scalars(sa.select(Customer).where(Customer.id.in_(ids)).execution_options(populate_existing=True))
    outbox.put_many(session, "customer", ((customer.id, {"name": customer.name}) for customer in changed))
    session.commit()
    assert log() == [("customer", "1", {"name": "Bob"})]


def test_the_bulk_methods_of_a_session_are_not_noticed(session: orm.Session, log: Log) -> None:
    """They run no event; docs/writing.md names them. When this fails they can be refused, or published."""
    session.bulk_save_objects([Customer(id=1, name="Ada")])
    session.commit()
    assert log() == []


def test_a_session_that_is_bound_class_by_class(engine: sa.Engine, log: Log) -> None:
    """The entries go where the class's rows go, tombstones too."""
    with orm.Session(binds={Customer: engine}) as session:
        customer = Customer(id=1, name="Ada")
        session.add(customer)
        session.commit()
        session.delete(customer)
        session.commit()
    assert [state is None for _, _, state in log()] == [False, True]


def test_query_update_and_delete_are_refused(session: orm.Session) -> None:
    """The older form of the same."""
    with pytest.raises(BypassError):
        session.query(Customer).update({"name": "x"})
    with pytest.raises(BypassError):
        session.query(Line).delete()


def test_a_state_function_that_fails_undoes_the_flush_and_names_the_entity(engine: sa.Engine, log: Log) -> None:
    """Nothing is committed without its entry."""

    class Own(orm.DeclarativeBase):
        pass

    @outbox.published(type="customer", key="id", state=lambda it: states[it.id](it))
    class Broken(Own):
        __tablename__ = "broken"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(default="")
        other_id: Mapped[int | None] = mapped_column(sa.ForeignKey("broken.id"))
        others: Mapped[list[Any]] = relationship("Broken", lazy="raise")

    Own.metadata.create_all(engine)
    states: dict[int, Any] = {
        1: lambda it: it.nothing,
        2: lambda it: None,
        3: lambda it: setattr(it, "name", "x"),
        4: lambda it: {"n": float("nan")},
        5: lambda it: it.others,
    }
    with orm.Session(engine) as session:
        words = ("AttributeError", "is None", "changed the session", "no such number", "lazy='raise'.* let itself")
        for number, word in enumerate(words, 1):
            session.add(Broken(id=number))
            with pytest.raises(StateError, match=word) as caught:
                session.commit()
            assert f'customer "{number}"' in caught.value.message
            session.rollback()
        assert session.scalars(sa.select(Broken)).all() == []
    assert log() == []


def test_an_unknown_type_undoes_the_flush(engine: sa.Engine) -> None:
    """With the cure."""

    class Own(orm.DeclarativeBase):
        pass

    class Unregistered(Own):
        __tablename__ = "unregistered"
        id: Mapped[int] = mapped_column(primary_key=True)

    # The form for a class that one cannot decorate.
    outbox.published(Unregistered, type="nothing", key="id", state=lambda it: {})
    Own.metadata.create_all(engine)
    with orm.Session(engine) as session:
        session.add(Unregistered(id=1))
        with pytest.raises(UnknownTypeError, match=r"op\.outbox_add_type"):
            session.commit()


def test_a_class_is_published_once() -> None:
    """A second declaration of the same class is a mistake."""
    with pytest.raises(ConfigError, match="Customer is published already"):
        outbox.published(Customer, type="other", key="id", state=lambda it: {})


def test_part_of_needs_the_way_to_the_root(engine: sa.Engine) -> None:
    """A many-to-one relationship."""

    class Own(orm.DeclarativeBase):
        pass

    @outbox.part_of("owner")
    class Lost(Own):
        __tablename__ = "lost"
        id: Mapped[int] = mapped_column(primary_key=True)

    Own.metadata.create_all(engine)
    with orm.Session(engine) as session:
        session.add(Lost(id=1))
        with pytest.raises(ConfigError, match=r"Lost\.owner is no many-to-one"):
            session.flush()


def test_the_context_of_a_block_of_work_holds_for_flushes(session: orm.Session, database: str) -> None:
    """Cause and headers are taken at the flush."""
    with outbox.context(cause="import", headers={"tenant": "7"}):
        session.add(Customer(name="Ada"))
        session.flush()
    session.commit()
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT cause, headers FROM outbox.entries").fetchall() == [
            ("import", {"tenant": "7"})
        ]
