"""flowstore: the local state store of a task runner, in one file.

A cache (key to bytes), the history of executions per ref, records of detached background runs, and variables
scoped to a running process with fallback to a root scope, for many short-lived processes that share one file:

    store = flowstore.SQLiteDataStore()             # $FLOWSTORE_PATH, or the user's cache folder
    with store.execution("build app") as run:
        run.exit_code = subprocess.call(["make"], env=run.env)

The Go package `store` of *flow* in Python, on SQLite instead of bbolt. An acknowledged write is on the disk,
nobody waits longer than the timeout, and what goes wrong is a StoreError that names the file.

Copyright (c) 2026 The flowstore authors. Licence: MIT. SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import _weakref  # all of weakref, as zlib and struct, would be felt at each start
import codecs
import gc
import os
import sqlite3
import stat
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import namedtuple
from datetime import datetime, timedelta, timezone
from functools import cache, lru_cache, partial
from itertools import groupby, islice
from threading import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Any, NamedTuple, NoReturn, Self, TypeAlias, TypeVar

    T = TypeVar("T")
    Record = TypeVar("Record", "ExecutionRecord", "BackgroundRun")
    Histories: TypeAlias = dict[str, list["ExecutionRecord"]]
    Path: TypeAlias = str | os.PathLike[str]
    Cell: TypeAlias = str | bytes  # a text as SQLite takes it, see _text()
    Row: TypeAlias = Sequence[Any]
    Cells: TypeAlias = dict[str, Any]  # by their columns
    Converter: TypeAlias = Callable[[str, Any], Any]
    SQL: TypeAlias = sqlite3.Connection
    Work: TypeAlias = Callable[[SQL], T]
    Load: TypeAlias = Callable[[Iterable[Row]], Iterable[T]]
else:
    class _NamedTupleType(type):
        def __new__(mcls, name, bases, namespace):
            if not bases:
                return super().__new__(mcls, name, bases, namespace)
            fields = namespace.pop("__annotations__")
            defaults = [namespace.pop(field) for field in fields if field in namespace]
            return type(name, (namedtuple(name, fields, defaults=defaults),), {**namespace, "__slots__": ()})

    class NamedTuple(metaclass=_NamedTupleType):
        """What is needed of typing's, whose import is a sixth of the command line's start."""

__version__ = "1.0.0"

# ---- constants and errors ----------------------------------------------------------------------------------

BUCKET_ENV = "FLOW_PROCESS_BUCKET"
ROOT_BUCKET = "root"
RUN_SOURCE_ENV = "FLOW_RUN_SOURCE"
RUN_CLIENT_ENV = "FLOW_RUN_CLIENT"
RUN_SESSION_ENV = "FLOW_RUN_SESSION"
RUN_SOURCE_CLI, RUN_SOURCE_DESKTOP, RUN_SOURCE_MCP = "cli", "desktop", "mcp"


class RunStatus:
    """The usual values of ExecutionRecord.status; any other str is kept too."""
    RUNNING, COMPLETED, FAILED = "running", "completed", "failed"


class BackgroundRunStatus(RunStatus):
    """The usual values of BackgroundRun.status."""

class StoreError(Exception):
    """The base of all that a store raises for the world's faults; `path` is the file."""
    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


def _error(kind: type[StoreError], path: str, reason: str) -> StoreError:
    return kind(f"{path}: {reason}", path)


class NotFoundError(StoreError, LookupError):
    """There is no variable or background run of that name."""

class StoreBusyError(StoreError, TimeoutError):
    """Another process kept the lock for longer than the timeout (an OSError too)."""

class CorruptStoreError(StoreError):
    """The file is damaged, or is no store at all."""

# ---- records -----------------------------------------------------------------------------------------------

class ExecutionRecord(NamedTuple):
    """One run of a ref. Times are aware, and returned in UTC. Checked where it is stored: ValueError for an
    empty ref, a naive time or one outside the years 1 to 9999, an integer outside int64; else TypeError."""
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

    def to_dict(self) -> dict[str, Any]:
        """The original's JSON object, without what is empty."""
        return _to_dict(self, always=4)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ExecutionRecord:
        """The record of such an object; other tags are ignored, None is empty. ValueError, TypeError."""
        return next(_load(cls, [[*_row_of_dict(cls, data).values()]]))


class BackgroundRun(NamedTuple):
    """A detached run, kept by its id; checked as an ExecutionRecord is."""
    id: str
    pid: int
    ref: str
    started_at: datetime
    status: str
    log_archive_id: str = ""
    error: str = ""
    completed_at: datetime | None = None

    def to_dict(self) -> dict[str, Any]:
        """The original's JSON object, without what is empty."""
        return _to_dict(self, always=5)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BackgroundRun:
        """The run of such an object; errors as ExecutionRecord's."""
        return next(_load(cls, [[*_row_of_dict(cls, data).values()]]))


def _check(what: str, value: object, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{what} must be of type {kind.__name__}, not {type(value).__name__}")


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(what: str, value: Any) -> Cell:
    """A text as SQLite takes it: itself, or its bytes where they are no UTF-8 (PEP 383)."""
    if type(value) is str and value.isascii():
        return value
    _check(what, value, str)
    try:
        data = _utf8(value)
        if _str(data) == value:
            return str(value) if data == value.encode("utf-8", "replace") else data
    except UnicodeEncodeError:
        pass
    raise ValueError(f"{what} has a surrogate that stands for no byte")


class _Damaged(sqlite3.DatabaseError):
    """A cell holds what its column can't: SQLite takes any type in any column."""


def _str(cell: object) -> str:
    if isinstance(cell, bytes):
        return cell.decode("utf-8", "surrogateescape")
    if not isinstance(cell, str):
        raise _Damaged
    return cell


def _name(what: str, value: object) -> Cell:
    if value == "":
        raise ValueError(f"{what} must not be empty")
    return _text(what, value)


def _checked(names: Cells, cells: Cells | None) -> Cells:
    for what in names:
        names[what] = _name(what, names[what])
    return names if cells is None else cells | names


def _folded(name: str) -> str:
    """A name as SQLite compares those of tables: without the case of ASCII."""
    return _str(_utf8(name).lower())


def _ordered(names: Iterable[str]) -> list[str]:
    """Names in the order of their bytes; SQLite puts those that are no UTF-8 last."""
    return sorted(names, key=_utf8)


def _integer(what: str, value: Any) -> int:
    _check(what, value, int)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{what} does not fit into 64 bits")
    return int(value)


def _nanoseconds(what: str, value: Any) -> int:
    _check(what, value, timedelta)
    return _integer(what, ((value.days * 86400 + value.seconds) * 10**6 + value.microseconds) * 1000)


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _instant(what: str, value: Any) -> str:
    """A time as the file has it: RFC 3339 in UTC with nanoseconds, which sorts as time."""
    _check(what, value, datetime)
    if value.utcoffset() is None:
        raise ValueError(f"{what} must be an aware datetime: this one has no time zone")
    try:
        utc = value.astimezone(timezone.utc)
    except OverflowError:
        raise ValueError(f"{what} lies outside the years 1 to 9999 in UTC") from None
    return datetime.isoformat(utc, "T", "microseconds")[:26] + "000Z"


def _instant_of_text(what: str, value: Any) -> str:
    """The same of an RFC 3339 text; keeps the nanoseconds, which a datetime can't."""
    _check(what, value, str)
    clock, zone = (value[:-1], "+00:00") if value.endswith("Z") else (value[:-6], value[-6:])
    fraction = clock[20:] if clock[19:20] == "." else "0" * (len(clock) == 19)
    try:  # the shape first: fromisoformat() takes much that is no RFC 3339
        if clock[4:17:3] + zone[3] != "--T:::" or not (fraction.isascii() and fraction.isdigit()):
            raise ValueError
        moment = datetime.fromisoformat(clock[:19] + zone)
        if moment.tzinfo is not timezone.utc:
            clock = moment.astimezone(timezone.utc).isoformat()
    except (ValueError, IndexError, OverflowError):
        raise ValueError(f"{what} is no RFC 3339 time in the years 1 to 9999") from None
    return f"{clock[:19]}.{fraction:0<9.9}Z"


_NUMBERS = ("duration", "exit_code", "pid")
_TIMES = ("started_at", "completed_at")  # the other fields of both records are texts


@cache
def _tag(field: str) -> str:
    """The original's JSON tag for a field: logArchiveId for log_archive_id."""
    return field[0] + field.title().replace("_", "")[1:]


def _fields(cls: Any, instant: Converter, span: Converter) -> list[tuple[str, str, Converter, Any]]:
    """Each field's name, tag, what makes a cell of its value, and the cell of an empty one."""
    numbers = {**dict.fromkeys(_NUMBERS, _integer), "duration": span}
    return [(field, _tag(field), instant, None) if field in _TIMES else
            (field, _tag(field), numbers.get(field, _text), 0 if field in numbers else "")
            for field in cls._fields]


_KINDS: tuple[type, ...] = (ExecutionRecord, BackgroundRun)
_OF_RECORD = {cls: _fields(cls, _instant, _nanoseconds) for cls in _KINDS}
_OF_JSON = {cls: _fields(cls, _instant_of_text, _integer) for cls in _KINDS}


def _row(cls: type[Record], record: Any) -> Cells:
    _check("record", record, cls)
    fields = zip(_OF_RECORD[cls], record, strict=True)
    return {field: None if value is None and field == "completed_at" else convert(field, value)
            for (field, _, convert, _), value in fields}


def _row_of_dict(cls: type[Record], data: dict[str, Any]) -> Cells:
    _check("data", data, dict)
    cells: Cells = {}
    for field, tag, convert, empty in _OF_JSON[cls]:
        value = data.get(tag)
        if value is not None:
            cells[field] = convert(field, value)
        elif field in ("ref", "started_at") or (field == "id" and cls is BackgroundRun):
            raise ValueError(f"{tag} is missing")
        else:
            cells[field] = empty
    return cells


def _to_dict(record: ExecutionRecord | BackgroundRun, always: int) -> dict[str, Any]:
    """Its JSON object: the first `always` fields, and what isn't empty."""
    result: dict[str, Any] = {}
    for number, (field, value) in enumerate(zip(record._fields, record, strict=True)):
        if value or number < always:
            result[_tag(field)] = value
            if field in _TIMES:
                result[_tag(field)] = _instant(field, value)[:-1].rstrip("0").rstrip(".") + "Z"
            elif field == "duration":
                result[field] = _nanoseconds(field, value)
    return result


def _only(kind: type[T], cells: Sequence[Any]) -> Sequence[T]:
    if {*map(type, cells)} != {kind}:
        raise _Damaged
    return cells


def _texts(cells: Sequence[Any]) -> Sequence[str]:
    return cells if {*map(type, cells)} == {str} else [*map(_str, cells)]


def _times(cells: Sequence[Any]) -> list[datetime | None]:
    parse = datetime.fromisoformat
    try:
        times = [None if cell is None else parse(cell) for cell in cells]
    except (TypeError, ValueError):
        raise _Damaged from None
    if {time.tzinfo for time in times if time is not None} - {timezone.utc}:
        raise _Damaged
    return times


def _load(cls: type[Record], rows: Iterable[Row]) -> Iterator[Record]:
    """Make records of rows: by columns, since a call for each cell would take most of the time of a large
    read, and in batches that a processor has at hand."""
    rows, make = iter(rows), partial(tuple.__new__, cls)
    while batch := [*islice(rows, 1000)]:
        columns: list[Sequence[Any]] = []
        for field, cells in zip(cls._fields, zip(*batch, strict=True), strict=True):
            if field == "duration":  # cut towards zero, so that the extremes can be stored again
                columns.append([timedelta(0, 0, cell // 1000 if cell >= 0 else -(-cell // 1000))
                                for cell in _only(int, cells)])
            elif field in _TIMES:
                times = _times(cells)
                columns.append(times if field == "completed_at" else _only(datetime, times))
            else:
                columns.append(_only(int, cells) if field in _NUMBERS else _texts(cells))
        yield from map(make, zip(*columns, strict=True))


_load_executions = partial(_load, ExecutionRecord)
_load_background = partial(_load, BackgroundRun)


def _load_texts(rows: Iterable[Row]) -> list[str]:
    return [_str(cell) for cell, in rows]


def _load_blobs(rows: Iterable[Row]) -> list[bytes]:
    cells = [cell for cell, in rows]
    for cell in cells:
        if type(cell) is not bytes:
            raise _Damaged
    return cells


# ---- where things are --------------------------------------------------------------------------------------

def default_path() -> str:
    """$FLOWSTORE_PATH, else flowstore.db in $FLOW_CACHE_DIR, else flow/flowstore.db in the user's cache."""
    if path := os.environ.get("FLOWSTORE_PATH"):
        return os.path.abspath(path)
    if folder := os.environ.get("FLOW_CACHE_DIR"):
        return os.path.abspath(os.path.join(folder, "flowstore.db"))
    folder = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    if sys.platform == "darwin":
        folder = os.path.expanduser("~/Library/Caches")
    if not os.path.isabs(folder):  # as the XDG specification wants it
        folder = os.path.expanduser("~/.cache")
    if not os.path.isabs(folder):
        raise StoreError("this user has no home folder: name a store by FLOWSTORE_PATH")
    return os.path.join(folder, "flow", "flowstore.db")


def environment_bucket() -> str:
    """The current scope: $FLOW_PROCESS_BUCKET with `_` for each `:`, `/` and space; unset or empty: root."""
    return (os.environ.get(BUCKET_ENV) or ROOT_BUCKET).translate(str.maketrans(":/ ", "___"))


def run_env_value(name: str) -> str:
    """A variable of the environment, "" where unset; where it is exactly `${OTHER}`, the value of OTHER."""
    value = os.environ.get(name, "")
    return os.environ.get(value[2:-1], "") if value.startswith("${") and value.endswith("}") else value


# ---- the interface -----------------------------------------------------------------------------------------

class DataStore(ABC):
    """What every store does. Names (key, ref, bucket, id) are non-empty str that survive UTF-8 with
    surrogateescape there and back (else ValueError or TypeError), and are listed in order of its bytes.
    What is deleted may be missing; bulk reads see one moment, and leave out what is missing."""
    @abstractmethod
    def set_cache_entry(self, key: str, value: bytes) -> None:
        """Store a bytes-like value in place of an earlier one. It never expires by itself."""
    @abstractmethod
    def get_cache_entry(self, key: str) -> bytes | None:
        """The value of a key, or None."""
    @abstractmethod
    def get_cache_entries(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The values of any number of keys."""
    @abstractmethod
    def delete_cache_entry(self, key: str) -> None:
        """Delete a key."""

    @abstractmethod
    def record_execution(self, record: ExecutionRecord) -> None:
        """Add a record; one with an id replaces that of the same ref and id, and keeps its place."""
    @abstractmethod
    def get_execution_history(self, ref: str, limit: int = 0) -> list[ExecutionRecord]:
        """The newest `limit` (<= 0: all) by started_at, oldest first; equal ones in order of insertion."""
    @abstractmethod
    def get_execution_histories(self, refs: Iterable[str], limit: int = 0) -> Histories:
        """The same for each of these refs that has records."""
    @abstractmethod
    def get_all_execution_history(self, limit_per_ref: int = 0) -> Histories:
        """The same for all refs, in their order."""
    @abstractmethod
    def list_execution_refs(self) -> list[str]:
        """The refs that have records, in order."""
    @abstractmethod
    def delete_execution_history(self, ref: str) -> None:
        """Delete all records of a ref."""

    @abstractmethod
    def save_background_run(self, run: BackgroundRun) -> None:
        """Store a run, in place of an earlier one with its id."""
    @abstractmethod
    def get_background_run(self, id: str) -> BackgroundRun:
        """The run with this id, or NotFoundError."""
    @abstractmethod
    def get_background_runs(self, ids: Iterable[str]) -> dict[str, BackgroundRun]:
        """The runs with these ids."""
    @abstractmethod
    def list_background_runs(self) -> list[BackgroundRun]:
        """All runs, in the order of their ids."""
    @abstractmethod
    def delete_background_run(self, id: str) -> None:
        """Delete a run."""

    @abstractmethod
    def create_process_bucket(self, bucket: str) -> None:
        """Make an empty scope; an existing one stays as it is."""
    @abstractmethod
    def delete_process_bucket(self, bucket: str) -> None:
        """Delete a scope with its variables."""
    @abstractmethod
    def set_process_var(self, bucket: str, key: str, value: str) -> None:
        """Set a variable to a str (as a name, or empty) in a scope, which is made where it is missing."""
    @abstractmethod
    def get_process_var(self, bucket: str, key: str) -> str:
        """The value in the scope, else in root, else NotFoundError. "" counts as found."""
    @abstractmethod
    def get_all_process_vars(self, bucket: str) -> dict[str, str]:
        """The variables of the scope and of root, in order of the keys; the scope's own win."""
    @abstractmethod
    def get_process_var_keys(self, bucket: str) -> list[str]:
        """The scope's keys in order, then in order those that only root has."""
    @abstractmethod
    def delete_process_var(self, bucket: str, key: str) -> None:
        """Delete a variable of this scope alone."""

    @abstractmethod
    def transaction(self) -> AbstractContextManager[DataStore]:
        """Yields a store whose operations take effect together or, on any exception, not. RuntimeError for
        one in another, and for use after its end, from another thread or after a fork."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Nothing is held that it would close; the store stays usable."""


# ---- the schema --------------------------------------------------------------------------------------------

_APPLICATION_ID = 0x464C5753  # "FLWS"
_VERSION = 1  # the oldest schema that can read the file; additive changes don't raise it

# Each object as sqlite_master has it, less "CREATE ". The rowid of `history` is the order of insertion;
# `identity`, a checksum of ref and id, finds a record's predecessor (an index over both would be a sixth of
# the file), or is the digest of an imported record without id; `process` is a _process_note().
_SCHEMA = {
    "cache": "TABLE cache (key TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL)",
    "history": """TABLE history (
    ref TEXT NOT NULL, started_at TEXT NOT NULL, duration INTEGER NOT NULL, exit_code INTEGER NOT NULL,
    error TEXT NOT NULL, log_archive_id TEXT NOT NULL, id TEXT NOT NULL, completed_at TEXT,
    status TEXT NOT NULL, pid INTEGER NOT NULL, command TEXT NOT NULL, spec TEXT NOT NULL,
    label TEXT NOT NULL, source TEXT NOT NULL, client_name TEXT NOT NULL, session_id TEXT NOT NULL,
    working_dir TEXT NOT NULL, identity INTEGER, process TEXT NOT NULL)""",
    "history_by_start": "INDEX history_by_start ON history (ref, started_at)",
    "history_by_identity": "INDEX history_by_identity ON history (identity) WHERE identity IS NOT NULL",
    "history_running": "INDEX history_running ON history (pid) WHERE status = 'running'",
    "background": """TABLE background (
    id TEXT PRIMARY KEY NOT NULL, pid INTEGER NOT NULL, ref TEXT NOT NULL, started_at TEXT NOT NULL,
    status TEXT NOT NULL, log_archive_id TEXT NOT NULL, error TEXT NOT NULL,
    completed_at TEXT) WITHOUT ROWID""",
    "process_vars": """TABLE process_vars (
    bucket TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (bucket, key)) WITHOUT ROWID""",
    "process_buckets": "TABLE process_buckets (bucket TEXT PRIMARY KEY NOT NULL) WITHOUT ROWID",
}
_TABLES = [name for name, definition in _SCHEMA.items() if definition.startswith("TABLE")]

# for files from elsewhere; and its close may be the last, with a checkpoint
_READ_SETTINGS = "PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON; PRAGMA checkpoint_fullfsync = ON;"
# the size limit cuts a grown WAL when it starts anew
_SETTINGS = _READ_SETTINGS + """
    PRAGMA synchronous = FULL; PRAGMA fullfsync = ON; PRAGMA wal_autocheckpoint = 0;
    PRAGMA journal_size_limit = 0; PRAGMA secure_delete = ON;"""

_EXECUTION = ", ".join(ExecutionRecord._fields)
_BACKGROUND = ", ".join(BackgroundRun._fields)
_ADD_CACHE = "INSERT OR IGNORE INTO cache (key, value) VALUES (:key, :value)"
_SET_CACHE = """
    INSERT INTO cache (key, value) VALUES (:key, :value)
    ON CONFLICT (key) DO UPDATE SET value = excluded.value"""
_GET_CACHE = "SELECT value FROM cache WHERE key = :key"
_DELETE_CACHE = "DELETE FROM cache WHERE key = :key"
_ADD_RECORD = f"""
    INSERT OR IGNORE INTO history ({_EXECUTION}, identity, process, rowid)
    VALUES (:{_EXECUTION.replace(", ", ", :")}, :identity, :process,
        (SELECT rowid FROM history WHERE identity = :identity AND ref = :ref AND id = :id))"""
_RECORD = _ADD_RECORD.replace("IGNORE", "REPLACE")
_HISTORY = f"""
    SELECT {_EXECUTION} FROM history WHERE ref = :ref ORDER BY started_at DESC, rowid DESC LIMIT :limit"""
_EACH_REF = """
    WITH RECURSIVE refs (ref) AS (  -- from ref to ref through the index, not from record to record
        SELECT min(ref) FROM history
        UNION ALL
        SELECT (SELECT min(ref) FROM history WHERE ref > refs.ref) FROM refs WHERE ref IS NOT NULL)"""
_ALL_HISTORY = f"""
    {_EACH_REF} SELECT history.{_EXECUTION} FROM refs CROSS JOIN history ON history.rowid IN (
        SELECT rowid FROM history AS own WHERE own.ref = refs.ref
        ORDER BY own.started_at DESC, own.rowid DESC LIMIT :limit)"""
_REFS = f"{_EACH_REF} SELECT ref FROM refs WHERE ref IS NOT NULL"
_NEWEST_REFS = f"""
    {_REFS} ORDER BY (SELECT max(started_at) FROM history WHERE ref = refs.ref) DESC LIMIT :limit"""
_DELETE_HISTORY = "DELETE FROM history WHERE ref = :ref"
_ADD_RUN = f"""
    INSERT OR IGNORE INTO background ({_BACKGROUND}) VALUES (:{_BACKGROUND.replace(", ", ", :")})"""
_SET_RUN = _ADD_RUN.replace("IGNORE", "REPLACE")
_GET_RUN = f"SELECT {_BACKGROUND} FROM background WHERE id = :id"
_LIST_RUNS = f"SELECT {_BACKGROUND} FROM background ORDER BY id"
_DELETE_RUN = "DELETE FROM background WHERE id = :id"
_ADD_BUCKET = "INSERT OR IGNORE INTO process_buckets (bucket) VALUES (:bucket)"
_LIST_BUCKETS = "SELECT bucket FROM process_buckets"
_DELETE_BUCKET = "DELETE FROM process_buckets WHERE bucket = :bucket"
_DELETE_VARS = "DELETE FROM process_vars WHERE bucket = :bucket"
_ADD_VAR = "INSERT OR IGNORE INTO process_vars (bucket, key, value) VALUES (:bucket, :key, :value)"
_SET_VAR = _ADD_VAR.replace("IGNORE", "REPLACE")
_GET_VAR = """
    SELECT value FROM process_vars WHERE bucket IN (:bucket, 'root') AND key = :key
    ORDER BY bucket = 'root' LIMIT 1"""
_LIST_VARS = "SELECT bucket, key, value FROM process_vars WHERE bucket IN (:bucket, 'root')"
_DELETE_VAR = "DELETE FROM process_vars WHERE bucket = :bucket AND key = :key"
_RUNNING = """
    SELECT 'history', ref, id, pid, started_at, process FROM history WHERE status = 'running'
    UNION ALL SELECT 'background', ref, id, pid, started_at, '' FROM background WHERE status = 'running'"""
_PRUNE_STEP = 500  # rows, or pages: milliseconds, or tens of them
_PRUNE = {table: (refs, f"""
    SELECT started_at, {key} FROM {table} WHERE ref = :ref AND status <> 'running'
    ORDER BY started_at DESC, {key} DESC LIMIT 1 OFFSET :keep""", f"""
    DELETE FROM {table} WHERE {key} IN (
        SELECT {key} FROM {table} WHERE ref = :ref AND status <> 'running'
            AND (started_at, {key}) <= (:start, :key) LIMIT {_PRUNE_STEP})""")
    for table, key, refs in (
        ("history", "rowid", _REFS), ("background", "id", "SELECT DISTINCT ref FROM background"))}
_OBJECTS = """
    SELECT CAST(type AS BLOB), CAST(name AS BLOB), CAST(tbl_name AS BLOB), CAST(sql AS BLOB)
    FROM sqlite_master"""
_DIGITS = set("0123456789,.+- ")  # all that is harmless in the parentheses of an added column


def _is_complete(objects: Iterable[Row]) -> bool:
    """Whether these _OBJECTS hold the whole schema. DatabaseError for another layout and for what would run
    by itself, as a view, trigger or expression does, or delete, as a unique index. Additions are fine."""
    missing = set(_SCHEMA)
    for row in objects:
        kind, name, table, text = (_str(cell or b"") for cell in row)
        if own := _SCHEMA.get(_folded(name)):
            # ALTER TABLE puts a column at the end, but before the constraints
            at = own.find(", PRIMARY") if ", PRIMARY" in own else own.rfind(")")
            at = len(own) if kind == "index" else at
            head, tail = f"CREATE {own[:at]}", own[at:]
            added = text[len(head) : len(text) - len(tail)]
            braces = [each.partition(")")[0] for each in added.split("(")[1:]]  # of VARCHAR(10), not of CHECK
            fits = text == head + added + tail and added[:1] in ("", ",") and set("".join(braces)) <= _DIGITS
            missing.discard(_folded(name))
        else:  # the indexes of PRIMARY KEYs have no text
            plain = text[:12] in ("", "CREATE INDEX") and text.replace(name, "", 1).count("(") <= 1
            fits = plain or _folded(table) not in _TABLES
        if not fits:
            raise sqlite3.DatabaseError(f"its {kind} {name!r} is not the store's")
    return not missing


# ---- connections -------------------------------------------------------------------------------------------

_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_UNREADABLE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR)
_WAL_LIMIT = 4 << 20  # bytes; SQLite's own default is 1,000 pages
_FORK_PATIENCE = 10.0  # seconds


class _Process:
    """What this process has open. A fork waits for operations of other threads: none may be inside SQLite."""
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.operations: set[int] = set()  # the threads that are in one
        self.forking = self.forks = 0
        # weak: an interrupt at the very beginning of __exit__() leaves one open, which its __del__() closes
        self.connections: set[_weakref.ref[_Connection]] = set()
        self.transactions: dict[tuple[int, str], _weakref.ref[_Session]] = {}  # by thread and file
        self.lost: set[str] = set()  # files open at the fork: SQLite believes in locks that a child hasn't
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self.before, after_in_parent=self.after, after_in_child=self.in_child)

    def open_connections(self) -> list[_Connection]:
        return [connection for each in [*self.connections] if (connection := each())]

    def stand_back(self) -> None:
        with self.lock:
            self.operations.discard(get_ident())
            self.changed.notify_all()
            while self.forking:
                self.changed.wait()
            self.operations.add(get_ident())

    def before(self) -> None:
        own = {get_ident()}
        self.lock.acquire()
        self.forking += 1
        self.changed.wait_for(lambda: self.operations <= own, _FORK_PATIENCE)

    def after(self) -> None:
        self.forking -= 1
        self.changed.notify_all()
        self.lock.release()

    def in_child(self) -> None:
        self.changed = threading.Condition(self.lock)
        self.forks += 1
        self.forking = 1
        self.operations &= {get_ident()}
        kept: list[Any] = []
        for connection in self.open_connections():  # closing one here would undo what the parent writes
            self.lost.add(connection.file)
            kept.append(connection.sql)
            connection.sql = None
        if kept:  # for good
            kept.append(kept)
            gc.freeze()
        self.connections.clear()
        self.transactions.clear()
        self.after()


_process = _Process()

_REASONS = {
    sqlite3.SQLITE_FULL: "the disk is full, nothing of this was changed: make room",
    sqlite3.SQLITE_READONLY: "it can't be written to: check the rights of file and folder",
    sqlite3.SQLITE_TOOBIG: "a value is larger than 1,000,000,000 bytes: keep it in a file",
    sqlite3.SQLITE_CANTOPEN: "it can't be opened: a full disk, another's folder, a path over 512 bytes?",
    sqlite3.SQLITE_IOERR: "it can't be read or written: is the disk full, or a network one (without locks)?",
}


def _code(error: Exception) -> int:
    if isinstance(error, OverflowError):
        return sqlite3.SQLITE_TOOBIG
    code: int = getattr(error, "sqlite_errorcode", 0)
    if code == sqlite3.SQLITE_IOERR_DELETE_NOENT:  # others have deleted a -wal or -journal first
        return sqlite3.SQLITE_BUSY
    return code & 0xFF


def _translated(error: Exception, file: str) -> StoreError:
    if isinstance(error, StoreError):  # a StoreBusyError is an OSError too
        return error
    code, kind = _code(error), StoreError
    if isinstance(error, OSError):
        reason = f"{error.strerror or error}: name a path that you may read and write"
    elif code in _BUSY:
        kind, reason = StoreBusyError, f"another process has it locked ({error}): try again"
    elif code in _REASONS:
        reason = f"{_REASONS[code]} ({error})"
    elif code == sqlite3.SQLITE_NOTADB:
        kind, reason = CorruptStoreError, _what_it_is(file)
    else:
        detail = f" ({error})" if code or type(error) is not sqlite3.OperationalError else ""
        kind, reason = CorruptStoreError, f"damaged, or no store{detail}: restore a backup, or move it away"
    return _error(kind, file, reason)


def _what_it_is(file: str) -> str:
    """What a file is that SQLite has refused: only then, since closing one drops the process's locks."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(1 << 17)
    except OSError:
        start = b""
    if b"\xed\xda\x0c\xed" in (start[at + 16 : at + 20] for at in (0, *(512 << n for n in range(8)))):
        return "a bbolt file, as the original's store.db is: bring it over with `flowstore import FILE`"
    return "no SQLite file, so no store: name another path, or move the file away"


def _refuse_planted(path: str, *endings: str) -> bool:
    """Whether anyone may write to the folder of a path; what another user has put there is refused."""
    try:
        folder = os.stat(os.path.dirname(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    shared = os.name == "posix" and bool(folder.st_mode & stat.S_IWOTH)
    for ending in endings if shared else ():
        try:
            owner = os.lstat(path + ending).st_uid
        except FileNotFoundError:
            continue
        if owner not in (os.geteuid(), folder.st_uid):
            raise _error(StoreError, path + ending, "another user's, and anyone may write to its folder:"
                         " name a path in a folder of your own")
    return shared


def _make_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        _make_folder(os.path.dirname(folder))
        try:
            os.mkdir(folder, 0o700)
            os.chmod(folder, 0o700)
        except FileExistsError:
            pass


def _make_file(file: str) -> None:
    with _process.lock:  # closing it drops all locks on the file: no thread may have opened it by then
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        os.chmod(file, 0o600)


@lru_cache
def _uri(file: str) -> str:
    return "file:" + "".join(f"%{byte:02X}" for byte in os.fsencode(file))


def _connect(file: str, options: str = "mode=rw") -> SQL:
    with _process.lock:
        return sqlite3.connect(f"{_uri(file)}?{options}", uri=True, timeout=0, isolation_level=None,
                               check_same_thread=False)


def _create(sql: SQL) -> None:
    for definition in _SCHEMA.values():
        sql.execute("CREATE " + definition.replace(" ", " IF NOT EXISTS ", 1))
    sql.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    sql.execute(f"PRAGMA user_version = {_VERSION}")


def _read_blank(work: Work[T]) -> T:
    sql = sqlite3.connect(":memory:", isolation_level=None)
    try:
        _create(sql)
        return work(sql)
    finally:
        sql.close()


class _Connection:
    """A connection to a file: only here it is opened and recognised, locks are awaited, transactions begun
    and ended. `with` encloses each use: a fork waits for its end, and errors become StoreErrors."""
    sql: Any = None  # the sqlite3.Connection, while it is open

    def __init__(self, store: SQLiteDataStore, held: bool = False) -> None:
        self.store, self.file = store, store._file
        self.held = held  # over several uses
        self.inode = 0  # of the file that was opened
        self.settings = ""  # those that are made
        self.cookie: int | None = None  # of the schema, when it was found to be complete
        self.seen: tuple[int, ...] | None = None  # look() at a file that is opened as one at rest
        self.waiting_since = self.pause = self.measured = 0.0

    def __enter__(self) -> Self:
        _process.operations.add(get_ident())
        if _process.forking:
            _process.stand_back()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if not self.held:
                self.close()
        finally:
            _process.operations.discard(get_ident())
            if _process.forking:
                with _process.lock:
                    _process.changed.notify_all()
        if isinstance(error, (sqlite3.Error, OSError, OverflowError, UnicodeError)):
            # an error of the sqlite3 module itself has no code, and may quote a value
            quotes = isinstance(error, sqlite3.Error) and not hasattr(error, "sqlite_errorcode")
            raise _translated(error, self.file) from (None if quotes else error)

    def open(self, make: bool, look: bool = False) -> bool:
        """Open the file, made where it is missing; False where it is missing and not to be made."""
        if self.file in _process.lost:
            raise RuntimeError(f"{self.file}: a session had it open when this process was forked: use spawn")
        while not self.sql:
            try:
                mode, self.inode = os.stat(self.file)[:2]
                if not stat.S_ISREG(mode):
                    raise _error(StoreError, self.file, "this is no regular file: name another path")
                if self.store._shared:
                    _refuse_planted(self.file, "", "-wal", "-shm", "-journal")
                seen = self.look() if look or not os.access(self.file, os.W_OK) else None
                self.seen = seen if seen and not seen[-1] else None  # with a WAL somebody writes to it
                self.sql = _connect(self.file, "mode=ro&immutable=1" if self.seen else "mode=rw")
                _process.connections.add(_weakref.ref(self, _process.connections.discard))
                self.settings, self.cookie = "", None
            except (FileNotFoundError, NotADirectoryError):
                if not make:
                    return False
                _make_folder(os.path.dirname(self.file))
                try:
                    _make_file(self.file)
                except FileExistsError:
                    pass
            except sqlite3.OperationalError:
                if not self.has_moved():
                    raise
        return True

    def close(self) -> None:
        sql, self.sql = self.sql, None
        if sql:
            sql.close()
            _process.connections.discard(_weakref.ref(self))

    __del__ = close

    def has_moved(self) -> bool:
        """Whether others have destroyed the file that was opened."""
        try:
            return os.stat(self.file).st_ino != self.inode
        except FileNotFoundError:
            return True

    def look(self) -> tuple[int, ...]:
        """The state of a file; last the size of its WAL."""
        status = os.stat(self.file)
        try:
            wal = os.stat(self.file + "-wal").st_size
        except FileNotFoundError:
            wal = 0
        return status.st_ino, status.st_mtime_ns, status.st_size, wal

    def wait(self) -> None:
        """Sleep a moment, since others are at work; StoreBusyError after the timeout."""
        now = time.monotonic()
        if not self.waiting_since:
            self.waiting_since, self.pause = now, 0.0005
        waited, timeout = now - self.waiting_since, self.store._timeout
        if waited >= timeout:
            raise _error(StoreBusyError, self.file, "another process has kept the store locked for"
                         f" {waited:.1f} seconds: try again, or wait longer by timeout=")
        # SQLite's handler starves the unluckiest of many (2.5 s of 64 on 2 cores): here who has waited longer
        # tries oftener; but if most of 64 try every 2 ms, the one that has the lock finds no time to go on
        most = 0.064 if waited < 0.15 else 0.010 if waited < 0.25 else 0.005 if waited < 0.35 else 0.003
        self.pause = min(self.pause * 2, most)
        jitter = 0.5 + time.perf_counter_ns() % 1000 / 1000
        time.sleep(min(self.pause * jitter, timeout - waited))

    def wait_out(self, error: Exception) -> None:
        """Wait, to try again, after an error that is others' doing; raise any other."""
        self.rollback()
        if _code(error) not in _BUSY:
            if not self.has_moved():
                raise error
            self.close()
        self.wait()

    def begin(self, write: bool) -> bool:
        """Take the write lock, or a snapshot if there is a file. Whether a complete store is in it."""
        transaction = _process.transactions.get((get_ident(), self.file)) if write else None
        if transaction and transaction():
            raise RuntimeError(f"{self.file}: this thread, in a transaction() on it, would wait for itself")
        if write and self.seen:
            self.close()
        look = False
        while self.sql or self.open(write, look):
            if write and self.seen:  # SQLite would begin a read
                raise _error(StoreError, self.file, _REASONS[sqlite3.SQLITE_READONLY])
            try:
                settings = _SETTINGS if write else self.settings or _READ_SETTINGS
                if self.settings != settings:  # here, since some of them read the file
                    self.sql.executescript(settings)
                    self.settings = settings
                known = self.cookie is not None  # and in WAL mode: SQLite keeps a lock, so that it can't move
                self.sql.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                complete = self.identify()
                if known or not self.has_moved():
                    return complete
                self.close()
                self.wait()
            except (sqlite3.Error, FileNotFoundError) as error:
                if write or self.seen or _code(error) not in _UNREADABLE or self.has_moved():
                    self.wait_out(error)
                else:  # no -shm file can be had to read by: read as it is what nobody writes to
                    self.close()
                    look = not self.look()[-1]
                    if not look:
                        self.wait()
            except BaseException:
                self.rollback()
                raise
        return False

    def identify(self) -> bool:
        """Whether the file is a complete store, not a blank or older one; another's is refused."""
        [cookie] = self.sql.execute("PRAGMA schema_version").fetchone()
        if cookie == self.cookie:
            return True
        [application] = self.sql.execute("PRAGMA application_id").fetchone()
        [version] = self.sql.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION_ID and (application or version or cookie):
            raise _error(CorruptStoreError, self.file, "another program's SQLite file (application id"
                         f" {application:#x}), so no store: name another path")
        if not application and 0 < os.path.getsize(self.file) < 512:  # to SQLite that is empty
            raise _error(CorruptStoreError, self.file, _what_it_is(self.file))
        if version > _VERSION:
            raise _error(StoreError, self.file, f"it needs a newer flowstore (schema {version}): update")
        if cookie != self.store._known_schema:
            if not _is_complete(self.sql.execute(_OBJECTS).fetchall()):
                return False
            self.store._known_schema = cookie
        self.cookie = cookie if version == _VERSION else None
        return self.cookie is not None

    def rollback(self) -> None:
        if self.sql and self.sql.in_transaction:
            self.sql.execute("ROLLBACK")

    def commit(self) -> None:
        while self.sql.in_transaction:
            try:
                self.sql.execute("COMMIT")
            except sqlite3.OperationalError as error:  # busy only where somebody has taken it out of WAL mode
                if _code(error) not in _BUSY:
                    raise
                self.wait()
        now = time.monotonic()
        if now < self.measured + 0.005:  # s: there is time for a dozen writes in between
            return
        self.measured = now
        try:
            if os.stat(self.file + "-wal").st_size > _WAL_LIMIT:
                self.sql.execute("BEGIN IMMEDIATE")
                self.checkpoint()
        except (OSError, sqlite3.Error):
            pass  # what was to be written is; the WAL's size is the next writer's care

    def checkpoint(self) -> None:
        """End the transaction with a checkpoint, after which the next writer starts the WAL anew.

        Until SQLite 3.51.2 a commit that does so between two checkpoints can lose pages. Nobody can while
        this connection has the write lock, and a passive one, on another, waits for no reader.
        """
        try:
            other = _connect(self.file)
            try:
                other.executescript(f"{_SETTINGS} PRAGMA wal_checkpoint(PASSIVE)")
            finally:
                other.close()
        finally:
            self.rollback()

    def read(self, work: Work[T]) -> T:
        """Run work in a snapshot; a missing or blank file reads as an empty store."""
        self.waiting_since = 0.0
        while True:
            try:
                made = self.begin(write=False) or (self.sql and self.sql.execute(
                    "SELECT 1 FROM sqlite_master WHERE name = 'cache'").fetchone())
                result = work(self.sql) if made else _read_blank(work)
                if not self.seen or self.seen == self.look():
                    return result
            except sqlite3.Error:
                if not self.seen or self.seen == self.look():
                    raise
            finally:
                if self.held:
                    self.rollback()
                else:
                    self.close()
            self.close()  # somebody has written to what could only be looked at
            self.wait()

    def begin_write(self) -> None:
        self.waiting_since = 0.0
        while not self.begin(write=True):
            self.rollback()
            self.initialise()

    def write(self, work: Work[T]) -> T:
        self.begin_write()
        try:
            result = work(self.sql)
            self.commit()
            return result
        finally:
            self.rollback()

    def prepare(self) -> None:
        self.waiting_since = 0.0
        while True:
            complete = self.begin(write=False)
            self.rollback()
            if complete and (self.seen or self.sql.execute("PRAGMA journal_mode").fetchone() == ("wal",)):
                return
            self.initialise()

    def initialise(self) -> None:
        """Try to make a store of a missing or blank file, or to complete an older one."""
        if self.seen:
            self.close()
        self.open(make=True)
        sql = self.sql
        try:
            if not os.path.getsize(self.file):
                os.chmod(self.file, 0o600)
            sql.execute("PRAGMA auto_vacuum = INCREMENTAL")
            [mode] = sql.execute("PRAGMA journal_mode = WAL").fetchone()
        except (sqlite3.OperationalError, FileNotFoundError) as error:
            self.wait_out(error)
            return
        if mode != "wal":
            raise _error(StoreError, self.file, "SQLite can't keep a WAL here: name a store on a local disk")
        self.cookie = None
        try:
            if not self.begin(write=True) and self.sql is sql:
                _create(sql)
                if not self.identify():
                    raise sqlite3.DatabaseError("its tables aren't the store's")
                sql.execute("COMMIT")
        finally:
            self.rollback()


# ---- the store ---------------------------------------------------------------------------------------------

class _Operations(DataStore):
    """The operations, each its SQL and a line or two around it, on _read() and _write()."""
    path: str

    @abstractmethod
    def _read(self, work: Work[T], snapshot: bool = False) -> T:
        """Run work on a connection; with snapshot, all its statements see one moment."""

    @abstractmethod
    def _write(self, work: Work[T]) -> T:
        """Run work on a connection in a write transaction."""

    def _fetch(self, statement: str, load: Load[T], cells: Cells | None = None, **names: Any) -> list[T]:
        values = _checked(names, cells)

        def work(sql: SQL) -> list[T]:
            rows = sql.execute(statement, values)
            try:
                return [*load(rows)]
            finally:
                rows.close()  # else an error would keep it, and with it the file open

        return self._read(work)

    def _fetch_each(self, statement: str, load: Load[T], what: str, names: Iterable[str],
                    **cells: object) -> dict[str, list[T]]:
        """What load makes of the rows of each name that has any."""
        if isinstance(names, str):
            raise TypeError(f"{what}s must be several str, not one")
        values = {name: _checked({what: name}, cells) for name in names}

        def work(sql: SQL) -> dict[str, list[T]]:
            rows = ((name, sql.execute(statement, value).fetchall()) for name, value in values.items())
            return {name: [*load(found)] for name, found in rows if found}

        return self._read(work, snapshot=True)

    def _execute(self, *statements: str, cells: Cells | None = None, **names: Any) -> int:
        """Run the statements in one transaction; how many rows they changed."""
        values = _checked(names, cells)
        return self._write(lambda sql: sum([sql.execute(each, values).rowcount for each in statements]))

    # -- cache
    def set_cache_entry(self, key: str, value: bytes) -> None:
        try:
            view = memoryview(value)
        except TypeError:
            raise TypeError(f"value must be bytes-like, not {type(value).__name__}") from None
        self._execute(_SET_CACHE, cells={"value": view if view.c_contiguous else view.tobytes()}, key=key)

    def get_cache_entry(self, key: str) -> bytes | None:
        for value in self._fetch(_GET_CACHE, _load_blobs, key=key):
            return value
        return None

    def get_cache_entries(self, keys: Iterable[str]) -> dict[str, bytes]:
        found = self._fetch_each(_GET_CACHE, _load_blobs, "key", keys)
        return {key: value for key, [value] in found.items()}

    def delete_cache_entry(self, key: str) -> None:
        self._execute(_DELETE_CACHE, key=key)

    # -- history
    def record_execution(self, record: ExecutionRecord) -> None:
        self._execute(_RECORD, cells=_history_row(record))

    def get_execution_history(self, ref: str, limit: int = 0) -> list[ExecutionRecord]:
        return self._fetch(_HISTORY, _load_executions, {"limit": _limit(limit)}, ref=ref)[::-1]

    def get_execution_histories(self, refs: Iterable[str], limit: int = 0) -> Histories:
        found = self._fetch_each(_HISTORY, _load_executions, "ref", refs, limit=_limit(limit))
        return {ref: records[::-1] for ref, records in found.items()}

    def get_all_execution_history(self, limit_per_ref: int = 0) -> Histories:
        def load(rows: Iterable[Row]) -> Iterable[ExecutionRecord]:  # by ref, there in the order of insertion
            each = (sorted(own, key=lambda row: _str(row[1])) for _, own in groupby(rows, lambda row: row[0]))
            return _load_executions(row for own in each for row in own)

        histories: Histories = {}
        for record in self._fetch(_ALL_HISTORY, load, {"limit": _limit(limit_per_ref)}):
            histories.setdefault(record.ref, []).append(record)
        return {ref: histories[ref] for ref in _ordered(histories)}

    def list_execution_refs(self) -> list[str]:
        return _ordered(self._fetch(_REFS, _load_texts))

    def delete_execution_history(self, ref: str) -> None:
        self._execute(_DELETE_HISTORY, ref=ref)

    # -- background runs
    def save_background_run(self, run: BackgroundRun) -> None:
        self._execute(_SET_RUN, cells=_row(BackgroundRun, run), id=run.id, ref=run.ref)

    def get_background_run(self, id: str) -> BackgroundRun:
        for run in self._fetch(_GET_RUN, _load_background, id=id):
            return run
        raise _error(NotFoundError, self.path, f"there is no background run {id!r}")

    def get_background_runs(self, ids: Iterable[str]) -> dict[str, BackgroundRun]:
        return {id: run for id, [run] in self._fetch_each(_GET_RUN, _load_background, "id", ids).items()}

    def list_background_runs(self) -> list[BackgroundRun]:
        runs = self._fetch(_LIST_RUNS, _load_background)
        if not "".join(run.id for run in runs).isascii():  # else SQLite's order is that of the bytes
            runs.sort(key=lambda run: _utf8(run.id))
        return runs

    def delete_background_run(self, id: str) -> None:
        self._execute(_DELETE_RUN, id=id)

    # -- process variables
    def create_process_bucket(self, bucket: str) -> None:
        self._execute(_ADD_BUCKET, bucket=bucket)

    def delete_process_bucket(self, bucket: str) -> None:
        self._execute(_DELETE_VARS, _DELETE_BUCKET, bucket=bucket)

    def list_process_buckets(self) -> list[str]:
        """The scopes that were made or written to and not deleted, in order."""
        return _ordered(self._fetch(_LIST_BUCKETS, _load_texts))

    def set_process_var(self, bucket: str, key: str, value: str) -> None:
        self._execute(_SET_VAR, _ADD_BUCKET, cells={"value": _text("value", value)}, bucket=bucket, key=key)

    def get_process_var(self, bucket: str, key: str) -> str:
        for value in self._fetch(_GET_VAR, _load_texts, bucket=bucket, key=key):
            return value
        root = "" if bucket == ROOT_BUCKET else " or in root"
        raise _error(NotFoundError, self.path, f"there is no variable {key!r} in the scope {bucket!r}{root}")

    def _variables(self, bucket: str) -> tuple[dict[str, str], dict[str, str]]:
        """Those of the scope, and those of root."""
        rows = self._fetch(_LIST_VARS, lambda rows: [[*map(_str, row)] for row in rows], bucket=bucket)
        own, root = ({key: value for scope, key, value in rows if scope == each}
                     for each in (bucket, ROOT_BUCKET))
        return own, root

    def get_all_process_vars(self, bucket: str) -> dict[str, str]:
        own, root = self._variables(bucket)
        merged = root | own
        return {key: merged[key] for key in _ordered(merged)}

    def get_process_var_keys(self, bucket: str) -> list[str]:
        own, root = self._variables(bucket)
        return _ordered(own) + _ordered(root.keys() - own.keys())

    def delete_process_var(self, bucket: str, key: str) -> None:
        self._execute(_DELETE_VAR, bucket=bucket, key=key)


def _limit(limit: object) -> int:
    return max(_integer("limit", limit), 0) or -1


def _history_row(record: ExecutionRecord, process: str = "") -> Cells:
    import zlib

    row = _row(ExecutionRecord, record)
    _name("ref", record.ref)
    identity = zlib.crc32(_utf8(f"{record.ref}\0{record.id}")) if record.id else None
    return {**row, "identity": identity, "process": process}


class SQLiteDataStore(_Operations):
    """A store in an SQLite file (None or "": default_path()), made where it is missing, with its folder. Any
    number of processes and threads may use it; each operation waits up to `timeout` seconds for others."""
    def __init__(self, path: Path | None = None, *, timeout: float = 3.0) -> None:
        _check("timeout", timeout, int if isinstance(timeout, int) else float)
        if not timeout >= 0:
            raise ValueError("timeout must be 0 or more seconds")
        path = "" if path is None else os.fsdecode(path)
        if path == ":memory:" or "\0" in path:
            raise ValueError("a store is a file, since each operation opens it; and no path has a NUL")
        try:
            self.path = os.path.abspath(path or default_path())
            _refuse_planted(self.path, "")
            self._file = os.path.realpath(self.path)
            self._shared = _refuse_planted(self._file)
        except OSError as error:  # the current folder has been removed
            raise _translated(error, path) from error
        self._timeout = min(timeout, 1e6)  # about what SQLite and time.sleep() understand
        self._known_schema = -1  # SQLite's schema cookie when it was last found to be ours
        self._prepare()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def _prepare(self) -> None:
        with _Connection(self) as connection:
            connection.prepare()

    def _exists(self) -> bool:
        with _Connection(self) as connection:
            return connection.open(make=False)

    def _read(self, work: Work[T], snapshot: bool = False) -> T:
        with _Connection(self) as connection:
            return connection.read(work)

    def _write(self, work: Work[T]) -> T:
        with _Connection(self) as connection:
            return connection.write(work)

    def session(self) -> AbstractContextManager[_Session]:
        """Yields a store whose operations share a connection, each in its own transaction: for loops.
        RuntimeError where it is used after its end, from another thread or after a fork."""
        return _Session(self, False)

    def transaction(self) -> AbstractContextManager[_Session]:
        return _Session(self, True)

    def execution(self, ref: str, *, id: str | None = None, **fields: str) -> Execution:
        """A context manager that records a run of ref, see Execution. Its id, else a UUID, names its scope.
        fields: label, command, spec, log_archive_id, working_dir, source, client_name, session_id."""
        return Execution(self, ref, id, fields)

    def reconcile(self) -> int:
        """Mark running records and background runs as failed whose process is gone; returns how many. Their
        scopes go. Left alone: another machine's, another pid namespace's, those without a pid."""
        return self._mark(self._gone())

    def _gone(self) -> list[Row]:
        """The rows of _RUNNING whose process is gone."""
        return self._fetch(_RUNNING, lambda rows: [row for row in rows if _is_gone(*row[3:])])

    def _mark(self, gone: list[Row]) -> int:
        return self._write(lambda sql: _mark_gone(sql, gone)) if gone else 0

    def prune(self, keep: int | None = None, before: datetime | None = None) -> PruneSummary:
        """Delete, per ref, all but the newest `keep` records and background runs, and those that started
        before `before`. Running ones stay and don't count. In small steps: no writer waits for long."""
        if keep is not None and _integer("keep", keep) < 0:
            raise ValueError("keep must be 0 or more")
        limits: list[Row] = [] if before is None else [(_instant("before", before), None)]
        deleted = dict.fromkeys(_PRUNE, 0)
        with self.session() as session:
            for table, (refs, newest, delete) in _PRUNE.items():
                for (ref,) in session._fetch(refs, iter):
                    # the newest that goes, by start and key
                    beyond = [] if keep is None else session._fetch(newest, iter, {"ref": ref, "keep": keep})
                    for start, key in (*limits, *beyond):
                        cells = {"ref": ref, "start": start, "key": key}
                        while count := session._execute(delete, cells=cells):
                            deleted[table] += count
            free: Sequence[Row] = ()
            while free != (free := session._fetch("PRAGMA freelist_count", iter)) and free[0][0]:
                session._write(lambda sql: [*sql.execute(f"PRAGMA incremental_vacuum({_PRUNE_STEP})")])
            with session._connection as connection:
                connection.begin_write()
                connection.checkpoint()  # which cuts the file
        return PruneSummary(**deleted)

    def backup(self, target: Path) -> None:
        """Copy the store, as it is at one moment, to a new file; StoreError where something is there."""
        target = os.path.abspath(os.fsdecode(target))
        with _Connection(self) as connection:
            if not connection.open(make=False):
                raise _error(StoreError, self.path, "there is no store here to copy")
            connection.read(lambda sql: None)  # is it a store?
            try:
                _make_file(target)
            except OSError as error:  # FileExistsError among them
                raise _error(StoreError, target, f"{error.strerror}: name a new file for it") from error
            try:
                connection.read(lambda sql: _copy(sql, target))
            except BaseException as error:
                os.unlink(target)
                if isinstance(error, sqlite3.Error) and _code(error) in _REASONS:
                    raise _translated(error, target) from error
                raise


def _copy(sql: SQL, target: str) -> None:
    copy = _connect(target)
    try:
        copy.executescript(_SETTINGS)
        sql.backup(copy)
    finally:
        copy.close()


class _Session(_Operations):
    """What session() and transaction() yield: the operations on one connection, for one thread."""
    def __init__(self, store: SQLiteDataStore, atomic: bool, connection: _Connection | None = None) -> None:
        self.path = store.path
        self._store = store
        self._atomic = atomic  # a transaction, in which all operations take effect together
        self._connection = connection or _Connection(store, held=True)
        self._borrowed = connection is not None
        self._owner: tuple[int, int] | None = None  # while it is open: its thread, and the forks before it

    def __enter__(self) -> Self:
        if self._owner:
            raise RuntimeError(f"{self.path}: this session or transaction is open already")
        self._owner = get_ident(), _process.forks
        try:
            with self._connection as connection:
                if self._atomic:
                    connection.begin_write()
                    _process.transactions[self._owner[0], connection.file] = _weakref.ref(self)
                else:
                    connection.prepare()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._owner and self._owner[1] == _process.forks:  # else the parent's: closing it would harm that
            try:
                if self._atomic and kind is None:
                    with self._connection as connection:
                        self._check_alive()
                        connection.commit()
            finally:
                self._end()

    def _end(self) -> None:
        thread = self._owner[0] if self._owner else 0
        with self._connection as connection:
            transaction = _process.transactions.get((thread, connection.file))
            if self._atomic and (not transaction or transaction() in (None, self)):
                _process.transactions.pop((thread, connection.file), None)
                connection.rollback()
            if not self._borrowed:
                connection.close()
        self._owner = None

    def _check_open(self) -> None:
        if self._owner != (get_ident(), _process.forks):
            reason = "is of another thread or before a fork: open one here" if self._owner else "is not open"
            raise RuntimeError(f"{self.path}: this session or transaction {reason}")
        if self._atomic:
            self._check_alive()

    def _check_alive(self) -> None:
        if not (self._connection.sql and self._connection.sql.in_transaction):
            raise _error(StoreError, self.path, "SQLite has rolled this transaction back (a full disk?):"
                         " nothing of it was changed; begin it again")

    def _read(self, work: Work[T], snapshot: bool = False) -> T:
        self._check_open()
        with self._connection as connection:
            sql = connection.sql
            if sql and sql.in_transaction:
                return work(sql)
            if sql and not snapshot and not connection.seen:
                try:
                    return work(sql)
                except sqlite3.OperationalError:
                    pass  # somebody has the file to himself, or has emptied it: with more care then
            return connection.read(work)

    def _write(self, work: Work[T]) -> T:
        if self._atomic:
            return self._read(work)
        self._check_open()
        with self._connection as connection:
            return connection.write(work)

    def transaction(self) -> AbstractContextManager[_Session]:
        self._check_open()
        if self._atomic:
            raise RuntimeError(f"{self.path}: a transaction can't be nested in another")
        return _Session(self._store, True, self._connection)


# ---- the end of a store, and moving old data ---------------------------------------------------------------

class _ExistingStore(SQLiteDataStore):
    """A store that isn't made by naming it."""
    def _prepare(self) -> None:
        pass


def destroy_store(path: Path | None = None) -> None:
    """Remove a store with its file; a missing one is no error, what isn't a store is refused. StoreBusyError
    where somebody keeps it open for longer than 3 seconds: the empty file is left."""
    store = _ExistingStore(path)
    with _Connection(store) as connection:
        if not connection.open(make=False):
            return
        if connection.begin(write=True):  # to be alone with it already here would starve under load
            for name in _plain_tables(connection.sql):
                connection.sql.execute(f"DROP TABLE {_quoted(name)}")
            connection.sql.execute("PRAGMA user_version = 0")
            connection.sql.execute("COMMIT")
        connection.rollback()
        connection.waiting_since = 0.0
        try:
            while not _unlink(connection):
                connection.close()
        except StoreBusyError:
            raise _error(StoreBusyError, store.path, "the store has been emptied, but the file is left,"
                         " since another process has it open: end that and do it again") from None


def _unlink(connection: _Connection) -> bool:
    """Unlink an emptied file; False where that is to be tried again, with the file that is at the path then.
    In WAL mode others could go on writing to it when it has no name, and a new file would meet its -wal."""
    if connection.begin(write=False) or not connection.sql:
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
        if os.name == "nt":  # it can't unlink what is open, here or elsewhere
            connection.close()
        os.unlink(connection.file)
        return True
    except sqlite3.OperationalError as error:
        connection.wait_out(error)
        return False


def migrate_process_buckets(path: Path | None = None) -> list[str]:
    """Move other tables with just the columns `key` and `value` into scopes of their names; returns these.
    Variables that are there stay; NULL becomes "", a BLOB or number its text; the last of equal keys wins."""
    if not _ExistingStore(path)._exists():
        return []
    store = SQLiteDataStore(path)
    return store._write(_move_legacy_tables) if store._read(_legacy_tables) else []


def _plain_tables(sql: SQL, which: str = "true") -> list[str]:
    """The tables that are neither virtual nor SQLite's own, nor of a name that is no UTF-8."""
    sql.text_factory = _str
    rows = sql.execute(f"""
        SELECT CAST(name AS TEXT) FROM sqlite_master AS found
        WHERE type = 'table' AND sql LIKE 'CREATE TABLE %' AND {which}""")
    return [name for name, in rows if _folded(name)[:7] != "sqlite_" and isinstance(_text("name", name), str)]


def _legacy_tables(sql: SQL) -> list[str]:
    names = _plain_tables(sql, """(SELECT count(*) = 2 AND sum(hidden = 0 AND name IN ('key', 'value')) = 2
        FROM pragma_table_xinfo(found.name))""")
    return _ordered(name for name in names if name and _folded(name) not in _TABLES)


def _move_legacy_tables(sql: SQL) -> list[str]:
    moved = _legacy_tables(sql)
    for bucket in moved:
        sql.execute(_ADD_BUCKET, {"bucket": bucket})
        # in the table's own order, from its end, since _ADD_VAR lets stay what is there
        rows = sql.execute(f"SELECT key, value FROM {_quoted(bucket)} NOT INDEXED").fetchall()
        for key, value in reversed(rows):
            cells = {"bucket": bucket, "key": _legacy_text(key), "value": _legacy_text(value)}
            sql.execute(_ADD_VAR, cells)
        sql.execute(f"DROP TABLE {_quoted(bucket)}")
    return moved


def _legacy_text(value: object) -> Cell:
    return _text("value", _str(value) if isinstance(value, bytes) else "" if value is None else str(value))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


# ---- runs --------------------------------------------------------------------------------------------------

_GONE = "process exited unexpectedly"


class PruneSummary(NamedTuple):
    """How many records and background runs prune() has deleted."""
    history: int = 0
    background: int = 0


class Execution:
    """What execution() yields: `id`, `ref`, `bucket` (its scope), and `env`, by which a child finds both. On
    exit the scope goes, and the running record becomes completed, or failed: by an exception, or by the
    `exit_code` or `error` that the body may set, as `log_archive_id`."""
    def __init__(self, store: SQLiteDataStore, ref: str, id: str | None, fields: dict[str, Any]) -> None:
        if id is None:
            import uuid

            id = str(uuid.uuid4())
        _name("id", id)
        if id == ROOT_BUCKET or len(_utf8(id)) > 255 or not set("\0:/ ").isdisjoint(id):
            raise ValueError("id must be up to 255 bytes without NUL, colon, slash and space, and not root")
        try:
            working_dir = os.getcwd()
        except OSError:  # it has been removed
            working_dir = ""
        self._record = ExecutionRecord(ref, _now(), id=id, **{
            "source": run_env_value(RUN_SOURCE_ENV) or RUN_SOURCE_CLI,
            "client_name": run_env_value(RUN_CLIENT_ENV), "session_id": run_env_value(RUN_SESSION_ENV),
            "working_dir": working_dir, **fields})
        self._store = store
        self.id = self.bucket = id
        self.ref = ref
        self.env = {**os.environ, BUCKET_ENV: id, "FLOWSTORE_PATH": store.path}
        self.exit_code, self.error = 0, ""
        self.log_archive_id = self._record.log_archive_id

    def __enter__(self) -> Self:
        self._began, pid = time.monotonic_ns(), os.getpid()
        self._record = self._record._replace(started_at=_now(), status=RunStatus.RUNNING, pid=pid)
        row = _history_row(self._record, _process_note(pid))
        self._store._execute(_RECORD, _ADD_BUCKET, cells=row, bucket=self.bucket)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
            self.exit_code = max(-(2**63), min(int(error.code or 0), 2**63 - 1))
        elif error is not None:
            self.exit_code = self.exit_code or (130 if isinstance(error, KeyboardInterrupt) else 1)
            self.error = self.error or f"{type(error).__name__}: {error}".removesuffix(": ")
        row = _history_row(self._record._replace(
            status=RunStatus.FAILED if self.exit_code or self.error else RunStatus.COMPLETED,
            exit_code=self.exit_code, error=_str(self.error.encode("utf-8", "backslashreplace")),
            log_archive_id=self.log_archive_id, completed_at=_now(),
            duration=timedelta(microseconds=(time.monotonic_ns() - self._began) // 1000)))
        try:
            self._store._execute(_RECORD, _DELETE_VARS, _DELETE_BUCKET, cells=row, bucket=self.bucket)
        except StoreError as failure:
            if error is None:
                raise
            error.add_note(f"and the end of the run was not recorded: {failure}")


def _line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.readline().strip()
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a process began, in ticks since the boot; "": it has ended; "-": unknown."""
    fields = _line(f"/proc/{pid}/stat").rpartition(")")[2].split()  # the name before it may hold anything
    return "-" if len(fields) < 20 else "" if fields[0] in "ZX" else fields[19]


def _process_note(pid: int) -> str:
    """Where a process lives: machine, boot, pid namespace and start; "" where the platform can't tell."""
    boot = _line("/proc/sys/kernel/random/boot_id")
    try:
        machine = _line("/etc/machine-id") or os.uname().nodename
        return f"{machine} {boot} {os.readlink('/proc/self/ns/pid')} {_start_of(pid)}" if boot else ""
    except (OSError, AttributeError):
        return ""


def _is_gone(pid: object, start: object, note: object) -> bool:
    [pid], [started_at] = _only(int, [pid]), _only(datetime, _times([_str(start)]))
    noted, here = _str(note).split(" "), _process_note(pid).split(" ")
    known = len(noted) == 4
    if known and noted[1:2] != here[1:2]:  # another boot, of this machine or of another
        return noted[0] == here[0]
    if (known and noted[2] != here[2]) or pid <= 0 or os.name == "nt":  # there os.kill() would end it
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass  # another user's
    ticks = _start_of(pid)
    if ticks in ("", "-"):
        return not ticks
    if known:
        return noted[3] not in (ticks, "-")
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + int(ticks) / os.sysconf("SC_CLK_TCK") > started_at.timestamp() + 2  # s: clocks are set


def _mark_gone(sql: SQL, gone: Iterable[Row]) -> int:
    count = 0
    for table, ref, id, pid, start, _ in gone:
        cells = {"ref": ref, "bucket": id, "pid": pid, "start": start, "now": _instant("now", _now())}
        changed = sql.execute(f"""
            UPDATE {table} SET status = 'failed', error = '{_GONE}', completed_at = :now
            WHERE status = 'running' AND ref = :ref AND id = :bucket AND pid = :pid AND started_at = :start
            """, cells).rowcount
        count += changed
        if changed and id not in ("", ROOT_BUCKET) and not sql.execute(
                "SELECT 1 FROM history WHERE status = 'running' AND id = :bucket", cells).fetchone():
            sql.execute(_DELETE_VARS, cells)
            sql.execute(_DELETE_BUCKET, cells)
    return count


# ---- files of the original: bbolt --------------------------------------------------------------------------

class ImportSummary(NamedTuple):
    """What was added, legacy scopes met, and bucket, key and reason of what couldn't be read."""
    cache: int = 0
    history: int = 0
    background: int = 0
    process_vars: int = 0
    process_buckets: int = 0
    recovered_runs: int = 0
    legacy_scopes: int = 0
    problems: tuple[tuple[str, str, str], ...] = ()


def import_bolt(source: Path, path: Path | None = None) -> ImportSummary:
    """Add what a file of the original has in one transaction. What the store has wins, so a second
    import changes nothing. The source is only read, under a shared lock."""
    import mmap

    source = os.path.abspath(os.fsdecode(source))
    store = _ExistingStore(path)  # made by the write: not for a bad source
    try:
        if os.path.realpath(source) in [connection.file for connection in _process.open_connections()]:
            # opening it here would drop its locks
            raise ValueError("a store that this process has open")
        if not stat.S_ISREG(os.stat(source).st_mode):  # to open a pipe would wait
            raise ValueError("no regular file")
        with open(source, "rb") as stream, open(source, "rb") as lock:  # the map keeps what is under stream
            _share_lock(lock, source, time.monotonic() + store._timeout)  # who cut it would kill us: SIGBUS
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            try:
                file = _BoltFile(data)
                counts = store._write(lambda sql: _add_entries(sql, file))
            finally:
                try:
                    data.close()
                except BufferError:
                    pass  # an error has a part of it, and takes it along
    except StoreError:
        raise
    except (OSError, ValueError) as error:  # ValueError: no bbolt file, or empty
        kind = StoreError if isinstance(error, OSError) else CorruptStoreError
        raise _error(kind, source, f"{error}: name a file of the original") from None
    more = [("", "", f"and {file.unnamed} more")] if file.unnamed else []
    return ImportSummary(**counts, problems=(*file.problems, *more))


def _share_lock(stream: Any, source: str, deadline: float) -> None:
    """Take the lock that bbolt takes, where the system has it."""
    while os.name == "posix":
        import fcntl

        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise _error(StoreBusyError, source, "another process has it locked: end that") from None
            time.sleep(0.01)
        except OSError:
            break


def _add_entries(sql: SQL, file: _BoltFile) -> dict[str, int]:
    """Scopes once were at the top; a nested one wins. A faulty migration moved runs into one."""
    import zlib

    counts = dict.fromkeys(ImportSummary._fields[:-1], 0)

    def add(kind: str, statement: str, cells: Cells) -> None:
        counts[kind] += sql.execute(statement, cells).rowcount
        if value and len(value) > _LARGE:  # bound until something else is: NULL, which is IGNOREd
            sql.execute(statement, dict.fromkeys(cells))

    for path, key, value in file.entries():
        name = _cell(key)
        try:
            match path if value is not None else (*path, None):
                case (None,) | (b"history" | b"process", None):
                    if path != (b"history",) and key not in (_CONCERNS[:1] if path else _CONCERNS):
                        counts["legacy_scopes"] += not path
                        add("process_buckets", _ADD_BUCKET, {"bucket": name})
                case (b"cache",):
                    add("cache", _ADD_CACHE, {"key": name, "value": value})
                case (b"history", _):
                    row = _row_of_dict(ExecutionRecord, _go_object(value))
                    if row["id"] or len(key) != 8:
                        row["id"], identity = name, zlib.crc32(path[1] + b"\0" + key)
                    else:  # known again by its number and JSON
                        identity = (zlib.crc32(key) << 32 | zlib.crc32(value)) - (1 << 63)
                    row.update(ref=_cell(path[1]), identity=identity, process="")
                    add("history", _ADD_RECORD, row)
                case (b"background",) | (b"process", b"background") if not path[1:] or _is_run(key, value):
                    row = _row_of_dict(BackgroundRun, _go_object(value))
                    add("recovered_runs" if path[1:] else "background", _ADD_RUN, row | {"id": name})
                case (b"process", _) | (_,) if path[1:] or path[0] not in _CONCERNS:
                    if path[-1] in _CONCERNS[:1]:
                        add("process_buckets", _ADD_BUCKET, {"bucket": "background"})
                    large = len(value) > _LARGE  # then without a str
                    statement = _ADD_TEXT if large and _is_utf8(value) else _ADD_VAR
                    add("process_vars", statement, {"bucket": _cell(path[-1]), "key": name,
                                                    "value": value if large else _cell(value)})
                case _:
                    raise ValueError("not what the original writes there")
        except (ValueError, TypeError, sqlite3.DataError) as error:  # DataError: larger than SQLite takes
            file.problem(path, key, str(error))
    return counts


_ADD_TEXT = _ADD_VAR.replace(":value", "CAST(:value AS TEXT)")
_LARGE = 1 << 20  # bytes
_CONCERNS = (b"background", b"cache", b"history", b"process")


def _cell(data: bytes | memoryview) -> Cell:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        return bytes(data)


def _is_utf8(data: memoryview) -> bool:
    at = 0
    try:
        while at < len(data):
            at += codecs.utf_8_decode(data[at : at + _LARGE], "strict", at + _LARGE >= len(data))[1]
    except UnicodeDecodeError:
        return False
    return True


def _is_run(key: bytes, value: memoryview) -> bool:
    try:
        data = _go_object(value)
        return {"pid", "status"} <= data.keys() and data["id"] == _well_formed(_str(key))
    except (ValueError, TypeError):
        return False


def _go_object(value: memoryview) -> dict[str, Any]:
    """A record's JSON by its tags, as Go's decoder takes it; null is an empty one."""
    text = str(value, "utf-8", "surrogateescape")
    try:
        data = _go_decoder().decode(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance({} if data is None else data, dict):
        raise TypeError("it is no JSON object")
    data = {"id": "", "ref": "", "startedAt": "0001-01-01T00:00:00Z", **(data or {})}
    if "\\u" in text or not text.isascii():
        data = {tag: _well_formed(each) if isinstance(each, str) else each for tag, each in data.items()}
    return data


def _well_formed(text: str) -> str:
    """Each lone surrogate, an escape or a byte that is no UTF-8, becomes U+FFFD."""
    import re
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


@cache
def _go_decoder() -> Any:
    import json
    tags = {name: tag for tag in map(_tag, ExecutionRecord._fields) for name in (tag, tag.lower())}

    def by_tag(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # lower() knows the Kelvin sign, but not the long s; null changes nothing but the one pointer
        return {tag: value for name, value in pairs
                if (tag := tags.get(name) or tags.get(name.lower().replace("\u017f", "s")))
                and (value is not None or tag == "completedAt")}

    # 21 digits are too many for 64 bits, as all of them; int() takes neither NaN nor Infinity
    return json.JSONDecoder(
        object_pairs_hook=by_tag, parse_int=lambda digits: int(digits[:21]), parse_constant=int)


_META = "<4I6Q"  # magic, version, page size, flags, root, sequence, freelist, end, txid, sum
_PAGE = "<QHHI"  # id, flags (1 branch, 2 leaf), count, overflow
_LEAF = "<4I"  # flags (1 bucket), pos, key size, value size
_BRANCH = "<IIQ"  # pos, key size, page


class _BoltFile:
    """A file of bbolt; its problems are bucket, key (or "") and reason of what can't be read."""
    def __init__(self, data: Any) -> None:
        import struct

        self.data = data
        self.problems: list[tuple[str, str, str]] = []
        self.room, self.unnamed = 2 * len(data) + (16 << 20), 0  # bytes for the problems, how many are beyond
        sizes = [1 << n for n in range(9, 32)]
        metas: list[tuple[int, int, int, int]] = []
        for offset in (0, *sizes):
            if metas and offset != metas[0][1]:
                continue  # what looks like one elsewhere is none
            meta = data[offset + 16 : offset + 80].ljust(64)
            magic, version, size, _, root, _, _, pages, txid, checksum = struct.unpack(_META, meta)
            fnv = 0xCBF29CE484222325
            for byte in meta[:-8]:
                fnv = (fnv ^ byte) * 0x100000001B3 % 2**64
            if (magic, version, checksum) == (0xED0CDAED, 2, fnv) and size in sizes and offset in (0, size):
                metas.append((txid, size, root, min(pages * size, len(data))))
        if not metas:
            raise ValueError("no bbolt file, or both of its meta pages are damaged")
        _, self.page_size, root, self.end = max(metas)
        self.seen = bytearray(self.end // self.page_size + 1)
        self.top = self.page(root)

    def problem(self, path: tuple[bytes, ...], key: bytes, reason: str) -> None:
        if self.room > 0:
            self.problems.append((_str(b"/".join(path)), _str(key), reason))
            self.room -= 400 + 4 * (sum(map(len, path)) + len(key))
        else:
            self.unnamed += 1

    def page(self, number: int, begin: int = 0, end: int = 0) -> tuple[int, int, int, int]:
        """Flags, table, count and end of a page (0: inline, from begin to end); ValueError if it is none."""
        import struct

        if number:
            begin, end = number * self.page_size, self.end
        table = begin + 16
        head = self.data[begin:table] if table <= end else bytes(16)
        found, flags, count, overflow = struct.unpack(_PAGE, head)
        end = min(end, begin + (1 + overflow) * self.page_size)
        behind = -(-end // self.page_size) if number else 0  # the page behind it
        if found != number or flags not in (2, 1 if number else 2) or self.seen.find(1, number, behind) >= 0:
            raise ValueError(f"its page {number} is damaged, or referred to twice")
        self.seen[number:behind] = b"\1" * (behind - number)
        return flags, table, count, end

    def entries(self) -> Iterable[tuple[tuple[bytes, ...], bytes, Any]]:
        """Yield bucket path, key and value (None: a bucket, before what is in it), legacy scopes last."""
        import struct

        data, view = self.data, memoryview(self.data)
        stack: list[Any] = [((), self.top)]
        later: list[Any] = []
        while stack or later:
            path, (flags, table, count, end) = (stack or later).pop()
            body = table + 16 * count
            # the first pos, or 0 on an empty page, tells the count again
            told = int.from_bytes(data[table : min(table + 8, end)][4 * flags - 4 : 4 * flags], "little")
            if told != 16 * count or body > end:
                self.problem(path, b"", "a page of it may have more entries: its count is wrong")
                body = min(body, end - (end - table) % 16)
            kinds = len(path) < 100
            children: list[tuple[Any, ...]] = []
            if flags == 1:
                children += ((path, child) for _, _, child in struct.iter_unpack(_BRANCH, data[table:body]))
                body = table
            elements = [*struct.iter_unpack(_LEAF, data[table:body])]
            starts = [table + 16 * n + pos for n, (_, pos, _, _) in enumerate(elements)]
            following = [*starts[1:], 0]
            for (kind, _, key_size, size), start, after in zip(elements, starts, following, strict=False):
                middle = start + key_size
                stop = middle + size
                key = data[start:middle] if body <= start and middle <= end else b""
                # they lie end to end, so the next one's start tells the sizes again
                if not key or kind > kinds or size < 16 * kind or stop > end or after not in (0, stop):
                    self.problem(path, key, "the entry is damaged, or nested too deep")
                elif not kind:
                    yield path, key, view[middle:stop]
                else:
                    yield path, key, None
                    child = int.from_bytes(data[middle : middle + 8], "little")
                    children.append(((*path, key), child, middle + 16, stop))
            for inner, *place in reversed(children):
                try:
                    page = self.page(*place)
                    (later if inner and inner[0] not in _CONCERNS else stack).append((inner, page))
                except ValueError as error:
                    self.problem(inner, b"", str(error))


# ---- the command line --------------------------------------------------------------------------------------

_COMMANDS = """\
set KEY [VALUE] [--global] - set a variable of the scope; without VALUE, or with -, from standard input
get KEY [--global] - print a variable of the scope, or else of root
list [--global] - print all variables of both
remove KEY [--global] - remove a variable of the scope
clear [--global] [--all] - empty the scope, or destroy the whole store
history [REF] [-n N] - show the newest N runs (20; 0: all) of a ref, or of all refs
background [ID] - show the background runs, or one
run REF -- COMMAND ... - run a command in a scope of its own, and record it
import FILE - bring over a file of the original
migrate - move legacy tables under the process scope
prune [--keep N] [--before AGE] - keep N runs per ref, and none from before 30d, 12h, or a date
backup FILE - copy the store to a new file
check - verify the store, and say what is in it
path - print where the store is"""


def _parse(argv: list[str]) -> Any:
    import argparse  # a third of a start

    end = argv.index("--") if "--" in argv else len(argv)
    name = next((word for word, before in zip(argv[:end], ["", *argv], strict=False)
                 if word[:1] != "-" and before != "--store"), "")
    commands = {line.split()[0]: line for line in _COMMANDS.splitlines()}
    usage = commands.get(name, f"COMMAND\n\n{_COMMANDS}")
    usage = f"flowstore [--store PATH] [--json] [--help] [--version] {usage}"
    parser: Any = argparse.ArgumentParser(
        "flowstore", usage, add_help=False, allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100))  # else it imports shutil
    parser.add_argument("-h", "--help", action="store_true")
    switch, number = {"action": "store_true"}, {"type": int}
    flags: dict[str, Any] = {
        "--store": {}, "--json": switch, "--version": switch, "--global": switch, "--all": switch,
        "-n": number, "--keep": number, "--before": {"type": _age_or_date}}
    for flag, kind in flags.items():
        if f"[{flag}" in usage:
            parser.add_argument(flag, **kind)
    parser.add_argument("words", nargs="*")
    if name == "set":  # what it doesn't understand argparse repeats: here that may be a secret
        wrong = parser.error
        parser.error = lambda _: wrong("wrong arguments: put -- before words that begin with a dash")
    options = parser.parse_intermixed_args(argv[:end])
    options.usage, options.error, options.command, options.status = usage, parser.error, argv[end + 1 :], 0
    options.words += [] if name == "run" else options.command
    if name not in ("import", "backup"):  # as UTF-8, in whatever encoding the terminal is
        options.words = [_str(os.fsencode(word)) for word in options.words]
    return options


def _age_or_date(text: str) -> datetime:
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
    if text[-1:] in units and text[:-1].isdecimal():
        return _now() - timedelta(**{units[text[-1]]: int(text[:-1])})
    return datetime.fromisoformat(text).astimezone(timezone.utc)


def _store(options: Any) -> SQLiteDataStore:
    store = _ExistingStore(options.store)
    original = os.path.join(os.path.dirname(store.path), "store.db")
    if os.path.exists(original) and not (
            options.store or os.environ.get("FLOWSTORE_PATH") or store._exists()):
        _complain(f"the original's store is here too, bring it over with `flowstore import {original}`")
    return store


def _answer(options: Any) -> Any:
    """Do a command; returns a document, with its text where that isn't _plain()."""
    if options.help or options.version:
        return f"usage: {options.usage}" if options.help else f"flowstore {__version__}"
    match options.words:
        case ["run", ref] if options.command:
            sys.exit(_run(options, ref))
    store = _store(options)
    bucket = ROOT_BUCKET if vars(options).get("global") else _str(os.fsencode(environment_bucket()))
    match options.words:
        case ["set", key] | ["set", key, "-"]:
            value = sys.stdin.buffer.read() if sys.stdin else b""
            store.set_process_var(bucket, key, _str(value.removesuffix(b"\n")))
        case ["set", key, value]:
            store.set_process_var(bucket, key, value)
        case ["get", key]:
            return store.get_process_var(bucket, key)
        case ["list"]:
            variables = store.get_all_process_vars(bucket)
            return variables, _table("KEY VALUE", variables.items())
        case ["clear"] if options.all:
            destroy_store(store.path)
        case ["prune"]:
            pruned = store.prune(options.keep, options.before) if store._exists() else PruneSummary()
            return pruned._asdict()
        case ["remove", _] | ["clear"] if not store._exists():
            pass
        case ["remove", key]:
            store.delete_process_var(bucket, key)
        case ["clear"]:
            store.delete_process_bucket(bucket)
        case ["history", *ref] if len(ref) < 2:
            return _history(store, ref, 20 if options.n is None else max(options.n, 0))
        case ["background", *id] if len(id) < 2:
            runs = _reconciled(store, "background", lambda: (
                [store.get_background_run(*id)] if id else store.list_background_runs()))
            text = _table("STATUS STARTED REF ID PID ERROR", [
                (run.status, run.started_at, run.ref, run.id, run.pid, run.error) for run in runs])
            documents = [run.to_dict() for run in runs]
            return documents[0] if id else documents, text
        case ["import", file]:
            found = import_bolt(file, store.path)._asdict()
            problems = found.pop("problems")
            options.status = 1 if problems else 0
            text = _plain(found) + _plain([f"problems {' '.join(each)}" for each in problems])
            names = "bucket", "key", "reason"
            return {**found, "problems": [dict(zip(names, each, strict=True)) for each in problems]}, text
        case ["migrate"]:
            return migrate_process_buckets(store.path)
        case ["backup", file]:
            store.backup(file)
        case ["check"]:
            return _verified(store)
        case ["path"]:
            return store.path
        case _:
            options.error("these are not the arguments of a command")
    return {}


def _reconciled(store: SQLiteDataStore, table: str, read: Callable[[], list[Record]]) -> list[Record]:
    """What read() returns once the store is reconciled, even where that can't be saved."""
    found = store._gone()
    try:
        store._mark(found)
    except StoreError:
        pass
    gone = {(_str(ref), _str(id), _str(start)[:26], pid)
            for kind, ref, id, pid, start, _ in found if kind == table}
    return [run._replace(status=RunStatus.FAILED, error=_GONE) if run.status == RunStatus.RUNNING
            and (run.ref, run.id, _instant("", run.started_at)[:26], run.pid) in gone else run
            for run in read()]


def _history(store: SQLiteDataStore, ref: list[str], limit: int) -> tuple[Any, str]:
    def read() -> list[ExecutionRecord]:
        # the newest of all are runs of the refs that ran last
        refs = ref or store._fetch(_NEWEST_REFS, _load_texts, {"limit": limit or -1})
        histories = store.get_execution_histories(refs, limit).values()
        records = [record for history in histories for record in reversed(history)]
        return sorted(records, key=lambda record: record.started_at, reverse=True)[: limit or None]

    marks = {RunStatus.COMPLETED: ("✓", 32), RunStatus.FAILED: ("✗", 31), RunStatus.RUNNING: ("●", 33)}
    terminal, records, rows = os.isatty(1), _reconciled(store, "history", read), []
    spans: dict[str, list[float]] = {}
    for record in records:
        status = record.status or (RunStatus.FAILED if record.exit_code else RunStatus.COMPLETED)
        seconds = record.duration.total_seconds()
        rows.append((marks.get(status, (status,))[0] if terminal else status, record.started_at, record.ref,
                     f"{seconds:.3f}", record.exit_code, record.error or record.label or record.command))
        if status != RunStatus.RUNNING:
            spans.setdefault(record.ref, []).insert(0, seconds)
    text = _table(" STARTED REF SECONDS EXIT NOTE", rows)
    if terminal:
        for mark, colour in () if os.environ.get("NO_COLOR") else marks.values():
            text = text.replace(f"\n{mark}", f"\n\033[{colour}m{mark}\033[0m")
        for name, values in spans.items():
            scale = 7.99 / max(*values, 1e-6)
            bars = "".join("▁▂▃▄▅▆▇█"[max(0, int(value * scale))] for value in values)
            text += f"{_shown(name)}  {bars}\n" * (len(bars) > 1)
    return [record.to_dict() for record in records], text


def _verified(store: SQLiteDataStore) -> dict[str, Any]:
    questions = {
        "check": "PRAGMA quick_check(1)",
        "size": "SELECT page_size * page_count FROM pragma_page_size, pragma_page_count",
        "free": "SELECT page_size * freelist_count FROM pragma_page_size, pragma_freelist_count",
        "schema": "PRAGMA user_version", "sqlite": "SELECT sqlite_version()",
        **{table: f"SELECT count(*) FROM {table}" for table in _TABLES}}
    if not store._exists():
        raise _error(StoreError, store.path, "there is no store here yet: `flowstore set` makes one")
    found = store._read(lambda sql: {name: sql.execute(question).fetchone()[0]
                                     for name, question in questions.items()}, snapshot=True)
    if found["check"] != "ok":
        raise _error(CorruptStoreError, store.path, f"{found['check']}: restore a backup, or move it away")
    return {"path": store.path, **found}


def _run(options: Any, ref: str) -> int:
    import shlex

    status = None
    try:
        with _store(options).execution(ref, command=_str(os.fsencode(shlex.join(options.command)))) as run:
            status, run.error = _call(options.command, run.env)
            run.exit_code = status
    except StoreError as error:
        _complain(f"this run is not recorded: {error}")
    return _call(options.command, None)[0] if status is None else status


def _call(command: list[str], env: dict[str, str] | None) -> tuple[int, str]:
    """Run a command; returns its exit status, as a shell's, and what went wrong. Signals are passed on to it,
    and caught after its end too: none may end this process before that is recorded."""
    import contextlib
    import signal
    import subprocess

    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # signals from before there is a child

    def forward(number: int, _: object) -> None:
        if not child:
            early.append(number)
            return
        with contextlib.suppress(OSError), open("/dev/tty", "rb") as terminal:
            if number in (2, 3) and os.tcgetpgrp(terminal.fileno()) == os.getpgrp():
                return  # the terminal has sent it to the child too
        with contextlib.suppress(OSError, ValueError):  # it may have become another user's
            child.send_signal(number)

    for name in ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    try:
        child = subprocess.Popen(command, env=env, close_fds=False)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        _complain(reason := f"command {'not found' if missing else 'can not be executed'}: {command[0]}")
        return 127 if missing else 126, reason
    for number in early:
        child.send_signal(number)
    status = child.wait()
    if status < 0:
        return 128 - status, f"killed by signal {-status}"
    return status, f"exit status {status}" if status else ""


def _complain(text: str) -> None:
    try:
        if sys.stderr is not None:
            os.write(2, _utf8(f"flowstore: {_shown(text)}\n"))  # unbuffered: the exit has nothing to flush
    except OSError:
        pass


def _shown(value: object) -> str:
    """A value without what moves the cursor; a time in the user's zone on a terminal, else in RFC 3339."""
    if isinstance(value, datetime):
        if not os.isatty(1):
            return _instant("time", value)
        local = value.astimezone() if 1970 < value.year < 9999 else value  # beyond, not every system can
        return str(local)[:19]
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(value))


def _table(header: str, rows: Iterable[Iterable[object]]) -> str:
    """Rows with a header and aligned on a terminal, else separated by tabs."""
    cells = [[*map(_shown, row)] for row in rows]
    if not os.isatty(1):
        return "".join("\t".join(row) + "\n" for row in cells)
    cells = [[cell if len(cell) <= 60 else cell[:59] + "…" for cell in row]
             for row in (header.split(" "), *cells)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in cells)


def _plain(document: Any) -> str:
    """A str as it is; else a line for each name, of a dict with its value."""
    if isinstance(document, str):
        return document + "\n"
    if isinstance(document, dict):
        document = [f"{name} {value}" for name, value in document.items()]
    return "".join(_shown(line) + "\n" for line in document)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line. Ends by SystemExit: 0 done, 1 failed or not found, 2 usage; run: its command's."""
    try:
        options = _parse([*(sys.argv[1:] if argv is None else argv)])
        found = _answer(options)
        document, text = found if isinstance(found, tuple) else (found, _plain(found))
        if options.json:
            import json

            text = json.dumps(document) + "\n"
        if sys.stdout is not None:
            with open(1, "wb", closefd=False) as stream:
                stream.write(_utf8(text))
        status = options.status
    except KeyboardInterrupt:
        status = 130
    except (StoreError, OSError, ValueError, OverflowError) as error:
        status = 1 if isinstance(error, (StoreError, OSError)) else 2
        if not isinstance(error, BrokenPipeError):  # the reader has seen enough
            _complain(str(error))
    sys.exit(status)


if __name__ == "__main__":
    main()
