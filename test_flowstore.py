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
import gc
import inspect
import itertools
import json
import lzma
import os
import pathlib
import pickle
import pty
import random
import re
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
import types
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
    ExecutionRecord,
    NotFoundError,
    StoreBusyError,
    StoreError,
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


def record(ref="build", minutes=0, **fields):
    """An execution's record, some minutes after START."""
    return flowstore.ExecutionRecord(ref, START + timedelta(minutes=minutes), **fields)


def background(id="b1", minutes=0, **fields):
    """A background run's record, some minutes after START."""
    values = {"pid": 0, "ref": "serve", "status": "completed", **fields}
    return flowstore.BackgroundRun(
        id, started_at=START + timedelta(minutes=minutes), **values
    )


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "flowstore.db")


@pytest.fixture
def store(path):
    return flowstore.SQLiteDataStore(path)


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
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
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
        store = flowstore.SQLiteDataStore(tmp_path / "flowstore.db")
    else:
        store = request.getfixturevalue("server").store()
    with entered(store, request.param) as given:
        yield given


# ---- the module: what it needs, what it names ----

AS_IMPORT = "import flowstore"
AS_SCRIPT = f"import runpy; runpy.run_path({MODULE!r}, run_name='__main__')"


@pytest.mark.parametrize("start", [AS_IMPORT, AS_SCRIPT], ids=["import", "script"])
@pytest.mark.parametrize(
    ("before", "needs"),
    [
        ("sys.version_info = (3, 10, 13, 'final', 0)", "Python 3.11"),
        ("import sqlite3; sqlite3.sqlite_version_info = (3, 30, 1)", "SQLite 3.31"),
    ],
    ids=["Python", "SQLite"],
)
def test_what_is_too_old_is_named_in_one_line(start, before, needs):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {before}; {start}"],
        capture_output=True,
        env=environment(),
        text=True,
        timeout=60,
    )
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert f"flowstore needs {needs}" in lines[-1]
    if start == AS_SCRIPT:
        assert len(lines) == 1
    else:
        assert lines[-1].startswith("ImportError: ")


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
    """Every public function, class and method, by its name."""
    for name in PUBLIC:
        found = getattr(flowstore, name)
        if isinstance(found, type):
            for member, value in inspect.getmembers(found):
                if isinstance(value, property):
                    value = value.fget
                if isinstance(value, (types.FunctionType, types.MethodType)) and (
                    not member.startswith("_") or member == "__init__"
                ):
                    yield f"{name}.{member}", value
        if callable(found):
            yield name, found


def test_the_public_names_are_these():
    assert sorted(flowstore.__all__) == sorted(PUBLIC)


def test_hints_of_all_that_is_public_resolve_and_have_no_private_name():
    for name, found in public_callables():
        if getattr(found, "__module__", "flowstore") != "flowstore":
            continue  # what namedtuple() makes
        typing.get_type_hints(found)
        try:
            signature = str(inspect.signature(found))
        except ValueError:  # an error's class has none
            continue
        assert not re.search(r"\b_[a-zA-Z]", signature), (name, signature)


def test_all_that_is_public_has_a_docstring():
    for name in PUBLIC:
        assert not callable(getattr(flowstore, name)) or getattr(flowstore, name).__doc__
    for name in OPERATIONS:
        assert getattr(flowstore.DataStore, name).__doc__, name


def test_constants_are_the_originals():
    for name, value in [
        ("BUCKET_ENV", "FLOW_PROCESS_BUCKET"),
        ("ROOT_BUCKET", "root"),
        *[
            (f"RUN_{name}_ENV", f"FLOW_RUN_{name}")
            for name in ("SOURCE", "CLIENT", "SESSION")
        ],
        *[(f"RUN_SOURCE_{name.upper()}", name) for name in ("cli", "desktop", "mcp")],
    ]:
        assert getattr(flowstore, name) == value
    for kind in (flowstore.RunStatus, flowstore.BackgroundRunStatus):
        for status in ("running", "completed", "failed"):
            assert getattr(kind, status.upper()) == status


# ---- errors ----


@pytest.mark.parametrize(
    ("kind", "bases"),
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
        assert getattr(other, "errno", None) is None
    assert kind("words alone").path == ""


# ---- records ----

UTC = timezone.utc
ZERO_TIME = datetime(1, 1, 1, tzinfo=UTC)
LAST_TIME = datetime(9999, 12, 31, 23, 59, 59, 999999, UTC)
LONGEST = timedelta(microseconds=2**63 // 1000)
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
    assert ExecutionRecord("r", START)[2:] == (
        *(timedelta(0), 0, "", "", "", None, "", 0),
        *("", "", "", "", "", "", ""),
    )
    assert BackgroundRun._fields == tuple(map(field_of, FULL_RUN))
    assert RUN[5:] == ("", "", None)
    assert flowstore.ImportSummary() == (0, 0, 0, 0, 0, 0, 0, ())
    assert " ".join(flowstore.ImportSummary._fields) == (
        "cache history background process_vars process_buckets recovered_runs"
        " legacy_scopes problems"
    )
    assert flowstore.PruneSummary(1, 2)._asdict() == {"history": 1, "background": 2}
    for kind, arguments in [(ExecutionRecord, 1), (BackgroundRun, 4)]:
        with pytest.raises(TypeError):
            kind(*[START] * arguments)


@pytest.mark.parametrize(
    "value", [record(id="1"), RUN, flowstore.PruneSummary(), flowstore.ImportSummary()]
)
def test_a_named_tuple_is_immutable_pickles_and_says_what_its_fields_are(value):
    kind = type(value)
    for field in (*value._fields, "another"):
        with pytest.raises(AttributeError):
            setattr(value, field, "x")
    assert typing.get_type_hints(kind).keys() == set(value._fields)
    for field in value._fields:
        assert re.search(rf"\b{field}\b[\w, ]*[:,]", kind.__doc__), field
    assert value == tuple(value) == copy.deepcopy(value)
    assert {value: 1}[kind(**value._asdict())] == 1
    assert type(value._replace()) is type(kind._make(value)) is kind
    assert repr(value).startswith(f"{kind.__name__}({value._fields[0]}=")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        other = pickle.loads(pickle.dumps(value, protocol))
        assert (type(other), other) == (kind, value)


@pytest.mark.parametrize(("kind", "document"), KINDS_OF_RECORDS)
def test_a_record_is_the_originals_json_object_and_back(kind, document):
    full = kind.from_dict(document)
    assert full.to_dict() == document == json.loads(json.dumps(full.to_dict()))
    assert list(full.to_dict()) == list(document)
    typed = {"started_at": START, "duration": timedelta(seconds=1.5)}
    typed["completed_at"] = datetime.fromisoformat(document["completedAt"])
    for tag, value in document.items():
        assert getattr(full, field_of(tag)) == typed.get(field_of(tag), value)
    assert kind.from_dict({**document, "another": 1}) == full
    mine = type("Mine", (kind,), {}).from_dict(document)
    assert (type(mine).__name__, mine) == ("Mine", full)


def test_empty_fields_are_left_out_but_for_those_that_are_always_there():
    least = {tag: FULL_EXECUTION[tag] for tag in ("ref", "startedAt")}
    always = {**least, "duration": 0, "exitCode": 0}
    assert record("build app").to_dict() == always
    none = {**dict.fromkeys(FULL_EXECUTION), **least}
    for document in (always, least, none):
        assert ExecutionRecord.from_dict(document) == record("build app")
    least = {"id": "", "startedAt": FULL_RUN["startedAt"]}
    always = {**least, "pid": 0, "ref": "", "status": ""}
    empty = BackgroundRun("", 0, "", START, "")
    assert empty.to_dict() == always
    for document in (always, least):
        assert BackgroundRun.from_dict(document) == empty


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (ZERO_TIME, "0001-01-01T00:00:00Z"),
        (LAST_TIME, "9999-12-31T23:59:59.999999Z"),
        (START.replace(microsecond=120000), "2024-05-06T07:08:09.12Z"),
        (START.replace(microsecond=1), "2024-05-06T07:08:09.000001Z"),
        (START.replace(second=0, microsecond=0), "2024-05-06T07:08:00Z"),
        (
            START.astimezone(timezone(timedelta(hours=-9.5))),
            "2024-05-06T07:08:09.123456Z",
        ),
    ],
)
def test_a_time_is_rfc_3339_in_utc_with_trailing_zeros_trimmed(moment, text):
    assert record()._replace(started_at=moment).to_dict()["startedAt"] == text
    assert RUN._replace(completed_at=moment).to_dict()["completedAt"] == text
    assert BackgroundRun.from_dict({**FULL_RUN, "startedAt": text}).started_at == moment


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2024-05-06T07:08:09.123456999Z", START),
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
    ("nanoseconds", "duration"),
    [
        (1999, timedelta(microseconds=1)),
        (-1999, -timedelta(microseconds=1)),
        (999, timedelta(0)),
        (-999, timedelta(0)),
        (2**63 - 1, LONGEST),
        (-(2**63), -LONGEST),
    ],
)
def test_a_duration_is_cut_towards_zero(nanoseconds, duration):
    document = {**FULL_EXECUTION, "duration": nanoseconds}
    assert ExecutionRecord.from_dict(document).duration == duration
    microseconds = duration // timedelta(microseconds=1)
    assert record(duration=duration).to_dict()["duration"] == microseconds * 1000


WRONG_TAGS = [
    *[(TypeError, tag, 1) for tag in ("ref", "error", "status", "startedAt")],
    *[(TypeError, "error", value) for value in (b"x", [""], False)],
    *[(TypeError, "startedAt", value) for value in (START, 0.5)],
    *[(TypeError, "duration", value) for value in (1.0, "1s", timedelta(1), True)],
    *[(TypeError, "pid", value) for value in (7.0, "7", True)],
    (TypeError, "completedAt", 5),
    *[(ValueError, tag, None) for tag in ("ref", "startedAt", "id")],
    *[(ValueError, tag, 2**63) for tag in ("duration", "pid", "exitCode")],
    *[(ValueError, tag, -(2**63) - 1) for tag in ("duration", "pid", "exitCode")],
    *[(ValueError, "error", text) for text in ("\ud800", "a\0")],
    *[
        (ValueError, tag, text)
        for tag in ("startedAt", "completedAt")
        for text in (
            *("", "Z", "now", "2024-01-02", "2024-01-02T03:04:05", "2024-1-2T03:04:05Z"),
            *("2024-13-02T03:04:05Z", "2024-02-30T03:04:05Z", "2024-01-02T25:00:00Z"),
            *(
                "2024-01-02T03:04:60Z",
                "2024-01-02T03:60:00Z",
                "2024-01-02T03:04:05+25:00",
            ),
            *("2024-01-02T03:04:05+02:00Z", "2024-01-02T03:04:05.\uff15Z"),
            *("0000-01-01T00:00:00Z", "10000-01-01T00:00:00Z", "2024-01-02T03:04:05Z\n"),
            *("0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01"),
        )
    ],
]


@pytest.mark.parametrize(("error", "tag", "value"), WRONG_TAGS)
def test_a_wrong_tag_is_named(error, tag, value):
    for kind, document in KINDS_OF_RECORDS:
        if tag not in document or (tag == "id" and kind is ExecutionRecord):
            continue
        if tag == "ref" and value is None and kind is BackgroundRun:
            continue  # it may be empty
        with pytest.raises(error, match=tag):
            kind.from_dict({**document, tag: value})


@pytest.mark.parametrize("document", [None, [], "{}", (("ref", "r"),), 1])
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
WRONG_FIELDS = [
    *[(ValueError, "started_at", value) for value in (NAIVE, EARLY, LATE)],
    (ValueError, "started_at", NAIVE.replace(tzinfo=NoOffset())),
    (ValueError, "completed_at", NAIVE),
    *[(ValueError, "pid", value) for value in (2**63, -(2**63) - 1)],
    *[
        (ValueError, "error", value)
        for value in ("\ud800", "\ud83d\ude00", "a\0b", "\udcff")
    ],
    *[(TypeError, "started_at", value) for value in (None, "2024-01-01T00:00:00Z", 0)],
    *[(TypeError, "completed_at", value) for value in ("", 0, NAIVE.date())],
    *[(TypeError, "pid", value) for value in (1.0, True, None, "1", Gone.GONE)],
    *[(TypeError, "status", value) for value in (None, b"failed", 1, Gone.GONE)],
    *[(TypeError, "ref", value) for value in (None, b"r", ("r",))],
    *[(TypeError, "id", value) for value in (None, 1)],
]
WRONG_FIELDS_OF_EXECUTIONS = [
    *[
        (ValueError, "duration", value)
        for value in (LONGEST + timedelta(microseconds=1), timedelta.min, timedelta.max)
    ],
    *[(TypeError, "duration", value) for value in (1, 1.5, None)],
    *[(ValueError, "exit_code", value) for value in (2**63, -(2**64))],
    *[(TypeError, "exit_code", value) for value in ("0", True, None)],
    *[(ValueError, "working_dir", value) for value in ("\udc80", "\0")],
    *[(TypeError, "working_dir", value) for value in (None, 1)],
]


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


def odd(value):
    """The same value as a member of an enumeration, or of a subclass with its own ideas."""
    if isinstance(value, datetime):
        return Moment.combine(value.date(), value.timetz())
    if isinstance(value, timedelta):
        return Span(microseconds=value // timedelta(microseconds=1))
    if isinstance(value, dict):
        return dict(zip(value, odd(list(value.values()))))
    if isinstance(value, (list, tuple)):
        values = list(map(odd, value))
        return type(value)(*values) if hasattr(value, "_fields") else values
    if value in ("fast", 3):
        return Mode.FAST if value == "fast" else Level.HIGH
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

    for fold, hour in [(0, 1), (1, 2)]:
        moment = datetime(2024, 10, 27, 3, tzinfo=Clock(), fold=fold)
        text = record()._replace(started_at=moment).to_dict()["startedAt"]
        assert text == f"2024-10-27T0{hour}:00:00Z"


# ---- where things are ----


@pytest.fixture
def no_variables(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("FLOW", "XDG_", "LOCALAPPDATA")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "/home/somebody/.cache/flow/flowstore.db"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/flow/flowstore.db"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/home/somebody/.cache/flow/flowstore.db"),
        ("linux", {"XDG_CACHE_HOME": "x"}, "/home/somebody/.cache/flow/flowstore.db"),
        ("linux", {"XDG_CACHE_HOME": "/x", "FLOW_CACHE_DIR": "/c"}, "/c/flowstore.db"),
        ("linux", {"FLOW_CACHE_DIR": "/c/../d"}, "/d/flowstore.db"),
        ("linux", {"FLOW_CACHE_DIR": "sub"}, "{cwd}/sub/flowstore.db"),
        (
            "linux",
            {"FLOW_CACHE_DIR": "", "FLOWSTORE_PATH": ""},
            "/home/somebody/.cache/flow/flowstore.db",
        ),
        ("linux", {"FLOW_CACHE_DIR": "/c", "FLOWSTORE_PATH": "/f/a.db"}, "/f/a.db"),
        ("linux", {"FLOWSTORE_PATH": "a.db"}, "{cwd}/a.db"),
        ("linux", {"FLOWSTORE_PATH": "postgresql://h/d"}, "postgresql://h/d"),
        (
            "darwin",
            {"XDG_CACHE_HOME": "/x"},
            "/home/somebody/Library/Caches/flow/flowstore.db",
        ),
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
    ("value", "bucket"),
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
    ("value", "expected"),
    [
        (None, ""),
        ("", ""),
        ("plain", "plain"),
        ("${ODD}", "its value"),
        ("${CHAIN}", "${ODD}"),
        ("${MISSING}", ""),
        *[(text, text) for text in ("${}", "${", "$", "}", "$}", "$ODD", "{ODD}")],
        *[(text, text) for text in ("x${ODD}", "${ODD} ", "${ODD", "$${ODD}")],
        ("${A}${B}", ""),
        ("${${}", ""),
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
    assert flowstore.DataStore.__abstractmethods__ - {"close"} == set(OPERATIONS)
    written = {name: lambda self, *arguments: arguments for name in OPERATIONS}
    mine = type("Mine", (flowstore.DataStore,), written)()
    assert isinstance(mine, flowstore.DataStore)
    assert mine.get_process_var("a", "b") == ("a", "b")
    assert mine.close() is None
    del written["transaction"]
    with pytest.raises(TypeError):
        type("Incomplete", (flowstore.DataStore,), written)()


# ---- a model of a store ----


class DictStore(flowstore.DataStore):
    """A store of plain dicts and lists: the contract in short, which the others are
    compared with. It takes what is right only."""

    def __init__(self):
        self.cache, self.history, self.runs = {}, [], {}
        self.made, self.variables = set(), {}

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
            return ref in (None, one.ref) and status in (None, shown)

        found = sorted(filter(is_asked_for, self.history), key=by_start)
        found = [one for one in found if one.started_at >= since]
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
        kept = self.variables.items()
        self.variables = {place: value for place, value in kept if place[0] != bucket}

    def list_process_buckets(self):
        return sorted(self.made | {bucket for bucket, _ in self.variables})

    def set_process_var(self, bucket, key, value):
        self.variables[bucket, key] = value

    def get_process_var(self, bucket, key):
        variables = self.get_all_process_vars(bucket)
        if key not in variables:
            raise NotFoundError(key)
        return variables[key]

    def own(self, bucket):
        return {
            key: value for (each, key), value in self.variables.items() if each == bucket
        }

    def get_all_process_vars(self, bucket):
        return dict(sorted({**self.own("root"), **self.own(bucket)}.items()))

    def get_process_var_keys(self, bucket):
        own = self.own(bucket)
        return sorted(own) + sorted(self.own("root").keys() - own.keys())

    def delete_process_var(self, bucket, key):
        self.variables.pop((bucket, key), None)

    def prune(self, keep=2**63, before=ZERO_TIME):
        counts = []
        for forget, kept in [
            (self.history.remove, self.history),
            (lambda run: self.runs.pop(run.id), self.list_background_runs()),
        ]:
            ended = sorted((one for one in kept if one.status != "running"), key=by_start)
            gone = []
            for place, one in enumerate(ended):
                newer = sum(other.ref == one.ref for other in ended[place + 1 :])
                if newer >= keep or one.started_at < before:
                    gone.append(one)
            counts.append(len(list(map(forget, gone))))
        return flowstore.PruneSummary(*counts)

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
# for what takes hundreds of calls, each of which is a new connection to a server
HELD = [kind for kind in KINDS if kind != "server"]
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
    *[(operation, ()) for operation in ("list_execution_refs", "list_background_runs")],
    *[(operation, ()) for operation in ("get_all_execution_history", "list_cache_keys")],
    *[(operation, ()) for operation in ("list_process_buckets", "get_recent_executions")],
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


def raised_in_a_thread(work):
    """What work raises in another thread, or None."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).exception(60)


# ---- names and texts ----

NAMES = [
    *(
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
    ),
    *(
        "'; DROP TABLE cache; --",
        'quo"te`\\',
        "\x01\x7f\x80",
        "Grüße \U0001f600",
        "a" * 1299,
    ),
    *("\x80", "\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff", "NULL", "?1"),
]
NO_TEXTS = ["\ud800", "a\udfff", "\udcff", "\ud83d\ude00", "\0", "a\0b", "ab\0"]


@thrifty
@pytest.mark.parametrize(
    ("error", "names"),
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
    both.get_all_execution_history(1)
    both.get_process_var_keys("scope")
    for name in NAMES[::5]:
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
@given(any_text, any_text, st.binary(max_size=40))
@example("\0", "", b"")
@example("é", "\ud800", b"\0")
@example("k", "two\nlines'\"", b"")
@example("k", "\U0001f600" * 30_000, b"")
def test_a_text_is_taken_exactly_where_utf8_can_encode_it_without_nul(
    both, name, text, data
):
    def is_text(value):
        return "\0" not in value and not re.search("[\ud800-\udfff]", value)

    texts = [field for field, value in record(id="1")._asdict().items() if value == ""]
    one = record("k", id="1", **dict.fromkeys(texts, text))
    run = background("k", ref=text, status=text, log_archive_id=text, error=text)
    for is_good, call in [
        (name and is_text(name), ("set_cache_entry", (name, data))),
        (is_text(text), ("set_process_var", ("scope", "key", text))),
        (is_text(text), ("record_execution", (one,))),
        (is_text(text), ("save_background_run", (run,))),
    ]:
        if is_good:
            call_all(both, [call])
        else:
            all_raise(ValueError, both.store, [call])
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
        *(
            b"",
            b"aabb",
            bytearray(b"aabb"),
            memoryview(b"a-a-b-b")[::2],
            b"\0\xff" * 70_000,
        ),
        *(array.array("H", [0x6161, 0x6262]), memoryview(bytearray(b"aabb")).cast("H")),
    ):
        both.set_cache_entry("k", value)
        both.get_cache_entry("k")
        both.get_cache_entries(["k"])
    mutable = bytearray(b"kept")
    both.set_cache_entry("k", mutable)
    mutable[:] = b"gone"
    wrong = [("k", value) for value in ("text", None, 1, [1], object(), True)]
    each_raises(TypeError, both.store, "set_cache_entry", *wrong)
    assert both.get_cache_entry("k") == b"kept"
    for _ in range(2):  # a missing one is no error
        both.delete_cache_entry("k")
        assert both.get_cache_entry("k") is None


@thrifty
def test_bulk_reads_take_any_number_of_names_and_leave_the_missing_out(both):
    names = [f"n{number:04}" for number in range(1200)]
    there = [names[1199], names[0], names[499], names[500], names[700]]
    for name in there:
        filled_store(both, name)
        for minute in (1, 1):
            both.record_execution(record(name, minute))
    for asked in (
        names,
        tuple(reversed(names)),
        [names[2], *there, *there],
        [names[2]],
        [],
    ):
        both.get_cache_entries(asked)
        both.get_background_runs(asked)
        for limit in range(5):
            both.get_execution_histories(asked, limit)
    assert list(both.store.get_cache_entries(iter(there))) == there


def test_cache_keys_are_those_that_begin_with_the_prefix(both):
    keys = [
        *(
            "a",
            "ab",
            "aba",
            "abc",
            "ac",
            "a%",
            "a_",
            "a\U0010ffff",
            "a\U0010ffffb",
            "b",
            "A",
        ),
        *(
            "\ud7ff",
            "\ud7ffa",
            "\ue000",
            "\ue000\ue000",
            "\uffff",
            "\U00010000",
            "\x7f\x80",
        ),
        *("\U0010ffff", "\U0010ffff\U0010ffff", "\U0010ffff\U0010ffffa", "%a", "__", "é"),
    ]
    for key in keys:
        both.set_cache_entry(key, b"")
    for prefix in ("", "abcd", "%", "_", "'", "\x7f", *keys):
        both.list_cache_keys(prefix)
    both.list_cache_keys(prefix="ab")
    each_raises(TypeError, both.store, "list_cache_keys", (None,), (b"a",))
    each_raises(ValueError, both.store, "list_cache_keys", ("\ud800",), ("\0",))


# ---- records ----


def test_instants_durations_and_numbers_come_back_and_sort_as_time(both):
    east = timezone(timedelta(hours=23, minutes=59))
    moments = [
        *(ZERO_TIME, datetime(1, 1, 2, tzinfo=east), datetime(999, 1, 1, tzinfo=UTC)),
        *(datetime(1969, 12, 31, 23, 59, 59, 999999, UTC), START.replace(microsecond=0)),
        *(START.replace(microsecond=1), START.astimezone(east), LAST_TIME),
    ]
    tiny = timedelta(microseconds=1)
    durations = [timedelta(0), tiny, -tiny, timedelta(-3, 0, 5), LONGEST, -LONGEST] * 2
    values = list(zip(moments, durations, [0, -1, 1, 2**31, 2**63 - 1, -(2**63)] * 2))
    for moment, duration, number in random.Random(1).sample(values, len(values)):
        pid = {"pid": number, "completed_at": moment}
        one = record("k", duration=duration, exit_code=number, **pid)
        both.record_execution(one._replace(started_at=moment))
        both.save_background_run(background("k", **pid)._replace(started_at=moment))
        both.get_background_run("k")
    assert both.get_recent_executions() == both.get_execution_history("k")
    assert list(map(by_start, both.get_execution_history("k"))) == moments


def test_a_record_with_a_wrong_field_is_refused_and_changes_nothing(each):
    before = contents_of(filled_store(each))
    for save, wrong, good in [
        ("save_background_run", WRONG_FIELDS, background("k")),
        ("record_execution", WRONG_FIELDS + WRONG_FIELDS_OF_EXECUTIONS, record("k")),
    ]:
        for error, field, value in wrong:
            each_raises(error, each, save, (good._replace(**{field: value}),))
        others = [record("k")] if good.id else [background("k")]
        others += [None, {}, tuple(good), good.to_dict(), "k"]
        each_raises(TypeError, each, save, *[(value,) for value in others])
    assert contents_of(each) == before


# ---- history ----


def test_a_history_is_the_newest_with_the_oldest_of_them_first(both):
    for code, minute in enumerate([3, 0, 4, 3, 1, 3]):
        both.record_execution(record("k", minute, exit_code=code))
        both.record_execution(record("other", minute))
    assert [one.exit_code for one in both.get_execution_history("k", 4)] == [0, 3, 5, 2]
    for limit in (-(2**63), -1, *range(8), 2**63 - 1):
        for ref in ("k", "unknown"):
            both.get_execution_history(ref, limit)
            both.get_recent_executions(limit, ref=ref)
        both.get_execution_histories(["x", "other", "k"], limit=limit)
        both.get_all_execution_history(limit_per_ref=limit)
    for error, wrong in [
        (TypeError, [1.0, "1", None, True]),
        (ValueError, [2**63, 10**30]),
    ]:
        for limit in wrong:
            each_raises(error, both.store, "get_execution_history", ("k", limit))
            each_raises(error, both.store, "get_execution_histories", (["k"], limit))
            each_raises(error, both.store, "get_all_execution_history", (limit,))
            each_raises(error, both.store, "get_recent_executions", (limit,))


def test_a_record_with_an_id_replaces_that_of_its_ref_and_id_in_its_place(both):
    for ref, id, minute, status in [
        *[("k", "a", 0, "running"), ("k", "b", 0, "running"), ("k", "c", 0, "")],
        *[("other", "b", 0, "running"), ("k", "b", 0, "completed"), ("k", "a", 2, "")],
        *[("k", "a", 0, ""), ("k", "", 0, ""), ("k", "", 0, ""), ("kb", "c", 0, "")],
        *[("k", "bc", 0, ""), ("K", "a", 0, ""), ("k", "A", 0, "")],
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
        *[
            ("a", 0, "", 0),
            ("b", 3, "", 2),
            ("a", 1, "completed", 9),
            ("c", 2, "failed", 0),
        ],
        *[
            ("b", 2, "running", 0),
            ("a", 5, "odd", 0),
            ("a", 2, "", 255),
            ("c", 4, "", -1),
        ],
    ]:
        both.record_execution(record(ref, minute, status=status, exit_code=code))
    for minutes in (0, 2, 5.01):
        since = (START + timedelta(minutes=minutes)).astimezone(
            timezone(timedelta(hours=9))
        )
        for status in ("completed", "failed", "running", "odd", "Failed", ""):
            both.get_recent_executions(status=status, since=since)
            both.get_recent_executions(1, ref="a", status=status, since=since)
    both.get_recent_executions(limit=3)
    for number in range(25):
        both.record_execution(record(f"r{number}", 30 - number))
    assert len(both.get_recent_executions()) == 20
    for error, options in [
        *[(TypeError, {"status": status}) for status in (b"failed", 1)],
        *[(TypeError, {"since": since}) for since in ("2024-01-01", 0, START.date())],
        *[(ValueError, {"since": NAIVE}), (ValueError, {"since": EARLY})],
        *[
            (ValueError, {"status": "\0"}),
            (ValueError, {"ref": ""}),
            (TypeError, {"ref": 1}),
        ],
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
    ("cell", "reads"),
    [
        ("cache value 5", ["get_cache_entry"]),
        ("history pid 'many'", ["get_execution_history", "reconcile"]),
        ("history exit_code 1.5", ["get_execution_history"]),
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
    with contextlib.closing(sqlite3.connect(each.path)) as sql, sql:
        sql.execute(f"UPDATE {table} SET {column} = {value}")
    for read in reads:
        each_raises(CorruptStoreError, each, read, () if read == "reconcile" else ("k",))


# ---- process variables ----


def test_a_variable_is_looked_up_in_the_bucket_then_in_root(both):
    for bucket, key in [
        *[("root", "a"), ("root", "c"), ("root", "z"), ("scope", "m"), ("scope", "c")],
        *[("other", "o"), ("scope", "m")],
    ]:
        both.set_process_var(bucket, key, f"{key} of {bucket}")
    assert both.get_process_var("scope", "a") == "a of root"
    assert both.get_process_var_keys("scope") == ["c", "m", "a", "z"]
    for value in (None, "", "v"):
        if value is not None:
            both.set_process_var("scope", "c", value)
        for bucket in ("scope", "root", "other", "none"):
            for key in "acmoz":
                both.get_process_var(bucket, key)
            both.get_all_process_vars(bucket)
            both.get_process_var_keys(bucket)
    for _ in range(2):  # a missing one is no error
        both.delete_process_var("scope", "c")
        both.delete_process_var("none", "c")
        assert both.get_process_var("scope", "c") == "c of root"
    each_raises(
        TypeError, both.store, "set_process_var", ("a", "b", None), ("a", "b", b"v")
    )
    with pytest.raises(NotFoundError, match=r"'o'.*'scope'") as caught:
        both.store.get_process_var("scope", "o")
    assert caught.value.path in str(caught.value)


def test_buckets_are_those_that_were_made_and_those_that_have_variables(both):
    for bucket in ("made", "deleted", "é", "é"):
        both.create_process_bucket(bucket)
    for bucket in ("set", "emptied", "root", "é"):
        both.set_process_var(bucket, "k", bucket)
    both.create_process_bucket("é")
    for operation, arguments in [
        *[("delete_process_var", ("emptied", "k")), ("delete_process_var", ("é", "k"))],
        *[
            ("delete_process_bucket", (name,))
            for name in ("deleted", "never", "set", "root")
        ],
    ]:
        getattr(both, operation)(*arguments)
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
        with pytest.raises(NotFoundError):
            transaction.get_background_run("missing")
        all_raise(ValueError, transaction, calls_with("\0"))
        transaction.close()
        transaction.set_cache_entry("k", b"later")
    assert contents_of(each) == ({"k": b"later"}, *inside[1:])


@whole
def test_a_transaction_leaves_nothing_where_an_exception_passes_through(each):
    before = contents_of(filled_store(each))
    kinds = [ArithmeticError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration]
    for kind in (
        *kinds,
        TimeoutError,
        StoreBusyError,
        NotFoundError,
        flowstore.StoreError,
    ):
        raised = kind("stop")
        with pytest.raises(kind) as caught, each.transaction() as transaction:
            filled_store(transaction, "other")
            for method, arguments in WRITES:
                getattr(transaction, method)(*arguments)
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
        ):
            with pytest.raises(RuntimeError), enter():
                pass
        all_raise(
            RuntimeError, transaction, [("prune", (1,)), ("backup", (tmp_path / "b",))]
        )
        assert transaction.get_cache_entry("a") == b"1"
        transaction.set_cache_entry("b", b"2")
    assert contents_of(each) == ({"a": b"1", "b": b"2"}, {}, [], {})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("way", ["session", "transaction"])
@whole
def test_neither_serves_after_its_end_or_in_another_thread(each, way):
    manager = getattr(each, way)()
    with manager as inner:
        for method, arguments in [
            *CALLS,
            (way, ()),
            ("prune", (1,)),
            ("execution", ("k",)),
        ]:
            work = lambda: getattr(inner, method)(*arguments)  # noqa: B023, E731
            assert isinstance(raised_in_a_thread(work), RuntimeError), method
        inner.set_cache_entry("k", b"1")
    all_raise(RuntimeError, inner, [*CALLS, (way, ()), ("execution", ("k",))])
    assert contents_of(each) == ({"k": b"1"}, {}, [], {})


@file_only
def test_another_handle_in_its_thread_reads_what_was_before_and_may_not_write(
    each, tmp_path
):
    (tmp_path / "link.db").symlink_to(each.path)
    other = flowstore.SQLiteDataStore(each.path, timeout=60)
    link = flowstore.SQLiteDataStore(tmp_path / "link.db", timeout=60)
    with other.session() as session, each.transaction() as transaction:
        inside = contents_of(filled_store(transaction))
        for handle in (other, link, session, each):
            all_raise(RuntimeError, handle, WRITES)
            with pytest.raises(RuntimeError), handle.transaction():
                pass
            with pytest.raises(RuntimeError), handle.execution("k"):
                pass
            all_raise(RuntimeError, handle, [("prune", (1,))])
            if handle is not each:
                assert contents_of(handle) == ({}, {}, [], {})
        with pytest.raises(RuntimeError):
            flowstore.destroy_store(each.path)
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
        all_raise(ValueError, session, calls_with("\0"))
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
    "limits",
    [
        *[{"keep": keep} for keep in (0, 1, 2, 3, 2**63 - 1)],
        *[{"before": START + timedelta(minutes=minutes)} for minutes in (0, 1, 2, 99)],
        *[{"keep": keep, "before": START + timedelta(minutes=2)} for keep in (1, 3)],
    ],
)
@whole
def test_prune_keeps_the_newest_that_ended_and_all_that_runs(each, limits):
    both = Both(each, odd)
    for number, (ref, minute, status) in enumerate([
        *[("a", 0, "completed"), ("a", 1, "running"), ("a", 2, "failed"), ("a", 2, "")],
        *[("a", 3, "odd"), ("b", 1, "completed"), ("b", 0, "running"), ("c", 0, "failed")],
    ]):  # fmt: skip
        both.record_execution(record(ref, minute, status=status, exit_code=number))
        both.save_background_run(background(f"b{number}", minute, ref=ref, status=status))
    for _ in range(2):
        both.prune(**limits)
        contents_of(both)


@whole
def test_prune_takes_many_steps_and_refuses_what_is_no_limit(each):
    with each.transaction() as transaction:
        for number in range(1200):
            transaction.record_execution(record("k", number))
            transaction.save_background_run(background(str(number), number))
    each_raises(ValueError, each, "prune", (), (-1,), (2**63,), (None, NAIVE), (1, NAIVE))
    each_raises(
        TypeError, each, "prune", (1.0,), ("1",), (True,), (None, "2024"), (None, 0)
    )
    assert each.prune(keep=5) == (1195, 1195)
    found = [(one.started_at - START) // timedelta(minutes=1) for one in
             each.get_recent_executions(0)]  # fmt: skip
    assert found == list(range(1195, 1200))


# ---- any calls, in and out of sessions and transactions ----

good_text = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6
)
one_of_few = st.sampled_from(["root", "a", "b", "é", "\U0001f600", "a\nb"])
some_name = st.one_of(one_of_few, one_of_few, good_text.filter(bool))
some_names = st.lists(some_name, max_size=4)
some_zone = st.integers(-1439, 1439).map(
    lambda minutes: timezone(timedelta(minutes=minutes))
)
some_instant = st.sampled_from([START, START, ZERO_TIME, LAST_TIME]) | st.datetimes(
    datetime(1, 1, 2), datetime(9999, 12, 30), timezones=some_zone
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
    pid=some_number,
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
    @initialize()
    def start(self):
        memory = (
            "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        )  # no disk to wait for
        self.folder = tempfile.mkdtemp(dir=memory)
        self.both = Both(
            flowstore.SQLiteDataStore(os.path.join(self.folder, "flowstore.db"))
        )
        self.open = []  # what has been entered, and in what

    def is_in(self, way):
        return way in [entered for entered, _, _ in self.open]

    def leave(self, error=None):
        _, stack, outer = self.open.pop()
        with contextlib.suppress(ArithmeticError), stack:
            if error:
                raise error
        self.both.store = outer

    @rule(calls=st.lists(some_call, min_size=1, max_size=12))
    def call(self, calls):
        call_all(self.both, calls)

    @precondition(lambda self: not self.is_in("transaction"))
    @rule(way=st.sampled_from(["session", "transaction"]))
    def begin(self, way):
        stack = contextlib.ExitStack()
        self.open.append((way, stack, self.both.store))
        self.both.store = stack.enter_context(getattr(self.both.store, way)())
        if way == "transaction":
            stack.enter_context(self.both.model.transaction())

    @precondition(lambda self: self.open)
    @rule(error=st.sampled_from([None, ArithmeticError()]))
    def end(self, error):
        self.leave(error)

    @precondition(lambda self: not self.is_in("transaction"))
    @rule(keep=st.integers(0, 2))
    def prune(self, keep):
        self.both.prune(keep)

    @precondition(lambda self: not self.open)
    @rule()
    def destroy(self):
        flowstore.destroy_store(self.both.store.path)
        self.both = Both(self.both.store)

    def teardown(self):
        if hasattr(self, "folder"):
            while self.open:
                self.leave()
            contents_of(self.both)
            assert os.listdir(self.folder) in (["flowstore.db"], [])
            shutil.rmtree(self.folder)


def test_a_store_does_what_its_model_does():
    steps = settings(SETTINGS, max_examples=20, stateful_step_count=25)
    run_state_machine_as_test(StoreAndModel, settings=steps)


@thrifty
@settings(SETTINGS, max_examples=8)
@given(st.lists(some_call, min_size=20, max_size=30))
def test_each_kind_does_what_the_model_does(both, calls):
    call_all(both, calls)
    contents_of(both)


try:
    import resource
except ImportError:
    resource = None

# ---- the file: helpers ----

NOBODY = 65534
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX: users, modes, limits")


@pytest.fixture
def place():
    """A folder that an unprivileged user may read, with a store of one variable in it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        flowstore.SQLiteDataStore(f"{folder}/flowstore.db").set_process_var(
            "b", "k", "old"
        )
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


def with_mounts(commands, code, *arguments):
    """What this code prints in a process that sees mounts of its own."""
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    with contextlib.suppress(OSError):
        if (
            subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", "/mnt"]).returncode
            == 0
        ):
            script = f'{commands} && exec "$@"'
            python = [sys.executable, "-c", f"import os, sys, flowstore\n{code}"]
            done = subprocess.run(
                [*unshare, "sh", "-c", script, "sh", *python, *map(str, arguments)],
                capture_output=True,
                text=True,
                cwd="/proc",
                env=environment(),
                timeout=60,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout
    return pytest.skip("needs Linux, unshare and the right to mount")


def value_of(work):
    """What work() returns, or the StoreError that it raises."""
    try:
        return work()
    except flowstore.StoreError as error:
        return error


def files_in(folder):
    """What is in a folder, by name: mode, time and content."""
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        status = entry.stat(follow_symlinks=False)
        data = b""
        if stat.S_ISREG(status.st_mode):
            with open(entry, "rb") as stream:
                data = stream.read()
        found[entry.name] = stat.S_IMODE(status.st_mode), status.st_mtime_ns, data
    return found


def by_hand(path, *statements):
    """Execute these in SQLite; the rows of the last one."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            rows = connection.execute(statement).fetchall()
    return rows


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


@posix
@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_a_store_is_one_private_file_in_private_folders(place, umask):
    os.chmod(place, 0o777)
    before = os.umask(umask)
    try:
        with an_ordinary_user():
            store = flowstore.SQLiteDataStore(f"{place}/new/deep/flowstore.db")
            store.set_cache_entry("k", b"v")
            with store.session() as session:
                session.set_cache_entry("k", b"w")
                during = files_in(f"{place}/new/deep")
            store.backup(f"{place}/new/deep/copy")
            after = files_in(f"{place}/new/deep")
    finally:
        os.umask(before)
    assert {mode for mode, *_ in during.values()} == {0o600} and len(during) == 3
    assert [(name, mode) for name, (mode, *_) in after.items()] == [
        ("copy", 0o600),
        ("flowstore.db", 0o600),
    ]
    folders = [f"{place}/new", f"{place}/new/deep"]
    assert [stat.S_IMODE(os.stat(each).st_mode) for each in folders] == [0o700, 0o700]


def test_the_file_says_whose_it_is(store, path):
    pragmas = ["application_id", "user_version", "journal_mode", "auto_vacuum"]
    found = [by_hand(path, f"PRAGMA {each}")[0][0] for each in pragmas]
    assert found == [0x464C5753, 2, "wal", 2]
    tables = by_hand(path, "SELECT name FROM sqlite_master WHERE type = 'table'")
    assert {name for (name,) in tables} == {
        *("cache", "history", "background", "process_vars", "process_buckets")
    }
    store.record_execution(record(duration=timedelta(seconds=1)))
    assert by_hand(path, "SELECT started_at, duration FROM history") == [
        ("2024-05-06T07:08:09.123456Z", 10**9)
    ]


def test_a_write_is_made_with_the_settings_that_it_depends_on(store, prepared):
    made = []
    prepared(made.append)
    with store.session() as session:
        session.set_cache_entry("k", b"v")
        full = int(sys.platform == "darwin")  # elsewhere fsync() reaches the disk
        expected = {"synchronous": 2, "fullfsync": full, "checkpoint_fullfsync": full}
        expected |= {"wal_autocheckpoint": 0, "journal_size_limit": 2**22 - 1}
        expected |= {"secure_delete": 1}
        expected |= {"temp_store": 2, "trusted_schema": 0, "cell_size_check": 1}
        found = {
            each: made[0].execute(f"PRAGMA {each}").fetchone()[0] for each in expected
        }
    assert found == expected and len(made) == 1


def test_deleted_values_are_nowhere_in_the_file(store, path):
    for value in (b"secret-1" * 2000, b"secret-2"):
        store.set_cache_entry("k", value)
    store.set_process_var("b", "k", "secret-3")
    store.delete_cache_entry("k")
    store.delete_process_bucket("b")
    with open(path, "rb") as stream:
        assert b"secret" not in stream.read()


@posix
def test_a_file_of_no_bytes_is_a_new_store(path):
    with open(path, "wb"):
        os.chmod(path, 0o644)
    store = flowstore.SQLiteDataStore(path)
    store.set_cache_entry("k", b"v")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    os.chmod(path, 0o640)  # somebody's choice, for what is a store already
    assert store.get_cache_entry("k") == b"v"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640


def test_what_others_have_added_is_left_alone(store, path):
    added = ["CREATE TABLE notes (a)", "INSERT INTO notes VALUES (1)"]
    added += [
        "CREATE TABLE pairs (key, value)",
        "CREATE VIEW seen AS SELECT * FROM cache",
    ]
    by_hand(path, *added, "CREATE INDEX mine ON history (label)")
    store = flowstore.SQLiteDataStore(path)
    store.set_cache_entry("k", b"v")
    store.record_execution(record())
    assert by_hand(path, "SELECT * FROM notes, seen") == [(1, "k", b"v")]


# ---- the file: what is refused ----


def bytes_of(data):
    def make(path):
        os.unlink(path)
        with open(path, "wb") as stream:
            stream.write(data)

    return make


def statements_of(*statements):
    return lambda path: by_hand(path, *statements)


def foreign(path):
    os.unlink(path)
    by_hand(path, "CREATE TABLE theirs (a)", "INSERT INTO theirs VALUES (1)")


def in_place_of_it(make):
    def replace(path):
        os.unlink(path)
        make(path)

    return replace


VIEW = "CREATE VIEW cache AS SELECT 'k' AS key, x'00' AS value"
TRIGGER = "CREATE TRIGGER spy AFTER INSERT ON cache BEGIN DELETE FROM history; END"
BBOLT = bytes(16) + b"\xed\xda\x0c\xed" + bytes(4076)
REFUSED = {
    "a foreign id": (statements_of("PRAGMA application_id = 7"), "another program's"),
    "no id": (foreign, "another program's"),
    "a newer schema": (statements_of("PRAGMA user_version = 3"), "update flowstore"),
    "an older schema": (statements_of("PRAGMA user_version = 1"), "move it away"),
    "bbolt": (bytes_of(BBOLT), "flowstore import"),
    "text": (bytes_of(b"notes\n" * 1000), "no SQLite file"),
    "a byte": (bytes_of(b"x"), "no SQLite file"),
    "511 bytes": (bytes_of(bytes(511)), "no SQLite file"),
    "a folder": (in_place_of_it(os.mkdir), "no regular file"),
    "a pipe": (in_place_of_it(getattr(os, "mkfifo", os.mkdir)), "no regular file"),
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
    uses = [
        lambda: flowstore.SQLiteDataStore(path),
        lambda: store.get_cache_entry("k"),
        lambda: store.set_cache_entry("k", b"v"),
        lambda: store.transaction().__enter__(),
        lambda: store.backup(tmp_path / "copy"),
    ]
    kind = flowstore.CorruptStoreError if what in CORRUPT else flowstore.StoreError
    for use in uses:
        error = value_of(use)
        assert type(error) is kind and words in str(error) and path in str(error)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.path) == (kind, str(error), path)
    assert files_in(tmp_path) == before


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="needs root: chown")
def test_somebody_elses_file_is_refused_where_anyone_may_write(place):
    path = f"{place}/flowstore.db"
    os.chmod(path, 0o666)
    with an_ordinary_user():
        assert flowstore.SQLiteDataStore(path).get_process_var("b", "k") == "old"
    os.chmod(place, 0o1777)
    with an_ordinary_user():
        error = value_of(lambda: flowstore.SQLiteDataStore(path))
    assert "another user's" in str(error) and path in str(error)


@posix
def test_a_place_where_nothing_can_be_made_is_named_at_once(place):
    os.chmod(place, 0o555)
    with an_ordinary_user():
        for name in ("new.db", "folder/new.db", "flowstore.db/new.db"):
            error = value_of(
                lambda name=name: flowstore.SQLiteDataStore(f"{place}/{name}")
            )
            assert type(error) is flowstore.StoreError and f"{place}/{name}" in str(error)
            assert "name a path" in str(error)


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
    error = value_of(lambda: store.set_cache_entry("k", bytes(100_000)))
    assert type(error) is flowstore.StoreError
    assert words in str(error) and path in str(error) and error.path == path


def test_a_damaged_file_says_to_remove_its_log(store, path):
    by_hand(path, "PRAGMA writable_schema = ON", "UPDATE sqlite_master SET rootpage = 99")
    error = value_of(lambda: store.set_cache_entry("k", b"v"))
    assert type(error) is flowstore.CorruptStoreError
    assert "damaged" in str(error) and "-wal and -shm" in str(error)


def test_no_error_shows_a_value(store, path):
    by_hand(
        path,
        "INSERT INTO process_vars VALUES ('b', 'k', CAST(x'736563726574ff' AS TEXT))",
    )
    with pytest.raises(flowstore.CorruptStoreError, match="no UTF-8") as caught:
        store.get_process_var("b", "k")
    assert "secret" not in str(caught.getrepr(style="native"))


@posix
def test_too_many_open_files_are_told_from_damage(store, path, tmp_path):
    free = os.open(path + ".free", os.O_CREAT, 0o600)
    seen = set()
    for left in range(9):
        with a_limit(resource.RLIMIT_NOFILE, free + left):
            found = value_of(lambda: store.set_cache_entry("k", b"v"))
            seen.add(str(found))
            seen.add(str(value_of(lambda: store.get_cache_entry("k"))))
            seen.add(str(value_of(lambda: store.backup(tmp_path / "copy"))))
        (tmp_path / "copy").unlink(missing_ok=True)
    os.close(free)
    errors = {each for each in seen if "flowstore.db" in each or "copy" in each}
    assert seen - errors <= {"None", str(b"v")} and errors < seen
    assert all("oo many open files" in each for each in errors)


# ---- the file: places ----


@posix
@pytest.mark.parametrize("folder_mode, file_mode", [(0o555, 0o644), (0o755, 0o444)])
def test_a_place_that_cant_be_written_is_read_and_left_as_it_is(
    place, folder_mode, file_mode
):
    path = f"{place}/flowstore.db"
    os.chmod(path, file_mode)
    os.chmod(place, folder_mode)
    before = files_in(place)
    with an_ordinary_user():
        store = flowstore.SQLiteDataStore(path)
        assert store.get_process_var("b", "k") == "old"
        assert store.get_cache_entries(["k"]) == {}
        with store.session() as session:
            assert session.get_process_var("b", "k") == "old"
            found = [value_of(lambda: session.set_process_var("b", "k", "new"))]
        found += [value_of(lambda: store.set_process_var("b", "k", "new"))]
        found += [value_of(lambda: store.transaction().__enter__())]
        found += [value_of(lambda: flowstore.destroy_store(path))]
    assert {type(each) for each in found} == {flowstore.StoreError}
    assert all("check the rights of file and folder" in str(each) for each in found)
    assert files_in(place) == before


@posix
def test_a_reader_sees_what_a_writer_beside_it_has_written(place):
    path = f"{place}/flowstore.db"
    store = flowstore.SQLiteDataStore(path)
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


@posix
def test_a_file_that_is_read_as_unchanging_must_not_change(place):
    path = f"{place}/flowstore.db"
    store = flowstore.SQLiteDataStore(path)
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
            changed = value_of(lambda: session.get_process_var("b", "k"))
            assert type(changed) is flowstore.StoreBusyError and "try again" in str(
                changed
            )
            assert session.get_process_var("b", "k") == "n"
    os.chmod(place, 0o755)
    with open(f"{path}-wal", "wb") as log:  # as of a writer that was killed
        log.write(b"x")
    os.chmod(place, 0o555)
    with an_ordinary_user():
        left = value_of(lambda: store.get_process_var("b", "k"))
    assert type(left) is flowstore.StoreBusyError and "-wal" in str(left)


@posix
def test_a_full_disk_changes_nothing_and_serves_again_when_there_is_room(store, path):
    store.set_cache_entry("k", b"old")
    with a_limit(resource.RLIMIT_FSIZE, 33 << 10):
        error = value_of(lambda: store.set_cache_entry("k", bytes(1 << 20)))
        assert "full" in str(error) and path in str(error)
        assert store.get_cache_entry("k") == b"old"
        with pytest.raises(flowstore.StoreError, match="full"):
            store.backup(f"{path}.copy")
        new = value_of(lambda: flowstore.SQLiteDataStore(f"{path}.new"))
    assert isinstance(new, flowstore.StoreError) and store.get_cache_entry("k") == b"old"
    store.set_cache_entry("k", bytes(1 << 20))
    assert os.listdir(os.path.dirname(path)) == ["flowstore.db", "flowstore.db.new"]
    assert flowstore.SQLiteDataStore(f"{path}.new").get_cache_entry("k") is None


def test_a_transaction_that_sqlite_rolled_back_is_dead(store, prepared):
    prepared(lambda connection: connection.execute("PRAGMA max_page_count = 60"))
    half = bytes(100_000)  # either of two such values fits, not both

    def fill(store):
        store.set_cache_entry("a", half)
        for _ in range(2):
            with pytest.raises(flowstore.StoreError, match=r"full|rolled back"):
                store.set_cache_entry("b", half)

    with (
        pytest.raises(flowstore.StoreError, match="begin anew"),
        store.transaction() as all_,
    ):
        fill(all_)
        with pytest.raises(flowstore.StoreError, match="rolled back"):
            all_.set_cache_entry("c", b"v")
    assert store.list_cache_keys() == []
    with store.session() as session:
        fill(session)
    assert store.list_cache_keys() == ["a"]


def test_a_session_reads_what_its_own_transaction_has_written(store):
    with store.session() as session:
        with session.transaction() as transaction:
            transaction.set_cache_entry("k", b"v")
            assert session.get_cache_entries(["k"]) == {"k": b"v"}
            assert session.get_cache_entry("k") == b"v"
        assert store.get_cache_entry("k") == b"v"


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
store = flowstore.SQLiteDataStore(sys.argv[1])
record = flowstore.ExecutionRecord.from_dict(
    {"ref": "r", "startedAt": "2024-01-01T00:00:00Z", "duration": 0, "exitCode": 0})
for number in range(3):
    store.record_execution(record._replace(spec="x" * 3_000_000))
store.get_all_execution_history()
store.get_recent_executions()
store.backup(sys.argv[1] + ".copy")
print(store.prune(keep=1).history)
flowstore.destroy_store(sys.argv[1])"""
    folders = [
        each
        for each in ("/tmp", "/var/tmp", "/usr/tmp", "/dev/shm")
        if os.path.isdir(each) and not os.path.islink(each)
    ]
    read_only = " && ".join(
        f"mount --bind {each} {each} && mount -o remount,ro,bind {each}"
        for each in folders
    )
    here = os.path.dirname(path)
    keep = f"mount --bind {here} /mnt"
    assert with_mounts(f"{keep} && {read_only}", code, "/mnt/flowstore.db") == "2\n"
    assert os.listdir(here) == ["flowstore.db.copy"]


# ---- the file: backup() ----


def test_a_backup_is_of_one_moment_while_others_write(store, path, tmp_path):
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
    for number in range(5):
        target = tmp_path / f"copy {number}"
        store.backup(target)
        copy = flowstore.SQLiteDataStore(target)
        assert copy.get_cache_entry("a") == copy.get_cache_entry("b") != b""
    open(f"{path}.stop", "w").close()
    assert writer.communicate(timeout=60)[1] == ""
    left = {"flowstore.db", "flowstore.db.stop", *(f"copy {each}" for each in range(5))}
    assert set(os.listdir(tmp_path)) == left


def test_a_backup_never_goes_over_what_is_there(store, path, tmp_path):
    (tmp_path / "file").write_bytes(b"theirs")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    before = files_in(tmp_path)
    for name in ("file", "folder", "link", "flowstore.db"):
        error = value_of(lambda name=name: store.backup(tmp_path / name))
        assert "name a new file" in str(error) and str(tmp_path / name) in str(error)
    assert "No such file" in str(
        value_of(lambda: store.backup(tmp_path / "none" / "copy"))
    )
    assert files_in(tmp_path) == before
    os.unlink(path)
    assert "no store here" in str(value_of(lambda: store.backup(tmp_path / "copy")))
    assert not os.path.exists(path)


def test_a_part_that_is_left_is_replaced_and_one_in_use_is_not(store, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    part = tmp_path / "copy.part"
    part.write_bytes(b"what a killed backup left")
    part.chmod(0o644)
    with open(part, "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        error = value_of(lambda: store.backup(tmp_path / "copy"))
        assert type(error) is flowstore.StoreBusyError and "copy.part" in str(error)
    assert part.read_bytes() == b"what a killed backup left"
    store.backup(tmp_path / "copy")
    assert sorted(os.listdir(tmp_path)) == ["copy", "flowstore.db"]
    assert stat.S_IMODE(os.stat(tmp_path / "copy").st_mode) == 0o600


def test_a_backup_that_is_killed_leaves_no_half_of_a_store(store, path, tmp_path):
    whole = os.urandom(8 << 20)
    store.set_cache_entry("k", whole)
    part = f"{path}.copy.part"

    def size():
        with contextlib.suppress(FileNotFoundError):
            return os.stat(part).st_size
        return 0

    for number in range(4):
        copy = "flowstore.SQLiteDataStore(sys.argv[1]).backup(sys.argv[2])"
        child = process(copy, path, f"{path}.copy")
        wait_until(
            lambda least=number << 20: size() > least or os.path.exists(f"{path}.copy")
        )
        child.kill()
        child.communicate(timeout=60)
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}.copy", f"{path}.{number}")
    store.backup(f"{path}.copy")
    assert not os.path.exists(part)
    for each in os.listdir(tmp_path):
        assert flowstore.SQLiteDataStore(tmp_path / each).get_cache_entry("k") == whole


# ---- the file: damaged ----


def uses_of(path, target):
    """Each operation on a store, with the type of what it returns."""
    store = flowstore.open_store(path)
    run = background(id="b2", status="running")
    return [
        (bytes, lambda: store.get_cache_entry("k")),
        (dict, lambda: store.get_cache_entries(["k", "l"])),
        (list, lambda: store.list_cache_keys("")),
        (list, lambda: store.get_execution_history("build", 2)),
        (dict, lambda: store.get_all_execution_history(1)),
        (dict, lambda: store.get_execution_histories(["build"], 1)),
        (list, store.get_recent_executions),
        (list, store.list_execution_refs),
        (list, store.list_background_runs),
        (flowstore.BackgroundRun, lambda: store.get_background_run("b1")),
        (str, lambda: store.get_process_var("s", "k")),
        (dict, lambda: store.get_all_process_vars("s")),
        (list, store.list_process_buckets),
        (type(None), lambda: store.backup(target)),
        (int, store.reconcile),
        (type(None), lambda: store.set_cache_entry("k", b"w")),
        (type(None), lambda: store.record_execution(record(id="1"))),
        (type(None), lambda: store.save_background_run(run)),
        (type(None), lambda: store.set_process_var("s", "k", "w")),
        (flowstore.PruneSummary, lambda: store.prune(keep=1)),
        (list, lambda: flowstore.migrate_process_buckets(path)),
        (type(None), lambda: flowstore.destroy_store(path)),
    ]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a store that has some of everything."""
    path = tmp_path_factory.mktemp("sound") / "flowstore.db"
    store = flowstore.SQLiteDataStore(path)
    with store.transaction() as all_at_once:
        for number in range(30):
            all_at_once.record_execution(
                record(minutes=number, id=str(number), spec="s" * 99)
            )
            all_at_once.save_background_run(background(id=f"b{number}"))
            all_at_once.set_process_var("s", f"k{number}", "v" * 50)
        all_at_once.set_process_var("s", "k", "v")
        all_at_once.set_cache_entry("k", bytes(9000))
    return path.read_bytes()


DAMAGES = st.lists(
    st.tuples(st.integers(0, 1 << 17), st.binary(max_size=4)), min_size=1, max_size=6
)


@given(damages=DAMAGES, cut=st.none() | st.integers(0, 1 << 17))
@example(damages=[(0, b"")], cut=4096)
@example(damages=[(28, b"\0\0\0\1")], cut=None)
@example(damages=[(100, b"\5")], cut=None)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_any_damage_gives_a_store_error_or_a_value(sound, damages, cut):
    data = bytearray(sound)
    for at, new in damages:
        at %= len(data)
        data[at : at + len(new)] = new[: len(data) - at]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "flowstore.db")
        with open(path, "wb") as stream:
            stream.write(data if cut is None else data[: cut % len(data)])
        opened = value_of(lambda: uses_of(path, os.path.join(folder, "copy")))
        if isinstance(opened, flowstore.StoreError):
            return
        for kind, use in opened:
            found = value_of(use)
            assert isinstance(found, (kind, flowstore.StoreError, type(None)))
            if isinstance(found, flowstore.StoreError):
                assert found.path in (path, os.path.join(folder, "copy"))


# ---- processes: helpers ----

posix_processes = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs POSIX: fork, signals, kill -9"
)


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
def lock_of_another_process(path, statement="BEGIN IMMEDIATE"):
    """Another process has the lock that a statement of SQLite takes; yields that process."""
    code = "import sqlite3\nother = sqlite3.connect(sys.argv[1], isolation_level=None)"
    child = process(f"{code}\nother.execute(sys.argv[2])\nprint(flush=True)\ninput()", path,
                    statement)  # fmt: skip
    child.stdout.readline()
    try:
        yield child
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


@posix_processes
def test_64_processes_write_at_once_and_nothing_is_lost(path):
    code = """
store = flowstore.SQLiteDataStore(arguments[0], timeout=60)
for each in range(2):
    store.set_process_var("b", f"{number} {each}", "v")
    with store.transaction() as both:
        count = int(both.get_all_process_vars("n").get("count", 0))
        both.set_process_var("n", "count", str(count + 1))
        both.set_cache_entry(str(number), b"%d" % each)"""
    crowd(64, code, path)
    store = flowstore.SQLiteDataStore(path)
    assert len(store.get_process_var_keys("b")) == 64 * 2
    assert store.get_process_var("n", "count") == str(64 * 2)
    assert len(store.list_cache_keys()) == 64
    assert files_beside(path) == ["flowstore.db"]


@posix_processes
def test_many_open_a_new_store_at_once(tmp_path):
    code = """
for each in range(15):
    path = f"{arguments[0]}/{each}/deep/flowstore.db"
    store = flowstore.SQLiteDataStore(path, timeout=60)
    store.set_process_var("b", str(number), "v")"""
    crowd(16, code, tmp_path)
    for each in range(15):
        path = tmp_path / str(each) / "deep" / "flowstore.db"
        assert len(flowstore.SQLiteDataStore(path).get_process_var_keys("b")) == 16
        assert files_beside(path) == ["flowstore.db"]


@posix_processes
def test_what_was_acknowledged_outlives_kill_9_at_any_moment(path, tmp_path):
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
    for round in range(6):
        children = [process(code, path, round * 3 + each) for each in range(3)]
        first = [child.stdout.readline() for child in children]
        threading.Event().wait(chance.random() / 20)
        for child, line in zip(children, first):
            child.kill()
            with child:
                acknowledged.update(
                    (line + child.stdout.read()).rpartition("\n")[0].split()
                )
    store = flowstore.SQLiteDataStore(path)
    found = set(store.get_process_var_keys("b"))
    assert len(acknowledged) >= 18 and acknowledged <= found
    assert len(found - acknowledged) <= 18  # killed between the two
    assert found == set(store.list_cache_keys())
    assert files_beside(path) == ["flowstore.db"]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@posix_processes
def test_a_store_is_destroyed_under_its_writers(path):
    code = """
store = flowstore.SQLiteDataStore(arguments[0], timeout=60)
for each in range(25):
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
    crowd(8, code, path)
    assert set(files_beside(path)) <= {"flowstore.db"}
    store = flowstore.SQLiteDataStore(path)
    store.set_process_var("b", "k", "v")
    assert store.get_process_var_keys("b") == ["k"]


# ---- processes: waiting ----


@pytest.mark.parametrize("clock", ["as it is", "frozen"])
@pytest.mark.parametrize("statement", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_lock_is_awaited_until_the_timeout(path, monkeypatch, clock, statement):
    store = flowstore.SQLiteDataStore(path, timeout=0.2)
    calls = [
        lambda: store.set_process_var("b", "k", "v"),
        lambda: store.transaction().__enter__(),
    ]
    slept, sleep = [], time.sleep
    monkeypatch.setattr(
        time, "sleep", lambda seconds: (slept.append(seconds), sleep(seconds))
    )
    if clock == "frozen":
        monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    with lock_of_another_process(path, statement):
        for call in calls:
            slept.clear()
            with pytest.raises(flowstore.StoreBusyError, match="timeout=") as caught:
                call()
            assert isinstance(caught.value, TimeoutError) and path in str(caught.value)
            assert sum(slept) <= 0.2001
        if clock == "frozen":
            assert sum(slept) > 0.199
        assert store.get_cache_entry("k") is None
        fast = flowstore.SQLiteDataStore(path, timeout=0)
        slept.clear()
        with pytest.raises(flowstore.StoreBusyError):
            fast.set_process_var("b", "k", "v")
        assert slept == []


def test_a_lock_is_had_when_it_is_free(path):
    store = flowstore.SQLiteDataStore(path, timeout=60)
    waiter = threading.Thread(target=store.set_process_var, args=("b", "k", "v"))
    with lock_of_another_process(path):
        waiter.start()
    waiter.join(60)
    assert store.get_process_var("b", "k") == "v"


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
        came = None
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.random() * seconds + 1e-6)
            work()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            came = error.with_traceback(None)
        as_it_is = [came] == raised if raised else came is None
        raised.clear()  # with what it holds
        assert as_it_is, came
        return came is not None

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
    flowstore.SQLiteDataStore(f"{store.path}.other").set_process_var("b", "k", "v")
    flowstore.destroy_store(f"{store.path}.other")


def back_up(store):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{store.path}.copy")
    store.backup(f"{store.path}.copy")


INTERRUPTED = {
    "write": lambda store: store.set_cache_entry("k", b"v" * 5000),
    "read": lambda store: store.get_cache_entry("k"),
    "history": lambda store: store.get_all_execution_history(2),
    "open": lambda store: flowstore.SQLiteDataStore(store.path),
    "prune": lambda store: store.prune(keep=2),
    "reconcile": lambda store: store.reconcile(),
    "transaction": transact,
    "session": use_a_session,
    "execution": run_something,
    "destroy": make_and_destroy,
    "backup": back_up,
}


@posix_processes
@pytest.mark.parametrize("what", INTERRUPTED)
def test_an_interrupt_passes_through_and_leaves_nothing_behind(path, interrupted, what):
    store = flowstore.SQLiteDataStore(path, timeout=5)
    work = INTERRUPTED[what]
    work(store)  # what it imports is there from now on
    began = time.perf_counter()
    work(store)
    seconds = time.perf_counter() - began
    came = 0
    with contextlib.closing(
        sqlite3.connect(path, timeout=0, isolation_level=None)
    ) as other:
        while came < 40:
            came += interrupted(lambda: work(store), seconds)
            other.execute("BEGIN IMMEDIATE")  # nothing is locked
            other.execute("ROLLBACK")
    gc.collect()
    flowstore.destroy_store(f"{path}.other")
    with store.transaction() as transaction:  # nor marked as in use
        transaction.set_process_var("b", "k", "after")
    assert in_a_fork(lambda: store.get_process_var("b", "k")) == "after"
    left = {"flowstore.db", "flowstore.db.copy", "flowstore.db.copy.part"}
    assert set(files_beside(path)) <= left


@posix_processes
def test_an_interrupt_ends_a_wait_as_it_is(path, interrupted):
    store = flowstore.SQLiteDataStore(path, timeout=60)
    with lock_of_another_process(path):
        for _ in range(10):
            assert interrupted(lambda: store.set_process_var("b", "k", "v"), 0.02)
    with store.session() as session:
        for _ in range(40):
            interrupted(lambda: use_a_session(session), 0.001)
            interrupted(lambda: transact(session), 0.001)
        transact(session)
        assert session.get_process_var("b", "k") == "v"


# ---- processes: fork ----


@posix_processes
def test_a_forked_child_leaves_what_is_the_parents_alone(path, tmp_path):
    store = flowstore.SQLiteDataStore(path)
    other = flowstore.SQLiteDataStore(tmp_path / "other.db")

    def refused(held):
        found = []
        for use in (held.list_cache_keys, store.list_cache_keys):
            try:
                found.append(use())
            except RuntimeError as error:
                found.append("fork" in str(error))
        other.set_cache_entry("child", b"v")
        return found

    with store.session() as session:
        session.set_process_var("b", "k", "before")
        assert in_a_fork(lambda: refused(session)) == [True, True]
        with session.transaction() as transaction:
            transaction.set_process_var("b", "k", "after")
            assert in_a_fork(lambda: refused(transaction)) == [True, True]
            transaction.set_cache_entry("k", b"v")
    assert store.get_process_var("b", "k") == "after" and store.list_cache_keys() == ["k"]
    assert in_a_fork(store.list_cache_keys) == ["k"]
    assert other.list_cache_keys() == ["child"]
    assert files_beside(path) == ["flowstore.db", "other.db"]


@posix_processes
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


@posix_processes
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_thread_that_waits_for_a_lock_holds_up_no_fork(path):
    store = flowstore.SQLiteDataStore(path, timeout=60)
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


@posix_processes
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_a_fork_keeps_no_other_thread_waiting(path, interrupted):
    store = flowstore.SQLiteDataStore(path)

    def fork():
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    def use():
        done.append(store.get_cache_entry("k"))

    done = []
    for _ in range(30):
        with contextlib.suppress(
            AssertionError
        ):  # Python loses what is raised in its hooks
            interrupted(fork, 0.003)
    user = threading.Thread(target=use, daemon=True)
    user.start()
    user.join(30)
    assert done == [None]


# ---- processes: growth ----


def test_readers_that_overlap_dont_let_the_log_grow_without_bound(path):
    store = flowstore.SQLiteDataStore(path)
    store.set_cache_entry("k", b"v")
    ended = threading.Event()

    def read():
        """At each moment there is a reader, none for longer than some milliseconds."""
        readers = [sqlite3.connect(path, isolation_level=None) for _ in range(2)]
        while not ended.wait(0.005):
            readers.reverse()
            readers[0].execute("BEGIN")
            readers[0].execute("SELECT count(*) FROM cache").fetchone()
            if readers[1].in_transaction:
                readers[1].execute("COMMIT")
        for each in readers:
            each.close()

    reader = threading.Thread(target=read)
    reader.start()
    largest = 0
    with store.session() as session:
        for _ in range(300):
            session.set_cache_entry("k", os.urandom(100_000))
            largest = max(largest, os.stat(f"{path}-wal").st_size)
    ended.set()
    reader.join()
    assert largest < 20 << 20  # of 30 MB
    assert files_beside(path) == ["flowstore.db"]


def test_the_work_of_an_operation_grows_with_what_it_returns(path, monkeypatch):
    store = flowstore.SQLiteDataStore(path)
    steps = []
    connect = sqlite3.connect

    def counted(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.set_progress_handler(lambda: steps.append(0), 50)
        return connection

    def work_of(operation):
        steps.clear()
        operation()
        return len(steps)

    monkeypatch.setattr(sqlite3, "connect", counted)
    found = {}
    for count in (300, 1200):
        with store.transaction() as transaction:
            for number in range(count):
                run = background(f"{count} {number}", number, ref=f"r{number % 3}")
                transaction.save_background_run(run)
                transaction.record_execution(record(minutes=number))
        found[count] = [
            work_of(lambda: store.get_execution_history("build", 10)),
            work_of(lambda: store.get_recent_executions(10)),
            work_of(store.list_execution_refs),
            work_of(lambda: store.prune(keep=2)),
        ]
    for few, many in zip(found[300][:3], found[1200][:3]):
        assert many <= few + 2
    assert found[300][3] > 100 and found[1200][3] < found[300][3] * 6


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
    summary = flowstore.import_bolt(bolt_source(folder, content), folder / "target.db")
    return summary, flowstore.SQLiteDataStore(folder / "target.db")


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
    cache = store.get_cache_entries(store.list_cache_keys())
    histories = store.get_all_execution_history().items()
    assert content == {
        "cache": {key: value.hex() for key, value in cache.items()},
        "history": {ref: [each.to_dict() for each in found] for ref, found in histories},
        "background": [run.to_dict() for run in store.list_background_runs()],
        "scopes": {
            bucket: store.get_all_process_vars(bucket)
            for bucket in store.list_process_buckets()
        },
    }
    assert list(summary[:7]) == counts
    assert [list(problem[:2]) for problem in summary.problems] == problems


def test_import_only_reads_its_source_and_twice_is_once(path, tmp_path):
    data = bolt_sample("legacy")[0]
    source = bolt_source(tmp_path, data)
    source.chmod(0o400)
    os.utime(source, ns=(10**18, 10**18))
    flowstore.import_bolt(source, path)
    before = dump(path)
    assert flowstore.import_bolt(source, path) == flowstore.ImportSummary(legacy_scopes=5)
    assert dump(path) == before
    assert (source.read_bytes(), source.stat().st_mtime_ns) == (data, 10**18)
    assert sorted(os.listdir(tmp_path)) == ["flowstore.db", "store.db"]


@pytest.mark.parametrize("page_size, inline", [(1024, 256), (4096, 0), (65536, 4096)])
def test_import_of_pages_of_any_size(tmp_path, page_size, inline):
    values = {b"%03d" % n: b"v" * (n * 7 % 3000) for n in range(300)}
    tree = {b"cache": values, b"process": {b"a": {}, b"b": {b"k": b"v"}}}
    summary, store = imported(tmp_path, make_bolt(tree, page_size, inline))
    assert summary == (300, 0, 0, 1, 2, 0, 0, ())
    cache = store.get_cache_entries(store.list_cache_keys())
    assert cache == {key.decode(): value for key, value in values.items()}


BOLT_VALUE = {b"cache": {b"k": b"v"}}


@pytest.mark.parametrize("page_size", [1024, 16384])
@pytest.mark.parametrize("at", [16, 20, 24, 32, 64, 72])
@pytest.mark.parametrize("number", [0, 1])
def test_import_with_a_damaged_meta_page_goes_by_the_other(
    tmp_path, number, at, page_size
):
    data = make_bolt(BOLT_VALUE, page_size)
    at += number * page_size
    damaged = overwritten(data, at, bytes([data[at] ^ 1]))
    assert imported(tmp_path, damaged)[0].cache == 1


@pytest.mark.parametrize(
    "at, meta, cached",
    [
        (4096, bolt_meta(1, 4096, 4, 9), 0),  # newer, and its root is empty
        (4096, bolt_meta(1, 4096, 4, 7), 1),  # older
        (32768, bolt_meta(1, 32768, 4, 9), 1),  # a part of a value
    ],
)
def test_import_goes_by_the_newest_meta_page(tmp_path, at, meta, cached):
    data = make_bolt(BOLT_VALUE) + bolt_page(4, 2, [], 4096)
    assert (
        imported(tmp_path, overwritten(data.ljust(65536, b"\0"), at, meta))[0].cache
        == cached
    )


def test_import_knows_a_record_by_its_place(tmp_path):
    """The bucket says the ref, and the key the id, but where it is a number."""
    records = {
        b"key": bolt_record(id="other", ref="elsewhere"),
        b"12345678": bolt_record(id="12345678"),
        b"abcdefgh": bolt_record(pid=1),
        b"\0" * 7 + b"\1": bolt_record(id="", pid=2),
        b"1234567": bolt_record(),
    }
    found = imported(tmp_path, {b"history": {b"r": records}})[1].get_execution_history(
        "r"
    )
    # equal instants, in the order of the keys
    expected = [("", 2), ("1234567", 0), ("12345678", 0), ("", 1), ("key", 0)]
    assert [(each.ref, each.id, each.pid) for each in found] == [
        ("r", *e) for e in expected
    ]


@pytest.mark.parametrize(
    "more, count", [([0], 1), ([0, 0], 2), ([1, 0, 0, 1], 4), ([], 1)]
)
def test_import_knows_a_record_without_id_by_all_that_it_says(tmp_path, more, count):
    for pids in ([0], more):  # the second file begins with what the first had, or doesn't
        records = {
            b"%08d" % number: bolt_record(pid=pid) for number, pid in enumerate(pids)
        }
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
    found = {run.id: run.status for run in store.list_background_runs()}
    assert found == {"run": "running", "twice": "completed"}
    assert store.get_process_var_keys("background") == ["a", "b", "c", "d"]
    assert store.get_process_var_keys("other") == ["run", "twice"]
    store.delete_process_bucket("background")
    imported(tmp_path, {b"process": {b"background": moved}})
    assert store.list_process_buckets() == ["other"]


def test_import_leaves_what_the_store_has(store, tmp_path):
    store.set_cache_entry("k", b"mine")
    store.save_background_run(background("k"))
    store.record_execution(record(id="k"))
    for bucket in ("new", "old"):
        store.create_process_bucket(bucket)
        store.set_process_var(bucket, "k", "mine")
    before = dump(store.path)
    theirs = {b"k": b"theirs"}
    tree = {
        b"cache": theirs,
        b"history": {b"build": {b"k": bolt_record()}},
        b"background": {b"k": bolt_run("k")},
        b"process": {b"new": theirs},
        b"old": theirs,
    }
    summary = flowstore.import_bolt(bolt_source(tmp_path, tree), store)
    assert summary == flowstore.ImportSummary(legacy_scopes=1)
    assert dump(store.path) == before


def test_import_into_each_kind_of_target(store, path, tmp_path, monkeypatch):
    source = bolt_source(tmp_path, BOLT_VALUE)
    monkeypatch.setenv("FLOWSTORE_PATH", path)
    with store.session() as session:
        for target in (None, "", path, os.fsencode(path), store, session):
            assert flowstore.import_bolt(os.fspath(source), target).cache == 1
            session.delete_cache_entry("k")
    with store.transaction() as transaction:
        for target in (transaction, store):
            with pytest.raises(RuntimeError):
                flowstore.import_bolt(source, target)
    methods = dict.fromkeys(flowstore.DataStore.__abstractmethods__)
    own = type("OwnStore", (flowstore.DataStore,), methods)()
    for target, kind in ((own, TypeError), (1, TypeError), (":memory:", ValueError)):
        with pytest.raises(kind):
            flowstore.import_bolt(source, target)
    with pytest.raises(flowstore.CorruptStoreError, match="bbolt"):
        flowstore.import_bolt(source, source)
    assert store.list_cache_keys() == []
    assert source.read_bytes() == make_bolt(BOLT_VALUE)


def test_import_that_fails_in_the_middle_changes_nothing(store, path, tmp_path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE process_vars ADD more CHECK (key <> 'k')")
    with pytest.raises(flowstore.StoreError):
        imported(tmp_path, {**BOLT_VALUE, b"s": {b"k": b"v"}})
        flowstore.import_bolt(tmp_path / "store.db", path)
    assert store.list_cache_keys() == []


# ---- files of the original: what can't be read ----


def test_import_names_what_it_cant_read_and_brings_over_the_rest(tmp_path):
    no_records = {
        b"0": (b"x", "JSON"),
        b"1": (b"[]", "JSON"),
        b"2": (b"\xff", "UTF-8"),
        b"3": (b'{"x":' + b"[" * 500_000, "JSON"),
        b"4": (b'{"pid":' + b"9" * 5000 + b"}", "JSON"),
        b"5": (b"{}", "startedAt is missing"),
        b"6": (bolt_record(completedAt="0000-12-31T23:59:59Z"), "completedAt"),
        b"7": (bolt_record(pid=2**63), "pid"),
        b"8": (bolt_record(error="\0"), "error .*NUL"),
        b"9": (bolt_record(error="\ud800"), "error .*surrogate"),
        b"\xff": (bolt_record(), "id is no UTF-8"),
    }
    values = {key: value for key, (value, _) in no_records.items()}
    tree = {
        b"top": b"v",
        b"\xff": {b"k": b"v"},
        b"old": {b"bucket": {}, b"good": b"v"},
        b"cache": {b"bucket": {b"x": b"y"}, b"\xff": b"", b"\0": b"", b"good": b"\xff\0"},
        b"background": {**values, b"bucket": {}, b"good": bolt_run("good")},
        b"history": {
            b"value": b"v",
            b"\xff": {b"id": bolt_record()},
            b"r": {**values, b"bucket": {}, b"good": bolt_record()},
        },
        b"process": {
            b"value": b"v",
            b"s": {b"bucket": {}, b"a": b"\xff", b"b": b"\0", b"good": b"v"},
            b"background": {b"run": bolt_run("run", startedAt="yesterday")},
        },
    }
    expected = {
        ("", "top"): "a value, where a bucket belongs",
        ("", "\\xff"): "bucket is no UTF-8",
        ("\\xff", "k"): "bucket is no UTF-8",
        ("cache", "\\xff"): "key is no UTF-8",
        ("cache", "\\x00"): "key .*NUL",
        ("history", "value"): "a value, where a bucket belongs",
        ("history/\\xff", "id"): "ref is no UTF-8",
        ("process", "value"): "a value, where a bucket belongs",
        ("process/s", "a"): "value is no UTF-8",
        ("process/s", "b"): "value .*NUL",
        ("process/background", "run"): "startedAt",  # not lost silently
    }
    for place in ("old", "cache", "background", "history/r", "process/s"):
        expected[place, "bucket"] = "a bucket, where a value belongs"
    for key, (_, reason) in no_records.items():
        for place in ("background", "history/r"):
            expected[place, key.decode("utf-8", "backslashreplace")] = reason
    summary, _ = imported(tmp_path, tree)
    found = {problem[:2]: problem[2] for problem in summary.problems}
    assert {
        place for place in expected if re.search(expected[place], found[place])
    } == set(found)
    assert summary[:7] == (1, 1, 1, 2, 2, 0, 2)


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
    with pytest.raises(flowstore.StoreError, match=words) as caught:
        flowstore.import_bolt(source, tmp_path / "new" / "target.db")
    assert isinstance(caught.value, flowstore.CorruptStoreError) == (content is not None)
    assert caught.value.path == str(source)
    assert str(caught.value).startswith(f"{source}: ")
    assert not (tmp_path / "new").exists()


def test_import_of_a_store_that_is_open_here_leaves_its_locks(store, path, tmp_path):
    """Closing a second descriptor would drop them: others would take the log away."""
    with store.session() as session:
        session.set_process_var("root", "a", "1")
        with pytest.raises(flowstore.StoreError, match="open"):
            flowstore.import_bolt(path, tmp_path / "target.db")
        code = "flowstore.SQLiteDataStore(sys.argv[1]).set_process_var('root', 'b', '2')"
        output_of(code, path)
        assert os.path.exists(f"{path}-wal")
        assert session.get_all_process_vars("root") == {"a": "1", "b": "2"}


def test_import_waits_for_the_lock_of_its_source(path, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    source = bolt_source(tmp_path, BOLT_VALUE)
    with open(source, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(flowstore.StoreBusyError) as caught:
            flowstore.import_bolt(source, flowstore.SQLiteDataStore(path, timeout=0.05))
        assert caught.value.path == str(source)
        # it waits for no other reader
        threading.Timer(0.1, fcntl.flock, (other, fcntl.LOCK_SH)).start()
        assert flowstore.import_bolt(source, path).cache == 1
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and holds the lock no more


# ---- files of the original: damaged ----


@pytest.mark.parametrize("number", [0, 1, 2, 3, 9, 2**32 - 1, 2**63, 2**64 - 1])
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
    assert sorted(problem[:2] for problem in summary.problems) == [
        ("", "short"),
        ("bad", ""),
        ("branch", ""),
        ("cache", ""),
        ("cache", ""),
    ]


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
        st.tuples(st.integers(0, len(BOLT_DAMAGED)), st.binary(min_size=1, max_size=4))
    ),
    st.integers(0, len(BOLT_DAMAGED)) | st.just(None),
    st.booleans(),
)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_import_of_any_damage_gives_an_error_or_a_summary(
    tmp_path_factory, edits, end, metas
):
    data = BOLT_DAMAGED[:end]
    for at, new in edits:
        data = overwritten(data, at, new)
    if metas:
        data = overwritten(data, 0, BOLT_DAMAGED[:1024])
    folder = tmp_path_factory.mktemp("damaged")
    try:
        summary, store = imported(folder, data)
    except flowstore.StoreError as error:
        assert error.path == str(folder / "store.db")
    else:
        found = store.list_background_runs(), store.get_recent_executions(0)
        runs = summary.background + summary.recovered_runs
        assert tuple(map(len, found)) == (runs, summary.history)


# ---- legacy tables ----


def legacy_table(path, name, rows=(), columns="key, value"):
    quoted = name.replace('"', '""')
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f'CREATE TABLE "{quoted}" ({columns})')
        connection.executemany(f'INSERT INTO "{quoted}" (key, value) VALUES (?, ?)', rows)


def test_migrate_moves_tables_of_key_and_value(store, path):
    rows = [
        ("text", "ü"),
        ("null", None),
        ("blob", b"a\xff\0b"),
        ("integer", 7),
        ("real", 1.5),
        (None, "without key"),
        (b"k\xff", ""),
        ("twice", "first"),
        ("twice", "last"),
        ("there", "theirs"),
    ]
    legacy_table(path, "flat", rows, "value, key")
    legacy_table(path, 'odd "name"; --', [("k", "v")], "key TEXT PRIMARY KEY, value TEXT")
    legacy_table(path, "Empty")
    store.set_process_var("flat", "there", "mine")
    names = ["Empty", "flat", 'odd "name"; --']
    assert flowstore.migrate_process_buckets(path) == names
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
    assert flowstore.migrate_process_buckets(path) == []
    assert dump(path) == before


def test_migrate_leaves_all_other_tables(store, path):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for definition in (
            "TABLE more (key, value, more)",
            "TABLE less (key)",
            "TABLE others (key, values_)",
            "VIEW seen AS SELECT key, value FROM cache",
            "INDEX own ON more (key)",
        ):
            connection.execute(f"CREATE {definition}")
    store.set_cache_entry("k", b"v")
    before = dump(path)
    assert flowstore.migrate_process_buckets(path) == []
    assert dump(path) == before


def test_migrate_touches_no_file_but_a_flowstore(path, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWSTORE_PATH", path)
    assert flowstore.migrate_process_buckets() == []
    assert os.listdir(tmp_path) == []
    legacy_table(path, "flat", [("k", "v")])
    before = dump(path)
    with pytest.raises(flowstore.StoreError):
        flowstore.migrate_process_buckets(path)
    assert dump(path) == before


# ---- from store to store ----


@pytest.fixture
def target(tmp_path):
    return flowstore.SQLiteDataStore(tmp_path / "copy.db")


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
    assert flowstore.copy_store(store, target) == (1, 2, 1, 1, 1, 0, 0, ())
    found = {"k": "mine", "mine": "mine", "theirs": "theirs"}
    cache = target.get_cache_entries(found)
    assert {key: value.decode() for key, value in cache.items()} == found
    assert target.get_all_process_vars("s") == found
    assert {run.id: run.error for run in target.list_background_runs()} == found
    labels = [each.label for each in target.get_execution_history("build")]
    assert labels == ["mine", "mine", "alike", "theirs", "alike"]
    assert target.list_process_buckets() == ["mine", "s", "theirs"]
    assert flowstore.copy_store(store, target) == flowstore.ImportSummary()


def test_copy_of_many_rows_keeps_the_order_of_insertion(store, target):
    with store.transaction() as writer:
        for name in map("{:03}".format, range(350)):
            writer.record_execution(record(name[-1], label=name))
            writer.set_cache_entry(name, b"")
            writer.set_process_var(name[0], name, "")
            writer.save_background_run(background(name))
            writer.create_process_bucket(name)
    assert flowstore.copy_store(store, target)[:5] == (350,) * 5
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
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        # another machine's is never judged; without a note it would be, by its number
        connection.execute("UPDATE background SET owner = 'far' || owner")
    flowstore.copy_store(store, target)
    assert target.get_process_var("run", "k") == "v"
    assert target.reconcile() == 1
    statuses = {each.ref: each.status for each in target.get_recent_executions()}
    assert statuses == {"scoped": "failed", "here": "running"}
    assert target.get_background_run("far").status == "running"
    assert target.list_process_buckets() == []  # the run's scope went with it


def test_copy_reads_one_moment(store, target, path):
    with store.transaction() as writer:
        for number in range(2000):
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
        flowstore.copy_store(store, target)
    finally:
        child.kill()
        child.communicate()
    assert target.get_process_var("s", "n").encode() == target.get_cache_entry("n")


def test_copy_never_holds_a_whole_store(store, target):
    with store.transaction() as writer:
        for number in range(2000):
            writer.set_cache_entry(str(number), bytes(10_000))
    tracemalloc.start()
    try:
        assert flowstore.copy_store(store, target).cache == 2000
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_copy_refuses_what_makes_no_sense(store, target, path, tmp_path):
    os.symlink(path, tmp_path / "link")
    with store.session() as session:
        for same in (store, session, flowstore.SQLiteDataStore(tmp_path / "link")):
            with pytest.raises(ValueError, match="itself"):
                flowstore.copy_store(store, same)
    for pair in ((store, path), (path, store), (store, None)):
        with pytest.raises(TypeError):
            flowstore.copy_store(*pair)
    with target.transaction(), pytest.raises(RuntimeError):
        flowstore.copy_store(store, target)
    os.unlink(path)
    with pytest.raises(flowstore.StoreError) as caught:
        flowstore.copy_store(store, target)
    assert (caught.value.path, os.path.exists(path)) == (path, False)


# ---- which store a name is ----


def test_open_store_by_each_kind_of_name(path, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWSTORE_PATH", path)
    for name in (path, os.fsencode(path), tmp_path / "flowstore.db", "", None):
        store = flowstore.open_store(name, timeout=1)
        assert (type(store), store.path) == (flowstore.SQLiteDataStore, path)
    with pytest.raises(ValueError, match="timeout"):
        flowstore.open_store(path, timeout=-1)
    monkeypatch.setenv("FLOWSTORE_PATH", "postgres://user:secret@host")
    for name in ("postgresql://user:secret@host/db", None):
        with pytest.raises(ValueError, match="open_store") as caught:
            flowstore.SQLiteDataStore(name)
        assert "secret" not in str(caught.value)


# ---- the end of a store ----


def test_destroy_removes_the_file_and_nothing_else(store, path, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWSTORE_PATH", path)
    (tmp_path / "other").write_text("stays")
    legacy_table(path, "added")
    for name in (path, path, "", tmp_path / "missing" / "store.db"):
        flowstore.destroy_store(name)  # a missing one is no error
        assert os.listdir(tmp_path) == ["other"]
    assert store.get_all_process_vars("root") == {}
    store.set_process_var("root", "k", "again")
    assert store.get_process_var("root", "k") == "again"


@pytest.mark.parametrize("content", [b"text " * 999, make_bolt(BOLT_VALUE), None])
def test_destroy_refuses_what_is_no_store(path, tmp_path, content):
    file = tmp_path / "flowstore.db"
    if content is None:
        legacy_table(path, "theirs", [("k", "v")])
    else:
        file.write_bytes(content)
    before = file.read_bytes()
    with pytest.raises(flowstore.CorruptStoreError) as caught:
        flowstore.destroy_store(path)
    assert caught.value.path == path
    assert (file.read_bytes(), os.listdir(tmp_path)) == (before, ["flowstore.db"])


def test_destroy_empties_a_store_that_somebody_keeps_open(store, path):
    store.set_process_var("root", "k", "secret")
    child = process(
        "with flowstore.SQLiteDataStore(sys.argv[1]).session() as s:\n"
        "    print(s.get_process_var('root', 'k'), flush=True)\n"
        "    sys.stdin.read(); print(s.get_all_process_vars('root'))",
        path,
    )
    assert child.stdout.readline() == "secret\n"
    with pytest.raises(flowstore.StoreBusyError, match="emptied") as caught:
        flowstore.destroy_store(path)
    assert caught.value.path == path
    assert child.communicate()[0] == "{}\n"
    with open(path, "rb") as stream:
        assert b"secret" not in stream.read()
    assert store.get_all_process_vars("root") == {}
    flowstore.destroy_store(path)
    assert not os.path.exists(path)


# ---- PostgreSQL: many processes ----

FORKING = """
def forked(count, work):
    for number in range(count):
        if not os.fork():
            try:
                work(number)
            except BaseException as error:
                print(number, repr(error), flush=True)
                os._exit(1)
            os._exit(0)
    sys.exit(any([os.wait()[1] for _ in range(count)]))

import contextlib, psycopg
url, *schemas = sys.argv[1:]
def opened(schema=schemas[0], **options):
    return flowstore.PostgresDataStore(url, schema=schema, **{"timeout": 30, **options})
"""
STORMS = {
    "writes of single operations": """
def work(number):
    store = opened()
    with store.session() if number % 2 else contextlib.nullcontext(store) as each:
        for key in range(20):
            each.set_cache_entry(f"{number} {key}", b"")
forked(64, work)
""",
    "variables in transactions": """
def work(number):
    store = opened()
    for _ in range(20):
        with store.transaction() as transaction:
            count = int(transaction.get_all_process_vars("root").get("count", 0))
            transaction.set_process_var("root", "count", str(count + 1))
forked(16, work)
""",
    "openings of fresh schemas": """
def work(number):
    for schema in schemas:
        opened(schema).set_cache_entry(str(number), b"")
forked(16, work)
""",
    "clients of a server that takes less": """
def work(number):
    with opened().session() as session:
        session.set_cache_entry(str(number), b"")
        session.get_cache_entry(str(number))
forked(150, work)
""",
}


@pytest.mark.parametrize(
    ("storm", "found"),
    [*zip(STORMS, ([1280, ""], [0, "320"], [16, ""], [150, ""]))],
    ids=STORMS,
)
def test_nothing_is_lost_by_many_on_a_server(server, storm, found):
    schemas = [server.new_schema() for _ in range(8 if "schemas" in storm else 1)]
    output_of(FORKING + STORMS[storm], server.url(), *schemas)
    for schema in schemas:
        store = server.store(schema=schema)
        count = store.get_all_process_vars("root").get("count", "")
        assert [len(store.list_cache_keys()), count] == found


def test_a_killed_client_leaves_no_lock_and_nothing_of_its_transaction_on_a_server(
    server,
):
    schema = server.new_schema()
    store = server.store(schema=schema)
    child = process(
        "with flowstore.PostgresDataStore(sys.argv[1], schema=sys.argv[2]).transaction() as t:\n"
        "    t.set_cache_entry('k', b'')\n    print('begun', flush=True)\n    sys.stdin.read()",
        server.url(),
        schema,
    )
    assert child.stdout.readline() == "begun\n"
    impatient = server.store(schema=schema, timeout=0.05)
    for write in (
        impatient.transaction().__enter__,
        lambda: impatient.delete_cache_entry("k"),
    ):
        with pytest.raises(flowstore.StoreBusyError, match="try again"):
            write()
    assert store.list_cache_keys() == []  # readers don't wait
    child.kill()
    child.communicate()
    store.set_cache_entry("after", b"")
    assert store.list_cache_keys() == ["after"]


def test_a_killed_server_loses_nothing_and_the_same_objects_go_on(server):
    schema = server.new_schema()
    store = server.store(schema=schema)
    child = process(
        """
store = flowstore.PostgresDataStore(sys.argv[1], schema=sys.argv[2])
with store.session() as session:
    for number in range(10**9):
        for name, each in ("store", store), ("session", session):
            try:
                each.set_cache_entry(f"{name} {number}", b"")
            except flowstore.StoreError as error:
                print("failed", type(error).__name__, flush=True)
            else:
                print(name, number, flush=True)
""",
        server.url(),
        schema,
    )
    acknowledged, failed = [], 0

    def read_until_both(count):
        seen = set()
        nonlocal failed
        while len(seen) < 2 or count > 0:
            line = child.stdout.readline().strip()
            assert line
            count -= 1
            if line.startswith("failed"):
                failed += 1
            else:
                acknowledged.append(line)
                seen.add(line.split()[0])

    read_until_both(40)
    server.stop(signal.SIGKILL)
    server.start()
    read_until_both(40)
    wait_until(lambda: failed or read_until_both(1))
    child.kill()
    child.communicate()
    assert set(acknowledged) <= set(store.list_cache_keys())


# ---- PostgreSQL: what goes wrong is one line without the password ----


def refused_line(error):
    """The message of a StoreError, which is one line, and shows no password anywhere."""
    shown = "".join(traceback.format_exception(error))
    for secret in (PASSWORD, quote(PASSWORD, safe=""), "pa:ss", "o?r#d", "hidden"):
        assert secret not in shown
    assert "\n" not in str(error) and str(error).startswith(
        f"{error.path}: postgresql"[:10]
    )
    return str(error)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"password": "hidden"}, "wrong password"),
        ({"database": "missing"}, "no such database"),
        ({"user": "nobody"}, "wrong password"),  # the server doesn't tell more
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
        "DO $$ BEGIN CREATE ROLE guest LOGIN; EXCEPTION WHEN duplicate_object THEN END $$",
        f"ALTER ROLE guest PASSWORD '{PASSWORD}'",
    )
    url = server.tcp_url(**options)
    with pytest.raises(flowstore.StoreError) as caught:
        flowstore.PostgresDataStore(url, schema="refused", timeout=0.5)
    line = refused_line(caught.value)
    assert words in line and f"@127.0.0.1:{server.port}/" in line
    assert not isinstance(caught.value, flowstore.StoreBusyError)


def test_too_many_clients_are_waited_for_up_to_the_timeout_on_a_server(server):
    import psycopg

    with contextlib.ExitStack() as stack, pytest.raises(psycopg.OperationalError):
        store = server.store(timeout=0.1)
        while True:
            try:
                stack.enter_context(psycopg.connect(server.url()))
            except psycopg.OperationalError:
                with pytest.raises(
                    flowstore.StoreBusyError, match="too many clients"
                ) as caught:
                    store.set_cache_entry("k", b"")
                refused_line(caught.value)
                raise


def test_without_the_driver_the_error_says_how_to_get_it():
    code = """
sys.modules["psycopg"] = None
try:
    flowstore.open_store("postgresql://me:hidden@host/")
except flowstore.StoreError as error:
    print(error)
"""
    line = output_of(code)
    assert "pip install 'flowstore[postgres]'" in line
    assert line.startswith("postgresql://me@host/: ") and line.count("\n") == 1


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
    ("url", "path", "given"),
    [
        ("postgresql://me:hidden:b?c#d[@h:1/d", "postgresql://me@h:1/d", "flowstore"),
        (
            "postgres://me@h/d?schema=a%3Ab&x=1",
            "postgres://me@h/d?schema=a%3Ab&x=1",
            "a:b",
        ),
        (
            "postgresql:///d?x=1&password=hidden&schema=y",
            "postgresql:///d?x=1&schema=y",
            "y",
        ),
        (
            "postgresql://?user=me&sslpassword=hidden",
            "postgresql://?user=me",
            "flowstore",
        ),
    ],
)
def test_the_path_is_the_url_without_a_password_on_a_server(server, url, path, given):
    store = flowstore.PostgresDataStore(url, connect=server.psycopg)
    assert store.path == path and repr(store) == f"PostgresDataStore({path!r})"
    with store.execution("r") as run:
        child_url = run.env["FLOWSTORE_PATH"]
    assert f"schema={quote(given)}" in child_url and ("hidden" in url) == (
        "hidden" in child_url
    )
    assert server.sql(f'SELECT ref FROM "{given}".history') == [("r",)]
    flowstore.destroy_store(server.url(schema=given))


@pytest.mark.parametrize(
    ("error", "options"),
    [(ValueError, {"schema": ""}), (ValueError, {"schema": "é" * 32}),
     (ValueError, {"schema": "a\0"}), (TypeError, {"schema": b"s"}),
     (ValueError, {"timeout": -1}), (TypeError, {"timeout": "3"})],
)  # fmt: skip
def test_wrong_options_are_refused(error, options):
    with pytest.raises(error):
        flowstore.PostgresDataStore("postgresql://", connect=lambda: 1 / 0, **options)


@pytest.mark.parametrize("each", KINDS[3:], indirect=True)
def test_a_name_has_up_to_1300_bytes(each):
    long = "é" * 650
    each.set_process_var(long, long, "v")
    each.record_execution(record(long, id=long))
    assert each.get_all_process_vars(long) == {long: "v"}
    assert each.get_execution_history(long) == [record(long, id=long)]
    for name in (long + "x", "x" * 1301):
        with pytest.raises(ValueError, match="at most 1300 bytes"):
            each.set_cache_entry(name, b"")


# ---- PostgreSQL: roles, settings, schemas ----


def test_settings_of_the_role_and_what_connect_left_open_change_nothing_on_a_server(
    server,
):
    schema = server.new_schema()
    settings = {
        "search_path": "pg_catalog", "default_transaction_read_only": "on",
        "default_transaction_isolation": "serializable", "client_encoding": "LATIN1",
        "bytea_output": "escape", "statement_timeout": "50", "lock_timeout": "1",
        "idle_in_transaction_session_timeout": "1", "default_transaction_deferrable": "on",
        "DateStyle": "German", "TimeZone": "Asia/Tokyo",
    }  # fmt: skip
    server.sql(
        "CREATE ROLE strange LOGIN SUPERUSER",
        *(
            f"ALTER ROLE strange SET {name} = '{value}'"
            for name, value in settings.items()
        ),
    )

    def connect():
        driver = pytest.importorskip("pg8000.dbapi", reason=NO_DRIVER)
        connection = driver.connect("strange", **server.by_socket())
        connection.autocommit = True
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
        store.record_execution(record("\U0001f600", id="1"))
        assert store.get_execution_history("\U0001f600") == [record("\U0001f600", id="1")]
        with pytest.raises(ValueError, match="into itself"):
            flowstore.copy_store(store, server.store(schema=schema))


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
    with reader.session() as session:
        for each in (reader, session):
            assert each.get_cache_entry("k") == b"v"
            with pytest.raises(flowstore.StoreError, match="lacks a right"):
                each.set_cache_entry("k", b"")
    server.sql(f"REVOKE USAGE ON SCHEMA {schema} FROM reader")
    with pytest.raises(flowstore.StoreError, match="lacks a right"):
        reader.get_cache_entry("k")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("DROP TABLE {0}.cache", "cache"),
        (
            "DROP SCHEMA {0} CASCADE; CREATE SCHEMA {0} CREATE TABLE t (x int)",
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
    with pytest.raises(flowstore.StoreError, match=words):
        store.set_cache_entry("k", b"")
    for refused in (
        lambda: server.store(schema=schema),
        lambda: flowstore.destroy_store(server.url(schema=schema)),
    ):
        with pytest.raises(flowstore.StoreError, match=words) as caught:
            refused()
        assert repr(schema) in str(caught.value)
    assert server.sql(query) == before


@pytest.mark.parametrize("others", [False, True])
def test_destroying_drops_the_stores_own_tables_alone_on_a_server(server, others):
    schema = server.new_schema()
    store = server.store(schema=schema)
    if others:
        server.sql(f"CREATE TABLE {schema}.mine (x int)")
    for _ in range(2):  # a missing one is no error, and isn't made
        flowstore.destroy_store(server.url(schema=schema))
        tables = server.sql(
            f"SELECT tablename FROM pg_tables WHERE schemaname = '{schema}'"
        )
        schemas = server.sql(f"SELECT 1 FROM pg_namespace WHERE nspname = '{schema}'")
        assert (tables, len(schemas)) == ([("mine",)] if others else [], int(others))
        if others:
            server.sql(f"DROP TABLE {schema}.mine", f"DROP SCHEMA {schema}")
            others = False
    assert store.get_cache_entry("k") is None and store.list_execution_refs() == []
    with store.session() as session:
        session.set_cache_entry("k", b"new")
        assert store.get_cache_entry("k") == b"new"


# ---- PostgreSQL: sessions, transactions, forks ----


def test_another_handle_in_its_thread_may_not_write_whatever_its_url_on_a_server(server):
    schema = server.new_schema()
    urls = (server.url(), server.tcp_url(query=f"?schema={schema}"))
    first, second = (flowstore.PostgresDataStore(url, schema=schema) for url in urls)
    with first.transaction() as transaction:
        for write in (
            second.transaction().__enter__,
            lambda: second.delete_cache_entry("k"),
        ):
            with pytest.raises(RuntimeError, match="would wait for itself"):
                write()
        server.store().set_cache_entry("k", b"another store")
        transaction.set_cache_entry("k", b"v")
    assert second.get_cache_entry("k") == b"v"
    with pytest.raises(ValueError, match="into itself"):
        flowstore.copy_store(first, second)


def test_a_lost_connection_is_replaced_once_but_not_in_a_transaction_on_a_server(server):
    store = server.store()
    lose = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    with store.session() as session:
        for _ in range(2):
            server.sql(f"{lose} AND backend_type = 'client backend'")
            session.set_cache_entry("k", b"1")
        with (
            pytest.raises(flowstore.StoreError, match="rolled back"),
            session.transaction() as t,
        ):
            t.set_cache_entry("k", b"2")
            server.sql(f"{lose} AND backend_type = 'client backend'")
            with pytest.raises(flowstore.StoreError, match="see that it runs"):
                t.set_cache_entry("k", b"3")
        assert session.get_cache_entry("k") == b"1"


def test_an_error_while_committing_says_that_the_outcome_is_unknown_on_a_server(server):
    import psycopg

    fails = []

    class Losing(psycopg.Connection):
        def commit(self):
            if fails:
                raise psycopg.OperationalError(
                    "connection lost at postgres://me:hidden@h/"
                )
            super().commit()

    store = server.store(connect=lambda: Losing.connect(server.url(), autocommit=True))
    session = store.session()
    with session as each:
        fails.append(True)
        with pytest.raises(
            flowstore.StoreError, match="whether that has taken effect"
        ) as caught:
            each.set_cache_entry("k", b"")
    refused_line(caught.value)


@pytest.mark.parametrize("driver", ["psycopg", "pg8000"])
def test_a_forked_child_leaves_its_parents_session_alone_on_a_server(server, driver):
    store = server.store(**({"connect": server.pg8000} if driver == "pg8000" else {}))
    with store.session() as session, session.transaction() as transaction:
        transaction.set_cache_entry("parent", b"")
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(BaseException):
                for each in (session, transaction):
                    with pytest.raises(RuntimeError, match="fork"):
                        each.list_cache_keys()
                assert store.list_cache_keys() == []
                code = 0
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        transaction.set_cache_entry("k", b"")
    assert store.list_cache_keys() == ["k", "parent"]


# ---- copy_store() between the engines, and another driver ----


@pytest.fixture
def some_store(server, tmp_path):
    """What makes an empty store of a kind."""

    def make(kind):
        if kind == "file":
            return flowstore.SQLiteDataStore(tmp_path / server.new_schema())
        return server.store(**({"connect": server.pg8000} if kind == "pg8000" else {}))

    return make


def everything(store):
    """All that a store holds; equal instants are in the order of insertion."""
    return (
        store.get_cache_entries(store.list_cache_keys()),
        store.get_all_execution_history(),
        store.list_background_runs(),
        {each: store.get_all_process_vars(each) for each in store.list_process_buckets()},
    )


@pytest.mark.parametrize(
    ("source", "target"),
    [("file", "server"), ("server", "file"), ("file", "pg8000"), ("pg8000", "server")],
)
def test_a_copy_has_all_and_what_is_there_wins(some_store, source, target):
    old, new = some_store(source), some_store(target)
    gone = process("sys.stdin.read()")
    with old.transaction() as writer:
        for number in range(102):
            writer.set_cache_entry(f"k{number}", bytes(range(256)) * number)
        for number in range(20):
            writer.record_execution(
                record(f"r{number % 3}", -number, error="é\U0001f600")
            )
            writer.record_execution(record("same", duration=timedelta.max / 10**6))
        writer.record_execution(record(id="1", status="running", pid=gone.pid))
        writer.record_execution(record(id="2", completed_at=START, exit_code=-(2**63)))
        writer.save_background_run(background(status="running", pid=os.getpid()))
        writer.save_background_run(background("b2", ref="", completed_at=START))
        gone.communicate()
        writer.create_process_bucket("empty")
        for bucket in ("root", "scope"):
            writer.set_process_var(bucket, "a", bucket)
    new.set_process_var("root", "a", "theirs")
    assert flowstore.copy_store(old, new) == (102, 42, 2, 1, 1, 0, 0, ())
    assert flowstore.copy_store(old, new) == (*[0] * 7, ())
    assert new.get_process_var("root", "a") == "theirs"
    old.set_process_var("root", "a", "theirs")
    assert everything(new) == everything(old)
    assert new.reconcile() == 1  # by the owners' notes, which came along


# ---- the command line: helpers ----


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


def terminal(*arguments, store, columns=80, typed="", stdout=None, **variables):
    """Run the command line on a terminal of its own: its exit status, and what it shows.
    With stdout only its standard input and error are the terminal."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    os.write(ours, typed.encode())
    child = subprocess.Popen(
        [sys.executable, MODULE, *arguments],
        stdin=its,
        stdout=its if stdout is None else stdout,
        stderr=its,
        env=environment(**{"TERM": "xterm", **variables}, FLOWSTORE_PATH=store, TZ="UTC"),
    )
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: nobody has it open any more
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    return child.wait(60), shown.decode().replace("\r\n", "\n")


def columns_of(text):
    """How many columns of a terminal a text takes."""
    zero = "Mn", "Me", "Cf"
    wide = [unicodedata.east_asian_width(each) in "WF" for each in text]
    return sum(
        1 + is_wide
        for each, is_wide in zip(text, wide, strict=True)
        if unicodedata.category(each) not in zero
    )


@pytest.fixture
def filled_path(store):
    """A store with some of everything."""
    store.set_process_var("root", "A", "one\ntwo")
    store.set_process_var("root", "B", "Ünï 漢字")
    store.set_cache_entry("key", b"\xff")
    second = timedelta(seconds=1)
    done = {"duration": second * 1.5, "status": "completed"}
    store.record_execution(record("build", 0, id="b1", label="first", **done))
    failed = {"duration": second, "status": "failed", "exit_code": 3, "error": "boom"}
    store.record_execution(record("build", 2, id="b2", **failed))
    store.record_execution(record("test", 1, duration=second * 70, command="make test"))
    store.save_background_run(background())
    return store


ROWS = {
    "b2": "failed\t2024-05-06T07:10:09.123456Z\tbuild\t1.000\t3\tb2\tboom\n",
    "test": "completed\t2024-05-06T07:09:09.123456Z\ttest\t70.000\t0\t\tmake test\n",
    "b1": "completed\t2024-05-06T07:08:09.123456Z\tbuild\t1.500\t0\tb1\tfirst\n",
}

# ---- the command line: what is wrong, and what to do ----

AGES = "an age or a time (30d, 12h, 2w, 90m, 2024-05-31 or 2024-05-31T18:30)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("histroy", "there is no command 'histroy': did you mean history?"),
        ("frobnicate", "there is no command 'frobnicate': `flowstore help` lists them"),
        ("help destory", "there is no command 'destory': did you mean destroy?"),
        ("get", "get needs KEY: flowstore get KEY"),
        ("set", "set needs KEY: flowstore set KEY [VALUE]"),
        ("backup", "backup needs FILE: flowstore backup FILE"),
        ("get A B", "get takes one KEY: quote 'A B'"),
        ("history build app", "history takes one REF: quote 'build app'"),
        ("set KEY my secret", "set takes one VALUE: quote it"),
        ("list -- A", "list takes no argument: leave 'A' out"),
        ("history --statsu x", "history has no option --statsu: did you mean --status?"),
        ("history --stat=x", "history has no option --stat: did you mean --status?"),
        (
            "get -K",
            "get has no option -K: put -- before a word with a dash",
        ),
        (
            "set KEY -secret",
            "set has no such option: put -- before a word with a dash",
        ),
        (
            "history -K 5",
            "history has no option -K: put -- before a word with a dash",
        ),
        ("-x", "there is no option -x: see `flowstore help`"),
        ("--stroe x.db list", "there is no option --stroe: did you mean --store?"),
        ("list -json", "list has no option -json: did you mean --json?"),
        ("list --bogus", "list has no option --bogus: leave it out"),
        ("hist", "there is no command 'hist': did you mean history?"),
        (
            "import postgresql://u:hidden@h/d b",
            "import takes one FILE: quote 'postgresql://u@h/d b'",
        ),
        (
            "--stor postgresql://u:hidden@h/d get",
            "there is no option --stor: did you mean --store?",
        ),
        (
            "get KEY --json=1",
            "--json takes no value",
        ),
        ("get KEY --store", "--store takes a value: --store PATH"),
        ("get KEY --store=", "--store takes a value: --store PATH"),
        ("--store= get KEY", "--store takes a value: --store PATH"),
        ("history -n", "-n takes a value: -n N"),
        ("history -n x", "-n takes a number, 0 or more, not 'x'"),
        ("history -n -5", "-n takes a number, 0 or more, not '-5'"),
        (
            "history -n 99999999999999999999",
            "-n takes a number, 0 or more, not '99999999999999999999'",
        ),
        ("prune --keep 1.5", "--keep takes a number, 0 or more, not '1.5'"),
        ("prune", "prune needs --keep N, --before AGE, or both"),
        ("prune --before soon", f"--before takes {AGES}, not 'soon'"),
        (
            "prune --before 99999999999999d",
            f"--before takes {AGES}, not '99999999999999d'",
        ),
        ("history --since 5y", f"--since takes {AGES}, not '5y'"),
        ("history --since 9999999d", f"--since takes {AGES}, not '9999999d'"),
        ("history --since 2024-02-30", f"--since takes {AGES}, not '2024-02-30'"),
        ("destroy", "destroy needs --yes where nobody can be asked"),
    ],
)
def test_usage_error_names_what_is_wrong(said, path, arguments, message):
    assert said(*arguments.split()) == (2, "", f"flowstore: {message}\n")
    assert not os.path.exists(path)


@pytest.mark.parametrize("command", ["import", "backup"])
def test_an_empty_name_is_no_file(said, command):
    message = f"flowstore: {command} needs FILE: flowstore {command} FILE\n"
    assert said(command, "") == (2, "", message)


def test_a_store_in_memory_is_none_wherever_it_is_named(said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWSTORE_PATH", ":memory:")
    for make in (flowstore.default_path, flowstore.SQLiteDataStore):
        with pytest.raises(ValueError, match="every operation opens it"):
            make()
    with pytest.raises(ValueError, match="every operation opens it"):
        flowstore.SQLiteDataStore(":memory:")
    assert os.listdir(tmp_path) == []


def test_help_says_what_a_command_does_with_an_example_that_is_right(said):
    _, overview, _ = said()
    assert said("help") == said("--help") == said("-h") == (0, overview, "")
    names = re.findall(r"^  (\w+) .*  [A-Z].*\.$", overview, re.MULTILINE)
    assert {"set", "get", "history", "import", "destroy", "help"} <= set(names)
    for name in names:
        status, text, err = said(name, "--help")
        assert (status, err) == (0, "") and said("help", name) == (0, text, "")
        usage, _, sentence, *_, example = text.splitlines()
        if name != "help":
            assert usage.startswith(f"usage: flowstore {name}")
            assert sentence in overview and sentence[-1] == "."
        assert all(len(line) <= 90 for line in text.splitlines())
        assert re.search(r"^  --store PATH +\w", text, re.MULTILINE)
        words = example.removeprefix("example: flowstore ").partition(" -- ")
        assert said(*words[0].split(), "--help", *words[1:]) == (0, text, "")
    assert said("--version") == (0, f"flowstore {flowstore.__version__}\n", "")


# ---- the command line: what each command prints ----


@pytest.mark.parametrize(
    ("arguments", "text", "document"),
    [
        ("get B", "Ünï 漢字\n", "Ünï 漢字"),
        ("get A", "one\ntwo\n", "one\ntwo"),
        ("list", "A\tone\\ntwo\nB\tÜnï 漢字\n", {"A": "one\ntwo", "B": "Ünï 漢字"}),
        ("history", ROWS["b2"] + ROWS["test"] + ROWS["b1"], ["b2", None, "b1"]),
        ("history build", ROWS["b2"] + ROWS["b1"], ["b2", "b1"]),
        ("history -n1", ROWS["b2"], ["b2"]),
        ("history build -n 0", ROWS["b2"] + ROWS["b1"], ["b2", "b1"]),
        ("history --status failed", ROWS["b2"], ["b2"]),
        ("history --status=completed", ROWS["test"] + ROWS["b1"], [None, "b1"]),
        ("history --since 2024-05-06T07:09:00Z", ROWS["b2"] + ROWS["test"], ["b2", None]),
        ("-n 2 history --since=20240101", ROWS["b2"] + ROWS["test"], ["b2", None]),
        (
            "prune --keep 1",
            "history\t1\nbackground\t0\n",
            {"history": 1, "background": 0},
        ),
        (
            "prune --before 1w",
            "history\t3\nbackground\t1\n",
            {"history": 3, "background": 1},
        ),
    ],
)
def test_prints_text_for_people_and_a_document_for_programs(
    said, filled_path, path, arguments, text, document
):
    filled_path.backup(f"{path}.2")
    assert said(*arguments.split()) == (0, text, "")
    status, out, err = said("--json", "--store", f"{path}.2", *arguments.split())
    found = json.loads(out)
    if "history" in arguments:
        found = [each.get("id") for each in found]
    assert (status, found, err) == (0, document, "") and out.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message", "document"),
    [
        ("list", "there are no variables", {}),
        ("history", "there are no such runs: `flowstore run` records one", []),
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
    assert said("set", "--global", "K", "1") == said("set", "K2", "-5") == (0, "", "")
    monkeypatch.setenv("FLOW_PROCESS_BUCKET", "a b:c")
    assert said("set", "K", "2", "--json") == said("set", "--", "-k", "-") == (0, "", "")
    assert store.get_all_process_vars("a_b_c") == {"-k": "-", "K": "2", "K2": "-5"}
    assert said("get", "K") == (0, "2\n", "")
    assert said("get", "--global", "K") == (0, "1\n", "")
    assert said("list", "--global") == (0, "K\t1\nK2\t-5\n", "")
    assert said("remove", "K") == said("remove", "K") == (0, "", "")
    assert said("get", "K") == (0, "1\n", "")
    assert said("clear") == said("clear", "--global") == (0, "", "")
    assert store.list_process_buckets() == []
    status, out, err = said("get", "K")
    reason = "there is no variable 'K' in the scope 'a_b_c' or in 'root'"
    assert (status, out, err) == (1, "", f"flowstore: {store.path}: {reason}\n")


def test_forget(said, filled_path):
    assert said("forget", "build") == said("forget", "nobody", "--json") == (0, "", "")
    assert filled_path.list_execution_refs() == ["test"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [(b"", ""), (b"\n", ""), (b"x\r\n\n", "x\r\n"), ("ü".encode(), "ü")],
)
def test_a_value_from_standard_input_loses_one_newline(store, given, kept):
    assert cli("set", "K", store=store.path, input=given) == (0, "", "")
    assert store.get_process_var("root", "K") == kept
    _, out, _ = cli("get", "K", store=store.path)
    assert out == f"{kept}\n"


def test_text_is_utf_8_whatever_the_terminal_has(store):
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    assert cli("set", "Ü", "漢字", store=store.path, **plain) == (0, "", "")
    assert cli("get", "Ü", store=store.path, **plain) == (0, "漢字\n", "")
    assert cli("get", b"\xff", store=store.path) == (
        *(2, ""),
        "flowstore: key must not have a lone surrogate\n",
    )
    assert cli("set", "K", store=store.path, input=b"\xff") == (
        *(2, ""),
        "flowstore: value must not have a lone surrogate\n",
    )


def test_a_path_may_have_any_bytes_and_is_shown_in_one_line(tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xff\n\x1b[31m.db"
    done = subprocess.run(
        [sys.executable, MODULE, "path", b"--store", odd],
        capture_output=True,
        env=environment(),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, odd + b"\n", b"")
    status, _, err = cli("--store", odd, "check")
    assert status == 1
    assert err.startswith(
        f"flowstore: {tmp_path}/\\xff\\n\\x1b[31m.db: there is no store"
    )


# ---- the command line: the store as a whole ----


def test_check_verifies_and_counts(said, filled_path):
    status, out, err = said("check", "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    rows = {"cache": 1, "history": 3, "background": 1, "process_vars": 2}
    assert rows.items() <= report.items() and report["process_buckets"] == 0
    assert (report["path"], report["check"]) == (filled_path.path, "ok")
    assert report["size"] == os.path.getsize(filled_path.path) and report["free"] >= 0
    assert said("check") == (0, "".join(f"{k}\t{v}\n" for k, v in report.items()), "")
    with sqlite3.connect(filled_path.path) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_master SET rootpage = 2 WHERE name = 'history_by_ref'"
        )
    connection.close()
    status, out, err = said("check")
    assert (status, out) == (1, "") and "it is damaged" in err


def test_path(said, path, monkeypatch):
    assert said("path") == (0, f"{path}\n", "")
    assert said("path", "--json", "--store=other.db") == (
        *(0, json.dumps(os.path.abspath("other.db")) + "\n"),
        "",
    )
    monkeypatch.delenv("FLOWSTORE_PATH")
    monkeypatch.setenv("FLOW_CACHE_DIR", os.path.dirname(path))
    original = os.path.join(os.path.dirname(path), "store.db")
    with open(original, "wb"):
        pass
    hint = "flowstore: the original's store is here, and no flowstore yet: bring it over"
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
    assert said("backup", target, "--json") == (0, "", "")
    assert flowstore.SQLiteDataStore(target).get_cache_entry("key") == b"\xff"
    reason = "something is there already: name a new file"
    assert said("backup", target) == (1, "", f"flowstore: {target}: {reason}\n")


def test_migrate_moves_legacy_tables(said, store):
    connection = sqlite3.connect(store.path)
    for bucket in "old", "older":
        connection.execute(f"CREATE TABLE {bucket} (key, value)")
        connection.execute(f"INSERT INTO {bucket} VALUES ('K', 'V')")
    connection.commit()
    connection.close()
    assert said("migrate") == (0, "old\nolder\n", "")
    assert said("migrate", "--json") == (0, "[]\n", "")
    assert store.get_all_process_vars("old") == {"K": "V"}


def test_import_brings_over_a_flowstore_file(said, filled_path, tmp_path):
    target = str(tmp_path / "target.db")
    counts = dict.fromkeys(flowstore.ImportSummary._fields, 0)
    counts.update(cache=1, history=3, background=1, process_vars=2)
    status, out, err = said("--store", target, "import", filled_path.path, "--json")
    assert (status, json.loads(out), err) == (0, {**counts, "problems": []}, "")
    del counts["problems"]
    text = "".join(f"{name}\t0\n" for name in counts)
    assert said("--store", target, "import", filled_path.path) == (0, text, "")
    assert flowstore.SQLiteDataStore(target).list_execution_refs() == ["build", "test"]


def test_import_lists_what_it_could_not_bring_over(said, store, tmp_path):
    source = flowstore.SQLiteDataStore(tmp_path / "source.db")
    source.set_cache_entry("good", b"")
    connection = sqlite3.connect(source.path)
    connection.execute("INSERT INTO cache VALUES ('bad' || char(0), x'00')")
    connection.commit()
    connection.close()
    reason = "key must not have a NUL character"
    status, out, err = said("import", source.path, "--json")
    problem = {"bucket": "cache", "key": "bad\0", "reason": reason}
    found = json.loads(out)
    assert (status, found["cache"], found["problems"]) == (1, 1, [problem])
    assert err == f"flowstore: not brought over: cache bad\\x00 {reason}\n"


def test_import_brings_over_a_file_of_the_original(said, store, tmp_path):
    source = bolt_source(tmp_path, make_bolt({b"cache": {b"k": b"v", b"\xff": b""}}))
    status, out, err = said("import", source)
    assert status == 1 and out.startswith("cache\t1\nhistory\t0\n")
    assert err.startswith("flowstore: not brought over: cache \\xff ")
    assert store.get_cache_entry("k") == b"v"


def test_import_names_what_it_can_not_read(said, store, tmp_path):
    missing, text, other = (str(tmp_path / name) for name in ("missing", "text", "other"))
    assert said("import", missing) == (
        1,
        "",
        f"flowstore: {missing}: there is no such file\n",
    )
    with open(text, "w") as stream:
        stream.write("no database, but a long text" * 1000)
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE of_somebody_else (key, value)")
    connection.close()
    for file, words in ((text, "file of the original"), (other, "another program's")):
        status, out, err = said("import", file)
        assert (status, out) == (1, "") and err.count("\n") == 1
        assert err.startswith(f"flowstore: {file}: ") and words in err
    reason = "a store can't be copied into itself"
    assert said("import", store.path) == (2, "", f"flowstore: {store.path}: {reason}\n")


def test_what_a_server_has_no_use_for_says_what_to_do(said):
    pytest.importorskip("psycopg", reason="pip install 'flowstore[postgres]'")
    store = "--store", "postgresql://me:hidden@127.0.0.1:1/db"
    advice = "use pg_dump, or `flowstore --store FILE import URL`"
    reason = "migrate a file, and `flowstore import` it here"
    for arguments, words in ((("backup", "x"), advice), (("migrate",), reason)):
        status, out, err = said(*store, *arguments)
        assert (status, out) == (1, "") and err.endswith(f": {words}\n")
        assert "127.0.0.1" in err and "hidden" not in err
    status, out, err = said(*store, "path", "--json")
    assert status == 0 and "127.0.0.1" in out and "hidden" not in out + err


def test_destroy_asks_on_a_terminal(said, store):
    question = f"Remove {store.path} with all that is in it? [y/N] "
    for typed in "\n", "n\n", "\x04":
        status, shown = terminal("destroy", store=store.path, typed=typed)
        assert status == 1 and question in shown and "nothing was removed" in shown
    assert os.path.exists(store.path)
    status, shown = terminal("destroy", store=store.path, typed="y\n")
    assert status == 0 and question in shown and not os.path.exists(store.path)
    flowstore.SQLiteDataStore(store.path)
    assert said("destroy", "--yes") == said("destroy", "--yes") == (0, "", "")
    assert not os.path.exists(store.path)


def test_a_damaged_store_is_one_line(said, path):
    with open(path, "wb") as stream:
        stream.write(b"no database" * 1000)
    for arguments in (["history"], ["set", "K", "V"], ["check"], ["destroy", "--yes"]):
        status, out, err = said(*arguments)
        assert (status, out) == (1, "") and err.count("\n") == 1
        assert err.startswith(f"flowstore: {path}: it is no SQLite file")


# ---- the command line: on a terminal ----


def test_a_table_fits_its_terminal(filled_path):
    wide = {"label": "漢字かな交じり文" * 20, "exit_code": 1}
    filled_path.record_execution(record("🚀 e\u0301e\u0301 ship", 3, id="x" * 36, **wide))
    filled_path.record_execution(record("a\x1b[2J\u202e\n\x9bb", 4, command="c" * 500))
    for columns in 200, 80, 40, 20:
        plain = {"columns": columns, "NO_COLOR": "1"}
        status, shown = terminal("history", store=filled_path.path, **plain)
        table, _, picture = shown.partition("\n\n")
        lines = table.splitlines()
        assert (status, len(lines), picture) == (0, 6, "build  █▆\n")
        assert max(map(columns_of, lines)) in (columns, columns - 1)  # half a character
        assert not set("\x1b\u202e\x9b") & set(shown)
        if columns >= 80:
            starts = [columns_of(line[: line.index("2024")]) for line in lines[1:]]
            assert set(starts) == {lines[0].index("STARTED")}
    _, shown = terminal("history", store=filled_path.path, columns=200, NO_COLOR="1")
    assert terminal("history", store=filled_path.path, columns=8)[0] == 0
    assert "a\\x1b[2J\\u202e\\n\\x9bb" in shown and "🚀 e\u0301e\u0301 ship" in shown
    assert f"  {'x' * 8}  漢字" in shown and "…\n" in shown


def test_history_on_a_terminal_is_for_people(filled_path):
    running = {"status": "running", "pid": os.getpid(), "id": "now"}
    began = datetime.now(timezone.utc) - timedelta(hours=1, seconds=0.5)
    filled_path.record_execution(flowstore.ExecutionRecord("serve", began, **running))
    status, shown = terminal("history", store=filled_path.path)
    head, now, failed, test, *_ = shown.splitlines()
    assert status == 0 and " ".join(head.split()) == "STARTED REF TOOK EXIT ID NOTE"
    assert re.fullmatch(r"\033\[33m●\033\[0m  .{19}  serve  1:00:0\d       +now", now)
    row = "2024-05-06 07:10:09  build  1.000    3     b2   boom"
    assert failed == f"\033[31m✗\033[0m  {row}"
    assert (
        test
        == "\033[32m✓\033[0m  2024-05-06 07:09:09  test   0:01:10  0          make test"
    )
    assert "\033" not in terminal("history", store=filled_path.path, NO_COLOR="1")[1]
    _, dumb = terminal("history", store=filled_path.path, TERM="dumb")
    assert "\033" not in dumb and f"✗  {row}\n" in dumb
    assert "\033[31m" in terminal("history", store=filled_path.path, NO_COLOR="")[1]
    status, out, _ = cli("history", "serve", store=filled_path.path)
    assert re.fullmatch(r"running\t[^\t]+Z\tserve\t360\d\.\d{3}\t\tnow\t\n", out)


def test_other_tables_on_a_terminal(filled_path):
    _, shown = terminal("list", store=filled_path.path)
    assert shown == "KEY  VALUE\nA    one\\ntwo\nB    Ünï 漢字\n"
    _, shown = terminal("prune", "--keep", "1", store=filled_path.path)
    assert shown == "history     1\nbackground  0\n"
    filled_path.delete_process_bucket("root")
    filled_path.set_process_var("root", "LONG", "漢" * 1_000_000)
    _, shown = terminal("list", store=filled_path.path)
    assert shown == f"KEY   VALUE\nLONG  {'漢' * 36}…\n"
    filled_path.delete_process_bucket("root")
    status, shown = terminal("list", store=filled_path.path)
    assert (status, shown) == (
        0,
        "flowstore: there are no variables\n",
    )


def test_set_says_that_it_reads_from_the_terminal(store):
    status, shown = terminal("set", "K", store=store.path, typed="value\n\x04")
    assert status == 0 and store.get_process_var("root", "K") == "value"
    assert (
        "flowstore: type the value, and end it with Ctrl-D on a line of its own" in shown
    )


def test_progress_is_shown_on_a_terminal_alone(store, tmp_path):
    with store.transaction() as writer:
        for number in range(2500):
            writer.set_cache_entry(f"key {number}", b"x" * 4000)
    source, *targets = (str(tmp_path / name) for name in ("1", "2", "3"))
    for stdout in None, subprocess.DEVNULL:
        target = targets.pop()
        _, shown = terminal("backup", target, store=store.path, stdout=stdout)
        assert re.search(r"\r\d\d %  .*\r", shown) and shown.endswith(f"\r{' ' * 30}\r")
        _, shown = terminal("import", target, "--json", store=source, stdout=stdout)
        assert "\r1,000 entries" in shown and ("{" in shown) == (stdout is None)
        os.unlink(source)
    assert cli("backup", source, store=store.path) == (0, "", "")
    status, out, err = cli("import", source, store=target)
    assert (status, err) == (0, "") and "\r" not in out


# ---- the command line: views, ends and forms of use ----


def test_views_first_mark_what_is_gone(said, store, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    running = {"status": "running", "pid": gone.pid, "id": "r"}
    store.record_execution(record("serve", **running))
    gone.wait()
    with monkeypatch.context() as patch:

        def fail(self):
            raise flowstore.StoreError("it can't be written")

        patch.setattr(flowstore.SQLiteDataStore, "reconcile", fail)
        status, out, err = said("history")
        assert (status, err) == (0, "") and out.startswith("running\t")
    _, out, _ = said("history")
    assert out.startswith("failed\t") and out.endswith(
        "\tr\tprocess exited unexpectedly\n"
    )


def test_an_id_is_found_by_its_beginning_where_one_run_has_it(said, store):
    for minutes, id in enumerate(("abc", "abd", "xyz")):
        store.record_execution(record("build", minutes, id=id))
    store.save_background_run(background(id="abcd"))
    for word, found in ("x", "xyz"), ("abc", "abc"), ("abd", "abd"), ("abcd", "abcd"):
        status, out, err = said("show", word, "--json")
        assert (status, json.loads(out)["id"], err) == (0, found, "")
    message = "flowstore: 3 runs begin with 'ab': give more of it\n"
    assert said("show", "ab") == said("stop", "ab") == (2, "", message)
    status, out, err = said("show", "y")
    assert (status, out) == (1, "") and err.endswith("there is no run 'y'\n")


def test_a_closed_pipe_and_an_interrupt_are_quiet(said, filled_path, monkeypatch):
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, MODULE, "list"],
        stdout=writes,
        stderr=subprocess.PIPE,
        env=environment(FLOWSTORE_PATH=filled_path.path),
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, b"")
    typed = SimpleNamespace(read=lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=typed))
    assert said("set", "K") == (130, "", "")


def test_a_full_disk_is_one_line(filled_path):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, MODULE, "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(FLOWSTORE_PATH=filled_path.path),
        )
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert done.stderr.endswith(b"No space left on device\n")


@pytest.mark.parametrize(
    "form", ["flowstore.py", "-m flowstore", "-m myapp.vendor.flowstore", "flowstore.pyz"]
)
def test_each_form_of_use_is_the_same_program(store, tmp_path, form):
    vendor = tmp_path / "myapp" / "vendor"
    vendor.mkdir(parents=True)
    with open(MODULE, "rb") as module:
        (vendor / "flowstore.py").write_bytes(module.read())
    zipapp.create_archive(vendor, tmp_path / "flowstore.pyz", main="flowstore:main")
    where = tmp_path if "myapp" in form or form.endswith("z") else FOLDER
    store.set_process_var("root", "K", "V")
    for arguments, expected in ((["get", "K"], 0), (["get", "L"], 1), (["got"], 2)):
        done = subprocess.run(
            [sys.executable, *form.split(), *arguments],
            cwd=where,
            capture_output=True,
            env={**environment(FLOWSTORE_PATH=store.path), "PYTHONPATH": ""},
        )
        assert (done.returncode, done.stdout) == (expected, b"" if expected else b"V\n")
        assert done.stderr.startswith(b"flowstore: " if expected else b"")


# ---- runs: execution() ----


def raising(error):
    def body(run):
        raise error

    return body


def setting(**values):
    def body(run):
        for name, value in values.items():
            setattr(run, name, value)

    return body


class Speechless(Exception):
    def __str__(self):
        raise ValueError("no words")


def failing_after(code, error):
    def body(run):
        run.exit_code = code
        raise error

    return body


CALLED = subprocess.CalledProcessError(7, "make")
KILLED = subprocess.CalledProcessError(-9, "make")
ODD = subprocess.CalledProcessError("1", "make")
HUGE = subprocess.CalledProcessError(2**70, "make")
OUTCOMES = [
    # what the body does, the exit code and the error that are recorded
    (setting(), 0, ""),
    (setting(exit_code=3), 3, ""),
    (setting(error="no luck"), 0, "no luck"),
    (setting(exit_code=-15), 143, "killed by SIGTERM"),
    (setting(exit_code=-2, error="Ctrl-C"), 130, "Ctrl-C"),
    (setting(exit_code=-200), 328, "killed by signal 200"),
    (raising(SystemExit()), 0, ""),
    (raising(SystemExit(3)), 3, ""),
    (raising(SystemExit(256)), 0, ""),
    (raising(SystemExit(-1)), 255, ""),
    (raising(SystemExit(2**70)), 255, ""),
    (raising(SystemExit("no disk")), 1, "no disk"),
    (failing_after(5, SystemExit(0)), 0, ""),
    (failing_after(5, ValueError("late")), 5, "ValueError: late"),
    (raising(KeyboardInterrupt()), 130, "KeyboardInterrupt"),
    (raising(CALLED), 7, f"CalledProcessError: {CALLED}"),
    (raising(KILLED), 137, f"CalledProcessError: {KILLED}"),
    (raising(ValueError("wrong \udcff")), 1, "ValueError: wrong \\xff"),
    (raising(Speechless()), 1, "Speechless: <Speechless>"),
    (raising(ODD), 1, "CalledProcessError: <CalledProcessError>"),
    (raising(HUGE), 1, f"CalledProcessError: {HUGE}"),
]


def only_record(store):
    [found] = store.get_recent_executions(0)
    return found


@pytest.mark.parametrize(("body", "exit_code", "error"), OUTCOMES)
def test_end_of_a_run_is_recorded_and_the_bodys_own_exception_goes_on(
    store, body, exit_code, error
):
    raised = []
    try:
        with store.execution("build") as run:
            store.set_process_var(run.bucket, "key", "value")
            try:
                body(run)
            except BaseException as failure:
                raised.append(failure)
                raise
    except BaseException as failure:
        assert [failure] == raised
    ended = only_record(store)
    assert (ended.exit_code, ended.error) == (exit_code, error)
    assert ended.status == ("failed" if exit_code or error else "completed")
    assert ended.completed_at - ended.started_at >= timedelta(0) <= ended.duration
    assert ended.pid == os.getpid()
    assert store.list_process_buckets() == []


def test_run_is_recorded_as_running_in_a_scope_that_a_child_finds(
    store, path, monkeypatch
):
    for name, value in {"SOURCE": "mcp", "CLIENT": "${WHO}", "SESSION": ""}.items():
        monkeypatch.setenv(f"FLOW_RUN_{name}", value)
    monkeypatch.setenv("WHO", "editor")
    with store.execution("build", label="nightly", command="make", spec="s") as run:
        assert (run.ref, run.bucket, run.exit_code, run.error) == ("build", run.id, 0, "")
        assert run.env == {
            **os.environ,
            "FLOW_PROCESS_BUCKET": run.id,
            "FLOWSTORE_PATH": path,
        }
        started = only_record(store)
        assert started == flowstore.ExecutionRecord(
            "build",
            started.started_at,
            id=run.id,
            status="running",
            pid=os.getpid(),
            label="nightly",
            command="make",
            spec="s",
            source="mcp",
            client_name="editor",
            working_dir=os.getcwd(),
        )
        assert store.list_process_buckets() == [run.id]
        run.log_archive_id = "log7"
    assert only_record(store).log_archive_id == "log7"
    given = {"source": "", "client_name": "c", "session_id": "s", "working_dir": "w"}
    with store.execution("build", id="i1", **given):
        found = store.get_execution_history("build")[-1]
        assert {name: getattr(found, name) for name in given} == given
        assert found.id == "i1"


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
        with pytest.raises(flowstore.StoreBusyError):
            store.set_process_var(run.bucket, "key", "value")
        release = threading.Timer(0.3, holder.execute, ["ROLLBACK"])
        release.start()
    release.join()
    holder.close()
    assert only_record(store).status == "completed"


def test_256_runs_that_end_at_once_are_all_recorded(path):
    output_of(
        """
import time
store = flowstore.SQLiteDataStore(sys.argv[1], timeout=30)
begin, go = os.pipe()
children = []
for number in range(256):
    child = os.fork()
    if not child:
        os.close(go)
        try:
            with store.execution("build"):
                os.read(begin, 1)
        finally:
            os._exit(0)
    children.append(child)
while len(store.list_process_buckets()) < 256:
    time.sleep(0.05)
os.close(go)
for child in children:
    os.waitpid(child, 0)
ends = [each.status for each in store.get_recent_executions(0)]
assert ends == ["completed"] * 256 and store.list_process_buckets() == []
""",
        path,
    )


def test_start_that_cannot_be_recorded_is_a_store_error_and_an_end_hides_nothing(
    store, path
):
    def spoil():
        os.remove(path)
        os.mkdir(path)

    with pytest.raises(KeyError) as caught, store.execution("build"):
        spoil()
        raise KeyError("mine")
    assert path in caught.value.__notes__[0]
    with pytest.raises(flowstore.StoreError), store.execution("build"):
        raise AssertionError("the body must not run")


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


def sql(path, statement, *values):
    """What a statement gives in the file of a store."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        return connection.execute(statement, values).fetchall()
    finally:
        connection.close()


def note_with(place, value):
    """What changes one of the four parts of an owner's note."""

    def change(note):
        parts = note.split(" ")
        parts[place] = value
        return " ".join(parts)

    return change


JUDGED = [
    # a change of a note; whether the run is gone while its process lives, and afterwards
    (lambda note: note, False, True),
    (note_with(0, "other@machine"), False, False),
    (note_with(1, "other-boot"), True, True),
    (note_with(2, "pid:[1]"), False, False),
    (note_with(3, "1"), True, True),  # another process has its number by now
    (lambda note: "", False, True),
]


def save_running(store, table, pid, **fields):
    if table == "history":
        store.record_execution(record(id="i1", status="running", pid=pid, **fields))
    else:
        store.save_background_run(background("i1", status="running", pid=pid, **fields))


def status_in(store, table):
    if table == "history":
        return only_record(store).status
    return store.get_background_run("i1").status


@pytest.mark.skipif(sys.platform != "linux", reason="the parts of a note are Linux's")
@pytest.mark.parametrize("table", ["history", "background"])
@pytest.mark.parametrize(("change", "gone_alive", "gone_dead"), JUDGED)
def test_note_tells_whether_a_process_is_still_the_runs(
    store, path, living, table, change, gone_alive, gone_dead
):
    save_running(store, table, living.pid)
    [(note,)] = sql(path, f"SELECT owner FROM {table}")
    for gone in gone_alive, gone_dead:
        statement = f"UPDATE {table} SET status = 'running', owner = ?"
        sql(path, statement, change(note))
        assert store.reconcile() == gone
        assert status_in(store, table) == ("failed" if gone else "running")
        living.kill()
        living.wait()


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
with store.execution("killed", id="mine"), store.execution("killed", bucket="given") as run:
    store.set_process_var("mine", "key", "value")
    store.set_process_var("given", "key", "value")
    run.error = "kept in memory only"
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
    fields = {"status": "running", "pid": ended_pid, "exit_code": 4, "error": "own"}
    store.record_execution(record("other", id="i2", **fields))
    store.save_background_run(
        background("mine", status="running", pid=ended_pid, error="e")
    )
    store.record_execution(record("ended", pid=ended_pid, status="completed"))
    before = datetime.now(timezone.utc)
    assert store.reconcile() == 4
    assert store.reconcile() == 0
    found = {(each.ref, each.id): each for each in store.get_recent_executions()}
    assert found["killed", "mine"][3:5] == (1, GONE)
    assert found["killed", "mine"].completed_at >= before
    assert found["other", "i2"][3:5] == (4, "own")
    assert found["ended", ""].status == "completed"
    run = store.get_background_run("mine")
    assert (run.status, run.error) == ("failed", "e")
    assert run.completed_at >= before
    assert store.list_process_buckets() == ["given", "i2"]


def test_zombie_is_gone(store):
    child = subprocess.Popen(["sleep", "60"])
    save_running(store, "history", child.pid)
    child.kill()
    assert wait_until(store.reconcile) == 1
    child.wait()


# ---- run: as unnoticeable as env ----

FRONT = f"{shlex.quote(sys.executable)} -m flowstore run r --"
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
    "killed": "$run sh -c 'kill -TERM $$' 2>&-; echo $?",
    "killed for good": "$run sh -c 'kill -KILL $$' 2>&-; echo $?",
    "dies of SIGINT": "exec $run sh -c 'kill -INT $$'",
    "streams": "echo in | $run sh -c 'cat; echo err >&2'",
    "words": r"""$run printf '%s|' 'a b' '' '*' -- --json "$(printf '\377')" é""",
    "environment": "$run env | grep -v '^FLOW' | sort",
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
    "not found": "$run nowhere-to-be-found 2>&-; echo $?",
    "not found here": "$run ./nowhere 2>&-; echo $?",
    "nothing to find": "$run '' 2>&-; echo $?",
    "not executable": "touch plain; $run ./plain 2>&-; echo $?",
    "a folder": "mkdir folder; $run ./folder 2>&-; echo $?",
    "a later one in PATH": "$two; touch p/x; chmod -x p/x; PATH=p:q:$PATH; $run x 2",
    "without #!": "$two; $run ./p/x 1 '2 3'",
    "without #! in PATH": "$two; PATH=p:q:$PATH; $run x 1",
    "PATH of here": "$two; cd p; PATH=:/usr/bin:/bin; $run x 1",
}
TWO = """mkdir p q; echo 'echo p $0 "$@"' >p/x; echo 'echo q $0 "$@"' >q/x; chmod +x p/x q/x"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("script", TRANSPARENT.values(), ids=TRANSPARENT)
def test_run_in_front_of_a_command_changes_nothing(tmp_path, script):
    seen = []
    for name, run in ("with", FRONT), ("without", ""):
        folder = tmp_path / name / "same"
        folder.mkdir(parents=True)
        script_here = script.replace("$two", TWO)
        seen.append(
            subprocess.run(
                ["sh", "-c", script_here],
                cwd=folder,
                env=environment(
                    FLOWSTORE_PATH=f"{tmp_path}/s.db", run=run, blocked=BLOCKED
                ),
                capture_output=True,
                timeout=60,
            )
        )
    for each in seen:
        text = each.stdout.replace(b"/with/", b"/without/")
        each.stdout = text.replace(f"run={FRONT}\n".encode(), b"run=\n")
    assert seen[0].stdout == seen[1].stdout
    assert (seen[0].returncode, seen[0].stderr) == (seen[1].returncode, seen[1].stderr)
    assert seen[0].stdout or seen[0].returncode or "true" in script


# ---- run: what is recorded, and where that fails ----


def run_cli(store, *arguments, **options):
    """A process of `flowstore run`, in a session of its own, with pipes of bytes."""
    return subprocess.Popen(
        [sys.executable, "-m", "flowstore", "run", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=environment(FLOWSTORE_PATH=str(store)),
        **options,
    )


def test_record_of_a_command_tells_the_whole_run(path, store, tmp_path):
    command = ["sh", "-c", "exit 3", "two words", "\udcff"]
    words = ["run", "--label", "nightly", "build app", "--", *command]
    assert cli(*words, store=path, FLOW_RUN_CLIENT="cron")[0] == 3
    found = only_record(store)
    assert found[3:5] == (3, "")
    assert (found.ref, found.label, found.status) == ("build app", "nightly", "failed")
    assert (found.source, found.client_name) == ("cli", "cron")
    assert found.command == "sh -c 'exit 3' 'two words' '\\xff'"
    assert found.working_dir == os.getcwd()
    assert store.list_process_buckets() == []
    cli("run", "build app", "--", "true", store=path, FLOW_RUN_SOURCE="mcp")
    assert store.get_recent_executions(1)[0].source == "mcp"


@pytest.mark.parametrize(
    ("command", "status", "error"),
    [
        (["nowhere-to-be-found"], 127, "nowhere-to-be-found: No such file or directory"),
        ([""], 127, ": No such file or directory"),
        (["/"], 126, "/: Permission denied"),
        (["plain"], 126, "plain: Permission denied"),
        (["./plain"], 126, "./plain: Permission denied"),
        (["./lost"], 127, "./lost: No such file or directory"),
        (["sh", "-c", "kill -KILL $$"], 137, "killed by SIGKILL"),
        (["sh", "-c", "kill -USR1 $$"], 128 + signal.SIGUSR1, "killed by SIGUSR1"),
    ],
)
def test_reason_of_a_command_that_fails_to_start_or_is_killed(
    path, store, tmp_path, monkeypatch, command, status, error
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").write_text("true")
    lost = tmp_path / "lost"
    lost.write_text("#!/nowhere/at/all\n")
    lost.chmod(0o755)
    where = f"{tmp_path}:{os.environ['PATH']}"
    said = "" if error.startswith("killed") else f"flowstore: {error}\n"
    assert cli("run", "r", "--", *command, store=path, PATH=where) == (status, "", said)
    assert only_record(store)[3:5] == (status, error)


def test_scope_of_a_run_is_its_own_unless_it_joins(path, store):
    store.set_process_var("root", "base", "rooted")
    script = """
$fs set key outer; $fs run in -- $fs get base
$fs run in -- $fs get key || echo $?
$fs run --join in -- sh -c '$fs get key; $fs set key inner'; $fs get key"""
    ours = f"{shlex.quote(sys.executable)} -m flowstore"
    script = script.replace("$fs", ours)
    status, out, _ = cli("run", "out", "--", "sh", "-c", script, store=path)
    assert (status, out) == (0, "rooted\n1\nouter\ninner\n")
    assert store.list_process_buckets() == ["root"]
    assert (
        cli("run", "--join", "r", "--", *ours.split(), "set", "a", "b", store=path)[0]
        == 0
    )
    assert store.get_process_var("root", "a") == "b"


def make_folder(path):
    os.mkdir(path)


def make_garbage(path):
    with open(path, "w") as file:
        file.write("no store" * 1000)


def make_below_a_file(path):
    make_garbage(os.path.dirname(path))


@pytest.mark.parametrize(
    ("where", "make"),
    [
        ("place", make_folder),
        ("place", make_garbage),
        ("file/place", make_below_a_file),
        ("postgresql://127.0.0.1:1/none?connect_timeout=1", None),
    ],
)
def test_command_runs_and_keeps_its_status_where_there_is_no_store(tmp_path, where, make):
    if make:
        where = str(tmp_path / where)
        make(where)
    command = ["sh", "-c", "cat; echo out; exit 5"]
    status, out, err = cli("run", "r", "--", *command, store=where, input=b"in\n")
    assert (status, out) == (5, "in\nout\n")
    assert len(err.splitlines()) == 1
    assert "the command runs" in err


@pytest.mark.skipif(sys.platform != "linux", reason="limits a file's size as Linux does")
def test_full_disk_does_not_keep_a_command_from_running(path):
    script = f"ulimit -f 0; {FRONT} sh -c 'echo out; exit 5'"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, env=environment(FLOWSTORE_PATH=path)
    )
    assert (done.returncode, done.stdout) == (5, b"out\n")
    assert len(done.stderr.splitlines()) == 1


def test_locked_store_delays_the_start_and_the_end_but_loses_neither(path, store):
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    runner = run_cli(path, "--label", "kept", "r", "--", "sh", "-c", "echo out; exit 4")
    wait_until(lambda: blocks_signals(runner.pid))
    os.kill(runner.pid, signal.SIGWINCH)  # which ends no wait
    assert runner.stdout.readline() == b"out\n"
    assert b"the command runs" in runner.stderr.readline()
    assert store.get_recent_executions() == []
    holder.execute("ROLLBACK")
    holder.close()
    assert runner.communicate()[1] == b""
    assert runner.returncode == 4
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
    with open(f"/proc/{pid}/status") as file:
        return re.search(r"SigBlk:\s*0*[1-9a-f]", file.read())


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(each) for each in file.read().split()]


def test_signal_that_is_sent_to_run_alone_is_passed_on(path, store):
    runner = run_cli(path, "r", "--", "sh", "-c", LISTENER)
    assert runner.stdout.readline() == b"ready\n"
    for name in SENT:
        runner.send_signal(getattr(signal, f"SIG{name}"))
        assert runner.stdout.readline() == f"{name}\n".encode()
    out, err = runner.communicate(timeout=30)
    assert (runner.returncode, out, err) == (7, b"", b"")
    assert only_record(store)[3:5] == (7, "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_signal_from_before_the_command_reaches_it(path, store, name):
    number = getattr(signal, f"SIG{name}")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    runner = run_cli(path, "r", "--", "sleep", "60")
    wait_until(lambda: blocks_signals(runner.pid))
    runner.send_signal(number)
    holder.execute("ROLLBACK")
    holder.close()
    runner.communicate(timeout=30)
    assert runner.returncode == (-2 if name == "INT" else 128 + number)
    assert only_record(store)[3:5] == (128 + number, f"killed by SIG{name}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_signal_after_the_command_neither_ends_run_nor_changes_its_status(path, store):
    runner = run_cli(path, "r", "--", "sh", "-c", "echo ready; read x")
    assert runner.stdout.readline() == b"ready\n"
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    runner.stdin.write(b"go\n")
    runner.stdin.close()
    wait_until(lambda: not children_of(runner.pid))
    for name in "TERM", "INT", "HUP":
        runner.send_signal(getattr(signal, f"SIG{name}"))
    holder.execute("ROLLBACK")
    holder.close()
    assert runner.wait(30) == 0
    assert only_record(store)[3:5] == (0, "")


class Terminal:
    """A program in a terminal of its own, as the leader of its session."""

    def __init__(self, path, *command):
        self.pid, self.descriptor = pty.fork()
        if not self.pid:
            ours = f"{shlex.quote(sys.executable)} -m flowstore"
            variables = environment(FLOWSTORE_PATH=str(path), fs=ours, PS1="", ENV="")
            os.execvpe(command[0], command, variables)
        self.heard = b""

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def until(self, pattern):
        """Wait until the terminal shows this; what comes after it is heard the next time."""
        deadline = time.monotonic() + 30
        while not (found := re.search(pattern, self.heard)):
            wait = max(0, deadline - time.monotonic())
            assert select.select([self.descriptor], [], [], wait)[0], self.heard
            self.heard += os.read(self.descriptor, 65536)
        self.heard = self.heard[found.end() :]
        return found

    def close(self):
        os.close(self.descriptor)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@contextlib.contextmanager
def in_terminal(path, *command):
    session = Terminal(path, *command)
    try:
        yield session
    finally:
        session.close()


# Ends at SIGUSR1, with the number of SIGINTs and SIGQUITs that it has got.
COUNTER = """
import os, signal, sys
hits = []
def hit(*_):
    hits.append(1)
    os.write(1, b"hit\\n")
signal.signal(signal.SIGINT, hit), signal.signal(signal.SIGQUIT, hit)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(len(hits)))
if sys.argv[1] == "own":
    os.setpgid(0, 0)
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""


@pytest.mark.parametrize("group", ["shared", "own"])
@pytest.mark.parametrize("key", ["\x03", "\x1c", signal.SIGINT, signal.SIGQUIT])
def test_key_of_a_terminal_or_a_signal_reaches_the_command_exactly_once(
    path, store, group, key
):
    command = [sys.executable, "-c", COUNTER, group]
    words = [sys.executable, "-m", "flowstore", "run", "r", "--", *command]
    with in_terminal(path, *words) as session:
        session.until(rb"ready\r\n")
        os.kill(session.pid, signal.SIGSTOP)  # else a second one melts into the first
        if isinstance(key, str):
            session.type(key)
            session.until(rb"\^[C\\]")
        else:
            os.kill(session.pid, key)
        if isinstance(key, str) and group == "shared":
            session.until(rb"hit\r\n")
            session.heard = b"hit\r\n"
        os.kill(session.pid, signal.SIGCONT)
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
    shell.type(
        "while :; do $fs run r -- sh -c 'echo ready; exec sleep 60'; done; echo [$?]\n"
    )
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
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


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
    comm = pathlib.Path(f"/proc/{command}/comm")
    wait_until(lambda: comm.read_text() == "sleep\n")
    yield run, command
    for pid in run.pid, command:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(command))


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux_only
def test_background_run_is_detached_and_recorded_twice(path, store, watched):
    run, command = watched
    execution = only_record(store)
    assert (execution.id, execution.pid, execution.status) == (run.id, run.pid, "running")
    assert (run.ref, run.status) == ("serve", "running")
    assert run.started_at == execution.started_at
    assert (os.getsid(run.pid), os.getsid(command)) == (run.pid, run.pid)
    assert (os.getpgid(run.pid), os.getpgid(command)) == (run.pid, command)
    for pid in run.pid, command:
        streams = {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in "012"}
        assert streams == dict.fromkeys("012", os.devnull)
    os.kill(command, signal.SIGKILL)
    wait_until(lambda: not is_alive(run.pid))
    ended, execution = store.get_background_run(run.id), only_record(store)
    assert (ended.status, ended.error) == ("failed", "killed by SIGKILL")
    assert (execution.exit_code, execution.error) == (137, "killed by SIGKILL")
    assert ended.completed_at == execution.completed_at
    assert store.list_process_buckets() == []


def test_background_run_has_no_input_and_appends_its_output(path, store, tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    script = "cat; echo out; echo err >&2; exit $1"
    for status, expected in ("0", "completed"), ("3", "failed"):
        command = ["--log", log, "--", "sh", "-c", script, "sh", status]
        out = cli("run", "--json", "--background", "r", *command, store=path)[1]
        id = json.loads(out)["id"]
        wait_until(lambda id=id, to=expected: store.get_background_run(id).status == to)
    assert log.read_text() == "before\n" + "out\nerr\n" * 2
    lost = start_background(path, "--log", tmp_path / "new", "--", "nowhere-to-be-found")
    wait_until(lambda: store.get_background_run(lost).status == "failed")
    reason = "nowhere-to-be-found: No such file or directory"
    assert (tmp_path / "new").read_text() == f"flowstore: {reason}\n"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    assert store.get_background_run(lost).error == reason
    assert store.get_recent_executions(1)[0].exit_code == 127


@pytest.mark.parametrize("place", ["store", "log"])
def test_background_run_that_cannot_be_recorded_or_logged_is_refused(tmp_path, place):
    where, log = tmp_path / "s.db", tmp_path / "log"
    (where if place == "store" else log).mkdir()
    command = ["r", "--log", log, "--", "touch", tmp_path / "ran"]
    status, out, err = cli("run", "--background", *command, store=where)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert str(tmp_path / ("s.db" if place == "store" else "log")) in err
    assert cli("history", store=tmp_path / "other.db")[1] == ""
    assert not (tmp_path / "ran").exists()


def test_log_alone_is_wrong_usage(path, tmp_path):
    status, out, err = cli("run", "--log", "log", "r", "--", "touch", path, store=path)
    assert (status, out) == (2, "")
    assert "--background" in err
    assert not os.path.exists(path)


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
    assert cli("stop", id, store=path) == (0, "", "")


@linux_only
def test_stop_ends_all_of_the_command_even_where_it_is_paused(path, store):
    id = start_background(path, "--", "sh", "-c", "sleep 60 & sleep 60; true")
    watcher = store.get_background_run(id).pid
    [leader] = wait_until(lambda: children_of(watcher))
    wait_until(lambda: len(children_of(leader)) == 2)
    sleepers = children_of(leader)
    os.killpg(leader, signal.SIGSTOP)
    os.kill(watcher, signal.SIGSTOP)
    wait_until(lambda: {state_of(pid) for pid in (watcher, leader, *sleepers)} == {"T"})
    assert cli("stop", id, store=path) == (0, "", "")
    wait_until(lambda: not any(map(is_alive, (watcher, leader, *sleepers))))
    assert store.get_background_run(id).error == "killed by SIGTERM"
    assert only_record(store).exit_code == 143
    status, _, err = cli("stop", id, store=path)
    assert status == 1
    assert "failed" in err
    assert cli("stop", "unknown", store=path)[0] == 1


@linux_only
def test_stop_says_when_the_run_still_lives(path, store):
    script = "trap '' TERM; echo ready; while :; do sleep 0.01; done"
    id = start_background(path, "--log", f"{path}.log", "--", "sh", "-c", script)
    [command] = wait_until(lambda: children_of(store.get_background_run(id).pid))
    wait_until(lambda: os.path.getsize(f"{path}.log"))
    status, _, err = cli("stop", "--timeout", "0.1", id, store=path)
    assert (status, len(err.splitlines())) == (1, 1)
    assert store.get_background_run(id).status == "running"
    os.kill(command, signal.SIGKILL)
    wait_until(lambda: store.get_background_run(id).status == "failed")
    for text in "soon", "-1", "nan":
        assert cli("stop", f"--timeout={text}", id, store=path)[0] == 2


@linux_only
@pytest.mark.parametrize(
    "change", [*(note_with(place, "x") for place in (0, 2, 3)), lambda note: ""]
)
def test_stop_signals_nothing_but_the_process_that_the_note_means(
    path, store, watched, change
):
    run, command = watched
    [(note,)] = sql(path, "SELECT owner FROM background")
    sql(path, "UPDATE background SET owner = ?", change(note))
    status, out, err = cli("stop", "--timeout", "1", run.id, store=path)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert is_alive(run.pid) and is_alive(command)


def test_stop_ends_a_run_that_another_program_has_saved(path, store, living):
    store.save_background_run(background("b1", status="running", pid=living.pid))
    assert cli("stop", "b1", store=path) == (0, "", "")
    assert store.get_background_run("b1").error == GONE
    assert living.wait(30) == -signal.SIGTERM


@linux_only
def test_killed_watcher_leaves_its_command_and_a_failed_run(path, store, watched):
    run, command = watched
    os.kill(run.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(run.pid))
    [shown] = json.loads(cli("background", "--json", store=path)[1])
    assert (shown["status"], shown["error"]) == ("failed", GONE)
    assert is_alive(command)
    assert (only_record(store).status, store.list_process_buckets()) == ("failed", [])


def test_show_has_all_fields_of_a_run_of_either_kind(path, store):
    store.record_execution(record("build", id="i1", exit_code=3, label="nightly"))
    store.record_execution(record("build", id="both", label="the execution"))
    store.save_background_run(background("both"))
    store.save_background_run(background("b1", error="lost\nline"))
    assert json.loads(cli("show", "i1", "--json", store=path)[1]) == (
        record("build", id="i1", exit_code=3, label="nightly").to_dict()
    )
    lines = cli("show", "both", store=path)[1].splitlines()
    shown = dict(line.split("\t") for line in lines)
    assert list(shown) == list(flowstore.ExecutionRecord._fields)
    assert shown["label"] == "the execution"
    assert (shown["started_at"], shown["duration"]) == (
        "2024-05-06T07:08:09.123456Z",
        "0.000",
    )
    lines = cli("show", "b1", store=path)[1].splitlines()
    shown = dict(line.split("\t") for line in lines)
    assert list(shown) == list(flowstore.BackgroundRun._fields)
    assert (shown["error"], shown["completed_at"]) == ("lost\\nline", "")
    status, out, err = cli("show", "nowhere", store=path)
    assert (status, out, len(err.splitlines())) == (1, "", 1)


def test_background_lists_runs(path, store):
    assert cli("background", store=path)[:2] == (0, "")
    assert cli("background", "--json", store=path)[:2] == (0, "[]\n")
    ended = START + timedelta(seconds=90)
    store.save_background_run(background("b2", completed_at=ended, error="e"))
    store.save_background_run(background("b1", status="running"))
    rows = [line.split("\t") for line in cli("background", store=path)[1].splitlines()]
    started = "2024-05-06T07:08:09.123456Z"
    assert rows[1] == ["completed", started, "serve", "90.000", "0", "b2", "e"]
    assert rows[0][0] == "running"
    assert float(rows[0][3]) > 1e6
    runs = [
        background("b1", status="running"),
        background("b2", completed_at=ended, error="e"),
    ]
    documents = json.loads(cli("background", "--json", store=path)[1])
    assert documents == [run.to_dict() for run in runs]


def in_parallel(act, items):
    """Do this for each item, in eight threads; what it returns, in order."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(act, items))


@linux_only
def test_fifty_background_runs_started_listed_stopped_and_killed_leave_nothing(
    path, store
):
    def start(number):
        return start_background(path, "--", "sleep", "61.5", ref=f"serve {number % 5}")

    ids = in_parallel(start, range(50))
    runs = store.get_background_runs(ids)
    assert {run.status for run in runs.values()} == {"running"}
    commands = {id: wait_until(lambda id=id: children_of(runs[id].pid))[0] for id in ids}
    ends = {
        id: ("stop", "TERM", "KILL", "command")[number % 4]
        for number, id in enumerate(ids)
    }

    def end(id):
        if ends[id] == "stop":
            assert cli("stop", id, store=path) == (0, "", "")
        elif ends[id] == "command":
            os.kill(commands[id], signal.SIGKILL)
        else:
            os.kill(runs[id].pid, getattr(signal, f"SIG{ends[id]}"))
        assert len(store.list_background_runs()) == 50

    in_parallel(end, ids)
    wait_until(lambda: not any(is_alive(run.pid) for run in runs.values()))
    for id in ids:
        if ends[id] == "KILL":  # nobody watches it any more
            os.kill(commands[id], signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, commands.values())))
    listed = json.loads(cli("background", "--json", store=path)[1])
    reasons = {"KILL": GONE, "command": "killed by SIGKILL"}
    assert {each["id"]: each["error"] for each in listed} == {
        id: reasons.get(ends[id], "killed by SIGTERM") for id in ids
    }
    assert {each["status"] for each in listed} == {"failed"}
    histories = store.get_all_execution_history()
    ended = {each.id: each.error for records in histories.values() for each in records}
    assert ended == {each["id"]: each["error"] for each in listed}
    assert store.list_process_buckets() == []


def test_runs_are_the_same_on_a_server(server):
    where = server.url(schema=server.new_schema())
    ours = f"{shlex.quote(sys.executable)} -m flowstore"
    script = f"{ours} set key value; {ours} get key"
    assert cli("run", "r", "--", "sh", "-c", script, store=where) == (0, "value\n", "")
    store = flowstore.open_store(where)
    assert only_record(store).status == "completed"
    assert store.list_process_buckets() == []
    id = start_background(where, "--", "sleep", "60")
    assert store.get_background_run(id).status == "running"
    assert cli("stop", id, store=where) == (0, "", "")
    assert store.get_background_run(id).error == "killed by SIGTERM"
    shown = json.loads(cli("show", "--json", id, store=where)[1])
    assert (shown["status"], shown["exitCode"]) == ("failed", 143)


README = pathlib.Path(MODULE).with_name("README.md")

# ---- the README ----


def blocks_of_readme():
    """Each fenced block: the line that it begins at, what its fence says, and its text."""
    text = README.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(.*)\n((?s:.*?))^```$", text, re.MULTILINE):
        yield text.count("\n", 0, found.start()) + 1, found[1], found[2]


@pytest.fixture
def reader(tmp_path):
    """Who follows the README in an empty folder: runs a block, and returns that folder."""
    folder, home, programs = (tmp_path / name for name in ("work", "home", "bin"))
    for each in folder, home, programs:
        each.mkdir()
    (folder / "flowstore.py").symlink_to(MODULE)
    for name, script in ("python3", ""), ("flowstore", "-m flowstore"):
        program = programs / name
        program.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {script} "$@"\n'
        )
        program.chmod(0o755)
    variables = environment(HOME=str(home), PATH=f"{programs}:{os.environ['PATH']}")
    del variables["PYTHONPATH"]

    def run(line, language, text):
        command = {"sh": ["bash", "-euo", "pipefail"], "python": [sys.executable]}[
            language
        ]
        options = {"cwd": folder, "env": variables, "capture_output": True, "timeout": 60}
        done = subprocess.run([*command, "-c", text], **options)
        assert done.returncode == 0, f"line {line}: {done.stderr.decode()}"
        return folder

    yield run
    assert list(home.iterdir()) == []  # the default store is nobody's to try things on


def test_readme_runs_in_order_and_twice_from_an_empty_folder(reader):
    # text is for reading; no-run says what needs the network or a file of the original
    kinds = {kind for _, kind, _ in blocks_of_readme()}
    assert kinds == {"sh", "python", "text", "sh no-run", "sh server", "python server"}
    for line, kind, text in 2 * list(blocks_of_readme()):
        if kind in ("sh", "python"):
            folder = reader(line, kind, text)
    ended = flowstore.SQLiteDataStore(folder / "demo.db").list_background_runs()
    assert {run.status for run in ended} == {"completed", "failed"}


def test_readme_shows_the_history_as_a_terminal_does(reader):
    blocks = list(blocks_of_readme())
    folder = reader(*blocks[0])
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    variables = environment(FLOWSTORE_PATH=str(folder / "demo.db"), NO_COLOR="1")
    command = [sys.executable, MODULE, "history"]
    subprocess.run(command, stdout=terminal, env=variables, check=True, timeout=60)
    os.close(terminal)
    with open(master, "rb", buffering=0) as screen:
        lines = screen.read(4096).decode().splitlines()
    shown = next(text for _, kind, text in blocks if kind == "text")
    seen, told = (
        [re.sub(r"\b[0-9a-f]{8}\b|\d", "0", line) for line in each]
        for each in (lines, shown.splitlines())
    )
    assert seen == told


def test_readme_runs_on_a_server(reader, server):
    reader(0, "sh", "flowstore --store demo.db run build -- true")
    url = f"{server.url()}&schema={server.new_schema()}"
    for line, kind, text in 2 * list(blocks_of_readme()):
        if kind.endswith(" server"):
            text = text.replace("postgresql://build@db.example/builds", url)
            reader(line, kind.split()[0], text)


def test_readme_names_each_command():
    named = set(re.findall("`([a-z]+)", README.read_text(encoding="utf-8")))
    commands = re.findall("^  ([a-z]+)", cli("help")[1], re.MULTILINE)
    assert "destroy" in commands and {*commands} - named <= {"help"}
