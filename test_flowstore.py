"""The tests of flowstore, in the order of the module.

What every store promises runs against each of them: a file, its session and its
transaction, and PostgreSQL's three where its programs are installed (the fixture `each`).
"""

from __future__ import annotations

import array
import base64
import contextlib
import copy
import enum
import fcntl
import functools
import gc
import inspect
import io
import itertools
import json
import lzma
import os
import pickle
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
import tracemalloc
import typing
import unicodedata
import zipapp
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

import flowstore
from flowstore import (
    BackgroundRun,
    CorruptStoreError,
    DataStore,
    ExecutionRecord,
    ImportSummary,
    NotFoundError,
    PruneSummary,
    SQLiteDataStore,
    StoreBusyError,
    StoreError,
    copy_store,
    destroy_store,
    import_bolt,
    migrate_process_buckets,
)

MODULE = os.path.abspath(flowstore.__file__)
FOLDER = os.path.dirname(MODULE)
START = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=timezone.utc)

# ---- helpers ----


def environment(**variables):
    """This process's environment without what points to somebody's own store."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FLOW", "XDG_", "PG", "PYTHON"))
    }
    return {**kept, "PYTHONPATH": FOLDER, **variables}


def cli(*arguments, store=None, input=b"", **variables):
    """Run the command line: its exit status, standard output and standard error as text."""
    if store is not None:
        variables["FLOWSTORE_PATH"] = os.fspath(store)
    done = subprocess.run(
        [sys.executable, "-m", "flowstore", *map(os.fspath, arguments)],
        input=input,
        capture_output=True,
        env=environment(**variables),
        timeout=60,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def process(code, *arguments, **options):
    """A process of Python that runs this code, with flowstore imported and the arguments in
    sys.argv[1:]; its standard streams are pipes of text."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os, sys, flowstore\n{code}",
            *map(str, arguments),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        **options,
    )


def output_of(code, *arguments):
    """What such a process prints; it must succeed."""
    child = process(code, *arguments)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    return out


def wait_until(condition, seconds=30.0):
    """Wait for a condition that is sure to come, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)
    return found


def by_hand(path, *statements):
    """Execute these in SQLite; the rows of the last one."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            rows = connection.execute(statement).fetchall()
    return rows


def record(ref="build", minutes=0, **fields):
    """An execution's record, some minutes after START."""
    return ExecutionRecord(ref, START + timedelta(minutes=minutes), **fields)


def background(id="b1", minutes=0, **fields):
    """A background run's record, some minutes after START."""
    values = {"pid": 0, "ref": "serve", "status": "completed", **fields}
    return BackgroundRun(id, started_at=START + timedelta(minutes=minutes), **values)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "flowstore.db")


@pytest.fixture
def store(path):
    return SQLiteDataStore(path)


# ---- the stores that the contract is tested on ----

PASSWORD = "pa:ss@w/o?r#d%[é"  # of the server's owner; each of its characters is a trap
NO_SERVER = (
    "PostgreSQL's programs are missing: install them (apt-get install postgresql, "
    "brew install postgresql), or put the folder of initdb on PATH"
)
NO_DRIVER = "the driver is missing: pip install 'flowstore[postgres]' pg8000"


def server_programs():
    """The folder of PostgreSQL's programs, or None."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


def unprivileged():
    """Whom the server may run as, since it refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    import pwd

    user = pwd.getpwnam("nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


class Server:
    """A cluster of its own. By its socket everybody is let in without a password, by TCP
    nobody."""

    def __init__(self, programs, folder):
        self.programs, self.folder, self.user = programs, folder, unprivileged()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.names = itertools.count()
        secret = folder / "secret"
        secret.write_text(PASSWORD)
        for each in (folder, secret) if self.user else ():
            os.chown(each, self.user["user"], self.user["group"])
        self.call("initdb", "--no-sync", "--encoding=UTF8", "--locale=C",
                  "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={secret}",
                  "--username=owner", f"--pgdata={folder}/data")  # fmt: skip
        self.start()

    def call(self, program, *arguments):
        done = self.popen(program, *arguments)
        out, _ = done.communicate(timeout=60)
        assert done.returncode == 0, out

    def popen(self, program, *arguments):
        return subprocess.Popen(
            [self.programs / program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env=environment(LC_ALL="C"),
            **self.user,
        )

    def start(self):
        """Start it, also where what was killed still goes."""
        ready = [
            self.programs / "pg_isready",
            "-q",
            "-h",
            self.folder,
            "-p",
            str(self.port),
        ]

        def is_up():
            if self.process is None or self.process.poll() is not None:
                self.process = self.popen(
                    "postgres", "-D", self.folder / "data", "-p", str(self.port),
                    "-c", f"unix_socket_directories={self.folder}", "-c", "fsync=off",
                    "-c", "listen_addresses=127.0.0.1", "-c", "logging_collector=on",
                )  # fmt: skip
            return subprocess.run(ready, env=environment()).returncode == 0

        self.process = None
        wait_until(is_up)

    def stop(self, how=signal.SIGQUIT):
        self.process.send_signal(how)
        self.process.wait(60)

    def url(self, database="postgres", user="owner", **query):
        """The URL by the socket, without a password."""
        query = {"host": self.folder, "port": self.port, **query}
        options = "&".join(f"{name}={quote(str(value))}" for name, value in query.items())
        return f"postgresql://{user}@/{database}?{options}"

    def tcp_url(self, user="owner", password=PASSWORD, database="postgres", query=""):
        secret = quote(password, safe="")
        return f"postgresql://{user}:{secret}@127.0.0.1:{self.port}/{database}{query}"

    def new_schema(self):
        return f"s{next(self.names)}"

    def store(self, **options):
        """A store in a fresh schema, by psycopg unless $FLOWSTORE_TEST_DRIVER is pg8000."""
        other = os.environ.get("FLOWSTORE_TEST_DRIVER") == "pg8000"
        usual = {"schema": self.new_schema(), "connect": self.pg8000 if other else None}
        return flowstore.PostgresDataStore(self.url(), **{**usual, **options})

    def by_socket(self):
        """What tells another driver where the server is."""
        return {
            "unix_sock": f"{self.folder}/.s.PGSQL.{self.port}",
            "database": "postgres",
        }

    def psycopg(self):
        """A new connection by psycopg, as the owner."""
        import psycopg

        return psycopg.connect(self.url(), autocommit=True)

    def pg8000(self):
        """A new connection by another driver."""
        driver = pytest.importorskip("pg8000.dbapi", reason=NO_DRIVER)
        return driver.connect("owner", **self.by_socket())

    def sql(self, *statements):
        """Execute statements as the owner; the rows of the last, if it has any."""
        with self.psycopg() as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="session")
def server():
    pytest.importorskip("psycopg", reason=NO_DRIVER)
    programs = server_programs()
    if programs is None:
        pytest.skip(NO_SERVER)
    folder = Path(tempfile.mkdtemp(prefix="flow", dir="/tmp"))  # a socket's path is short
    started = None
    try:
        started = Server(programs, folder)
        yield started
    finally:
        if started:
            started.stop()
        shutil.rmtree(folder, ignore_errors=True)


KINDS = ("file", "file session", "file transaction",
         "server", "server session", "server transaction")  # fmt: skip


@contextlib.contextmanager
def entered(store, kind):
    """A store, or its session or transaction, as its kind's last word says."""
    way = kind.partition(" ")[2]
    with getattr(store, way)() if way else contextlib.nullcontext(store) as each:
        yield each


@pytest.fixture(params=KINDS)
def each(request, tmp_path):
    """An empty store of each kind, its session and its transaction."""
    if request.param.startswith("file"):
        store = SQLiteDataStore(tmp_path / "flowstore.db")
    else:
        store = request.getfixturevalue("server").store()
    with entered(store, request.param) as given:
        yield given


# ---- the module: what it needs, what it names ----

AS_IMPORT = "import flowstore"
AS_SCRIPT = f"import runpy; runpy.run_path({MODULE!r}, run_name='__main__')"


@pytest.mark.parametrize(
    "start, before_it",
    [(AS_IMPORT, r"(.*\n)*ImportError: "), (AS_SCRIPT, "")],
    ids=["import", "script"],
)
@pytest.mark.parametrize(
    "before, needs",
    [
        ("sys.version_info = (3, 10, 13, 'final', 0)", "Python 3.11"),
        ("import sqlite3; sqlite3.sqlite_version_info = (3, 30, 1)", "SQLite 3.31"),
    ],
    ids=["Python", "SQLite"],
)
def test_what_is_too_old_is_named_in_one_line(start, before_it, before, needs):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {before}; {start}"],
        capture_output=True,
        env=environment(),
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"{before_it}flowstore needs {needs}.*\n", done.stderr)


PUBLIC = re.findall(
    r"\w+",
    """
    BUCKET_ENV ROOT_BUCKET RUN_SOURCE_ENV RUN_CLIENT_ENV RUN_SESSION_ENV RUN_SOURCE_CLI
    RUN_SOURCE_DESKTOP RUN_SOURCE_MCP RunStatus BackgroundRunStatus ExecutionRecord
    BackgroundRun PruneSummary ImportSummary StoreError NotFoundError StoreBusyError
    CorruptStoreError DataStore SQLiteDataStore PostgresDataStore Session Execution
    open_store copy_store destroy_store import_bolt migrate_process_buckets default_path
    environment_bucket run_env_value main""",
)


def public_callables():
    """Every public function and class, and what the latter have that is public."""
    for name in PUBLIC:
        found = getattr(flowstore, name)
        yield found
        if isinstance(found, type):
            for member, value in inspect.getmembers(found):
                if member == "__init__" or not member.startswith("_"):
                    yield getattr(value, "fget", value)


def test_the_public_names_are_these():
    assert sorted(flowstore.__all__) == sorted(PUBLIC)


def test_hints_of_all_that_is_public_resolve_and_have_no_private_name():
    for found in public_callables():
        if getattr(found, "__module__", "") != "flowstore":
            continue  # a constant, or what namedtuple() makes
        typing.get_type_hints(found)
        try:
            signature = str(inspect.signature(found))
        except ValueError:  # an error's class has none
            continue
        assert not re.search(r"\b_[a-zA-Z]", signature), found


def test_all_that_is_public_has_a_docstring():
    for name in PUBLIC:
        assert not callable(getattr(flowstore, name)) or getattr(flowstore, name).__doc__
    for name in OPERATIONS:
        assert getattr(DataStore, name).__doc__, name


def test_constants_are_the_originals():
    expected = {
        "BUCKET_ENV": "FLOW_PROCESS_BUCKET",
        "ROOT_BUCKET": "root",
        "RUN_SOURCE_ENV": "FLOW_RUN_SOURCE",
        "RUN_CLIENT_ENV": "FLOW_RUN_CLIENT",
        "RUN_SESSION_ENV": "FLOW_RUN_SESSION",
        "RUN_SOURCE_CLI": "cli",
        "RUN_SOURCE_DESKTOP": "desktop",
        "RUN_SOURCE_MCP": "mcp",
    }
    assert {name: getattr(flowstore, name) for name in expected} == expected
    for kind in (flowstore.RunStatus, flowstore.BackgroundRunStatus):
        found = kind.RUNNING, kind.COMPLETED, kind.FAILED
        assert found == ("running", "completed", "failed")


# ---- errors ----


@pytest.mark.parametrize(
    "kind, bases",
    [
        (StoreError, (Exception,)),
        (NotFoundError, (StoreError, LookupError)),
        (StoreBusyError, (StoreError, TimeoutError)),
        (CorruptStoreError, (StoreError,)),
    ],
)
def test_an_error_has_its_bases_and_survives_pickling(kind, bases):
    assert kind.__bases__ == bases
    error = kind("/a: no such thing, name another", "/a")
    error.add_note("a note")
    for other in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert (str(other), other.path) == ("/a: no such thing, name another", "/a")
        assert other.__notes__ == ["a note"]
    assert kind("words alone").path == ""


# ---- records ----

UTC = timezone.utc
ZERO_TIME = datetime(1, 1, 1, tzinfo=UTC)
LAST_TIME = datetime(9999, 12, 31, 23, 59, 59, 999999, UTC)
LONGEST = timedelta(microseconds=2**63 // 1000)
WEST = timezone(timedelta(hours=-9.5))
FULL_EXECUTION = {
    "ref": "build app",
    "startedAt": "2024-05-06T07:08:09.123456Z",
    "duration": 1500000000,
    "exitCode": 3,
    "error": "exit status 3",
    "logArchiveId": "log",
    "id": "1",
    "completedAt": "2024-05-06T07:08:11Z",
    "status": "failed",
    "pid": 7,
    "command": "make",
    "spec": "spec",
    "label": "label",
    "source": "cli",
    "clientName": "client",
    "sessionId": "session",
    "workingDir": "/src",
}
FULL_RUN = {
    "id": "run 1",
    "pid": 7,
    "ref": "serve",
    "startedAt": "2024-05-06T07:08:09.123456Z",
    "status": "running",
    "logArchiveId": "log",
    "error": "killed",
    "completedAt": "2024-05-06T07:08:09.5Z",
}
KINDS_OF_RECORDS = [(ExecutionRecord, FULL_EXECUTION), (BackgroundRun, FULL_RUN)]
RUN = BackgroundRun("b1", 7, "serve", START, "running")


def field_of(tag):
    return re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", tag)


def test_records_are_named_tuples_with_these_fields_and_defaults():
    assert ExecutionRecord._fields == tuple(map(field_of, FULL_EXECUTION))
    defaults = {"duration": timedelta(0), "exit_code": 0, "completed_at": None, "pid": 0}
    for field, value in zip(ExecutionRecord._fields, ExecutionRecord("r", START)):
        assert value == {"ref": "r", "started_at": START, **defaults}.get(field, "")
    assert BackgroundRun._fields == tuple(map(field_of, FULL_RUN))
    assert RUN[5:] == ("", "", None)
    assert ImportSummary() == (0, 0, 0, 0, 0, 0, 0, ())
    assert " ".join(ImportSummary._fields) == (
        "cache history background process_vars process_buckets recovered_runs"
        " legacy_scopes problems"
    )
    assert PruneSummary(1, 2)._asdict() == {"history": 1, "background": 2}


@pytest.mark.parametrize("value", [record(id="1"), RUN, PruneSummary(), ImportSummary()])
def test_a_named_tuple_is_immutable_pickles_and_says_what_its_fields_are(value):
    kind = type(value)
    for field in (*value._fields, "another"):
        with pytest.raises(AttributeError):
            setattr(value, field, "x")
    assert typing.get_type_hints(kind).keys() == set(value._fields)
    for field in value._fields:
        assert re.search(rf"\b{field}\b[\w, ]*[:,]", kind.__doc__), field
    assert value == tuple(value)
    assert repr(value).startswith(f"{kind.__name__}({value._fields[0]}=")
    other = pickle.loads(pickle.dumps(value))
    assert (type(other), other) == (kind, value)


@pytest.mark.parametrize("kind, document", KINDS_OF_RECORDS)
def test_a_record_is_the_originals_json_object_and_back(kind, document):
    full = kind.from_dict(document)
    assert list(full.to_dict().items()) == list(document.items())
    typed = {"started_at": START, "duration": timedelta(seconds=1.5)}
    typed["completed_at"] = datetime.fromisoformat(document["completedAt"])
    for tag, value in document.items():
        assert getattr(full, field_of(tag)) == typed.get(field_of(tag), value)
    assert kind.from_dict({**document, "another": 1}) == full


def test_empty_fields_are_left_out_but_for_those_that_are_always_there():
    least = {tag: FULL_EXECUTION[tag] for tag in ("ref", "startedAt")}
    always = {**least, "duration": 0, "exitCode": 0}
    assert record("build app").to_dict() == always
    for document in (always, least, {**dict.fromkeys(FULL_EXECUTION), **least}):
        assert ExecutionRecord.from_dict(document) == record("build app")
    least = {"id": "", "startedAt": FULL_RUN["startedAt"]}
    empty = BackgroundRun("", 0, "", START, "")
    assert empty.to_dict() == {**least, "pid": 0, "ref": "", "status": ""}
    assert BackgroundRun.from_dict(least) == empty


@pytest.mark.parametrize(
    "moment, text",
    [
        (ZERO_TIME, "0001-01-01T00:00:00Z"),
        (LAST_TIME, "9999-12-31T23:59:59.999999Z"),
        (START.replace(microsecond=120000), "2024-05-06T07:08:09.12Z"),
        (START.replace(microsecond=1), "2024-05-06T07:08:09.000001Z"),
        (START.astimezone(WEST), "2024-05-06T07:08:09.123456Z"),
    ],
)
def test_a_time_is_rfc_3339_in_utc_with_trailing_zeros_trimmed(moment, text):
    assert record()._replace(started_at=moment).to_dict()["startedAt"] == text
    assert RUN._replace(completed_at=moment).to_dict()["completedAt"] == text
    assert BackgroundRun.from_dict({**FULL_RUN, "startedAt": text}).started_at == moment


@pytest.mark.parametrize(
    "text, moment",
    [
        ("2024-05-06T07:08:09.1234569991234Z", START),
        ("2024-05-06T09:38:09.123456+02:30", START),
        ("2024-05-06T03:08:09.123456-04:00", START),
        ("2024-05-06T07:08:09Z", START.replace(microsecond=0)),
        ("2024-05-06T07:08:09.1-00:00", START.replace(microsecond=100000)),
        ("0001-01-01T00:00:00-00:01", ZERO_TIME.replace(minute=1)),
        ("9999-12-31T23:59:59.9999999999Z", LAST_TIME),
    ],
)
def test_a_time_is_read_with_any_offset_and_fraction(text, moment):
    read = ExecutionRecord.from_dict({**FULL_EXECUTION, "startedAt": text}).started_at
    assert read == moment
    assert read.tzinfo is UTC


@pytest.mark.parametrize(
    "nanoseconds, microseconds",
    [(1999, 1), (-1999, -1), (-999, 0), (2**63 - 1, 2**63 // 1000)],
)
def test_a_duration_is_cut_towards_zero(nanoseconds, microseconds):
    read = ExecutionRecord.from_dict({**FULL_EXECUTION, "duration": nanoseconds})
    assert read.duration == timedelta(microseconds=microseconds)
    assert read.to_dict()["duration"] == microseconds * 1000


def one_by_one(table):
    """The rows of a table whose last column is lists, one for each value of these."""
    return [(*row, value) for *row, values in table for value in values]


WRONG_TAGS = one_by_one(
    [
        (TypeError, "error", [1, b"x", [""], False]),
        (TypeError, "startedAt", [1, START]),
        (TypeError, "completedAt", [5]),
        (TypeError, "duration", [1.0, "1s", timedelta(1), True]),
        (TypeError, "pid", [7.0, "7", True]),
        (ValueError, "ref", [None]),
        (ValueError, "id", [None]),
        (ValueError, "duration", [2**63, -(2**63) - 1]),
        (ValueError, "pid", [2**63, -(2**63) - 1]),
        (ValueError, "exitCode", [2**63]),
        (ValueError, "error", ["\ud800", "a\0"]),
        (ValueError, "completedAt", ["now"]),
        (
            ValueError,
            "startedAt",
            [
                None,
                "",
                "now",
                "2024-01-02",
                "2024-01-02T03:04:05",
                "2024-01-02 03:04:05Z",
                "20240102T030405Z",
                "2024-13-02T03:04:05Z",
                "2024-02-30T03:04:05Z",
                "2024-01-02T03:04:60Z",
                "2024-01-02T03:04:05+25:00",
                "2024-01-02T03:04:05+02:00Z",
                "2024-01-02T03:04:05.\uff15Z",
                "0000-01-01T00:00:00Z",
                "10000-01-01T00:00:00Z",
                "2024-01-02T03:04:05Z\n",
                "0001-01-01T00:00:00+00:01",
                "9999-12-31T23:59:59-00:01",
            ],
        ),
    ]
)


@pytest.mark.parametrize("error, tag, value", WRONG_TAGS)
def test_a_wrong_tag_is_named(error, tag, value):
    may_be_missing = {(ExecutionRecord, "id"), (BackgroundRun, "ref")}
    for kind, document in KINDS_OF_RECORDS:
        if tag in document and not (value is None and (kind, tag) in may_be_missing):
            with pytest.raises(error, match=tag):
                kind.from_dict({**document, tag: value})


@pytest.mark.parametrize("document", [None, [("ref", "r")], "{}"])
def test_a_document_that_is_no_dict_is_a_type_error(document):
    for kind, _ in KINDS_OF_RECORDS:
        with pytest.raises(TypeError):
            kind.from_dict(document)


class NoOffset(tzinfo):
    def utcoffset(self, moment):
        return None


class Gone(enum.Enum):
    GONE = 1


EARLY = datetime(1, 1, 1, 12, tzinfo=timezone(timedelta(hours=13)))
LATE = datetime(9999, 12, 31, 12, tzinfo=timezone(timedelta(hours=-13)))
NAIVE = datetime(2024, 1, 1)
WRONG_FIELDS = one_by_one(
    [
        (
            ValueError,
            "started_at",
            [NAIVE, EARLY, LATE, NAIVE.replace(tzinfo=NoOffset())],
        ),
        (ValueError, "completed_at", [NAIVE]),
        (ValueError, "pid", [2**63, -(2**63) - 1]),
        (ValueError, "error", ["\ud800", "a\0b"]),
        (TypeError, "started_at", [None, "2024-01-01T00:00:00Z", 0]),
        (TypeError, "completed_at", ["", 0, NAIVE.date()]),
        (TypeError, "pid", [1.0, True, None, "1"]),
        (TypeError, "id", [None]),
        (TypeError, "ref", [None]),
        (TypeError, "status", [None, b"failed", 1, Gone.GONE]),
    ]
)
WRONG_FIELDS_OF_EXECUTIONS = one_by_one(
    [
        (ValueError, "duration", [LONGEST + timedelta(microseconds=1), timedelta.min]),
        (TypeError, "duration", [1, 1.5, None]),
        (ValueError, "exit_code", [2**63, -(2**64)]),
        (TypeError, "exit_code", ["0", True, None]),
        (ValueError, "working_dir", ["\udc80"]),
        (TypeError, "working_dir", [None]),
    ]
)


# ---- values of subclasses ----


class Mode(str, enum.Enum):  # noqa: UP042 - whose str() is another
    FAST = "fast"


class Level(enum.IntEnum):
    HIGH = 3


def odd_answer(self, *arguments):
    """What the odd subclasses below do instead of what is right."""
    return "odd"


ODD = dict.fromkeys(
    ("__str__", "__repr__", "__format__", "isoformat", "replace"), odd_answer
)
Loud = type("Loud", (str,), {**ODD, "encode": odd_answer})
Number = type("Number", (int,), {**ODD, "__int__": odd_answer, "__index__": odd_answer})
Data = type("Data", (bytes,), {**ODD, "__bytes__": odd_answer, "__len__": lambda self: 1})
# As pendulum's: -1 second isn't -1 day and 86399 seconds there.
Moment = type("Moment", (datetime,), {**ODD, "year": 1999, "astimezone": odd_answer})
FIELDS = dict.fromkeys(("days", "seconds", "microseconds", "__neg__", "total_seconds"), 7)
Span = type("Span", (timedelta,), {**ODD, **FIELDS, "__floordiv__": odd_answer})


MEMBERS = {"fast": Mode.FAST, 3: Level.HIGH}


def odd(value):
    """The same value as a member of an enumeration, or of a subclass with its own ideas."""
    if isinstance(value, datetime):
        return Moment.combine(value.date(), value.timetz())
    if isinstance(value, timedelta):
        return Span(microseconds=value // timedelta(microseconds=1))
    if isinstance(value, dict):
        return {key: odd(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        make = getattr(value, "_make", list)
        return make(map(odd, value))
    if value in MEMBERS:
        return MEMBERS[value]
    kind = {str: Loud, int: Number, bytes: Data}.get(type(value))
    return kind(value) if kind else value


PLAIN_RECORD = ExecutionRecord.from_dict({**FULL_EXECUTION, "duration": -999998000})
PLAIN_RECORD = PLAIN_RECORD._replace(status="fast")
PLAIN_RUN = BackgroundRun.from_dict({**FULL_RUN, "id": "fast"})


@pytest.mark.parametrize("plain", [PLAIN_RECORD, PLAIN_RUN])
def test_the_json_of_a_subclass_is_its_plain_value(plain):
    kind = type(plain)
    assert repr(odd(plain)) != repr(plain)
    assert repr(odd(plain).to_dict()) == repr(plain.to_dict())
    assert repr(kind.from_dict(odd(plain.to_dict()))) == repr(plain)


def test_a_time_that_was_twice_is_the_one_that_its_fold_says():
    class Clock(tzinfo):
        def utcoffset(self, moment):
            return timedelta(hours=1 if moment.fold else 2)

    moment = datetime(2024, 10, 27, 3, tzinfo=Clock(), fold=1)
    text = record()._replace(started_at=moment).to_dict()["startedAt"]
    assert text == "2024-10-27T02:00:00Z"


# ---- where things are ----


@pytest.fixture
def no_variables(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("FLOW", "XDG_", "LOCALAPPDATA")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)


CACHED = "/home/somebody/.cache/flow/flowstore.db"


@pytest.mark.parametrize(
    "platform, variables, expected",
    [
        ("linux", {}, CACHED),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/flow/flowstore.db"),
        ("linux", {"XDG_CACHE_HOME": ""}, CACHED),
        ("linux", {"XDG_CACHE_HOME": "x"}, CACHED),
        ("linux", {"XDG_CACHE_HOME": "/x", "FLOW_CACHE_DIR": "/c"}, "/c/flowstore.db"),
        ("linux", {"FLOW_CACHE_DIR": "sub/../d"}, "{cwd}/d/flowstore.db"),
        ("linux", {"FLOW_CACHE_DIR": "", "FLOWSTORE_PATH": ""}, CACHED),
        ("linux", {"FLOW_CACHE_DIR": "/c", "FLOWSTORE_PATH": "/f/a.db"}, "/f/a.db"),
        ("linux", {"FLOWSTORE_PATH": "a.db"}, "{cwd}/a.db"),
        ("linux", {"FLOWSTORE_PATH": "postgresql://h/d"}, "postgresql://h/d"),
        ("darwin", {}, "/home/somebody/Library/Caches/flow/flowstore.db"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/flow/flowstore.db"),
    ],
)
def test_the_default_path_follows_the_environment(
    no_variables, monkeypatch, tmp_path, platform, variables, expected
):
    monkeypatch.setattr(sys, "platform", platform)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert flowstore.default_path() == expected.format(cwd=tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_default_path_that_cannot_be_found_says_what_to_do(no_variables, monkeypatch):
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(StoreError, match="FLOWSTORE_PATH"):
        flowstore.default_path()
    monkeypatch.setenv("FLOWSTORE_PATH", "a.db")
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir(os.path.join("..", "gone"))
    with pytest.raises(StoreError, match=r"^a\.db: .*absolute") as caught:
        flowstore.default_path()
    assert caught.value.path == "a.db"


@pytest.mark.parametrize(
    "value, bucket",
    [
        (None, "root"),
        ("", "root"),
        ("a:b/c d::", "a_b_c_d__"),
        ("a\tb\\c-é", "a\tb\\c-é"),
        ("  ", "__"),
    ],
)
def test_the_current_bucket_has_no_colon_slash_or_space(
    no_variables, monkeypatch, value, bucket
):
    if value is not None:
        monkeypatch.setenv("FLOW_PROCESS_BUCKET", value)
    assert flowstore.environment_bucket() == bucket


@pytest.mark.parametrize(
    "value, expected",
    [
        (None, ""),
        ("", ""),
        ("plain", "plain"),
        ("${ODD}", "its value"),
        ("${CHAIN}", "${ODD}"),
        ("${MISSING}", ""),
        ("${A}${B}", ""),
        ("${${}", ""),
        *[
            (text, text)
            for text in ("${}", "$ODD", "{ODD}", "x${ODD}", "${ODD} ", "${ODD")
        ],
    ],
)
def test_a_variable_follows_exactly_one_reference(monkeypatch, value, expected):
    monkeypatch.setenv("ODD", "its value")
    monkeypatch.setenv("CHAIN", "${ODD}")
    for name in ("MISSING", "SUBJECT"):
        monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv("SUBJECT", value)
    assert flowstore.run_env_value("SUBJECT") == expected


# ---- the interface ----

OPERATIONS = re.findall(
    r"\w+",
    """
    set_cache_entry get_cache_entry get_cache_entries delete_cache_entry record_execution
    get_execution_history get_execution_histories get_all_execution_history
    list_execution_refs delete_execution_history save_background_run get_background_run
    get_background_runs list_background_runs delete_background_run create_process_bucket
    delete_process_bucket set_process_var get_process_var get_all_process_vars
    get_process_var_keys delete_process_var transaction""",
)


def test_a_store_of_ones_own_needs_the_originals_operations_and_nothing_private():
    assert DataStore.__abstractmethods__ - {"close"} == set(OPERATIONS)
    written = {name: lambda self, *arguments: arguments for name in OPERATIONS}
    mine = type("Mine", (DataStore,), written)()
    assert isinstance(mine, DataStore)
    assert mine.get_process_var("a", "b") == ("a", "b")
    assert mine.close() is None
    del written["transaction"]
    with pytest.raises(TypeError):
        type("Incomplete", (DataStore,), written)()


# ---- a model of a store ----


class DictStore:
    """A store of plain dicts and lists: the contract in short, which the others are
    compared with. It takes what is right only."""

    def __init__(self):
        self.cache, self.history, self.runs = {}, [], {}
        self.made, self.scopes = set(), {}

    def set_cache_entry(self, key, value):
        self.cache[key] = memoryview(value).tobytes()

    def get_cache_entry(self, key):
        return self.cache.get(key)

    def get_cache_entries(self, keys):
        return {key: self.cache[key] for key in keys if key in self.cache}

    def list_cache_keys(self, prefix=""):
        return sorted(key for key in self.cache if key.startswith(prefix))

    def delete_cache_entry(self, key):
        self.cache.pop(key, None)

    def record_execution(self, record):
        record = in_utc(record)
        for place, earlier in enumerate(self.history):
            if record.id and (earlier.ref, earlier.id) == (record.ref, record.id):
                self.history[place] = record
                return
        self.history.append(record)

    def get_recent_executions(self, limit=20, *, ref=None, status=None, since=ZERO_TIME):
        def is_asked_for(one):
            shown = one.status or ("failed" if one.exit_code else "completed")
            of_these = ref in (None, one.ref) and status in (None, shown)
            return of_these and one.started_at >= since

        found = sorted(filter(is_asked_for, self.history), key=by_start)
        return found[-limit:] if limit > 0 else found

    def get_execution_history(self, ref, limit=0):
        return self.get_recent_executions(limit, ref=ref)

    def get_execution_histories(self, refs, limit=0):
        known = self.list_execution_refs()
        return {
            ref: self.get_execution_history(ref, limit) for ref in refs if ref in known
        }

    def get_all_execution_history(self, limit_per_ref=0):
        return self.get_execution_histories(self.list_execution_refs(), limit_per_ref)

    def list_execution_refs(self):
        return sorted({one.ref for one in self.history})

    def delete_execution_history(self, ref):
        self.history = [one for one in self.history if one.ref != ref]

    def save_background_run(self, run):
        self.runs[run.id] = in_utc(run)

    def get_background_run(self, id):
        if id not in self.runs:
            raise NotFoundError(id)
        return self.runs[id]

    def get_background_runs(self, ids):
        return {id: self.runs[id] for id in ids if id in self.runs}

    def list_background_runs(self):
        return [self.runs[id] for id in sorted(self.runs)]

    def delete_background_run(self, id):
        self.runs.pop(id, None)

    def create_process_bucket(self, bucket):
        self.made.add(bucket)

    def delete_process_bucket(self, bucket):
        self.made.discard(bucket)
        self.scopes.pop(bucket, None)

    def list_process_buckets(self):
        return sorted(self.made.union(filter(self.own, self.scopes)))

    def set_process_var(self, bucket, key, value):
        self.scopes.setdefault(bucket, {})[key] = value

    def get_process_var(self, bucket, key):
        variables = self.get_all_process_vars(bucket)
        if key not in variables:
            raise NotFoundError(key)
        return variables[key]

    def own(self, bucket):
        return self.scopes.get(bucket, {})

    def get_all_process_vars(self, bucket):
        return dict(sorted({**self.own("root"), **self.own(bucket)}.items()))

    def get_process_var_keys(self, bucket):
        own = self.own(bucket)
        return sorted(own) + sorted(self.own("root").keys() - own.keys())

    def delete_process_var(self, bucket, key):
        self.own(bucket).pop(key, None)

    def close(self):
        """It holds nothing."""

    @contextlib.contextmanager
    def transaction(self):
        before = copy.deepcopy(vars(self))
        try:
            yield self
        except BaseException:
            vars(self).update(before)
            raise


def by_start(one):
    return one.started_at


def in_utc(one):
    ended = one.completed_at and one.completed_at.astimezone(UTC)
    return one._replace(started_at=one.started_at.astimezone(UTC), completed_at=ended)


class Both:
    """A store and its model: each call is made on both, must have the same outcome, in order
    and types, and returns it. `given` says what the store gets in an argument's place."""

    def __init__(self, store, given=lambda argument: argument):
        self.store, self.model, self.given = store, DictStore(), given

    def __getattr__(self, operation):
        def call(*arguments, **options):
            expected = outcome_of(self.model, operation, arguments, options)
            theirs = self.given(list(arguments)), self.given(options)
            found = outcome_of(self.store, operation, *theirs)
            assert repr(found) == repr(expected), (operation, arguments, options)
            return found

        return call


def outcome_of(store, operation, arguments, options):
    """What an operation returns, or the kind of what it raises."""
    try:
        return getattr(store, operation)(*arguments, **options)
    except Exception as error:
        return type(error)


# ---- the contract: what every store does ----

WHOLE = [kind for kind in KINDS if not kind.endswith("transaction")]
# for what takes hundreds of calls, each of which is a new connection otherwise
HELD = [kind for kind in KINDS if " " in kind]
thrifty = pytest.mark.parametrize("each", HELD, indirect=True)
whole = pytest.mark.parametrize("each", WHOLE, indirect=True)
file_only = pytest.mark.parametrize("each", ["file", "file session"], indirect=True)


@pytest.fixture
def both(each):
    return Both(each)


def calls_with(name):
    """Each operation that takes a name, once for each place of one."""
    return [
        ("set_cache_entry", (name, b"new")),
        ("get_cache_entry", (name,)),
        ("get_cache_entries", (["k", name],)),
        ("delete_cache_entry", (name,)),
        ("record_execution", (record(name),)),
        ("get_execution_history", (name,)),
        ("get_execution_histories", (["k", name],)),
        ("delete_execution_history", (name,)),
        ("save_background_run", (background(name),)),
        ("get_background_run", (name,)),
        ("get_background_runs", (["k", name],)),
        ("delete_background_run", (name,)),
        ("create_process_bucket", (name,)),
        ("delete_process_bucket", (name,)),
        ("set_process_var", (name, "k", "new")),
        ("set_process_var", ("k", name, "new")),
        ("get_process_var", (name, "k")),
        ("get_process_var", ("k", name)),
        ("get_all_process_vars", (name,)),
        ("get_process_var_keys", (name,)),
        ("delete_process_var", (name, "k")),
        ("delete_process_var", ("k", name)),
    ]


CALLS = [
    *calls_with("k"),
    ("list_cache_keys", ()),
    ("list_execution_refs", ()),
    ("get_all_execution_history", ()),
    ("get_recent_executions", ()),
    ("list_background_runs", ()),
    ("list_process_buckets", ()),
]
WRITES = [call for call in CALLS if re.match("set|delete|record|save|create", call[0])]


def call_all(store, calls):
    for operation, arguments in calls:
        getattr(store, operation)(*arguments)


def each_raises(error, store, operation, *several):
    """An operation raises the error with each of several arguments."""
    for arguments in several:
        with pytest.raises(error):
            getattr(store, operation)(*arguments)


def all_raise(error, store, calls):
    for operation, arguments in calls:
        each_raises(error, store, operation, arguments)


def filled_store(store, name="k"):
    """A store in which every operation on the name finds something."""
    store.set_cache_entry(name, b"value")
    store.record_execution(record(name))
    store.save_background_run(background(name))
    store.set_process_var(name, name, "value")
    return store


def contents_of(store):
    """All that a store holds."""
    buckets = store.list_process_buckets()
    return (
        store.get_cache_entries(store.list_cache_keys()),
        store.get_all_execution_history(),
        store.list_background_runs(),
        {bucket: store.get_all_process_vars(bucket) for bucket in buckets},
    )


def raised_in_a_thread(use, *arguments):
    """What a call raises in another thread, or None."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(use, *arguments).exception(60)


# ---- names and texts ----

NAMES = [
    "root",
    "a",
    "A",
    "a ",
    "é",
    "e\u0301",
    "%",
    "_",
    "two\nlines\r",
    "1",
    "1.0",
    ":key",
    "'; DROP TABLE cache; --",
    'quo"te`\\',
    "\x01\x7f\x80",
    "Grüße \U0001f600",
    "a" * 1299,
    "\ud7ff",
    "\ue000",
    "\uffff",
    "\U00010000",
    "NULL",
    "?1",
]
NO_TEXTS = ["\ud800", "a\udfff", "\udcff", "\ud83d\ude00", "\0", "a\0b", "ab\0"]


@thrifty
@pytest.mark.parametrize(
    "error, names",
    [(ValueError, ["", *NO_TEXTS]), (TypeError, [None, b"k", 1, True, ("k",)])],
)
def test_a_name_that_is_none_is_refused_and_changes_nothing(each, error, names):
    before = contents_of(filled_store(each))
    for name in names:
        all_raise(error, each, calls_with(name))
    assert contents_of(each) == before
    for bulk in ("get_cache_entries", "get_execution_histories", "get_background_runs"):
        each_raises(TypeError, each, bulk, ("ab",), (b"ab",), (None,), (1,))


@thrifty
def test_any_text_is_a_name_and_names_come_in_the_order_of_their_code_points(both):
    assert sorted(NAMES) == sorted(NAMES, key=str.encode)
    for name in random.Random(1).sample(NAMES, len(NAMES)):
        filled_store(both, name)
        both.create_process_bucket(name)
        both.set_process_var("scope", name, name)
    contents_of(both)
    both.list_execution_refs()
    both.get_process_var_keys("scope")
    for name in NAMES[::8]:
        call_all(both, calls_with(name))
    contents_of(both)


@file_only
def test_a_name_in_a_file_has_any_length(both):
    call_all(filled_store(both, "é" * 100_000), calls_with("é" * 100_000))


SETTINGS = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
any_text = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=8)


@thrifty
@SETTINGS
@given(any_text, st.binary(max_size=40))
@example("\0", b"")
@example("\ud800", b"\0")
@example("two\nlines'\"", b"")
@example("\U0001f600" * 300, b"")
def test_a_text_is_taken_exactly_where_utf8_can_encode_it_without_nul(both, text, data):
    texts = [field for field, value in record()._asdict().items() if value == ""]
    calls = [
        ("set_process_var", ("scope", "key", text)),
        ("record_execution", (record("k", **dict.fromkeys(texts, text)),)),
        ("save_background_run", (background("k", ref=text, status=text, error=text),)),
    ]
    if text:
        calls.append(("set_cache_entry", (text, data)))
    if re.search("[\0\ud800-\udfff]", text):
        all_raise(ValueError, both.store, calls)
    else:
        call_all(both, calls)
    contents_of(both)


def test_a_subclass_counts_as_its_plain_value_and_plain_ones_come_back(each):
    both = Both(each, odd)
    for name in ("fast", "loud"):
        filled_store(both, name)
    both.record_execution(PLAIN_RECORD)
    both.save_background_run(PLAIN_RUN)
    both.get_recent_executions(3, ref=PLAIN_RECORD.ref, status="fast", since=START)
    both.get_execution_histories(["loud", PLAIN_RECORD.ref], 7)
    both.list_cache_keys("fas")
    contents_of(both)
    call_all(both, calls_with("fast"))
    contents_of(both)


# ---- cache ----


def test_a_cache_entry_is_any_bytes_until_it_is_replaced_or_deleted(both):
    for value in (
        b"",
        b"\0\xff" * 70_000,
        bytearray(b"aabb"),
        memoryview(b"a-a-b-b")[::2],
        array.array("H", [0x6161, 0x6262]),
    ):
        both.set_cache_entry("k", value)
        both.get_cache_entry("k")
    wrong = [("k", value) for value in ("text", None, 1, [1], object(), True)]
    each_raises(TypeError, both.store, "set_cache_entry", *wrong)
    assert both.get_cache_entry("k") == b"aabb"
    for _ in range(2):  # a missing one is no error
        both.delete_cache_entry("k")
        assert both.get_cache_entry("k") is None


@thrifty
def test_bulk_reads_take_any_number_of_names_and_leave_the_missing_out(both):
    names = [f"n{number:04}" for number in range(1200)]
    there = names[::-400]
    for name in there:
        filled_store(both, name)
        both.record_execution(record(name, 1))
    for asked in (names, tuple(names[::-1]), [names[2], *there, *there], [names[2]], []):
        both.get_cache_entries(asked)
        both.get_background_runs(asked)
        for limit in range(3):
            both.get_execution_histories(asked, limit)
    assert list(both.store.get_cache_entries(iter(there))) == there


def test_cache_keys_are_those_that_begin_with_the_prefix(both):
    last = "\U0010ffff"
    keys = ["a", "ab", "aba", "ac", "a%", "a_", f"a{last}", f"a{last}b", "b", "A", "%a"]
    keys += ["\ud7ff", "\ud7ffa", "\ue000", "\uffff", "\U00010000", "\x7f\x80", "é"]
    keys += [last, last * 2, f"{last}a", "__"]
    for key in keys:
        both.set_cache_entry(key, b"")
    both.list_cache_keys()
    for prefix in ("", "abcd", "%", "_", "'", "\x7f", *keys):
        both.list_cache_keys(prefix=prefix)
    each_raises(TypeError, both.store, "list_cache_keys", (None,), (b"a",))
    each_raises(ValueError, both.store, "list_cache_keys", ("\ud800",), ("\0",))


# ---- records ----


def test_instants_durations_and_numbers_come_back_and_sort_as_time(both):
    moments = [
        ZERO_TIME,
        START.replace(microsecond=0),
        START.astimezone(WEST),
        LAST_TIME,
    ]
    tiny = timedelta(microseconds=1)
    durations = [tiny, -tiny, LONGEST, -LONGEST]
    values = list(zip(moments, durations, [0, -1, 2**63 - 1, -(2**63)]))
    for moment, duration, number in random.Random(1).sample(values, len(values)):
        same = {"started_at": moment, "completed_at": moment, "pid": number}
        one = record("k", duration=duration, exit_code=number)._replace(**same)
        both.record_execution(one)
        both.save_background_run(background("k")._replace(**same))
        both.get_background_run("k")
    assert list(map(by_start, both.get_execution_history("k"))) == moments


@pytest.mark.parametrize(
    "save, good, wrong, other",
    [
        ("save_background_run", background("k"), WRONG_FIELDS, record("k")),
        ("record_execution", record("k"), WRONG_FIELDS, background("k")),
        ("record_execution", record("k"), WRONG_FIELDS_OF_EXECUTIONS, None),
    ],
)
def test_a_record_with_a_wrong_field_is_refused_and_changes_nothing(
    each, save, good, wrong, other
):
    before = contents_of(filled_store(each))
    for error, field, value in wrong:
        each_raises(error, each, save, (good._replace(**{field: value}),))
    each_raises(TypeError, each, save, (other,), (tuple(good),), (good.to_dict(),))
    assert contents_of(each) == before


# ---- history ----


def test_a_history_is_the_newest_with_the_oldest_of_them_first(both):
    for code, minute in enumerate([3, 0, 4, 3, 1, 3]):
        both.record_execution(record("k", minute, exit_code=code))
        both.record_execution(record("other", minute))
    assert [one.exit_code for one in both.get_execution_history("k", 4)] == [0, 3, 5, 2]

    def reads_with(limit):
        return [
            ("get_execution_history", ("k", limit)),
            ("get_execution_history", ("unknown", limit)),
            ("get_execution_histories", (["x", "other", "k"], limit)),
            ("get_all_execution_history", (limit,)),
            ("get_recent_executions", (limit,)),
        ]

    for limit in (-(2**63), *range(-1, 8), 2**63 - 1):
        call_all(both, reads_with(limit))
        both.get_execution_histories(["k"], limit=limit)
        both.get_all_execution_history(limit_per_ref=limit)
        both.get_recent_executions(limit, ref="k")
    for wrong in (1.0, "1", None, True):
        all_raise(TypeError, both.store, reads_with(wrong))
    all_raise(ValueError, both.store, reads_with(2**63))


def test_a_record_with_an_id_replaces_that_of_its_ref_and_id_in_its_place(both):
    for ref, id, minute, status in [
        ("k", "a", 0, "running"),
        ("k", "b", 0, "running"),
        ("other", "b", 0, "running"),
        ("k", "b", 0, "completed"),
        ("k", "a", 2, ""),
        ("k", "a", 0, ""),
        ("k", "", 0, ""),
        ("k", "", 0, ""),
        ("k", "A", 0, ""),
    ]:
        both.record_execution(record(ref, minute, id=id, status=status))
        both.get_execution_history("k")
        both.get_recent_executions()
    for _ in range(2):  # an unknown one is no error
        both.delete_execution_history("k")
        contents_of(both)
        both.list_execution_refs()
    both.record_execution(record("k", id="a"))
    contents_of(both)


def test_recent_executions_are_the_newest_that_are_asked_for(both):
    for ref, minute, status, code in [
        ("a", 0, "", 0),
        ("b", 3, "", 2),
        ("a", 1, "completed", 9),
        ("c", 2, "failed", 0),
        ("b", 2, "running", 0),
        ("a", 5, "odd", 0),
        ("a", 2, "", 255),
        ("c", 4, "", -1),
    ]:
        both.record_execution(record(ref, minute, status=status, exit_code=code))
    for minutes in (0, 2, 5.01):
        since = (START + timedelta(minutes=minutes)).astimezone(WEST)
        for status in ("completed", "failed", "running", "odd", "Failed", ""):
            both.get_recent_executions(status=status, since=since)
            both.get_recent_executions(1, ref="a", status=status, since=since)
    both.get_recent_executions(limit=3)
    for number in range(15):
        both.record_execution(record(f"r{number}", 30 - number))
    assert len(both.get_recent_executions()) == 20
    for error, options in [
        (TypeError, {"status": 1}),
        (TypeError, {"since": "2024-01-01"}),
        (TypeError, {"since": START.date()}),
        (TypeError, {"ref": 1}),
        (ValueError, {"status": "\0"}),
        (ValueError, {"since": NAIVE}),
        (ValueError, {"since": EARLY}),
        (ValueError, {"ref": ""}),
    ]:
        with pytest.raises(error):
            both.store.get_recent_executions(**options)


# ---- background runs ----


def test_a_background_run_is_saved_and_replaced_by_its_id(both):
    for id in ("b", "a", "c"):
        both.save_background_run(background(id, status="running", error="none"))
    both.save_background_run(
        background("a", 1, ref="", status="failed", completed_at=START)
    )
    both.list_background_runs()
    for _ in range(2):
        both.delete_background_run("b")
        both.get_background_runs(["c", "b", "a", "c"])
    with pytest.raises(NotFoundError, match="'b'") as caught:
        both.store.get_background_run("b")
    assert caught.value.path == both.store.path
    assert caught.value.path in str(caught.value)


@file_only
@pytest.mark.parametrize(
    "cell, reads",
    [
        ("cache value 5", ["get_cache_entry"]),
        ("history pid 'many'", ["get_execution_history", "reconcile"]),
        ("history error x'6b'", ["get_execution_history"]),
        ("history started_at 'yesterday'", ["get_execution_history"]),
        ("background pid 'many'", ["get_background_run", "reconcile"]),
        ("background completed_at x'6b'", ["get_background_run"]),
        ("process_vars value CAST(x'80'AS\tTEXT)", ["get_all_process_vars"]),
    ],
)
def test_a_cell_of_another_type_is_a_damaged_store(each, cell, reads):
    filled_store(each)
    each.record_execution(record("k", id="1", status="running", pid=1))
    each.save_background_run(background("k", status="running"))
    table, column, value = cell.split(" ")
    by_hand(each.path, f"UPDATE {table} SET {column} = {value}")
    for read in reads:
        each_raises(CorruptStoreError, each, read, () if read == "reconcile" else ("k",))


# ---- process variables ----


def test_a_variable_is_looked_up_in_the_bucket_then_in_root(both):
    for place in ("root a", "root c", "root z", "scope m", "scope c", "other o"):
        both.set_process_var(*place.split(), place)
    assert both.get_process_var("scope", "a") == "root a"
    assert both.get_process_var("scope", "c") == "scope c"
    assert both.get_process_var_keys("scope") == ["c", "m", "a", "z"]
    both.set_process_var("scope", "c", "")  # which counts as found
    for bucket in ("scope", "root", "other", "none"):
        for key in "acmoz":
            both.get_process_var(bucket, key)
        both.get_all_process_vars(bucket)
        both.get_process_var_keys(bucket)
    for _ in range(2):  # a missing one is no error
        both.delete_process_var("scope", "c")
        assert both.get_process_var("scope", "c") == "root c"
    for value in (None, b"v"):
        each_raises(TypeError, both.store, "set_process_var", ("a", "b", value))
    with pytest.raises(NotFoundError, match=r"'o'.*'scope'") as caught:
        both.store.get_process_var("scope", "o")
    assert caught.value.path in str(caught.value)


def test_buckets_are_those_that_were_made_and_those_that_have_variables(both):
    for bucket in ("made", "deleted", "é", "é"):
        both.create_process_bucket(bucket)
    for bucket in ("set", "emptied", "root", "é"):
        both.set_process_var(bucket, "k", bucket)
    both.create_process_bucket("é")
    contents_of(both)
    for bucket in ("emptied", "é"):
        both.delete_process_var(bucket, "k")
    for bucket in ("deleted", "never", "set", "root"):
        both.delete_process_bucket(bucket)
        contents_of(both)
    assert both.list_process_buckets() == ["made", "é"]


# ---- transaction() ----


@whole
def test_a_transaction_lands_whole_and_is_seen_inside_alone(each):
    with each.transaction() as transaction:
        assert isinstance(transaction, flowstore.Session)
        assert transaction.path == each.path
        inside = contents_of(filled_store(transaction))
        assert inside[0] == {"k": b"value"}
        transaction.close()
        transaction.set_cache_entry("k", b"later")
    assert contents_of(each) == ({"k": b"later"}, *inside[1:])


@pytest.mark.parametrize(
    "kind",
    [ArithmeticError, KeyboardInterrupt, GeneratorExit, TimeoutError, StoreBusyError],
)
@whole
def test_a_transaction_leaves_nothing_where_an_exception_passes_through(each, kind):
    before = contents_of(filled_store(each))
    raised = kind("stop")
    with pytest.raises(kind) as caught, each.transaction() as transaction:
        filled_store(transaction, "other")
        call_all(transaction, WRITES)
        raise raised
    assert caught.value is raised
    assert caught.value.__cause__ is None
    assert contents_of(each) == before
    each.set_cache_entry("k", b"the lock is free")


@whole
def test_one_in_a_transaction_is_a_runtime_error_at_once_and_it_goes_on(each, tmp_path):
    with each.transaction() as transaction:
        transaction.set_cache_entry("a", b"1")
        for enter in (
            transaction.transaction,
            each.transaction,
            transaction.session,
            lambda: transaction.execution("k"),
            lambda: transaction.prune(1),
            lambda: transaction.backup(tmp_path / "b"),
        ):
            with pytest.raises(RuntimeError), enter():
                pass
        assert transaction.get_cache_entry("a") == b"1"
        transaction.set_cache_entry("b", b"2")
    assert contents_of(each) == ({"a": b"1", "b": b"2"}, {}, [], {})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("way", ["session", "transaction"])
@whole
def test_neither_serves_after_its_end_or_in_another_thread(each, way):
    calls = [*CALLS, (way, ()), ("execution", ("k",))]
    with getattr(each, way)() as inner:
        for method, arguments in [*calls, ("prune", (1,))]:
            error = raised_in_a_thread(getattr(inner, method), *arguments)
            assert isinstance(error, RuntimeError), method
        inner.set_cache_entry("k", b"1")
    all_raise(RuntimeError, inner, calls)
    assert contents_of(each) == ({"k": b"1"}, {}, [], {})


@file_only
def test_another_handle_in_its_thread_reads_what_was_before_and_may_not_write(
    each, tmp_path
):
    (tmp_path / "link.db").symlink_to(each.path)
    other = SQLiteDataStore(each.path, timeout=60)
    link = SQLiteDataStore(tmp_path / "link.db", timeout=60)
    with other.session() as session, each.transaction() as transaction:
        inside = contents_of(filled_store(transaction))
        for handle in (other, link, session, each):
            all_raise(RuntimeError, handle, [*WRITES, ("prune", (1,))])
            for manager in (handle.transaction(), handle.execution("k")):
                with pytest.raises(RuntimeError), manager:
                    pass
        for handle in (other, link, session):
            assert contents_of(handle) == ({}, {}, [], {})
        with pytest.raises(RuntimeError):
            destroy_store(each.path)
        assert contents_of(transaction) == inside
    assert contents_of(each) == inside


# ---- session() ----


@whole
def test_a_sessions_operations_take_effect_each_by_itself(each):
    with pytest.raises(ArithmeticError), each.session() as session:
        assert isinstance(session, flowstore.Session)
        assert session.path == each.path
        filled_store(session)
        assert each.get_cache_entry("k") == b"value"
        each.set_cache_entry("k", b"of another")
        assert session.get_cache_entry("k") == b"of another"
        raise ArithmeticError
    assert each.list_cache_keys() == each.list_execution_refs() == ["k"]


@whole
def test_in_a_session_all_operations_work(each):
    with each.session() as session:
        with session.execution("k", id="1") as run, session.session() as second:
            second.set_process_var(run.bucket, "key", "value")
            assert session.get_process_var("1", "key") == "value"
        with session.transaction() as transaction:
            transaction.set_cache_entry("k", b"1")
            assert session.get_cache_entry("k") == b"1"
            assert session.get_cache_entries(["k", "x"]) == {"k": b"1"}
        assert [one.status for one in session.get_execution_history("k")] == ["completed"]
        assert session.reconcile() == 0
        assert session.prune(keep=0) == (1, 0)
        assert session.list_process_buckets() == []
    assert contents_of(each) == ({"k": b"1"}, {}, [], {})


# ---- prune() ----


@pytest.mark.parametrize(
    "limits, left",
    [
        ({"keep": 0}, "16"),
        ({"keep": 1}, "14567"),
        ({"keep": 2}, "134567"),
        ({"keep": 2**63 - 1}, "01234567"),
        ({"before": START}, "01234567"),
        ({"before": START + timedelta(minutes=1)}, "123456"),
        ({"before": START + timedelta(minutes=2)}, "12346"),
        ({"before": LAST_TIME}, "16"),
        ({"keep": 1, "before": START + timedelta(minutes=2)}, "146"),
        ({"keep": 3, "before": START + timedelta(minutes=2)}, "12346"),
    ],
)
@whole
def test_prune_keeps_the_newest_that_ended_and_all_that_runs(each, limits, left):
    with each.transaction() as transaction:
        for id, ref, minute, status in [
            ("0", "a", 0, "completed"),
            ("1", "a", 1, "running"),
            ("2", "a", 2, "failed"),
            ("3", "a", 2, ""),
            ("4", "a", 3, "odd"),
            ("5", "b", 1, "completed"),
            ("6", "b", 0, "running"),
            ("7", "c", 0, "failed"),
        ]:
            transaction.record_execution(record(ref, minute, id=id, status=status))
            run = background(id, minute, ref=ref, status=status)
            transaction.save_background_run(run)
    gone = 8 - len(left)
    assert each.prune(**odd(limits)) == (gone, gone)
    assert sorted(one.id for one in each.get_recent_executions()) == list(left)
    assert [run.id for run in each.list_background_runs()] == list(left)
    assert each.prune(**limits) == (0, 0)


@whole
def test_prune_takes_many_steps_and_refuses_what_is_no_limit(each):
    with each.transaction() as transaction:
        for number in range(1200):
            transaction.record_execution(record("k", number, pid=number))
            transaction.save_background_run(background(str(number), number))
    each_raises(ValueError, each, "prune", (), (-1,), (2**63,), (1, NAIVE))
    each_raises(TypeError, each, "prune", (1.0,), ("1",), (True,), (None, "2024"))
    assert each.prune(keep=5) == (1195, 1195)
    found = [one.pid for one in each.get_recent_executions(0)]
    assert found == list(range(1195, 1200))


# ---- any calls, in and out of sessions and transactions ----

good_text = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6
)
one_of_few = st.sampled_from(["root", "a", "b", "é", "\U0001f600", "a\nb"])
some_name = st.one_of(one_of_few, one_of_few, good_text.filter(bool))
some_names = st.lists(some_name, max_size=4)
some_instant = st.sampled_from(
    [START, START, START.astimezone(WEST), ZERO_TIME, LAST_TIME]
)
some_number = st.sampled_from([0, 0, 1, -1, 2**63 - 1, -(2**63)])
some_status = st.sampled_from(["", "failed", "completed", "odd"])
some_limit = st.integers(-1, 4)
some_execution = st.builds(
    lambda **fields: ExecutionRecord(**fields),  # noqa: PLW0108 - the others have defaults
    ref=some_name,
    started_at=some_instant,
    duration=st.timedeltas(-LONGEST, LONGEST),
    exit_code=some_number,
    id=st.sampled_from(["", "1", "2", "é"]),
    error=good_text,
    completed_at=st.none() | some_instant,
    status=some_status,
)
some_run = st.builds(
    lambda **fields: BackgroundRun(**fields),  # noqa: PLW0108
    id=some_name,
    pid=some_number,
    ref=good_text,
    started_at=some_instant,
    status=some_status,
    completed_at=st.none() | some_instant,
)
some_call = st.one_of(
    some_name.flatmap(lambda name: st.sampled_from([*calls_with(name), *CALLS])),
    *(
        st.tuples(st.just(operation), st.tuples(*arguments))
        for operation, *arguments in [
            ("close",),
            ("set_cache_entry", some_name, st.binary(max_size=20)),
            ("get_cache_entries", some_names),
            ("list_cache_keys", good_text),
            ("record_execution", some_execution),
            ("get_execution_histories", some_names, some_limit),
            ("get_all_execution_history", some_limit),
            ("get_recent_executions", some_limit),
            ("save_background_run", some_run),
            ("set_process_var", some_name, some_name, good_text),
        ]
    ),
)


class StoreAndModel(RuleBasedStateMachine):
    """A store in a file, in and out of sessions and transactions, beside the model of it."""

    @initialize()
    def start(self):
        self.folder = tempfile.TemporaryDirectory()
        self.both = Both(SQLiteDataStore(f"{self.folder.name}/flowstore.db"))
        self.entered = []  # the ways in, each with its end and the store that it was in

    def is_in_a_transaction(self):
        return any(way == "transaction" for way, _, _ in self.entered)

    @rule(calls=st.lists(some_call, min_size=1, max_size=12))
    def call(self, calls):
        call_all(self.both, calls)

    @precondition(lambda self: not self.is_in_a_transaction())
    @rule(way=st.sampled_from(["session", "transaction"]))
    def enter(self, way):
        stack = contextlib.ExitStack()
        self.entered.append((way, stack, self.both.store))
        self.both.store = stack.enter_context(getattr(self.both.store, way)())
        if way == "transaction":
            stack.enter_context(self.both.model.transaction())

    @precondition(lambda self: self.entered)
    @rule(error=st.sampled_from([None, ArithmeticError()]))
    def leave(self, error):
        _, stack, outer = self.entered.pop()
        with contextlib.suppress(ArithmeticError), stack:
            if error:
                raise error
        self.both.store = outer

    @precondition(lambda self: not self.entered)
    @rule()
    def destroy(self):
        flowstore.destroy_store(self.both.store.path)
        self.both = Both(self.both.store)

    def teardown(self):
        while self.entered:
            self.leave(None)
        contents_of(self.both)
        self.folder.cleanup()


def test_a_store_does_what_its_model_does():
    steps = settings(SETTINGS, max_examples=20, stateful_step_count=25)
    run_state_machine_as_test(StoreAndModel, settings=steps)


@thrifty
@settings(SETTINGS, max_examples=8)
@given(st.lists(some_call, min_size=20, max_size=30))
def test_each_kind_does_what_the_model_does(both, calls):
    call_all(both, calls)
    contents_of(both)


# ---- the file: helpers ----

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: chown")


@pytest.fixture
def place():
    """A folder that an unprivileged user may read, with a store of one variable in it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        SQLiteDataStore(f"{folder}/flowstore.db").set_process_var("b", "k", "old")
        os.chmod(f"{folder}/flowstore.db", 0o644)
        yield folder
        os.chmod(folder, 0o755)


@contextlib.contextmanager
def an_ordinary_user():
    """Root lays its rights down, though not for good: only the effective user changes."""
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if privileged:
            os.seteuid(0)


@contextlib.contextmanager
def a_limit(kind, value):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def with_mounts(commands, code):
    """What this code prints in a process that sees mounts of its own."""
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    mount = [*unshare, "mount", "-t", "tmpfs", "none", "/mnt"]
    if not shutil.which("unshare") or subprocess.run(mount).returncode != 0:
        pytest.skip("needs Linux, unshare and the right to mount")
    python = [sys.executable, "-c", f"import os, sys, flowstore\n{code}"]
    done = subprocess.run(
        [*unshare, "sh", "-c", f'{commands} && exec "$@"', "sh", *python],
        capture_output=True,
        text=True,
        cwd="/proc",
        env=environment(),
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def value_of(use, *arguments):
    """What a call returns, or the StoreError that it raises."""
    try:
        return use(*arguments)
    except StoreError as error:
        return error


def refused(kind, words, use, *arguments):
    """The error, of exactly this kind, that a call raises: its message has these words and
    names the error's file."""
    with pytest.raises(StoreError) as caught:
        use(*arguments)
    error = caught.value
    assert type(error) is kind
    assert words in str(error)
    assert error.path
    assert error.path in str(error)
    return error


def files_in(folder):
    """What is in a folder, by name: mode, time and content."""
    found = {}
    for each in sorted(Path(folder).iterdir()):
        status = each.lstat()
        data = each.read_bytes() if each.is_file() else b""
        found[each.name] = stat.S_IMODE(status.st_mode), status.st_mtime_ns, data
    return found


def modes_in(folder):
    return {name: mode for name, (mode, *_) in files_in(folder).items()}


@pytest.fixture
def prepared(monkeypatch):
    """Has all connections that are opened from now on made ready by a function."""

    def prepare(function):
        connect = sqlite3.connect

        def connect_and_prepare(*arguments, **options):
            connection = connect(*arguments, **options)
            function(connection)
            return connection

        monkeypatch.setattr(sqlite3, "connect", connect_and_prepare)

    return prepare


# ---- the file: what it is ----


@pytest.mark.parametrize("umask", [0, 0o777])
def test_a_store_is_one_private_file_in_private_folders(place, umask):
    os.chmod(place, 0o777)
    folder = f"{place}/new/deep"
    before = os.umask(umask)
    try:
        with an_ordinary_user():
            store = SQLiteDataStore(f"{folder}/flowstore.db")
            with store.session() as session:
                session.set_cache_entry("k", b"v")
                during = modes_in(folder)
            store.backup(f"{folder}/copy")
            after = modes_in(folder)
    finally:
        os.umask(before)
    files = ["flowstore.db", "flowstore.db-shm", "flowstore.db-wal"]
    assert during == dict.fromkeys(files, 0o600)
    assert after == {"copy": 0o600, "flowstore.db": 0o600}
    assert modes_in(f"{place}/new") == {"deep": 0o700}
    assert modes_in(place)["new"] == 0o700


def test_the_file_says_whose_it_is(store, path):
    pragmas = ["application_id", "user_version", "journal_mode", "auto_vacuum"]
    found = [by_hand(path, f"PRAGMA {each}")[0][0] for each in pragmas]
    assert found == [0x464C5753, 2, "wal", 2]
    tables = ["background", "cache", "history", "process_buckets", "process_vars"]
    names = by_hand(
        path, "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1"
    )
    assert names == [(each,) for each in tables]
    store.record_execution(record(duration=timedelta(seconds=1)))
    assert by_hand(path, "SELECT started_at, duration FROM history") == [
        ("2024-05-06T07:08:09.123456Z", 10**9)
    ]


def test_a_write_is_made_with_the_settings_that_it_depends_on(store, prepared):
    full = int(sys.platform == "darwin")  # elsewhere fsync() reaches the disk
    expected = {
        "synchronous": 2,
        "fullfsync": full,
        "checkpoint_fullfsync": full,
        "wal_autocheckpoint": 0,
        "journal_size_limit": 2**22 - 1,
        "secure_delete": 1,
        "temp_store": 2,
        "trusted_schema": 0,
        "cell_size_check": 1,
    }
    made = []
    prepared(made.append)
    with store.session() as session:
        session.set_cache_entry("k", b"v")
        [connection] = made
        for name, value in expected.items():
            assert connection.execute(f"PRAGMA {name}").fetchone() == (value,), name


def test_deleted_values_are_nowhere_in_the_file(store, path):
    for value in (b"secret-1" * 2000, b"secret-2"):
        store.set_cache_entry("k", value)
    store.set_process_var("b", "k", "secret-3")
    store.delete_cache_entry("k")
    store.delete_process_bucket("b")
    assert b"secret" not in Path(path).read_bytes()


def test_a_file_of_no_bytes_is_a_new_store(path):
    Path(path).touch()
    os.chmod(path, 0o644)
    store = SQLiteDataStore(path)
    store.set_cache_entry("k", b"v")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    os.chmod(path, 0o640)  # somebody's choice, for what is a store already
    assert store.get_cache_entry("k") == b"v"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640


def test_what_others_have_added_is_left_alone(store, path):
    by_hand(
        path,
        "CREATE TABLE notes (a)",
        "INSERT INTO notes VALUES (1)",
        "CREATE TABLE pairs (key, value)",
        "CREATE VIEW seen AS SELECT * FROM cache",
        "CREATE INDEX mine ON history (label)",
    )
    store = SQLiteDataStore(path)
    store.set_cache_entry("k", b"v")
    store.record_execution(record())
    assert by_hand(path, "SELECT * FROM notes, seen") == [(1, "k", b"v")]


# ---- the file: what is refused ----


def statements_of(*statements):
    return lambda path: by_hand(path, *statements)


def in_place_of_it(make):
    def replace(path):
        os.unlink(path)
        make(path)

    return replace


def bytes_of(data):
    return in_place_of_it(lambda path: Path(path).write_bytes(data))


FOREIGN = statements_of("CREATE TABLE theirs (a)")
VIEW = "CREATE VIEW cache AS SELECT 'k' AS key, x'00' AS value"
TRIGGER = "CREATE TRIGGER spy AFTER INSERT ON cache BEGIN DELETE FROM history; END"
BBOLT = bytes(16) + b"\xed\xda\x0c\xed" + bytes(4076)
REFUSED = {
    "a foreign id": (statements_of("PRAGMA application_id = 7"), "another program's"),
    "no id": (in_place_of_it(FOREIGN), "another program's"),
    "a newer schema": (statements_of("PRAGMA user_version = 3"), "update flowstore"),
    "an older schema": (statements_of("PRAGMA user_version = 1"), "move it away"),
    "bbolt": (bytes_of(BBOLT), "flowstore import"),
    "text": (bytes_of(b"notes\n" * 1000), "no SQLite file"),
    "a byte": (bytes_of(b"x"), "no SQLite file"),
    "511 bytes": (bytes_of(bytes(511)), "no SQLite file"),
    "a folder": (in_place_of_it(os.mkdir), "no regular file"),
    "a pipe": (in_place_of_it(os.mkfifo), "no regular file"),
    "a second name": (lambda path: os.link(path, f"{path}2"), "hard link"),
    "a trigger": (statements_of(TRIGGER), "trigger 'spy'"),
    "a view for a table": (statements_of("DROP TABLE cache", VIEW), "view 'cache'"),
    "a missing table": (statements_of("DROP TABLE cache"), "restore a backup"),
}
CORRUPT = {
    "a foreign id",
    "no id",
    "bbolt",
    "text",
    "a byte",
    "511 bytes",
    "a missing table",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_store_is_refused_by_name_and_left_as_it_is(
    store, path, tmp_path, what
):
    make, words = REFUSED[what]
    make(path)
    before = files_in(tmp_path)
    kind = CorruptStoreError if what in CORRUPT else StoreError
    for use in (
        [SQLiteDataStore, path],
        [store.get_cache_entry, "k"],
        [store.set_cache_entry, "k", b"v"],
        [store.transaction().__enter__],
        [store.backup, tmp_path / "copy"],
    ):
        assert refused(kind, words, *use).path == path
    assert files_in(tmp_path) == before


@needs_root
def test_somebody_elses_file_is_refused_where_anyone_may_write(place):
    path = f"{place}/flowstore.db"
    os.chmod(path, 0o666)
    with an_ordinary_user():
        assert SQLiteDataStore(path).get_process_var("b", "k") == "old"
    os.chmod(place, 0o1777)
    with an_ordinary_user():
        refused(StoreError, "another user's", SQLiteDataStore, path)


@needs_root
def test_a_file_of_ones_own_is_read_at_once_where_no_other_can_be_made(place):
    path = f"{place}/flowstore.db"
    os.chown(path, NOBODY, NOBODY)
    with an_ordinary_user():
        store = SQLiteDataStore(path, timeout=0)  # nobody is waited for
        assert store.get_process_var("b", "k") == "old"


def test_a_link_that_leads_nowhere_is_given_up_after_the_timeout(path, tmp_path):
    store = SQLiteDataStore(path, timeout=0.05)
    os.unlink(path)
    os.symlink(tmp_path / "nowhere", path)
    refused(StoreBusyError, "try again", store.set_cache_entry, "k", b"v")


@pytest.mark.parametrize("name", ["new.db", "folder/new.db", "flowstore.db/new.db"])
def test_a_place_where_nothing_can_be_made_is_named_at_once(place, name):
    path = f"{place}/{name}"
    os.chmod(place, 0o555)
    with an_ordinary_user():
        assert refused(StoreError, "name a path", SQLiteDataStore, path).path == path


# ---- the file: SQLite's errors ----


def deny(connection):
    connection.set_authorizer(lambda action, *_: int(action == sqlite3.SQLITE_INSERT))


def interrupt(connection):
    connection.set_progress_handler(lambda: connection.total_changes + 1, 1)


ERRORS = {
    "FULL": (lambda each: each.execute("PRAGMA max_page_count = 1"), "disk is full"),
    "READONLY": (lambda each: each.execute("PRAGMA query_only = ON"), "check the rights"),
    "TOOBIG": (
        lambda each: each.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 99000),
        "in a file",
    ),
    "AUTH": (deny, "(not authorized)"),
    "INTERRUPT": (interrupt, "(interrupted)"),
}


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_of_sqlite_says_what_helps(store, path, prepared, code):
    prepare, words = ERRORS[code]
    prepared(prepare)
    assert (
        refused(StoreError, words, store.set_cache_entry, "k", bytes(100_000)).path
        == path
    )


def test_a_damaged_file_says_to_remove_its_log(store, path):
    by_hand(path, "PRAGMA writable_schema = ON", "UPDATE sqlite_master SET rootpage = 99")
    error = refused(CorruptStoreError, "damaged", store.set_cache_entry, "k", b"v")
    assert "-wal and -shm" in str(error)


def test_no_error_shows_a_value(store, path):
    by_hand(
        path,
        "INSERT INTO process_vars VALUES ('b', 'k', CAST(x'736563726574ff' AS TEXT))",
    )
    with pytest.raises(CorruptStoreError, match="no UTF-8") as caught:
        store.get_process_var("b", "k")
    assert "secret" not in str(caught.getrepr(style="native"))


def test_too_many_open_files_are_told_from_damage(store, path):
    free = os.open(path + ".free", os.O_CREAT, 0o600)
    found = []
    for left in range(9):
        with a_limit(resource.RLIMIT_NOFILE, free + left):
            found += [
                value_of(store.set_cache_entry, "k", b"v"),
                value_of(
                    store.record_execution, record(status="running", pid=os.getpid())
                ),
                value_of(store.get_cache_entry, "k"),
                value_of(store.backup, f"{path}.{left}"),
            ]
    os.close(free)
    errors = [str(each) for each in found if isinstance(each, StoreError)]
    assert 0 < len(errors) < len(found)
    for each in errors:
        assert "oo many open files" in each
        assert path in each


# ---- the file: places ----


@pytest.mark.parametrize("folder_mode, file_mode", [(0o555, 0o644), (0o755, 0o444)])
def test_a_place_that_cant_be_written_is_read_and_left_as_it_is(
    place, folder_mode, file_mode
):
    path = f"{place}/flowstore.db"
    os.chmod(path, file_mode)
    os.chmod(place, folder_mode)
    before = files_in(place)
    words = "check the rights of file and folder"
    with an_ordinary_user():
        store = SQLiteDataStore(path)
        with store.session() as session:
            for each in (store, session):
                assert each.get_process_var("b", "k") == "old"
                refused(StoreError, words, each.set_process_var, "b", "k", "new")
                refused(StoreError, words, each.transaction().__enter__)
        refused(StoreError, words, destroy_store, path)
    assert files_in(place) == before


def test_a_reader_sees_what_a_writer_beside_it_has_written(place):
    path = f"{place}/flowstore.db"
    store = SQLiteDataStore(path)
    writer = process(
        """
with flowstore.SQLiteDataStore(sys.argv[1]).session() as session:
    session.set_process_var("b", "k", "newer")
    print("written", flush=True)
    input()""",
        path,
    )
    assert writer.stdout.readline() == "written\n"  # now a -shm lies beside the file
    os.chmod(place, 0o555)
    with an_ordinary_user():
        assert store.get_process_var("b", "k") == "newer"
    assert writer.communicate("\n", timeout=60)[1] == ""


def test_a_file_that_is_read_as_unchanging_must_not_change(place):
    path = f"{place}/flowstore.db"
    store = SQLiteDataStore(path)
    os.chmod(place, 0o555)
    with an_ordinary_user(), store.session() as session:
        assert session.get_process_var("b", "k") == "old"
        os.seteuid(os.getuid())
        os.chmod(place, 0o755)
        output_of(
            "flowstore.SQLiteDataStore(sys.argv[1]).set_process_var('b', 'k', 'n')", path
        )
        os.chmod(place, 0o555)
        with an_ordinary_user():
            refused(StoreBusyError, "try again", session.get_process_var, "b", "k")
            assert session.get_process_var("b", "k") == "n"
    os.chmod(place, 0o755)
    Path(f"{path}-wal").write_bytes(b"x")  # as of a writer that was killed
    os.chmod(place, 0o555)
    with an_ordinary_user():
        refused(StoreBusyError, "-wal", store.get_process_var, "b", "k")


def test_a_full_disk_changes_nothing_and_serves_again_when_there_is_room(store, path):
    store.set_cache_entry("k", b"old")
    with a_limit(resource.RLIMIT_FSIZE, 33 << 10):
        refused(StoreError, "full", store.set_cache_entry, "k", bytes(1 << 20))
        assert store.get_cache_entry("k") == b"old"
        refused(StoreError, "full", store.backup, f"{path}.copy")
        refused(StoreError, "full", SQLiteDataStore, f"{path}.new")
    store.set_cache_entry("k", bytes(1 << 20))
    assert files_beside(path) == ["flowstore.db", "flowstore.db.new"]
    assert SQLiteDataStore(f"{path}.new").get_cache_entry("k") is None


def test_a_transaction_that_sqlite_rolled_back_is_dead(store, prepared):
    prepared(lambda connection: connection.execute("PRAGMA max_page_count = 60"))
    half = bytes(100_000)  # either of two such values fits, not both
    with (
        pytest.raises(StoreError, match="begin anew"),
        store.transaction() as transaction,
    ):
        transaction.set_cache_entry("a", half)
        refused(StoreError, "full", transaction.set_cache_entry, "b", half)
        refused(StoreError, "rolled back", transaction.set_cache_entry, "c", b"v")
    assert store.list_cache_keys() == []
    with store.session() as session:
        session.set_cache_entry("a", half)
        refused(StoreError, "full", session.set_cache_entry, "b", half)
        session.set_cache_entry("c", b"v")
    assert store.list_cache_keys() == ["a", "c"]


def test_a_small_disk_that_fills_up(tmp_path):
    code = """
store = flowstore.SQLiteDataStore("/mnt/flowstore.db")
store.set_cache_entry("k", b"old")
with open("/mnt/rest", "wb", buffering=0) as stream:
    try:
        while True:
            stream.write(bytes(4096))
    except OSError:
        pass
try:
    store.set_cache_entry("k", bytes(50_000))
except flowstore.StoreError as error:
    print(error)
print(store.get_cache_entry("k"))
os.unlink("/mnt/rest")
store.set_cache_entry("k", b"new")
print(store.get_cache_entry("k"), os.listdir("/mnt"))"""
    out = with_mounts("mount -t tmpfs -o size=400k none /mnt", code).splitlines()
    assert "/mnt/flowstore.db: " in out[0] and "full" in out[0]
    assert out[1:] == ["b'old'", "b'new' ['flowstore.db']"]


def test_no_folder_for_temporary_files_is_needed(store, path):
    code = """
path = "/mnt/flowstore.db"
store = flowstore.SQLiteDataStore(path)
record = flowstore.ExecutionRecord.from_dict({"ref": "r", "startedAt": "2024-01-01T00:00:00Z"})
for number in range(3):
    store.record_execution(record._replace(spec="x" * 3_000_000))
store.get_all_execution_history()
store.get_recent_executions()
store.backup(path + ".copy")
print(store.prune(keep=1).history)
flowstore.destroy_store(path)"""
    commands = [f"mount --bind {os.path.dirname(path)} /mnt"]
    for each in ("/tmp", "/var/tmp", "/usr/tmp", "/dev/shm"):
        if os.path.isdir(each) and not os.path.islink(each):
            commands.append(f"mount --bind {each} {each}")
            commands.append(f"mount -o remount,ro,bind {each}")
    assert with_mounts(" && ".join(commands), code) == "2\n"
    assert files_beside(path) == ["flowstore.db.copy"]


# ---- the file: backup() ----


def test_a_backup_is_of_one_moment_while_others_write(store, path):
    writer = process(
        """
store = flowstore.SQLiteDataStore(sys.argv[1], timeout=30)
number = 0
while not os.path.exists(sys.argv[1] + ".stop"):
    number += 1
    with store.transaction() as both:
        for key in "ab":
            both.set_cache_entry(key, b"%d" % number * 30_000)""",
        path,
    )
    wait_until(lambda: store.get_cache_entry("b"))
    copies = [f"{path}.{number}" for number in range(5)]
    for target in copies:
        store.backup(target)
        copy = SQLiteDataStore(target)
        assert copy.get_cache_entry("a") == copy.get_cache_entry("b") != b""
    open(f"{path}.stop", "w").close()
    assert writer.communicate(timeout=60)[1] == ""
    left = map(os.path.basename, [path, *copies, f"{path}.stop"])
    assert files_beside(path) == list(left)


def test_a_backup_never_goes_over_what_is_there(store, path, tmp_path):
    (tmp_path / "file").write_bytes(b"theirs")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    before = files_in(tmp_path)
    for name in ("file", "folder", "link", "flowstore.db"):
        target = tmp_path / name
        refused(StoreError, "name a new file", store.backup, target)
    refused(StoreError, "No such file", store.backup, tmp_path / "none" / "copy")
    assert files_in(tmp_path) == before
    os.unlink(path)
    refused(StoreError, "no store here", store.backup, tmp_path / "copy")
    assert not os.path.exists(path)


def test_a_part_that_is_left_is_replaced_and_one_in_use_is_not(store, tmp_path):
    part = tmp_path / "copy.part"
    part.write_bytes(b"what a killed backup left")
    part.chmod(0o644)
    with open(part, "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        refused(StoreBusyError, "copy.part", store.backup, tmp_path / "copy")
    assert part.read_bytes() == b"what a killed backup left"
    store.backup(tmp_path / "copy")
    assert modes_in(tmp_path) == {"copy": 0o600, "flowstore.db": 0o600}


def test_a_backup_writes_through_no_link_of_somebody_elses(store, tmp_path):
    os.symlink(tmp_path / "theirs", tmp_path / "copy.part")
    refused(StoreError, "symbolic links", store.backup, tmp_path / "copy")
    assert sorted(os.listdir(tmp_path)) == ["copy.part", "flowstore.db"]


def test_a_backup_that_is_killed_leaves_no_half_of_a_store(store, path):
    whole = os.urandom(8 << 20)
    store.set_cache_entry("k", whole)
    copy, part = Path(f"{path}.copy"), Path(f"{path}.copy.part")
    code = "flowstore.SQLiteDataStore(sys.argv[1]).backup(sys.argv[2])"
    for number in range(4):
        child = process(code, path, copy)
        wait_until(lambda: part.exists() or copy.exists())
        time.sleep(number / 200)
        child.kill()
        child.communicate(timeout=60)
        if copy.exists():
            assert SQLiteDataStore(copy).get_cache_entry("k") == whole
            copy.unlink()
    store.backup(copy)
    assert SQLiteDataStore(copy).get_cache_entry("k") == whole
    assert files_beside(path) == ["flowstore.db", "flowstore.db.copy"]


# ---- the file: damaged ----


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a store that has some of everything."""
    path = tmp_path_factory.mktemp("sound") / "flowstore.db"
    with SQLiteDataStore(path).transaction() as store:
        filled_store(store).set_cache_entry("k", bytes(9000))
        for name in map(str, range(30)):
            store.record_execution(record("k", id=name, spec="s" * 99))
            store.save_background_run(background(name))
            store.set_process_var("k", name, "v" * 50)
    return path.read_bytes()


@given(
    st.lists(st.tuples(st.integers(0, 1 << 17), st.binary(max_size=4)), max_size=6),
    st.none() | st.integers(0, 1 << 17),
)
@example([], 4096)
@example([(28, b"\0\0\0\1")], None)
@example([(100, b"\5")], None)
@example([(3108, b"\x80")], None)
@settings(SETTINGS, max_examples=25)
def test_any_damage_gives_a_store_error_or_a_value(sound, damages, cut):
    data = sound
    for at, new in damages:
        data = overwritten(data, at % len(data), new)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "flowstore.db")
        Path(path).write_bytes(sound)
        store = SQLiteDataStore(path)
        Path(path).write_bytes(data[:cut])
        uses = [*CALLS, ("reconcile", ()), ("backup", (f"{path}.copy",)), ("prune", (1,))]
        for name, arguments in uses:
            found = value_of(getattr(store, name), *arguments)
            if isinstance(found, StoreError):
                assert found.path.startswith(path)
        value_of(migrate_process_buckets, path)
        value_of(destroy_store, path)


# ---- processes: helpers ----

CROWD = """
import traceback
ready, go = os.pipe()
count, code, *arguments = sys.argv[1:]
children = []
for number in range(int(count)):
    child = os.fork()
    if child == 0:
        failed = 1
        try:
            os.close(go)
            os.read(ready, 1)
            exec(code)
            failed = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(failed)
    children.append(child)
os.close(go)
print([number for number, child in enumerate(children) if os.waitpid(child, 0)[1]])"""


def crowd(count, code, *arguments):
    """Run this code in so many processes at the same moment, with their `number` and these
    `arguments`; all must end well."""
    child = process(CROWD, count, code, *arguments)
    assert child.communicate(timeout=180) == ("[]\n", "")


@contextlib.contextmanager
def lock_of_another_process(path):
    """Another process has the write lock."""
    code = "import sqlite3\nother = sqlite3.connect(sys.argv[1], isolation_level=None)"
    child = process(
        f"{code}\nother.execute('BEGIN IMMEDIATE')\nprint(flush=True)\ninput()", path
    )
    child.stdout.readline()
    try:
        yield
    finally:
        child.communicate("\n", timeout=60)


def in_a_fork(work):
    """What work() returns, or raises, in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = work()
        except BaseException as error:
            result = error
        try:
            os.write(writing, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        data = stream.read()
    os.waitpid(child, 0)
    return pickle.loads(data)


def files_beside(path):
    return sorted(os.listdir(os.path.dirname(path)))


# ---- processes: many at once ----


def test_64_processes_write_at_once_and_nothing_is_lost(path):
    code = """
store = flowstore.SQLiteDataStore(arguments[0], timeout=60)
store.set_process_var("b", str(number), "v")
with store.transaction() as both:
    count = int(both.get_all_process_vars("n").get("count", 0))
    both.set_process_var("n", "count", str(count + 1))
    both.set_cache_entry(str(number), b"v")"""
    crowd(64, code, path)
    store = SQLiteDataStore(path)
    assert len(store.get_process_var_keys("b")) == 64
    assert store.get_process_var("n", "count") == "64"
    assert len(store.list_cache_keys()) == 64
    assert files_beside(path) == ["flowstore.db"]


def test_many_open_a_new_store_at_once(tmp_path):
    code = """
for each in range(10):
    path = f"{arguments[0]}/{each}/deep/flowstore.db"
    store = flowstore.SQLiteDataStore(path, timeout=60)
    store.set_process_var("b", str(number), "v")"""
    crowd(10, code, tmp_path)
    for each in range(10):
        path = tmp_path / str(each) / "deep" / "flowstore.db"
        assert len(SQLiteDataStore(path).get_process_var_keys("b")) == 10
        assert files_beside(path) == ["flowstore.db"]


def test_what_was_acknowledged_outlives_kill_9_at_any_moment(path):
    chance = random.Random(1)
    code = """
number = int(sys.argv[2]) * 100_000
store = flowstore.SQLiteDataStore(sys.argv[1], timeout=60)
while True:
    with store.transaction() as both:
        both.set_process_var("b", str(number), "v")
        both.set_cache_entry(str(number), bytes(number % 3 * 4000))
    print(number, flush=True)
    number += 1"""
    acknowledged = set()
    for first in range(0, 10, 2):
        children = [process(code, path, number) for number in (first, first + 1)]
        lines = [child.stdout.readline() for child in children]
        time.sleep(chance.random() / 20)
        for child, line in zip(children, lines):
            child.kill()
            with child:
                said = line + child.stdout.read()
            acknowledged.update(said.split("\n")[:-1])
    store = SQLiteDataStore(path)
    found = set(store.get_process_var_keys("b"))
    assert len(acknowledged) >= 10
    assert acknowledged <= found
    assert len(found - acknowledged) <= 10  # killed between the two
    assert found == set(store.list_cache_keys())
    assert files_beside(path) == ["flowstore.db"]
    assert by_hand(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_store_is_destroyed_under_its_writers(path):
    code = """
store = flowstore.SQLiteDataStore(arguments[0], timeout=60)
for each in range(15):
    if number < 2:
        flowstore.destroy_store(arguments[0])
        continue
    store.set_process_var("b", "k", str(each))
    with store.transaction() as both:
        both.set_process_var("b", "k", "-")
        both.set_process_var("b", "k", str(each))
        assert both.get_process_var("b", "k") == str(each)
    with store.session() as session:
        assert session.get_all_process_vars("b") != {"k": "-"}"""
    crowd(7, code, path)
    assert set(files_beside(path)) <= {"flowstore.db"}
    store = SQLiteDataStore(path)
    store.set_process_var("b", "k", "v")
    assert store.get_process_var_keys("b") == ["k"]


# ---- processes: waiting ----


@pytest.mark.parametrize("clock", ["as it is", "frozen"])
@pytest.mark.parametrize("timeout", [0.2, 0])
def test_a_lock_is_awaited_until_the_timeout(store, path, monkeypatch, clock, timeout):
    slept, sleep = [], time.sleep
    monkeypatch.setattr(
        time, "sleep", lambda seconds: (slept.append(seconds), sleep(seconds))
    )
    if clock == "frozen":
        monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    with lock_of_another_process(path):
        store = SQLiteDataStore(path, timeout=timeout)
        write = store.set_process_var, "b", "k", "v"
        for call in (write, [store.transaction().__enter__]):
            slept.clear()
            refused(StoreBusyError, "longer timeout", *call)
            assert sum(slept) <= timeout * 1.001
        if clock == "frozen":
            assert sum(slept) >= timeout * 0.999
        assert store.get_cache_entry("k") is None


# ---- processes: interrupts ----


class Limit(OSError):
    """What a handler of somebody's own raises."""


@pytest.fixture
def interrupted():
    """Runs work with a signal at some moment of it. Whether its handler's exception came out,
    which must be so unless it came too late."""
    raised = []
    chance = random.Random(7)

    def handle(*_):
        kinds = (TimeoutError, Limit, KeyboardInterrupt)
        raised.append(chance.choice(kinds)("a limit"))
        raise raised[-1]

    def run(work, seconds):
        raised.clear()
        came = []
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.random() * seconds + 1e-6)
            work()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            came.append(error.with_traceback(None))
        assert came == raised  # the very same
        raised.clear()  # with what it holds
        return len(came)

    before = signal.signal(signal.SIGALRM, handle)
    gc.disable()  # Python loses what is raised while it collects
    yield run
    gc.enable()
    signal.signal(signal.SIGALRM, before)


def transact(store):
    with store.transaction() as transaction:
        transaction.set_process_var("b", "k", "v")
        transaction.get_process_var("b", "k")


def use_a_session(store):
    with store.session() as session:
        session.set_process_var("b", "k", "v")
        session.get_cache_entries(["k"])
        transact(session)


def run_something(store):
    with store.execution("build") as run:
        run.exit_code = 1


def make_and_destroy(store):
    SQLiteDataStore(f"{store.path}.other").set_process_var("b", "k", "v")
    destroy_store(f"{store.path}.other")


def back_up(store):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{store.path}.copy")
    store.backup(f"{store.path}.copy")


INTERRUPTED = {
    "write": lambda store: store.set_cache_entry("k", b"v" * 5000),
    "read": lambda store: store.get_cache_entry("k"),
    "history": lambda store: store.get_all_execution_history(2),
    "open": lambda store: SQLiteDataStore(store.path),
    "prune": lambda store: store.prune(keep=2),
    "reconcile": lambda store: store.reconcile(),
    "transaction": transact,
    "session": use_a_session,
    "execution": run_something,
    "destroy": make_and_destroy,
    "backup": back_up,
}


@pytest.mark.parametrize("what", INTERRUPTED)
def test_an_interrupt_passes_through_and_leaves_nothing_behind(path, interrupted, what):
    store = SQLiteDataStore(path, timeout=5)
    work = INTERRUPTED[what]
    work(store)  # what it imports is there from now on
    began = time.perf_counter()
    work(store)
    seconds = time.perf_counter() - began
    came = 0
    while came < 25:
        came += interrupted(lambda: work(store), seconds)
        by_hand(path, "BEGIN IMMEDIATE", "ROLLBACK")  # nothing is locked
    gc.collect()
    destroy_store(f"{path}.other")
    with store.transaction() as transaction:  # nor marked as in use
        transaction.set_process_var("b", "k", "after")
    assert in_a_fork(lambda: store.get_process_var("b", "k")) == "after"
    left = {"flowstore.db", "flowstore.db.copy", "flowstore.db.copy.part"}
    assert set(files_beside(path)) <= left


def test_an_interrupt_ends_a_wait_as_it_is(path, interrupted):
    store = SQLiteDataStore(path, timeout=60)
    with lock_of_another_process(path):
        for _ in range(10):
            assert interrupted(lambda: store.set_process_var("b", "k", "v"), 0.02)


def test_an_interrupt_leaves_a_session_as_it_was(store, interrupted):
    with store.session() as session:
        for _ in range(60):
            interrupted(lambda: transact(session), 0.001)
        transact(session)
        assert session.get_process_var("b", "k") == "v"


# ---- processes: fork ----


def test_a_forked_child_leaves_what_is_the_parents_alone(path, tmp_path):
    store = SQLiteDataStore(path)
    other = SQLiteDataStore(tmp_path / "other.db")

    def refuses_a_child(*held):
        for each in held:
            error = in_a_fork(each.list_cache_keys)
            assert isinstance(error, RuntimeError)
            assert "fork" in str(error)
        assert in_a_fork(other.list_cache_keys) == []

    with store.session() as session:
        session.set_process_var("b", "k", "before")
        refuses_a_child(session, store)
        with session.transaction() as transaction:
            transaction.set_process_var("b", "k", "after")
            refuses_a_child(transaction, session, store)
            transaction.set_cache_entry("k", b"v")
    assert store.get_process_var("b", "k") == "after"
    assert in_a_fork(store.list_cache_keys) == store.list_cache_keys() == ["k"]
    assert files_beside(path) == ["flowstore.db", "other.db"]


def test_forks_amid_the_operations_of_other_threads(path):
    code = """
import threading, traceback
store = flowstore.SQLiteDataStore(sys.argv[1], timeout=60)
ended, failed = threading.Event(), []

def use(number):
    try:
        count = 0
        while not ended.is_set():
            count += 1
            store.set_process_var("b", str(number), str(count))
            store.get_all_process_vars("b")
            if count % 5 == 0:
                with store.session() as session:
                    session.set_cache_entry(str(number), bytes(5000))
    except BaseException:
        failed.append(traceback.format_exc())

def fork(number):
    try:
        for each in range(12):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    try:
                        store.set_process_var("c", f"{number} {each}", "v")
                        store.set_process_var("c", f"{number} {each}", "w")
                    except RuntimeError:  # a session of the parent's was open
                        pass
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            assert os.waitpid(child, 0)[1] == 0
    except BaseException:
        failed.append(traceback.format_exc())

users = [threading.Thread(target=use, args=(each,)) for each in range(4)]
forkers = [threading.Thread(target=fork, args=(each,)) for each in range(2)]
for each in users + forkers:
    each.start()
for each in forkers:
    each.join()
ended.set()
for each in users:
    each.join()
print(*failed)"""
    child = process(f"import warnings\nwarnings.simplefilter('ignore')\n{code}", path)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out, err) == (0, "\n", "")
    assert files_beside(path) == ["flowstore.db"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_thread_that_waits_for_a_lock_holds_up_no_fork(path):
    store = SQLiteDataStore(path, timeout=60)
    waiter = threading.Thread(target=store.set_process_var, args=("b", "k", "v"))
    with lock_of_another_process(path):
        waiter.start()
        began = time.monotonic()
        for _ in range(5):
            assert in_a_fork(lambda: store.get_cache_entry("k")) is None
        waited = time.monotonic() - began
        assert waiter.is_alive()
    waiter.join(60)
    assert waited < 9 and store.get_process_var("b", "k") == "v"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_a_fork_keeps_no_other_thread_waiting(path, interrupted):
    store = SQLiteDataStore(path)
    for _ in range(30):
        # Python loses what is raised in its hooks
        with contextlib.suppress(AssertionError):
            interrupted(lambda: in_a_fork(bool), 0.003)
    done = []
    user = threading.Thread(
        target=lambda: done.append(store.get_cache_entry("k")), daemon=True
    )
    user.start()
    user.join(30)
    assert done == [None]


# ---- processes: growth ----


def test_readers_that_overlap_dont_let_the_log_grow_without_bound(store, path):
    ended = threading.Event()

    def read():
        """At each moment there is a reader, none for longer than some milliseconds."""
        first, second = (sqlite3.connect(path, isolation_level=None) for _ in range(2))
        while not ended.wait(0.005):
            first, second = second, first
            first.execute("BEGIN")
            first.execute("SELECT count(*) FROM cache").fetchone()
            if second.in_transaction:
                second.execute("COMMIT")
        first.close()
        second.close()

    reader = threading.Thread(target=read)
    reader.start()
    sizes = []
    with store.session() as session:
        for _ in range(300):
            session.set_cache_entry("k", os.urandom(100_000))
            sizes.append(os.stat(f"{path}-wal").st_size)
    ended.set()
    reader.join()
    assert max(sizes) < 20 << 20  # of 30 MB
    assert files_beside(path) == ["flowstore.db"]


def test_the_work_of_an_operation_grows_with_what_it_returns(store, prepared):
    steps = []
    count = lambda: steps.append(0)  # noqa: E731
    prepared(lambda connection: connection.set_progress_handler(count, 50))

    def work_with(records):
        with store.transaction() as transaction:
            for number in range(records):
                transaction.record_execution(record(minutes=number))
                run = background(f"{records} {number}", number)
                transaction.save_background_run(run)
        found = []
        for read in (
            lambda: store.get_execution_history("build", 10),
            lambda: store.get_recent_executions(10),
            store.list_execution_refs,
            lambda: store.prune(keep=2),
        ):
            steps.clear()
            read()
            found.append(len(steps))
        return found

    *few, few_pruned = work_with(300)
    *many, many_pruned = work_with(1200)
    for less, more in zip(few, many):
        assert more <= less + 2
    assert few_pruned > 100
    assert many_pruned < few_pruned * 6


# ---- files of the original: a writer, and files that it wrote itself ----


def bolt_page(number, flags, entries, page_size=0):
    """A page of entries: of a leaf (flags 2) 1 for a bucket, key, value; of a branch (1)
    page, key, b"". Without page_size it is one that lies in an entry."""
    table, body = b"", b"".join(key + value for _, key, value in entries)
    position = 16 * len(entries)
    for first, key, value in entries:
        if flags == 2:
            table += struct.pack("<4I", first, position, len(key), len(value))
        else:
            table += struct.pack("<IIQ", position, len(key), first)
        position += len(key + value) - 16
    more = (15 + len(table + body)) // page_size if page_size else 0
    head = struct.pack("<QHHI", number, flags, len(entries), more)
    return (head + table + body).ljust((1 + more) * page_size, b"\0")


def bolt_meta(number, page_size, root, transaction):
    meta = struct.pack("<4I5Q", 0xED0CDAED, 2, page_size, 0, root, 0, 2, 99, transaction)
    checksum = 0xCBF29CE484222325
    for byte in meta:
        checksum = (checksum ^ byte) * 0x100000001B3 % 2**64
    page = struct.pack("<QHHI", number, 4, 0, 0) + meta + struct.pack("<Q", checksum)
    return page.ljust(page_size, b"\0")


def bolt_file(root, pages, page_size=4096):
    """A file with these pages behind the two meta pages and the list of free pages."""
    metas = bolt_meta(0, page_size, root, 8) + bolt_meta(1, page_size, root, 7)
    return metas + bytes(page_size) + pages


def make_bolt(tree, page_size=4096, inline=1024):
    """A file of nested dicts; buckets of up to `inline` bytes lie in their entries, and
    others have a leaf for every ten entries, under a branch."""
    pages = bytearray()

    def add(flags, entries):
        number = 3 + len(pages) // page_size
        pages.extend(bolt_page(number, flags, entries, page_size))
        return number, entries[0][1] if entries else b"", b""

    def bucket(tree, inline):
        entries = []
        for key, value in sorted(tree.items()):
            is_bucket = isinstance(value, dict)
            entries.append((is_bucket, key, bucket(value, limit) if is_bucket else value))
        small = bolt_page(0, 2, entries)
        if len(small) <= inline:
            return bytes(16) + small
        leaves = [add(2, entries[at : at + 10]) for at in range(0, len(entries) or 1, 10)]
        root = leaves[0] if len(leaves) == 1 else add(1, leaves)
        return struct.pack("<QQ", root[0], 0)

    limit = inline
    [root, _] = struct.unpack("<QQ", bucket(tree, 0))
    return bolt_file(root, bytes(pages), page_size)


def overwritten(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def bolt_record(**fields):
    """A record's JSON in such a file."""
    always = {
        "ref": "r",
        "startedAt": "2026-01-01T00:00:00Z",
        "duration": 0,
        "exitCode": 0,
    }
    return json.dumps({**always, **fields}).encode()


def bolt_run(id, **fields):
    return bolt_record(**{"id": id, "pid": 7, "status": "running", **fields})


def bolt_source(folder, content):
    source = folder / "store.db"
    source.write_bytes(make_bolt(content) if isinstance(content, dict) else content)
    return source


def imported(folder, content):
    """Summary and store of the import of a file or a tree."""
    summary = import_bolt(bolt_source(folder, content), folder / "target.db")
    return summary, SQLiteDataStore(folder / "target.db")


def dump(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def bolt_sample(name):
    """A file of the original, what it reads from it, how much, and what can't be kept."""
    contents, _, files = lzma.decompress(base64.b64decode(BOLT_SAMPLES)).partition(b"\n")
    at, size, *expected = json.loads(contents)[name]
    return files[at : at + size], *expected


# JSON, and files, in LZMA in base64
BOLT_SAMPLES = """
/Td6WFoAAATm1rRGAgAhARwAAAAQz1jM5LsBEC5dAD2IisNDLEo2KcdKnygN4RHAzE5tN6hmIfvGYZfl2y1AJzwf
IidyeQLd1gmCRgmRkhNpJpy8RzxlBxYbrS8rBG0SvrXRHYxdVaoLBrBLxJjkcJpPQbpyQaUOcFQtvBvjZmTUbd1A
aFcL6T2irT2Ch153hbXzwXi2cxMyMzKzpTwbxuHLN1PKU0vEU9zIgnoLBUpUb1SZv7bs/d2ytjqBjlLFMavmGT3n
UnFWLdHSlsXuAAtRysF0jeZc18xWRNGheevwf7vdF+G3BbzmD0WtxxZ6Cg70YzRviSJ4vRUsKkq7LSi1akVFI7O7
bgLonlIQEcYnWKoXFc60+SMbcD0LDCzuLOzm1rS4t8nYmLHcTgziDecubah9UVv+3StrBlOGoeILMyqXbE0UymoD
wpTP5Sk5KZqX/sSnVFjSEq6NuxOh66sZIqz6Yl9sB3RmPbv2gbM92xJ46GaqR90ArW3fwkjIwoD5/OTSHucutdBy
xCVuu43198XInh2HaldG1xZpT0vDylFHvq1a/h+9B8QjJM6IJpnwFiSSCcL7D/9ZussO2F9+Ra+/d3gz630ZFz8/
gUl6p+PVQ0cSKtxW6vM5/ZucBtob+1pfdX+dJJPC6gzsXeeXo+rYBZyNLQVZfWPV7LEnGWG/TwFh7SVo2k4Z49qe
QS8q4NAXZFHT3sKfGQDv137BONkWkMuQKyYxHq9omja42S+tXggqBBeE2SKlnOEf6tfp5zK2DYTx6bRnqrphjKHn
aN56yXwoGIUqNk6Y92Pn58EImD1OrRuad+LYFJK/3Ezoaz2tBdGvfUq9s5zMeWBlqrIobaNm+a3F13GvrKNC0Aae
LbFz8fovDrxvvg/YsdghIc8AQwG4rhtYSk/0DiGeQqLUPfrlm7QH/nnNBwWEnWkBLuU2n11S1p1xkFmIMHprw7DE
Zm8PdQG4x4mO5NfoUQoU+Ln+Fm8YZf/i6AjJqekwrbvriEjJv1JdOyg3q8WxKo+yHEH6wPIxcPfpmwSk+8zt2z3w
NHg6YDZavA5DPS96IVzSX76gsb8XiAOluuAmGBc3/37SVfaTKjTrxsGfSKWT9Hk+Wj6RhDz2w9NgB7w9mVcCYPPx
bTBIFrA/TCsmUGv90sRdv/I68xH0YAk3JH38l2b8FzDNqDVkq6RebXjbUMJEOE/XjvQvFAqWt3y1zqf+7WAEFd0c
WgyKLLLKLyomnxboGxxNh7+QYjA8HfKlgbU0Ib7Q7KbsXpYJuYtOHVwcWOzwte4Txj3Id+wDMwRQipr/xnM7fxcz
yO6slrUMRfD7TvM/nyfk7t+lr7ZxaBsuVEdUV/ySviYJtQzNkG7J7Y8J3vtiAzgUwA+ZUJznlkQ9mHLhxbBcq8SG
5rY2EaTSHwiSaYlG3Qk/SYIK/ECb3BEiP3xQSxDLGHEzTi2t39x5OtjtyDkvLVrpalWVSuZ+pldImyLzS9UvrjiU
r2t8J+Y9YeIE4x9B/ogfQYGNTnQlxaqr7pzBN97m+GGwS4UgfiwXD3RmwSpbAZu8cvs/E8ZD7W0gnsLH42sVp29W
Kf4KfMvm71Rh9vJYa+8apQTaeiOg8nl/EJqrLS5DIq1OE+9wrmycjYPADLG3qJuxfgynintYIRxYrmbopy1mDO4c
edadaXUVCdKCUCQicLezDa0Zo+Ikc8NptzxTktYh5zW7l7zyCjWbXAepgKQjB7bWvVOBWstkIXw9sYW+RLteQtBG
AFwrV7rEJ2lHuXz3GmK1f2aKgvbjhhp9n5TvMJ5XIPjbyOlPB0syyxOIuYRqLLuLaH+gAZ94UGdJooQabcFYY9I9
rsObI9hmHV0eoCcg8lK3yZkIKCsX6mH7tGAiqQUxU76L5IuGbbNagB4FgXkbi2kOnjcVMRHarXXaLV/nX2byy4uP
lhUupZBkfv9JE0OMLC3LckoiMxEykd+ZDHKrl4nWazuehy4yeYIdmOuT2JuMujRiFXqGtOBO9E+Zeu51pe+moiM/
dnI0Z5UJlsDCNAmltmhdoVcHsoei37j3XocQJLY7Tx5Iy581F6cK3x3RAIP3zAqSR44q3/fZ8jOvSKnF7hZWzoAJ
wCEH3aQp4JEGGM1Oc8aUJ5CKssb+Jk7hsvK+QfcahjUsBS5LbsdbwBY/nOm6cK3wLpbPxOWDQ763Xe1Q3LMDYZmk
5oR9nAycnkTnrVmf1K8Q4e8IWUiSXoH8tkwDjNtQuzoQn08HsCZ8tTNYGpoeLyahqiFiRQkblYuH3q28TTGIacWP
oq7WR9hBFr5ZGHDHZm/UjktCqRKlMvbTp+WC4VAJqAFmTFNlAWeZlDx277nQ3yG2SMgxEpFeOsTA4W0OP9rRrQoX
Jv/Pfw7X2JO8oloJ13V92V0ZuxxLSRQyiN3d1BjDzzdNUGrF1e/6ztjDDCtdVLcDLiv7i2J0/xp6q0dtdhLojmFi
loDbBbQSpv7ShBLGgRTZkULV1mIqzo4u5ndCFX9n3zp9RayMDAZ+TO3W3AADcTLcVNnL14w/ITpMzUULKj2UTGCn
OVwlenHQo5NL+DHTza9C+OgB05PxYSb4lai0R2R72HL3uLXPYs33NUKPrXR9Vlpl1FLav/7DgIwMVuptBASQ7jvh
oFSPkdcIUDUFdnuCj7I21e8xEhuhxIO9xdfmktPMhSVIdY8F5TtpvD1NsuVzSHSbnUKnAkyEJmN+julI2foDz47+
AhDQ3lRYns/HGXthvDP/RsJW+7R1FRZZx5v6LFdBxZg28o49/4piKwPb8MEYfd0ATNyqS7VjW6bOYqJGwkONrVu5
FYtEAo1+bxMun1Ig3zkhPezJpHA1D1PGqPKk1iXZbrr+81Tr+aGbIciWA93ZuZYZkjwQ1wMP+R3Wd46Hl4o+7abs
E5OM2INYbmbfd5CxM55ZzKV75l1gkbifuyZ4zRq236x6XmggMcbFjr+vX88ngO2wdO+ujQMqSqFh6sO9YtcxDSJA
A3IzqgyVKhSDUvOc3//sPEgrooFD60sZXJMRUzQilEnAQoVzcOTRCME8EtoeVsPbHtGIjWiz/BlZjNGdNDY0PeTD
QHhGD4fg5WZCt44faHVO28cq3MNo4jocmui658udw2mz2LSjZ/e4ElaQLActWOoV+e7uP7MChleksf1qfqNNY/xf
nmYw+QXdEDYfiq28iMpZbdeHEzPCzT7qs9KWGkNFvFwZQPvJRBfqxNlxUOm3eaIeWDggvTX+us3XP0LUV6+Q7tUl
ftIKzyPDw/Ynb2/HYXH53rNt6dw23FyKAF4R1ftrciBBos/S+GrHU0Jbb2ulUW2OP2Bu3WMvrvXLs+WbaN6hLRp2
5N0FJ3mpCxrzqnbpAs1THHGP89/Ukt/vEcirhZnW7acPVm6ft7EC+Hu1xHSqbbBREL0INGyVfHZupgAHIZf8nPTF
q6HSOhqC9UyO3/p1rStjypKF1J+OhIqXAJMdYwXKub4pb1moRfvCKjBPYYstuLlKfUmhu4vSSL5BYOc9N6A8GbLy
+skRSjHooaKwguRrhciabVwzkSNeuWUrrA0/nTEgq0Ekq/Fpd9nvOzNhBHr0fCH8TQmmfZbTgphDR/W8C3SrnM1L
hDYZTwk2liJgH9N0eHR+6lipXAwTw1Ax3c/C0VNwPyZt9pPz1MS2dBHAAQ9X1BZv5jVtywHYXltrJGHEwhwQ5PXN
oMHFPp5qravm3ym+pFZ85H5v54rWsR45ajH7yLvgOiXVA/obj4t0fvk+E3RmdXxVHMELmnKqsd+tqUBI61MQsO+q
KSM9FUKJzcki0HZyFDCW5h2qexgqAVOvJtZg8OJQH1nYWYlfX7zbsqkQvoPR/7EpuQ2odJs8S0diSG3QvXPh+E1U
Zf/ca4DEEsWTCrsICcD0EVoZsz+/LUtfBK3qst86rrK0EM71cWtLLb4yOtVIzCkDOZFP4C9/nmSjiGfOjowR10aY
ug0DJ9DOcnuK2GDtDmA+HiKPkLvV8B8j5jkWCL3NXuPIntL9zrgiz0bEVXH0Y723eybcsnixm1LxavsoY1tSSduu
8s4Y1zD3AE48X2rehkOn/BJXfpFnz20QfZDCGdaAUF1v8siI4hd7gYKqkMkcbM8wIZupxAHQdTiieNh0xHnt/V6V
3l+hY+7Rbvu8kiHCRik8TpKSq7wqYLNZ2fyGtTFwFnLq20VtJL51A99woac8VwWgnfjtq/GAW8ukH/tNdq1q2iRh
NVnjQf018h426qpMtAwJzhtfZbcwagJxvFFapWM5SbefZTiVzkAM/ZDrAqMI4x23DxvJHIbLyHoN1S9U3EPdvDK9
DbDQOg8DY4YeSqRYkJZ1FWWndmAP0Ej0EGlILSc1341LSWL4mqyZljB/XGCTlSakVs5JsxD5oeDy0JvDUZhBEDOU
bjpNXMc5D7Kf0CfsibA/ZlAZsx4QKme4ULyZ5qAgJRJNkKkUgNFla7LsUGUbzarr+IWBIDT25xtcTBWtnoCtGCXP
DgWjuzHxAoRgx/tURRlUpw1xWs7Ak3ly9oJaOUn4ioW1NQqjOrpPzAcsNgbzp+3jJd/UGwOjDuTacWnGaZNpc78+
YdgcsDcf4yBI2E7kvpqZklj8fgJT7w0YbA9vSnxiPkzu14MtCHRKDaefWLKSUVEQqXrg5F/dHrtnx9MPx2slgKLU
OWvYrkKRsJeo/LWqIcsNRGEb8yj6MFolCP6GoTStRCHq0c3gzH1rkdM6lsHyuukwE0JaFEXoKGkMYP3p3x03Z3EC
4MfAd6sp31f04O967jUNHeQz+nGa4TN2zhXLoi3L2q3VpHGvJyHgjuta9vCTAt62ZQfZEpwPG+uBB28Kf/SrkAt2
D7WqXjsfyvLYPlrGaExvy9ZjsgOjNhAkiSGSFb5TvCM9/HUYBbqUYYmrJ9ckgebcmpN9HY6+W66A+ID0uNOzP34j
9MFlNMm1aU9ClZltXP27MLNJpAEthfDcyZ2P+9fcDlKUv4n0JT3DrtJFE7S5DSfjeSPgLgPKbSC6X1t4eV1dJBA5
eGGwj7XVeGWW9LRSkXSrDa9GZF55iEsGFpVUymrHJtmofXal9hv57673rvyPm7Q2KjtTC+BFOf64usG6dXCVknP9
Fh00kS1nsyPAtFiycTn/QDTHYsmANaIsa/193WEuelIljXl/z/oOxdA5llQdIsxf4b9NDUF25EKKRg197qZ03A5Q
D9eDWsFBoVxfsigvJDDlijMh1Zzb8JLsmoaLPIgCxku+vXVaKS8J0GmgqoN4sLxlV8HpYyhRiHFdFxnAZ8/76+SW
TEQw2vt9Luc9yOChH9svdlweEybVkeBpZ0FJgvWZ0KULhYTWKgQp/01YhtTgUNyakYKrr0LTpWC+kjP+II4uDiCD
SEM/T8b1k/lkzN0L6F/U/WLGMpv592Ou9NW4fTYX9RUuqvoQzRLFB/dqp79UwL8iHB6zIe8NLEzzWRP/nADFna+R
XszszU3dUUwFL06HviIBuoY+XCxmLYBeHvtmJyvlAXrwf/fdgPfSiLOS4Z9dUsJqO9XVLQOMNivLQlcLZ26khdDN
t6zBNs4OlKiI4RIwwCAAAAAAGbQOzjNNYc4AAcoggvYSAArHCjyxxGf7AgAAAAAEWVo=
"""


# ---- files of the original: what comes over ----


# in torn the newest meta page is damaged: what counts is the state before
@pytest.mark.parametrize("name", ["v1", "legacy", "inline", "modern", "torn"])
def test_import_of_a_file_that_the_original_wrote(tmp_path, name):
    data, content, counts, problems = bolt_sample(name)
    summary, store = imported(tmp_path, data)
    cache, history, runs, scopes = contents_of(store)
    assert content == {
        "cache": {key: value.hex() for key, value in cache.items()},
        "history": {ref: [one.to_dict() for one in history[ref]] for ref in history},
        "background": [run.to_dict() for run in runs],
        "scopes": scopes,
    }
    assert list(summary[:7]) == counts
    assert [list(problem[:2]) for problem in summary.problems] == problems


def test_import_only_reads_its_source_and_twice_is_once(path, tmp_path):
    source = bolt_source(tmp_path, bolt_sample("legacy")[0])
    source.chmod(0o400)
    os.utime(source, ns=(10**18, 10**18))
    source_before = files_in(tmp_path)["store.db"]
    import_bolt(source, path)
    before = dump(path)
    assert import_bolt(source, path) == ImportSummary(legacy_scopes=5)
    assert dump(path) == before
    assert files_in(tmp_path)["store.db"] == source_before
    assert files_beside(path) == ["flowstore.db", "store.db"]


@pytest.mark.parametrize("page_size, inline", [(1024, 256), (4096, 0), (65536, 4096)])
def test_import_of_pages_of_any_size(tmp_path, page_size, inline):
    values = {b"%03d" % n: b"v" * (n * 7 % 3000) for n in range(300)}
    tree = {b"cache": values, b"process": {b"a": {}, b"b": {b"k": b"v"}}}
    summary, store = imported(tmp_path, make_bolt(tree, page_size, inline))
    assert summary == (300, 0, 0, 1, 2, 0, 0, ())
    found = store.get_cache_entries(store.list_cache_keys())
    assert list(found.values()) == list(values.values())


BOLT_VALUE = {b"cache": {b"k": b"v"}}


@pytest.mark.parametrize(
    "at, new, cached",
    [
        (16, b"\1", 1),  # the first has no magic
        (24, b"\1", 1),  # nor a page's size
        (72, b"\1", 1),  # nor the right checksum
        (4112, b"\1", 1),  # so the second
        (4168, b"\1", 1),
        (4096, bolt_meta(1, 4096, 4, 9), 0),  # newer, and its root is empty
        (4096, bolt_meta(1, 4096, 4, 7), 1),  # older
        (32768, bolt_meta(1, 32768, 4, 9), 1),  # a part of a value
    ],
)
def test_import_goes_by_the_newest_meta_page_that_is_sound(tmp_path, at, new, cached):
    data = make_bolt(BOLT_VALUE) + bolt_page(4, 2, [], 4096)
    data = overwritten(data.ljust(65536, b"\0"), at, new)
    assert imported(tmp_path, data)[0].cache == cached


def test_import_knows_a_record_by_its_place(tmp_path):
    """The bucket says the ref, and the key the id, but where it is a number."""
    records = {
        b"key": bolt_record(id="other", ref="elsewhere"),
        b"12345678": bolt_record(id="12345678"),
        b"abcdefgh": bolt_record(pid=1),
        b"\0" * 7 + b"\1": bolt_record(id="", pid=2),
        b"1234567": bolt_record(),
    }
    _, store = imported(tmp_path, {b"history": {b"r": records}})
    found = [(one.id, one.pid) for one in store.get_execution_history("r")]
    # equal instants, in the order of the keys
    assert found == [("", 2), ("1234567", 0), ("12345678", 0), ("", 1), ("key", 0)]
    assert store.list_execution_refs() == ["r"]


@pytest.mark.parametrize("more, count", [([0], 1), ([0, 0], 2), ([1, 0, 0, 1], 4)])
def test_import_knows_a_record_without_id_by_all_that_it_says(tmp_path, more, count):
    for pids in ([0], more):  # the second file begins with what the first had, or doesn't
        records = {b"%08d" % at: bolt_record(pid=pid) for at, pid in enumerate(pids)}
        _, store = imported(tmp_path, {b"history": {b"r": records}})
    assert len(store.get_execution_history("r")) == count


def test_import_of_scopes_of_the_first_releases(tmp_path):
    names = [b"a", b"process0", b"root"]  # before and after the bucket process
    nested = {name: {b"both": b"nested", b"new": b"N"} for name in names[:2]}
    legacy = {name: {b"both": b"legacy", b"old": b""} for name in names}
    summary, store = imported(tmp_path, {**legacy, b"empty": {}, b"process": nested})
    assert summary == (0, 0, 0, 8, 4, 0, 4, ())
    assert store.list_process_buckets() == ["a", "empty", "process0", "root"]
    for name in ("a", "process0"):
        found = store.get_all_process_vars(name)
        assert found == {"both": "nested", "new": "N", "old": ""}


def test_import_of_runs_that_the_original_took_for_variables(tmp_path):
    variables = {b"a": bolt_run("x"), b"b": b"v", b"c": b'{"id":"c"}', b"d": b"[]"}
    moved = {b"run": bolt_run("run"), b"twice": bolt_run("twice")}
    tree = {
        b"background": {b"twice": bolt_run("twice", status="completed")},
        b"process": {b"background": {**moved, **variables}, b"other": moved},
    }
    summary, store = imported(tmp_path, tree)
    assert (summary.background, summary.recovered_runs, summary.problems) == (1, 1, ())
    assert store.get_background_run("run").status == "running"
    assert store.get_background_run("twice").status == "completed"
    assert store.get_process_var_keys("background") == ["a", "b", "c", "d"]
    assert store.get_process_var_keys("other") == ["run", "twice"]
    store.delete_process_bucket("background")
    imported(tmp_path, {b"process": {b"background": moved}})
    assert store.list_process_buckets() == ["other"]


def test_import_leaves_what_the_store_has(store, tmp_path):
    filled_store(store)
    store.record_execution(record("k", id="k"))
    store.set_process_var("old", "k", "value")
    for bucket in ("k", "old"):
        store.create_process_bucket(bucket)
    before = dump(store.path)
    theirs = {b"k": b"theirs"}
    tree = {
        b"cache": theirs,
        b"history": {b"k": {b"k": bolt_record()}},
        b"background": {b"k": bolt_run("k")},
        b"process": {b"k": theirs},
        b"old": theirs,
    }
    summary = import_bolt(bolt_source(tmp_path, tree), store)
    assert summary == ImportSummary(legacy_scopes=1)
    assert dump(store.path) == before


def test_import_into_each_kind_of_target(store, path, tmp_path, monkeypatch):
    source = bolt_source(tmp_path, BOLT_VALUE)
    monkeypatch.setenv("FLOWSTORE_PATH", path)
    with store.session() as session:
        for target in (None, "", path, os.fsencode(path), store, session):
            assert import_bolt(os.fspath(source), target).cache == 1
            session.delete_cache_entry("k")
    with store.transaction() as transaction:
        for target in (transaction, store):
            with pytest.raises(RuntimeError):
                import_bolt(source, target)
    methods = dict.fromkeys(DataStore.__abstractmethods__)
    own = type("OwnStore", (DataStore,), methods)()
    for target, kind in ((own, TypeError), (1, TypeError), (":memory:", ValueError)):
        with pytest.raises(kind):
            import_bolt(source, target)
    refused(CorruptStoreError, "bbolt", import_bolt, source, source)
    assert store.list_cache_keys() == []


def test_import_that_fails_in_the_middle_changes_nothing(store, path, tmp_path):
    by_hand(path, "ALTER TABLE process_vars ADD more CHECK (key <> 'k')")
    source = bolt_source(tmp_path, {**BOLT_VALUE, b"s": {b"k": b"v"}})
    refused(StoreError, "CHECK", import_bolt, source, path)
    assert store.list_cache_keys() == []


NO_RECORDS = [
    (b"x", "JSON"),
    (b"[]", "JSON"),
    (b"\xff", "UTF-8"),
    (b'{"x":' + b"[" * 500_000, "JSON"),
    (b'{"pid":' + b"9" * 5000 + b"}", "JSON"),
    (b"{}", "startedAt is missing"),
    (bolt_record(completedAt="0000-12-31T23:59:59Z"), "completedAt"),
    (bolt_record(pid=2**63), "pid"),
    (bolt_record(error="\0"), "error .*NUL"),
    (bolt_record(error="\ud800"), "error .*surrogate"),
    ({}, "a bucket, where a value belongs"),
]


# ---- files of the original: what can't be read ----


@pytest.mark.parametrize(
    "bucket, key, value, reason",
    [
        (b"", b"k", b"v", "a value, where a bucket belongs"),
        (b"", b"\xff", {}, "bucket is no UTF-8"),
        (b"old", b"k", {}, "a bucket, where a value belongs"),
        (b"cache", b"k", {}, "a bucket, where a value belongs"),
        (b"cache", b"\xff", b"", "key is no UTF-8"),
        (b"cache", b"\0", b"", "key .*NUL"),
        (b"history", b"k", b"v", "a value, where a bucket belongs"),
        (b"history/\xff", b"k", bolt_record(), "ref is no UTF-8"),
        (b"history/r", b"\xff", bolt_record(), "id is no UTF-8"),
        (b"process", b"k", b"v", "a value, where a bucket belongs"),
        (b"process/s", b"k", {}, "a bucket, where a value belongs"),
        (b"process/s", b"k", b"\xff", "value is no UTF-8"),
        (b"process/s", b"k", b"\0", "value .*NUL"),
        (b"process/background", b"k", bolt_run("k", pid="7"), "pid"),
        *[(b"background", b"k", *each) for each in NO_RECORDS],
        *[(b"history/r", b"k", *each) for each in NO_RECORDS],
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_import_names_what_it_cant_read_and_brings_over_the_rest(
    tmp_path, bucket, key, value, reason
):
    tree = {key: value}
    for name in filter(None, reversed(bucket.split(b"/"))):
        tree = {name: tree}
    tree.setdefault(b"cache", {})[b"good"] = b"v"
    tree.setdefault(b"process", {})[b"scope"] = {b"good": b"v"}
    summary, store = imported(tmp_path, tree)
    [problem] = summary.problems
    shown = [f"b'{each}'" for each in problem[:2]]  # as Python shows the bytes
    assert shown == [repr(bucket), repr(key)]
    assert re.search(reason, problem[2])
    assert store.list_cache_keys() == ["good"]
    assert store.get_all_process_vars("scope") == {"good": "v"}


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "No such file"),
        (os.mkdir, "regular file"),
        (os.mkfifo, "regular file"),
        (b"", "empty"),
        (b"text\n" * 99, "no bbolt file"),
        (b"\xed\xda\x0c\xed" * 9999, "no bbolt file"),
        (bolt_meta(0, 3, 0, 1), "no bbolt file"),
        (b"SQLite format 3\0" * 99, "SQLite"),
        (make_bolt(BOLT_VALUE)[:-1], "root"),
        (overwritten(make_bolt(BOLT_VALUE), 12296, b"\4"), "root"),
    ],
)
def test_import_of_a_bad_source_makes_no_store(tmp_path, content, words):
    source = tmp_path / "source"
    if callable(content):
        content(source)
    elif content is not None:
        source.write_bytes(content)
    kind = StoreError if content is None else CorruptStoreError
    target = tmp_path / "new" / "target.db"
    error = refused(kind, words, import_bolt, source, target)
    assert error.path == str(source)
    assert os.listdir(tmp_path) == ([] if content is None else ["source"])


def test_import_of_a_store_that_is_open_here_leaves_its_locks(store, path, tmp_path):
    """Closing a second descriptor would drop them: others would take the log away."""
    with store.session() as session:
        session.set_process_var("root", "a", "1")
        target = tmp_path / "target.db"
        refused(CorruptStoreError, "open", import_bolt, path, target)
        code = "flowstore.SQLiteDataStore(sys.argv[1]).set_process_var('root', 'b', '2')"
        output_of(code, path)
        assert os.path.exists(f"{path}-wal")
        assert session.get_all_process_vars("root") == {"a": "1", "b": "2"}


def test_import_waits_for_the_lock_of_its_source(path, tmp_path):
    source = bolt_source(tmp_path, BOLT_VALUE)
    store = SQLiteDataStore(path, timeout=0.05)
    with open(source, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        error = refused(StoreBusyError, "longer timeout", import_bolt, source, store)
        assert error.path == str(source)
        # it waits for no other reader
        threading.Timer(0.1, fcntl.flock, (other, fcntl.LOCK_SH)).start()
        assert import_bolt(source, path).cache == 1
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and holds the lock no more


# ---- files of the original: damaged ----


@pytest.mark.parametrize("number", [0, 1, 3, 9, 2**32 - 1, 2**64 - 1])
def test_import_of_page_numbers_that_lead_nowhere_or_back(tmp_path, number):
    buckets = [
        (1, b"bad", struct.pack("<QQ", number, 0)),
        (1, b"branch", bytes(16) + bolt_page(0, 1, [(0, b"k", b"")])),
        (1, b"cache", struct.pack("<QQ", 4, 0)),
        (1, b"short", bytes(15)),
    ]
    pages = [
        bolt_page(3, 2, buckets, 4096),
        bolt_page(4, 1, [(number, b"a", b""), (4, b"b", b""), (5, b"c", b"")], 4096),
        bolt_page(5, 2, [(0, b"k", b"v")], 4096),
    ]
    summary, store = imported(tmp_path, bolt_file(3, b"".join(pages)))
    assert store.list_cache_keys() == ["k"]
    found = sorted(bucket or key for bucket, key, _ in summary.problems)
    assert found == ["bad", "branch", "cache", "cache", "short"]


@pytest.mark.parametrize(
    "at, new, kept",
    [
        (10, b"\2", []),  # how many entries there are
        (16, b"\2", ["b", "c"]),  # whether it is a bucket
        (36, b"\0", ["c"]),  # the second's position: then it lies where another does
        (40, b"\0", ["a", "c"]),  # the size of its key
        (44, b"\xff\xff", ["a", "c"]),  # that of its value
    ],
)
def test_import_of_a_damaged_table_brings_over_what_is_sound(tmp_path, at, new, kept):
    root = bolt_page(3, 2, [(1, b"cache", struct.pack("<QQ", 4, 0))], 4096)
    page = bolt_page(4, 2, [(0, key, b"v") for key in (b"a", b"b", b"c")], 4096)
    summary, store = imported(tmp_path, bolt_file(3, root + overwritten(page, at, new)))
    assert store.list_cache_keys() == kept
    assert {bucket for bucket, _, _ in summary.problems} == {"cache"}


BOLT_DAMAGED = make_bolt(
    {
        b"cache": {b"%02d" % n: b"v" * n for n in range(30)},
        b"history": {b"r": {b"%08d" % n: bolt_record() for n in range(12)}},
        b"background": {b"id": bolt_run("id")},
        b"process": {b"s": {b"k": b"v"}, b"background": {b"run": bolt_run("run")}},
        b"old": {b"k": b"v"},
    },
    page_size=512,
    inline=256,
)


@given(
    st.lists(
        st.tuples(st.integers(1024, len(BOLT_DAMAGED)), st.binary(min_size=1, max_size=4))
    ),
    st.none() | st.integers(0, len(BOLT_DAMAGED)),
)
@settings(SETTINGS, max_examples=40)
def test_import_of_any_damage_gives_an_error_or_a_summary(tmp_path_factory, edits, end):
    data = BOLT_DAMAGED[:end]
    for at, new in edits:
        data = overwritten(data, at, new)
    source = bolt_source(tmp_path_factory.mktemp("damaged"), data)
    found = value_of(import_bolt, source, source.with_name("target.db"))
    if isinstance(found, StoreError):
        assert found.path == str(source)


# ---- legacy tables ----


def test_migrate_moves_tables_of_key_and_value(store, path):
    by_hand(
        path,
        "CREATE TABLE flat (value, key)",
        """INSERT INTO flat (key, value) VALUES
            ('text', 'ü'), ('null', NULL), ('blob', x'61ff0062'), ('integer', 7),
            ('real', 1.5), (NULL, 'without key'), (x'6bff', ''),
            ('twice', 'first'), ('twice', 'last'), ('there', 'theirs')""",
        """CREATE TABLE "odd ""name""; --" (key TEXT PRIMARY KEY, value TEXT)""",
        """INSERT INTO "odd ""name""; --" VALUES ('k', 'v')""",
        "CREATE TABLE Empty (key, value)",
    )
    store.set_process_var("flat", "there", "mine")
    names = ["Empty", "flat", 'odd "name"; --']
    assert migrate_process_buckets(path) == names
    assert store.list_process_buckets() == names
    assert store.get_all_process_vars("flat") == {
        "blob": "a\\xff\\x00b",
        "integer": "7",
        "k\\xff": "",
        "null": "",
        "real": "1.5",
        "text": "ü",
        "there": "mine",
        "twice": "last",
    }
    assert store.get_all_process_vars(names[2]) == {"k": "v"}
    before = dump(path)
    assert migrate_process_buckets(path) == []
    assert dump(path) == before


def test_migrate_leaves_all_other_tables(store, path):
    by_hand(
        path,
        "CREATE TABLE more (key, value, more)",
        "CREATE TABLE less (key)",
        "CREATE TABLE others (key, values_)",
        "CREATE VIEW seen AS SELECT key, value FROM cache",
        "CREATE INDEX own ON more (key)",
    )
    store.set_cache_entry("k", b"v")
    before = dump(path)
    assert migrate_process_buckets(path) == []
    assert dump(path) == before


def test_migrate_touches_no_file_but_a_flowstore(path, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWSTORE_PATH", path)
    assert migrate_process_buckets() == []
    assert os.listdir(tmp_path) == []
    by_hand(path, "CREATE TABLE flat (key, value)")
    before = dump(path)
    refused(CorruptStoreError, "another program's", migrate_process_buckets, path)
    assert dump(path) == before


# ---- from store to store ----


@pytest.fixture
def target(tmp_path):
    return SQLiteDataStore(tmp_path / "copy.db")


def test_copy_adds_what_the_target_lacks_and_twice_is_once(store, target):
    for each, name in ((store, "theirs"), (target, "mine")):
        for key in ("k", name):
            each.set_cache_entry(key, name.encode())
            each.set_process_var("s", key, name)
            each.save_background_run(background(key, error=name))
            each.record_execution(record(id=key, label=name))
        each.record_execution(record(label="alike"))
        each.create_process_bucket(name)
    store.record_execution(record(label="alike"))
    # of the two records alike one is there
    assert copy_store(store, target) == (1, 2, 1, 1, 1, 0, 0, ())
    found = {"k": "mine", "mine": "mine", "theirs": "theirs"}
    cache, history, runs, scopes = contents_of(target)
    assert cache == {key: value.encode() for key, value in found.items()}
    labels = [one.label for one in history["build"]]
    assert labels == ["mine", "mine", "alike", "theirs", "alike"]
    assert {run.id: run.error for run in runs} == found
    assert scopes == {"mine": {}, "s": found, "theirs": {}}
    assert copy_store(store, target) == ImportSummary()


@pytest.mark.parametrize(
    "statement, key",
    [
        ("INSERT INTO cache VALUES (x'ff', x'00')", "b'\\xff'"),
        ("INSERT INTO cache VALUES ('k', 5)", "k"),
        ("INSERT INTO process_vars VALUES ('b', 'k', 'a' || char(0))", "k"),
        ("INSERT INTO process_vars VALUES ('b', 'k', x'ff00')", "k"),
        ("UPDATE history SET ref = x'ff'", "b'\\xff'"),
        ("UPDATE history SET exit_code = 'abc'", "build"),
    ],
)
def test_copy_names_a_row_that_no_store_holds(store, target, path, statement, key):
    store.record_execution(record())
    store.set_cache_entry("good", b"")
    by_hand(path, statement)
    found = copy_store(store, target)
    assert [problem[1] for problem in found.problems] == [key]
    assert found.cache == 1


def test_copy_of_many_rows_keeps_the_order_of_insertion(store, target):

    with store.transaction() as writer:
        for name in map("{:03}".format, range(350)):
            writer.record_execution(record(name[-1], label=name))
            writer.set_cache_entry(name, b"")
            writer.set_process_var(name[0], name, "")
            writer.save_background_run(background(name))
            writer.create_process_bucket(name)
    assert copy_store(store, target)[:5] == (350,) * 5
    assert dump(target.path) == dump(store.path)


def test_copy_keeps_whose_a_running_record_is(store, target, path):
    child = process(
        "s = flowstore.SQLiteDataStore(sys.argv[1])\n"
        "with s.execution('scoped', id='run'):\n"
        "    s.set_process_var('run', 'k', 'v')\n"
        "    [run] = s.get_execution_history('scoped')\n"
        "    far = 'far', os.getpid(), '', run.started_at, 'running'\n"
        "    s.save_background_run(flowstore.BackgroundRun(*far))\n"
        "    os.kill(os.getpid(), 9)",
        path,
    )
    assert child.communicate(timeout=60)[1] == ""
    store.record_execution(record("here", status="running", pid=os.getpid()))
    # another machine's is never judged; without a note it would be, by its number
    by_hand(path, "UPDATE background SET owner = 'far' || owner")
    copy_store(store, target)
    assert target.get_process_var("run", "k") == "v"
    assert target.reconcile() == 1
    statuses = {each.ref: each.status for each in target.get_recent_executions()}
    assert statuses == {"scoped": "failed", "here": "running"}
    assert target.get_background_run("far").status == "running"
    assert target.list_process_buckets() == []  # the run's scope went with it


def test_copy_reads_one_moment(store, target, path):
    with store.transaction() as writer:
        for number in range(1000):
            writer.record_execution(record(id=str(number)))
    child = process(
        "with flowstore.SQLiteDataStore(sys.argv[1]).session() as s:\n"
        "    for number in range(10**9):\n"
        "        with s.transaction() as t:\n"
        "            t.set_cache_entry('n', str(number).encode())\n"
        "            t.set_process_var('s', 'n', str(number))",
        path,
    )
    try:
        wait_until(lambda: store.get_cache_entry("n"))
        copy_store(store, target)
    finally:
        child.kill()
        child.communicate()
    assert target.get_process_var("s", "n").encode() == target.get_cache_entry("n")


def test_copy_never_holds_a_whole_store(store, target):
    with store.transaction() as writer:
        for number in range(1000):
            writer.set_cache_entry(str(number), bytes(10_000))
    tracemalloc.start()
    try:
        assert copy_store(store, target).cache == 1000
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_copy_refuses_what_makes_no_sense(store, target, path, tmp_path):
    os.symlink(path, tmp_path / "link")
    with store.session() as session:
        for same in (store, session, SQLiteDataStore(tmp_path / "link")):
            with pytest.raises(ValueError, match="itself"):
                copy_store(store, same)
    for pair in ((store, path), (path, store)):
        with pytest.raises(TypeError):
            copy_store(*pair)
    with target.transaction(), pytest.raises(RuntimeError):
        copy_store(store, target)
    os.unlink(path)
    assert refused(StoreError, "no store here", copy_store, store, target).path == path
    assert not os.path.exists(path)


# ---- which store a name is ----


def test_open_store_by_each_kind_of_name(path, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWSTORE_PATH", path)
    for name in (path, os.fsencode(path), Path(path), "", None):
        store = flowstore.open_store(name, timeout=1)
        assert (type(store), store.path) == (SQLiteDataStore, path)
    with pytest.raises(ValueError, match="timeout"):
        flowstore.open_store(path, timeout=-1)
    monkeypatch.setenv("FLOWSTORE_PATH", "postgres://user:secret@host")
    for name in ("postgresql://user:secret@host/db", None):
        with pytest.raises(ValueError, match="open_store") as caught:
            SQLiteDataStore(name)
        assert "secret" not in str(caught.value)
    for name in ("postgresql+psycopg://u:secret@h/d", " postgres://h", "POSTGRES://h"):
        with pytest.raises(ValueError, match="url must be") as caught:
            flowstore.open_store(name)
        assert "secret" not in str(caught.value)


# ---- the end of a store ----


def test_destroy_removes_the_file_and_nothing_else(store, path, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWSTORE_PATH", path)
    (tmp_path / "other").write_text("stays")
    by_hand(path, "CREATE TABLE added (key, value)")
    for name in (path, path, "", tmp_path / "missing" / "store.db"):
        destroy_store(name)  # a missing one is no error
        assert os.listdir(tmp_path) == ["other"]
    assert store.get_all_process_vars("root") == {}
    store.set_process_var("root", "k", "again")
    assert store.get_process_var("root", "k") == "again"


@pytest.mark.parametrize("what", ["text", "bbolt", "no id"])
def test_destroy_refuses_what_is_no_store(store, path, tmp_path, what):
    make, words = REFUSED[what]
    make(path)
    before = files_in(tmp_path)
    assert refused(CorruptStoreError, words, destroy_store, path).path == path
    assert files_in(tmp_path) == before


def test_destroy_empties_a_store_that_somebody_keeps_open(store, path):
    store.set_process_var("root", "k", "secret")
    child = process(
        "with flowstore.SQLiteDataStore(sys.argv[1]).session() as s:\n"
        "    print(s.get_process_var('root', 'k'), flush=True)\n"
        "    sys.stdin.read(); print(s.get_all_process_vars('root'))",
        path,
    )
    assert child.stdout.readline() == "secret\n"
    refused(StoreBusyError, "emptied", destroy_store, path)
    assert child.communicate()[0] == "{}\n"
    assert b"secret" not in Path(path).read_bytes()
    assert store.get_all_process_vars("root") == {}
    destroy_store(path)
    assert not os.path.exists(path)


# ---- PostgreSQL: many processes ----

# what each of so many processes does with the store, and how many keys are there then
STORMS = {
    "single operations": (32, 320, """
with store.session() if number % 2 else contextlib.nullcontext(store) as each:
    for key in range(10):
        each.set_cache_entry(f"{number} {key}", b"")
"""),
    "transactions that depend on what they read": (16, 320, """
for _ in range(20):
    with store.transaction() as transaction:
        transaction.set_cache_entry(f"{len(transaction.list_cache_keys())}", b"")
"""),
    "sessions, more than the server takes": (150, 150, """
with store.session() as session:
    session.set_cache_entry(str(number), b"")
    session.get_cache_entry(str(number))
"""),
}  # fmt: skip


@pytest.fixture
def fresh_url(server):
    """The URL of a store of its own."""
    return server.url(schema=server.new_schema())


@pytest.mark.parametrize(("count", "keys", "code"), STORMS.values(), ids=STORMS)
def test_nothing_is_lost_by_many_in_a_fresh_schema_on_a_server(
    fresh_url, count, keys, code
):
    opened = "store = flowstore.open_store(*arguments, timeout=30)"
    words = f"import contextlib, psycopg\n{CROWD}", count, f"{opened}{code}", fresh_url
    assert process(*words).communicate(timeout=180) == ("[]\n", "")
    assert len(flowstore.open_store(fresh_url).list_cache_keys()) == keys


def test_a_killed_client_leaves_no_lock_and_nothing_of_its_transaction_on_a_server(
    fresh_url,
):
    impatient = flowstore.open_store(fresh_url, timeout=0.05)
    child = process(
        "with flowstore.open_store(sys.argv[1]).transaction() as t:\n"
        "    t.set_cache_entry('k', b'')\n    print('begun', flush=True)\n    sys.stdin.read()",
        fresh_url,
    )
    assert child.stdout.readline() == "begun\n"
    with pytest.raises(StoreBusyError, match="try again"):
        impatient.delete_cache_entry("k")
    assert impatient.list_cache_keys() == []  # readers don't wait
    child.kill()
    child.communicate()
    flowstore.open_store(fresh_url).set_cache_entry("after", b"")
    assert impatient.list_cache_keys() == ["after"]


WRITER = """
store = flowstore.open_store(sys.argv[1])
with store.session() as session:
    for number in range(10**9):
        for name, each in ("store", store), ("session", session):
            try:
                each.set_cache_entry(f"{name} {number}", b"")
                print(f"{name} {number}", flush=True)
            except flowstore.StoreError:
                print("failed", flush=True)
"""


def test_a_killed_server_loses_nothing_and_the_same_objects_go_on(server, fresh_url):
    child = process(WRITER, fresh_url)
    said = [child.stdout.readline() for _ in range(40)]
    server.stop(signal.SIGKILL)
    server.start()
    for awaited in "failed", "store", "session":
        while not said[-1].startswith(awaited):
            said.append(child.stdout.readline())
            assert said[-1]
    child.kill()
    child.communicate()
    acknowledged = {line.strip() for line in said} - {"failed"}
    assert acknowledged <= {*flowstore.open_store(fresh_url).list_cache_keys()}


# ---- PostgreSQL: what goes wrong is one line without the password ----


def refused_line(error):
    """The message of a StoreError, which is one line, and shows no password anywhere."""
    shown = "".join(traceback.format_exception(error))
    for secret in (PASSWORD, quote(PASSWORD, safe=""), "pa:ss", "o?r#d", "hidden"):
        assert secret not in shown
    assert "\n" not in str(error) and str(error).startswith(error.path)
    return str(error)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"password": "hidden"}, "wrong password"),
        ({"database": "missing"}, "no such database"),
        ({"user": "guest"}, "this role lacks a right"),
        ({"database": "latin"}, "encoding LATIN1"),
        ({"query": "?sslmode=bogus&password=hidden"}, "sslmode"),
        ({"query": "?port=1"}, "can't be reached"),
        ({"query": "?host=/nowhere"}, "can't be reached"),
    ],
    ids=str,
)
def test_what_cannot_be_opened_is_one_line_on_a_server(server, options, words):
    server.sql(
        "DROP DATABASE IF EXISTS latin",
        "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0",
        "DROP ROLE IF EXISTS guest",
        f"CREATE ROLE guest LOGIN PASSWORD '{PASSWORD}'",
    )
    with pytest.raises(StoreError) as caught:
        flowstore.PostgresDataStore(
            server.tcp_url(**options), schema="refused", timeout=0.5
        )
    line = refused_line(caught.value)
    assert words in line and f"@127.0.0.1:{server.port}/" in line
    assert not isinstance(caught.value, StoreBusyError)


def test_too_many_clients_are_waited_for_up_to_the_timeout_on_a_server(server):
    import psycopg

    store = server.store(timeout=0.1)
    with contextlib.ExitStack() as clients:
        with pytest.raises(psycopg.OperationalError):
            while True:
                clients.enter_context(server.psycopg())
        with pytest.raises(StoreBusyError, match="too many clients") as caught:
            store.set_cache_entry("k", b"")
    refused_line(caught.value)


def test_without_the_driver_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    url = "postgresql://me:hidden@host/"
    with pytest.raises(
        StoreError, match=r"pip install 'flowstore\[postgres\]'"
    ) as caught:
        flowstore.open_store(url)
    assert refused_line(caught.value).startswith("postgresql://me@host/: ")


@pytest.mark.parametrize(
    "url",
    ["postgresql://me:hid@den@host/db", "postgresql://me:hid/den@host/db",
     "postgresql://me:hid%xden@host/db", "postgresql://me:hid%00den@host/db",
     "postgresql://me:hid/d?en=@host/db", "mysql://me:hidden@host/db", "host=x password=hidden",
     "postgresql://me:hid den@host/db", "postgresql://me:hid\0den@host/db"],
)  # fmt: skip
def test_a_url_that_shows_pieces_of_a_password_is_refused(url):
    with pytest.raises(ValueError, match=r"%40 for @|NUL") as caught:
        flowstore.PostgresDataStore(url)
    assert "hid" not in str(caught.value) and "den" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "path", "schema"),
    [
        ("postgresql://me:hidden:b?c#d[@h:1/d", "postgresql://me@h:1/d", "flowstore"),
        ("postgres://me@h/d?schema=a%3Ab&x=1", "postgres://me@h/d?schema=a%3Ab&x=1", "a:b"),
        ("postgresql:///d?x=1&password=hidden&schema=y", "postgresql:///d?x=1&schema=y", "y"),
        ("postgresql://?user=me&sslPassword=hidden", "postgresql://?user=me", "flowstore"),

    ],
)  # fmt: skip
def test_the_path_is_the_url_without_a_password_on_a_server(server, url, path, schema):
    store = flowstore.PostgresDataStore(url, connect=server.psycopg)
    assert (store.path, repr(store)) == (path, f"PostgresDataStore({path!r})")
    with store.execution("r") as run:
        for_a_child = run.env["FLOWSTORE_PATH"]
    assert f"schema={quote(schema)}" in for_a_child
    assert ("hidden" in for_a_child) == ("hidden" in url)
    assert server.sql(f'SELECT ref FROM "{schema}".history') == [("r",)]
    flowstore.destroy_store(server.url(schema=schema))


def test_the_argument_schema_wins_over_the_urls_on_a_server(server):
    schema = server.new_schema()
    store = flowstore.PostgresDataStore(server.url(schema="of_the_url"), schema=schema)
    store.set_cache_entry("k", b"v")
    named = "SELECT nspname FROM pg_namespace WHERE nspname IN ('of_the_url', '{}')"
    assert server.sql(named.format(schema)) == [(schema,)]


@pytest.mark.parametrize(
    ("option", "wrong", "error"),
    [
        ("schema", "", ValueError),
        ("schema", "é" * 32, ValueError),
        ("schema", "a\0", ValueError),
        ("schema", b"s", TypeError),
        ("timeout", -1, ValueError),
        ("timeout", "3", TypeError),
    ],
)
def test_wrong_options_are_refused(option, wrong, error):
    with pytest.raises(error, match=option):
        flowstore.PostgresDataStore("postgresql://", connect=list, **{option: wrong})


@pytest.mark.parametrize("each", KINDS[3:], indirect=True)
def test_a_name_has_up_to_1300_bytes(each):
    long = "é" * 650
    each.set_process_var(long, long, "v")
    each.record_execution(record(long, id=long))
    assert each.get_all_process_vars(long) == {long: "v"}
    assert each.get_execution_history(long) == [record(long, id=long)]
    with pytest.raises(ValueError, match="at most 1300 bytes"):
        each.set_cache_entry(f"{long}x", b"")


# ---- PostgreSQL: roles, settings, schemas ----

SETTINGS_OF_A_ROLE = """
    search_path = pg_catalog; default_transaction_read_only = on; bytea_output = escape;
    default_transaction_isolation = serializable; default_transaction_deferrable = on;
    client_encoding = LATIN1; statement_timeout = 50; lock_timeout = 1;
    idle_in_transaction_session_timeout = 1; DateStyle = German; TimeZone = 'Asia/Tokyo'"""


def test_settings_of_the_role_and_what_connect_left_open_change_nothing_on_a_server(
    server,
):
    schema = server.new_schema()
    server.sql("CREATE ROLE strange LOGIN SUPERUSER")
    for setting in SETTINGS_OF_A_ROLE.split(";"):
        server.sql(f"ALTER ROLE strange SET {setting}")

    def connect():
        driver = pytest.importorskip("pg8000.dbapi", reason=NO_DRIVER)
        connection = driver.connect("strange", **server.by_socket())
        connection.autocommit = True  # else it might be ended before the next line
        connection.cursor().execute("SET idle_in_transaction_session_timeout = 0")
        connection.autocommit = False
        connection.cursor().execute("SELECT 1")  # begins a transaction
        return connection

    own = flowstore.PostgresDataStore(server.url(user="strange"), schema=schema)
    for store in (own, server.store(schema=schema, connect=connect)):
        with store.session() as session, session.transaction() as transaction:
            transaction.set_cache_entry("é\U0001f600", bytes(range(256)))
            time.sleep(0.01)
            assert transaction.get_cache_entry("é\U0001f600") == bytes(range(256))


def test_a_role_that_may_only_select_reads_on_a_server(server):
    schema = server.new_schema()
    store = server.store(schema=schema)
    store.set_cache_entry("k", b"v")
    server.sql(
        "CREATE ROLE reader LOGIN",
        f"GRANT USAGE ON SCHEMA {schema} TO reader",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO reader",
    )
    reader = flowstore.PostgresDataStore(server.url(user="reader"), schema=schema)
    assert reader.get_cache_entry("k") == b"v"
    with pytest.raises(StoreError, match="lacks a right"):
        reader.set_cache_entry("k", b"")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("DROP TABLE {0}.cache", "cache"),
        (
            "DROP SCHEMA {0} CASCADE; CREATE SCHEMA {0} CREATE TABLE t ()",
            "something else",
        ),
        ("DELETE FROM {0}.store", r"version \[\]"),
        ("UPDATE {0}.store SET version = 3", "update"),
        ("INSERT INTO {0}.store VALUES (2)", r"version \[2, 2\]"),
    ],
)
def test_a_schema_that_is_no_store_is_refused_and_stays_on_a_server(
    server, change, words
):
    schema = server.new_schema()
    store = server.store(schema=schema)
    server.sql(change.format(schema))
    query = f"SELECT relname FROM pg_class WHERE relnamespace = '{schema}'::regnamespace"
    before = server.sql(query)
    with pytest.raises(StoreError, match=words):
        store.set_cache_entry("k", b"")
    for refused in flowstore.open_store, flowstore.destroy_store:
        with pytest.raises(StoreError, match=f"its schema '{schema}' .*{words}"):
            refused(server.url(schema=schema))
    assert server.sql(query) == before


def test_destroying_drops_the_stores_own_tables_alone_on_a_server(server):
    schema = server.new_schema()
    url = server.url(schema=schema)
    store = flowstore.open_store(url)
    server.sql(f"CREATE TABLE {schema}.mine (x int)")
    flowstore.destroy_store(url)
    tables = f"SELECT tablename FROM pg_tables WHERE schemaname = '{schema}'"
    assert server.sql(tables) == [("mine",)]
    server.sql(f"DROP TABLE {schema}.mine")
    assert store.get_cache_entry("k") is None
    with store.session() as session:
        session.set_cache_entry("k", b"new")
        assert store.get_cache_entry("k") == b"new"
    for _ in range(2):  # a missing one is no error, and isn't made
        flowstore.destroy_store(url)
        assert not server.sql(f"SELECT 1 FROM pg_namespace WHERE nspname = '{schema}'")
    assert store.list_execution_refs() == []


# ---- PostgreSQL: sessions, transactions, forks ----


def test_another_handle_in_its_thread_may_not_write_whatever_its_url_on_a_server(server):
    schema = server.new_schema()
    urls = server.url(), server.tcp_url()
    first, second = (flowstore.PostgresDataStore(url, schema=schema) for url in urls)
    with first.transaction() as transaction:
        with pytest.raises(RuntimeError, match="would wait for itself"):
            second.delete_cache_entry("k")
        server.store().set_cache_entry("k", b"another store")
        transaction.set_cache_entry("k", b"v")
    assert second.get_cache_entry("k") == b"v"
    with pytest.raises(ValueError, match="into itself"):
        flowstore.copy_store(first, second)


def test_a_lost_connection_is_replaced_once_but_not_in_a_transaction_on_a_server(server):
    def lose_all():
        server.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )

    with server.store().session() as session:
        for _ in range(2):
            lose_all()
            session.set_cache_entry("k", b"1")
        rolled_back = pytest.raises(StoreError, match="rolled back")
        with rolled_back, session.transaction() as transaction:
            transaction.set_cache_entry("k", b"2")
            lose_all()
            with pytest.raises(StoreError, match="see that it runs"):
                transaction.set_cache_entry("k", b"3")
        assert session.get_cache_entry("k") == b"1"


def test_an_error_while_committing_says_that_the_outcome_is_unknown_on_a_server(
    server, monkeypatch
):
    import psycopg

    def fail(connection):
        raise psycopg.OperationalError("connection lost at postgres://me:hidden@h/")

    with server.store(connect=server.psycopg).session() as session:
        monkeypatch.setattr(psycopg.Connection, "commit", fail)
        with pytest.raises(StoreError, match="whether that has taken effect") as caught:
            session.set_cache_entry("k", b"")
    refused_line(caught.value)


@pytest.mark.parametrize("driver", ["psycopg", "pg8000"])
def test_a_forked_child_leaves_its_parents_session_alone_on_a_server(server, driver):
    store = server.store(connect=server.pg8000 if driver == "pg8000" else None)

    def use_them():
        for each in (session, transaction):
            with pytest.raises(RuntimeError, match="fork"):
                each.list_cache_keys()
        return store.list_cache_keys()

    with store.session() as session, session.transaction() as transaction:
        transaction.set_cache_entry("parent", b"")
        assert in_a_fork(use_them) == []
        transaction.set_cache_entry("k", b"")
    assert store.list_cache_keys() == ["k", "parent"]


# ---- copy_store() between the engines, and another driver ----


@pytest.fixture
def some_store(server, tmp_path):
    """What makes an empty store of a kind."""

    def make(kind):
        if kind == "file":
            return flowstore.SQLiteDataStore(tmp_path / "copied.db")
        return server.store(connect=server.pg8000 if kind == "pg8000" else None)

    return make


@pytest.mark.parametrize(
    ("source", "target"),
    [("file", "psycopg"), ("psycopg", "file"), ("file", "pg8000"), ("pg8000", "psycopg")],
)
def test_a_copy_between_engines_has_all_and_what_is_there_wins(
    some_store, source, target
):
    old, new = some_store(source), some_store(target)
    gone = process("sys.stdin.read()")
    with old.transaction() as writer:
        for number in range(102):
            writer.set_cache_entry(f"k{number}", bytes(range(256)) * number)
            writer.record_execution(record(error=f"é\U0001f600{number}"))
        writer.record_execution(record(id="1", status="running", pid=gone.pid))
        extreme = {"duration": LONGEST, "completed_at": START, "exit_code": -(2**63)}
        writer.record_execution(record("other", id="2", **extreme))
        writer.save_background_run(background(ref="", completed_at=START))
        writer.create_process_bucket("empty")
        for bucket in "root", "scope":
            writer.set_process_var(bucket, "a", "ours")
    gone.communicate()
    new.set_process_var("root", "a", "theirs")
    assert flowstore.copy_store(old, new) == (102, 104, 1, 1, 1, 0, 0, ())
    assert flowstore.copy_store(old, new) == flowstore.ImportSummary()
    old.set_process_var("root", "a", "theirs")
    assert contents_of(new) == contents_of(old)
    assert new.reconcile() == 1  # by the owners' notes, which came along


def test_an_error_of_a_handlers_own_class_passes_on_a_server(server):
    def handle(*_):
        raise Limit(4, "a limit")

    schema = server.new_schema()
    store = server.store(schema=schema)
    before = signal.signal(signal.SIGALRM, handle)
    with server.psycopg() as other, other.transaction():
        other.execute(f"SELECT version FROM {schema}.store FOR UPDATE")
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Limit):
            store.set_cache_entry("k", b"v")
    signal.signal(signal.SIGALRM, before)
    assert store.list_cache_keys() == []


def test_a_schema_has_any_name_whatever_encoding_the_role_has_on_a_server(server):
    server.sql("CREATE ROLE latin LOGIN SUPERUSER")
    server.sql("ALTER ROLE latin SET client_encoding = 'LATIN1'")
    import psycopg

    store = server.store(
        schema="схема", connect=lambda: psycopg.connect(server.url(user="latin"))
    )
    store.set_process_var("b", "é", "\U0001f600")
    assert store.get_all_process_vars("b") == {"é": "\U0001f600"}


def test_a_store_that_was_dropped_is_made_anew_without_waiting_on_a_server(server):

    schema = server.new_schema()
    store = server.store(schema=schema, timeout=0)
    store.set_cache_entry("k", b"v")
    destroy_store(server.url(schema=schema))
    store.set_cache_entry("l", b"v")
    assert store.list_cache_keys() == ["l"]


def test_a_run_without_a_note_is_never_judged_on_a_server(server, ended_pid):
    store = server.store()
    store.record_execution(record(status="running", pid=ended_pid))
    assert store.reconcile() == 0


# ---- the command line: helpers ----

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def said(capfd, monkeypatch, path):
    """Run the command line in this process, on the store at `path`: its exit status, and
    what it writes to its standard streams."""
    for name in [name for name in os.environ if name.startswith("FLOW")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLOWSTORE_PATH", path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            flowstore.main(list(map(os.fspath, arguments)))
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return run


FLOWSTORE = f"{shlex.quote(sys.executable)} -m flowstore"  # in a script of the shell
DONE = (0, "", "")  # the answer of a command that has nothing to say


def complaint(answer):
    """The one line that a command says which fails, and prints nothing."""
    status, out, err = answer
    assert (status, out, err.count("\n")) == (1, "", 1)
    return err.removeprefix("flowstore: ").removesuffix("\n")


class Terminal:
    """A program in a terminal of its own, as the leader of its session."""

    def __init__(self, store, *command, columns=80, **variables):
        self.pid, self.descriptor = pty.fork()
        if not self.pid:
            termios.tcsetwinsize(0, (24, columns))
            usual = {"TERM": "xterm", "TZ": "UTC", "PS1": "", "ENV": ""}
            places = {"FLOWSTORE_PATH": str(store), "fs": FLOWSTORE}
            os.execvpe(command[0], command, environment(**usual | places | variables))
        self.heard = b""

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def hear(self):
        """Wait until it shows more; whether it does before its end."""
        assert select.select([self.descriptor], [], [], 30)[0], self.heard
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            more = os.read(self.descriptor, 65536)
            self.heard += more
            return bool(more)
        return False

    def until(self, pattern):
        """Wait until it shows this; what comes after it is heard the next time."""
        while not (found := re.search(pattern, self.heard)):
            assert self.hear(), self.heard
        self.heard = self.heard[found.end() :]
        return found

    def close(self):
        """Hang up; the exit status of its program."""
        os.close(self.descriptor)
        os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextlib.contextmanager
def in_terminal(*arguments, **options):
    session = Terminal(*arguments, **options)
    try:
        yield session
    finally:
        session.close()


def terminal(store, script, typed="", **options):
    """Run a script in a terminal, where $fs is the command line: its exit status, and what
    the terminal shows."""
    session = Terminal(store, "sh", "-c", script, **options)
    session.type(typed)
    while session.hear():
        pass
    return session.close(), session.heard.decode().replace("\r\n", "\n")


def columns_of(text):
    """How many columns of a terminal a text takes."""
    seen = [each for each in text if unicodedata.category(each) not in ("Mn", "Me", "Cf")]
    return len(seen) + sum(unicodedata.east_asian_width(each) in "WF" for each in seen)


@pytest.fixture
def filled_path(store):
    """A store with some of everything."""
    with store.transaction() as writer:
        writer.set_process_var("root", "A", ODD_TEXT)
        writer.set_process_var("root", "B", "Ünï 漢字")
        writer.set_cache_entry("key", b"\xff")
        span = timedelta(seconds=1.5)
        writer.record_execution(
            record(id="b1", label="first", duration=span, status="completed")
        )
        span = timedelta(seconds=1)
        writer.record_execution(
            record(
                minutes=2,
                id="b2",
                duration=span,
                status="failed",
                exit_code=3,
                error="boom",
            )
        )
        span = timedelta(seconds=70)
        writer.record_execution(record("test", 1, duration=span, command="make test"))
        ended = START + timedelta(seconds=90)
        writer.save_background_run(background(completed_at=ended, error="lost\nline"))
    return store


ODD_TEXT = "one\ntwo\x1b[2J\u202e\x9b"
ESCAPED = r"one\ntwo\x1b[2J\u202e\x9b"
# lines of what such a store shows
FIRST = "completed\t2024-05-06T07:08:09.123456Z\tbuild\t1.500\t0\tb1\tfirst\n"
FAILED = "failed\t2024-05-06T07:10:09.123456Z\tbuild\t1.000\t3\tb2\tboom\n"
LONG = "completed\t2024-05-06T07:09:09.123456Z\ttest\t70.000\t0\t\tmake test\n"
SERVED = "completed\t2024-05-06T07:08:09.123456Z\tserve\t90.000\t0\tb1\tlost\\nline\n"

# ---- the command line: what is wrong, and what to do ----

AGES = "an age or a time (30d, 12h, 2w, 90m, 2024-05-31 or 2024-05-31T18:30)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("histroy", "there is no command 'histroy': did you mean history?"),
        ("hist", "there is no command 'hist': did you mean history?"),
        ("frobnicate", "there is no command 'frobnicate': `flowstore help` lists them"),
        ("help destory", "there is no command 'destory': did you mean destroy?"),
        ("get", "get needs KEY: flowstore get KEY"),
        ("set", "set needs KEY: flowstore set KEY [VALUE]"),
        ("run r", "run needs a command: put -- before it "
         "(example: flowstore run 'build app' -- make -j4)"),
        ("get A B", "get takes one KEY: quote 'A B'"),
        ("history build app", "history takes one REF: quote 'build app'"),
        ("set KEY my secret", "set takes one VALUE: quote it"),
        ("list -- A", "list takes no argument: leave 'A' out"),
        ("import postgresql://u:hidden@h/d b",
         "import takes one FILE: quote 'postgresql://u@h/d b'"),
        ("history --statsu x", "history has no option --statsu: did you mean --status?"),
        ("history --stat=x", "history has no option --stat: did you mean --status?"),
        ("list -json", "list has no option -json: did you mean --json?"),
        ("list --bogus", "list has no option --bogus: leave it out"),
        ("get -K", "get has no option -K: put -- before a word with a dash"),
        ("set KEY -secret", "set has no such option: put -- before a word with a dash"),
        ("run r make -j4", "run has no option -j4: put -- before the command"),
        ("-x", "there is no option -x: see `flowstore help`"),
        ("--stroe x.db list", "there is no option --stroe: did you mean --store?"),
        ("--stor postgresql://u:hidden@h/d get",
         "there is no option --stor: did you mean --store?"),
        ("-- gte KEY", "there is no command 'gte': did you mean get?"),
        ("get KEY --json=1", "--json takes no value"),
        ("get KEY --store", "--store takes a value: --store PATH"),
        ("--store= get KEY", "--store takes a value: --store PATH"),
        ("history -n", "-n takes a value: -n N"),
        ("history -n x", "-n takes a number, 0 or more, not 'x'"),
        ("history -n -5", "-n takes a number, 0 or more, not '-5'"),
        ("prune --keep 9999999999999999999",
         "--keep takes a number, 0 or more, not '9999999999999999999'"),
        ("prune", "prune needs --keep N, --before AGE, or both"),
        ("prune --before soon", f"--before takes {AGES}, not 'soon'"),
        ("history --since 5y", f"--since takes {AGES}, not '5y'"),
        ("history --since 9999999d", f"--since takes {AGES}, not '9999999d'"),
        ("history --since 2024-02-30", f"--since takes {AGES}, not '2024-02-30'"),
        ("destroy", "destroy needs --yes where nobody can be asked"),
        ("run --log FILE r -- true",
         "run --log FILE needs --background: else redirect by > FILE"),
        ("stop x --timeout soon", "--timeout takes a number of seconds, 0 or more, not 'soon'"),
        ("stop x --timeout -1", "--timeout takes a number of seconds, 0 or more, not '-1'"),
        ("stop x --timeout nan", "--timeout takes a number of seconds, 0 or more, not 'nan'"),
    ],
)  # fmt: skip
def test_usage_error_names_what_is_wrong(said, path, arguments, message):
    assert said(*arguments.split()) == (2, "", f"flowstore: {message}\n")
    assert not os.path.exists(path)


@pytest.mark.parametrize("command", ["import", "backup"])
def test_an_empty_name_is_no_file(said, command):
    message = f"flowstore: {command} needs FILE: flowstore {command} FILE\n"
    assert said(command, "") == (2, "", message)


def test_a_store_in_memory_is_none_wherever_it_is_named(monkeypatch):
    monkeypatch.setenv("FLOWSTORE_PATH", ":memory:")
    for path in (":memory:", None):
        with pytest.raises(ValueError, match="every operation opens it"):
            flowstore.SQLiteDataStore(path)


def test_help_says_what_a_command_does_with_an_example_that_is_right(said):
    _, overview, _ = said()
    assert said("help") == said("--help") == said("-h") == (0, overview, "")
    names = re.findall(r"^  (\w+) .*  [A-Z].*\.$", overview, re.MULTILINE)
    assert {"set", "get", "history", "import", "destroy"} <= {*names}
    for name in {*names} - {"help"}:
        text = said("help", name)[1]
        assert said(name, "--help") == (0, text, "")
        usage, _, sentence, *_, example = text.splitlines()
        assert usage.startswith(f"usage: flowstore {name}")
        assert sentence in overview and sentence[-1] == "."
        assert re.search(r"^  --store PATH +\w", text, re.MULTILINE)
        words = example.removeprefix("example: flowstore ").partition(" -- ")
        assert said(*words[0].split(), "--help", *words[1:]) == (0, text, "")
    assert said("--version") == (0, f"flowstore {flowstore.__version__}\n", "")


# ---- the command line: what each command prints ----


@pytest.mark.parametrize(
    ("arguments", "text", "document"),
    [
        ("get B", "Ünï 漢字\n", "Ünï 漢字"),
        ("get A", f"{ODD_TEXT}\n", ODD_TEXT),
        ("list", f"A\t{ESCAPED}\nB\tÜnï 漢字\n", {"A": ODD_TEXT, "B": "Ünï 漢字"}),
        ("history", FAILED + LONG + FIRST, ["b2", None, "b1"]),
        ("history build", FAILED + FIRST, ["b2", "b1"]),
        ("history -n1", FAILED, ["b2"]),
        ("history build -n 0", FAILED + FIRST, ["b2", "b1"]),
        ("history --status=completed", LONG + FIRST, [None, "b1"]),
        ("history --since 2024-05-06T07:09:00Z", FAILED + LONG, ["b2", None]),
        ("-n 2 history --since=20240101", FAILED + LONG, ["b2", None]),
        ("background", SERVED, ["b1"]),
    ],
)
def test_prints_text_for_people_and_a_document_for_programs(
    said, filled_path, arguments, text, document
):
    assert said(*arguments.split()) == (0, text, "")
    status, out, err = said("--json", *arguments.split())
    found = json.loads(out)
    if isinstance(found, list):
        found = [each.get("id") for each in found]
    assert (status, found, err, out.count("\n")) == (0, document, "", 1)


def test_prune(said, filled_path):
    text = "history\t1\nbackground\t0\n"
    assert said("prune", "--keep", "1") == (0, text, "")
    document = '{"history": 2, "background": 1}\n'
    assert said("prune", "--before", "1w", "--json") == (0, document, "")


def test_a_running_run_shows_the_time_so_far_and_no_exit_code(said, store):
    began = datetime.now(timezone.utc) - timedelta(hours=1)
    pid = os.getpid()
    store.record_execution(
        ExecutionRecord("r", began, id="now", status="running", pid=pid)
    )
    store.save_background_run(BackgroundRun("now", pid, "r", began, "running"))
    row = r"running\t[^\t]+Z\tr\t360\d\.\d{3}\t"
    assert re.fullmatch(f"{row}\tnow\t\n", said("history")[1])
    assert re.fullmatch(f"{row}{pid}\tnow\t\n", said("background")[1])


SHOWN_EXECUTION = """\
ref\tbuild
started_at\t2024-05-06T07:08:09.123456Z
duration\t0.000
exit_code\t0
error\t
log_archive_id\t
id\tboth
completed_at\t
status\t
pid\t0
command\t
spec\t
label\tnightly
source\t
client_name\t
session_id\t
working_dir\t
"""

SHOWN_RUN = """\
id\tb1
pid\t0
ref\tserve
started_at\t2024-05-06T07:08:09.123456Z
status\tcompleted
log_archive_id\t
error\tlost\\nline
completed_at\t
"""


def test_show_has_all_fields_of_a_run_of_either_kind(said, store):
    execution, run = record(id="both", label="nightly"), background(error="lost\nline")
    store.record_execution(execution)
    store.save_background_run(run)
    store.save_background_run(background("both"))  # the execution is shown
    assert said("show", "both") == (0, SHOWN_EXECUTION, "")
    assert said("show", "b1") == (0, SHOWN_RUN, "")
    assert json.loads(said("show", "both", "--json")[1]) == execution.to_dict()
    assert json.loads(said("show", "b1", "--json")[1]) == run.to_dict()


@pytest.mark.parametrize(
    ("arguments", "message", "document"),
    [
        ("list", "there are no variables", {}),
        ("history", "there are no such runs: `flowstore run` records one", []),
        (
            "background",
            "there are no background runs: `flowstore run --background` starts one",
            [],
        ),
        ("migrate", "there was nothing to move", []),
    ],
)
def test_says_so_where_there_is_nothing(said, path, arguments, message, document):
    assert said(arguments) == (0, "", f"flowstore: {message}\n")
    assert said(arguments, "--json") == (0, json.dumps(document) + "\n", "")
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    "arguments",
    [
        *("get K", "list", "history", "history build", "check", "path", "migrate"),
        *("remove K", "clear", "forget build", "prune --keep 1", "backup /dev/null/x"),
    ],
)
def test_no_store_is_made_to_find_nothing_in_it(said, path, arguments):
    said(*arguments.split())
    assert os.listdir(os.path.dirname(path)) == []


def test_variables(said, store, monkeypatch):
    assert said("set", "--global", "K", "1") == said("set", "K2", "-5") == DONE
    monkeypatch.setenv("FLOW_PROCESS_BUCKET", "a b:c")
    assert said("set", "K", "2", "--json") == said("set", "--", "-k", "-") == DONE
    assert store.get_all_process_vars("a_b_c") == {"-k": "-", "K": "2", "K2": "-5"}
    assert said("get", "K") == (0, "2\n", "")
    assert said("get", "--global", "K") == (0, "1\n", "")
    assert said("list", "--global") == (0, "K\t1\nK2\t-5\n", "")
    assert said("remove", "K") == said("remove", "K") == DONE
    assert said("get", "K") == (0, "1\n", "")
    assert said("clear") == said("clear", "--global") == DONE
    assert store.list_process_buckets() == []
    reason = "there is no variable 'K' in the scope 'a_b_c' or in 'root'"
    assert complaint(said("get", "K")) == f"{store.path}: {reason}"


def test_forget(said, filled_path):
    assert said("forget", "build") == said("forget", "nobody", "--json") == DONE
    assert filled_path.list_execution_refs() == ["test"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [(b"", ""), (b"\n", ""), (b"x\r\n\n", "x\r\n"), ("ü".encode(), "ü")],
)
def test_a_value_from_standard_input_loses_one_newline(
    said, store, monkeypatch, given, kept
):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(given)))
    assert said("set", "K") == DONE
    assert store.get_process_var("root", "K") == kept


def test_text_is_utf_8_whatever_the_terminal_has(store):
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    assert cli("set", "Ü", "漢字", store=store.path, **plain) == DONE
    assert cli("get", "Ü", store=store.path, **plain) == (0, "漢字\n", "")
    wrong = "must not have a lone surrogate\n"
    assert cli("get", b"\xff", store=store.path) == (2, "", f"flowstore: key {wrong}")
    from_input = cli("set", "K", store=store.path, input=b"\xff")
    assert from_input == (2, "", f"flowstore: value {wrong}")


def test_a_path_may_have_any_bytes_and_is_shown_in_one_line(tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xff\n\x1b[31m.db"
    command = [sys.executable, "-m", "flowstore", "--store", odd, "path"]
    assert subprocess.check_output(command, env=environment()) == odd + b"\n"
    shown = rf"{tmp_path}/\xff\n\x1b[31m.db: there is no store"
    assert complaint(cli("--store", odd, "check")).startswith(shown)


# ---- the command line: the store as a whole ----


def test_check_verifies_and_counts(said, filled_path):
    report = json.loads(said("check", "--json")[1])
    rows = {"cache": 1, "history": 3, "background": 1, "process_vars": 2}
    size = os.path.getsize(filled_path.path)
    found = {"path": filled_path.path, "check": "ok", "size": size, "process_buckets": 0}
    assert (rows | found).items() <= report.items() and report["free"] >= 0
    assert said("check") == (0, "".join(f"{k}\t{v}\n" for k, v in report.items()), "")
    by_hand(
        filled_path.path,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET rootpage = 2 WHERE name = 'history_by_ref'",
    )
    assert "it is damaged" in complaint(said("check"))


def test_path(said, path):
    assert said("path") == (0, f"{path}\n", "")
    other = json.dumps(os.path.abspath("other.db"))
    assert said("path", "--json", "--store=other.db") == (0, f"{other}\n", "")


def test_the_originals_store_is_pointed_at_until_there_is_one(
    said, monkeypatch, tmp_path
):
    monkeypatch.delenv("FLOWSTORE_PATH")
    monkeypatch.setenv("FLOW_CACHE_DIR", str(tmp_path))
    original = tmp_path / "store.db"
    original.touch()
    hint = "flowstore: the original's store is here, and no flowstore yet: bring it over"
    path = f"{tmp_path}/flowstore.db"
    assert said("path") == (
        0,
        f"{path}\n",
        f"{hint} with `flowstore import '{original}'`\n",
    )
    assert said("path", "--store", path) == (0, f"{path}\n", "")
    flowstore.SQLiteDataStore()
    assert said("path") == (0, f"{path}\n", "")


def test_backup_copies_to_a_new_file(said, filled_path, tmp_path):
    target = str(tmp_path / "copy.db")
    assert said("backup", target, "--json") == DONE
    assert flowstore.SQLiteDataStore(target).get_cache_entry("key") == b"\xff"
    taken = f"{target}: something is there already: name a new file"
    assert complaint(said("backup", target)) == taken


def test_migrate_moves_legacy_tables(said, store):
    by_hand(
        store.path,
        "CREATE TABLE old AS SELECT 'K' AS key, 'V' AS value",
        "CREATE TABLE older (key, value)",
    )
    assert said("migrate") == (0, "old\nolder\n", "")
    assert said("migrate", "--json") == (0, "[]\n", "")
    assert store.get_all_process_vars("old") == {"K": "V"}


def test_import_brings_over_a_flowstore_file(said, filled_path, target):
    words = "--store", target.path, "import", filled_path.path
    counts = (
        '{"cache": 1, "history": 3, "background": 1, "process_vars": 2, '
        '"process_buckets": 0, "recovered_runs": 0, "legacy_scopes": 0, "problems": []}\n'
    )
    assert said(*words, "--json") == (0, counts, "")
    counts = (
        "cache\t0\nhistory\t0\nbackground\t0\nprocess_vars\t0\n"
        "process_buckets\t0\nrecovered_runs\t0\nlegacy_scopes\t0\n"
    )
    assert said(*words) == (0, counts, "")
    assert target.list_execution_refs() == ["build", "test"]


def test_import_lists_what_it_could_not_bring_over(said, store, target):
    target.set_cache_entry("good", b"")
    by_hand(target.path, "INSERT INTO cache VALUES ('bad' || char(0), x'00')")
    status, out, err = said("import", target.path, "--json")
    reason = "key must not have a NUL character"
    problem = rf'{{"bucket": "cache", "key": "bad\u0000", "reason": "{reason}"}}'
    assert out.startswith('{"cache": 1, ') and f'"problems": [{problem}]' in out
    message = rf"flowstore: not brought over: cache bad\x00 {reason}"
    assert (status, err) == (1, f"{message}\n")


def test_import_brings_over_a_file_of_the_original(said, store, tmp_path):
    source = bolt_source(tmp_path, make_bolt({b"cache": {b"k": b"v", b"\xff": b""}}))
    status, out, err = said("import", source)
    assert status == 1 and out.startswith("cache\t1\nhistory\t0\n")
    assert err.startswith("flowstore: not brought over: cache \\xff ")
    assert store.get_cache_entry("k") == b"v"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "there is no such file"),
        ("text", "file of the original"),
        ("another", "another program's"),
    ],
)
def test_import_names_what_it_can_not_read(said, tmp_path, name, words):
    (tmp_path / "text").write_text("no database, but a long text" * 1000)
    by_hand(tmp_path / "another", "CREATE TABLE of_somebody_else (key, value)")
    message = complaint(said("import", tmp_path / name))
    assert message.startswith(f"{tmp_path / name}: ") and words in message


def test_a_store_is_not_imported_into_itself(said, store):
    message = f"flowstore: {store.path}: a store can't be copied into itself\n"
    assert said("import", store.path) == (2, "", message)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ("backup x", "use pg_dump, or `flowstore --store FILE import URL`"),
        ("migrate", "migrate a file, and `flowstore import` it here"),
    ],
)
def test_what_a_server_has_no_use_for_says_what_to_do(said, arguments, advice):
    pytest.importorskip("psycopg", reason=NO_DRIVER)
    url = "postgresql://me:hidden@127.0.0.1:1/db"
    shown = "postgresql://me@127.0.0.1:1/db"
    assert complaint(said("--store", url, *arguments.split())) == f"{shown}: {advice}"
    assert said("--store", url, "path") == (0, f"{shown}\n", "")


@pytest.mark.parametrize("typed", ["\n", "n\n", "\x04", "y\n"])
def test_destroy_asks_on_a_terminal(store, typed):
    status, shown = terminal(store.path, "$fs destroy", typed=typed)
    assert f"Remove {store.path} with all that is in it? [y/N] " in shown
    kept = typed != "y\n"
    assert (status, os.path.exists(store.path)) == (int(kept), kept)
    assert ("nothing was removed" in shown) == kept


def test_destroy_asks_nobody_where_it_is_told_so(said, store):
    assert said("destroy", "--yes") == said("destroy", "--yes") == DONE
    assert not os.path.exists(store.path)


@pytest.mark.parametrize("arguments", ["history", "set K V", "check", "destroy --yes"])
def test_a_damaged_store_is_one_line(said, path, arguments):
    Path(path).write_text("no database" * 1000)
    message = complaint(said(*arguments.split()))
    assert message.startswith(f"{path}: it is no SQLite file")


# ---- the command line: on a terminal ----


SCREEN = """\
   STARTED              REF         TOOK     EXIT  ID        NOTE
✗  2024-05-06 07:11:09  🚀 e\u0301e\u0301 ship  0.000    1     xxxxxxxx  漢字かな交じり文漢…
✗  2024-05-06 07:10:09  build       1.000    3     b2        boom
✓  2024-05-06 07:09:09  test        0:01:10  0               make test
✓  2024-05-06 07:08:09  build       1.500    0     b1        first

build  █▆
"""


@pytest.fixture
def wide(filled_path):
    """The path of a store whose newest run has wide characters, a long label and id."""
    filled_path.record_execution(
        record(
            "🚀 e\u0301e\u0301 ship",
            3,
            label="漢字かな交じり文" * 20,
            id="x" * 36,
            exit_code=1,
        )
    )
    return filled_path.path


def test_history_on_a_terminal_is_for_people(wide):
    assert terminal(wide, "$fs history", NO_COLOR="1") == (0, SCREEN)


@pytest.mark.parametrize("columns", [200, 80, 40, 20])
def test_a_table_fits_its_terminal(wide, columns):
    _, shown = terminal(wide, "$fs history", columns=columns, NO_COLOR="1")
    header, newest, *others, _, picture = shown.splitlines()
    assert (len(others), picture) == (3, "build  █▆")
    assert columns_of(newest) in (columns, columns - 1)  # half a character
    assert max(map(columns_of, (header, *others))) <= columns


PLAIN_MARKS = ["●", "✗", "✓", "✓"]
COLOURED_MARKS = [
    "\033[33m●\033[0m",
    "\033[31m✗\033[0m",
    "\033[32m✓\033[0m",
    "\033[32m✓\033[0m",
]


@pytest.mark.parametrize(
    ("variables", "marks"),
    [
        ({}, COLOURED_MARKS),
        ({"NO_COLOR": ""}, COLOURED_MARKS),
        ({"NO_COLOR": "1"}, PLAIN_MARKS),
        ({"TERM": "dumb"}, PLAIN_MARKS),
    ],
)
def test_colour_is_for_a_terminal_that_wants_it(filled_path, variables, marks):
    running = record("serve", 3, status="running", pid=os.getpid())
    filled_path.record_execution(running)
    _, shown = terminal(filled_path.path, "$fs history", **variables)
    rows = shown.splitlines()[1:5]
    assert [row.partition("  2024")[0] for row in rows] == marks


def test_other_tables_on_a_terminal(filled_path):
    path = filled_path.path
    shown = f"KEY  VALUE\nA    {ESCAPED}\nB    Ünï 漢字\n"
    assert terminal(path, "$fs list") == (0, shown)
    shown = "history     1\nbackground  0\n"
    assert terminal(path, "$fs prune --keep 1") == (0, shown)
    filled_path.set_process_var("root", "A", "漢" * 100_000)
    shown = f"KEY  VALUE\nA    {'漢' * 37}…\nB    Ünï 漢字\n"
    assert terminal(path, "$fs list") == (0, shown)
    assert terminal(path, "$fs history", columns=8)[0] == 0


def test_set_says_that_it_reads_from_the_terminal(store):
    status, shown = terminal(store.path, "$fs set K", typed="value\n\x04")
    assert (status, store.get_process_var("root", "K")) == (0, "value")
    advice = "type the value, and end it with Ctrl-D on a line of its own"
    assert f"flowstore: {advice}" in shown


def test_progress_is_shown_on_a_terminal_alone(store, target, tmp_path):
    with store.transaction() as writer:
        for number in range(2500):
            writer.set_cache_entry(f"key {number}", b"x" * 4000)
    copy = tmp_path / "copied"
    _, shown = terminal(store.path, f"$fs backup {copy} >/dev/null")
    assert re.search(r"\r\d\d %  .*\r", shown) and shown.endswith(f"\r{' ' * 30}\r")
    _, shown = terminal(target.path, f"$fs import {copy} >/dev/null")
    assert "\r1,000 entries" in shown
    copy.unlink()
    assert cli("backup", copy, store=store.path) == DONE
    status, _, err = cli("import", copy, store=target.path)
    assert (status, err) == (0, "")


# ---- the command line: views, ends and forms of use ----


def test_views_first_mark_what_is_gone(said, store, ended_pid, monkeypatch):
    def fail(self):
        raise StoreError("it can't be written")

    store.record_execution(record("r", status="running", pid=ended_pid))
    with monkeypatch.context() as patch:
        patch.setattr(flowstore.SQLiteDataStore, "reconcile", fail)
        status, out, err = said("history")
        assert (status, err) == (0, "") and out.startswith("running\t")
    _, out, _ = said("history")
    assert out.startswith("failed\t") and out.endswith(f"\t{GONE}\n")


def test_an_id_is_found_by_its_beginning_where_one_run_has_it(said, store):
    for id in "abc", "abd", "xyz":
        store.record_execution(record(id=id))
    store.save_background_run(background("abcd"))
    for word, found in ("x", "xyz"), ("abc", "abc"):
        assert json.loads(said("show", word, "--json")[1])["id"] == found
    message = "flowstore: 3 runs begin with 'ab': give more of it\n"
    assert said("show", "ab") == said("stop", "ab") == (2, "", message)
    assert complaint(said("show", "y")).endswith("there is no run 'y'")


def list_into(stream, store):
    """List the variables into a stream: the exit status, and what is said."""
    done = subprocess.run(
        [sys.executable, "-m", "flowstore", "list"],
        stdout=stream,
        stderr=subprocess.PIPE,
        env=environment(FLOWSTORE_PATH=store.path),
    )
    return done.returncode, done.stderr.decode()


def test_a_closed_pipe_is_quiet(filled_path):
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "wb") as stream:
        assert list_into(stream, filled_path) == (1, "")


def test_an_interrupt_is_quiet(said, monkeypatch):
    typed = SimpleNamespace(read=lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=typed))
    assert said("set", "K") == (130, "", "")


def test_a_full_disk_is_one_line(filled_path):
    reason = "standard output: No space left on device"
    with open("/dev/full", "wb") as full:
        assert list_into(full, filled_path) == (1, f"flowstore: {reason}\n")


@pytest.mark.parametrize(
    "form", ["flowstore.py", "-m flowstore", "-m myapp.vendor.flowstore", "flowstore.pyz"]
)
def test_each_form_of_use_is_the_same_program(store, tmp_path, form):
    vendor = tmp_path / "myapp" / "vendor"
    vendor.mkdir(parents=True)
    for folder in tmp_path, vendor:
        shutil.copy(MODULE, folder)
    zipapp.create_archive(vendor, tmp_path / "flowstore.pyz", main="flowstore:main")
    done = subprocess.run(
        [sys.executable, *f"{form} run r -- false".split()],
        cwd=tmp_path,
        capture_output=True,
        env={**environment(FLOWSTORE_PATH=store.path), "PYTHONPATH": ""},
    )
    assert (done.returncode, done.stderr) == (1, b"")
    assert only_record(store).exit_code == 1


# ---- runs: execution() ----


class Speechless(Exception):
    def __str__(self):
        raise ValueError("no words")


CALLED = subprocess.CalledProcessError(7, "make")
KILLED = subprocess.CalledProcessError(-9, "make")
ODD_CODE = subprocess.CalledProcessError("1", "make")
HUGE = subprocess.CalledProcessError(2**70, "make")
OUTCOMES = [
    # what the body sets and raises, the exit code and the error that are recorded
    ({}, None, 0, ""),
    ({"exit_code": 3}, None, 3, ""),
    ({"error": "no luck"}, None, 0, "no luck"),
    ({"exit_code": -15}, None, 143, "killed by SIGTERM"),
    ({"exit_code": -2, "error": "Ctrl-C"}, None, 130, "Ctrl-C"),
    ({"exit_code": -200}, None, 328, "killed by signal 200"),
    ({}, SystemExit(), 0, ""),
    ({}, SystemExit(3), 3, ""),
    ({}, SystemExit(256), 0, ""),
    ({}, SystemExit(-1), 255, ""),
    ({}, SystemExit(2**70), 255, ""),
    ({}, SystemExit("no disk"), 1, "no disk"),
    ({"exit_code": 5}, SystemExit(0), 0, ""),
    ({"exit_code": 5}, ValueError("late"), 5, "ValueError: late"),
    ({}, KeyboardInterrupt(), 130, "KeyboardInterrupt"),
    ({}, CALLED, 7, f"CalledProcessError: {CALLED}"),
    ({}, KILLED, 137, f"CalledProcessError: {KILLED}"),
    ({}, ValueError("wrong \udcff"), 1, "ValueError: wrong \\xff"),
    ({}, Speechless(), 1, "Speechless: <Speechless>"),
    ({}, ODD_CODE, 1, "CalledProcessError: <CalledProcessError>"),
    ({}, HUGE, 1, f"CalledProcessError: {HUGE}"),
]


def only_record(store):
    [found] = store.get_recent_executions(0)
    return found


def end_of(store, id):
    """A background run, once it has ended."""
    wait_until(lambda: store.get_background_run(id).status != "running")
    return store.get_background_run(id)


@pytest.mark.parametrize(("fields", "raised", "exit_code", "error"), OUTCOMES)
def test_end_of_a_run_is_recorded_and_the_bodys_own_exception_goes_on(
    store, fields, raised, exit_code, error
):
    caught = None
    try:
        with store.execution("build") as run:
            store.set_process_var(run.bucket, "key", "value")
            for name, value in fields.items():
                setattr(run, name, value)
            if raised:
                raise raised
    except BaseException as failure:
        caught = failure
    assert caught is raised
    ended = only_record(store)
    assert (ended.exit_code, ended.error) == (exit_code, error)
    assert ended.status == ("failed" if exit_code or error else "completed")
    assert ended.completed_at >= ended.started_at and ended.duration >= timedelta(0)
    assert store.list_process_buckets() == []


def test_run_is_recorded_as_running_in_a_scope_that_a_child_finds(
    store, path, monkeypatch
):
    for name, value in {"SOURCE": "mcp", "CLIENT": "${WHO}", "SESSION": ""}.items():
        monkeypatch.setenv(f"FLOW_RUN_{name}", value)
    monkeypatch.setenv("WHO", "editor")
    given = {"label": "nightly", "command": "make", "spec": "s", "log_archive_id": "l"}
    with store.execution("build", **given) as run:
        assert (run.ref, run.bucket, run.exit_code, run.error) == ("build", run.id, 0, "")
        places = {"FLOW_PROCESS_BUCKET": run.id, "FLOWSTORE_PATH": path}
        assert run.env == {**os.environ, **places}
        started = only_record(store)
        assert started == ExecutionRecord(
            "build",
            started.started_at,
            id=run.id,
            status="running",
            pid=os.getpid(),
            source="mcp",
            client_name="editor",
            working_dir=os.getcwd(),
            **given,
        )
        assert store.list_process_buckets() == [run.id]
        run.log_archive_id = "log7"
    assert only_record(store).log_archive_id == "log7"


def test_what_is_given_for_a_run_wins_over_the_environment(store, monkeypatch):
    monkeypatch.setenv("FLOW_RUN_SOURCE", "mcp")
    given = {"source": "", "client_name": "c", "session_id": "s", "working_dir": "w"}
    with store.execution("build", id="i1", **given):
        found = only_record(store)._asdict()
    assert ({"id": "i1"} | given).items() <= found.items()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("exit_code", "1", TypeError),
        ("exit_code", True, TypeError),
        ("exit_code", 2**63, ValueError),
        ("error", None, TypeError),
        ("error", "\0", ValueError),
        ("log_archive_id", b"log", TypeError),
        ("status", "completed", AttributeError),
        ("id", "other", AttributeError),
        ("bucket", "other", AttributeError),
        ("env", {}, AttributeError),
    ],
)
def test_wrong_value_is_refused_at_its_line(store, name, value, error):
    with store.execution("build") as run, pytest.raises(error):
        setattr(run, name, value)
    assert only_record(store).status == "completed"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        *[({"id": name}, ValueError) for name in ("a:b", "a/b", "a b", "", "root")],
        *[({"bucket": name}, ValueError) for name in ("a:b", "a/b", "a b", "")],
        ({"ref": ""}, ValueError),
        ({"ref": 1}, TypeError),
        ({"label": b"x"}, TypeError),
        ({"source": "\0"}, ValueError),
    ],
)
def test_wrong_argument_of_a_run_leaves_no_trace(store, arguments, error):
    with pytest.raises(error), store.execution(**{"ref": "build", **arguments}):
        raise AssertionError("the body must not run")
    assert store.list_execution_refs() == store.list_process_buckets() == []


def test_given_bucket_stays_and_is_shared(store):
    store.create_process_bucket("release")
    for number in "12":
        with store.execution(f"step {number}", bucket="release") as run:
            assert run.bucket == run.env["FLOW_PROCESS_BUCKET"] == "release"
            store.set_process_var(run.bucket, number, "done")
    assert store.get_process_var_keys("release") == ["1", "2"]


def test_end_in_a_forked_child_does_nothing(path):
    output_of(
        """
store = flowstore.SQLiteDataStore(sys.argv[1])
def states():
    return [(each.status, each.exit_code) for each in store.get_recent_executions()]
with store.execution("build") as run:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        assert states() == [("running", 0)] and store.list_process_buckets() == [run.id]
    else:
        run.exit_code = 9
if not child:
    os._exit(0)
assert states() == [("completed", 0)]
""",
        path,
    )


def test_end_waits_longer_for_the_lock_than_the_timeout(path):
    store = flowstore.SQLiteDataStore(path, timeout=0.01)
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    with store.execution("build") as run:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusyError):
            store.set_process_var(run.bucket, "key", "value")
        threading.Timer(0.3, holder.close).start()
    assert only_record(store).status == "completed"


def test_an_interrupt_of_the_end_that_waits_is_the_end(store, path):
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    with pytest.raises(KeyboardInterrupt), store.execution("build"):
        holder.execute("BEGIN IMMEDIATE")
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        threading.Timer(0.3, holder.close).start()
    assert only_record(store)[3:5] == (130, "KeyboardInterrupt")
    assert store.list_process_buckets() == []


def test_256_runs_at_once_are_all_recorded(store, path):

    run = "with flowstore.SQLiteDataStore(*arguments, timeout=60).execution('r'): pass"
    crowd(256, run, path)
    ends = [each.status for each in store.get_recent_executions(0)]
    assert ends == ["completed"] * 256 and store.list_process_buckets() == []


def test_start_that_cannot_be_recorded_is_a_store_error_and_an_end_hides_nothing(
    store, path
):
    with pytest.raises(KeyError) as caught, store.execution("build"):
        os.remove(path)
        os.mkdir(path)
        raise KeyError("mine")
    assert path in caught.value.__notes__[0]
    with pytest.raises(StoreError), store.execution("build"):
        raise AssertionError("the body must not run")


def test_end_in_an_open_transaction_of_its_thread_hides_nothing(store):
    outer = contextlib.ExitStack()
    with outer, pytest.raises(KeyError) as caught, store.execution("build"):
        outer.enter_context(store.transaction())
        raise KeyError("mine")
    assert "would wait for itself" in caught.value.__notes__[0]


def test_end_records_the_whole_run_in_a_store_that_was_emptied(store, path):
    with store.execution("build", label="kept"):
        flowstore.destroy_store(path)
    assert only_record(store).label == "kept"


# ---- runs: whose process, reconcile() ----

GONE = "process exited unexpectedly"


@pytest.fixture
def ended_pid():
    """The number of a process that has ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


@pytest.fixture
def living():
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


JUDGED = [
    # an owner's note, whether the run is gone while its process lives, and afterwards
    ("{machine} {boot} {namespace} {start}", False, True),
    ("another {boot} {namespace} {start}", False, False),
    ("{machine} another {namespace} {start}", True, True),
    ("{machine} {boot} another {start}", False, False),
    ("{machine} {boot} {namespace} another", True, True),  # which has its number by now
    ("{machine} - {namespace} {start}", False, True),  # what isn't told decides nothing
    ("{machine} {boot} {namespace} -", False, True),
    ("", False, True),
]


def change_note(path, table, form):
    """Give the owner's note of a running record this form."""
    [(note,)] = by_hand(path, f"SELECT owner FROM {table}")
    parts = dict(zip(("machine", "boot", "namespace", "start"), note.split(" ")))
    by_hand(path, f"UPDATE {table} SET owner = '{form.format(**parts)}'")


def save_running(store, table, pid):
    fields = {"id": "i1", "status": "running", "pid": pid}
    if table == "history":
        store.record_execution(record(**fields))
    else:
        store.save_background_run(background(**fields))


@linux_only
@pytest.mark.parametrize("table", ["history", "background"])
@pytest.mark.parametrize(("form", "gone_alive", "gone_dead"), JUDGED)
def test_note_tells_whether_a_process_is_still_the_runs(
    store, path, living, table, form, gone_alive, gone_dead
):
    save_running(store, table, living.pid)
    change_note(path, table, form)
    assert store.reconcile() == gone_alive
    by_hand(path, f"UPDATE {table} SET status = 'running'")
    living.kill()
    living.wait()
    assert store.reconcile() == gone_dead
    [(status,)] = by_hand(path, f"SELECT status FROM {table}")
    assert status == ("failed" if gone_dead else "running")


@pytest.mark.parametrize("table", ["history", "background"])
def test_run_without_a_process_is_left_alone_and_one_beyond_all_is_gone(store, table):
    for pid, gone in (0, 0), (-1, 0), (os.getpid(), 0), (2**40, 1):
        save_running(store, table, pid)
        assert (pid, store.reconcile()) == (pid, gone)


def test_reconcile_fails_what_is_gone_keeps_errors_and_takes_own_scopes_only(
    store, ended_pid
):
    child = process(
        """
store = flowstore.SQLiteDataStore(sys.argv[1])
with store.execution("killed", id="own"), store.execution("killed", bucket="given"):
    store.set_process_var("own", "key", "value")
    store.set_process_var("given", "key", "value")
    print("ready", flush=True)
    sys.stdin.read()
""",
        store.path,
    )
    assert child.stdout.readline() == "ready\n"
    assert store.reconcile() == 0
    child.kill()
    child.communicate()
    store.create_process_bucket("i2")
    gone = {"status": "running", "pid": ended_pid, "error": "kept"}
    store.record_execution(record("other", id="i2", exit_code=4, **gone))
    store.save_background_run(background("own", **gone))
    store.record_execution(record("ended", pid=ended_pid, status="completed"))
    before = datetime.now(timezone.utc)
    assert (store.reconcile(), store.reconcile()) == (4, 0)
    found = {each.ref: each for each in store.get_recent_executions()}
    assert found["killed"][3:5] == (1, GONE) and found["killed"].completed_at >= before
    assert found["other"][3:5] == (4, "kept")
    assert found["ended"].status == "completed"
    run = store.get_background_run("own")
    assert (run.status, run.error) == ("failed", "kept") and run.completed_at >= before
    assert store.list_process_buckets() == ["given", "i2"]


def test_zombie_is_gone(store, living):
    save_running(store, "history", living.pid)
    living.kill()
    assert wait_until(store.reconcile) == 1


# ---- run: as unnoticeable as env ----

FRONT = f"{FLOWSTORE} run r --"
BLOCKED = """
import os, signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL), signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGINT, signal.SIGRTMIN})
os.execvp(sys.argv[1], sys.argv[1:])
"""
# Scripts of the shell, with `$run` in front of a command or nothing there.
TRANSPARENT = {
    "status": "$run sh -c 'exit 3'",
    "success": "exec $run true",
    "dies of SIGINT": "exec $run sh -c 'kill -INT $$'",
    "streams": "echo in | $run sh -c 'cat; echo err >&2'",
    "words": r"""$run printf '%s|' 'a b' '' '*' -- --json "$(printf '\377')" é""",
    "environment": "$run env | grep -v '^FLOW\\|^run=\\|^PWD=' | sort",
    "coerced locale": "env -u LC_ALL -u LC_CTYPE LANG=C $run env | grep ^LC_",
    "a nameless variable": "env =a=b $run echo ran",
    "given locale": "env -u LC_ALL LC_CTYPE=C $run env | grep ^LC_",
    "descriptors": "exec 7>kept 9</dev/null; $run sh -c 'echo x >&7; ls /proc/self/fd'; cat kept",
    "no standard input": "$run ls /proc/self/fd <&-",
    "no standard streams": "$run sh -c 'ls /proc/self/fd >streams' <&- >&- 2>&-; cat streams",
    "folder, mask, limits": "cd /; umask 027; ulimit -n 100; $run sh -c 'pwd; umask; ulimit -n'",
    "default signals": "$run grep ^Sig[BIC] /proc/self/status",
    "ignored signals": "trap '' INT QUIT HUP CHLD TERM; $run grep ^Sig[BIC] /proc/self/status",
    "blocked signals": f"""{sys.executable} -c "$blocked" $run grep ^Sig[BIC] /proc/self/status""",
    "ignored children": "trap '' CHLD; exec $run sh -c 'exit 5'",
    "a later one in PATH": "$two; touch p/x; chmod -x p/x; PATH=p:q:$PATH; $run x 2",
    "without #!": "$two; $run ./p/x 1 '2 3'",
    "without #! in PATH": "$two; PATH=p:q:$PATH; $run x 1",
    "PATH of here": "$two; cd p; PATH=:/usr/bin:/bin; $run x 1",
}
TWO = """mkdir p q; echo 'echo p $0 "$@"' >p/x; echo 'echo q $0 "$@"' >q/x; chmod +x p/x q/x"""


@linux_only
@pytest.mark.parametrize("script", TRANSPARENT.values(), ids=TRANSPARENT)
def test_run_in_front_of_a_command_changes_nothing(tmp_path, script):
    def what_happens(name, run):
        folder = tmp_path / name
        folder.mkdir()
        store = str(tmp_path / "flowstore.db")
        done = subprocess.run(
            ["sh", "-c", script.replace("$two", TWO)],
            cwd=folder,
            env=environment(FLOWSTORE_PATH=store, run=run, blocked=BLOCKED),
            capture_output=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    assert what_happens("with", FRONT) == what_happens("without", "")


# ---- run: what is recorded, and where that fails ----


@pytest.fixture
def ran(path):
    """Run the command line in a process of its own, on the store at `path`: as cli()."""
    return functools.partial(cli, store=path)


def test_record_of_a_command_tells_the_whole_run(ran, store):
    command = ["sh", "-c", "exit 3", "two words", "\udcff"]
    assert ran("run", "--label=--fast", "build app", "--", *command)[0] == 3
    found = only_record(store)
    assert found[3:5] == (3, "")
    assert (found.ref, found.label, found.status) == ("build app", "--fast", "failed")
    assert found.command == "sh -c 'exit 3' 'two words' '\\xff'"
    assert found.source == "cli"
    assert store.list_process_buckets() == []
    ran("run", "r", "--", "true", FLOW_RUN_SOURCE="mcp")
    assert store.get_recent_executions(1)[0].source == "mcp"


@pytest.mark.parametrize(
    ("word", "status", "reason"),
    [
        ("nowhere-to-be-found", 127, "No such file or directory"),
        ("", 127, "No such file or directory"),
        ("/", 126, "Permission denied"),
        ("plain", 126, "Permission denied"),
        ("./plain", 126, "Permission denied"),
        ("./lost", 127, "No such file or directory"),
    ],
)
def test_reason_of_a_command_that_fails_to_start(
    ran, store, tmp_path, monkeypatch, word, status, reason
):
    monkeypatch.chdir(tmp_path)
    Path("plain").write_text("true")
    Path("lost").write_text("#!/nowhere/at/all\n")
    os.chmod("lost", 0o755)
    where = f"{tmp_path}:{os.environ['PATH']}"
    message = f"flowstore: {word}: {reason}\n"
    assert ran("run", "r", "--", word, PATH=where) == (status, "", message)
    assert only_record(store)[3:5] == (status, f"{word}: {reason}")


@pytest.mark.parametrize("name", ["KILL", "USR1"])
def test_command_that_is_killed(ran, store, name):
    status = 128 + signal.Signals[f"SIG{name}"]
    assert ran("run", "r", "--", "sh", "-c", f"kill -{name} $$") == (status, "", "")
    assert only_record(store)[3:5] == (status, f"killed by SIG{name}")


def test_scope_of_a_run_is_its_own_unless_it_joins(ran, store):
    store.set_process_var("root", "base", "rooted")
    script = """
fs set key outer; fs run in -- sh -c 'fs get base; fs get key || echo $?'
fs run --join in -- sh -c 'fs get key; fs set key inner'; fs get key"""
    script = script.replace("fs ", f"{FLOWSTORE} ")
    status, out, _ = ran("run", "out", "--", "sh", "-c", script)
    assert (status, out) == (0, "rooted\n1\nouter\ninner\n")
    ran("run", "--join", "r", "--", *FLOWSTORE.split(), "set", "key", "rooted")
    assert ran("run", "--join", "r", "--", "true", FLOW_PROCESS_BUCKET="\udcff")[0] == 0
    assert store.list_process_buckets() == ["root"]
    assert store.get_process_var("root", "key") == "rooted"


@pytest.mark.parametrize("place", ["a folder", "garbage", "garbage/below", "a server"])
def test_command_runs_and_keeps_its_status_where_there_is_no_store(tmp_path, place):
    (tmp_path / "a folder").mkdir()
    (tmp_path / "garbage").write_text("no store" * 1000)
    store = tmp_path / place
    if place == "a server":
        store = "postgresql://127.0.0.1:1/none?connect_timeout=1"
    command = ["sh", "-c", "cat; echo out; exit 5"]
    status, out, err = cli("run", "r", "--", *command, store=store, input=b"in\n")
    assert (status, out, err.count("\n")) == (5, "in\nout\n", 1)
    assert "the command runs" in err


@linux_only
def test_full_disk_does_not_keep_a_command_from_running(path):
    script = f"ulimit -f 0; {FRONT} sh -c 'echo out; exit 5'"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, env=environment(FLOWSTORE_PATH=path)
    )
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (5, b"out\n", 1)


def running(path, *words, before=""):
    """A process of `flowstore run`, in a session of its own, after some code."""
    code = f"{before}\nflowstore.main()"
    return process(code, "--store", path, "run", *words, start_new_session=True)


IMPATIENT = """
make = flowstore.SQLiteDataStore.__init__
def make_impatient(store, path, timeout):
    make(store, path, timeout=0.2)
flowstore.SQLiteDataStore.__init__ = make_impatient
"""


def test_locked_store_delays_the_start_and_the_end_but_loses_neither(path, store):
    with lock_of_another_process(path):
        words = "--label", "kept", "r", "--", "sh", "-c", "echo out; exit 4"
        runner = running(path, *words, before=IMPATIENT)
        wait_until(lambda: blocks_signals(runner.pid))
        runner.send_signal(signal.SIGWINCH)  # which ends no wait
        assert runner.stdout.readline() == "out\n"
        assert "the command runs" in runner.stderr.readline()
        assert store.get_recent_executions() == []
    assert (runner.communicate()[1], runner.returncode) == ("", 4)
    found = only_record(store)
    assert (found.exit_code, found.label, found.status) == (4, "kept", "failed")
    assert store.list_process_buckets() == []


def test_main_in_a_program_leaves_its_signals_as_they_were(path):
    output_of(
        """
import signal, threading
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
def state():
    handlers = {each: signal.getsignal(each) for each in signal.valid_signals()}
    return handlers, signal.pthread_sigmask(signal.SIG_BLOCK, ()), os.listdir("/dev/fd")
before = state()
for command in ["sh", "-c", "exit 7"], ["nowhere-to-be-found"]:
    try:
        flowstore.main(["--store", sys.argv[1], "run", "r", "--", *command])
    except SystemExit as done:
        print(done.code)
    assert state() == before
""",
        path,
    )


# ---- run: signals ----

SENT = ["WINCH", "USR1", "USR2", "ALRM", "ABRT", "QUIT", "HUP", "INT", "TERM"]
# Says which signals it gets, each as a line; SIGTERM ends it with 7.
LISTENER = (
    "".join(f"trap 'echo {name}' {name};" for name in SENT[:-1])
    + "trap 'echo TERM; exit 7' TERM; echo ready; while :; do sleep 0.01; done"
)


def blocks_signals(pid):
    """Whether a process has begun to hold signals back."""
    return re.search(r"SigBlk:\s*0*[1-9a-f]", Path(f"/proc/{pid}/status").read_text())


def children_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in children.split()]


def test_signal_that_is_sent_to_run_alone_is_passed_on(path, store):
    runner = running(path, "r", "--", "sh", "-c", LISTENER)
    assert runner.stdout.readline() == "ready\n"
    for name in SENT:
        runner.send_signal(signal.Signals[f"SIG{name}"])
        assert runner.stdout.readline() == f"{name}\n"
    assert (*runner.communicate(timeout=30), runner.returncode) == ("", "", 7)
    assert only_record(store)[3:5] == (7, "")


@linux_only
@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_signal_from_before_the_command_reaches_it(path, store, name):
    number = signal.Signals[f"SIG{name}"]
    with lock_of_another_process(path):
        runner = running(path, "r", "--", "sleep", "60")
        wait_until(lambda: blocks_signals(runner.pid))
        runner.send_signal(number)
    runner.communicate(timeout=30)
    assert runner.returncode == (-2 if name == "INT" else 128 + number)
    assert only_record(store)[3:5] == (128 + number, f"killed by SIG{name}")


@linux_only
def test_signal_after_the_command_neither_ends_run_nor_changes_its_status(path, store):
    runner = running(path, "r", "--", "sh", "-c", "echo ready; read x")
    assert runner.stdout.readline() == "ready\n"
    with lock_of_another_process(path):
        runner.stdin.close()
        wait_until(lambda: not children_of(runner.pid))
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
            runner.send_signal(number)
    assert runner.wait(30) == 1
    assert only_record(store)[3:5] == (1, "")


# Ends at SIGUSR1, with the number of SIGINTs and SIGQUITs that it has got.
COUNTER = """
import os, signal, sys, time
hits = []
def hit(*_):
    hits.append(1)
    os.write(1, b"hit\\n")
signal.signal(signal.SIGINT, hit), signal.signal(signal.SIGQUIT, hit)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(len(hits)))
if sys.argv[1] == "apart":
    os.setpgid(0, 0)
os.write(1, b"ready\\n")
while True:
    time.sleep(0.01)  # a pause() misses what comes just before it
"""


@pytest.mark.parametrize("group", ["shared", "apart"])
@pytest.mark.parametrize("key", ["\x03", "\x1c"])
def test_key_of_a_terminal_reaches_the_command_exactly_once(path, store, group, key):
    words = [*FRONT.split(), sys.executable, "-c", COUNTER, group]
    with in_terminal(path, *words) as session:
        session.until(rb"ready\r\n")
        os.kill(session.pid, signal.SIGSTOP)  # else a second one melts into the first
        session.type(key)
        session.until(rb"\^[C\\]")
        if group == "shared":
            session.until(rb"hit\r\n")
        os.kill(session.pid, signal.SIGCONT)
        if group == "apart":
            session.until(rb"hit\r\n")
        os.kill(session.pid, signal.SIGUSR1)  # is passed on after these, by its number
        wait_until(lambda: only_record(store).status != "running")
    assert only_record(store).exit_code == 1


SHELL = ["sh", "-c", "stty -echo; echo go; exec sh -i"]


@pytest.fixture
def shell(path):
    with in_terminal(path, *SHELL) as session:
        session.until(rb"go\r\n")
        yield session


def test_ctrl_c_stops_a_loop_of_the_shell(shell, store):
    command = "$fs run r -- sh -c 'echo ready; exec sleep 60'"
    shell.type(f"while :; do {command}; done; echo [$?]\n")
    shell.until(rb"ready\r\n")
    shell.type("\x03")
    shell.type("echo over\n")
    shell.until(rb"over\r\n")
    assert only_record(store)[3:5] == (130, "killed by SIGINT")


def test_loop_goes_on_where_the_command_takes_the_ctrl_c(shell, store):
    command = "sh -c 'trap \"exit 0\" INT; echo ready; while :; do sleep 0.01; done'"
    shell.type(f"for i in 1 2; do $fs run r -- {command}; done; echo [$?]\n")
    for _ in range(2):
        shell.until(rb"ready\r\n")
        shell.type("\x03")
    shell.until(rb"\[0\]\r\n")
    assert [each.exit_code for each in store.get_recent_executions()] == [0, 0]


def test_ctrl_z_stops_run_and_command_and_fg_goes_on(shell, store):
    shell.type("$fs run r -- sh -c 'echo ready $$; read x; exit 4'\n")
    pid = int(shell.until(rb"ready (\d+)\r\n")[1])
    shell.type("\x1a")
    shell.until(rb"(?i)(stopped|suspended)[^\n]*\n")
    wait_until(lambda: state_of(pid) == "T")
    assert only_record(store).status == "running"
    shell.type("fg; echo [$?]\n")
    shell.until(rb"ready[^\n]*\n")
    shell.type("go\n")
    shell.until(rb"\[4\]\r\n")


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_closed_terminal_hangs_the_command_up(path, store):
    with in_terminal(path, *SHELL) as session:
        session.until(rb"go\r\n")
        loop = "echo ready; while :; do sleep 0.01; done"
        session.type(f"$fs run r -- sh -c 'trap \"exit 9\" HUP; {loop}'\n")
        session.until(rb"ready\r\n")
    wait_until(lambda: only_record(store).status != "running")
    assert only_record(store).exit_code == 9


# ---- runs in the background ----


def start_background(path, *arguments, ref="serve"):
    """Start a run in the background; its id."""
    status, out, err = cli("run", "--background", ref, *arguments, store=path)
    assert (status, err) == (0, "")
    return out.strip()


def is_alive(pid):
    try:
        return state_of(pid) != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def watched(path, store):
    """A run of `sleep 60` in the background: its record and the pid of its command."""
    run = store.get_background_run(start_background(path, "--", "sleep", "60"))
    [command] = wait_until(lambda: children_of(run.pid))
    wait_until(lambda: Path(f"/proc/{command}/comm").read_text() == "sleep\n")
    yield run, command
    with contextlib.suppress(ProcessLookupError):
        os.kill(command, signal.SIGKILL)
    wait_until(lambda: not is_alive(command) and not is_alive(run.pid))


@linux_only
def test_background_run_is_detached_and_recorded_twice(store, watched):
    run, command = watched
    execution = only_record(store)
    assert (execution.id, execution.pid, execution.status) == (run.id, run.pid, "running")
    assert (run.ref, run.status) == ("serve", "running")
    assert run.started_at == execution.started_at
    assert (os.getsid(run.pid), os.getsid(command)) == (run.pid, run.pid)
    assert (os.getpgid(run.pid), os.getpgid(command)) == (run.pid, command)
    for pid in run.pid, command:
        streams = {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)}
        assert streams == {os.devnull}
    os.kill(command, signal.SIGKILL)
    ended, execution = end_of(store, run.id), only_record(store)
    assert (ended.status, ended.error) == ("failed", "killed by SIGKILL")
    assert execution[3:5] == (137, "killed by SIGKILL")
    assert ended.completed_at == execution.completed_at
    assert store.list_process_buckets() == []


def test_background_run_has_no_input_and_appends_its_output(ran, store, tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    command = ["--log", log, "--", "sh", "-c", "cat; echo out; echo err >&2"]
    id = json.loads(ran("run", "--json", "--background", "r", *command)[1])["id"]
    assert end_of(store, id).status == "completed"
    assert log.read_text() == "before\nout\nerr\n"


def test_background_run_that_cannot_start_says_so_in_its_log(path, store, tmp_path):
    log = tmp_path / "log"
    id = start_background(path, "--log", log, "--", "nowhere-to-be-found")
    reason = "nowhere-to-be-found: No such file or directory"
    assert end_of(store, id)[4:7] == ("failed", "", reason)
    assert only_record(store).exit_code == 127
    assert log.read_text() == f"flowstore: {reason}\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


@pytest.mark.parametrize("place", ["store", "log"])
def test_background_run_that_cannot_be_recorded_or_logged_is_refused(tmp_path, place):
    (tmp_path / place).mkdir()
    command = ["r", "--log", tmp_path / "log", "--", "touch", tmp_path / "ran"]
    message = complaint(cli("run", "--background", *command, store=tmp_path / "store"))
    assert str(tmp_path / place) in message
    assert not (tmp_path / "ran").exists()


@linux_only
def test_background_run_survives_the_terminal_that_it_comes_from(path, store):
    with in_terminal(path, *SHELL) as session:
        session.until(rb"go\r\n")
        session.type("$fs run --background r -- sleep 60 7</dev/null\n")
        id = session.until(rb"([0-9a-f-]{36})\r\n")[1].decode()
        session.type("exit\n")
        assert os.waitid(os.P_PID, session.pid, os.WEXITED | os.WNOWAIT)
    run = store.get_background_run(id)
    assert (run.status, is_alive(run.pid)) == ("running", True)
    [command] = wait_until(lambda: children_of(run.pid))
    wait_until(lambda: sorted(os.listdir(f"/proc/{run.pid}/fd")) == ["0", "1", "2"])
    assert "7" in os.listdir(f"/proc/{command}/fd")
    assert cli("stop", id, store=path) == DONE


@linux_only
def test_stop_ends_all_of_the_command_even_where_it_is_paused(path, ran, store):
    script = "trap '' HUP; sleep 60 & sleep 60; true"  # its orphans would get a SIGHUP
    id = start_background(path, "--", "sh", "-c", script)
    watcher = store.get_background_run(id).pid
    [leader] = wait_until(lambda: children_of(watcher))
    wait_until(lambda: len(children_of(leader)) == 2)
    processes = watcher, leader, *children_of(leader)
    os.killpg(leader, signal.SIGSTOP)
    os.kill(watcher, signal.SIGSTOP)
    wait_until(lambda: {*map(state_of, processes)} == {"T"})
    assert ran("stop", id) == DONE
    wait_until(lambda: not any(map(is_alive, processes)))
    assert store.get_background_run(id).error == "killed by SIGTERM"
    assert only_record(store).exit_code == 143
    assert "its status is 'failed'" in complaint(ran("stop", id))
    assert "'unknown'" in complaint(ran("stop", "unknown"))


@linux_only
def test_stop_says_when_the_run_still_lives(path, ran, store):
    script = "trap '' TERM; echo ready; while :; do sleep 0.01; done"
    id = start_background(path, "--log", f"{path}.log", "--", "sh", "-c", script)
    [command] = wait_until(lambda: children_of(store.get_background_run(id).pid))
    wait_until(lambda: os.path.getsize(f"{path}.log"))
    assert "still lives" in complaint(ran("stop", "--timeout", "0.1", id))
    assert store.get_background_run(id).status == "running"
    os.kill(command, signal.SIGKILL)
    assert end_of(store, id).error == "killed by SIGKILL"


@linux_only
@pytest.mark.parametrize(
    "form",
    [
        "another {boot} {namespace} {start}",
        "{machine} {boot} another {start}",
        "{machine} {boot} {namespace} another",
        "",
    ],
)
def test_stop_signals_nothing_but_the_process_that_the_note_means(
    path, ran, watched, form
):
    run, command = watched
    change_note(path, "background", form)
    complaint(ran("stop", "--timeout", "1", run.id))
    assert is_alive(run.pid) and is_alive(command)


def test_stop_ends_a_run_that_another_program_has_saved(ran, store, living):
    store.save_background_run(background(status="running", pid=living.pid))
    assert ran("stop", "b1") == DONE
    assert store.get_background_run("b1").error == GONE
    assert living.wait(30) == -signal.SIGTERM


@linux_only
def test_killed_watcher_leaves_its_command_and_a_failed_run(ran, store, watched):
    run, command = watched
    os.kill(run.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(run.pid))
    [shown] = json.loads(ran("background", "--json")[1])
    assert (shown["status"], shown["error"]) == ("failed", GONE)
    assert is_alive(command)
    assert (only_record(store).status, store.list_process_buckets()) == ("failed", [])


def test_many_background_runs_that_begin_and_end_at_once_are_all_recorded(
    path, ran, store
):
    with ThreadPoolExecutor(6) as pool:
        commands = [("--", "sleep", "60")] * 6
        ids = list(pool.map(lambda command: start_background(path, *command), commands))
        runs = store.get_background_runs(ids).values()
        assert [run.status for run in runs] == ["running"] * 6
        assert {*pool.map(lambda id: ran("stop", id), ids)} == {DONE}
    for ended in store.list_background_runs(), store.get_recent_executions(0):
        assert [run.error for run in ended] == ["killed by SIGTERM"] * 6
    assert store.list_process_buckets() == []


def test_runs_are_the_same_on_a_server(fresh_url):
    script = f"{FLOWSTORE} set key value; {FLOWSTORE} get key"
    done = cli("run", "r", "--", "sh", "-c", script, store=fresh_url)
    assert done == (0, "value\n", "")
    store = flowstore.open_store(fresh_url)
    assert only_record(store).status == "completed"
    assert store.list_process_buckets() == []
    id = start_background(fresh_url, "--", "sleep", "60")
    assert store.get_background_run(id).status == "running"
    assert cli("stop", id, store=fresh_url) == DONE
    assert store.get_background_run(id).error == "killed by SIGTERM"
    assert store.get_recent_executions(1)[0][3:5] == (143, "killed by SIGTERM")


# ---- the README ----

README = Path(MODULE).with_name("README.md")


def blocks_of_readme():
    """Each fenced block: the line that it begins at, what its fence says, and its text."""
    text = README.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(.*)\n((?s:.*?))^```$", text, re.MULTILINE):
        yield text.count("\n", 0, found.start()) + 1, found[1], found[2]


@pytest.fixture
def reader(tmp_path):
    """Who follows the README in an empty folder: runs a block, and returns that folder."""
    folder, programs = tmp_path / "work", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    (folder / "flowstore.py").symlink_to(MODULE)
    (programs / "flowstore").write_text(f'#!/bin/sh\nexec {FLOWSTORE} "$@"\n')
    (programs / "flowstore").chmod(0o755)
    where = f"{programs}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    # the default store is nobody's to try things on
    variables = environment(HOME=os.devnull, PATH=where)
    del variables["PYTHONPATH"]

    def run(line, language, text):
        program = ["bash", "-euo", "pipefail"] if language == "sh" else [sys.executable]
        options = {"cwd": folder, "env": variables, "capture_output": True, "timeout": 60}
        done = subprocess.run([*program, "-c", text], **options)
        assert done.returncode == 0, f"line {line}: {done.stderr.decode()}"
        return folder

    return run


def test_readme_runs_in_order_from_an_empty_folder(reader):
    # text is for reading; no-run says what needs the network or a file of the original
    kinds = {kind for _, kind, _ in blocks_of_readme()}
    assert kinds == {"sh", "python", "text", "sh no-run", "sh server", "python server"}
    for line, kind, text in blocks_of_readme():
        if kind in ("sh", "python"):
            folder = reader(line, kind, text)
    ended = flowstore.SQLiteDataStore(folder / "demo.db").list_background_runs()
    assert {run.status for run in ended} == {"completed", "failed"}


def test_readme_shows_the_history_as_a_terminal_does(reader):
    blocks = list(blocks_of_readme())
    folder = reader(*blocks[0])
    _, seen = terminal(folder / "demo.db", "$fs history", columns=100, NO_COLOR="1")
    shown = next(text for _, kind, text in blocks if kind == "text")
    changing = r"\b[0-9a-f]{8}\b|\d"
    assert re.sub(changing, "0", seen) == re.sub(changing, "0", shown)


def test_readme_runs_on_a_server(reader, fresh_url):
    reader(0, "sh", "flowstore --store demo.db run build -- true")
    for line, kind, text in blocks_of_readme():
        if kind.endswith(" server"):
            text = text.replace("postgresql://build@db.example/builds", fresh_url)
            reader(line, kind.split()[0], text)


def test_readme_names_each_command(said):
    named = re.findall("`([a-z]+)", README.read_text(encoding="utf-8"))
    commands = re.findall("^  ([a-z]+)", said("help")[1], re.MULTILINE)
    assert "destroy" in commands and {*commands} <= {*named, "help"}
