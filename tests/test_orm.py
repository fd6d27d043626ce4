"""Published classes: what a flush writes is published, as it is in the database, once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import orjson
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
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

    Own.metadata.create_all(engine)
    states: dict[int, Any] = {
        1: lambda it: it.nothing,
        2: lambda it: None,
        3: lambda it: setattr(it, "name", "x"),
        4: lambda it: {"n": float("nan")},
    }
    with orm.Session(engine) as session:
        for number, word in ((1, "AttributeError"), (2, "is None"), (3, "changed the session"), (4, "no such number")):
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
