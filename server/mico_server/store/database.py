"""The database: SQLite in a file, or PostgreSQL, brought up to date when the service starts.

Committed changes survive a loss of power: SQLite syncs at each commit, PostgreSQL does so by
default. Several processes may share either. SQLite has one writer at a time, so a writing
transaction takes its lock at the start (BEGIN IMMEDIATE), instead of failing half-way.
"""

import asyncio
import functools
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.util import CommandError
from filelock import FileLock, Timeout
from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Row,
    Select,
    Table,
    event,
    literal,
    text,
    tuple_,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from mico_chat.errors import ConfigError, MissingExtraError
from mico_server.errors import NotFoundError, UnavailableError
from mico_server.store import search  # noqa: F401 - with the tables comes their index
from mico_server.store.tables import is_id, metadata

try:
    import asyncpg
except ModuleNotFoundError:  # the extra "postgres" is not installed
    asyncpg = None

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 60.0
LOCK_TIMEOUT_S = 30.0
MIGRATION_TIMEOUT_S = 600.0

P = ParamSpec("P")
T = TypeVar("T")


def uninterrupted(
    method: Callable[P, Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Run a method to its end before its caller is cancelled.

    A transaction must not release its lock while a thread still moves files, and a cancelled query
    would cost its connection.
    """

    @functools.wraps(method)
    async def run(*args: P.args, **keywords: P.kwargs) -> T:
        task = asyncio.create_task(method(*args, **keywords))
        cancelled = False
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.warning("the client disconnected, and its change failed: %s", error)
            raise asyncio.CancelledError
        return task.result()

    return run


_NAMES = {"conversations": "conversation", "media": "medium", "files": "file", "batches": "batch"}
_NAMES["taught"] = "taught name"
_PREFIXES = {"conversations": "conv", "media": "media", "files": "file", "batches": "batch"}
_PREFIXES["taught"] = "taught"


@dataclass(frozen=True)
class Rows:
    """The rows of ``table`` that a tenant may see, as ``query`` selects them; None: of all tenants.

    Lists are in the descending order of the columns ``order``.
    """

    table: Table
    query: Select[Any]
    order: tuple[str, ...] = ("created_at",)

    def of(self, tenant: str | None) -> Select[Any]:
        return self.query if tenant is None else self.query.where(self.table.c.tenant == tenant)

    async def one(
        self, connection: AsyncConnection, tenant: str | None, id_: str, **lock: bool
    ) -> Row[Any]:
        """A row, locked if ``with_for_update`` gets options; other texts than ids find nothing."""
        query = self.of(tenant).where(self.table.c.id == id_)
        query = query.with_for_update(of=self.table, **lock) if lock else query
        name = self.table.name
        row: Row[Any] | None = None
        if is_id(_PREFIXES[name], id_):
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFoundError(f"no {_NAMES[name]} {id_!r}")
        return row

    async def page(
        self,
        connection: AsyncConnection,
        tenant: str | None,
        limit: int,
        after: str | None,
        *wanted: ColumnElement[bool],
    ) -> Sequence[Row[Any]]:
        """Up to ``limit`` of the rows that are ``wanted``, from behind the row ``after`` on."""
        order = [self.table.c[name] for name in (*self.order, "id")]
        query = self.of(tenant).where(*wanted).order_by(*(column.desc() for column in order))
        if after is not None:
            row = (await self.one(connection, tenant, after))._mapping
            last = (literal(row[column.name], column.type) for column in order)
            query = query.where(tuple_(*order) < tuple_(*last))
        found: Sequence[Row[Any]] = (await connection.execute(query.limit(limit))).all()
        return found


class Database:
    """Connections and transactions; belongs to one event loop.

    ``url`` is ``sqlite:///file``, ``postgresql://user:password@host/name`` with libpq's options
    behind a ``?``, or None for SQLite in ``data_dir``, a folder for this user alone.
    """

    def __init__(self, url: str | None, data_dir: Path) -> None:
        self._data_dir = data_dir.expanduser().absolute()
        file = self._data_dir / "mico-chat.db"
        self._dsn = url
        self._file, self.name = (file, str(file)) if url is None else _file_and_name(url)
        self.is_sqlite = self._file is not None
        self._engine: AsyncEngine | None = None
        self._claimed: set[str] = set()
        self._claims: Any = None  # the PostgreSQL connection that holds the locks of the claims
        self._claiming = asyncio.Lock()
        # Writers of this process wait here in order; SQLite would let in any of them.
        self._writer = asyncio.Lock()
        if self._file is None and asyncpg is None:
            raise MissingExtraError("a PostgreSQL database", "postgres")

    async def start(self) -> None:
        """Connect, and bring the schema up to date; other processes may do so at the same time."""
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._file is not None:
                self._file.touch(mode=0o600)
        except OSError as error:
            raise ConfigError(
                f"{error.filename}: {error.strerror}; check data_dir and database_url"
            ) from error
        try:
            if self._file is not None:
                await self._migrate_sqlite(self._file)
            else:
                await self._migrate_postgres()
        except DBAPIError as error:
            raise ConfigError(f"database {self.name}: {_reason(error)}") from error
        except CommandError as error:
            raise ConfigError(
                f"database {self.name}: its schema does not belong to this version of mico-chat "
                f"({error})"
            ) from error
        self._engine = self._new_engine(COMMAND_TIMEOUT_S)

    async def close(self) -> None:
        if self._claims is not None:
            await self._claims.close()
        if self._engine is not None:
            await self._engine.dispose()

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A transaction that sees one state of the database."""
        options = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        return self._transaction(**options)

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is committed at its end, and rolled back on an exception."""
        turn = self._writer if self.is_sqlite else nullcontext()
        async with turn, self._transaction(mico_begin="BEGIN IMMEDIATE") as connection:
            yield connection

    @asynccontextmanager
    async def claim(self, name: str) -> AsyncIterator[bool]:
        """Hold a name, in all processes on PostgreSQL; False if somebody else holds it."""
        if name in self._claimed:
            yield False
            return
        self._claimed.add(name)
        try:
            # Inside ``try``: a caller that is cancelled here may have got the lock already.
            yield self.is_sqlite or await self._lock("pg_try_advisory_lock", name)
        finally:
            self._claimed.discard(name)
            if not self.is_sqlite:
                with suppress(UnavailableError):  # the lock has gone with the connection
                    await self._lock("pg_advisory_unlock", name)

    @uninterrupted
    async def _lock(self, function: str, name: str) -> bool:
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
        async with self._claiming:  # a connection does one thing at a time
            try:
                if self._claims is None or self._claims.is_closed():
                    self._claims = await self._connect_postgres(COMMAND_TIMEOUT_S)
                return bool(await self._claims.fetchval(f"SELECT {function}($1)", key))
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                raise self._unavailable(error) from error

    @asynccontextmanager
    async def _transaction(self, **options: str) -> AsyncIterator[AsyncConnection]:
        assert self._engine is not None, "the database has not been started"
        async with AsyncExitStack() as stack:
            try:
                connection = await stack.enter_async_context(self._engine.connect())
                await connection.execution_options(**options)
                await stack.enter_async_context(connection.begin())
            except (DBAPIError, PoolTimeoutError, OSError) as error:
                raise self._unavailable(error) from error
            try:
                yield connection
            except DBAPIError as error:
                if error.connection_invalidated:
                    raise self._unavailable(error) from error
                raise

    def _unavailable(self, error: Exception) -> UnavailableError:
        logger.error("database %s: %s", self.name, _reason(error))
        return UnavailableError("the database cannot be reached; try again soon")

    def _new_engine(self, timeout_s: float | None) -> AsyncEngine:
        if self._file is not None:
            engine = create_async_engine(
                URL.create("sqlite+aiosqlite", database=str(self._file)),
                connect_args={"timeout": LOCK_TIMEOUT_S},
                json_serializer=_to_json,
            )
            event.listen(engine.sync_engine, "connect", _on_sqlite_connect)
            event.listen(engine.sync_engine, "begin", _on_sqlite_begin)
            return engine
        return create_async_engine(
            "postgresql+asyncpg://",
            async_creator=functools.partial(self._connect_postgres, timeout_s),
            json_serializer=_to_json,
            pool_pre_ping=True,  # finds connections that a restart of the database has closed
        )

    async def _connect_postgres(self, timeout_s: float | None) -> Any:
        # The driver reads the URL, so that everything libpq allows in it works.
        return await asyncpg.connect(
            self._dsn, timeout=CONNECT_TIMEOUT_S, command_timeout=timeout_s
        )

    async def _migrate_sqlite(self, file: Path) -> None:
        lock = FileLock(f"{file}.lock", timeout=MIGRATION_TIMEOUT_S, thread_local=False)
        try:
            await asyncio.to_thread(lock.acquire)
        except Timeout as error:
            raise ConfigError(
                f"database {self.name}: another process has held {lock.lock_file} for "
                f"{MIGRATION_TIMEOUT_S:.0f} s; stop that process, or try again"
            ) from error
        engine = self._new_engine(None)
        try:
            async with engine.connect() as connection:
                await connection.execution_options(mico_begin="BEGIN IMMEDIATE")
                async with connection.begin():
                    await connection.run_sync(migrate)
        finally:
            await engine.dispose()
            lock.release()

    async def _migrate_postgres(self) -> None:
        try:
            connection = await self._connect_postgres(None)
        except (OSError, TimeoutError, asyncpg.PostgresError) as error:
            reason = str(error) or f"no answer in {CONNECT_TIMEOUT_S:.0f} s"
            raise ConfigError(f"database {self.name}: cannot be reached: {reason}") from error
        except (ValueError, asyncpg.InterfaceError):
            # The driver's message can hold a part of the password.
            raise _unreadable(self.name) from None
        await connection.close()
        engine = self._new_engine(MIGRATION_TIMEOUT_S)
        try:
            async with engine.begin() as transaction:
                await transaction.execute(
                    # Any number that no other program locks on this database: "mico" in ASCII.
                    text("SELECT pg_advisory_xact_lock(:lock)"),
                    {"lock": 0x6D69636F},
                )
                await transaction.run_sync(migrate)
        finally:
            await engine.dispose()


def migrate(connection: Connection) -> None:
    """Create the tables of a new database, or bring those of an older version up to date.

    The caller commits the connection's transaction.
    """
    config = Config()
    scripts = str(Path(__file__).with_name("migrations"))
    config.set_main_option("script_location", scripts.replace("%", "%%"))
    config.attributes["connection"] = connection
    if MigrationContext.configure(connection).get_current_revision() is None:
        metadata.create_all(connection)
        command.stamp(config, "head")
    else:
        command.upgrade(config, "head")


def _on_sqlite_connect(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    # Stays with the file; readers and the writer then do not wait for each other.
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _on_sqlite_begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("mico_begin", "BEGIN"))


_to_json = functools.partial(json.dumps, allow_nan=False)


def _reason(error: Exception) -> str:
    """The driver's message, without the statement and its values."""
    if not isinstance(error, DBAPIError):
        return str(error) or type(error).__name__
    return str((error.orig and error.orig.__cause__) or error.orig)


# --- URLs of databases ---


def _file_and_name(url: str) -> tuple[Path | None, str]:
    """The file of a SQLite URL or None, and a name of the database without password and options."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "sqlite":
        path = rest.removeprefix("/")
        if path == rest or path in ("", ":memory:") or "?" in path or path.startswith("file:"):
            raise ConfigError(
                f"database_url: {url!r} does not name a file; write sqlite:///relative.db or "
                "sqlite:////absolute/path.db"
            )
        file = Path(path).expanduser().absolute()
        return file, str(file)
    if not separator or scheme not in ("postgres", "postgresql"):
        shown = url.partition(":")[0][:32]
        raise ConfigError(
            f"database_url: its scheme is {shown!r}; it must be postgresql:// or sqlite:///"
        )
    auth, at, rest = rest.rpartition("@")
    if any(character in auth for character in "@/?#"):
        raise _unreadable("")  # it is not clear where the password ends
    return None, f"{scheme}://{auth.partition(':')[0]}{at}{rest.partition('?')[0]}"


def _unreadable(name: str) -> ConfigError:
    """An error that shows nothing of the URL: a part of the password may be anywhere in it."""
    return ConfigError(
        f"database_url{name and ' '}{name}: it cannot be read; write special characters "
        "of user, password and options as %XX"
    )
