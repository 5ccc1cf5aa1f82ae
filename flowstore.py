"""flowstore: the state store of a task runner, in one file.

A cache (key to bytes), the history of executions per ref, records of detached background
runs, and variables scoped to a running process with fallback to a root scope, for many
short-lived processes that share one file:

    store = flowstore.SQLiteDataStore(".cache/flowstore.db")
    with store.execution("build app") as run:
        run.exit_code = subprocess.call(["make"], env=run.env)

The Go package `store` of *flow* in Python, on SQLite instead of bbolt; PostgresDataStore
keeps the same store on a server. An acknowledged write is on the disk, nobody waits longer
than the timeout, and what goes wrong is a StoreError that names the file and a way out.

The sections, top to bottom: constants and errors; records; where things are; the
interface; schema and SQL; runs; the operations; SQLite; the store in a file; the store in
PostgreSQL; the end of a store, moving old data; files of the original; the command line.

Copyright (c) 2026 The flowstore authors. Licence: MIT. SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import gc
import os
import sqlite3
import stat
import sys
import time
from _thread import RLock, get_ident  # threading itself and weakref take 3 of 25 ms
from _weakref import ref as weakly
from abc import ABC, abstractmethod
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from itertools import zip_longest

__version__ = "1.0.0"

_UNSUPPORTED = ""
if sys.version_info < (3, 11):
    _UNSUPPORTED = (
        f"flowstore needs Python 3.11 or newer; this is {sys.version.split()[0]}"
    )
elif sqlite3.sqlite_version_info < (3, 31):
    _UNSUPPORTED = (
        f"flowstore needs SQLite 3.31 or newer; this is {sqlite3.sqlite_version}"
    )
if _UNSUPPORTED and __name__ == "__main__":
    sys.exit(_UNSUPPORTED)
if _UNSUPPORTED:
    raise ImportError(_UNSUPPORTED)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import io
    from typing import Any, NamedTuple, NoReturn, TypeAlias, TypeVar

    Row: TypeAlias = Sequence[Any]
    Values: TypeAlias = dict[str, Any]  # by the names of a statement's parameters

    Execute: TypeAlias = Callable[[str, Values], Any]  # gives a cursor, of either engine
    Connection: TypeAlias = "_Connection | _PostgresConnection"
    T = TypeVar("T")
    Record = TypeVar("Record", "ExecutionRecord", "BackgroundRun")
else:

    class _NamedTupleType(type):
        def __new__(mcls, name, bases, namespace):
            if not bases:
                return super().__new__(mcls, name, bases, namespace)
            fields = namespace["__annotations__"]
            defaults = [namespace.pop(field) for field in fields if field in namespace]
            made = namedtuple(name, fields, defaults=defaults)
            for attribute, value in namespace.items():
                setattr(made, attribute, value)
            return made

    class NamedTuple(metaclass=_NamedTupleType):
        """All that is needed of typing.NamedTuple: importing typing takes 5 of 31 ms."""

    Any, NoReturn = object, None  # for typing.get_type_hints() on what is public


# ---- constants and errors ----

__all__ = [
    "BUCKET_ENV",
    "ROOT_BUCKET",
    "RUN_CLIENT_ENV",
    "RUN_SESSION_ENV",
    "RUN_SOURCE_CLI",
    "RUN_SOURCE_DESKTOP",
    "RUN_SOURCE_ENV",
    "RUN_SOURCE_MCP",
    "BackgroundRun",
    "BackgroundRunStatus",
    "CorruptStoreError",
    "DataStore",
    "Execution",
    "ExecutionRecord",
    "ImportSummary",
    "NotFoundError",
    "PostgresDataStore",
    "PruneSummary",
    "RunStatus",
    "SQLiteDataStore",
    "Session",
    "StoreBusyError",
    "StoreError",
    "copy_store",
    "default_path",
    "destroy_store",
    "environment_bucket",
    "import_bolt",
    "main",
    "migrate_process_buckets",
    "open_store",
    "run_env_value",
]

BUCKET_ENV = "FLOW_PROCESS_BUCKET"
ROOT_BUCKET = "root"
RUN_SOURCE_ENV = "FLOW_RUN_SOURCE"
RUN_CLIENT_ENV = "FLOW_RUN_CLIENT"
RUN_SESSION_ENV = "FLOW_RUN_SESSION"
RUN_SOURCE_CLI = "cli"
RUN_SOURCE_DESKTOP = "desktop"
RUN_SOURCE_MCP = "mcp"

_PATH_ENV = "FLOWSTORE_PATH"
_MAX_INTEGER = 2**63 - 1
_END_PATIENCE = 30.0  # seconds that the record of a run's end waits: nothing waits for it


class RunStatus:
    """The usual values of ExecutionRecord.status; any other str is kept as it is."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


class BackgroundRunStatus:
    """The usual values of BackgroundRun.status; any other str is kept as it is."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


class StoreError(Exception):
    """The base of all that a store raises for the world's faults.

    The message names the file (or the server's URL, without its password) and what to do;
    `path` has the file alone.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)  # not with the path: an OSError takes two for an errno
        self.path = path


class NotFoundError(StoreError, LookupError):
    """There is no variable or background run of that name."""


class StoreBusyError(StoreError, TimeoutError):
    """Another process kept the lock for longer than the timeout."""


class CorruptStoreError(StoreError):
    """The file is damaged, or is no store at all."""


def _error(kind: type[StoreError], path: str, reason: str) -> StoreError:
    return kind(f"{path}: {reason}", path)


def _is_own(error: BaseException) -> bool:
    """Whether an exception was raised by this module's own call: what a signal's handler
    raises in the middle of it has the handler as the last frame of its traceback."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    frames = globals(), vars(os.path)  # whose functions only do this module's calls
    return trace is not None and any(trace.tb_frame.f_globals is each for each in frames)


@contextmanager
def _overlooked() -> Iterator[None]:
    """Go on where the system refuses something; what a signal's handler raises passes."""
    try:
        yield
    except OSError as error:
        if not _is_own(error):
            raise


# ---- records ----


class ExecutionRecord(NamedTuple):
    """One execution of a ref.

    ref: what ran, by the name that its history is kept under; not empty.
    started_at: when it began, an aware datetime; returned in UTC, to the microsecond.
    duration: how long it took; 0 while it runs. Kept in nanoseconds, of 64 bits.
    exit_code: its exit status, 0 for success, 128 + n where signal n ended it.
    error: what went wrong, in words; "" where nothing did.
    log_archive_id: by what the runner finds its log; "" for none.
    id: by what a later record replaces this one; "" for none, which always appends.
    completed_at: when it ended, an aware datetime; None while it runs, or unknown.
    status: running, completed, failed (see RunStatus) or any other; "" in old records.
    pid: the process that runs it, or that watches over it; 0 for none.
    command: the command line; "" where it was no command.
    spec: the definition that it ran by, as the runner writes it.
    label: a name for people.
    source: what it was started from: cli, desktop, mcp (see RUN_SOURCE_CLI) or any other.
    client_name: the program that asked for it.
    session_id: the session of that program.
    working_dir: the folder that it ran in.
    All other texts are "" where they aren't given.
    """

    ref: str
    started_at: datetime
    duration: timedelta = timedelta(0)
    exit_code: int = 0
    error: str = ""
    log_archive_id: str = ""
    id: str = ""
    completed_at: datetime | None = None
    status: str = ""
    pid: int = 0
    command: str = ""
    spec: str = ""
    label: str = ""
    source: str = ""
    client_name: str = ""
    session_id: str = ""
    working_dir: str = ""

    def to_dict(self) -> dict[str, object]:
        """The original's JSON object: ref, startedAt, duration (nanoseconds) and exitCode
        always, other tags where they aren't empty; times in RFC 3339."""
        return _to_json(self, ("ref", "started_at", "duration", "exit_code"))

    @classmethod
    def from_dict(cls, data: dict[str, object]) -> ExecutionRecord:
        """The record of such an object. Unknown tags are ignored, None counts as missing;
        what is finer than a microsecond is cut. ValueError, TypeError by the tag's name."""
        return cls(**_from_json(cls, data))


class BackgroundRun(NamedTuple):
    """A detached run, kept by its id.

    id: its name, by which it is replaced; not empty.
    pid: the process that runs it, or that watches over it; 0 for none.
    ref: what ran; may be empty.
    started_at: when it began, an aware datetime; returned in UTC, to the microsecond.
    status: running, completed, failed (see BackgroundRunStatus) or any other.
    log_archive_id: by what the runner finds its log; "" for none.
    error: what went wrong, in words; "" where nothing did.
    completed_at: when it ended, an aware datetime; None while it runs, or unknown.
    """

    id: str
    pid: int
    ref: str
    started_at: datetime
    status: str
    log_archive_id: str = ""
    error: str = ""
    completed_at: datetime | None = None

    def to_dict(self) -> dict[str, object]:
        """The original's JSON object: id, pid, ref, startedAt and status always, the other
        tags where they aren't empty; times in RFC 3339."""
        return _to_json(self, ("id", "pid", "ref", "started_at", "status"))

    @classmethod
    def from_dict(cls, data: dict[str, object]) -> BackgroundRun:
        """The run of such an object; rules and errors as of ExecutionRecord.from_dict."""
        return cls(**_from_json(cls, data, pid=0, ref="", status=""))


class PruneSummary(NamedTuple):
    """How many records prune() has deleted: history, of executions; background, of
    background runs."""

    history: int = 0
    background: int = 0


class ImportSummary(NamedTuple):
    """What an import added.

    cache, history, background, process_vars, process_buckets: how many of each; what was
    there already isn't counted.
    recovered_runs: background runs that the original had moved among the variables.
    legacy_scopes: scopes that lay at the top of a file of the original.
    problems: bucket, key and reason of each entry that could not be brought over.
    """

    cache: int = 0
    history: int = 0
    background: int = 0
    process_vars: int = 0
    process_buckets: int = 0
    recovered_runs: int = 0
    legacy_scopes: int = 0
    problems: tuple[tuple[str, str, str], ...] = ()


def _require(what: str, value: object, kind: type) -> None:
    """Refuse a value of another type; a bool is no int."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(
            f"{what} must be of type {kind.__name__}, not {type(value).__name__}"
        )


def _text(what: str, value: Any) -> str:
    """A text as the store has it: a plain str that UTF-8 can encode, without NUL."""
    if type(value) is not str:
        _require(what, value, str)
    text = str.__str__(value)  # of a subclass, the plain value
    if "\0" in text:
        raise ValueError(f"{what} must not have a NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{what} must not have a lone surrogate") from None
    return text


def _noted(text: str) -> str:
    """A text that the module itself notes, with what _text() refuses shown by escapes."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = text.encode("utf-8", "backslashreplace")
    return _escaped(data)


def _escaped(data: bytes) -> str:
    """Bytes as text, with what is no UTF-8 shown as \\xff."""
    return data.decode("utf-8", "backslashreplace").replace("\0", "\\x00")


def _integer(what: str, value: Any) -> int:
    _require(what, value, int)
    number = int.__int__(value)
    if not -_MAX_INTEGER - 1 <= number <= _MAX_INTEGER:
        raise ValueError(f"{what} must fit into 64 bits")
    return number


def _nanoseconds(what: str, value: Any) -> int:
    _require(what, value, timedelta)
    # of timedelta itself: subclasses have other ideas of days and seconds
    microseconds = timedelta.__floordiv__(value, timedelta(microseconds=1))
    return _integer(f"{what} in nanoseconds", microseconds * 1000)


def _instant(what: str, value: Any) -> str:
    """A time as the store has it: UTC text of fixed width, which sorts as time."""
    _require(what, value, datetime)
    plain = datetime.fromisoformat(datetime.isoformat(value))  # of a subclass too
    if plain.tzinfo is None:
        raise ValueError(f"{what} must be an aware datetime: this one has no time zone")
    try:
        utc = plain.astimezone(timezone.utc)
    except OverflowError:
        raise ValueError(f"{what} must lie in the years 1 to 9999 in UTC") from None
    return datetime.isoformat(utc, "T", "microseconds")[:26] + "Z"


def _bytes(what: str, value: object) -> bytes:
    if type(value) is bytes:
        return value
    try:
        return memoryview(value).tobytes()  # type: ignore[arg-type]
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{what} must be bytes-like, not {kind}") from None


# What makes a row's cell of a field's value; the fields that aren't named are texts.
_CELLS: dict[str, Callable[[str, Any], object]] = {
    "started_at": _instant,
    "completed_at": lambda what, value: None if value is None else _instant(what, value),
    "duration": _nanoseconds,
    "exit_code": _integer,
    "pid": _integer,
}


def _values(record: ExecutionRecord | BackgroundRun) -> Values:
    """A record's fields as a row has them: the one way in."""
    return {
        field: _CELLS.get(field, _text)(field, value)
        for field, value in zip(record._fields, record)
    }


_INTEGERS = ("duration", "exit_code", "pid")  # the fields whose cells are integers


def _cell_types(fields: Sequence[str]) -> tuple[tuple[type, ...], ...]:
    """What a record's cells may be: with completed_at, the eighth of both kinds, and
    without."""
    types = [int if field in _INTEGERS else str for field in fields]
    return tuple(types), (*types[:7], type(None), *types[8:])


_EXECUTION_CELLS = _cell_types(ExecutionRecord._fields)
_BACKGROUND_CELLS = _cell_types(BackgroundRun._fields)


# To read all history these are called ten thousand times: so the cells that are no texts
# have their places, and what is looked up or called in Python each time has a name here.
_moment = datetime.fromisoformat
_record_of = tuple.__new__  # as _make() does it


def _execution(row: Row) -> ExecutionRecord:
    """An execution's record of its row: the one way out. TypeError, ValueError: damaged."""
    if tuple(map(type, row)) not in _EXECUTION_CELLS:
        raise TypeError("a cell isn't of its column's type")
    cells = list(row)
    cells[1] = _moment(cells[1])
    # of microseconds: by name it would take half as long again
    cells[2] = timedelta(0, 0, cells[2] // 1000)
    if cells[7] is not None:
        cells[7] = _moment(cells[7])
    return _record_of(ExecutionRecord, cells)


def _background(row: Row) -> BackgroundRun:
    """A background run of its row, as _execution()."""
    if tuple(map(type, row)) not in _BACKGROUND_CELLS:
        raise TypeError("a cell isn't of its column's type")
    cells = list(row)
    cells[3] = _moment(cells[3])
    if cells[7] is not None:
        cells[7] = _moment(cells[7])
    return _record_of(BackgroundRun, cells)


def _tag(field: str) -> str:
    """The original's JSON tag of a field: logArchiveId of log_archive_id."""
    first, *others = field.split("_")
    return first + "".join(other.capitalize() for other in others)


def _to_json(
    record: ExecutionRecord | BackgroundRun, always: Iterable[str]
) -> dict[str, object]:
    document: dict[str, object] = {}
    for field, value in _values(record).items():
        if value and field in ("started_at", "completed_at"):
            value = value[:-1].rstrip("0").rstrip(".") + "Z"
        if value or field in always:
            document[_tag(field)] = value
    return document


def _from_json(
    cls: type[ExecutionRecord] | type[BackgroundRun],
    data: dict[str, object],
    **fields: Any,
) -> Values:
    """The fields of a JSON object, beside those that are given for where it has none."""
    _require("data", data, dict)
    for field in cls._fields:
        tag = _tag(field)
        value = data.get(tag)
        if value is not None:
            fields[field] = _OF_JSON.get(field, _text)(tag, value)
        elif field not in cls._field_defaults and field not in fields:
            raise ValueError(f"{tag} is missing")
    return fields


def _span_of_json(what: str, value: object) -> timedelta:
    """A duration of nanoseconds, of which what is finer than a microsecond is cut."""
    nanoseconds = _integer(what, value)
    size = timedelta(microseconds=abs(nanoseconds) // 1000)
    return size if nanoseconds >= 0 else -size


def _instant_of_json(what: str, value: object) -> datetime:
    """A time of RFC 3339, of which what is finer than a microsecond is cut."""
    import re  # only here: it takes 5 ms

    # section 5.6 there: fromisoformat() takes much more
    shape = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:[0-5]\d)"
    text = _text(what, value).upper()
    try:
        if not re.fullmatch(shape, text, re.ASCII):
            raise ValueError
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{what} must be a time in RFC 3339, not {value!r}") from None
    return datetime.fromisoformat(_instant(what, moment))


# What makes a field's value of its tag's; the fields that aren't named are texts.
_OF_JSON: dict[str, Callable[[str, Any], object]] = {
    "started_at": _instant_of_json,
    "completed_at": _instant_of_json,
    "duration": _span_of_json,
    "exit_code": _integer,
    "pid": _integer,
}


# ---- where things are ----


def default_path() -> str:
    """Where the default store is: an absolute path, or the URL that $FLOWSTORE_PATH has.

    $FLOWSTORE_PATH, else flowstore.db in $FLOW_CACHE_DIR, else in the folder flow of the
    user's cache folder. StoreError where there is no such folder.
    """
    chosen = os.environ.get(_PATH_ENV)
    if chosen:
        return chosen if _is_url(chosen) else _absolute(chosen)
    folder = os.environ.get("FLOW_CACHE_DIR")
    if folder:
        return _absolute(os.path.join(folder, "flowstore.db"))
    folder = _cache_folder()
    if not os.path.isabs(folder):
        raise StoreError(
            f"no store: this user has no home folder; name a store by {_PATH_ENV}", folder
        )
    return os.path.join(folder, "flow", "flowstore.db")


def _cache_folder() -> str:
    """The user's folder for caches, as the system has it."""
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/Caches")
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    folder = os.environ.get(variable, "")
    # the XDG Base Directory Specification: a relative path is to be ignored
    return folder if os.path.isabs(folder) else os.path.expanduser("~/.cache")


def _absolute(path: str) -> str:
    if path == ":memory:" or "\0" in path:
        raise ValueError(
            f"{path!r} is no file, which a store is: every operation opens it"
        )
    try:
        return os.path.abspath(path)
    except OSError as error:  # the current folder has been removed
        if not _is_own(error):
            raise
        raise _error(
            StoreError,
            path,
            f"{error.strerror}: the current folder is gone; name an absolute path",
        ) from error


def _is_url(where: str) -> bool:
    # postgresql+psycopg:// too, which is refused then instead of becoming a file's name
    return "://" in where and where.strip().lower().startswith("postgres")


def environment_bucket() -> str:
    """The current scope: $FLOW_PROCESS_BUCKET with `_` for each `:`, `/` and space, or root
    where that is unset or empty."""
    return _bucket_name(os.environ.get(BUCKET_ENV) or ROOT_BUCKET)


def _bucket_name(name: str) -> str:
    return name.replace(":", "_").replace("/", "_").replace(" ", "_")


def run_env_value(name: str) -> str:
    """A variable of the environment, "" where unset. Where its value is exactly `${OTHER}`,
    the value of OTHER; `${}` names nothing, and is returned as it is."""
    value = os.environ.get(name, "")
    other = value[2:-1]
    if other and value == f"${{{other}}}":
        return os.environ.get(other, "")
    return value


# ---- the interface ----


class DataStore(ABC):
    """What every store does: the operations of the original, and transaction().

    Names (key, ref, bucket, id) and texts are str that UTF-8 can encode, without NUL, names
    not empty: else TypeError or ValueError, before anything is touched. Lists of names come
    in the order of their code points. What the world does wrong is a StoreError.
    """

    @abstractmethod
    def set_cache_entry(self, key: str, value: bytes | bytearray | memoryview) -> None:
        """Keep bytes under a key, in place of what was there. They never expire."""

    @abstractmethod
    def get_cache_entry(self, key: str) -> bytes | None:
        """The bytes of a key, or None."""

    @abstractmethod
    def get_cache_entries(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The bytes of any number of keys at one moment, without those that are missing."""

    @abstractmethod
    def delete_cache_entry(self, key: str) -> None:
        """Delete a key; a missing one is no error."""

    @abstractmethod
    def record_execution(self, record: ExecutionRecord) -> None:
        """Append a record; one with an id replaces that of the same ref and id, in its place."""

    @abstractmethod
    def get_execution_history(self, ref: str, limit: int = 0) -> list[ExecutionRecord]:
        """The newest `limit` records of a ref by started_at, oldest of them first; all where
        limit <= 0. Equal instants keep the order of insertion. An unknown ref has none. The
        cost is that of the records returned, however long the history is."""

    @abstractmethod
    def get_execution_histories(
        self, refs: Iterable[str], limit: int = 0
    ) -> dict[str, list[ExecutionRecord]]:
        """The same at one moment for each of these refs that has records, in their order."""

    @abstractmethod
    def get_all_execution_history(
        self, limit_per_ref: int = 0
    ) -> dict[str, list[ExecutionRecord]]:
        """The same for every ref, in the order of the refs."""

    @abstractmethod
    def list_execution_refs(self) -> list[str]:
        """The refs that have records, in order."""

    @abstractmethod
    def delete_execution_history(self, ref: str) -> None:
        """Delete all records of a ref; an unknown one is no error."""

    @abstractmethod
    def save_background_run(self, run: BackgroundRun) -> None:
        """Keep a run, in place of an earlier one with its id."""

    @abstractmethod
    def get_background_run(self, id: str) -> BackgroundRun:
        """The run with this id, or NotFoundError."""

    @abstractmethod
    def get_background_runs(self, ids: Iterable[str]) -> dict[str, BackgroundRun]:
        """The runs of any number of ids at one moment, without those that are missing."""

    @abstractmethod
    def list_background_runs(self) -> list[BackgroundRun]:
        """All runs, in the order of their ids."""

    @abstractmethod
    def delete_background_run(self, id: str) -> None:
        """Delete a run; a missing one is no error."""

    @abstractmethod
    def create_process_bucket(self, bucket: str) -> None:
        """Make an empty scope; one that is there stays as it is."""

    @abstractmethod
    def delete_process_bucket(self, bucket: str) -> None:
        """Delete a scope with its variables; a missing one is no error."""

    @abstractmethod
    def set_process_var(self, bucket: str, key: str, value: str) -> None:
        """Set a variable of a scope; "" is a value."""

    @abstractmethod
    def get_process_var(self, bucket: str, key: str) -> str:
        """A variable's value in the scope, else in root, else NotFoundError."""

    @abstractmethod
    def get_all_process_vars(self, bucket: str) -> dict[str, str]:
        """The variables of the scope and of root, in order of their keys; the scope wins."""

    @abstractmethod
    def get_process_var_keys(self, bucket: str) -> list[str]:
        """The scope's keys in order, then in order those that only root has."""

    @abstractmethod
    def delete_process_var(self, bucket: str, key: str) -> None:
        """Delete a variable of this scope alone; a missing one is no error."""

    @abstractmethod
    def transaction(self) -> AbstractContextManager[DataStore]:
        """A context manager that yields a store whose operations take effect together at its
        end or, on any exception, not at all. RuntimeError for one inside another, and for
        its use after its end, from another thread or in a forked child."""

    def close(self) -> None:  # noqa: B027 - no store has to do anything
        """Nothing is held that it would close; the store stays usable."""


# ---- schema and SQL ----

_APPLICATION_ID = 0x464C5753  # "FLWS"
_VERSION = 2
_PAGE = 100  # rows of a whole table in memory at once: values may be large
_BATCH = 500  # names in one statement, rows in one step: SQLite before 3.32 takes 999

# Each table and index as SQLite has it; PostgreSQL's types stand in for these words there.
# history.seq is the order of insertion, owner what _owner_note() says of a running record's
# process, scope the bucket that execution() made for it.
_TABLES = {
    "cache": """
        CREATE TABLE cache (key TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL)""",
    "history": """
        CREATE TABLE history (
            seq INTEGER PRIMARY KEY, ref TEXT NOT NULL, started_at TEXT NOT NULL,
            duration INTEGER NOT NULL, exit_code INTEGER NOT NULL, error TEXT NOT NULL,
            log_archive_id TEXT NOT NULL, id TEXT NOT NULL, completed_at TEXT,
            status TEXT NOT NULL, pid INTEGER NOT NULL, command TEXT NOT NULL,
            spec TEXT NOT NULL, label TEXT NOT NULL, source TEXT NOT NULL,
            client_name TEXT NOT NULL, session_id TEXT NOT NULL, working_dir TEXT NOT NULL,
            owner TEXT NOT NULL, scope TEXT NOT NULL)""",
    "background": """
        CREATE TABLE background (
            id TEXT PRIMARY KEY NOT NULL, pid INTEGER NOT NULL, ref TEXT NOT NULL,
            started_at TEXT NOT NULL, status TEXT NOT NULL, log_archive_id TEXT NOT NULL,
            error TEXT NOT NULL, completed_at TEXT, owner TEXT NOT NULL)""",
    "process_vars": """
        CREATE TABLE process_vars (
            bucket TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
            PRIMARY KEY (bucket, key))""",
    "process_buckets": """
        CREATE TABLE process_buckets (bucket TEXT PRIMARY KEY NOT NULL)""",
}
_INDEXES = (
    "CREATE UNIQUE INDEX history_by_id ON history (ref, id) WHERE id <> ''",
    "CREATE INDEX history_by_ref ON history (ref, started_at)",
    "CREATE INDEX history_by_time ON history (started_at)",
    "CREATE INDEX history_running ON history (pid) WHERE status = 'running'",
)

_SET_CACHE = """
    INSERT INTO cache (key, value) VALUES (:key, :value)
    ON CONFLICT (key) DO UPDATE SET value = excluded.value"""
_ADD_CACHE = """
    INSERT INTO cache (key, value) VALUES (:key, :value) ON CONFLICT (key) DO NOTHING"""
_GET_CACHE = "SELECT value FROM cache WHERE key = :key"
_GET_CACHES = "SELECT key, value FROM cache WHERE key IN (:names)"
_DELETE_CACHE = "DELETE FROM cache WHERE key = :key"
_CACHE_KEYS = "SELECT key FROM cache WHERE key >= :prefix ORDER BY key"
_CACHE_KEYS_BETWEEN = """
    SELECT key FROM cache WHERE key >= :prefix AND key < :beyond ORDER BY key"""

_FIELDS = ", ".join(ExecutionRecord._fields)
_NEW_FIELDS = ", ".join(
    f"{field} = excluded.{field}" for field in ExecutionRecord._fields
)
_INSERT_RECORD = f"""
    INSERT INTO history ({_FIELDS}, owner, scope)
    VALUES (:{_FIELDS.replace(", ", ", :")}, :owner, '')
    ON CONFLICT (ref, id) WHERE id <> ''"""
_RECORD = f"{_INSERT_RECORD} DO UPDATE SET {_NEW_FIELDS}, owner = excluded.owner"
# So that importing twice is importing once for records without an id, too: two are the same
# where all that they say agrees, and the n-th such one is added where fewer than n are there.
# {0} stands for what the other is: the columns of a row, or a statement's parameters.
_SAME = " AND ".join(
    f"COALESCE(twin.{field}, '') = COALESCE({{0}}{field}, '')"
    if field == "completed_at"
    else f"twin.{field} = {{0}}{field}"
    for field in ExecutionRecord._fields
)
_ADD_RECORD = f"""
    INSERT INTO history ({_FIELDS}, owner, scope)
    SELECT :{_FIELDS.replace(", ", ", :")}, :owner, :scope
    WHERE :id <> '' OR :occurrence > (
        SELECT count(*) FROM history AS twin WHERE {_SAME.format(":")})
    ON CONFLICT (ref, id) WHERE id <> '' DO NOTHING"""
_SET_SCOPE = "UPDATE history SET scope = :scope WHERE ref = :ref AND id = :id"
_HISTORY = f"""
    SELECT {_FIELDS} FROM history WHERE ref = :ref
    ORDER BY started_at DESC, seq DESC LIMIT :limit"""
_WHOLE_HISTORY = f"SELECT {_FIELDS} FROM history ORDER BY ref, started_at, seq"
_WHOLE_HISTORIES = f"""
    SELECT {_FIELDS} FROM history WHERE ref IN (:names) ORDER BY ref, started_at, seq"""
# From ref to ref through the index instead of from record to record.
_EACH_REF = """
    RECURSIVE each_ref (ref) AS (
        SELECT (SELECT ref FROM history ORDER BY ref LIMIT 1)
        UNION ALL
        SELECT (SELECT ref FROM history WHERE ref > each_ref.ref ORDER BY ref LIMIT 1)
        FROM each_ref WHERE each_ref.ref IS NOT NULL)"""
_REFS = f"WITH {_EACH_REF} SELECT ref FROM each_ref WHERE ref IS NOT NULL ORDER BY ref"
# From the start of the oldest record that is wanted of each ref; equal instants there give
# more than were asked for.
_NEWEST_OF_EACH = f"""
    since (ref, start) AS (
        SELECT ref, COALESCE((
            SELECT started_at FROM history WHERE history.ref = each_ref.ref
            ORDER BY started_at DESC LIMIT 1 OFFSET :skip), '')
        FROM each_ref WHERE ref IS NOT NULL)
    SELECT history.{_FIELDS.replace(", ", ", history.")} FROM since CROSS JOIN history
    WHERE history.ref = since.ref AND history.started_at >= since.start
    ORDER BY history.ref, history.started_at, history.seq"""
_NEWEST_OF_ALL = f"WITH {_EACH_REF}, {_NEWEST_OF_EACH}"
_NEWEST_OF_THESE = f"WITH each_ref (ref) AS (VALUES (:names)), {_NEWEST_OF_EACH}"
_RECENT_ENDING = """
    started_at >= :since AND (CAST(:status AS TEXT) IS NULL OR :status = CASE
        WHEN status <> '' THEN status WHEN exit_code = 0 THEN 'completed' ELSE 'failed' END)
    ORDER BY started_at DESC, seq DESC LIMIT :limit"""
_RECENT = f"SELECT {_FIELDS} FROM history WHERE {_RECENT_ENDING}"
_RECENT_OF_REF = f"SELECT {_FIELDS} FROM history WHERE ref = :ref AND {_RECENT_ENDING}"
# Of all refs: the second column of an index is read through, without the records.
_RECORD_BY_ID = f"""
    SELECT {_FIELDS} FROM history
    WHERE seq IN (SELECT seq FROM history WHERE id = :id AND id <> '')
    ORDER BY started_at DESC, seq DESC LIMIT 1"""
_DELETE_HISTORY = "DELETE FROM history WHERE ref = :ref"

_RUN_FIELDS = ", ".join(BackgroundRun._fields)
_INSERT_RUN = f"""
    INSERT INTO background ({_RUN_FIELDS}, owner)
    VALUES (:{_RUN_FIELDS.replace(", ", ", :")}, :owner) ON CONFLICT (id)"""
_SAVE_RUN = f"""{_INSERT_RUN}
    DO UPDATE SET {", ".join(f"{field} = excluded.{field}" for field in BackgroundRun._fields)},
        owner = excluded.owner"""
_ADD_RUN = f"{_INSERT_RUN} DO NOTHING"
_GET_RUN = f"SELECT {_RUN_FIELDS} FROM background WHERE id = :id"
_GET_RUNS = f"SELECT {_RUN_FIELDS} FROM background WHERE id IN (:names)"
_ALL_RUNS = f"SELECT {_RUN_FIELDS} FROM background ORDER BY id"
_DELETE_RUN = "DELETE FROM background WHERE id = :id"

_ADD_BUCKET = """
    INSERT INTO process_buckets (bucket) VALUES (:bucket) ON CONFLICT (bucket) DO NOTHING"""
_BUCKETS = """
    SELECT bucket FROM process_buckets UNION SELECT bucket FROM process_vars ORDER BY bucket"""
_DELETE_BUCKET = "DELETE FROM process_buckets WHERE bucket = :bucket"
_INSERT_VAR = """
    INSERT INTO process_vars (bucket, key, value) VALUES (:bucket, :key, :value)
    ON CONFLICT (bucket, key)"""
_SET_VAR = f"{_INSERT_VAR} DO UPDATE SET value = excluded.value"
_ADD_VAR = f"{_INSERT_VAR} DO NOTHING"
_GET_VAR = """
    SELECT value FROM (
        SELECT COALESCE(
            (SELECT value FROM process_vars WHERE bucket = :bucket AND key = :key),
            (SELECT value FROM process_vars WHERE bucket = 'root' AND key = :key)) AS value
    ) AS found WHERE value IS NOT NULL"""
_VARS = """
    SELECT 0 AS inherited, key, value FROM process_vars WHERE bucket = :bucket
    UNION ALL
    SELECT 1 AS inherited, key, value FROM process_vars
    WHERE bucket = 'root' AND key NOT IN (
        SELECT key FROM process_vars WHERE bucket = :bucket)
    ORDER BY inherited, key"""
_DELETE_VAR = "DELETE FROM process_vars WHERE bucket = :bucket AND key = :key"
_DELETE_VARS = "DELETE FROM process_vars WHERE bucket = :bucket"

# The seq of an execution, the id of a background run; the other is a value that none has.
_RUNNING = """
    SELECT seq, '' AS id, pid, owner, scope FROM history WHERE status = 'running'
    UNION ALL
    SELECT 0 AS seq, id, pid, owner, '' AS scope FROM background WHERE status = 'running'"""
_FAIL = """
    UPDATE history SET status = 'failed', completed_at = :now, scope = '',
        exit_code = CASE WHEN exit_code = 0 THEN 1 ELSE exit_code END,
        error = CASE WHEN error = '' THEN :error ELSE error END
    WHERE seq = :seq AND status = 'running' AND pid = :pid AND owner = :owner"""
_FAIL_IN_BACKGROUND = """
    UPDATE background SET status = 'failed', completed_at = :now,
        error = CASE WHEN error = '' THEN :error ELSE error END
    WHERE id = :id AND status = 'running' AND pid = :pid AND owner = :owner"""

_ENDED = """
    SELECT seq FROM (
        SELECT seq, started_at, ROW_NUMBER() OVER (
            PARTITION BY ref ORDER BY started_at DESC, seq DESC) AS age
        FROM history WHERE status <> 'running') AS ended
    WHERE age > :keep OR started_at < :before"""
_ENDED_IN_BACKGROUND = """
    SELECT id FROM (
        SELECT id, started_at, ROW_NUMBER() OVER (
            PARTITION BY ref ORDER BY started_at DESC, id DESC) AS age
        FROM background WHERE status <> 'running') AS ended
    WHERE age > :keep OR started_at < :before"""
_PRUNE = "DELETE FROM history WHERE seq IN (:names) AND status <> 'running'"
_PRUNE_BACKGROUND = "DELETE FROM background WHERE id IN (:names) AND status <> 'running'"
_IDS = """
    SELECT id FROM history WHERE id >= :id AND id < :beyond
    UNION SELECT id FROM background WHERE id >= :id AND id < :beyond"""

# Whole tables in pages: of what kind, what reads a page behind the last row of the one
# before, what adds a row of it elsewhere, and its columns.
_OCCURRENCE = f"""
    CASE WHEN id = '' THEN (
        SELECT count(*) FROM history AS twin
        WHERE twin.seq <= history.seq AND {_SAME.format("history.")}) ELSE 1 END"""
_COPIED = (
    (
        "cache",
        "SELECT key, value FROM cache WHERE key > :key ORDER BY key LIMIT :limit",
        _ADD_CACHE,
        ("key", "value"),
    ),
    (
        "history",
        f"""SELECT seq, owner, scope, {_OCCURRENCE}, {_FIELDS} FROM history
            WHERE seq > :seq ORDER BY seq LIMIT :limit""",
        _ADD_RECORD,
        ("seq", "owner", "scope", "occurrence", *ExecutionRecord._fields),
    ),
    (
        "background",
        f"""SELECT owner, {_RUN_FIELDS} FROM background
            WHERE id > :id ORDER BY id LIMIT :limit""",
        _ADD_RUN,
        ("owner", *BackgroundRun._fields),
    ),
    (
        "process_buckets",
        """SELECT bucket FROM process_buckets
            WHERE bucket > :bucket ORDER BY bucket LIMIT :limit""",
        _ADD_BUCKET,
        ("bucket",),
    ),
    (
        "process_vars",
        """SELECT bucket, key, value FROM process_vars
            WHERE bucket > :bucket OR (bucket = :bucket AND key > :key)
            ORDER BY bucket, key LIMIT :limit""",
        _ADD_VAR,
        ("bucket", "key", "value"),
    ),
)

# Of SQLite files alone: tables that are plain ones, and those of the flat layout.
_PLAIN_TABLES = """
    SELECT name FROM sqlite_master AS found
    WHERE type = 'table' AND sql LIKE 'CREATE TABLE %' AND name NOT LIKE 'sqlite!_%' ESCAPE '!'"""
_LEGACY_TABLES = f"""
    {_PLAIN_TABLES} AND name <> '' AND lower(name) NOT IN ({", ".join(map(repr, _TABLES))})
        AND (SELECT count(*) = 2 AND sum(hidden = 0 AND name IN ('key', 'value')) = 2
            FROM pragma_table_xinfo(found.name))
    ORDER BY name"""


def _listed(names: Sequence[object], separator: str = ", ") -> tuple[str, Values]:
    """What stands for `:names` in a statement, and the values of its parameters."""
    values = {f"n{number}": name for number, name in enumerate(names)}
    return separator.join(f":{parameter}" for parameter in values), values


# ---- runs ----

_GONE = "process exited unexpectedly"


class Execution:
    """What execution() yields: a run that is being recorded.

    `id`, `ref`, `bucket` (the run's scope) and `env` (a whole environment for a child, which
    finds the same store and scope by it) are to be read. The body may set `exit_code` (an
    int; 128 + n or -n for signal n), `error` and `log_archive_id` (each a str): TypeError or
    ValueError for another value, AttributeError for another name.
    """

    id: str
    ref: str
    bucket: str
    env: dict[str, str]
    exit_code: int = 0
    error: str = ""
    log_archive_id: str = ""

    def __init__(
        self,
        store: SQLiteDataStore | PostgresDataStore,
        record: ExecutionRecord,
        bucket: str | None,
    ) -> None:
        self._store = store
        self._record = record  # as it was saved last
        self._scope = record.id if bucket is None else ""  # a bucket that goes at the end
        self._background = False  # whether it is recorded as a background run too
        self._began = time.monotonic()
        scope = bucket or record.id
        environment = {**os.environ, BUCKET_ENV: scope, _PATH_ENV: store._address()}
        vars(self).update(id=record.id, ref=record.ref, bucket=scope, env=environment)
        self.log_archive_id = record.log_archive_id

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("exit_code", "error", "log_archive_id"):
            value = _CELLS.get(name, _text)(name, value)
        elif not name.startswith("_"):
            raise AttributeError(f"a run has no {name!r} that can be set")
        vars(self)[name] = value

    @contextmanager
    def _recorded(self) -> Iterator[Execution]:
        recording = True  # whether it is this that raises, or the body
        try:
            self._start()
            recording = False
            yield self
            recording = True
            self._finish()
        except BaseException as error:
            if recording and isinstance(error, (StoreError, RuntimeError)):
                raise
            self._fail(error)  # also what interrupts the recording
            try:
                self._finish()
            except Exception as failure:  # such as its own thread's open transaction()
                error.add_note(f"The end of this run was not recorded: {failure}")
            raise

    def _start(self) -> None:
        """Record that it runs, and make its scope."""
        scope = [_ADD_BUCKET] if self._scope else []
        try:
            self._save(self._store, *scope)
        finally:
            self._began = time.monotonic()  # to wait for the lock is no part of it

    def _fail(self, error: BaseException) -> None:
        """Note what an exception says of the outcome."""
        exit_code, reason = _outcome(error)
        if isinstance(error, SystemExit) or not self.exit_code:
            self.exit_code = exit_code
        self.error = self.error or _noted(reason)

    def _finish(self) -> None:
        """Record the end, and delete the scope. In a forked child it is the parent's run."""
        if os.getpid() != self._record.pid:
            return
        if self.exit_code < 0:  # as subprocess has it for a signal
            self.error = self.error or f"killed by {_signal_name(-self.exit_code)}"
            self.exit_code = min(128 - self.exit_code, _MAX_INTEGER)
        failed = self.exit_code or self.error
        self._record = self._record._replace(
            exit_code=self.exit_code,
            error=self.error,
            log_archive_id=self.log_archive_id,
            status=RunStatus.FAILED if failed else RunStatus.COMPLETED,
            completed_at=_now(),
            duration=timedelta(seconds=time.monotonic() - self._began),
        )
        self._save(self._store._patient(), _DELETE_VARS, _DELETE_BUCKET)

    def _save(self, store: _SQLStore, *scope: str) -> None:
        """Record what is known, and execute what is to be done with the scope. One that stays
        is "" here, a name that no bucket has. (_RECORD is every record's, so it leaves the
        scope alone, which _SET_SCOPE notes.)"""
        running = self._record.status == RunStatus.RUNNING
        background = [_SAVE_RUN] if self._background else []
        store._run(
            _RECORD,
            _SET_SCOPE,
            *background,
            *scope,
            **_values(self._record),
            owner=_owner_note(self._record.pid) if running else "",
            scope=self._scope if running else "",
            bucket=self._scope,
        )


def _outcome(error: BaseException) -> tuple[int, str]:
    """The exit code and the words that an exception stands for."""
    if isinstance(error, SystemExit):
        code = error.code
        if code is None:
            return 0, ""
        if not isinstance(code, int):
            return 1, _described(code)
        # as the system takes it; what is no C long is -1 to Python's own exit
        return (code % 256 if -_MAX_INTEGER - 1 <= code <= _MAX_INTEGER else 255), ""
    reason = f"{type(error).__name__}: {_described(error)}".removesuffix(": ")
    if isinstance(error, KeyboardInterrupt):
        return 130, reason
    subprocess = sys.modules.get("subprocess")
    if subprocess and isinstance(error, subprocess.CalledProcessError):
        code = error.returncode  # which may be anything
        if type(code) is int and code and -_MAX_INTEGER <= code <= _MAX_INTEGER:
            return code, reason
    return 1, reason


def _described(value: object) -> str:
    """An object's own words, even of one that can't say them."""
    try:
        return str(value)
    except BaseException:  # it is not what the caller is to see
        return f"<{type(value).__name__}>"


def _signal_name(number: int) -> str:
    import signal  # only here: its enumerations are slow to make

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _first_line(path: str) -> str:
    """The first line of one of the system's files, "" where it doesn't tell."""
    with _overlooked(), open(path, encoding="utf-8", errors="replace") as stream:
        return stream.readline().strip()
    return ""


def _link(path: str) -> str:
    with _overlooked():
        return os.readlink(path)
    return ""


def _start_of(pid: int) -> str:
    """When a process began, in ticks since the boot; "" where it has ended, or a zombie is
    left of it; "-" where the system doesn't tell.

    /proc may be that of another pid namespace: then only /proc/self is oneself.
    """
    process = str(pid)
    if pid == os.getpid():
        process = "self"
    elif _link("/proc/self") != str(os.getpid()):
        process = "unknown"
    line = _first_line(f"/proc/{process}/stat")
    fields = line.rpartition(")")[2].split()  # the name before it may hold anything
    if len(fields) < 20:  # proc(5): state is field 3, starttime field 22
        return "-" if _exists(pid) else ""
    return "" if fields[0] in "ZX" else fields[19]


def _exists(pid: int) -> bool:
    """Whether there is a process of this number; True where asking would end it."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _owner_note(pid: int) -> str:
    """Whose a running process is: machine, boot, pid namespace and start, "-" for what the
    system doesn't tell. "" for a process that isn't one of this machine."""
    start = _start_of(pid) if pid > 0 else ""
    if not start:
        return ""
    host = (
        os.uname().nodename
        if hasattr(os, "uname")
        else os.environ.get("COMPUTERNAME", "")
    )
    machine = f"{_first_line('/etc/machine-id')}@{host}"
    boot = _first_line("/proc/sys/kernel/random/boot_id") or "-"
    namespace = _link("/proc/self/ns/pid") or "-"
    return f"{machine.replace(' ', '_')} {boot} {namespace} {start}"


def _is_gone(pid: int, owner: str, unnoted: bool) -> bool:
    """Whether the process of a running record is known to have ended. What the system
    didn't tell, then or now, decides nothing.

    unnoted: whether a record without a note is judged by its number alone.
    """
    if pid <= 0:
        return False
    if not owner:
        return unnoted and not _start_of(pid)
    machine, boot, namespace, start = f"{owner} - - -".split(" ")[:4]
    here = _owner_note(os.getpid()).split(" ")
    if machine != here[0]:
        return False
    if boot != here[1] and "-" not in (boot, here[1]):
        return True
    if namespace != here[2]:
        return False
    now = _start_of(pid)
    return not now or (now != start and "-" not in (now, start))


# ---- the operations ----


class _SQLStore(DataStore):
    """All operations, once for every engine: each is its statements in a transaction."""

    path: str  # the file, or the server's URL without its password
    _timeout: float  # seconds that an operation waits for others
    _name_limit: int  # bytes that a name may have
    _judges_unnoted: bool  # whether reconcile() judges a record without an owner's note

    @abstractmethod
    def _connection(self, held: bool = False) -> Connection:
        """A new connection of the store, which is opened when it is used."""

    @abstractmethod
    def _whole(self, operation: str) -> SQLiteDataStore | PostgresDataStore:
        """The store, for an operation that has transactions of its own; RuntimeError in a
        transaction()."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def _error(self, reason: str, kind: type[StoreError] = StoreError) -> StoreError:
        return _error(kind, self.path, reason)

    def _prepare(self) -> None:
        """Make the store where it is missing, or fail at once."""
        connection = self._connection()
        with connection:
            _make_sure(connection)

    def _patient(self) -> _SQLStore:
        """The same store with the timeout of a run's end."""
        store = object.__new__(type(self))  # importing copy takes a millisecond
        vars(store).update(vars(self))
        store._timeout = max(self._timeout, _END_PATIENCE)
        return store

    def _transact(
        self, write: bool, snapshot: bool = True
    ) -> AbstractContextManager[Execute]:
        """A transaction. Yields what executes a statement in it; where there is no store to
        read, what finds no rows. Without snapshot it is for one statement alone."""
        return _transacted(self._connection(), write)

    def session(self) -> AbstractContextManager[Session]:
        """Yields a store whose operations share one connection, each in a transaction of its
        own: for loops. RuntimeError for its use after its end, from another thread or in a
        forked child; StoreError where its file has been removed or replaced."""
        return _session(self._whole("session"))

    def transaction(self) -> AbstractContextManager[Session]:
        return _lone_transaction(self, write=True)

    def _run(self, *statements: str, **values: object) -> int:
        """Execute these in one transaction; how many rows they changed."""
        with self._transact(write=True) as execute:
            return sum([execute(each, values).rowcount for each in statements])

    def _fetch(self, statement: str, *kinds: type, **values: object) -> list[Any]:
        """The rows of one statement, whose cells are of these types where any are named."""
        with self._transact(write=False, snapshot=False) as execute:
            rows: list[Row] = execute(statement, values).fetchall()
        return self._checked_cells(rows, kinds) if kinds else rows

    def _fetch_each(
        self,
        statement: str,
        what: str,
        names: Iterable[str],
        separator: str = ", ",
        **more: int,
    ) -> tuple[list[str], list[Row]]:
        """These names, each once, and the rows of a statement for all of them."""
        if isinstance(names, str):
            raise TypeError(f"{what}s must be several names, not one str")
        each = list(dict.fromkeys(self._name(what, name) for name in names))
        rows: list[Row] = []
        with self._transact(write=False) as execute:
            for first in range(0, len(each), _BATCH):
                listed, values = _listed(each[first : first + _BATCH], separator)
                each_of_them = statement.replace(":names", listed)
                rows += execute(each_of_them, {**more, **values}).fetchall()
        return each, rows

    def _name(self, what: str, value: object) -> str:
        name = _text(what, value)
        if not name:
            raise ValueError(f"{what} must not be empty")
        if len(name.encode()) > self._name_limit:
            raise ValueError(f"{what} must have at most {self._name_limit} bytes")
        return name

    def _answers(self, questions: dict[str, str]) -> dict[str, object]:
        """What a report says: the answers to questions, and how many rows each table has."""
        counts = {table: f"SELECT count(*) FROM {table}" for table in _TABLES}
        asked = {**questions, **counts}
        columns = ", ".join(f"({question})" for question in asked.values())
        for answers in self._fetch(f"SELECT {columns}"):
            return {"path": self.path, **dict(zip(asked, answers))}
        raise self._error("there is no store here yet: `flowstore set` makes one")

    def _checked_cells(self, rows: list[Any], kinds: tuple[type, ...]) -> list[Any]:
        """Rows whose cells are of their columns' types: in SQLite a column may hold any."""
        for number, row in enumerate(rows):
            if tuple(map(type, row)) != kinds:
                # some drivers give bytes as a memoryview
                plain = [bytes(c) if isinstance(c, memoryview) else c for c in row]
                if tuple(map(type, plain)) != kinds:
                    raise self._damaged_row()
                rows[number] = plain
        return rows

    def _made(self, make: Callable[[Row], T], rows: Iterable[Row]) -> list[T]:
        """The records that rows hold."""
        try:
            return [make(row) for row in rows]
        except (TypeError, ValueError) as error:
            raise self._damaged_row() from error

    def _damaged_row(self) -> StoreError:
        reason = "a row of it is damaged: restore a backup, or delete what it belongs to"
        return self._error(reason, CorruptStoreError)

    # cache

    def set_cache_entry(self, key: str, value: bytes | bytearray | memoryview) -> None:
        self._run(_SET_CACHE, key=self._name("key", key), value=_bytes("value", value))

    def get_cache_entry(self, key: str) -> bytes | None:
        for (value,) in self._fetch(_GET_CACHE, bytes, key=self._name("key", key)):
            return value  # type: ignore[no-any-return]
        return None

    def get_cache_entries(self, keys: Iterable[str]) -> dict[str, bytes]:
        names, rows = self._fetch_each(_GET_CACHES, "key", keys)
        found: dict[str, bytes] = dict(self._checked_cells(rows, (str, bytes)))
        return {name: found[name] for name in names if name in found}

    def list_cache_keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with prefix, in order."""
        prefix = _text("prefix", prefix)
        beyond = _beyond(prefix)
        statement = _CACHE_KEYS_BETWEEN if beyond else _CACHE_KEYS
        rows = self._fetch(statement, str, prefix=prefix, beyond=beyond)
        return [key for (key,) in rows]

    def delete_cache_entry(self, key: str) -> None:
        self._run(_DELETE_CACHE, key=self._name("key", key))

    # history

    def record_execution(self, record: ExecutionRecord) -> None:
        self._run(_RECORD, **self._checked(ExecutionRecord, record))

    def get_execution_history(self, ref: str, limit: int = 0) -> list[ExecutionRecord]:
        rows = self._fetch(_HISTORY, ref=self._name("ref", ref), limit=_limit(limit))
        return self._made(_execution, reversed(rows))

    def get_execution_histories(
        self, refs: Iterable[str], limit: int = 0
    ) -> dict[str, list[ExecutionRecord]]:
        if _limit(limit) == _MAX_INTEGER:
            names, rows = self._fetch_each(_WHOLE_HISTORIES, "ref", refs)
        else:
            names, rows = self._fetch_each(
                _NEWEST_OF_THESE, "ref", refs, "), (", skip=_limit(limit) - 1
            )
        found = self._by_ref(rows, limit)
        return {name: found[name] for name in names if name in found}

    def get_all_execution_history(
        self, limit_per_ref: int = 0
    ) -> dict[str, list[ExecutionRecord]]:
        if _limit(limit_per_ref) == _MAX_INTEGER:
            rows = self._fetch(_WHOLE_HISTORY)
        else:
            rows = self._fetch(_NEWEST_OF_ALL, skip=_limit(limit_per_ref) - 1)
        return self._by_ref(rows, limit_per_ref)

    def get_recent_executions(
        self,
        limit: int = 20,
        *,
        ref: str | None = None,
        status: str | None = None,
        since: datetime | None = None,
    ) -> list[ExecutionRecord]:
        """The newest `limit` records (all where limit <= 0) over all refs or of one, oldest
        of them first: those of a status, where asked (a record without one counts as
        completed or failed by its exit code), and that started at `since` or later."""
        statement = _RECENT if ref is None else _RECENT_OF_REF
        rows = self._fetch(
            statement,
            ref=None if ref is None else self._name("ref", ref),
            status=None if status is None else _text("status", status),
            since="" if since is None else _instant("since", since),
            limit=_limit(limit),
        )
        return self._made(_execution, reversed(rows))

    def list_execution_refs(self) -> list[str]:
        return [ref for (ref,) in self._fetch(_REFS, str)]

    def delete_execution_history(self, ref: str) -> None:
        self._run(_DELETE_HISTORY, ref=self._name("ref", ref))

    # background runs

    def save_background_run(self, run: BackgroundRun) -> None:
        self._run(_SAVE_RUN, **self._checked(BackgroundRun, run))

    def get_background_run(self, id: str) -> BackgroundRun:
        rows = self._fetch(_GET_RUN, id=self._name("id", id))
        for run in self._made(_background, rows):
            return run
        raise self._error(f"there is no background run {id!r}", NotFoundError)

    def get_background_runs(self, ids: Iterable[str]) -> dict[str, BackgroundRun]:
        names, rows = self._fetch_each(_GET_RUNS, "id", ids)
        found = {run.id: run for run in self._made(_background, rows)}
        return {name: found[name] for name in names if name in found}

    def list_background_runs(self) -> list[BackgroundRun]:
        return self._made(_background, self._fetch(_ALL_RUNS))

    def delete_background_run(self, id: str) -> None:
        self._run(_DELETE_RUN, id=self._name("id", id))

    # process variables

    def create_process_bucket(self, bucket: str) -> None:
        self._run(_ADD_BUCKET, bucket=self._name("bucket", bucket))

    def delete_process_bucket(self, bucket: str) -> None:
        self._run(_DELETE_VARS, _DELETE_BUCKET, bucket=self._name("bucket", bucket))

    def list_process_buckets(self) -> list[str]:
        """The scopes that were made and not deleted, and those that have variables, in order."""
        return [bucket for (bucket,) in self._fetch(_BUCKETS, str)]

    def set_process_var(self, bucket: str, key: str, value: str) -> None:
        self._run(
            _SET_VAR,
            bucket=self._name("bucket", bucket),
            key=self._name("key", key),
            value=_text("value", value),
        )

    def get_process_var(self, bucket: str, key: str) -> str:
        bucket, key = self._name("bucket", bucket), self._name("key", key)
        for (value,) in self._fetch(_GET_VAR, str, bucket=bucket, key=key):
            return value  # type: ignore[no-any-return]
        others = "" if bucket == ROOT_BUCKET else f" or in {ROOT_BUCKET!r}"
        raise self._error(
            f"there is no variable {key!r} in the scope {bucket!r}{others}", NotFoundError
        )

    def get_all_process_vars(self, bucket: str) -> dict[str, str]:
        rows = self._fetch(_VARS, int, str, str, bucket=self._name("bucket", bucket))
        return dict(sorted((key, value) for _, key, value in rows))

    def get_process_var_keys(self, bucket: str) -> list[str]:
        rows = self._fetch(_VARS, int, str, str, bucket=self._name("bucket", bucket))
        return [key for _, key, _ in rows]

    def delete_process_var(self, bucket: str, key: str) -> None:
        bucket, key = self._name("bucket", bucket), self._name("key", key)
        self._run(_DELETE_VAR, bucket=bucket, key=key)

    # records on their way in, histories on their way out

    def _checked(self, kind: type[Record], record: Record) -> Values:
        """A record's row, with the note of whose it is where it runs."""
        _require("record", record, kind)
        values = _values(record)
        if kind is ExecutionRecord:
            self._name("ref", values["ref"])
            if values["id"]:
                self._name("id", values["id"])
        else:
            self._name("id", values["id"])
        running = values["status"] == RunStatus.RUNNING
        values["owner"] = _owner_note(values["pid"]) if running else ""
        return values

    def _by_ref(
        self, rows: Iterable[Row], limit: int
    ) -> dict[str, list[ExecutionRecord]]:
        """Records in the order of ref and start, by ref: the newest `limit` of each."""
        histories: dict[str, list[ExecutionRecord]] = {}
        for record in self._made(_execution, rows):
            histories.setdefault(record.ref, []).append(record)
        if limit > 0:
            for ref, records in histories.items():
                histories[ref] = records[-limit:]
        return histories

    # runs

    def execution(
        self,
        ref: str,
        *,
        id: str | None = None,
        bucket: str | None = None,
        label: str = "",
        command: str = "",
        spec: str = "",
        log_archive_id: str = "",
        working_dir: str | None = None,
        source: str | None = None,
        client_name: str | None = None,
        session_id: str | None = None,
    ) -> AbstractContextManager[Execution]:
        """A context manager that records a run of ref from its start to its end; see
        Execution for what it yields.

        id: its name, else a new UUID. bucket: the scope that it lives in, which stays; else
        it has a scope of its own, named by its id, that goes at the end (with what it had
        before, if it was there). working_dir: else the current folder. source, client_name,
        session_id: else what $FLOW_RUN_SOURCE, $FLOW_RUN_CLIENT and $FLOW_RUN_SESSION say.

        The record becomes failed by an exit code other than 0, an error or an exception,
        else completed. Its end waits up to 30 seconds for the lock.
        """
        run = self._new_run(
            ref,
            id,
            bucket,
            label=label,
            command=command,
            spec=spec,
            log_archive_id=log_archive_id,
            working_dir=working_dir,
            source=source,
            client_name=client_name,
            session_id=session_id,
        )
        return run._recorded()

    def _new_run(
        self, ref: str, id: str | None, bucket: str | None, **fields: Any
    ) -> Execution:
        """A run of this process that hasn't begun; what isn't given is as execution() says."""
        variables = {
            "source": RUN_SOURCE_ENV,
            "client_name": RUN_CLIENT_ENV,
            "session_id": RUN_SESSION_ENV,
        }
        for field, variable in variables.items():
            if fields.get(field) is None:
                fields[field] = _noted(run_env_value(variable))
        if fields.get("working_dir") is None:
            fields["working_dir"] = _current_folder()
        id = _new_id() if id is None else self._scope_name("id", id)
        bucket = None if bucket is None else self._scope_name("bucket", bucket)
        if bucket is None and id == ROOT_BUCKET:
            raise ValueError(f"id must not be {ROOT_BUCKET!r}: its scope goes at the end")
        fields.update(id=id, status=RunStatus.RUNNING, pid=os.getpid())
        record = ExecutionRecord(self._name("ref", ref), _now(), **fields)
        _values(record)  # what can't be recorded is refused before anything runs
        return Execution(self._whole("execution"), record, bucket)

    def _scope_name(self, what: str, value: str) -> str:
        """A name that a child finds its scope by: environment_bucket() mustn't change it."""
        name = self._name(what, value)
        if _bucket_name(name) != name:
            raise ValueError(f"{what} must not have a colon, slash or space: {name!r}")
        return name

    def reconcile(self) -> int:
        """Mark running records and background runs whose process is gone as failed; how many
        they were. The scopes that execution() made for them go. Left alone: what belongs to
        another machine or pid namespace, and what has no pid."""
        gone: list[Values] = []
        running = self._fetch(_RUNNING, int, str, int, str, str)
        for seq, id, pid, owner, scope in running:
            if _is_gone(pid, owner, self._judges_unnoted):
                gone.append(
                    {"seq": seq, "id": id, "pid": pid, "owner": owner, "bucket": scope}
                )
        if not gone:
            return 0
        marked = 0
        with self._transact(write=True) as execute:
            for values in gone:
                values.update(now=_instant("now", _now()), error=_GONE)
                changed = execute(_FAIL, values).rowcount
                changed += execute(_FAIL_IN_BACKGROUND, values).rowcount
                if changed:  # else it has ended meanwhile
                    execute(_DELETE_VARS, values)
                    execute(_DELETE_BUCKET, values)
                marked += changed
        return marked

    def prune(
        self, keep: int | None = None, before: datetime | None = None
    ) -> PruneSummary:
        """Delete, per ref, all but the newest `keep` ended records and background runs, and
        those that started before `before`; at least one of the two is needed. Running ones
        stay. Linear in what is there, in short transactions; a file gets smaller."""
        if keep is None and before is None:
            raise ValueError("prune needs keep, before or both")
        kept = _MAX_INTEGER if keep is None else _integer("keep", keep)
        if kept < 0:
            raise ValueError("keep must be 0 or more")
        values: Values = {
            "keep": kept,
            "before": "" if before is None else _instant("before", before),
        }
        with self._whole("prune").session() as session:
            history = session._prune(_ENDED, _PRUNE, values)
            background = session._prune(_ENDED_IN_BACKGROUND, _PRUNE_BACKGROUND, values)
            with session._held:
                session._held.give_space_back()
        return PruneSummary(history, background)

    def _prune(self, query: str, delete: str, values: Values) -> int:
        ended = [key for (key,) in self._fetch(query, **values)]
        deleted = 0
        for first in range(0, len(ended), _BATCH):
            listed, keys = _listed(ended[first : first + _BATCH])
            deleted += self._run(delete.replace(":names", listed), **keys)
        return deleted


class Session(_SQLStore):
    """What session() and transaction() yield: the store's operations on one connection, for
    the thread and the process that opened it. In a transaction() they take effect together
    at its end; execution(), prune(), backup() and session() are a RuntimeError in it."""

    def __init__(
        self,
        store: SQLiteDataStore | PostgresDataStore,
        connection: Any,  # of the store's engine
        atomic: bool,
    ) -> None:
        self._store = store
        self._held: Connection = connection
        self._atomic = atomic
        self._thread = get_ident()  # 0 after its end

    def __getattr__(self, name: str) -> Any:
        """What an engine's store says of itself: its path, the limit of names."""
        return getattr(object.__getattribute__(self, "_store"), name)

    def _connection(self, held: bool = False) -> Connection:
        return self._held

    def _transact(
        self, write: bool, snapshot: bool = True
    ) -> AbstractContextManager[Execute]:
        self._check()
        in_transaction = self._held.thread
        if write and in_transaction and not self._atomic:
            raise RuntimeError(
                f"{self.path}: its transaction() is open, and this would be no part of it"
            )
        if in_transaction or not (write or snapshot):
            return self._held  # which neither begins nor ends anything in `with`
        return _transacted(self._held, write)

    def _check(self) -> None:
        """Refuse a use that its connection would not survive, or that would take effect
        alone: SQLite itself rolls a transaction back where the disk is full."""
        reason = ""
        if self._held.pid != os.getpid():
            reason = "it was opened before a fork: open one here"
        elif not self._thread:
            reason = "it has ended: open another"
        elif self._thread != get_ident():
            reason = "it is another thread's: open one here"
        if reason:
            kind = "transaction" if self._atomic else "session"
            raise RuntimeError(f"{self.path}: this {kind} can't be used: {reason}")
        if self._atomic and not self._held.in_transaction():
            raise self._error(
                "this transaction was rolled back, and nothing of it changed: begin anew"
            )

    def _whole(self, operation: str) -> SQLiteDataStore | PostgresDataStore:
        self._check()
        if self._atomic:
            raise RuntimeError(f"{self.path}: no {operation}() inside a transaction()")
        return self._store

    def transaction(self) -> AbstractContextManager[Session]:
        self._whole("transaction")
        return _transaction(self._store, self._held, write=True)

    def backup(self, target: str | os.PathLike[str]) -> None:
        """As the store's; NotImplementedError where that has none."""
        store = self._whole("backup")
        if not isinstance(store, SQLiteDataStore):
            raise NotImplementedError(f"{self.path}: only a file has a backup()")
        store.backup(target)


@contextmanager
def _transacted(connection: Connection, write: bool) -> Iterator[Execute]:
    """A transaction for one operation; without a store, what is read finds nothing."""
    with connection as execute:
        there = connection.begin(write)
        yield execute if there else _find_nothing
        if write:
            connection.commit()


def _make_sure(connection: Connection) -> None:
    """See that there is a store that can be read; one that is missing is made."""
    there = connection.begin(False)
    connection.rollback()
    if not there:
        connection.close()  # it was opened to read
        connection.begin(True)
        connection.commit()


@contextmanager
def _held(store: _SQLStore) -> Iterator[Connection]:
    """A connection for several uses, closed at the end: but not in a forked child."""
    connection = store._connection(held=True)
    try:
        yield connection
    finally:
        if connection.pid == os.getpid():
            with connection:
                connection.close()


@contextmanager
def _session(store: SQLiteDataStore | PostgresDataStore) -> Iterator[Session]:
    with _held(store) as connection:
        with connection:
            _make_sure(connection)
        session = Session(store, connection, atomic=False)
        try:
            yield session
        finally:
            session._thread = 0


@contextmanager
def _lone_transaction(store: _SQLStore, write: bool) -> Iterator[Session]:
    """A transaction on a connection of its own: to write, or to read one moment."""
    with _held(store) as connection, _transaction(store, connection, write) as session:
        yield session


@contextmanager
def _transaction(
    store: _SQLStore, connection: Connection, write: bool
) -> Iterator[Session]:
    """A transaction on a connection that is held: its operations land together at the end."""
    if connection.thread:  # its end would end the one that is open
        raise RuntimeError(f"{store.path}: no transaction() inside a transaction()")
    session = Session(store._whole("transaction"), connection, atomic=True)
    try:
        with connection:
            if not connection.begin(write):
                raise store._error("there is no store here to read")
            connection.thread = get_ident()
        yield session
        session._check()
        with connection:
            connection.commit()
    finally:
        session._thread = connection.thread = 0
        if connection.pid == os.getpid():
            with connection:
                connection.rollback()


def _limit(limit: object) -> int:
    number = _integer("limit", limit)
    return number if number > 0 else _MAX_INTEGER


def _beyond(prefix: str) -> str:
    """The first text, in the order of code points, after all that begin with prefix; ""
    where there is none."""
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return ""
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if following == 0xD800 else following)  # no surrogates


def _new_id() -> str:
    import uuid  # only here: it is slow to import

    return str(uuid.uuid4())


def _current_folder() -> str:
    with _overlooked():
        return _noted(os.getcwd())
    return ""  # it has been removed


# ---- SQLite: connections ----

_LOG_STEP = 4 << 20  # bytes; SQLite's own default is 1,000 pages
_LOG_PAUSES = (0.0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)  # seconds
_FORK_PATIENCE = 10_000  # milliseconds that a fork waits for the operations of others


class _ForkGate:
    """Lets no fork happen while a thread is inside SQLite, and knows what is open.

    A child that is forked while another thread is in SQLite finds its allocator locked for
    ever; and an open connection must not be used in a child, not even to close it
    (https://www.sqlite.org/howtocorrupt.html, 2.6): SQLite keeps its locks per process.

    A signal's handler may raise at any of these lines. What it raises in a callback would
    be lost: so there are none, in Python, where a connection or a fork ends.
    """

    def __init__(self) -> None:
        self.files = RLock()  # while a file is made or opened: _make_file()
        self.forks = RLock()  # during a fork
        self.forking = False  # whether one is near: a hint, cleared by who has the lock
        # weak: what an interrupt left open closes with the last reference to it
        self.connections: set[weakly[_Connection]] = set()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self.before,
                after_in_parent=self.forks.release,
                after_in_child=self.in_child,
            )

    def known(self) -> list[_Connection]:
        """The connections that are in use or open, the parent's too."""
        return [found for each in [*self.connections] if (found := each())]

    def enter(self, connection: _Connection) -> None:
        connection.user = get_ident()
        self.connections.add(weakly(connection))
        if self.forking:
            connection.user = 0  # it lets the fork that is coming go first
            with self.forks:
                self.forking = False
                self.enter(connection)

    def leave(self, connection: _Connection) -> None:
        connection.user = 0
        if not connection.sql:
            self.connections.discard(weakly(connection))

    def before(self) -> None:
        self.forks.acquire()
        self.forking = True
        mine = (0, get_ident())
        for _ in range(_FORK_PATIENCE):
            if all(each.user in mine for each in self.known()):
                break
            time.sleep(0.001)

    def in_child(self) -> None:
        self.files = RLock()
        inherited: list[object] = [*self.known()]
        for each in self.known():
            each.user = 0
        if inherited:
            # Never closed here: SQLite would roll back what the parent is writing, and let
            # go of its locks. So never collected either: a cycle keeps them, and freezing
            # what is there keeps the collector from it.
            inherited.append(inherited)
            gc.freeze()
        self.forks.release()


_gate = _ForkGate()


_LOCKED = "others keep it locked: try again, or take a longer timeout"
_OWN_LOCK = "this thread holds a transaction() on it, and would wait for itself"
# What SQLite's primary result codes mean to a user: the kind of error, and what to do. What
# isn't here is a StoreError with SQLite's own words.
_KINDS = {
    sqlite3.SQLITE_BUSY: (StoreBusyError, _LOCKED),
    sqlite3.SQLITE_LOCKED: (StoreBusyError, _LOCKED),
    sqlite3.SQLITE_PROTOCOL: (StoreBusyError, "many begin to use it at once: try again"),
    sqlite3.SQLITE_CORRUPT: (
        CorruptStoreError,
        "it is damaged: restore a backup, after the -wal and -shm beside it are removed",
    ),
    sqlite3.SQLITE_FULL: (StoreError, "the disk is full, nothing was changed: make room"),
    sqlite3.SQLITE_READONLY: (
        StoreError,
        "it can't be written to: check the rights of file and folder",
    ),
    sqlite3.SQLITE_PERM: (
        StoreError,
        "it may not be used so: check the rights of the file",
    ),
    sqlite3.SQLITE_TOOBIG: (StoreError, "a value is too large: keep it in a file"),
    sqlite3.SQLITE_CANTOPEN: (
        StoreError,
        "it can't be opened: check the rights of file and folder",
    ),
    sqlite3.SQLITE_IOERR: (
        StoreError,
        "it can't be read or written: is its disk full, failing or remote?",
    ),
}
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_NO_PLACE = (
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
)


def _code(error: BaseException) -> int:
    """SQLite's primary result code of an error."""
    if isinstance(error, (OverflowError, sqlite3.DataError)):
        return sqlite3.SQLITE_TOOBIG
    code: int = getattr(error, "sqlite_errorcode", 0)
    # SQLITE_IOERR_DELETE_NOENT, which not every sqlite3 has by name: of two that close the
    # file at once, the other has removed the -wal
    if code == 5898:
        return sqlite3.SQLITE_BUSY
    return code & 0xFF


def _explained(error: Exception, file: str) -> StoreError:
    """The store's error for one of SQLite or of the system."""
    code = _code(error)
    if isinstance(error, OSError):
        reason = f"{error.strerror or error}: name a path that you may read and write"
        return _error(StoreError, file, reason)
    if code in _NO_PLACE and not _descriptors_are_left():
        reason = "too many open files: close some, or raise the limit (ulimit -n)"
        return _error(StoreError, file, reason)
    if code == sqlite3.SQLITE_NOTADB:
        return _error(CorruptStoreError, file, _what_it_is(file))
    if not code:
        # the sqlite3 module's own error may quote a value, and values may be secret
        return _error(CorruptStoreError, file, "it has a text that is no UTF-8")
    kind, advice = _KINDS.get(code, (StoreError, "SQLite can't do it"))
    return _error(kind, file, f"{advice} ({error})")


def _descriptors_are_left() -> bool:
    """Whether this process may open as many files as a store takes."""
    opened = []
    try:
        with _overlooked():
            for _ in range(4):  # the file, -wal and -shm, the folder
                opened.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return len(opened) == 4


def _what_it_is(file: str) -> str:
    """What a file is of which SQLite has said that it is no database: only then may it be
    opened here, since closing it drops this process's locks on it."""
    start = b""
    with _overlooked(), open(file, "rb") as stream:
        start = stream.read(20)
    if start[16:] == b"\xed\xda\x0c\xed":  # bbolt's magic number
        return (
            "a file of the original (bbolt): bring it over with `flowstore import FILE`"
        )
    return "it is no SQLite file, so no store: name another path, or move the file away"


def _tries(store: _SQLStore, longest: float = 0.0) -> Iterator[float]:
    """Yields the seconds that are left for each try of one operation, until its timeout.
    Between two of them it sleeps, about as long as it has waited but at most `longest`, since
    others are at work.

    SQLite's own handler sleeps for up to 100 ms and starves the unluckiest of many. Here
    whoever has waited for long tries oftener; but if all of 64 did, or all of 256 that are
    patient, the one that has the lock would find no time to go on.
    """
    began = time.monotonic()
    slept = 0.0  # what counts where somebody has frozen the clock
    yield store._timeout
    while True:
        waited = max(time.monotonic() - began, slept)
        left = store._timeout - waited
        if left <= 0:
            return
        limit = 0.032 if waited < 0.5 else max(0.008, store._timeout / 400)
        jitter = 0.5 + time.perf_counter_ns() % 1000 / 1000
        pause = min(max(waited, 0.001), longest or limit) * jitter
        pause = min(pause, left)
        time.sleep(pause)
        slept += pause
        yield left - pause


class _NoRows:
    """What a statement finds where there is no store."""

    def fetchall(self) -> list[Row]:
        return []


def _find_nothing(statement: str, values: Values) -> _NoRows:
    return _NoRows()


class _Moved(Exception):
    """The file at a store's path is another than that which was opened."""


@lru_cache
def _uri(file: str) -> str:
    return "file:" + "".join(f"%{byte:02X}" for byte in os.fsencode(file))


def _connect(file: str, options: str) -> sqlite3.Connection:
    with _gate.files:  # _make_file()
        return sqlite3.connect(
            f"{_uri(file)}?{options}",
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
        )


# trusted_schema and cell_size_check are for files from elsewhere. A reader's close may be
# the last, with a checkpoint. A sort or vacuum must not need a folder for temporary files.
_READ_SETTINGS = """
    PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON; PRAGMA temp_store = MEMORY"""
# Before writes only: some of these read the file. Checkpoints are made by shorten_log(). The
# log's file is left at its size then, since writing over is quicker than making it longer.
_WRITE_SETTINGS = f"""{_READ_SETTINGS};
    PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0;
    PRAGMA journal_size_limit = {_LOG_STEP - 1}; PRAGMA secure_delete = ON"""
if sys.platform == "darwin":  # where a plain fsync() doesn't reach the disk
    _READ_SETTINGS += "; PRAGMA checkpoint_fullfsync = ON"
    _WRITE_SETTINGS += "; PRAGMA checkpoint_fullfsync = ON; PRAGMA fullfsync = ON"


class _Connection:
    """One connection to a store's file. Only here it is opened and recognised, locks are
    awaited, transactions begun and ended. `with` encloses each use of it: a fork waits for
    the end of that, and what SQLite or the system raises in it becomes a StoreError."""

    def __init__(self, store: SQLiteDataStore, held: bool = False) -> None:
        self.store = store
        self.held = held  # by a session, over several uses
        self.sql: Any = None  # the sqlite3.Connection, while it is open
        self.inode = 0  # of the file that was opened
        self.at_rest: Any = None  # look(), where it is read as unchanging
        self.pid = os.getpid()
        self.writes = 0  # that it has committed
        self.log_steps: int | None = None  # look_at_log() after one of them
        self.user = 0  # the thread that is in it
        self.thread = 0  # that holds a transaction() on it

    def __enter__(self) -> Execute:
        _gate.enter(self)
        return self.execute

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if self.at_rest and (error is None or isinstance(error, sqlite3.Error)):
                self.refuse_change()
            if not self.held:
                self.close()
            elif not self.thread:
                self.rollback()
        finally:
            _gate.leave(self)
        # the last of these for an SQLite error whose words are no UTF-8
        theirs = (sqlite3.Error, OSError, OverflowError, UnicodeDecodeError)
        if (
            isinstance(error, theirs)
            and not isinstance(error, StoreError)
            and _is_own(error)
        ):
            # an error without a code may quote a value, which doesn't go into a traceback
            quotes = isinstance(error, sqlite3.Error) and not _code(error)
            raise _explained(error, self.store.path) from (None if quotes else error)

    def execute(self, statement: str, values: Values) -> Any:
        """Execute a statement in the transaction that was begun. A session's single read has
        none: where it fails, since somebody has the file to himself or has emptied it, it
        is tried again in one. (Not what was in a transaction: where SQLite has rolled that
        back, the rest of it must not take effect alone.)"""
        alone = self.held and not (self.sql and self.sql.in_transaction)
        try:
            if self.sql:
                return self.sql.execute(statement, values)
        except sqlite3.OperationalError:
            if not alone:
                raise
        return self.sql.execute(statement, values) if self.begin(False) else _NoRows()

    def begin(self, write: bool, at_rest: bool = False) -> bool:
        """Take the write lock, or a snapshot. Whether there is a store; a write makes it.

        at_rest: to read what can't be written, see open_at_rest().
        """
        self.refuse_use(write)
        if self.thread:
            return True  # a session's read takes part in its own transaction()
        self.rollback()  # what an interrupt has left
        in_session = bool(self.sql)
        for _ in _tries(self.store):
            self.make_way()
            try:
                if not self.sql and not self.open(write, at_rest):
                    return False
                return self.begin_here(write)
            except (sqlite3.Error, _Moved) as error:
                self.rollback()
                if _code(error) in _BUSY:
                    continue
                if isinstance(error, _Moved) or self.has_moved():
                    if in_session:
                        raise self.store._error(
                            "its file has been removed or replaced: open a new session"
                        ) from None
                    self.close()
                elif _code(error) in _NO_PLACE and not write and not at_rest:
                    self.close()
                    return self.begin(write, at_rest=True)
                else:
                    raise
        raise self.store._error(_LOCKED, StoreBusyError)

    def refuse_use(self, write: bool) -> None:
        """Refuse a file that was open at a fork, and to wait for the lock of one's own."""
        if len(_gate.connections) == 1:  # this one
            return
        for each in _gate.known():
            if not each.sql or each.store._file != self.store._file:
                continue
            if each.pid != self.pid:
                raise RuntimeError(
                    f"{self.store.path}: it was open when this process was forked:"
                    " use spawn, or exec"
                )
            if write and each.thread == get_ident():
                raise RuntimeError(f"{self.store.path}: {_OWN_LOCK}")

    def make_way(self) -> None:
        """Let a fork that is near go first, and its child open the file."""
        if _gate.forking:
            if not self.held:
                self.close()
            _gate.enter(self)

    def begin_here(self, write: bool) -> bool:
        if write and self.at_rest:  # SQLite would begin a read
            kind, advice = _KINDS[sqlite3.SQLITE_READONLY]
            raise self.store._error(advice, kind)
        self.sql.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        known = self.store._known
        complete = self.identify()
        first_time = known != self.store._known  # that this object sees this file
        # Between open() and here the file may have been destroyed, and made anew. (A session
        # asks before writes only: with each read that would be a third of its time.)
        if (write or not self.held) and self.has_moved():
            raise _Moved
        if not write or (complete and not first_time):
            return complete
        if self.sql.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            self.rollback()
            if self.sql.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                raise self.store._error(
                    "SQLite can't keep a WAL here: name a store on a local disk"
                )
            return self.begin_here(write)
        if not complete:
            self.create()
        return True

    def identify(self) -> bool:
        """Whether the file is a whole store, not a blank one. Another's is refused."""
        [cookie] = self.sql.execute("PRAGMA schema_version").fetchone()
        if self.store._known == (self.inode, cookie):
            return True
        [application] = self.sql.execute("PRAGMA application_id").fetchone()
        [version] = self.sql.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION_ID:
            if application or version or cookie:
                raise self.store._error(
                    f"another program's SQLite file (application id {application:#x}):"
                    " name another path",
                    CorruptStoreError,
                )
            if 0 < os.stat(self.store._file).st_size < 512:  # to SQLite that is empty
                raise self.store._error(_what_it_is(self.store._file), CorruptStoreError)
            return False
        if version == 0:  # destroy_store() has emptied it
            return False
        if version > _VERSION:
            raise self.store._error(f"it has schema {version}: update flowstore")
        if version < _VERSION:
            raise self.store._error(
                f"it has schema {version}, of an unreleased version: move it away"
            )
        self.verify()
        self.store._known = (self.inode, cookie)
        return True

    def verify(self) -> None:
        """Refuse what would run by itself, as a trigger does or a view in a table's place,
        and a store without one of its tables. What else somebody has added is left alone."""
        missing = set(_TABLES)
        objects = self.sql.execute("SELECT type, name, tbl_name, sql FROM sqlite_master")
        for kind, name, table, text in objects.fetchall():
            if table.lower() not in _TABLES:
                continue
            plain = kind == "index" or (
                kind == "table" and text.startswith("CREATE TABLE")
            )
            if not plain:
                raise self.store._error(
                    f"its {kind} {name!r} is not the store's: drop it"
                )
            missing.discard(name)
        if missing:
            raise self.store._error(
                f"its table {min(missing)} is missing: restore a backup",
                CorruptStoreError,
            )

    def create(self) -> None:
        """Make the tables, in the transaction that found none."""
        for definition in (*_TABLES.values(), *_INDEXES):
            self.sql.execute(definition)
        self.sql.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self.sql.execute(f"PRAGMA user_version = {_VERSION}")

    def open(self, make: bool, at_rest: bool) -> bool:
        """Open the file; False where it is missing, and not to be made."""
        file = self.store._file
        try:
            status = os.stat(file)
        except (FileNotFoundError, NotADirectoryError):
            if not make:
                return False
            status = _make_file(file)
        self.refuse_unsafe(status)
        settings = _WRITE_SETTINGS if make or self.held else _READ_SETTINGS
        if make and status.st_size == 0:
            if stat.S_IMODE(status.st_mode) != 0o600:
                os.chmod(file, 0o600)  # whatever the umask, or who has made it
            # before anything else: BEGIN or WAL settles auto_vacuum, by which prune() can
            # make the file smaller
            settings += "; PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL"
        # asking needs no descriptor, whose closing would drop this process's locks
        writable = os.access(file, os.W_OK, effective_ids=os.name == "posix")
        if at_rest or not writable:  # else -wal and -shm would be left
            self.open_at_rest()
            return True
        self.inode = status.st_ino
        self.connect("mode=rw", settings)
        return True

    def open_at_rest(self) -> None:
        """Open a file in a place that can't be written, where SQLite can make no -shm to
        read by. With one beside it (somebody writes, or was killed) it is read by that;
        else as a file that doesn't change, and __exit__() looks whether that was so
        (https://www.sqlite.org/wal.html, "Read-Only Databases")."""
        state = self.look()
        file, log, index = state
        if not file:
            raise _Moved
        self.inode = file[0]
        if index and index[-1] >= 32768:  # one that found no room is smaller
            self.connect("mode=ro", _READ_SETTINGS)
            return
        if log and log[-1]:
            raise self.store._error(
                "a -wal lies beside it that can't be read here:"
                " open it once where it can be written",
                StoreBusyError,
            )
        self.at_rest = state
        self.connect("mode=ro&immutable=1", _READ_SETTINGS)

    def refuse_change(self) -> None:
        """Refuse what was read of a file at rest where it was not."""
        if self.at_rest and self.look() != self.at_rest:
            self.close()
            raise self.store._error(
                "somebody begins or ends writing to it: try again", StoreBusyError
            )

    def connect(self, options: str, settings: str) -> None:
        self.sql = _connect(self.store._file, options)
        try:
            self.sql.executescript(settings)
        except BaseException:
            self.close()
            raise

    def refuse_unsafe(self, status: os.stat_result) -> None:
        """Refuse what is no file, what has a second name (each would have a log of its own),
        and what somebody else may have put where anyone can."""
        reason = ""
        if not stat.S_ISREG(status.st_mode):
            reason = "it is no regular file: name another path"
        elif status.st_nlink > 1:
            reason = "it has another name (a hard link), which would corrupt it: copy it instead"
        elif os.name == "posix" and status.st_uid != os.geteuid():
            folder = os.stat(os.path.dirname(self.store._file))
            if folder.st_mode & stat.S_IWOTH:
                reason = "another user's, where anyone may write: name a path of your own"
        if reason:
            raise self.store._error(reason)

    def look(self) -> list[tuple[int, ...]]:
        """Inode, time and size of the file, its -wal and -shm, () of what isn't there."""
        found: list[tuple[int, ...]] = []
        for ending in ("", "-wal", "-shm"):
            found.append(())
            with _overlooked():
                status = os.stat(self.store._file + ending)
                found[-1] = (status.st_ino, status.st_mtime_ns, status.st_size)
        return found

    def has_moved(self) -> bool:
        """Whether the file that was opened is no longer at the path."""
        try:
            return os.stat(self.store._file).st_ino != self.inode
        except FileNotFoundError:
            return True

    def in_transaction(self) -> bool:
        return bool(self.sql and self.sql.in_transaction)

    def rollback(self) -> None:
        if self.sql and self.sql.in_transaction:
            self.sql.execute("ROLLBACK")

    def commit(self) -> None:
        """Make a write last, and keep the log short: each time that it has grown by a step,
        since that holds others up."""
        before = self.look_at_log() if self.log_steps is None else self.log_steps
        self.sql.execute("COMMIT")
        self.writes += 1
        if self.held and not self.thread and self.writes % 4:
            return  # now and then is enough: a look takes a tenth of a session's write
        self.log_steps = self.look_at_log()
        if self.log_steps > before:
            try:
                self.sql.execute("BEGIN IMMEDIATE")
                self.shorten_log()
            except sqlite3.Error:
                pass  # what was to be written is; the log is the care of a later writer

    def look_at_log(self) -> int:
        """How large the log is, in steps of _LOG_STEP."""
        try:
            return os.stat(f"{self.store._file}-wal").st_size // _LOG_STEP
        except FileNotFoundError:
            return 0

    def shorten_log(self) -> None:
        """End a write transaction with a checkpoint, after which the next writer begins the
        log anew if nobody reads in it.

        Until SQLite 3.51.2 a commit that does so between two checkpoints can lose pages
        (https://www.sqlite.org/wal.html, "The WAL-Reset Bug"). Nobody can while this
        connection has the write lock; the checkpoint, on another, waits for no reader.
        Readers that overlap would always need some of the log: so it holds the writers up
        until those of before are through, and what begins then needs none of it.
        """
        other = _connect(self.store._file, "mode=rw")
        try:
            other.executescript(_WRITE_SETTINGS)
            for pause in _LOG_PAUSES:
                time.sleep(pause)
                checkpoint = other.execute("PRAGMA wal_checkpoint(PASSIVE)")
                _, pages, copied = checkpoint.fetchone()
                if pages == copied:
                    # for those that began meanwhile, which take about as long
                    time.sleep(max(4 * pause, 0.004))
                    break
        finally:
            other.close()
            self.rollback()

    def give_space_back(self) -> None:
        """Cut the free pages off the file, in short steps."""
        free = None
        while True:
            self.begin(True)
            before, free = free, self.sql.execute("PRAGMA freelist_count").fetchone()
            if free in ((0,), before):
                break
            self.sql.execute(f"PRAGMA incremental_vacuum({_BATCH})").fetchall()
            self.commit()
        self.shorten_log()

    def close(self) -> None:
        """Close it, but never in a child that was forked with it open."""
        if self.sql and self.pid == os.getpid():
            sql, self.sql, self.at_rest = self.sql, None, None
            sql.close()


def _make_file(file: str) -> os.stat_result:
    """Make an empty file that only its owner may read, unless there is one by now."""
    _make_folder(os.path.dirname(file))
    # closing it drops this process's locks on it: no thread may have opened it by then
    with suppress(FileExistsError), _gate.files:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        return os.stat(file)
    except FileNotFoundError:  # somebody has removed it again
        raise _Moved from None


def _make_folder(folder: str) -> None:
    try:
        os.stat(folder)
    except FileNotFoundError:
        _make_folder(os.path.dirname(folder))
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
            os.chmod(folder, 0o700)  # whatever the umask


# ---- SQLite: the store ----


class SQLiteDataStore(_SQLStore):
    """A store in an SQLite file, made where it is missing, with its folder.

    path: the file; None or "" is default_path(). timeout: the seconds that an operation waits
    for other processes. Any number of processes and threads may use one file; every
    operation opens, uses and closes a connection of its own. `path` is the file, absolute.
    """

    _name_limit = _MAX_INTEGER
    _judges_unnoted = True

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, timeout: float = 3.0
    ) -> None:
        self._timeout = _seconds(timeout)
        name = ("" if path is None else os.fsdecode(path)) or default_path()
        if _is_url(name):
            raise ValueError("this is a URL, not a file: use open_store()")
        self.path = _absolute(name)
        try:
            self._file = _resolved(self.path)
        except OSError as error:
            if not _is_own(error):
                raise
            raise _explained(error, self.path) from error
        self._known = (0, 0)  # inode and schema cookie of what was found to be a store
        self._prepare()

    def _connection(self, held: bool = False) -> _Connection:
        return _Connection(self, held)

    def _whole(self, operation: str) -> SQLiteDataStore:
        return self

    def _address(self) -> str:
        return self.path

    def _identity(self) -> object:
        return self._file

    def _destroy(self) -> None:
        connection = _Connection(self)
        with connection:
            there = connection.begin(False)
            connection.close()
            if there:  # to be alone with it already here would starve under load
                connection.begin(True)
                _empty(connection.execute)
                connection.commit()
            for _ in _tries(self):
                if _unlink(connection):
                    return
                connection.close()
            raise self._error(
                "it has been emptied, but a process has it open, so the empty file is"
                " left: end that process, and do it again",
                StoreBusyError,
            )

    def backup(self, target: str | os.PathLike[str]) -> None:
        """Copy the store, as it is at one moment, to a new file of mode 0600, which appears
        under its name when it is complete and on the disk. StoreError where something is
        there. A copying that is killed may leave TARGET.part, which the next one replaces."""
        self._backup(os.fsdecode(target), None)

    def _backup(
        self, target: str, progress: Callable[[int, int, int], object] | None
    ) -> None:
        """backup(). progress is called as sqlite3's own is: status, remaining, total pages."""
        if _is_url(target):
            raise ValueError("a backup is a file, not a URL")
        target = _absolute(target)
        connection = _Connection(self)
        with connection:
            if not connection.begin(False):
                raise self._error("there is no store here to copy")
            with _part_of(target) as part:
                copy = _connect(part, "mode=rw")
                try:
                    # its journal would be litter where this is killed
                    copy.executescript(f"{_WRITE_SETTINGS}; PRAGMA journal_mode = OFF")
                    connection.sql.backup(copy, pages=1000, progress=progress)
                finally:
                    copy.close()
                connection.refuse_change()

    def _report(self) -> dict[str, object]:
        """The outcome of SQLite's check, sizes in bytes, and how many rows each table has."""
        questions = {
            "check": "SELECT integrity_check FROM pragma_integrity_check(1)",
            "size": "SELECT page_size * page_count FROM pragma_page_size, pragma_page_count",
            "free": "SELECT page_size * freelist_count"
            " FROM pragma_page_size, pragma_freelist_count",
            "schema": "SELECT user_version FROM pragma_user_version",
            "sqlite": "SELECT sqlite_version()",
        }

        report = self._answers(questions)
        if report["check"] != "ok":
            raise self._error(
                f"it is damaged ({report['check']}): restore a backup", CorruptStoreError
            )
        return report


@contextmanager
def _part_of(target: str) -> Iterator[str]:
    """Yields the name of an empty, private file, which gets the target's name at the end,
    when it is on the disk; one that a killed backup has left is used again. StoreBusyError
    where another backup is at work in it."""
    part = f"{target}.part"
    try:
        _refuse_target(target)
        # an object that closes itself, wherever an interrupt comes
        with open(part, "ab", 0, opener=_open_private) as stream:
            # another backup may have given it the target's name before it was locked
            if not (_lock(stream.fileno(), exclusive=True) and _is_at(stream, part)):
                raise _error(StoreBusyError, part, "another backup writes it: try again")
            try:
                os.chmod(part, 0o600)
                stream.truncate(0)
                yield part
                os.fsync(stream.fileno())
                _refuse_target(target)
                os.rename(part, target)
            finally:
                if _is_at(stream, part):  # it has not got the target's name
                    os.unlink(part)

        folder = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, sqlite3.Error) as error:
        of_source = _code(error) not in (0, *_NO_PLACE)
        if of_source or isinstance(error, StoreError) or not _is_own(error):
            raise
        raise _explained(error, target) from error


def _open_private(path: str, flags: int) -> int:
    """open()'s opener of a file of one's own, which no link of somebody else's leads to."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)


def _refuse_target(target: str) -> None:
    try:
        os.lstat(target)
    except FileNotFoundError:
        return
    raise _error(StoreError, target, "something is there already: name a new file")


def _is_at(stream: io.FileIO, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, exclusive: bool) -> bool:
    """Take the lock of flock(2), without waiting; True too where a system has none."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(
            descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
        )
    except BlockingIOError:
        return False
    return True


def _seconds(timeout: object) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number, not {type(timeout).__name__}")
    if not timeout >= 0:
        raise ValueError("timeout must be 0 or more seconds")
    return float(min(timeout, 1e6))  # about what time.sleep() and SQLite take


def _resolved(path: str) -> str:
    """The file that a path leads to through links, whether or not it is there yet. What
    SQLite puts beside a file lies there."""
    try:
        return os.path.realpath(path, strict=True)
    except FileNotFoundError:
        pass
    folder, name = os.path.split(path)
    try:
        return _resolved(os.path.join(folder, os.readlink(path)))
    except FileNotFoundError:
        return os.path.join(_resolved(folder), name)
    except OSError as error:
        if error.errno != 22:  # EINVAL: no link, but a file that others have just made
            raise
        return _resolved(path)


# ---- PostgreSQL ----

# As libpq takes a URL apart: a password ends at the first @ or /. Another @ belongs to a
# part, of which libpq would show pieces in its messages, as of a % that encodes nothing.
_SERVER_URL = (
    r"(?!.*(?:\s|%(?!(?!00)[0-9A-Fa-f]{2})|[?&][^=&]*%))"
    r"(postgres(?:ql)?://(?:[^@/]*@)?[^@?]*)\??([^@]*)"
)
_PASSWORD = r"(?i)(//[^/@:]*):[^/@]*(?=@)|\w*(?:password|secret)\w*=[^&\s]*&?"
# The server lets go of a machine that has vanished, and so do we of a server. What a URL
# has of its own comes after these, and wins.
_DRIVER_OPTIONS = (
    "client_encoding=UTF8&keepalives_idle=10&keepalives_interval=5&keepalives_count=3"
    "&tcp_user_timeout=25000&connect_timeout="
)
# All that a transaction depends on, whatever the role, the database or a pool has set; 0 is
# no limit, and the lock's in milliseconds follows, at least 1.
_BEGIN = """
    SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0;
    SET LOCAL client_encoding = 'UTF8'; SET LOCAL bytea_output = 'hex';
    SET LOCAL tcp_keepalives_idle = 10; SET LOCAL tcp_keepalives_interval = 5;
    SET LOCAL tcp_keepalives_count = 3; SET LOCAL tcp_user_timeout = 25000;
    SET LOCAL lock_timeout = """
_WRITING = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
_READING = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"

# What stands for the words of _TABLES, in this order. Text sorts by code points.
_SERVER_TYPES = {
    "seq INTEGER PRIMARY KEY": "seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    " INTEGER": " BIGINT",
    " TEXT": ' TEXT COLLATE "C"',
    " BLOB": " BYTEA",
}
# Its one row is the store's lock, and says that it is one, of which version.
_STORE_TABLE = f"""
    CREATE TABLE store (version INTEGER NOT NULL); INSERT INTO store VALUES ({_VERSION})"""
# What is in a schema: nothing where it is missing, a NULL where it is empty. to_regclass()
# would answer from a cache that may be old.
_IN_SCHEMA = """
    SELECT CAST(relname AS TEXT) FROM pg_catalog.pg_namespace AS named
    LEFT JOIN pg_catalog.pg_class ON relnamespace = named.oid WHERE nspname = :schema"""
# Which server and database: a copy of its files has another start.
_WHERE = """
    SELECT CAST(EXTRACT(EPOCH FROM pg_postmaster_start_time()) * 1000000 AS BIGINT), oid
    FROM pg_catalog.pg_database WHERE datname = current_database()"""
# The table's lock, not the row's: who waits for that holds the table, and would be waited
# for. The schema stays where something is in it, or where it is another's.
_DROP = f"""
    LOCK TABLE store; DROP TABLE store, {", ".join(_TABLES)};
    DO $$ BEGIN
        EXECUTE format('DROP SCHEMA %I', current_schema());
    EXCEPTION WHEN dependent_objects_still_exist OR insufficient_privilege THEN
    END $$"""

# What PostgreSQL's codes (its documentation, appendix A), or their first two characters,
# mean to a user. What isn't here is a StoreError with the server's own words.
_READ_ONLY = "this server can only be read (a standby?): name the one that is written to"
_SERVER_ADVICE = {
    "08": "the server can't be reached, or was lost: see that it runs, and try again",
    "57": "the server has ended the connection: see that it runs, and try again",
    "55P03": _LOCKED,
    "40P01": _LOCKED,
    "40001": _LOCKED,
    "53300": "the server has too many clients: try again, or take a longer timeout",
    "57P03": "the server is starting or stopping: try again",
    "57014": "the statement was cancelled: try again",
    "28": "the server doesn't let this user in: check its name, and pg_hba.conf there",
    "28P01": "wrong password: write it percent-encoded, or see PGPASSWORD and ~/.pgpass",
    "3D000": "there is no such database or user: create it, or name another",
    "42501": "this role lacks a right: have it granted",
    "42P01": "one of its tables is missing: restore a backup",
    "25": _READ_ONLY,
    "0A": _READ_ONLY,
    "25P03": "the server has ended what was idle: raise its limit, and try again",
    "53100": "the server's disk is full, and nothing was changed: make room",
    "54": "a value is larger than PostgreSQL takes: keep it in a file",
}
_SERVER_BUSY = ("55P03", "40P01", "40001", "53300", "57P03", "57014")
# At the start of a transaction: others make the tables or drop them, and what passes.
_SERVER_AGAIN = [
    "23505",
    "42P06",
    "42P07",
    "40001",
    "40P01",
    "XX000",
    "3F000",
    "42P01",
    "53300",
    "57P03",
]
_NO_CODE = "08000"  # of what has none: the connection is lost, or there was never one
# psycopg gives no code while connecting, only the server's words.
_CONNECTING = {
    "too many": "53300",
    "slots are reserved": "53300",
    "starting up": "57P03",
    "shutting down": "57P03",
    "recovery mode": "57P03",
    "not yet accepting": "57P03",
    "password": "28P01",
    "pg_hba.conf": "28000",
    "authentication failed": "28000",
    "does not exist": "3D000",
}


def _said(error: BaseException) -> tuple[str, str]:
    """The code and the words of a driver's error, "" for any other: those are of one of two
    classes of PEP 249, or the system's own, with a number, as a handler's have none."""
    system = isinstance(error, OSError) and error.errno is not None
    system = system and type(error).__module__ in ("builtins", "socket", "ssl")
    classes = {each.__name__ for each in type(error).__mro__}
    if not system and not classes & {"DatabaseError", "InterfaceError"}:
        return "", ""
    told = error.args[0] if error.args else None
    if isinstance(told, dict):  # pg8000
        return told["C"], told["M"]
    words = str(error)
    code = getattr(error, "sqlstate", getattr(error, "pgcode", None))
    if code:
        return code, words.partition("\n")[0]  # what follows may quote a value
    codes = [code for phrase, code in _CONNECTING.items() if phrase in words]
    return [*codes, _NO_CODE][0], words


def _server_error(path: str, error: BaseException, unknown: str = "") -> StoreError:
    """The store's error for one of a driver, in one line."""
    code, words = _said(error)
    kind = StoreBusyError if code in _SERVER_BUSY and not unknown else StoreError
    advice = _SERVER_ADVICE.get(code) or _SERVER_ADVICE.get(code[:2], "PostgreSQL says")
    words = " ".join(_without_password(words).split())
    return _error(kind, path, f"{unknown or advice} ({words})")


def _without_password(text: str) -> str:
    import re

    return re.sub(_PASSWORD, r"\1", text).rstrip("?&")


@lru_cache(maxsize=200)
def _positional(statement: str) -> tuple[str, list[str]]:
    """A statement as drivers of paramstyle `format` take it, and the names of its values."""
    import re

    return re.sub(r":\w+", "%s", statement), re.findall(r":(\w+)", statement)


_begun: set[_PostgresConnection] = set()  # the connections that are in a transaction


class _PostgresConnection:
    """One connection to a server. Only here it is opened, and transactions begun and ended.
    `with` encloses each use of it: any exception in it closes the connection, which may be
    in the middle of an answer, and what a driver raises becomes a StoreError."""

    def __init__(self, store: PostgresDataStore, held: bool = False) -> None:
        self.store = store
        self.held = held  # by a session, over several uses
        self.sql: Any = None  # the driver's connection, while it is open
        self.writes = False  # whether its transaction may write
        self.pid = os.getpid()
        self.thread = 0  # that holds a transaction() on it

    def __enter__(self) -> Execute:
        return self.execute

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None and not self.thread:
            self.rollback()
        if error is not None or not self.held:
            self.close()
        if error is not None and _said(error)[0]:
            raise _server_error(self.store.path, error) from None  # it may quote secrets

    def execute(self, statement: str, values: Values) -> Any:
        """Execute a statement in the transaction that was begun; a session's single read
        begins its own. Where a table is missing, somebody may have dropped the store."""
        try:
            if self in _begun or self.begin(False):
                return self.run(statement, values)
        except Exception as error:
            if self.writes or _said(error)[0] != "42P01":
                raise
            self.store._known = False
            if self.begin(False):
                return self.run(statement, values)
        return _NoRows()

    def run(self, statement: str, values: Values | None = None) -> Any:
        """Execute a statement, or several without values."""
        cursor = self.sql.cursor()
        if values:
            text, names = _positional(statement)
            cursor.execute(text, [values[name] for name in names])
        else:
            cursor.execute(statement)
        return cursor

    def begin(self, write: bool) -> bool:
        """Take the write lock, or a snapshot. Whether there is a store; a write makes it."""
        used = self.sql is not None
        for left in _tries(self.store, longest=0.05):
            try:
                return self.begin_here(write, left)
            except Exception as error:
                code, _ = _said(error)
                self.close()
                if used and code.startswith(("08", "57")):
                    return self.begin(write)  # it has died since its last use
                if code not in _SERVER_AGAIN:
                    raise
                if self.store._known:
                    self.store._known = False
                    return self.begin(write)  # somebody may have dropped the store
                failure = error
        raise failure

    def begin_here(self, write: bool, left: float) -> bool:
        if self.sql is None:
            self.sql = self.store._connect()
            self.sql.commit()  # what was left open would not take our isolation
        self.start(write, left)
        known = self.store._known
        if not known and not self.look(write):
            return False
        if write or not known:
            lock = " FOR UPDATE" if write else ""
            rows = self.run(f"SELECT version FROM {self.store._quoted}.store{lock}")
            versions = [version for (version,) in rows]
            if versions != [_VERSION]:
                self.refuse(f"has version {versions}, not {_VERSION}: update flowstore")
            self.store._known = True
        return True

    def start(self, write: bool, left: float) -> None:
        """Begin a transaction, with all that it depends on."""
        self.rollback()
        beginning = _WRITING if write else _READING
        path = f"SET LOCAL search_path = {self.store._quoted}, pg_temp"
        settings = f"{beginning}; {_BEGIN}{max(int(left * 1000), 1)}"
        if self.store._schema.isascii():
            self.run(f"{settings}; {path}")
        else:  # its name can be sent once the client's encoding is set
            self.run(settings)
            self.run(path)
        me = get_ident(), self.pid
        mine = [each for each in list(_begun) if (each.thread, each.pid) == me]
        if write and mine and self.where() in [each.where() for each in mine]:
            raise RuntimeError(f"{self.store.path}: {_OWN_LOCK}")
        _begun.add(self)
        self.writes = write

    def where(self) -> object:
        """What is equal for connections to one store."""
        return *self.run(_WHERE).fetchone(), self.store._schema

    def look(self, make: bool) -> bool:
        """Whether the schema has the store's tables, which are made where it is empty or
        missing, if they may."""
        rows = self.run(_IN_SCHEMA, {"schema": self.store._schema})
        found = {name for (name,) in rows}
        missing = {"store", *_TABLES} - found
        if missing and found - {None}:
            self.refuse(f"has no table {min(missing)!r}, but something else")
        if missing and make:
            self.create(there=bool(found))
        return make or not missing

    def refuse(self, reason: str) -> NoReturn:
        way = "name another by schema=, or restore a backup"
        raise self.store._error(f"its schema {self.store._schema!r} {reason}; {way}")

    def create(self, there: bool) -> None:
        """Make the tables. Others who do so at the same time fail, and look again."""
        [encoding] = self.run("SHOW server_encoding").fetchone()
        if encoding != "UTF8":
            self.refuse(f"is in a database of encoding {encoding}, where UTF8 is needed")
        if not there:
            self.run(f"CREATE SCHEMA {self.store._quoted}")
        script = ";".join([_STORE_TABLE, *_TABLES.values(), *_INDEXES])
        for word, other in _SERVER_TYPES.items():
            script = script.replace(word, other)
        self.run(script)

    def in_transaction(self) -> bool:
        return self in _begun

    def commit(self) -> None:
        try:
            self.sql.commit()
        except Exception as error:
            if not _said(error)[0]:
                raise
            unknown = "it failed while committing: look whether that has taken effect"
            raise _server_error(self.store.path, error, unknown) from None
        _begun.discard(self)

    def rollback(self) -> None:
        if self in _begun:
            self.end(self.sql.rollback)

    def close(self) -> None:
        """Close it, but never in a forked child: that would end the parent's session."""
        if self.sql is not None and self.pid == os.getpid():
            self.end(self.sql.close)
        self.sql = None

    def end(self, way: Callable[[], object]) -> None:
        """Roll back, or close; where a driver can't, there is nothing left to do so with."""
        _begun.discard(self)
        try:
            way()
        except Exception as error:
            self.sql = None
            if not _said(error)[0]:
                raise

    def give_space_back(self) -> None:
        """The server does so by itself."""


class PostgresDataStore(_SQLStore):
    """A store in a PostgreSQL database, for several machines.

    url: postgresql://user:password@host:port/database?schema=NAME, as libpq takes it besides
    the schema, which has the store's tables, made where they are missing; the argument
    schema wins, "flowstore" is the default. timeout: the seconds that an operation waits for
    others. connect: what returns a new connection of a PEP 249 driver of paramstyle format
    or pyformat, which is closed after use; else psycopg 3 connects. Every operation has a
    connection of its own: take a session() for loops. `path` is the URL without a password.
    """

    # two names share an index row of 2,704 bytes: bucket and key, ref and id
    _name_limit = 1300
    _judges_unnoted = False

    def __init__(
        self,
        url: str,
        *,
        schema: str | None = None,
        timeout: float = 3.0,
        connect: Callable[[], object] | None = None,
    ) -> None:
        import re
        from urllib.parse import quote, unquote

        self._timeout = _seconds(timeout)
        found = re.fullmatch(_SERVER_URL, _text("url", url))
        if found is None:
            raise ValueError(
                "url must be postgresql://user@host:port/database?name=value, also with"
                " a password: write %40 for @, %2F for /, %25 for % and %20 for a space"
            )
        place, query = found.groups()
        option = "&schema=([^&]*)"
        given = [unquote(each) for each in re.findall(option, f"&{query}")]
        others = re.sub(option, "", f"&{query}").rstrip("&")
        self._schema = (
            [*given, "flowstore"][0] if schema is None else _text("schema", schema)
        )
        # the server would cut it, or take it for the role's own
        if not 0 < len(self._schema.encode()) <= 63 or self._schema == "$user":
            raise ValueError("schema must have 1 to 63 bytes, and not be $user")
        self._quoted = _quoted(self._schema)
        self._whole_url = f"{place}?schema={quote(self._schema)}{others}"
        self.path = _without_password(url)
        limits = f"{_DRIVER_OPTIONS}{max(int(self._timeout), 2)}"
        self._connect: Any = connect or self._psycopg(f"{place}?{limits}{others}")
        self._known = False  # whether the schema has been found to be a store
        self._prepare()

    def _psycopg(self, url: str) -> Callable[[], object]:
        try:
            import psycopg
        except ImportError as error:
            raise self._error(
                f"its driver is missing: pip install 'flowstore[postgres]' ({error})"
            ) from error
        # through a pooler, a prepared statement would meet another of its connections
        return lambda: psycopg.connect(url, autocommit=True, prepare_threshold=None)

    def _connection(self, held: bool = False) -> _PostgresConnection:
        return _PostgresConnection(self, held)

    def _whole(self, operation: str) -> PostgresDataStore:
        return self

    def _address(self) -> str:
        return self._whole_url

    def _identity(self) -> object:
        connection = self._connection()
        with connection:
            connection.begin(False)
            return connection.where()

    def _destroy(self) -> None:
        connection = self._connection()
        with connection:
            if connection.begin(False):
                connection.start(True, self._timeout)
                connection.run(_DROP)
                connection.commit()
                self._known = False

    def _report(self) -> dict[str, object]:
        """That the tables are there, the version of server and schema, and the counts."""
        self._known = False
        server = "SELECT current_setting('server_version')"
        return self._answers({"schema": "SELECT version FROM store", "server": server})


# ---- the end of a store, moving old data ----


class _ExistingStore(SQLiteDataStore):
    """A file's store that naming it doesn't make."""

    def _prepare(self) -> None:
        pass


class _ExistingServerStore(PostgresDataStore):
    """The same of a server."""

    def _prepare(self) -> None:
        pass


def open_store(
    where: str | os.PathLike[str] | None = None, *, timeout: float = 3.0
) -> SQLiteDataStore | PostgresDataStore:
    """The store of a path or a URL (postgresql://…); None or "" is what $FLOWSTORE_PATH
    says, else the default file."""
    return _store_at(where, SQLiteDataStore, timeout)


def _store_at(
    where: str | os.PathLike[str] | None,
    file_store: type[SQLiteDataStore],
    timeout: float = 3.0,
) -> SQLiteDataStore | PostgresDataStore:
    name = ("" if where is None else os.fsdecode(where)) or default_path()
    if _is_url(name):
        existing = file_store is _ExistingStore
        return (_ExistingServerStore if existing else PostgresDataStore)(
            name, timeout=timeout
        )
    return file_store(name, timeout=timeout)


def destroy_store(path: str | os.PathLike[str] | None = None) -> None:
    """Remove a store: its file, or its tables where path is a URL. A missing one is no
    error; what is no store is refused, and left as it is. StoreBusyError where a process
    keeps the file open for longer than 3 seconds: then the empty file is left."""
    _store_at(path, _ExistingStore)._destroy()


def _empty(execute: Execute) -> None:
    """Drop all tables, and mark the file as blank."""
    for (name,) in execute(_PLAIN_TABLES, {}).fetchall():
        execute(f"DROP TABLE {_quoted(name)}", {})
    execute("PRAGMA user_version = 0", {})


def _unlink(connection: _Connection) -> bool:
    """Remove an emptied file; False where that is to be tried again.

    In WAL mode others could go on writing to a file that has lost its name, and a new one
    would meet its -wal: so it leaves that mode, and goes while nobody else has it open.
    """
    if connection.begin(False) or not connection.sql:
        return True  # others have made a new store of it, which stays, or have removed it
    connection.rollback()
    try:
        connection.sql.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
        connection.sql.execute("PRAGMA journal_mode = MEMORY").fetchall()
        connection.sql.execute("BEGIN EXCLUSIVE")
        if connection.identify():
            return True
        if connection.has_moved():
            return False
        os.unlink(connection.store._file)
        return True
    except sqlite3.OperationalError as error:
        connection.rollback()
        if _code(error) not in _BUSY and not connection.has_moved():
            raise
        return False


def migrate_process_buckets(path: str | os.PathLike[str] | None = None) -> list[str]:
    """Move the other tables of a file that have exactly the columns `key` and `value` into
    the scopes of their names, in one transaction; returns these names, in order.

    A variable that is there wins; of duplicate keys the last row counts. NULL becomes "", a
    BLOB its text with undecodable bytes as \\xff, a number its decimal text; a row without
    key is left out. A missing file stays missing; a second call changes nothing.
    """
    store = _ExistingStore(path)
    if not store._fetch(_LEGACY_TABLES):
        return []  # without a write
    with store._transact(write=True) as execute:
        buckets = [bucket for (bucket,) in execute(_LEGACY_TABLES, {}).fetchall()]
        for bucket in buckets:
            execute(_ADD_BUCKET, {"bucket": bucket})
            # as bytes, which SQLite makes of every type; in the table's own order
            cells = f"CAST(key AS BLOB), CAST(value AS BLOB) FROM {_quoted(bucket)}"
            rows = execute(f"SELECT {cells} NOT INDEXED", {}).fetchall()
            for key, value in reversed(rows):  # since _ADD_VAR lets stay what is there
                if key:
                    values = {"bucket": bucket, "key": _escaped(key)}
                    execute(_ADD_VAR, {**values, "value": _escaped(value or b"")})
            execute(f"DROP TABLE {_quoted(bucket)}", {})
    return buckets


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


class _Import:
    """What is added to a store in one transaction of it: what it has already wins."""

    def __init__(self, writer: Session, progress: Callable[[int], object] | None) -> None:
        self.writer = writer
        self.progress = progress  # called with the number of entries, now and then
        self.entries = 0
        self.counts = dict.fromkeys(ImportSummary._fields[:-1], 0)
        self.problems: list[tuple[str, str, str]] = []

    def add(self, kind: str, statement: str, **values: object) -> None:
        """Execute a statement, and count what it adds."""
        self.entries += 1
        if self.progress and self.entries % 1000 == 0:
            self.progress(self.entries)
        try:
            for what, value in values.items():
                values[what] = self.checked(kind, what, value)
        except (TypeError, ValueError) as error:
            bucket, key = (
                values.get("bucket", kind),
                values.get("key") or values.get("ref"),
            )
            self.problems.append((str(bucket), str(key), str(error)))
        else:
            self.counts[kind] += self.writer._run(statement, **values)

    def checked(self, kind: str, what: str, value: Any) -> object:
        """A cell of a row that is added, as its column has it: in SQLite it may be anything."""
        if what in ("bucket", "key", "ref", "id") and value:
            return self.writer._name(what, value)
        if what in ("seq", "occurrence") or value is None:
            return value
        if (kind, what) == ("cache", "value"):
            return _bytes(what, value)
        return (_integer if what in _INTEGERS else _text)(what, value)

    def summary(self) -> ImportSummary:
        return ImportSummary(**self.counts, problems=tuple(self.problems))


def copy_store(
    source: SQLiteDataStore | PostgresDataStore,
    target: SQLiteDataStore | PostgresDataStore,
) -> ImportSummary:
    """Add all that one store has to another, in one transaction of the target.

    What the target has wins, so a second time changes nothing; records without an id are the
    same where all that they say agrees. It reads one moment of the source, and keeps the
    order of insertion and the owners of what runs. ValueError for a store into itself.
    """
    return _copy_store(source, target, None)


def _copy_store(
    source: _SQLStore, target: _SQLStore, progress: Callable[[int], object] | None
) -> ImportSummary:
    for store in (source, target):
        if not isinstance(store, _SQLStore):
            raise TypeError(f"copy_store() takes two stores, not {type(store).__name__}")
    if source._whole("copy_store")._identity() == target._whole("copy_store")._identity():
        raise ValueError(f"{source.path}: a store can't be copied into itself")
    with _lone_transaction(source, write=False) as reader, target.transaction() as writer:
        added = _Import(writer, progress)
        for kind, read, add, columns in _COPIED:
            for values in _pages(reader, read, columns):
                added.add(kind, add, **values)
    return added.summary()


def _pages(reader: Session, statement: str, columns: Sequence[str]) -> Iterator[Values]:
    """The rows of a whole table by their columns; only a page is in memory at once."""
    row: Values = {"seq": 0, "key": "", "id": "", "bucket": ""}  # before all of them
    while True:
        rows = reader._fetch(statement, **row, limit=_PAGE)
        for cells in rows:
            row = dict(zip(columns, cells))
            yield row
        if len(rows) < _PAGE:
            return


# ---- files of the original ----


def import_bolt(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str] | DataStore | None = None,
) -> ImportSummary:
    """Add all that a file of the original has to a store, in one transaction.

    path: a file, a URL or a store; None or "" is the default store. What the store has
    wins, so a second time changes nothing; records without an id are the same where all
    that they say agrees. The source is only read, under a shared lock. StoreError with
    the source as its path where that can't be read: then no store is made.
    """
    store = path if isinstance(path, DataStore) else _store_at(path, _ExistingStore)
    if not isinstance(store, _SQLStore):
        raise TypeError(f"import_bolt() can't import into a {type(store).__name__}")
    return _import_bolt(os.fsdecode(source), store, None)


def _import_bolt(
    source: str, store: _SQLStore, progress: Callable[[int], object] | None
) -> ImportSummary:
    # no store, but its path is found and its lock awaited as a store's
    place = _ExistingStore(source, timeout=store._whole("import_bolt")._timeout)
    try:
        file = _BoltFile(_content(place))
    except (OSError, ValueError) as error:
        if isinstance(error, StoreError) or not _is_own(error):
            raise
        kind = StoreError if isinstance(error, OSError) else CorruptStoreError
        reason = getattr(error, "strerror", None) or error
        raise _error(
            kind, place.path, f"{reason}: name a store, or a file of the original"
        ) from error
    with store.transaction() as writer:
        added = _Import(writer, progress)
        _BoltImport(file, added).add_all()
    return added.summary()


def _content(place: _ExistingStore) -> bytes:
    """What a file of bbolt has, read under the lock that bbolt takes. ValueError for what
    can't be one.

    Closing a file drops this process's locks on it, and others would take away the log of
    a store that is open. Only an empty or an SQLite file is a store, or may become one.
    """
    file = place._file
    with _gate.files:  # no thread opens a store meanwhile
        if file in [each.store._file for each in _gate.known()]:
            raise ValueError("it is a store, which this process has open")
        if not stat.S_ISREG(os.stat(file).st_mode):  # to open a pipe would wait
            raise ValueError("it is no regular file")
        with open(file, "rb") as stream:
            start = stream.read(16)
    if start == b"SQLite format 3\0":
        raise ValueError("it is an SQLite file; if it is a store, use copy_store()")
    if not start:
        raise ValueError("it is empty")
    with open(file, "rb") as stream:
        for _ in _tries(place):
            if _lock(stream.fileno(), exclusive=False):
                return stream.read()
    raise place._error(_LOCKED, StoreBusyError)


# A file of bbolt is pages of one size, which its first two, the meta pages, tell
# (https://github.com/etcd-io/bbolt, internal/common). A page is a head, a table of its
# entries, and their keys and values, end to end.
_META = "<8sI4x16s16x2Q"  # magic and version, page size, root, transaction, checksum
_HEAD = "<Q2HI"  # number, flags, how many entries, how many more pages it goes on for
_BRANCH, _LEAF = 1, 2  # flags of a page
# In a branch: position of the key from here, its size, page, the page's upper half (0).
# In a leaf: 1 for a bucket, position of the key from here, its size, size of the value.
_ENTRY = "<4I"
_PAGE_SIZES = [1 << power for power in range(9, 32)]
_VALUE, _BUCKET = "a value", "a bucket"

if TYPE_CHECKING:
    BoltEntry: TypeAlias = tuple[str, bytes, bytes]  # what it is, key, value
    BoltPath: TypeAlias = tuple[bytes, ...]  # the names that lead to a bucket


class _BoltFile:
    """The entries of a file of bbolt. Nothing that it says is believed: a number leads to
    a page that says it is that one, or nowhere, and to each page once."""

    def __init__(self, data: bytes) -> None:
        """ValueError for what is no file of bbolt, or has no root to begin at."""
        self.data = data
        self.pages_read: set[int] = set()
        metas = [*_bolt_metas(data, 0)]
        # elsewhere than behind the first, what looks like the second is a part of a value
        for place in [metas[0][1]] if metas else _PAGE_SIZES:
            metas += _bolt_metas(data, place)
        if not metas:
            raise ValueError("it is no bbolt file, or both of its meta pages are damaged")
        _, self.page_size, root = max(metas)
        self.top = list(self.entries(root))
        if self.top and not any(key for _, key, _ in self.top):
            raise ValueError("it is a bbolt file whose root page is damaged")

    def entries(self, bucket: bytes) -> Iterator[BoltEntry]:
        """The entries of a bucket, in the order of keys; what is neither _VALUE nor
        _BUCKET is damaged. A bucket is known by the value of its entry."""
        root = int.from_bytes(bucket[:8], "little")
        numbers = [root]
        while numbers:
            number = numbers.pop()
            page = self.page(number) if root else bucket[16:]  # where a small one lies
            flags, table = _bolt_table(page, number)
            if flags == _LEAF:
                yield from _bolt_entries(page, table)
            elif flags == _BRANCH and root:
                numbers.extend(child for _, _, child, _ in reversed(table))
            else:
                yield "a page that is damaged or was there before", b"", b""

    def page(self, number: int) -> bytes:
        """A page with those that it goes on in; b"" where one of them is missing, or was
        read before: else pages that lead to each other would never end."""
        begin = number * self.page_size
        more = int.from_bytes(self.data[begin + 12 : begin + 16], "little")
        numbers = range(number, number + 1 + more)
        end = numbers.stop * self.page_size
        if end > len(self.data) or not self.pages_read.isdisjoint(numbers):
            return b""
        self.pages_read.update(numbers)
        return self.data[begin:end]


def _bolt_metas(data: bytes, place: int) -> Iterator[tuple[int, int, bytes]]:
    """Transaction, page size and root bucket of the meta page at a place, if it is one."""
    import struct

    meta = data[place + 16 : place + 80].ljust(64, b"\0")
    start, size, root, transaction, checksum = struct.unpack(_META, meta)
    fnv = 0xCBF29CE484222325  # FNV-1a, of 64 bits
    for byte in meta[:56]:
        fnv = (fnv ^ byte) * 0x100000001B3 % 2**64
    known = start == b"\xed\xda\x0c\xed\2\0\0\0" and checksum == fnv
    if known and size in _PAGE_SIZES and place in (0, size):
        yield transaction, size, root


def _bolt_table(page: bytes, number: int) -> tuple[int, list[Row]]:
    """A page's flags, 0 where it is damaged, and the table of its entries."""
    import struct

    found, flags, count, _ = struct.unpack(_HEAD, page[:16].ljust(16, b"\0"))
    table = page[16 : 16 + 16 * count]
    # the first entry's position, or the 0 of an empty page, tells the count again
    place = 16 if flags == _BRANCH else 20
    position = int.from_bytes(page[place : place + 4], "little")
    expected = number, 16 * count, 16 * count
    if (found, len(table), position) != expected:
        return 0, []
    return flags, list(struct.iter_unpack(_ENTRY, table))


def _bolt_entries(page: bytes, table: list[Row]) -> Iterator[BoltEntry]:
    """The entries of a leaf."""
    starts = [16 + 16 * number + entry[1] for number, entry in enumerate(table)]
    ends = [*starts, None][1:]  # they lie end to end, which tells their sizes again
    for (kind, _, key_size, size), start, end in zip(table, starts, ends, strict=True):
        middle = start + key_size
        stop = middle + size
        lies = starts[0] <= start and stop <= len(page) and end in (stop, None)
        key = page[start:middle] if lies else b""
        if not key or kind > 1 or size < 16 * kind:
            yield "a damaged entry", key, b""
        else:
            yield _BUCKET if kind else _VALUE, key, page[middle:stop]


class _BoltImport:
    """Adds the entries of a file of the original.

    Its buckets are cache, background (runs by id), history (a bucket of each ref, with
    records by id or, without one, by number) and process (a bucket of each scope). The
    first releases had the scopes beside these, at the top. A faulty migration of the
    original took background for one of those, and moved its runs into process.
    """

    CONCERNS = (b"background", b"cache", b"history", b"process")
    OF_BUCKETS = ((), (b"history",), (b"process",))
    MOVED_RUNS = (b"process", b"background")

    def __init__(self, file: _BoltFile, added: _Import) -> None:
        self.file = file
        self.added = added
        self.alike: dict[Row, int] = {}  # how many records say the same

    def add_all(self) -> None:
        # a scope of process before one at the top, since it wins
        top = sorted(self.file.top, key=lambda entry: entry[1] not in self.CONCERNS)
        self.add((), top)

    def add(self, path: BoltPath, entries: Iterable[BoltEntry]) -> None:
        """Add what is in the bucket of this path; what can't be read is a problem."""
        wanted = _BUCKET if path in self.OF_BUCKETS else _VALUE
        for what, key, value in entries:
            try:
                if what != wanted:
                    raise ValueError(f"{what}, where {wanted} belongs")
                for kind, statement, values in self.operations(path, key, value):
                    self.added.add(kind, statement, **values)
            except (TypeError, ValueError) as error:
                if not _is_own(error):
                    raise
                bucket = _escaped(b"/".join(path))
                self.added.problems.append((bucket, _escaped(key), str(error)))
            if what == wanted == _BUCKET:
                self.add((*path, key), self.file.entries(value))

    def operations(
        self, path: BoltPath, key: bytes, value: bytes
    ) -> Iterator[tuple[str, str, Values]]:
        """What counts an entry, the statement that adds it, and its values."""
        if path == (b"cache",):
            yield "cache", _ADD_CACHE, {**_bolt_texts(key=key), "value": value}
        elif path == (b"background",):
            yield "background", _ADD_RUN, _bolt_run(key, value)
        elif path == self.MOVED_RUNS and _is_run(key, value):
            yield "recovered_runs", _ADD_RUN, _bolt_run(key, value)
        elif path[:1] == (b"history",):
            if path[1:]:
                yield "history", _ADD_RECORD, self.record(path[1], key, value)
        elif path not in self.OF_BUCKETS:
            values = _bolt_texts(bucket=path[-1], key=key, value=value)
            yield "process_vars", _ADD_VAR, values
        elif (*path, key) != self.MOVED_RUNS and (path or key not in self.CONCERNS):
            # a scope: neither runs that were moved, nor one of the four buckets
            if not path:
                self.added.counts["legacy_scopes"] += 1
            yield "process_buckets", _ADD_BUCKET, _bolt_texts(bucket=key)

    def record(self, ref: bytes, key: bytes, value: bytes) -> Values:
        data = {**_bolt_object(value), **_bolt_texts(ref=ref)}
        if data.get("id") or len(key) != 8:  # else the key is a number
            data.update(_bolt_texts(id=key))
        values = _values(ExecutionRecord.from_dict(data))
        says = tuple(values.values())
        self.alike[says] = occurrence = self.alike.get(says, 0) + 1
        return {**values, "owner": "", "scope": "", "occurrence": occurrence}


def _bolt_run(key: bytes, value: bytes) -> Values:
    data = {**_bolt_object(value), **_bolt_texts(id=key)}
    return {**_values(BackgroundRun.from_dict(data)), "owner": ""}


def _is_run(key: bytes, value: bytes) -> bool:
    """Whether what is kept as a variable says that it is a background run."""
    try:
        data = _bolt_object(value)
    except ValueError:
        return False
    return {"pid", "status"} <= data.keys() and data.get("id") == _escaped(key)


def _bolt_object(value: bytes) -> Values:
    """A record's JSON."""
    import json

    try:
        return {**json.loads(_bolt_texts(value=value)["value"])}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"it is no JSON object: {error}") from None


def _bolt_texts(**cells: bytes) -> Values:
    texts: Values = {}
    for what, data in cells.items():
        try:
            texts[what] = _text(what, data.decode())
        except UnicodeDecodeError:
            raise ValueError(f"{what} is no UTF-8") from None
    return texts


# ---- the command line ----


class _Options:
    """What a command line says; what it doesn't is None."""

    name: str  # of the command

    def __init__(self) -> None:
        self.words: list[str] = []
        self.flags: dict[str, str | None] = {}  # with what is given as their values
        self.after: list[str] = []  # what follows `--`

    def __getattr__(self, name: str) -> Any:
        return None


if TYPE_CHECKING:
    # Takes the options of a command, returns its exit status: None is 0.
    Act: TypeAlias = Callable[[_Options], int | None]

_COMMANDS: dict[str, _Command] = {}
_FLAGS: dict[str, str] = {}  # of all commands
_SHARED = """\
  --store PATH       use this store: a file, or postgresql://…
  --json             print one JSON document, for programs
  --help             explain the command
  --version          print the version of flowstore"""


class _Command:
    """Makes a function a command by the text of its help: its usage, a sentence, its
    options, if there are any, and an example.

    The usage is its name and its words (in brackets: may be left out; after `--`: a command
    line, taken as it is). The function finds REF as options.ref, `-n N` as options.n, what
    follows `--` as options.after; what isn't given is None.
    """

    def __init__(self, text: str) -> None:
        self.usage, self.sentence, *options, self.example = text.strip().split("\n\n")
        words, self.runs, _ = self.usage.partition(" -- ")
        self.name, *self.words = words.split()
        self.options = "\n".join([*options, _SHARED])
        self.flags = {}  # what stands for the value of each option, "" for a switch
        for line in self.options.splitlines():
            option, _, _ = line.strip().partition("  ")
            flag, _, kind = option.partition(" ")
            self.flags[flag] = kind

    def __call__(self, act: Act) -> Act:
        self.act = act
        _COMMANDS[self.name] = self
        _FLAGS.update(self.flags)
        return act


# what commands share: their words


def _parsed(words: list[str]) -> _Options:
    """What a command line says. By hand: with argparse a `get` takes a sixth longer, and
    learns what is wrong, but not what to do."""
    options = _taken_apart(words)
    options.name = (options.words or options.after or ["help"]).pop(0)
    command = _COMMANDS.get(options.name)
    known = command.flags if command else _FLAGS
    for flag in options.flags:
        if flag not in known:
            raise ValueError(_no_option(options.name, flag, known))
    if not command:
        advice = _nearest(options.name, _COMMANDS, "`flowstore help` lists them")
        raise ValueError(f"there is no command {options.name!r}: {advice}")
    for flag, text in options.flags.items():
        setattr(options, flag.strip("-"), _value(flag, known[flag], text))
    if not options.help:
        _name_words(options, command)
    return options


def _taken_apart(words: list[str]) -> _Options:
    """Its words, its options with the texts of their values, and what follows `--`."""
    options = _Options()
    rest = iter(words)
    for word in rest:
        if word == "--":
            break
        if word == "-h":
            word = "--help"
        flag, equals, value = word.partition("=")
        if flag not in _FLAGS and word[:2] in _FLAGS:  # -n5
            flag, equals, value = word[:2], word[2:], word[2:]
        if word[:1] != "-" or word == "-" or word[1].isdecimal():  # -5 is a word
            options.words.append(word)
        elif equals:
            options.flags[flag] = value
        else:
            value = next(rest, "--") if _FLAGS.get(flag) else "--"
            options.flags[flag] = None if value.startswith("--") else value
    options.after = list(rest)
    return options


def _nearest(word: str, known: Iterable[str], otherwise: str) -> str:
    import difflib

    near = [each for each in known if word and each.startswith(word)]
    near = near or difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else otherwise


def _no_option(name: str, flag: str, known: Iterable[str]) -> str:
    """What is wrong with an option, and what to do."""
    command = _COMMANDS.get(name)
    has, advice = f"{name} has", "leave it out"
    if not command or name == "help":
        has, advice = "there is", "see `flowstore help`"
    elif command.runs:
        advice = "put -- before the command"
    elif command.words:
        advice = "put -- before a word with a dash"
    # what begins with a dash may be a value, and values may be secret
    named = "such option" if name == "set" else f"option {flag}"
    return f"{has} no {named}: {_nearest(flag, known, advice)}"


def _value(flag: str, kind: str, text: str | None) -> object:
    """The value of an option; True for a switch."""
    if not kind:
        if text is None:
            return True
        raise ValueError(f"{flag} takes no value")
    is_file = kind in ("PATH", "FILE")
    if text is None or (is_file and not text):
        raise ValueError(f"{flag} takes a value: {flag} {kind}")
    if is_file:
        return text
    read, meaning = _READ.get(kind, (_utf8, "a text"))
    try:
        return read(text)
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"{flag} takes {meaning}, not {text!r}") from None


def _utf8(word: str) -> str:
    """A word whose bytes are UTF-8, whatever encoding Python takes them for."""
    return os.fsencode(word).decode("utf-8", "surrogateescape")


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise ValueError
    return int(text)


def _instant_of_age(text: str) -> datetime:
    """The instant that an AGE means: so long ago, or a date or time, local by default."""
    units = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
    number, unit = text[:-1], units.get(text[-1:])
    if unit and number.isdecimal():
        return _now() - timedelta(**{unit: int(number)})
    return datetime.fromisoformat(text).astimezone(timezone.utc)


_AGE = "an age or a time (30d, 12h, 2w, 90m, 2024-05-31 or 2024-05-31T18:30)"
# How an option's value is read, and what it has to be, by what stands for it.
_READ: dict[str, tuple[Callable[[str], object], str]] = {
    "N": (_number, "a number, 0 or more"),
    "AGE": (_instant_of_age, _AGE),
    "SECONDS": (lambda text: _seconds(float(text)), "a number of seconds, 0 or more"),
}


def _name_words(options: _Options, command: _Command) -> None:
    """Give the words of a command their names; refuse what is missing, or too much."""
    if command.runs and not options.after:
        advice = f"put -- before it ({command.example})"
        raise ValueError(f"{command.name} needs a command: {advice}")
    words = options.words if command.runs else options.words + options.after
    for what, word in zip_longest(command.words, words):
        if what is None and not command.words:
            raise ValueError(f"{command.name} takes no argument: leave {word!r} out")
        if what is None:  # the last of them may be a secret value
            quoted = "it" if command.name == "set" else repr(" ".join(words))
            name = command.words[-1].strip("[]")
            raise ValueError(f"{command.name} takes one {name}: quote {quoted}")
        if not word and what[0] != "[":
            raise ValueError(f"{command.name} needs {what}: flowstore {command.usage}")
        if word is not None:
            text = word if what == "FILE" else _utf8(word)
            setattr(options, what.strip("[]").lower(), text)


def _store(options: _Options) -> SQLiteDataStore | PostgresDataStore:
    """The store that is meant. A file is made by the first write, not by a read."""
    store = _store_at(options.store, _ExistingStore)
    original = os.path.join(os.path.dirname(store.path), "store.db")
    chosen = options.store or os.environ.get(_PATH_ENV)
    wanted = not chosen and options.name != "import"
    if wanted and _is_missing(store) and os.path.exists(original):
        hint = f"bring it over with `flowstore import '{original}'`"
        _complain(f"the original's store is here, and no flowstore yet: {hint}")
    return store


def _is_missing(store: _SQLStore) -> bool:
    return isinstance(store, SQLiteDataStore) and not os.path.lexists(store.path)


def _scope(options: _Options) -> str:
    return ROOT_BUCKET if getattr(options, "global") else _utf8(environment_bucket())


def _reconciled(options: _Options) -> _SQLStore:
    """The store, for a view of runs: those whose process is gone are marked as failed."""
    store = _store(options)
    with suppress(StoreError):  # what can't be written is shown as it is
        store.reconcile()
    return store


def _whole_id(store: _SQLStore, beginning: str) -> str:
    """The id of the run that alone begins so: history shows the first 8 characters."""
    beginning = store._name("ID", beginning)
    rows = store._fetch(_IDS, id=beginning, beyond=_beyond(beginning))
    ids: list[str] = [id for (id,) in rows]
    if not ids:
        raise store._error(f"there is no run {beginning!r}", NotFoundError)
    if beginning in ids:
        return beginning
    if len(ids) > 1:
        raise ValueError(f"{len(ids)} runs begin with {beginning!r}: give more of it")
    return ids[0]


# what commands share: output


def _answer(options: _Options, document: object, text: str, nothing: str = "") -> None:
    """Print what was found, as a document or as text, or say that nothing was."""
    if options.json:
        import json

        _print(json.dumps(document) + "\n")
    elif text:
        _print(text)
    else:
        _complain(nothing)


def _print(text: str) -> None:
    """Print text as it is: in UTF-8, whatever encoding the terminal has."""
    with open(1, "wb", closefd=False) as stream:
        stream.write(text.encode("utf-8", "surrogateescape"))


def _complain(text: str) -> None:
    if "://" in text:  # a URL in a wrong place may have a password
        text = _without_password(text)
    _tell(f"flowstore: {_shown(text)}\n")


def _progress(text: str) -> None:
    """Rewrite a line of standard error, where that is a terminal."""
    if os.isatty(2):
        _tell(f"\r{text:30}\r")


def _tell(text: str) -> None:
    with suppress(OSError):  # nobody may be there to read it
        os.write(2, text.encode())


def _shown(value: object) -> str:
    """A value for a line: for people a time in their zone, a long duration by the clock;
    a text without what moves the cursor or reorders the line."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        if not os.isatty(1):
            return _instant("time", value)
        with suppress(OverflowError, OSError, ValueError):  # at the ends of the calendar
            value = value.astimezone()
        return value.isoformat(" ")[:19]
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
        if os.isatty(1) and seconds >= 60:
            return str(timedelta(seconds=int(seconds)))
        return f"{seconds:.3f}"
    harmless = "\u200c\u200d\u3000"  # of Persian, emoji and Chinese
    return "".join(
        each if each.isprintable() or each in harmless else ascii(each)[1:-1]
        for each in _noted(str(value))
    )


def _table(header: str, rows: Iterable[Row]) -> str:
    """Rows as lines: on a terminal in columns that fit its width, under a header if there
    is one, else without a header and with a tab between the cells."""
    cells = [[_shown(cell) for cell in row] for row in rows]
    if not cells or not os.isatty(1):
        return "".join("\t".join(row) + "\n" for row in cells)
    if header:
        cells.insert(0, header.split(" "))
    columns = [*zip(*cells)]
    free = (os.get_terminal_size(1).columns or 80) - 2 * (len(columns) - 1)
    free = max(free, len(columns))  # of a terminal that is narrower
    widths = [min(free, max(map(_width, column))) for column in columns]
    for _ in range(sum(widths) - free):
        widths[widths.index(max(widths))] -= 1
    lines = ["  ".join(map(_fitted, row, widths)).rstrip() for row in cells]
    return "\n".join(lines) + "\n"


def _width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    # the selector of an emoji's picture makes a narrow character a wide one
    spacing = [
        unicodedata.east_asian_width(each) in "WF"
        for each in text
        if each == "\ufe0f" or unicodedata.category(each) not in "Mn Me Cf"
    ]
    return len(spacing) + sum(spacing)


def _fitted(text: str, width: int) -> str:
    """A text cut or filled up to a width."""
    if _width(text) > width:
        text = text[: 2 * width]  # of a long one, not every character singly
        while _width(text) >= width:
            text = text[:-1]
        text += "…"
    return text + " " * (width - _width(text))


# the commands: variables


@_Command("""
set KEY [VALUE]

Set a variable, without VALUE to what standard input has.

  --global           in the scope root, which all others fall back to

example: flowstore set VERSION 1.4.2
""")
def _do_set(options: _Options) -> None:
    value = options.value
    if value is None:
        if os.isatty(0):
            _complain("type the value, and end it with Ctrl-D on a line of its own")
        data = sys.stdin.buffer.read() if sys.stdin else b""
        value = data.removesuffix(b"\n").decode("utf-8", "surrogateescape")
    _store(options).set_process_var(_scope(options), options.key, value)


@_Command("""
get KEY

Print a variable of the current scope, else of root.

  --global           in the scope root, which all others fall back to

example: flowstore get VERSION
""")
def _do_get(options: _Options) -> None:
    value = _store(options).get_process_var(_scope(options), options.key)
    _answer(options, value, f"{value}\n")


@_Command("""
list

List the variables of the current scope and of root.

  --global           in the scope root, which all others fall back to

example: flowstore list --json
""")
def _do_list(options: _Options) -> None:
    found = _store(options).get_all_process_vars(_scope(options))
    _answer(options, found, _table("KEY VALUE", found.items()), "there are no variables")


@_Command("""
remove KEY

Remove a variable of the current scope.

  --global           in the scope root, which all others fall back to

example: flowstore remove VERSION
""")
def _do_remove(options: _Options) -> None:
    store = _store(options)
    if not _is_missing(store):
        store.delete_process_var(_scope(options), options.key)


@_Command("""
clear

Empty the current scope.

  --global           in the scope root, which all others fall back to

example: flowstore --store build.db clear
""")
def _do_clear(options: _Options) -> None:
    store = _store(options)
    if not _is_missing(store):
        store.delete_process_bucket(_scope(options))


# the commands: history

_MARKS = {"completed": ("✓", 32), "failed": ("✗", 31), "running": ("●", 33)}


@_Command("""
history [REF]

Show the newest runs of a ref, or of all refs, newest first.

  -n N               that many, 0 for all (20)
  --status STATUS    only those that are completed, failed or running
  --since AGE        only from 30d, 12h, 2w, 90m ago on, or from a date or time

example: flowstore history build --status failed --since 2d
""")
def _do_history(options: _Options) -> None:
    records = _reconciled(options).get_recent_executions(
        20 if options.n is None else options.n,
        ref=options.ref,
        status=options.status,
        since=options.since,
    )
    records.reverse()
    text = _table(" STARTED REF TOOK EXIT ID NOTE", map(_history_row, records))
    if os.isatty(1):
        picture = _table("", _durations(records))
        text += picture and f"\n{picture}"
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        for mark, colour in () if plain else _MARKS.values():
            text = text.replace(f"\n{mark}", f"\n\033[{colour}m{mark}\033[0m")
    nothing = "there are no such runs: `flowstore run` records one"
    _answer(options, [record.to_dict() for record in records], text, nothing)


def _history_row(record: ExecutionRecord) -> Row:
    status = record.status or ("failed" if record.exit_code else "completed")
    running = status == RunStatus.RUNNING
    if os.isatty(1):
        status = _MARKS.get(status, status)[0]
    took = _now() - record.started_at if running else record.duration
    exit_code = None if running else record.exit_code
    note = record.error or record.label or record.command
    id = _shown_id(record.id)
    return status, record.started_at, record.ref, took, exit_code, id, note


def _shown_id(id: str) -> str:
    return id[:8] if os.isatty(1) and len(id) == 36 else id


def _durations(records: list[ExecutionRecord]) -> Iterator[Row]:
    """A picture of the last durations of each ref that has several, newest at the right."""
    spans: dict[str, list[float]] = {}
    for record in records:
        if record.status != RunStatus.RUNNING:
            seconds = max(record.duration.total_seconds(), 0)
            spans.setdefault(record.ref, []).append(seconds)
    for ref, newest in spans.items():
        shown = newest[39::-1]
        scale = 7.99 / max(*shown, 1e-6)
        if len(shown) > 1:
            yield ref, "".join("▁▂▃▄▅▆▇█"[int(seconds * scale)] for seconds in shown)


@_Command("""
forget REF

Delete all records of a ref.

example: flowstore forget build
""")
def _do_forget(options: _Options) -> None:
    store = _store(options)
    if not _is_missing(store):
        store.delete_execution_history(options.ref)


@_Command("""
prune

Delete old runs, of each ref all that isn't to be kept.

  --keep N           keep the newest N of each ref
  --before AGE       delete what began before 30d, 12h, 2w, 90m ago, or a date or time

example: flowstore prune --keep 50 --before 30d
""")
def _do_prune(options: _Options) -> None:
    if options.keep is None and options.before is None:
        raise ValueError("prune needs --keep N, --before AGE, or both")
    store = _store(options)
    missing = _is_missing(store)
    pruned = PruneSummary() if missing else store.prune(options.keep, options.before)
    counts = pruned._asdict()
    _answer(options, counts, _table("", counts.items()))


# the commands: the store


@_Command("""
import FILE

Add what another store has, or a file of the original.

example: flowstore import ~/.cache/flow/store.db
""")
def _do_import(options: _Options) -> int:
    source, target = _store_at(options.file, _ExistingStore), _store(options)
    if _is_missing(source):
        raise source._error("there is no such file")

    def progress(entries: int) -> None:
        _progress(f"{entries:,} entries")

    try:
        summary = _copy_store(source, target, progress)
    except CorruptStoreError as error:
        # to SQLite a file of the original is no database
        if _code(error.__cause__ or error) != sqlite3.SQLITE_NOTADB:
            raise
        summary = _import_bolt(source.path, target, progress)
    _progress("")
    counts = summary._asdict()
    problems = counts.pop("problems")
    named = [dict(zip(("bucket", "key", "reason"), problem)) for problem in problems]
    _answer(options, {**counts, "problems": named}, _table("", counts.items()))
    for problem in problems:
        _complain(f"not brought over: {' '.join(problem)}")
    return 1 if problems else 0


@_Command("""
migrate

Move tables of the flat layout to where scopes are now.

example: flowstore --store build.db migrate
""")
def _do_migrate(options: _Options) -> None:
    store = _file_store(options, "migrate a file, and `flowstore import` it here")
    moved = migrate_process_buckets(store.path)
    _answer(options, moved, _table("", zip(moved)), "there was nothing to move")


def _file_store(options: _Options, instead: str) -> SQLiteDataStore:
    store = _store(options)
    if not isinstance(store, SQLiteDataStore):
        raise store._error(instead)
    return store


@_Command("""
backup FILE

Copy the store to a new file, while others use it.

example: flowstore backup flowstore-monday.db
""")
def _do_backup(options: _Options) -> None:
    def progress(status: int, remaining: int, total: int) -> None:
        _progress(f"{100 - 100 * remaining // max(total, 1)} %")

    instead = "use pg_dump, or `flowstore --store FILE import URL`"
    _file_store(options, instead)._backup(options.file, progress)
    _progress("")


@_Command("""
check

Verify the store, and say what is in it.

example: flowstore check --json
""")
def _do_check(options: _Options) -> None:
    report = _store(options)._report()
    _answer(options, report, _table("", report.items()))


@_Command("""
path

Print where the store is.

example: flowstore path
""")
def _do_path(options: _Options) -> None:
    path = _store(options).path
    _answer(options, path, f"{path}\n")


@_Command("""
destroy

Remove the store with all that is in it.

  --yes              without asking

example: flowstore --store build.db destroy --yes
""")
def _do_destroy(options: _Options) -> int:
    store = _store(options)
    if not options.yes:
        if not os.isatty(0):
            raise ValueError("destroy needs --yes where nobody can be asked")
        _tell(f"Remove {_shown(store.path)} with all that is in it? [y/N] ")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            _complain("nothing was removed")
            return 1
    store._destroy()
    return 0


@_Command("""
help [COMMAND]

Explain a command, or list them.

example: flowstore help history
""")
def _do_help(options: _Options) -> None:
    main([options.command or "help", "--help"])


def _help(name: str) -> str:
    command = _COMMANDS[name]
    usage, options = command.usage, command.options
    if name == "help":
        lines = [f"  {each.usage:22}  {each.sentence}" for each in _COMMANDS.values()]
        usage, options = "COMMAND …", "\n".join([*lines, "", options])
    head = f"usage: flowstore {usage}\n\n{command.sentence}"
    return f"{head}\n\n{options}\n\n{command.example}\n"


# ---- the command line: runs ----

_KERNEL = (0x80, 0x10006)  # SI_KERNEL of sigaction(2), in Linux and in FreeBSD


class _Signals:
    """Starts a command and waits for its end. In `with`, no signal ends this process: what
    is sent to it is passed on.

    They are blocked and fetched, not handled: only so the system tells who sent one. What a
    terminal sends goes to all of its foreground group, so the command may have it already.

    detached: whether the command has a process group of its own, to all of which they go,
    and this process keeps no descriptor that it has inherited.
    """

    def __init__(self, detached: bool = False) -> None:
        self.detached = detached

    def __enter__(self) -> _Signals:
        import signal

        self.typed = {signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH}  # by a terminal
        self.passed_on = self.typed | {
            signal.SIGTERM,
            signal.SIGUSR1,
            signal.SIGUSR2,
            signal.SIGALRM,
            signal.SIGABRT,
            signal.SIGHUP,
        }
        self.awaited = {*self.passed_on, signal.SIGCHLD}
        self.ignores_children = signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN
        if self.ignores_children:  # then the system keeps no exit status
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.awaited)
        return self

    def __exit__(self, *_: object) -> None:
        self.fetch_pending()  # too late to be passed on
        self.restore()

    def restore(self) -> None:
        import signal

        if self.ignores_children:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)

    def fetch_pending(self) -> list[int]:
        import signal

        pending = list(self.passed_on & signal.sigpending())
        for number in pending:
            signal.sigwait({number})
        return pending

    def call(self, command: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
        """Run a command to its end: its exit status, -n where signal n ended it, and what
        has kept it from starting."""
        import errno

        try:
            child = self.start(command, _as_started(environment))
        except OSError as error:
            reason = f"{command[0]}: {error.strerror}"
            _complain(reason)
            return (127 if error.errno == errno.ENOENT else 126), _noted(reason)
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), ""
            with suppress(OSError):  # it is another user's by now
                self.pass_on(child)

    def start(self, command: list[str], environment: dict[str, str]) -> int:
        """Start a command; its pid. OSError where it can't be started."""
        ready, tell_ready = os.pipe()
        failure, tell_failure = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(tell_ready)
                if os.read(ready, 1):  # else the parent has been killed
                    self.become(command, environment)
            except OSError as error:
                os.write(tell_failure, bytes([error.errno or 0]))
            finally:
                os._exit(126)
        if self.detached:
            os.setpgid(child, child)
        # what came before the fork. What came after it to the whole group is pending in the
        # child already; sent again, the two count as one
        for number in self.fetch_pending():
            os.kill(child, number)
        os.write(tell_ready, b"!")
        for descriptor in (ready, tell_ready, tell_failure):
            os.close(descriptor)
        failed = os.read(failure, 1)  # nothing, once the program has taken over
        os.close(failure)
        if failed:
            os.waitpid(child, 0)
            raise OSError(failed[0], os.strerror(failed[0]))
        if self.detached:
            # beyond the limit, too, which may have been lowered since
            os.closerange(3, max(os.sysconf("SC_OPEN_MAX"), 1 << 20))
        return child

    def become(self, command: list[str], environment: dict[str, str]) -> None:
        """In the child: become the command, with all signals as this process found them.
        OSError where it can't."""
        import errno
        import signal

        hidden = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores these by itself
        for number in signal.valid_signals():
            if number in hidden or callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        self.restore()
        failure = errno.ENOENT
        for program in _programs(command[0], environment):
            try:
                os.execve(program, command, environment)
            except OSError as error:
                failure = error.errno or 0
            if failure == errno.ENOEXEC:  # a script without #!
                os.execve("/bin/sh", ["/bin/sh", program, *command[1:]], environment)
            if failure != errno.EACCES:
                break
        raise OSError(failure, "")

    def pass_on(self, child: int) -> None:
        """Wait for a signal, and send it to the command unless it has it already."""
        import signal

        if hasattr(signal, "sigtimedwait"):
            # not for ever: another thread of the program may have got the SIGCHLD
            found = signal.sigtimedwait(self.awaited, 1)
            if not found:
                return
            number, by_kernel = found.si_signo, found.si_code in _KERNEL
        else:  # macOS doesn't tell
            number, by_kernel = signal.sigwait(self.awaited), True
        shared = os.getpgid(child) == os.getpgrp()
        if number == signal.SIGCHLD or (by_kernel and shared and number in self.typed):
            return
        if not self.detached:
            os.kill(child, number)
            return
        os.killpg(child, number)
        if number == signal.SIGTERM:
            os.killpg(child, signal.SIGCONT)  # what is stopped would not end


def _programs(word: str, environment: dict[str, str]) -> list[str]:
    """The files that a command's first word may mean: the first that is executable."""
    if "/" in word:
        return [word]
    folders = environment.get("PATH", os.defpath).split(os.pathsep)
    paths = [os.path.join(folder, word) for folder in folders]
    return [path for path in paths if os.path.isfile(path)]


def _as_started(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment with the LC_CTYPE that this interpreter was started with: it sets that
    for itself and for its children (PEP 538)."""
    # without the nameless variable of `=x`, which execve() of Python refuses
    kept = {name: value for name, value in environment.items() if name}
    with suppress(OSError), open("/proc/self/environ", "rb") as file:
        started = file.read().split(b"\0")
        kept.pop("LC_CTYPE", "")
        for variable in started:
            if variable.startswith(b"LC_CTYPE="):
                kept["LC_CTYPE"] = os.fsdecode(variable[9:])
    return kept


def _new_run(options: _Options, store: _SQLStore) -> Execution:
    import shlex

    return store._new_run(
        options.ref,
        None,
        _noted(environment_bucket()) if options.join else None,
        label=options.label or "",
        command=_noted(shlex.join(options.after)),
        source=_noted(run_env_value(RUN_SOURCE_ENV)) or RUN_SOURCE_CLI,
    )


@_Command("""
run REF -- COMMAND ...

Run a command in a scope of its own, and record it.

  --label TEXT       a name for people
  --join             share the scope that it is started in, which stays
  --background       return at once, and print the id for `stop` and `show`
  --log FILE         with --background: append what the command prints to FILE

example: flowstore run 'build app' -- make -j4
""")
def _do_run(options: _Options) -> int:
    if not hasattr(os, "fork"):
        raise ValueError("run needs a POSIX system")
    if options.log and not options.background:
        raise ValueError("run --log FILE needs --background: else redirect by > FILE")
    null = os.open(os.devnull, os.O_RDWR)
    while null < 3:  # closed on entry: else SQLite fills it for the command too
        null = os.open(os.devnull, os.O_RDWR)
    os.close(null)
    if options.background:
        return _run_detached(options)
    with _Signals() as signals:
        exit_code = _run_command(options, signals)
    return _status_of(exit_code)


def _run_command(options: _Options, signals: _Signals) -> int:
    """Run a command, recorded if that can be: its exit status, -n where signal n ended it."""
    try:
        store = _store(options)
    except (StoreError, ValueError) as failure:
        _complain(f"{failure}; the command runs, and is not recorded")
        return signals.call(options.after, os.environ)[0]
    run = _new_run(options, store)
    anyway = "the command runs, and is recorded at its end if it can be"
    started = _is_done(run._start, anyway)
    exit_code, run.error = signals.call(options.after, run.env)
    run.exit_code = exit_code
    _is_done(run._finish, "the run's end is not recorded" if started else "")
    return exit_code


def _is_done(act: Callable[[], None], otherwise: str) -> bool:
    """Whether a step of a recording succeeds; otherwise say why not, and what that means."""
    try:
        act()
    except StoreError as failure:
        if otherwise:
            _complain(f"{failure}; {otherwise}")
        return False
    return True


def _status_of(exit_code: int) -> int:
    """The exit status for a command's; where it died of a Ctrl-C this process does so too,
    which makes a loop of the shell stop."""
    if exit_code >= 0:
        return exit_code
    import signal

    if exit_code == -signal.SIGINT:
        handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.raise_signal(signal.SIGINT)
        signal.signal(signal.SIGINT, handler)  # process 1 still lives
    return 128 - exit_code


def _run_detached(options: _Options) -> int:
    """Leave a run to a process of its own; print its id once that has recorded it."""
    run = _new_run(options, _store(options))
    run._background = True
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    output = os.open(options.log or os.devnull, flags, 0o600)
    answer, tell = os.pipe()
    if os.fork() == 0:
        try:
            os.setsid()
            _watch(run, options.after, output, tell)
        finally:
            os._exit(0)  # a program that has called main() must not go on here
    os.close(output)
    os.close(tell)
    with open(answer, encoding="utf-8") as stream:
        told = stream.read()
    if told != run.id:
        raise StoreError(told or "the run was ended before it was recorded")
    _answer(options, {"id": run.id}, f"{run.id}\n")
    return 0


def _watch(run: Execution, command: list[str], output: int, tell: int) -> None:
    """Record a run as one of this process, tell its id or why not, and run its command."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    with _Signals(detached=True) as signals:
        run._record = run._record._replace(pid=os.getpid())
        try:
            run._start()
        except Exception as error:
            os.write(tell, str(error).encode("utf-8", "backslashreplace"))
            return
        os.write(tell, run.id.encode())
        os.close(tell)
        run.exit_code, run.error = signals.call(command, run.env)
        _is_done(run._finish, "the run's end is not recorded")


@_Command("""
background

List the background runs.

example: flowstore background
""")
def _do_background(options: _Options) -> None:
    runs = _reconciled(options).list_background_runs()
    text = _table("STATUS STARTED REF TOOK PID ID ERROR", map(_background_row, runs))
    nothing = "there are no background runs: `flowstore run --background` starts one"
    _answer(options, [run.to_dict() for run in runs], text, nothing)


def _background_row(run: BackgroundRun) -> Row:
    end = _now() if run.status == RunStatus.RUNNING else run.completed_at
    took = end - run.started_at if end else None
    id = _shown_id(run.id)
    return run.status, run.started_at, run.ref, took, run.pid, id, run.error


@_Command("""
stop ID

End a background run: SIGTERM goes to all of its processes.

  --timeout SECONDS  wait so long for its end, instead of 10

example: flowstore stop 0b6a7b1e-6a4f-4f0e-9d53-1d3ac6a4c2a5
""")
def _do_stop(options: _Options) -> None:
    store = _reconciled(options)
    id = _whole_id(store, options.id)
    running = {id: (pid, owner) for _, id, pid, owner, _ in store._fetch(_RUNNING)}
    if id not in running:
        status = store.get_background_run(id).status
        raise StoreError(f"the run {id} isn't running: its status is {status!r}")
    pid, owner = running[id]
    _terminate(id, pid, owner)
    timeout = 10 if options.timeout is None else options.timeout
    deadline = time.monotonic() + timeout
    while _owner_note(pid) == owner:
        if time.monotonic() > deadline:
            advice = f"kill what runs below process {pid}"
            raise StoreError(f"the run {id} was told to end, and still lives: {advice}")
        time.sleep(0.01)
    _reconciled(options)  # one that could not record its own end


def _terminate(id: str, pid: int, owner: str) -> None:
    """Tell the process that a note means to end, and no other one of its number: that is
    taken hold of before it is compared, where the system can."""
    import signal

    send: Callable[[int, int], None] = os.kill
    try:
        process, send = os.pidfd_open(pid), signal.pidfd_send_signal
    except (AttributeError, OSError, OverflowError):
        process = pid
    try:
        if not owner or _owner_note(pid) != owner:
            reason = (
                f"process {pid} isn't known to be one of this machine and pid namespace"
            )
            raise StoreError(f"the run {id} can't be stopped from here: {reason}")
        send(process, signal.SIGTERM)
        send(process, signal.SIGCONT)
    except ProcessLookupError:
        pass  # it has just ended
    finally:
        if send != os.kill:
            os.close(process)


@_Command("""
show ID

Show all fields of a run, or of a background run.

example: flowstore show 0b6a7b1e-6a4f-4f0e-9d53-1d3ac6a4c2a5
""")
def _do_show(options: _Options) -> None:
    store = _reconciled(options)
    id = _whole_id(store, options.id)
    executions = store._made(_execution, store._fetch(_RECORD_BY_ID, id=id))
    run = executions[0] if executions else store.get_background_run(id)
    fields = run._asdict()
    if run.status == RunStatus.RUNNING and executions:
        fields.update(duration=_now() - run.started_at, exit_code=None)
    _answer(options, run.to_dict(), _table("", fields.items()))


# ---- the command line: main ----


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line, of sys.argv by default. Ends by SystemExit: 0 done, 1 not found or
    failed, 2 wrong usage; `run` with its command's."""
    status = 0
    try:
        options = _parsed(list(sys.argv[1:] if argv is None else argv))
        if options.version:
            _print(f"flowstore {__version__}\n")
        elif options.help:
            _print(_help(options.name))
        else:
            status = _COMMANDS[options.name].act(options) or 0
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # who reads it has seen enough
        status = 1
    except (StoreError, ValueError) as error:
        status = 1 if isinstance(error, StoreError) else 2
        _complain(str(error))
    except OSError as error:
        status = 1
        _complain(f"{error.filename or 'standard output'}: {error.strerror}")
    sys.exit(status)


if __name__ == "__main__":
    main()
