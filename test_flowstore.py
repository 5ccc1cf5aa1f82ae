"""The tests of flowstore: the contract suite, then classes by situation.

FLOWSTORE_TEST_FACTORY=module:callable runs the contract suite against another DataStore:
callable(folder) returns a new, empty store.
"""

from __future__ import annotations

import array
import base64
import contextlib
import copy
import enum
import gc
import importlib
import inspect
import json
import locale
import lzma
import multiprocessing
import os
import pathlib
import pickle
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zipapp
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone

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

SOURCE = pathlib.Path(flowstore.__file__).resolve()
APPLICATION_ID = 0x464C5753
START = datetime(2024, 1, 2, 3, 4, 5, 678901, UTC)
ZERO_TIME = datetime(1, 1, 1, tzinfo=UTC)
LAST_TIME = datetime(9999, 12, 31, 23, 59, 59, 999999, UTC)
LONGEST = timedelta(microseconds=2**63 // 1000)
TEXTS = ["x\0y", "two\nlines", "'\"`;--", "Grüße", "\U0001f600", "\udcff", "\udcc3", "a\udc80b",
         "x" * 100_000]
NO_TEXTS = ["\ud800", "\udc7f", "a\udfffb", "\udcc3\udcbc", "\udcf0\udc9f\udc98\udc80"]

# ---- the model --------------------------------------------------------------------------------------------


def by_bytes(name):
    return name.encode("utf-8", "surrogateescape")


def model_text(value):
    if not isinstance(value, str):
        raise TypeError
    if by_bytes(value).decode("utf-8", "surrogateescape") != value:
        raise ValueError
    return value


def model_name(value):
    if value == "":
        raise ValueError
    return model_text(value)


def model_names(values):
    if isinstance(values, str):
        raise TypeError
    return list(dict.fromkeys(map(model_name, values)))


def model_integer(value):
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    if not -(2**63) <= value < 2**63:
        raise ValueError
    return value


def model_time(value):
    if not isinstance(value, datetime):
        raise TypeError
    if value.utcoffset() is None:
        raise ValueError
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError from None


def model_duration(value):
    if not isinstance(value, timedelta):
        raise TypeError
    model_integer(value // timedelta(microseconds=1) * 1000)
    return value


def model_record(kind, record):
    if not isinstance(record, kind):
        raise TypeError
    model_name(record.ref)
    checks = {"exit_code": model_integer, "pid": model_integer, "duration": model_duration,
              "started_at": model_time}
    checks["completed_at"] = lambda value: value if value is None else model_time(value)
    fields = zip(kind._fields, record, strict=True)
    return kind(*(checks.get(field, model_text)(value) for field, value in fields))


class DictStore(flowstore.DataStore):
    """A store of plain dicts, for one process and thread: what the real one is compared with."""

    def __init__(self, tables=None):
        self.inside = tables is not None  # a transaction
        self.tables = tables or {"cache": {}, "history": {}, "runs": {}, "buckets": {}}
        self.user = threading.get_ident()  # the thread that may use it, if any

    def __getitem__(self, table):
        if self.user != threading.get_ident():
            raise RuntimeError("a transaction holds this store, or is over, or it is another thread's")
        return self.tables[table]

    def set_cache_entry(self, key, value):
        if isinstance(value, str):
            raise TypeError
        self["cache"][model_name(key)] = memoryview(value).tobytes()

    def get_cache_entry(self, key):
        return self["cache"].get(model_name(key))

    def get_cache_entries(self, keys):
        return {key: self["cache"][key] for key in model_names(keys) if key in self["cache"]}

    def delete_cache_entry(self, key):
        self["cache"].pop(model_name(key), None)

    def record_execution(self, record):
        record = model_record(ExecutionRecord, record)
        records = self["history"].setdefault(record.ref, [])
        for place, earlier in enumerate(records):
            if record.id and earlier.id == record.id:
                records[place] = record
                return
        records.append(record)

    def get_execution_history(self, ref, limit=0):
        records = sorted(self["history"].get(model_name(ref), []), key=lambda record: record.started_at)
        return records[-limit:] if model_integer(limit) > 0 else records

    def get_execution_histories(self, refs, limit=0):
        model_integer(limit)
        return {ref: self.get_execution_history(ref, limit) for ref in model_names(refs)
                if ref in self["history"]}

    def get_all_execution_history(self, limit_per_ref=0):
        return self.get_execution_histories(self.list_execution_refs(), limit_per_ref)

    def list_execution_refs(self):
        return sorted(self["history"], key=by_bytes)

    def delete_execution_history(self, ref):
        self["history"].pop(model_name(ref), None)

    def save_background_run(self, run):
        run = model_record(BackgroundRun, run)
        self["runs"][model_name(run.id)] = run

    def get_background_run(self, id):
        if model_name(id) not in self["runs"]:
            raise NotFoundError(id)
        return self["runs"][id]

    def get_background_runs(self, ids):
        return {id: self["runs"][id] for id in model_names(ids) if id in self["runs"]}

    def list_background_runs(self):
        return [self["runs"][id] for id in sorted(self["runs"], key=by_bytes)]

    def delete_background_run(self, id):
        self["runs"].pop(model_name(id), None)

    def create_process_bucket(self, bucket):
        self["buckets"].setdefault(model_name(bucket), {})

    def delete_process_bucket(self, bucket):
        self["buckets"].pop(model_name(bucket), None)

    def list_process_buckets(self):
        return sorted(self["buckets"], key=by_bytes)

    def set_process_var(self, bucket, key, value):
        bucket, key, value = model_name(bucket), model_name(key), model_text(value)
        self["buckets"].setdefault(bucket, {})[key] = value

    def get_process_var(self, bucket, key):
        model_name(key)
        variables = self.get_all_process_vars(bucket)
        if key not in variables:
            raise NotFoundError(key)
        return variables[key]

    def get_all_process_vars(self, bucket):
        merged = self["buckets"].get("root", {}) | self["buckets"].get(model_name(bucket), {})
        return {key: merged[key] for key in sorted(merged, key=by_bytes)}

    def get_process_var_keys(self, bucket):
        own = self["buckets"].get(model_name(bucket), {})
        rest = self["buckets"].get("root", {}).keys() - own.keys()
        return sorted(own, key=by_bytes) + sorted(rest, key=by_bytes)

    def delete_process_var(self, bucket, key):
        self["buckets"].get(model_name(bucket), {}).pop(model_name(key), None)

    @contextlib.contextmanager
    def transaction(self):
        if self.inside or self.user != threading.get_ident():
            raise RuntimeError("a transaction can't be nested")
        inner = DictStore(copy.deepcopy(self.tables))
        self.user = None
        try:
            yield inner
            self.tables = inner.tables
        finally:
            self.user, inner.user = threading.get_ident(), None


# ---- helpers ----------------------------------------------------------------------------------------------


def execution_of(ref="build app", **fields):
    return ExecutionRecord(**{"ref": ref, "started_at": START, **fields})


def run_of(id="run 1", **fields):
    return BackgroundRun(**{"id": id, "pid": 7, "ref": "serve", "started_at": START, "status": "running",
                            **fields})


def calls_with(name):
    """Each operation that takes a name, once for each place of one, and with this name there."""
    return [
        ("set_cache_entry", (name, b"new")), ("get_cache_entry", (name,)),
        ("get_cache_entries", (["k", name],)),
        ("delete_cache_entry", (name,)), ("record_execution", (execution_of(name),)),
        ("get_execution_history", (name,)), ("get_execution_histories", (["k", name],)),
        ("delete_execution_history", (name,)), ("save_background_run", (run_of(name),)),
        ("save_background_run", (run_of(ref=name),)), ("get_background_run", (name,)),
        ("get_background_runs", (["k", name],)), ("delete_background_run", (name,)),
        ("create_process_bucket", (name,)), ("delete_process_bucket", (name,)),
        ("set_process_var", (name, "k", "new")), ("set_process_var", ("k", name, "new")),
        ("get_process_var", (name, "k")), ("get_process_var", ("k", name)), ("get_all_process_vars", (name,)),
        ("get_process_var_keys", (name,)), ("delete_process_var", (name, "k")),
        ("delete_process_var", ("k", name)),
    ]


CALLS = [*calls_with("k"), ("list_execution_refs", ()), ("list_background_runs", ()),
         ("get_all_execution_history", ())]


def filled(store, name="k"):
    """A store in which every operation on the name finds something."""
    store.set_cache_entry(name, b"value")
    store.record_execution(execution_of(name))
    store.save_background_run(run_of(name))
    store.set_process_var(name, name, "value")
    return store


def contents_of(store):
    """What a filled() store holds."""
    return (store.get_cache_entry("k"), store.get_all_execution_history(), store.list_background_runs(),
            store.get_all_process_vars("k"))


def in_a_thread(work):
    """What work raises in another thread, or None."""
    raised = [None]

    def target():
        try:
            work()
        except BaseException as error:
            raised[0] = error

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return raised[0]


def in_a_fork(work, *arguments, user=None):
    """What work returns or raises in a forked process, as another user."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            result = work(*arguments), None
        except BaseException as error:
            result = None, error
        with open(writer, "wb") as stream:
            pickle.dump(result, stream)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        result, error = pickle.load(stream)
    os.waitpid(child, 0)
    if error:
        raise error
    return result


@contextlib.contextmanager
def another_process(code, *arguments):
    """A process that runs code, says a line when it is ready, and ends at the end of its standard input."""
    command = [sys.executable, "-c", f"import flowstore, sqlite3, sys\n{code}", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


LOCKER = """
sql = sqlite3.connect(sys.argv[1], isolation_level=None)
for statement in sys.argv[2:]:
    sql.execute(statement)
print("ready", flush=True)
sys.stdin.read()
sql.close()
"""
SESSION = """
with flowstore.SQLiteDataStore(sys.argv[1]).session() as session:
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def raw_sql(path, **options):
    """The file as any program may use it."""
    sql = sqlite3.connect(path, isolation_level=None, **options)
    try:
        yield sql
    finally:
        sql.close()


def sql_values(path, query):
    with raw_sql(path) as sql:
        return [row[0] if len(row) == 1 else row for row in sql.execute(query)]


def files_in(folder):
    """The files below a folder, with their bytes and modes."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "store.db")


@pytest.fixture
def public_folder():
    """A folder that other users can reach."""
    folder = pathlib.Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def interruptible():
    """SIGINT as in the foreground, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="takes root to become somebody else")
NOBODY = 65534

# ---- the contract -----------------------------------------------------------------------------------------

SUBJECTS = ["store", "session", "transaction", "model"]
if "FLOWSTORE_TEST_FACTORY" in os.environ:
    SUBJECTS.append("factory")
carried_bytes = st.binary(max_size=12).map(lambda data: data.decode("utf-8", "surrogateescape"))
surviving_texts = carried_bytes | st.text(max_size=12)
all_texts = st.text(st.characters(codec=None) | st.characters(categories=["Cs"]), max_size=6)


def survives(text):
    try:
        return by_bytes(text).decode("utf-8", "surrogateescape") == text
    except UnicodeEncodeError:
        return False


@contextlib.contextmanager
def opened(subject, folder):
    if subject == "model":
        yield DictStore()
    elif subject == "factory":
        module, _, name = os.environ["FLOWSTORE_TEST_FACTORY"].partition(":")
        yield getattr(importlib.import_module(module), name)(folder)
    else:
        store = flowstore.SQLiteDataStore(folder / "contract.db")
        with contextlib.nullcontext(store) if subject == "store" else getattr(store, subject)() as subject:
            yield subject


class TestContract:
    """What every DataStore does, run against each of ours and the one that FLOWSTORE_TEST_FACTORY names."""

    @pytest.fixture(params=SUBJECTS)
    def store(self, request, tmp_path):
        with opened(request.param, tmp_path) as store:
            yield store

    @pytest.fixture(params=[subject for subject in SUBJECTS if subject != "transaction"])
    def outer(self, request, tmp_path):
        with opened(request.param, tmp_path) as store:
            yield store

    # names and values

    @pytest.mark.parametrize("name", ["", *NO_TEXTS])
    def test_name_that_is_empty_or_no_text_is_a_value_error_and_changes_nothing(self, store, name):
        before = contents_of(filled(store))
        for method, arguments in calls_with(name):
            with pytest.raises(ValueError):
                getattr(store, method)(*arguments)
        assert contents_of(store) == before

    @pytest.mark.parametrize("name", [None, b"k", 1, ("k",)])
    def test_name_of_another_type_is_a_type_error_and_changes_nothing(self, store, name):
        before = contents_of(filled(store))
        for method, arguments in calls_with(name):
            with pytest.raises(TypeError):
                getattr(store, method)(*arguments)
        assert contents_of(store) == before

    @pytest.mark.parametrize("method", ["get_cache_entries", "get_execution_histories",
                                        "get_background_runs"])
    def test_one_str_in_place_of_several_names_is_a_type_error(self, store, method):
        with pytest.raises(TypeError):
            getattr(store, method)("ab")

    @pytest.mark.parametrize("name", TEXTS)
    def test_any_text_that_survives_utf8_is_a_name(self, store, name):
        filled(store, name)
        filled(store, name + "2")
        store.create_process_bucket(name)
        assert store.get_cache_entry(name) == b"value"
        assert list(store.get_cache_entries([name])) == [name]
        assert [record.ref for record in store.get_execution_history(name)] == [name]
        assert list(store.get_execution_histories([name])) == [name]
        assert store.list_execution_refs() == list(store.get_all_execution_history()) == [name, name + "2"]
        assert store.get_background_run(name) == store.get_background_runs([name])[name] == run_of(name)
        assert [run.id for run in store.list_background_runs()] == [name, name + "2"]
        assert store.get_process_var(name, name) == "value"
        assert store.get_all_process_vars(name) == {name: "value"}
        assert store.get_process_var_keys(name) == [name]
        store.delete_cache_entry(name)
        store.delete_execution_history(name)
        store.delete_background_run(name)
        store.delete_process_var(name, name)
        assert store.get_cache_entries([name, name + "2"]) == {name + "2": b"value"}
        assert store.list_execution_refs() == [name + "2"]
        assert [run.id for run in store.list_background_runs()] == [name + "2"]
        assert store.get_all_process_vars(name) == {}
        store.delete_process_bucket(name + "2")
        assert store.get_all_process_vars(name + "2") == {}

    def test_names_are_listed_in_the_byte_order_of_their_utf8(self, store):
        names = ["", "\0", "B", "a", "aa", "a\udc80", "b", "\udc80", "é", "\uffff", "\U0001f600",
                 "\udcff"][1:]
        assert names == sorted(names, key=by_bytes)
        for name in random.Random(1).sample(names, len(names)):
            store.record_execution(execution_of(name))
            store.save_background_run(run_of(name))
            store.set_process_var("scope", name, name)
        assert store.list_execution_refs() == names
        assert list(store.get_all_execution_history()) == names
        assert [run.id for run in store.list_background_runs()] == names
        assert list(store.get_all_process_vars("scope")) == names
        assert store.get_process_var_keys("scope") == names

    def test_empty_value_is_a_value(self, store):
        store.set_cache_entry("k", b"")
        store.set_process_var("root", "k", "of root")
        store.set_process_var("scope", "k", "")
        assert store.get_cache_entry("k") == b""
        assert store.get_cache_entries(["k"]) == {"k": b""}
        assert store.get_process_var("scope", "k") == ""
        assert store.get_all_process_vars("scope") == {"k": ""}

    @pytest.mark.parametrize("value", TEXTS)
    def test_variable_holds_any_text_that_survives_utf8(self, store, value):
        store.set_process_var("scope", "k", value)
        assert store.get_process_var("scope", "k") == value
        assert store.get_all_process_vars("scope") == {"k": value}

    @pytest.mark.parametrize(("value", "error"),
                             [*((text, ValueError) for text in NO_TEXTS), (b"v", TypeError),
                              (None, TypeError), (1, TypeError)])
    def test_variable_of_another_kind_is_refused(self, store, value, error):
        before = contents_of(filled(store))
        with pytest.raises(error):
            store.set_process_var("k", "k", value)
        assert contents_of(store) == before

    @pytest.mark.parametrize("value", [bytearray(b"aabb"), memoryview(b"aabb"), memoryview(b"a-a-b-b")[::2],
                                       array.array("H", [0x6161, 0x6262])], ids=type)
    def test_cache_value_is_any_bytes_like_object(self, store, value):
        store.set_cache_entry("k", value)
        assert store.get_cache_entry("k") == b"aabb"
        assert type(store.get_cache_entry("k")) is bytes

    @pytest.mark.parametrize("value", ["text", None, 1, [1], object()])
    def test_cache_value_of_another_type_is_a_type_error(self, store, value):
        before = contents_of(filled(store))
        with pytest.raises(TypeError):
            store.set_cache_entry("k", value)
        assert contents_of(store) == before

    # cache

    def test_missing_cache_key_reads_as_none(self, store):
        assert store.get_cache_entry("missing") is None

    def test_cache_entry_replaces_the_earlier_one(self, store):
        store.set_cache_entry("k", bytes(range(256)) * 1000)
        assert store.get_cache_entry("k") == bytes(range(256)) * 1000
        store.set_cache_entry("k", b"new")
        assert store.get_cache_entry("k") == b"new"

    def test_deleted_cache_key_is_gone_and_deleting_a_missing_one_is_no_error(self, store):
        filled(store)
        store.delete_cache_entry("k")
        store.delete_cache_entry("k")
        assert store.get_cache_entry("k") is None

    def test_bulk_read_takes_more_keys_than_sqlite_has_variables(self, store):
        with raw_sql(":memory:") as sql:
            count = sql.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER) + 1
        store.set_cache_entry("first", b"1")
        store.set_cache_entry("last", b"2")
        keys = ("first", *map(str, range(count)), "last")
        assert store.get_cache_entries(keys) == {"first": b"1", "last": b"2"}

    @pytest.mark.parametrize(("method", "value"),
                             [("get_cache_entries", b"value"), ("get_background_runs", run_of("k")),
                              ("get_execution_histories", [execution_of("k")])])
    def test_bulk_read_leaves_missing_names_out(self, store, method, value):
        read = getattr(filled(store), method)
        assert read(["missing", "k", "k", "other"]) == {"k": value}
        assert read(name for name in ("missing", "k")) == {"k": value}
        assert read(["missing"]) == {}
        assert read([]) == {}

    # records

    @pytest.mark.parametrize("moment", [ZERO_TIME, LAST_TIME, START, START.replace(microsecond=0),
                                        datetime(1, 1, 1, 23, tzinfo=timezone(timedelta(hours=23))),
                                        datetime(1969, 12, 31, 23, 59, 59, 999999, UTC),
                                        datetime(2024, 3, 31, 2, 30,
                                                 tzinfo=timezone(timedelta(hours=-5, minutes=-30)))])
    def test_instants_come_back_in_utc(self, store, moment):
        store.record_execution(execution_of("k", started_at=moment, completed_at=moment))
        store.save_background_run(run_of("k", started_at=moment, completed_at=moment))
        for read in (store.get_execution_history("k")[0], store.get_background_run("k")):
            assert read.started_at == read.completed_at == moment
            assert read.started_at.tzinfo is read.completed_at.tzinfo is UTC

    @pytest.mark.parametrize("duration", [timedelta(0), timedelta(microseconds=1), timedelta(microseconds=-1),
                                          timedelta(days=-3, microseconds=5), LONGEST, -LONGEST])
    def test_durations_come_back(self, store, duration):
        store.record_execution(execution_of("k", duration=duration))
        assert store.get_execution_history("k")[0].duration == duration

    @pytest.mark.parametrize("number", [0, -1, 2**63 - 1, -(2**63)])
    def test_numbers_of_64_bits_come_back(self, store, number):
        store.record_execution(execution_of("k", exit_code=number, pid=number))
        store.save_background_run(run_of("k", pid=number))
        assert store.get_execution_history("k") == [execution_of("k", exit_code=number, pid=number)]
        assert store.get_background_run("k").pid == number

    @pytest.mark.parametrize("text", ["", *TEXTS[:-1]])
    def test_every_text_field_holds_any_text(self, store, text):
        record = execution_of("k", **dict.fromkeys(set(ExecutionRecord._fields[4:]) - {"completed_at", "pid"},
                                                   text))
        run = run_of("k", status=text, log_archive_id=text, error=text)
        store.record_execution(record)
        store.save_background_run(run)
        assert store.get_execution_history("k") == [record]
        assert store.get_background_run("k") == run

    def test_members_of_enumerations_count_as_their_values(self, store):
        text = enum.StrEnum("text", {"TEXT": "é"}).TEXT
        store.record_execution(execution_of(text, exit_code=signal.SIGTERM, status=text))
        store.set_process_var(text, text, text)
        assert store.get_execution_history("é") == [execution_of("é", exit_code=15, status="é")]
        assert store.get_all_process_vars("é") == {"é": "é"}

    @pytest.mark.parametrize("status", ["running", "completed", "failed", "paused by hand", ""])
    def test_set_of_statuses_is_open(self, store, status):
        store.record_execution(execution_of("k", status=status))
        store.save_background_run(run_of("k", status=status))
        assert store.get_execution_history("k")[0].status == store.get_background_run("k").status == status

    @pytest.mark.parametrize(("fields", "error"), [
        ({"started_at": datetime(2024, 1, 1)}, ValueError),
        ({"started_at": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1)))}, ValueError),
        ({"completed_at": datetime(9999, 12, 31, 23, 30, tzinfo=timezone(timedelta(hours=-1)))}, ValueError),
        ({"completed_at": datetime(2024, 1, 1)}, ValueError), ({"pid": 2**63}, ValueError),
        ({"error": "\ud800"}, ValueError), ({"started_at": None}, TypeError),
        ({"started_at": "2024-01-01T00:00:00Z"}, TypeError), ({"started_at": 0}, TypeError),
        ({"completed_at": ""}, TypeError), ({"pid": 1.0}, TypeError), ({"pid": True}, TypeError),
        ({"pid": None}, TypeError), ({"error": None}, TypeError), ({"status": b"failed"}, TypeError)])
    def test_field_out_of_range_is_a_value_error_and_of_another_type_a_type_error(self, store, fields, error):
        before = contents_of(filled(store))
        with pytest.raises(error):
            store.record_execution(execution_of("k", **fields))
        with pytest.raises(error):
            store.save_background_run(run_of("k", **fields))
        assert contents_of(store) == before

    @pytest.mark.parametrize(("fields", "error"), [
        ({"duration": LONGEST + timedelta(microseconds=1)}, ValueError),
        ({"duration": timedelta.min}, ValueError), ({"exit_code": -(2**63) - 1}, ValueError),
        ({"id": "\udcc3\udcbc"}, ValueError), ({"duration": 1}, TypeError), ({"duration": None}, TypeError),
        ({"exit_code": "0"}, TypeError), ({"id": None}, TypeError)])
    def test_field_of_an_execution_is_checked(self, store, fields, error):
        with pytest.raises(error):
            store.record_execution(execution_of("k", **fields))
        assert store.get_execution_history("k") == []

    def test_record_of_another_kind_is_a_type_error(self, store):
        for record in (None, {}, run_of(), tuple(execution_of())):
            with pytest.raises(TypeError):
                store.record_execution(record)
        for run in (None, {}, execution_of(), tuple(run_of())):
            with pytest.raises(TypeError):
                store.save_background_run(run)

    # history

    def test_history_is_the_newest_by_start_and_the_oldest_of_them_first(self, store):
        for minute in (3, 0, 4, 1, 2):
            store.record_execution(execution_of("k", started_at=START + timedelta(minutes=minute),
                                                exit_code=minute))
        codes = {limit: [record.exit_code for record in store.get_execution_history("k", limit)]
                 for limit in range(-1, 7)}
        assert codes == {-1: [0, 1, 2, 3, 4], 0: [0, 1, 2, 3, 4], 1: [4], 2: [3, 4], 3: [2, 3, 4],
                         4: [1, 2, 3, 4],
                         5: [0, 1, 2, 3, 4], 6: [0, 1, 2, 3, 4]}
        assert store.get_execution_histories(["k"], 2) == {"k": store.get_execution_history("k", limit=2)}
        assert store.get_all_execution_history(2) == {"k": store.get_execution_history("k", 2)}

    def test_limit_holds_for_each_ref(self, store):
        for ref in ("b", "a"):
            for minute in range(3):
                store.record_execution(execution_of(ref, started_at=START + timedelta(minutes=minute),
                                                    exit_code=minute))
        expected = {ref: store.get_execution_history(ref, 2) for ref in ("a", "b")}
        assert store.get_all_execution_history(limit_per_ref=2) == expected
        assert store.get_execution_histories(["b", "c", "a"], limit=2) == expected
        assert store.get_all_execution_history() == {ref: store.get_execution_history(ref)
                                                     for ref in ("a", "b")}

    @pytest.mark.parametrize(("limit", "error"),
                             [(1.0, TypeError), ("1", TypeError), (None, TypeError), (2**63, ValueError)])
    def test_limit_is_an_integer(self, store, limit, error):
        for method, arguments in (("get_execution_history", ["k"]), ("get_execution_histories", [["k"]]),
                                  ("get_all_execution_history", [])):
            with pytest.raises(error):
                getattr(store, method)(*arguments, limit)

    def test_instants_before_the_epoch_and_apart_by_a_microsecond_sort_as_time(self, store):
        moments = [ZERO_TIME, datetime(999, 1, 1, tzinfo=UTC), datetime(1969, 1, 1, tzinfo=UTC),
                   START.replace(microsecond=0), START.replace(microsecond=1), START.replace(microsecond=10),
                   LAST_TIME]
        for moment in random.Random(1).sample(moments, len(moments)):
            store.record_execution(execution_of("k", started_at=moment))
        assert [record.started_at for record in store.get_execution_history("k")] == moments

    def test_equal_instants_keep_the_order_of_insertion(self, store):
        elsewhere = START.astimezone(timezone(timedelta(hours=9)))
        for code in range(6):
            store.record_execution(execution_of("k", started_at=elsewhere if code % 2 else START,
                                                exit_code=code))
        assert [record.exit_code for record in store.get_execution_history("k")] == [0, 1, 2, 3, 4, 5]
        assert [record.exit_code for record in store.get_execution_history("k", 2)] == [4, 5]

    def test_record_with_an_id_replaces_that_of_the_same_ref_and_id_in_its_place(self, store):
        for id in ("a", "b", "c"):
            store.record_execution(execution_of("k", id=id, status="running"))
        store.record_execution(execution_of("other", id="b", status="running"))
        store.record_execution(execution_of("k", id="b", status="completed", completed_at=START))
        assert [(record.id, record.status) for record in store.get_execution_history("k")] == [
            ("a", "running"), ("b", "completed"), ("c", "running")]
        assert [record.status for record in store.get_execution_history("other")] == ["running"]

    def test_replaced_record_is_found_at_its_new_start(self, store):
        for id, minute in (("a", 0), ("b", 1), ("a", 2)):
            store.record_execution(execution_of("k", id=id, started_at=START + timedelta(minutes=minute)))
        assert [record.id for record in store.get_execution_history("k")] == ["b", "a"]

    def test_record_without_an_id_appends(self, store):
        for _ in range(3):
            store.record_execution(execution_of("k"))
        assert store.get_execution_history("k") == [execution_of("k")] * 3

    def test_ids_whose_names_run_together_are_told_apart(self, store):
        pairs = [("a", "\0b"), ("a\0", "b"), ("a", "b"), ("ab", "\0"), ("plumless", "x"), ("buckeroo", "x")]
        for ref, id in pairs * 2:
            store.record_execution(execution_of(ref, id=id))
        found = [(record.ref, record.id) for records in store.get_all_execution_history().values()
                 for record in records]
        assert sorted(found) == sorted(pairs)

    def test_unknown_ref_has_no_history_and_deleting_it_is_no_error(self, store):
        store.delete_execution_history("unknown")
        assert store.get_execution_history("unknown") == []
        assert store.list_execution_refs() == []
        assert store.get_all_execution_history() == {}

    def test_deleted_history_is_gone_and_others_stay(self, store):
        for ref in ("k", "k", "other"):
            store.record_execution(execution_of(ref))
        store.delete_execution_history("k")
        assert store.get_all_execution_history() == {"other": [execution_of("other")]}

    # background runs

    def test_background_run_is_saved_and_replaced_by_its_id(self, store):
        store.save_background_run(run_of("a"))
        store.save_background_run(run_of("b"))
        done = run_of("a", ref="other", status="failed", error="killed",
                      completed_at=START + timedelta(seconds=1))
        store.save_background_run(done)
        assert store.get_background_run("a") == done
        assert store.list_background_runs() == [done, run_of("b")]

    def test_missing_background_run_is_not_found_and_deleting_it_is_no_error(self, store):
        store.save_background_run(run_of("a"))
        store.delete_background_run("a")
        store.delete_background_run("a")
        with pytest.raises(NotFoundError):
            store.get_background_run("a")
        assert store.list_background_runs() == []

    # process variables

    def test_variable_is_looked_up_in_the_bucket_then_in_root_then_not_found(self, store):
        store.set_process_var("root", "k", "of root")
        assert store.get_process_var("scope", "k") == store.get_process_var("root", "k") == "of root"
        store.set_process_var("scope", "k", "own")
        assert store.get_process_var("scope", "k") == "own"
        assert store.get_process_var("root", "k") == "of root"
        for bucket in ("scope", "root"):
            with pytest.raises(NotFoundError):
                store.get_process_var(bucket, "missing")

    def test_variable_of_another_scope_is_not_found(self, store):
        store.set_process_var("other", "k", "v")
        with pytest.raises(NotFoundError):
            store.get_process_var("scope", "k")
        assert store.get_all_process_vars("scope") == {}
        assert store.get_process_var_keys("scope") == []

    def test_all_variables_merge_the_bucket_and_root_and_the_bucket_wins(self, store):
        for bucket, key in (("root", "a"), ("root", "c"), ("scope", "b"), ("scope", "c"), ("other", "d")):
            store.set_process_var(bucket, key, bucket)
        assert list(store.get_all_process_vars("scope").items()) == [("a", "root"), ("b", "scope"),
                                                                     ("c", "scope")]
        assert store.get_all_process_vars("root") == {"a": "root", "c": "root"}

    def test_variable_keys_are_the_buckets_then_those_only_root_has(self, store):
        for bucket, key in (("root", "a"), ("root", "c"), ("root", "z"), ("scope", "m"), ("scope", "c")):
            store.set_process_var(bucket, key, "v")
        assert store.get_process_var_keys("scope") == ["c", "m", "a", "z"]
        assert store.get_process_var_keys("root") == ["a", "c", "z"]

    def test_creating_an_existing_bucket_keeps_its_variables(self, store):
        store.set_process_var("scope", "k", "v")
        store.create_process_bucket("scope")
        store.create_process_bucket("scope")
        assert store.get_all_process_vars("scope") == {"k": "v"}

    def test_deleted_bucket_loses_its_variables_and_no_other(self, store):
        for bucket in ("root", "scope", "other"):
            store.set_process_var(bucket, "k", bucket)
        store.delete_process_bucket("scope")
        store.delete_process_bucket("scope")
        assert store.get_process_var("scope", "k") == "root"
        assert store.get_process_var("other", "k") == "other"

    def test_deleted_variable_uncovers_that_of_root_and_deleting_a_missing_one_is_no_error(self, store):
        store.set_process_var("root", "k", "of root")
        store.set_process_var("scope", "k", "own")
        store.delete_process_var("scope", "k")
        store.delete_process_var("scope", "k")
        store.delete_process_var("no scope", "k")
        assert store.get_process_var("scope", "k") == "of root"

    def test_variable_replaces_the_earlier_one(self, store):
        for value in ("1", "2"):
            store.set_process_var("scope", "k", value)
        assert store.get_all_process_vars("scope") == {"k": "2"}

    def test_buckets_are_those_created_or_written_to_and_not_deleted(self, store):
        if not hasattr(store, "list_process_buckets"):
            pytest.skip("not of the interface")
        store.create_process_bucket("é")
        store.set_process_var("b", "k", "v")
        store.set_process_var("\udcff", "k", "v")
        store.create_process_bucket("a")
        store.delete_process_var("b", "k")
        store.delete_process_bucket("a")
        store.delete_process_var("never", "k")
        assert store.list_process_buckets() == ["b", "é", "\udcff"]

    def test_store_stays_usable_after_close(self, store):
        filled(store)
        assert store.close() is None
        store.close()
        store.set_cache_entry("after", b"1")
        assert store.get_cache_entry("after") == b"1"
        assert store.get_cache_entry("k") == b"value"

    # transaction()

    def test_transaction_takes_effect_when_it_ends(self, outer):
        with outer.transaction() as transaction:
            assert isinstance(transaction, flowstore.DataStore)
            before = contents_of(filled(transaction))
            assert before[0] == b"value"
        assert contents_of(outer) == before

    @pytest.mark.parametrize("kind", [Exception, KeyboardInterrupt, SystemExit, StoreBusyError,
                                      NotFoundError])
    def test_transaction_leaves_nothing_behind_an_exception(self, outer, kind):
        outer.set_cache_entry("k", b"before")
        before = contents_of(outer)
        with pytest.raises(kind), outer.transaction() as transaction:
            filled(transaction)
            transaction.delete_cache_entry("k")
            raise kind("stop")
        assert contents_of(outer) == before
        with outer.transaction() as transaction:
            filled(transaction)
        assert outer.get_cache_entry("k") == b"value"

    def test_error_that_the_body_catches_leaves_the_transaction_alive(self, outer):
        with outer.transaction() as transaction:
            transaction.set_cache_entry("a", b"1")
            with pytest.raises(NotFoundError):
                transaction.get_background_run("missing")
            with pytest.raises(ValueError):
                transaction.set_cache_entry("", b"")
            transaction.set_cache_entry("b", b"2")
        assert outer.get_cache_entries(["a", "b"]) == {"a": b"1", "b": b"2"}

    def test_transaction_in_a_generator_that_is_closed_leaves_nothing(self, outer):
        def generator():
            with outer.transaction() as transaction:
                transaction.set_cache_entry("k", b"1")
                yield

        suspended = generator()
        next(suspended)
        suspended.close()
        assert outer.get_cache_entry("k") is None

    def test_nested_transaction_is_a_runtime_error_and_the_outer_one_goes_on(self, outer):
        with outer.transaction() as transaction:
            transaction.set_cache_entry("a", b"1")
            with pytest.raises(RuntimeError), transaction.transaction():
                pass
            with pytest.raises(RuntimeError), outer.transaction():
                pass
            transaction.set_cache_entry("b", b"2")
        assert outer.get_cache_entries(["a", "b"]) == {"a": b"1", "b": b"2"}

    def test_transaction_after_its_end_is_a_runtime_error(self, outer):
        with outer.transaction() as transaction:
            pass
        for method, arguments in CALLS:
            with pytest.raises(RuntimeError):
                getattr(transaction, method)(*arguments)
        with pytest.raises(RuntimeError), transaction.transaction():
            pass
        assert outer.get_cache_entry("k") is None

    def test_transaction_in_another_thread_is_a_runtime_error(self, outer):
        with outer.transaction() as transaction:
            for method, arguments in CALLS:
                assert isinstance(in_a_thread(lambda m=method, a=arguments: getattr(transaction, m)(*a)),
                                  RuntimeError)
            transaction.set_cache_entry("k", b"1")
        assert outer.get_cache_entry("k") == b"1"


class TestInterface:
    def test_abstract_are_the_originals_operations_and_transaction_and_nothing_else(self):
        methods = {method for method, _ in CALLS}
        assert flowstore.DataStore.__abstractmethods__ - {"close"} == methods | {"transaction"}

    def test_every_operation_has_its_docstring_in_the_interface(self):
        for method in {method for method, _ in CALLS} | {"transaction", "close"}:
            assert inspect.getdoc(getattr(flowstore.DataStore, method))

    def test_constants_are_the_originals(self):
        assert (flowstore.BUCKET_ENV, flowstore.ROOT_BUCKET) == ("FLOW_PROCESS_BUCKET", "root")
        assert (flowstore.RUN_SOURCE_ENV, flowstore.RUN_CLIENT_ENV, flowstore.RUN_SESSION_ENV) == (
            "FLOW_RUN_SOURCE", "FLOW_RUN_CLIENT", "FLOW_RUN_SESSION")
        assert (flowstore.RUN_SOURCE_CLI, flowstore.RUN_SOURCE_DESKTOP, flowstore.RUN_SOURCE_MCP) == (
            "cli", "desktop", "mcp")
        for status in (flowstore.RunStatus, flowstore.BackgroundRunStatus):
            assert (status.RUNNING, status.COMPLETED, status.FAILED) == ("running", "completed", "failed")

    def test_all_names_exist(self):
        names = [
            "DataStore", "SQLiteDataStore", "default_path", "environment_bucket", "destroy_store",
            "run_env_value",
            "migrate_process_buckets", "import_bolt", "ImportSummary", "BackgroundRunStatus", "RunStatus",
            "BackgroundRun",
            "ExecutionRecord", "StoreError", "NotFoundError", "StoreBusyError", "CorruptStoreError", "main",
            "__version__"]
        assert [name for name in names if not hasattr(flowstore, name)] == []

    @pytest.mark.parametrize(("value", "bucket"),
                             [(None, "root"), ("", "root"), ("a:b/c d", "a_b_c_d"), ("://", "___"),
                              ("a\tb\\c-é", "a\tb\\c-é"), ("  ", "__")])
    def test_environment_bucket_replaces_colon_slash_and_space(self, monkeypatch, value, bucket):
        monkeypatch.delenv("FLOW_PROCESS_BUCKET", raising=False)
        if value is not None:
            monkeypatch.setenv("FLOW_PROCESS_BUCKET", value)
        assert flowstore.environment_bucket() == bucket

    @pytest.mark.parametrize(("value", "expected"),
                             [(None, ""), ("", ""), ("plain", "plain"), ("${OTHER}", "its value"),
                              ("${MISSING}", ""), ("${OTHER} ", "${OTHER} "),
                              ("$OTHER", "$OTHER"),
                              ("x${OTHER}", "x${OTHER}"), ("${INDIRECT}", "${OTHER}")])
    def test_run_env_value_follows_exactly_one_reference(self, monkeypatch, value, expected):
        monkeypatch.setenv("OTHER", "its value")
        monkeypatch.setenv("INDIRECT", "${OTHER}")
        monkeypatch.delenv("MISSING", raising=False)
        monkeypatch.delenv("SUBJECT", raising=False)
        if value is not None:
            monkeypatch.setenv("SUBJECT", value)
        assert flowstore.run_env_value("SUBJECT") == expected


# ---- the model and the store, step by step ----------------------------------------------------------------

any_name = st.sampled_from(["a", "é", "\udcff", "x\0y", "\U0001f600"]) | surviving_texts.filter(bool)
some_names = st.shared(st.lists(any_name, min_size=2, max_size=3), key="names of a run").flatmap(
    lambda names: st.sampled_from(["root", *names]))  # few, so that operations meet
some_values = st.sampled_from(["", "v"]) | surviving_texts
some_zones = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
some_instants = st.sampled_from([START, START.astimezone(timezone(timedelta(hours=2))), ZERO_TIME, LAST_TIME])
some_instants |= st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=some_zones)
some_integers = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)
some_limits = st.integers(-1, 4)
some_executions = st.builds(
    ExecutionRecord, ref=some_names, started_at=some_instants, duration=st.timedeltas(-LONGEST, LONGEST),
    exit_code=some_integers, id=st.sampled_from(["", "1", "2", "\udcff"]), pid=some_integers,
    error=some_values,
    completed_at=st.none() | some_instants, status=st.sampled_from(["", "running", "failed"]),
    label=some_values)
some_runs = st.builds(
    BackgroundRun, id=some_names, pid=some_integers, ref=some_names, started_at=some_instants,
    status=some_values,
    error=some_values, completed_at=st.none() | some_instants)
several_names = st.lists(some_names, max_size=4)
some_calls = st.one_of(*(st.tuples(st.just(method), st.tuples(*arguments)) for method, *arguments in [
    ("set_cache_entry", some_names, st.binary(max_size=20)), ("get_cache_entry", some_names),
    ("get_cache_entries", several_names), ("delete_cache_entry", some_names),
    ("record_execution", some_executions),
    ("record_execution", some_executions), ("get_execution_history", some_names, some_limits),
    ("get_execution_histories", several_names, some_limits), ("get_all_execution_history", some_limits),
    ("list_execution_refs",), ("delete_execution_history", some_names), ("save_background_run", some_runs),
    ("save_background_run", some_runs), ("get_background_run", some_names),
    ("get_background_runs", several_names),
    ("list_background_runs",), ("delete_background_run", some_names), ("create_process_bucket", some_names),
    ("delete_process_bucket", some_names), ("list_process_buckets",),
    ("set_process_var", some_names, some_names, some_values),
    ("set_process_var", some_names, some_names, some_values),
    ("get_process_var", some_names, some_names), ("get_all_process_vars", some_names),
    ("get_process_var_keys", some_names), ("delete_process_var", some_names, some_names), ("close",)]))


def outcome_of(store, method, arguments):
    """What a call returns, in its order, or the kind of what it raises."""
    try:
        result = getattr(store, method)(*arguments)
    except Exception as error:
        return type(error)
    return list(result.items()) if isinstance(result, dict) else result


class StoreAndModel(RuleBasedStateMachine):
    """The same operations on a real store and on the model, in and out of sessions and transactions."""

    @initialize()
    def start(self):
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # no disk to wait for
        self.folder = tempfile.mkdtemp(dir=memory)
        self.real = self.store = flowstore.SQLiteDataStore(os.path.join(self.folder, "store.db"))
        self.model = self.plain = DictStore()
        self.opened = []

    def enter(self, real, model):
        stack = contextlib.ExitStack()
        self.opened.append((stack, self.real, self.model))
        self.real, self.model = stack.enter_context(real), stack.enter_context(model)

    def leave(self, error=None):
        stack, real, model = self.opened.pop()
        with contextlib.suppress(ArithmeticError), stack:
            if error:
                raise error
        self.real, self.model = real, model

    @rule(calls=st.lists(some_calls, min_size=1, max_size=12))
    def operate(self, calls):
        for call in calls:
            assert outcome_of(self.real, *call) == outcome_of(self.model, *call)

    @precondition(lambda self: not self.opened)
    @rule()
    def begin_session(self):
        self.enter(self.store.session(), contextlib.nullcontext(self.plain))

    @precondition(lambda self: not getattr(self.model, "inside", False))
    @rule()
    def begin_transaction(self):
        self.enter(self.real.transaction(), self.model.transaction())

    @precondition(lambda self: self.opened)
    @rule()
    def end_well(self):
        self.leave()

    @precondition(lambda self: self.opened)
    @rule()
    def end_by_an_error(self):
        self.leave(ArithmeticError())

    @precondition(lambda self: not self.opened)
    @rule(really=st.sampled_from([False, False, False, False, True]))
    def destroy(self, really):
        if really:
            flowstore.destroy_store(self.store.path)
            self.model = self.plain = DictStore()

    def teardown(self):
        if hasattr(self, "folder"):
            while self.opened:
                self.leave()
            self.operate([("list_process_buckets", ()), ("list_background_runs", ()),
                          ("get_all_execution_history", ())])
            assert os.listdir(self.folder) in (["store.db"], [])
            shutil.rmtree(self.folder)


class TestModel:
    def test_store_does_what_the_model_does(self):
        run_state_machine_as_test(StoreAndModel, settings=settings(
            max_examples=80, stateful_step_count=30, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck)))

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(surviving_texts)
    def test_text_from_any_bytes_survives_in_the_stores_own_terms(self, text):
        assert flowstore.BackgroundRun.from_dict(run_of(error=text).to_dict()).error == text

    @settings(max_examples=300, deadline=None, derandomize=True, database=None,
              suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(all_texts.filter(bool))
    @example("\ud800")
    @example("\udcc3\udcbc")
    @example("\udcff")
    def test_text_is_a_name_exactly_where_it_survives_utf8(self, tmp_path, text):
        store = flowstore.SQLiteDataStore(tmp_path / "store.db")
        if survives(text):
            assert store.get_cache_entry(text) is None
        else:
            with pytest.raises(ValueError):
                store.get_cache_entry(text)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(some_executions, some_runs)
    def test_records_survive_their_json(self, record, run):
        assert ExecutionRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
        assert BackgroundRun.from_dict(json.loads(json.dumps(run.to_dict()))) == run


FULL_EXECUTION = {
    "ref": "build app", "startedAt": "2024-01-02T03:04:05.678901Z", "duration": 1500000000, "exitCode": 3,
    "error": "exit status 3", "logArchiveId": "log", "id": "1", "completedAt": "2024-01-02T03:04:07Z",
    "status": "failed", "pid": 7, "command": "make", "spec": "spec", "label": "label", "source": "cli",
    "clientName": "client", "sessionId": "session", "workingDir": "/src",
}
FULL_BACKGROUND = {
    "id": "run 1", "pid": 7, "ref": "serve", "startedAt": "2024-01-02T03:04:05.678901Z",
    "status": "running",
    "logArchiveId": "log", "error": "killed", "completedAt": "2024-01-02T03:04:07.5Z",
}


class TestRecords:
    """Records on their own: the named tuples and the original's JSON."""

    def test_fields_come_in_their_order_with_their_defaults(self):
        assert ExecutionRecord._fields == (
            "ref", "started_at", "duration", "exit_code", "error", "log_archive_id", "id", "completed_at",
            "status", "pid",
            "command", "spec", "label", "source", "client_name", "session_id", "working_dir")
        assert ExecutionRecord("r", START)[2:] == (timedelta(0), 0, "", "", "", None, "", 0, *[""] * 7)
        assert BackgroundRun._fields == (
            "id", "pid", "ref", "started_at", "status", "log_archive_id", "error", "completed_at")
        assert BackgroundRun("i", 1, "r", START, "running")[5:] == ("", "", None)
        for kind, arguments in ((ExecutionRecord, ("r",)), (BackgroundRun, ("i", 1, "r", START))):
            with pytest.raises(TypeError):
                kind(*arguments)

    @pytest.mark.parametrize("record", [execution_of(), run_of()])
    def test_record_is_immutable_and_hashable(self, record):
        for field in (*record._fields, "another"):
            with pytest.raises(AttributeError):
                setattr(record, field, "x")
        assert record in {record}
        assert record._replace(ref="other") != record

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_record_pickles_and_copies(self, protocol):
        for record in (execution_of(), run_of()):
            copied = pickle.loads(pickle.dumps(record, protocol))
            assert copied == copy.deepcopy(record) == record
            assert type(copied) is type(record)

    @pytest.mark.parametrize(("kind", "document"),
                             [(ExecutionRecord, FULL_EXECUTION), (BackgroundRun, FULL_BACKGROUND)])
    def test_full_record_is_the_originals_json(self, kind, document):
        record = kind.from_dict(document)
        assert record.to_dict() == document
        assert all(type(value) in (str, int) for value in record.to_dict().values())
        assert "" not in record
        assert None not in record
        assert kind.from_dict(json.loads(json.dumps(document))) == record

    def test_full_record_has_its_fields(self):
        assert ExecutionRecord.from_dict(FULL_EXECUTION) == ExecutionRecord(
            "build app", START, timedelta(seconds=1.5), 3, "exit status 3", "log", "1",
            datetime(2024, 1, 2, 3, 4, 7, tzinfo=UTC), "failed", 7, "make", "spec", "label", "cli", "client",
            "session", "/src")

    def test_empty_fields_are_left_out_but_for_those_that_are_always_there(self):
        assert execution_of().to_dict() == {
            "ref": "build app", "startedAt": "2024-01-02T03:04:05.678901Z", "duration": 0, "exitCode": 0}
        assert run_of("", pid=0, ref="", status="").to_dict() == {
            "id": "", "pid": 0, "ref": "", "startedAt": "2024-01-02T03:04:05.678901Z", "status": ""}

    @pytest.mark.parametrize(("moment", "text"), [
        (ZERO_TIME, "0001-01-01T00:00:00Z"), (LAST_TIME, "9999-12-31T23:59:59.999999Z"),
        (START.replace(microsecond=120000), "2024-01-02T03:04:05.12Z"),
        (START.replace(microsecond=1), "2024-01-02T03:04:05.000001Z"),
        (datetime(2024, 1, 2, 10, 20, tzinfo=timezone(timedelta(hours=5, minutes=30))),
         "2024-01-02T04:50:00Z")])
    def test_times_are_rfc_3339_in_utc_with_trailing_zeros_trimmed(self, moment, text):
        assert execution_of(started_at=moment).to_dict()["startedAt"] == text
        assert run_of(completed_at=moment).to_dict()["completedAt"] == text
        assert ExecutionRecord.from_dict({"ref": "r", "startedAt": text}).started_at == moment

    @pytest.mark.parametrize(("text", "moment"), [
        ("2024-01-02T03:04:05.678901999Z", START), ("2024-01-02T03:04:05.6789019991234Z", START),
        ("2024-01-02T05:34:05.678901+02:30", START), ("2024-01-01T23:04:05.678901-04:00", START),
        ("0001-01-01T00:00:00-00:01", ZERO_TIME.replace(minute=1)),
        ("9999-12-31T23:59:59.999999999Z", LAST_TIME)])
    def test_nanoseconds_and_offsets_are_read(self, text, moment):
        read = ExecutionRecord.from_dict({"ref": "r", "startedAt": text}).started_at
        assert read == moment
        assert read.tzinfo is UTC

    @pytest.mark.parametrize(("nanoseconds", "duration"), [
        (1999, timedelta(microseconds=1)), (-1999, timedelta(microseconds=-1)), (2**63 - 1, LONGEST),
        (-(2**63), -LONGEST)])
    def test_durations_are_cut_to_microseconds_towards_zero(self, nanoseconds, duration):
        record = ExecutionRecord.from_dict({"ref": "r", "startedAt": "2024-01-01T00:00:00Z",
                                            "duration": nanoseconds})
        assert record.duration == duration

    def test_other_tags_are_ignored_and_none_is_empty(self):
        empty = dict.fromkeys(FULL_EXECUTION) | {"ref": "r", "startedAt": "2024-01-02T03:04:05.678901Z",
                                                 "bucket": 1}
        assert ExecutionRecord.from_dict(empty) == execution_of("r")
        empty = dict.fromkeys(FULL_BACKGROUND) | {"id": "i", "ref": "r",
                                                  "startedAt": "2024-01-02T03:04:05.678901Z"}
        assert BackgroundRun.from_dict(empty) == BackgroundRun("i", 0, "r", START, "")

    @pytest.mark.parametrize(("kind", "document", "tag"), [
        (ExecutionRecord, FULL_EXECUTION, "ref"), (ExecutionRecord, FULL_EXECUTION, "startedAt"),
        (BackgroundRun, FULL_BACKGROUND, "id"),
        (BackgroundRun, FULL_BACKGROUND, "ref"), (BackgroundRun, FULL_BACKGROUND, "startedAt")])
    def test_missing_tag_is_a_value_error_that_names_it(self, kind, document, tag):
        for incomplete in (document | {tag: None},
                           {key: value for key, value in document.items() if key != tag}):
            with pytest.raises(ValueError, match=tag):
                kind.from_dict(incomplete)

    @pytest.mark.parametrize(("tag", "value"), [
        ("ref", 1), ("startedAt", 0), ("startedAt", START), ("duration", 1.0), ("duration", "1s"),
        ("exitCode", True),
        ("pid", "7"), ("error", b"x"), ("completedAt", 5), ("status", ["failed"])])
    def test_tag_of_another_type_is_a_type_error(self, tag, value):
        with pytest.raises(TypeError):
            ExecutionRecord.from_dict(FULL_EXECUTION | {tag: value})
        if tag in FULL_BACKGROUND:
            with pytest.raises(TypeError):
                BackgroundRun.from_dict(FULL_BACKGROUND | {tag: value})

    @pytest.mark.parametrize("document", [None, [], "{}", (("ref", "r"),)])
    def test_document_of_another_type_is_a_type_error(self, document):
        for kind in (ExecutionRecord, BackgroundRun):
            with pytest.raises(TypeError):
                kind.from_dict(document)

    @pytest.mark.parametrize(("tag", "value"), [
        ("duration", 2**63), ("pid", -(2**63) - 1), ("exitCode", 2**64), ("error", "\ud800"),
        *(("startedAt", text) for text in (
            "", "Z", "2024-01-02", "2024-01-02T03:04:05", "2024-01-02 03:04:05Z", "20240102T030405Z",
            "2024-01-02T03:04Z",
            "2024-1-2T03:04:05Z", "2024-01-02T03:04:05.Z", "2024-01-02T03:04:05,5Z", "2024-13-02T03:04:05Z",
            "2024-01-02T24:00:01Z", "2024-01-02T03:04:60Z", "2024-01-02T03:04:05+0200",
            "2024-01-02T03:04:05+02",
            "2024-01-02T03:04:05+25:00", "2024-01-02T03:04:05+02:00Z", "2024-01-02T03:04:05.\uff15Z",
            "\uff12024-01-02T03:04:05Z",
            "2024-W01-2T03:04:05Z", "2024-01-02T03:04.05Z", "2024-01-02T03040506Z", "0000-01-01T00:00:00Z",
            "10000-01-01T00:00:00Z", "0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01", "now"))])
    def test_tag_out_of_range_is_a_value_error(self, tag, value):
        with pytest.raises(ValueError):
            ExecutionRecord.from_dict(FULL_EXECUTION | {tag: value})

    def test_naive_or_distant_time_has_no_json(self):
        for moment in (datetime(2024, 1, 1), datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1)))):
            with pytest.raises(ValueError):
                execution_of(started_at=moment).to_dict()


class TestPaths:
    """Where a store is, and how one is named."""

    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch, tmp_path):
        for name in ("FLOWSTORE_PATH", "FLOW_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", "/home/somebody")
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize(("platform", "variables", "expected"), [
        ("linux", {}, "/home/somebody/.cache/flow/flowstore.db"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/flow/flowstore.db"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/home/somebody/.cache/flow/flowstore.db"),
        ("linux", {"XDG_CACHE_HOME": "/x", "FLOW_CACHE_DIR": "/c"}, "/c/flowstore.db"),
        ("linux", {"FLOW_CACHE_DIR": "/c/../d"}, "/d/flowstore.db"),
        ("linux", {"FLOW_CACHE_DIR": "", "FLOWSTORE_PATH": ""}, "/home/somebody/.cache/flow/flowstore.db"),
        ("linux", {"FLOW_CACHE_DIR": "/c", "FLOWSTORE_PATH": "/f/my.db"}, "/f/my.db"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "/home/somebody/Library/Caches/flow/flowstore.db"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/flow/flowstore.db")])
    def test_default_path_follows_the_environment(self, monkeypatch, platform, variables, expected):
        monkeypatch.setattr(sys, "platform", platform)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert flowstore.default_path() == expected

    def test_relative_default_path_is_made_absolute_and_nothing_is_made(self, monkeypatch, tmp_path):
        monkeypatch.setenv("FLOW_CACHE_DIR", "sub")
        assert flowstore.default_path() == str(tmp_path / "sub" / "flowstore.db")
        monkeypatch.setenv("FLOWSTORE_PATH", "my.db")
        assert flowstore.default_path() == str(tmp_path / "my.db")
        assert list(tmp_path.iterdir()) == []

    def test_user_without_a_cache_folder_is_a_store_error(self, monkeypatch):
        monkeypatch.setenv("HOME", "relative")
        with pytest.raises(StoreError, match="FLOWSTORE_PATH"):
            flowstore.default_path()

    @pytest.mark.parametrize("arguments", [(), (None,), ("",)])
    def test_no_path_is_the_default_path(self, monkeypatch, tmp_path, arguments):
        monkeypatch.setenv("FLOW_CACHE_DIR", str(tmp_path / "cache"))
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "store.db").write_bytes(b"the original's own")
        store = filled(flowstore.SQLiteDataStore(*arguments))
        assert store.path == str(tmp_path / "cache" / "flowstore.db")
        assert sorted(os.listdir("cache")) == ["flowstore.db", "store.db"]
        assert flowstore.migrate_process_buckets(*arguments) == []
        flowstore.destroy_store(*arguments)
        assert os.listdir("cache") == ["store.db"]
        assert (tmp_path / "cache" / "store.db").read_bytes() == b"the original's own"

    @pytest.mark.parametrize("path", [":memory:", b":memory:", pathlib.Path(":memory:"), "a\0b"])
    def test_memory_and_nul_are_value_errors(self, path):
        for function in (flowstore.SQLiteDataStore, flowstore.destroy_store,
                         flowstore.migrate_process_buckets):
            with pytest.raises(ValueError):
                function(path)
        assert os.listdir() == []

    @pytest.mark.parametrize("path", [1, 1.5, ["x"], object()])
    def test_path_of_another_type_is_a_type_error(self, path):
        with pytest.raises(TypeError):
            flowstore.SQLiteDataStore(path)

    @pytest.mark.parametrize("name", [
        "plain.db", b"bytes.db", pathlib.Path("a/b/../c.db"), "file:uri?mode=memory", "100%25 #?&;.db",
        "\udcff.db", "new\nline",
        "Grüße \U0001f600", "'quo\"te\\.db", "-dash", "x:memory:", "./:memory:", "a" * 200])
    def test_any_name_of_a_file_serves(self, tmp_path, name):
        store = flowstore.SQLiteDataStore(name)
        assert store.path == os.path.abspath(os.fsdecode(name))
        filled(store)
        assert contents_of(flowstore.SQLiteDataStore(store.path)) == contents_of(filled(DictStore()))
        files = [file for _, _, files in os.walk(os.fsencode(tmp_path)) for file in files]
        assert files == [os.fsencode(os.path.basename(store.path))]

    def test_path_stays_absolute_when_the_folder_changes(self, tmp_path, monkeypatch):
        store = filled(flowstore.SQLiteDataStore("store.db"))
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        assert store.path == str(tmp_path / "store.db")
        assert store.get_cache_entry("k") == b"value"
        assert os.listdir() == []

    def test_link_leads_to_one_store_whatever_the_path(self, tmp_path):
        os.symlink("real.db", "link.db")
        store = flowstore.SQLiteDataStore("link.db")
        filled(store)
        assert store.path == str(tmp_path / "link.db")
        assert os.path.islink("link.db")
        assert flowstore.SQLiteDataStore("real.db").get_cache_entry("k") == b"value"
        assert sorted(os.listdir()) == ["link.db", "real.db"]

    def test_relative_path_in_a_removed_folder_is_a_store_error(self, tmp_path):
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir(tmp_path / "gone")
        with pytest.raises(StoreError):
            flowstore.SQLiteDataStore("store.db")

    @pytest.mark.parametrize(("timeout", "error"), [
        (float("nan"), ValueError), (-1, ValueError), (-0.001, ValueError), (float("-inf"), ValueError),
        (True, TypeError),
        ("3", TypeError), (None, TypeError)])
    def test_timeout_that_is_none_is_refused_before_the_file_is_made(self, timeout, error):
        with pytest.raises(error):
            flowstore.SQLiteDataStore("store.db", timeout=timeout)
        assert os.listdir() == []

    @pytest.mark.parametrize("timeout", [0, 0.0, 1e-9, 3, float("inf"), 10**400, sys.float_info.max])
    def test_timeout_is_clamped_to_what_works(self, timeout):
        assert filled(flowstore.SQLiteDataStore("store.db", timeout=timeout)).get_cache_entry("k") == b"value"

    def test_timeout_is_named(self):
        with pytest.raises(TypeError):
            flowstore.SQLiteDataStore("store.db", 3.0)

    @pytest.mark.parametrize("copied", [lambda store: pickle.loads(pickle.dumps(store)), copy.copy,
                                        copy.deepcopy])
    def test_store_pickles_and_copies(self, copied):
        store = flowstore.SQLiteDataStore("store.db", timeout=0)
        other = copied(store)
        filled(other)
        assert other.path == store.path
        assert contents_of(store) == contents_of(other)
        with another_process(LOCKER, other.path, "BEGIN IMMEDIATE"), pytest.raises(StoreBusyError):
            other.set_cache_entry("k", b"new")

    def test_repr_names_the_file(self, tmp_path):
        assert repr(str(tmp_path / "store.db")) in repr(flowstore.SQLiteDataStore("store.db"))

    def test_store_is_shared_by_threads(self):
        store = flowstore.SQLiteDataStore("store.db", timeout=60)
        threads = [threading.Thread(target=store.set_cache_entry, args=(str(n), b"%d" % n)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert store.get_cache_entries(map(str, range(8))) == {str(n): b"%d" % n for n in range(8)}


class TestFile:
    """What lies on the disk."""

    @pytest.mark.parametrize("call", [*CALLS, ("list_process_buckets", ()), ("close", ())],
                             ids=lambda call: call[0])
    def test_one_file_is_at_rest_after_each_operation(self, tmp_path, path, call):
        store = filled(flowstore.SQLiteDataStore(path))
        getattr(store, call[0])(*call[1])
        assert os.listdir(tmp_path) == ["store.db"]

    def test_one_file_is_at_rest_after_sessions_and_transactions(self, tmp_path, path):
        store = flowstore.SQLiteDataStore(path)
        for context in (store.session, store.transaction):
            with pytest.raises(ArithmeticError), context() as inner:
                filled(inner)
                raise ArithmeticError
            with context() as inner:
                filled(inner)
            assert os.listdir(tmp_path) == ["store.db"]

    def test_operations_raise_no_warning(self, path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            store = filled(flowstore.SQLiteDataStore(path))
            with store.transaction() as transaction:
                for method, arguments in CALLS:
                    getattr(filled(transaction), method)(*arguments)

    def test_misuse_is_refused_before_the_file_is_touched(self, tmp_path, path):
        store = flowstore.SQLiteDataStore(path)
        os.unlink(path)
        refused = [*calls_with(""), *calls_with("\ud800"), *calls_with(None),
                   ("record_execution", (execution_of(started_at=datetime(2024, 1, 1)),)),
                   ("record_execution", (execution_of(duration=timedelta.max),)),
                   ("record_execution", (execution_of(pid="1"),)),
                   ("save_background_run", (run_of(pid=2**63),)), ("save_background_run", (run_of(error=1),)),
                   ("set_process_var", ("k", "k", b"v")), ("set_cache_entry", ("k", "v")),
                   ("get_execution_history", ("k", "1")), ("get_all_execution_history", (2**63,))]
        for method, arguments in refused:
            with pytest.raises((ValueError, TypeError)):
                getattr(store, method)(*arguments)
        assert os.listdir(tmp_path) == []

    def test_store_that_was_removed_reads_as_empty_and_is_made_by_a_write(self, tmp_path, path):
        store = filled(flowstore.SQLiteDataStore(path))
        os.unlink(path)
        assert contents_of(store) == contents_of(DictStore())
        assert os.listdir(tmp_path) == []
        assert contents_of(filled(store)) == contents_of(filled(DictStore()))

    def test_file_is_sqlite_in_wal_mode_with_our_identity(self, path):
        filled(flowstore.SQLiteDataStore(path))
        assert sql_values(path, "PRAGMA journal_mode") == ["wal"]
        assert sql_values(path, "PRAGMA application_id") == [APPLICATION_ID]
        assert sql_values(path, "PRAGMA user_version") == [1]
        assert sql_values(path, "PRAGMA integrity_check") == ["ok"]

    def test_file_has_a_table_per_concern_and_a_register_of_buckets(self, path):
        store = filled(flowstore.SQLiteDataStore(path))
        store.create_process_bucket("empty")
        tables = sql_values(path, "SELECT name FROM sqlite_master WHERE type = 'table'")
        assert {"cache", "history", "background", "process_vars"} < set(tables)
        assert len(tables) == 5
        assert {name: len(sql_values(path, f"SELECT * FROM {name}")) for name in tables} == {
            **dict.fromkeys(tables, 1), "process_buckets": 2}

    def test_variables_are_keyed_by_bucket_and_key(self, path):
        flowstore.SQLiteDataStore(path)
        keys = {name: place for _, name, _, _, _,
                place in sql_values(path, "PRAGMA table_info(process_vars)") if place}
        assert keys == {"bucket": 1, "key": 2}

    def test_times_are_fixed_width_text_that_sqlite_tools_read_and_durations_nanoseconds(self, path):
        store = flowstore.SQLiteDataStore(path)
        for moment in (ZERO_TIME, START, LAST_TIME):
            store.record_execution(execution_of(started_at=moment, completed_at=moment,
                                                duration=timedelta(microseconds=-1)))
        columns = "started_at, completed_at, duration, typeof(duration)"
        rows = sql_values(path, f"SELECT {columns} FROM history ORDER BY 1")
        assert [row[:2] for row in rows] == [(text, text) for text in (
            "0001-01-01T00:00:00.000000000Z", "2024-01-02T03:04:05.678901000Z",
            "9999-12-31T23:59:59.999999000Z")]
        assert {row[2:] for row in rows} == {(-1000, "integer")}
        assert "2024-01-02 03:04:05" in sql_values(path, "SELECT datetime(started_at) FROM history")

    def test_nanoseconds_in_the_file_read_as_microseconds(self, path):
        store = flowstore.SQLiteDataStore(path)
        store.record_execution(execution_of())
        with raw_sql(path) as sql:
            sql.execute("UPDATE history SET started_at = '2024-01-02T03:04:05.678901999Z', duration = 1999")
        assert store.get_execution_history("build app") == [execution_of(duration=timedelta(microseconds=1))]

    def test_deleted_and_replaced_values_are_overwritten(self, path):
        store = flowstore.SQLiteDataStore(path)
        secret = "secret-of-the-test " * 400
        store.set_cache_entry("cache", secret.encode())
        store.set_process_var("scope", "replaced", secret)
        store.set_process_var("scope", "deleted", secret)
        store.set_process_var("dropped", "k", secret)
        store.record_execution(execution_of(error=secret))
        store.save_background_run(run_of(error=secret))
        assert b"secret-of-the-test" in pathlib.Path(path).read_bytes()
        store.delete_cache_entry("cache")
        store.set_process_var("scope", "replaced", "new")
        store.delete_process_var("scope", "deleted")
        store.delete_process_bucket("dropped")
        store.delete_execution_history("build app")
        store.delete_background_run("run 1")
        assert b"secret-of-the-test" not in pathlib.Path(path).read_bytes()

    @needs_root
    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
    def test_file_is_0600_and_its_new_folders_0700_whatever_the_umask(self, public_folder, umask):
        os.chown(public_folder, NOBODY, NOBODY)

        def work():
            os.umask(umask)
            filled(flowstore.SQLiteDataStore(public_folder / "a" / "b" / "store.db"))
            with flowstore.SQLiteDataStore(public_folder / "a" / "b" / "store.db").session() as session:
                session.set_cache_entry("k", b"v")
                return {str(file.relative_to(public_folder)): mode_of(file)
                        for file in public_folder.rglob("*")}

        modes = in_a_fork(work, user=NOBODY)
        assert modes.pop("a") == modes.pop("a/b") == 0o700
        assert modes.keys() == {"a/b/store.db", "a/b/store.db-wal", "a/b/store.db-shm"}
        assert set(modes.values()) == {0o600}
        assert mode_of(public_folder) == 0o755

    def test_zero_length_file_becomes_a_store_with_mode_0600(self, tmp_path, path):
        pathlib.Path(path).touch()
        os.chmod(path, 0o644)
        filled(flowstore.SQLiteDataStore(path))
        assert mode_of(path) == 0o600
        assert sql_values(path, "PRAGMA application_id") == [APPLICATION_ID]

    def test_mode_of_an_existing_store_is_its_owners_choice(self, path):
        store = flowstore.SQLiteDataStore(path)
        os.chmod(path, 0o640)
        filled(store)
        flowstore.SQLiteDataStore(path)
        assert mode_of(path) == 0o640

    @pytest.mark.parametrize("statement", ["DROP INDEX history_by_start", "PRAGMA user_version = 0"])
    @pytest.mark.parametrize("opened_before", [False, True])
    def test_older_schema_is_completed_and_keeps_its_values(self, path, statement, opened_before):
        before = filled(flowstore.SQLiteDataStore(path))
        with raw_sql(path) as sql:
            sql.execute("DROP TABLE background")
            sql.execute(statement)
        store = before if opened_before else flowstore.SQLiteDataStore(path)
        assert store.get_cache_entry("k") == b"value"
        assert store.get_execution_history("k") == [execution_of("k")]
        store.save_background_run(run_of("k"))
        assert store.list_background_runs() == [run_of("k")]
        assert sql_values(path, "PRAGMA user_version") == [1]

    def test_added_columns_indexes_and_tables_still_open_and_are_left_alone(self, path):
        store = filled(flowstore.SQLiteDataStore(path))
        with raw_sql(path) as sql:
            for table in ("cache", "history", "background", "process_vars"):
                sql.execute(f"ALTER TABLE {table} ADD COLUMN added TEXT DEFAULT 'x'")
            sql.execute("CREATE INDEX by_pid ON history (pid)")
            sql.execute("CREATE TABLE notes (note TEXT CHECK (length(note) > 1))")
            sql.execute("CREATE TABLE legacy (key, value)")
            sql.execute("CREATE VIEW pids AS SELECT pid FROM history")
            sql.execute("CREATE TRIGGER on_notes AFTER INSERT ON notes BEGIN SELECT 1; END")
            sql.execute("INSERT INTO notes VALUES ('kept')")
            sql.execute("INSERT INTO legacy VALUES ('k', 'v')")
        for each in (store, flowstore.SQLiteDataStore(path)):
            filled(each, "another")
            each.delete_execution_history("another")
            each.delete_background_run("another")
            assert contents_of(each)[1:] == contents_of(filled(DictStore()))[1:]
        assert sql_values(path, "SELECT note FROM notes") == ["kept"]
        assert sql_values(path, "SELECT key, value FROM legacy") == [("k", "v")]
        assert sql_values(path, "SELECT pid FROM pids") == [0]

    @pytest.mark.parametrize("statement", [
        "CREATE TRIGGER spy AFTER INSERT ON cache BEGIN DELETE FROM cache; END",
        "DROP TABLE cache; CREATE VIEW cache AS SELECT 'k' AS key, x'00' AS value",
        "DROP TABLE cache; CREATE TABLE cache (key TEXT, value BLOB)"])
    def test_store_in_which_another_thing_stands_for_a_table_is_refused(self, tmp_path, path, statement):
        store = filled(flowstore.SQLiteDataStore(path))
        with raw_sql(path) as sql:
            sql.executescript(statement)
        before = files_in(tmp_path)
        for work in (lambda: flowstore.SQLiteDataStore(path), lambda: store.set_cache_entry("k", b"1"),
                     lambda: store.get_cache_entry("k")):
            with pytest.raises(CorruptStoreError):
                work()
        assert files_in(tmp_path) == before

    def test_cell_that_its_column_cannot_hold_is_a_corrupt_store_error(self, path):
        store = filled(flowstore.SQLiteDataStore(path))
        with raw_sql(path) as sql:
            sql.execute("UPDATE cache SET value = 5")
            sql.execute("UPDATE history SET started_at = 'yesterday'")
            sql.execute("UPDATE background SET pid = 'many'")
            sql.execute("UPDATE process_vars SET value = CAST(x'80' AS TEXT)")
        for method in ("get_cache_entry", "get_execution_history", "get_background_run",
                       "get_all_process_vars"):
            with pytest.raises(CorruptStoreError):
                getattr(store, method)("k")
            with pytest.raises(CorruptStoreError), store.session() as session:
                getattr(session, method)("k")

    @pytest.mark.parametrize("page", [2, 3, 4, 5])
    def test_damaged_page_is_a_corrupt_store_error(self, path, page):
        store = filled(flowstore.SQLiteDataStore(path))
        size = sql_values(path, "PRAGMA page_size")[0]
        with open(path, "r+b") as stream:
            stream.seek(page * size)
            stream.write(b"\xa5" * size)
        with pytest.raises(CorruptStoreError, match=re.escape(path)):
            for method, arguments in CALLS:
                getattr(store, method)(*arguments)

    @needs_root
    def test_reads_work_where_nothing_can_be_written(self, public_folder):
        path = public_folder / "store.db"
        expected = contents_of(filled(flowstore.SQLiteDataStore(path)))
        path.chmod(0o644)
        before = files_in(public_folder)

        def work():
            store = flowstore.SQLiteDataStore(path)
            with store.session() as session:
                read = [contents_of(store), contents_of(session)]
            for method, arguments in calls_with("k")[:5:4]:
                with pytest.raises(StoreError):
                    getattr(store, method)(*arguments)
            return read

        assert in_a_fork(work, user=NOBODY) == [expected, expected]
        assert files_in(public_folder) == before

    def test_destroyed_store_is_gone_and_destroying_a_missing_one_makes_nothing(self, tmp_path, path):
        store = filled(flowstore.SQLiteDataStore(path))
        assert flowstore.destroy_store(path) is None
        assert os.listdir(tmp_path) == []
        flowstore.destroy_store(path)
        flowstore.destroy_store(tmp_path / "no folder" / "store.db")
        assert os.listdir(tmp_path) == []
        assert contents_of(store) == contents_of(DictStore())
        assert contents_of(filled(store)) == contents_of(filled(DictStore()))

    def test_store_that_another_process_keeps_open_is_emptied(self, tmp_path, path):
        filled(flowstore.SQLiteDataStore(path)).set_cache_entry("k", b"secret-of-the-test")
        with another_process(SESSION, path):
            with pytest.raises(StoreBusyError, match="emptied") as caught:
                flowstore.destroy_store(path)
            assert caught.value.path == path
            assert contents_of(flowstore.SQLiteDataStore(path)) == contents_of(DictStore())
        flowstore.SQLiteDataStore(path)
        assert b"secret-of-the-test" not in pathlib.Path(path).read_bytes()


def make_text(path):
    path.write_text("# no store, but somebody's notes\n" * 50)


def make_short_text(path):
    path.write_text("x")


def make_bbolt(path):
    meta = b"\0" * 8 + b"\4\0" + b"\0" * 6 + bytes.fromhex("edda0ced 02000000 00100000")
    path.write_bytes((meta.ljust(4096, b"\0")) * 2 + b"\0" * 8192)


def make_bbolt_with_a_damaged_page(path):
    make_bbolt(path)
    path.write_bytes(b"\xff" * 4096 + path.read_bytes()[4096:])


def make_sqlite(statements):
    def make(path):
        with raw_sql(path) as sql:
            sql.executescript(statements)

    return make


def make_newer(path):
    filled(flowstore.SQLiteDataStore(path))
    make_sqlite("PRAGMA user_version = 2")(path)


def make_device(path):
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
        os.chmod(path, 0o666)
    except OSError:
        pytest.skip("no device can be made here")


TABLES = "CREATE TABLE root (key, value); INSERT INTO root VALUES ('k', 'v');"
NO_STORES = [  # how it is made, the error, and what its message says
    (make_text, CorruptStoreError, "no SQLite file"),
    (make_short_text, CorruptStoreError, "no SQLite file"),
    (make_bbolt, CorruptStoreError, "flowstore import"),
    (make_bbolt_with_a_damaged_page, CorruptStoreError, "flowstore import"),
    (make_sqlite(TABLES), CorruptStoreError, "another program"),
    (make_sqlite("PRAGMA journal_mode = WAL;" + TABLES), CorruptStoreError, "another program"),
    (make_sqlite("PRAGMA user_version = 1"), CorruptStoreError, "another program"),
    (make_sqlite("PRAGMA application_id = 1"), CorruptStoreError, "another program"),
    (make_sqlite("PRAGMA application_id = 1; PRAGMA journal_mode = WAL;" + TABLES), CorruptStoreError,
     "another program"),
    (make_newer, StoreError, "newer flowstore"),
    (pathlib.Path.mkdir, StoreError, "file"),
    (os.mkfifo, StoreError, "."),
    (make_device, StoreError, "."),
]
NO_STORE_NAMES = ["text", "short text", "bbolt", "damaged bbolt", "foreign", "foreign wal", "foreign version",
                  "foreign id",
                  "foreign id wal", "newer", "directory", "pipe", "device"]


def checked_error(error, path):
    """An error of section 5: its message is one line that names the file, and it pickles."""
    message = str(error)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    assert error.path == str(path)
    assert len(message) > len(str(path)) + 10
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.path) == (type(error), message, error.path)
    return error


class TestErrors:
    """What the world does to a store, each by its class."""

    @pytest.mark.parametrize(("kind", "bases"), [
        (StoreError, (Exception,)), (NotFoundError, (StoreError, LookupError)),
        (StoreBusyError, (StoreError, TimeoutError, OSError)), (CorruptStoreError, (StoreError,))])
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_error_has_its_bases_and_pickles(self, kind, bases, protocol):
        assert all(issubclass(kind, base) for base in bases)
        assert issubclass(kind, OSError) == (kind is StoreBusyError)
        error = kind("/a/b: what is wrong: what to do", "/a/b")
        for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
            assert type(again) is kind
            assert str(again) == "/a/b: what is wrong: what to do"
            assert again.path == "/a/b"
        with pytest.raises(StoreError):
            raise error

    @pytest.mark.parametrize(("make", "kind", "phrase"), NO_STORES, ids=NO_STORE_NAMES)
    def test_what_is_no_store_is_refused_by_name_and_left_untouched(self, tmp_path, make, kind, phrase):
        path = tmp_path / "store.db"
        make(path)
        before = files_in(tmp_path)
        for function in (flowstore.SQLiteDataStore, flowstore.migrate_process_buckets,
                         flowstore.destroy_store):
            with pytest.raises(StoreError, match=phrase) as caught:
                function(path)
            assert isinstance(checked_error(caught.value, path), kind)
            assert files_in(tmp_path) == before

    @pytest.mark.parametrize(("make", "kind", "phrase"), NO_STORES, ids=NO_STORE_NAMES)
    def test_store_that_has_become_something_else_is_refused_by_each_operation(self, tmp_path, make, kind,
                                                                               phrase):
        path = tmp_path / "store.db"
        store = flowstore.SQLiteDataStore(path)
        path.unlink()
        make(path)
        before = files_in(tmp_path)
        works = [lambda: store.get_cache_entry("k"), lambda: store.set_cache_entry("k", b"v"),
                 store.list_execution_refs,
                 lambda: store.session().__enter__(), lambda: store.transaction().__enter__(),
                 lambda: store.backup(tmp_path / "backup")]
        for work in works:
            with pytest.raises(StoreError):
                work()
            assert files_in(tmp_path) == before

    @pytest.mark.parametrize("below", ["store.db", "a/store.db", "a/b/store.db"])
    def test_parent_that_is_a_file_is_refused(self, tmp_path, below):
        (tmp_path / "file").write_text("x")
        before = files_in(tmp_path)
        path = tmp_path / "file" / below
        with pytest.raises(StoreError) as caught:
            flowstore.SQLiteDataStore(path)
        checked_error(caught.value, path)
        flowstore.destroy_store(path)
        assert flowstore.migrate_process_buckets(path) == []
        assert files_in(tmp_path) == before

    def test_path_that_the_system_does_not_take_is_refused(self, tmp_path):
        for path in (tmp_path / ("x" * 300), tmp_path / "/".join(["x" * 200] * 3) / "store.db"):
            with pytest.raises(StoreError) as caught:
                flowstore.SQLiteDataStore(path)
            checked_error(caught.value, path)

    def test_link_that_leads_in_a_circle_is_refused(self, tmp_path):
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(StoreError):
            flowstore.SQLiteDataStore(tmp_path / "a")

    @needs_root
    def test_folder_that_is_closed_to_the_user_is_refused(self, public_folder):
        folder = public_folder / "closed"
        folder.mkdir(0o700)
        path = folder / "store.db"
        filled(flowstore.SQLiteDataStore(path))
        for closed in (path, public_folder / "new.db", public_folder / "a" / "new.db"):
            with pytest.raises(StoreError) as caught:
                in_a_fork(flowstore.SQLiteDataStore, closed, user=NOBODY)
            checked_error(caught.value, closed)
        assert os.listdir(public_folder) == ["closed"]

    def test_missing_variable_and_run_are_not_found_errors_that_name_them(self, path):
        store = flowstore.SQLiteDataStore(path)
        with pytest.raises(NotFoundError, match=r"'the key'.*'scope'.*root") as caught:
            store.get_process_var("scope", "the key")
        checked_error(caught.value, path)
        with pytest.raises(LookupError, match="'the run'") as caught:
            store.get_background_run("the run")
        checked_error(caught.value, path)
        with pytest.raises(NotFoundError) as caught:
            store.get_process_var("two\nlines", "two\nlines")
        checked_error(caught.value, path)

    @pytest.mark.parametrize("timeout", [0, 0.2])
    def test_lock_that_another_process_holds_is_a_store_busy_error_within_the_timeout(self, path, timeout):
        filled(flowstore.SQLiteDataStore(path))
        store = flowstore.SQLiteDataStore(path, timeout=timeout)
        with another_process(LOCKER, path, "BEGIN IMMEDIATE"):
            works = [lambda method=method, arguments=arguments: getattr(store, method)(*arguments)
                     for method, arguments in calls_with("k")[:5:4]]
            for work in (*works, lambda: store.transaction().__enter__()):
                start = time.monotonic()
                with pytest.raises(StoreBusyError) as caught:
                    work()
                assert timeout <= time.monotonic() - start < timeout + 10
                checked_error(caught.value, path)
            assert contents_of(store) == contents_of(filled(DictStore()))
        store.set_cache_entry("k", b"new")
        assert store.get_cache_entry("k") == b"new"

    def test_process_that_has_the_file_to_itself_makes_reads_a_store_busy_error(self, path):
        filled(flowstore.SQLiteDataStore(path))
        store = flowstore.SQLiteDataStore(path, timeout=0.1)
        with another_process(LOCKER, path, "PRAGMA locking_mode = EXCLUSIVE", "PRAGMA journal_mode = DELETE",
                             "BEGIN EXCLUSIVE"):
            for work in (lambda: store.get_cache_entry("k"),
                         lambda: flowstore.SQLiteDataStore(path, timeout=0),
                         lambda: store.session().__enter__()):
                with pytest.raises(TimeoutError) as caught:
                    work()
                assert type(checked_error(caught.value, path)) is StoreBusyError

    def test_lock_is_awaited(self, path):
        store = flowstore.SQLiteDataStore(path, timeout=float("inf"))
        with another_process(LOCKER, path, "BEGIN IMMEDIATE") as locker:
            thread = threading.Thread(target=store.set_cache_entry, args=("k", b"v"), daemon=True)
            thread.start()
            assert store.get_cache_entry("k") is None
            locker.stdin.close()
            thread.join(60)
            assert not thread.is_alive()
        assert store.get_cache_entry("k") == b"v"


def with_watched_connections(monkeypatch, watch):
    """Let watch see each connection that is opened from now on."""
    connect = sqlite3.connect

    def watched(*arguments, **options):
        sql = connect(*arguments, **options)
        watch(sql)
        return sql

    monkeypatch.setattr(sqlite3, "connect", watched)


class TestCost:
    """What must not grow, counted in SQLite's own steps."""

    @pytest.fixture
    def steps_of(self, monkeypatch):
        count = [0]

        def step():
            count[0] += 1

        with_watched_connections(monkeypatch, lambda sql: sql.set_progress_handler(step, 1))

        def steps_of(work, *arguments):
            before = count[0]
            work(*arguments)
            return count[0] - before

        return steps_of

    def test_newest_ten_cost_the_same_however_long_the_history_is(self, path, steps_of):
        store = flowstore.SQLiteDataStore(path)
        costs = []
        for count in (20, 2000):
            with store.transaction() as transaction:
                for number in random.Random(count).sample(range(count), count):
                    transaction.record_execution(execution_of("k",
                                                              started_at=START + timedelta(seconds=number)))
            works = [(store.get_execution_history, "k", 10), (store.get_execution_histories, ["k"], 10),
                     (store.get_all_execution_history, 10), (store.list_execution_refs,),
                     (store.record_execution, execution_of("k", id="1"))]
            costs.append([steps_of(*work) for work in works])
        assert all(later < 2 * earlier + 20 for earlier, later in zip(*costs, strict=True)), costs

    def test_bulk_reads_need_no_variable_per_name(self, path, monkeypatch):
        store = filled(flowstore.SQLiteDataStore(path))
        with_watched_connections(monkeypatch,
                                 lambda sql: sql.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 25))
        names = [*map(str, range(1000)), "k"]
        for handle in (contextlib.nullcontext(store), store.session(), store.transaction()):
            with handle as each:
                assert each.get_cache_entries(names) == {"k": b"value"}
                assert each.get_execution_histories(names) == {"k": [execution_of("k")]}
                assert each.get_background_runs(names) == {"k": run_of("k")}


class TestTransaction:
    """transaction() and session() of a file."""

    @pytest.fixture
    def store(self, path):
        return flowstore.SQLiteDataStore(path, timeout=60)  # a wait for oneself would be noticed

    def test_what_it_writes_is_seen_inside_and_by_nobody_else_before_its_end(self, store, path):
        other = flowstore.SQLiteDataStore(path)
        with store.transaction() as transaction:
            filled(transaction)
            inside = contents_of(transaction)
            assert inside == contents_of(filled(DictStore()))
            assert contents_of(store) == contents_of(other) == contents_of(DictStore())
            with other.session() as session:
                assert session.get_cache_entry("k") is None
        assert contents_of(other) == inside

    @pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, SystemExit, ArithmeticError])
    def test_exception_goes_on_as_it_is(self, store, error):
        raised = error("the very one")
        with pytest.raises(error) as caught, store.transaction() as transaction:
            transaction.set_cache_entry("k", b"1")
            raise raised
        assert caught.value is raised
        assert store.get_cache_entry("k") is None

    def test_interrupt_by_a_signal_leaves_nothing(self, store, interruptible):
        with pytest.raises(KeyboardInterrupt), store.transaction() as transaction:
            for number in range(1000):
                transaction.set_cache_entry(str(number), b"1")
                if number == 500:
                    signal.raise_signal(signal.SIGINT)
        assert store.get_cache_entries(map(str, range(1000))) == {}

    def test_writing_by_another_handle_in_its_thread_is_a_runtime_error_at_once(self, store, path, tmp_path):
        with raw_sql(path) as sql:
            sql.execute("CREATE TABLE legacy (key, value)")
        (tmp_path / "link.db").symlink_to(path)
        other, linked = flowstore.SQLiteDataStore(
            path, timeout=60), flowstore.SQLiteDataStore(tmp_path / "link.db", timeout=60)
        with other.session() as session, store.transaction() as transaction:
            transaction.set_cache_entry("before", b"1")
            for handle in (store, other, linked, session):
                for method, arguments in CALLS:
                    if re.match("set|delete|record|save|create", method):
                        with pytest.raises(RuntimeError):
                            getattr(handle, method)(*arguments)
            for work in (store.transaction, session.transaction, linked.transaction):
                with pytest.raises(RuntimeError), work():
                    pass
            for function in (flowstore.destroy_store, flowstore.migrate_process_buckets):
                with pytest.raises(RuntimeError):
                    function(path)
            transaction.set_cache_entry("after", b"2")
        assert store.get_cache_entries(["k", "before", "after"]) == {"before": b"1", "after": b"2"}
        assert sql_values(path, "SELECT name FROM sqlite_master WHERE name = 'legacy'") == ["legacy"]

    def test_writing_by_its_own_session_is_a_runtime_error_and_it_goes_on(self, store):
        with store.session() as session, session.transaction() as transaction:
            transaction.set_cache_entry("before", b"1")
            with pytest.raises(RuntimeError):
                session.set_cache_entry("k", b"1")
            transaction.set_cache_entry("after", b"2")
        assert store.get_cache_entries(["k", "before", "after"]) == {"before": b"1", "after": b"2"}

    def test_another_file_may_be_written_to_inside(self, store, tmp_path):
        other = flowstore.SQLiteDataStore(tmp_path / "other.db")
        with store.transaction() as transaction, other.transaction() as second:
            transaction.set_cache_entry("k", b"1")
            second.set_cache_entry("k", b"2")
        assert (store.get_cache_entry("k"), other.get_cache_entry("k")) == (b"1", b"2")

    def test_another_thread_waits_for_its_end(self, store, path):
        brief = flowstore.SQLiteDataStore(path, timeout=0)
        with store.transaction() as transaction:
            transaction.set_cache_entry("k", b"1")
            assert isinstance(in_a_thread(lambda: brief.set_cache_entry("k", b"2")), StoreBusyError)
            writer = threading.Thread(target=store.set_cache_entry, args=("k", b"3"), daemon=True)
            writer.start()
        writer.join(60)
        assert store.get_cache_entry("k") == b"3"

    def test_used_again_it_is_a_new_one_and_open_twice_a_runtime_error(self, store):
        manager = store.transaction()
        with manager as transaction:
            transaction.set_cache_entry("a", b"1")
            with pytest.raises(RuntimeError), manager:
                pass
        with store.transaction() as outer:
            with pytest.raises(RuntimeError), manager:
                pass
            with pytest.raises(RuntimeError):  # and still at once
                store.set_cache_entry("k", b"1")
            outer.set_cache_entry("b", b"2")
        assert store.get_cache_entries(["a", "b"]) == {"a": b"1", "b": b"2"}

    def test_full_disk_kills_the_whole_transaction(self, tmp_path, path):
        resource = pytest.importorskip("resource")
        store = filled(flowstore.SQLiteDataStore(path))

        def work():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            later = []
            with store.transaction() as transaction:
                transaction.set_cache_entry("small", b"1")
                with pytest.raises(StoreError):
                    transaction.set_cache_entry("large", b"x" * (8 << 20))
                for method, arguments in CALLS:
                    with pytest.raises(StoreError) as caught:
                        getattr(transaction, method)(*arguments)
                    later.append(type(caught.value))
            raise AssertionError(f"the exit was quiet: {later}")

        with pytest.raises(StoreError, match="rolled") as caught:
            in_a_fork(work)
        checked_error(caught.value, path)
        assert contents_of(store) == contents_of(filled(DictStore()))
        assert store.get_cache_entries(["small", "large"]) == {}
        assert os.listdir(tmp_path) == ["store.db"]

    def test_all_of_it_lands_with_the_syncs_of_one_write(self, path, tmp_path):
        if not shutil.which("strace"):
            pytest.skip("no strace here")

        def syncs(count):
            code = f"""if True:
                import flowstore, sys
                with flowstore.SQLiteDataStore(sys.argv[1]).transaction() as transaction:
                    for number in range({count}):
                        transaction.set_cache_entry(str(number), b'of {count}')"""
            log = tmp_path / "trace"
            subprocess.run(["strace", "-f", "-e", "trace=fsync,fdatasync", "-o", log, sys.executable, "-c",
                            code, path],
                           env={**os.environ, "PYTHONPATH": str(SOURCE.parent)}, check=True)
            return log.read_text().count("sync(")

        flowstore.SQLiteDataStore(path)
        assert syncs(100) == syncs(1) > 0

    def test_each_operation_of_a_session_is_a_transaction_of_its_own(self, store, path):
        other = flowstore.SQLiteDataStore(path, timeout=0)
        with store.session() as session:
            session.set_cache_entry("a", b"1")
            assert other.get_cache_entry("a") == b"1"
            other.set_cache_entry("b", b"2")
            assert session.get_cache_entry("b") == b"2"
            with pytest.raises(NotFoundError):
                session.get_process_var("scope", "missing")
            session.set_cache_entry("c", b"3")
        assert store.get_cache_entries("abc"[:0] or ["a", "b", "c"]) == {"a": b"1", "b": b"2", "c": b"3"}

    def test_operations_of_a_session_share_one_connection(self, store, monkeypatch):
        opened = []
        with_watched_connections(monkeypatch, opened.append)
        with store.session() as session:
            for method, arguments in [*CALLS, ("list_process_buckets", ())]:
                outcome_of(session, method, arguments)
            with session.transaction() as transaction:
                filled(transaction)
        assert len(opened) == 1

    def test_session_keeps_what_was_written_before_an_exception(self, store):
        with pytest.raises(ArithmeticError), store.session() as session:
            session.set_cache_entry("k", b"1")
            raise ArithmeticError
        assert store.get_cache_entry("k") == b"1"

    def test_session_after_its_end_or_in_another_thread_is_a_runtime_error(self, store):
        manager = store.session()
        with manager as session:
            for method, arguments in [*CALLS, ("transaction", ())]:
                assert isinstance(in_a_thread(lambda m=method, a=arguments: getattr(session, m)(*a)),
                                  RuntimeError)
            with pytest.raises(RuntimeError), manager:
                pass
            session.set_cache_entry("k", b"1")
        for method, arguments in [*CALLS, ("transaction", ())]:
            with pytest.raises(RuntimeError):
                getattr(session, method)(*arguments)
        assert store.get_cache_entry("k") == b"1"

    def test_session_outlives_a_store_that_is_removed_and_made_anew(self, store, path):
        with store.session() as session:
            session.set_cache_entry("k", b"1")
            with raw_sql(path) as sql:
                for table in ("cache", "history", "background", "process_vars", "process_buckets"):
                    sql.execute(f"DROP TABLE {table}")
                sql.execute("PRAGMA user_version = 0")
            assert contents_of(session) == contents_of(DictStore())
            assert contents_of(filled(session)) == contents_of(filled(DictStore()))


class TestMigration:
    """Legacy tables."""

    @pytest.fixture
    def store(self, path):
        return flowstore.SQLiteDataStore(path)

    @pytest.fixture
    def legacy(self, store, path):
        """Make legacy tables of rows."""
        def make(name, *rows, columns="key, value", options=""):
            quoted = '"' + name.replace('"', '""') + '"'
            with raw_sql(path) as sql:
                sql.execute(f"CREATE TABLE {quoted} ({columns}) {options}")
                sql.executemany(f"INSERT INTO {quoted} (key, value) VALUES (?, ?)", rows)

        return make

    def test_legacy_tables_move_and_opening_the_store_leaves_them(self, store, path, legacy):
        legacy("scope", ("a", "1"), ("b", "2"))
        legacy("root", ("a", "of root"), ("z", "26"))
        legacy("empty")
        flowstore.SQLiteDataStore(path).set_process_var("root", "q", "17")
        assert store.get_all_process_vars("scope") == {"q": "17"}
        assert flowstore.migrate_process_buckets(path) == ["empty", "root", "scope"]
        assert list(store.get_all_process_vars("scope").items()) == [("a", "1"), ("b", "2"), ("q", "17"),
                                                                     ("z", "26")]
        assert store.list_process_buckets() == ["empty", "root", "scope"]
        assert len(sql_values(path, "SELECT name FROM sqlite_master WHERE type = 'table'")) == 5

    def test_moving_again_changes_nothing(self, store, path, legacy):
        legacy("scope", ("a", "1"))
        flowstore.migrate_process_buckets(path)
        store.set_process_var("scope", "a", "2")
        before = pathlib.Path(path).read_bytes()
        assert flowstore.migrate_process_buckets(path) == []
        assert pathlib.Path(path).read_bytes() == before
        assert store.get_all_process_vars("scope") == {"a": "2"}

    @pytest.mark.parametrize("place", ["store.db", "no/folder/store.db"])
    def test_missing_file_stays_missing(self, tmp_path, place):
        assert flowstore.migrate_process_buckets(tmp_path / place) == []
        assert list(tmp_path.iterdir()) == []

    def test_variable_that_is_there_wins_and_the_others_are_added(self, store, path, legacy):
        store.set_process_var("scope", "a", "newer")
        legacy("scope", ("a", "older"), ("b", "added"))
        flowstore.migrate_process_buckets(path)
        assert store.get_all_process_vars("scope") == {"a": "newer", "b": "added"}

    @pytest.mark.parametrize("name", [
        'quo"te', "semi;colon", "with space", "new\nline", "back`tick", "[bracket]", "it's",
        "Grüße \U0001f600", "select",
        "sqlitefoo", "1", "%s", "key", "Caches", "x" * 1000, "bac\u212aground"])
    def test_odd_table_names_are_buckets(self, store, path, legacy, name):
        legacy(name, ("a", "1"))
        assert flowstore.SQLiteDataStore(path).list_process_buckets() == []
        assert flowstore.migrate_process_buckets(path) == [name]
        assert store.get_all_process_vars(name) == {"a": "1"}
        assert sql_values(path, "SELECT count(*) FROM sqlite_master WHERE type = 'table'") == [5]

    def test_odd_values_become_text(self, store, path, legacy):
        legacy("scope", ("null", None), ("blob", b"bytes"), ("not utf-8", b"\xff\xfe"), ("integer", -5),
               ("real", 1.5),
               ("big", 2**63 - 1), ("nul", "a\0b"), (7, "integer key"), (b"blob key", "v"), (b"\xff", "v"),
               ("text", "é"))
        with raw_sql(path) as sql:
            sql.execute("INSERT INTO scope VALUES ('cast', CAST(x'61ff62' AS TEXT))")
        flowstore.migrate_process_buckets(path)
        assert store.get_all_process_vars("scope") == {
            "null": "", "blob": "bytes", "not utf-8": "\udcff\udcfe", "integer": "-5", "real": "1.5",
            "big": str(2**63 - 1),
            "nul": "a\0b", "7": "integer key", "blob key": "v", "\udcff": "v", "text": "é",
            "cast": "a\udcffb"}

    def test_last_of_duplicate_keys_counts(self, store, path, legacy):
        legacy("scope", ("a", "first"), ("b", "only"), ("a", "second"), ("a", "last"), (b"b", "as a blob"),
               (1, "x"), ("1", "y"))
        with raw_sql(path) as sql:
            sql.execute("CREATE INDEX backwards ON scope (value DESC, key)")
        flowstore.migrate_process_buckets(path)
        assert store.get_all_process_vars("scope") == {"a": "last", "b": "as a blob", "1": "y"}

    @pytest.mark.parametrize(("columns", "options"), [
        ("value, key", ""), ("key TEXT PRIMARY KEY, value BLOB", ""),
        ("key TEXT PRIMARY KEY, value", "WITHOUT ROWID"),
        ("key INTEGER PRIMARY KEY, value", ""),
        ("key UNIQUE NOT NULL, value DEFAULT (1 + 1) CHECK (value > 0)", "")])
    def test_any_table_of_exactly_key_and_value_is_legacy(self, store, path, legacy, columns, options):
        legacy("scope", (2, "b"), (1, "a"), columns=columns, options=options)
        assert flowstore.migrate_process_buckets(path) == ["scope"]
        assert store.get_all_process_vars("scope") == {"1": "a", "2": "b"}

    @pytest.mark.parametrize("statement", [
        "CREATE VIEW other AS SELECT 'k' AS key, 'v' AS value", "CREATE TABLE other (key, value, more)",
        "CREATE TABLE other (key)", "CREATE TABLE other (key, value, more AS (key || value))",
        "CREATE TABLE other (key, value AS (key))", "CREATE VIRTUAL TABLE other USING fts5 (key, value)",
        "CREATE TABLE other (name, value)"])
    def test_other_tables_views_virtual_tables_and_generated_columns_are_left_alone(self, store, path, legacy,
                                                                                    statement):
        legacy("scope", ("a", "1"))
        with raw_sql(path) as sql:
            try:
                sql.execute(statement)
            except sqlite3.OperationalError as error:
                pytest.skip(str(error))
            before = sql.execute("SELECT name, sql FROM sqlite_master WHERE name LIKE 'other%'").fetchall()
        assert flowstore.migrate_process_buckets(path) == ["scope"]
        assert sql_values(path, "SELECT name, sql FROM sqlite_master WHERE name LIKE 'other%'") == before
        assert store.list_process_buckets() == ["scope"]

    def test_older_store_without_our_tables_is_completed(self, tmp_path):
        path = tmp_path / "older.db"
        with raw_sql(path) as sql:
            sql.executescript(f"PRAGMA application_id = {APPLICATION_ID}; {TABLES}")
        assert flowstore.migrate_process_buckets(path) == ["root"]
        assert flowstore.SQLiteDataStore(path).get_all_process_vars("root") == {"k": "v"}

    def test_damage_in_one_table_moves_none(self, store, path, legacy):
        legacy("a", ("k", "v"))
        legacy("b", *((str(number), "v" * 100) for number in range(200)))
        [page] = sql_values(path, "SELECT rootpage FROM sqlite_master WHERE name = 'b'")
        [size] = sql_values(path, "PRAGMA page_size")
        with open(path, "r+b") as stream:
            stream.seek((page - 1) * size)
            stream.write(b"\xa5" * size)
        with pytest.raises(CorruptStoreError):
            flowstore.migrate_process_buckets(path)
        assert sql_values(path, "SELECT * FROM a") == [("k", "v")]
        assert store.get_all_process_vars("a") == {}
        assert store.list_process_buckets() == []


WRITER = """
store = flowstore.SQLiteDataStore(sys.argv[1], timeout=60)
number = 0
while True:
    number += 1
    with store.transaction() as transaction:
        for key in ("a", "b"):
            transaction.set_cache_entry(key, b"%d " % number * 5000)
    if number == 5:
        print("ready", flush=True)
"""


CHANGER = """
store = flowstore.SQLiteDataStore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
store.set_cache_entry("k", b"changed")
print("done", flush=True)
"""


class TestBackup:
    def test_backup_is_a_store_of_its_own_with_mode_0600(self, tmp_path, path):
        store = filled(flowstore.SQLiteDataStore(path))
        os.chmod(path, 0o644)
        umask = os.umask(0)
        try:
            for target in (tmp_path / "b1", os.fsencode(tmp_path / "b2"), str(tmp_path / "b3")):
                assert store.backup(target) is None
                assert mode_of(target) == 0o600
        finally:
            os.umask(umask)
        assert sorted(os.listdir(tmp_path)) == ["b1", "b2", "b3", "store.db"]
        store.set_cache_entry("k", b"later")
        assert contents_of(flowstore.SQLiteDataStore(tmp_path / "b1")) == contents_of(filled(DictStore()))
        assert sql_values(tmp_path / "b1", "PRAGMA journal_mode") == ["wal"]

    def test_backup_is_consistent_while_another_process_writes(self, tmp_path, path):
        store = flowstore.SQLiteDataStore(path, timeout=60)
        with another_process(WRITER, path):
            for number in range(10):
                store.backup(tmp_path / f"backup {number}")
        for number in range(10):
            copied = flowstore.SQLiteDataStore(tmp_path / f"backup {number}")
            values = copied.get_cache_entries(["a", "b"])
            assert values["a"] == values["b"]
            assert sql_values(copied.path, "PRAGMA integrity_check") == ["ok"]

    def test_backup_inside_a_transaction_is_of_what_was_before(self, tmp_path, path):
        store = flowstore.SQLiteDataStore(path)
        with store.transaction() as transaction:
            transaction.set_cache_entry("k", b"1")
            store.backup(tmp_path / "backup")
        assert flowstore.SQLiteDataStore(tmp_path / "backup").get_cache_entry("k") is None

    @pytest.mark.parametrize("make", [make_text, pathlib.Path.touch, pathlib.Path.mkdir, os.mkfifo,
                                      lambda target: target.symlink_to("nowhere")])
    def test_backup_never_goes_over_what_is_there(self, tmp_path, path, make):
        store = filled(flowstore.SQLiteDataStore(path))
        target = tmp_path / "target"
        make(target)
        before = files_in(tmp_path)
        with pytest.raises(StoreError) as caught:
            store.backup(target)
        checked_error(caught.value, target)
        assert files_in(tmp_path) == before

    def test_backup_over_the_store_itself_is_refused(self, tmp_path, path):
        store = filled(flowstore.SQLiteDataStore(path))
        with pytest.raises(StoreError):
            store.backup(path)
        assert contents_of(store) == contents_of(filled(DictStore()))

    def test_backup_into_a_missing_folder_or_of_a_missing_store_leaves_nothing(self, tmp_path, path):
        store = flowstore.SQLiteDataStore(path)
        with pytest.raises(StoreError) as caught:
            store.backup(tmp_path / "missing" / "backup")
        checked_error(caught.value, tmp_path / "missing" / "backup")
        os.unlink(path)
        with pytest.raises(StoreError) as caught:
            store.backup(tmp_path / "backup")
        checked_error(caught.value, path)
        assert os.listdir(tmp_path) == []

    def test_backup_that_fails_leaves_nothing(self, tmp_path, path):
        resource = pytest.importorskip("resource")
        store = flowstore.SQLiteDataStore(path)
        store.set_cache_entry("k", b"x" * (2 << 20))

        def work():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            store.backup(tmp_path / "backup")

        with pytest.raises(StoreError) as caught:
            in_a_fork(work)
        checked_error(caught.value, tmp_path / "backup")
        assert os.listdir(tmp_path) == ["store.db"]

    def test_backup_of_a_blank_file_is_an_empty_store(self, tmp_path, path):
        store = flowstore.SQLiteDataStore(path)
        os.truncate(path, 0)
        store.backup(tmp_path / "backup")
        assert contents_of(flowstore.SQLiteDataStore(tmp_path / "backup")) == contents_of(DictStore())

    @needs_root
    def test_backup_from_a_place_that_cannot_be_written_starts_anew_where_the_store_changes(
        self, public_folder, monkeypatch):
        path, target = public_folder / "store.db", public_folder / "new" / "backup"
        filled(flowstore.SQLiteDataStore(path))
        path.chmod(0o644)
        target.parent.mkdir()
        os.chown(target.parent, NOBODY, NOBODY)
        connect, pauses = sqlite3.connect, [True]

        def work(changer):
            class Connection(sqlite3.Connection):
                def backup(self, *arguments):
                    super().backup(*arguments)
                    if pauses:
                        pauses.clear()
                        changer.stdin.write(b"now\n")
                        changer.stdin.flush()
                        assert changer.stdout.readline() == b"done\n"

            monkeypatch.setattr(sqlite3, "connect", lambda *values,
                                **options: connect(*values, **options, factory=Connection))
            flowstore.SQLiteDataStore(path, timeout=60).backup(target)

        with another_process(CHANGER, path) as changer:
            in_a_fork(work, changer, user=NOBODY)
        assert flowstore.SQLiteDataStore(target).get_cache_entry("k") == b"changed"


# ---- the command line -------------------------------------------------------------------------------------

HISTORY = [execution_of("build app", started_at=START + timedelta(minutes=minute),
                        duration=timedelta(seconds=seconds),
                        exit_code=code, status=status, error=error, id=str(minute))
           for minute, seconds, code, status, error in [
               (0, 1, 0, "completed", ""), (1, 2, 0, "completed", ""), (2, 8, 3, "failed", "exit status 3")]]


class Shell:
    """flowstore as a shell runs it, with a store of its own."""

    def __init__(self, folder, program=(sys.executable, "-m", "flowstore"), module_path=SOURCE.parent):
        self.folder = folder
        self.program = program
        self.store = folder / "store.db"
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(module_path),
                            "FLOWSTORE_PATH": str(self.store), "PYTHONDONTWRITEBYTECODE": "1"}

    def __call__(self, *words, stdin=b"", status=0, **environment):
        """What a command prints, once its exit status is as expected, and its complaint one line."""
        done = self.run(*words, input=stdin, stdout=subprocess.PIPE, **environment)
        assert done.returncode == status, done.stderr
        if status == 0:
            assert done.stderr == b""
        elif status == 1:
            assert re.fullmatch(rb"flowstore: [^\n]+\n", done.stderr)
            assert done.stdout == b""
        else:
            assert done.stderr.startswith(b"usage: flowstore") or done.stderr.startswith(b"flowstore: ")
            assert b"Traceback" not in done.stderr
        return done.stdout

    def run(self, *words, environment=(), input=b"", **options):
        variables = {name: options.pop(name) for name in list(options) if name.isupper()}
        return subprocess.run([*self.program, *words], env={**self.environment, **variables}, cwd=self.folder,
                              input=input,
                              stderr=subprocess.PIPE, timeout=60, **options)

    def json(self, *words, **options):
        return json.loads(self(*words, "--json", **options))

    def on_terminal(self, *words, **environment):
        """The lines that a command prints on a terminal."""
        reader, writer = pty.openpty()
        with open(reader, "rb", buffering=0) as screen:
            process = subprocess.Popen([*self.program, *words],
                                       env={**self.environment, "TERM": "xterm", **environment},
                                       cwd=self.folder, stdin=subprocess.DEVNULL, stdout=writer,
                                       stderr=writer)
            os.close(writer)
            shown = b""
            with contextlib.suppress(OSError):  # the end of a terminal
                while data := screen.read(4096):
                    shown += data
            assert process.wait(60) == 0
        return shown.decode().replace("\r\n", "\n").splitlines()


def plain(line):
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


class TestCommandLine:
    """The commands, each as a process."""

    @pytest.fixture
    def shell(self, tmp_path):
        return Shell(tmp_path)

    @pytest.fixture
    def store(self, shell):
        return flowstore.SQLiteDataStore(shell.store)

    @pytest.fixture(params=["module", "vendored", "zipapp", "script"])
    def any_shell(self, request, tmp_path):
        """The same program in each form of distribution."""
        if request.param == "module":
            return Shell(tmp_path)
        folder = tmp_path / "myapp" / "vendor"
        folder.mkdir(parents=True)
        shutil.copy(SOURCE, folder / "flowstore.py")
        if request.param == "vendored":
            return Shell(tmp_path, (sys.executable, "-m", "myapp.vendor.flowstore"), tmp_path)
        if request.param == "script":
            return Shell(tmp_path, (sys.executable, str(folder / "flowstore.py")), "")
        zipapp.create_archive(folder, tmp_path / "flowstore.pyz", main="flowstore:main")
        return Shell(tmp_path, (sys.executable, str(tmp_path / "flowstore.pyz")), "")

    def test_each_form_of_distribution_is_the_same_program(self, any_shell):
        assert any_shell("set", "k", "v") == b""
        assert any_shell("get", "k") == b"v\n"
        assert any_shell.json("list") == {"k": "v"}
        assert any_shell("get", "missing", status=1) == b""
        any_shell("frobnicate", status=2)
        assert any_shell("--version") == f"flowstore {flowstore.__version__}\n".encode()
        assert any_shell("path") == os.fsencode(any_shell.store) + b"\n"

    def test_copied_module_works_under_its_own_name_in_a_program(self, tmp_path):
        (tmp_path / "myapp").mkdir()
        shutil.copy(SOURCE, tmp_path / "myapp" / "state.py")
        code = """if True:
            import pickle, sys
            from datetime import datetime, timezone
            from myapp import state
            store = pickle.loads(pickle.dumps(state.SQLiteDataStore(sys.argv[1])))
            record = state.ExecutionRecord("r", datetime.now(timezone.utc))
            store.record_execution(pickle.loads(pickle.dumps(record)))
            assert store.get_execution_history("r") == [record]
            try:
                store.get_background_run("missing")
            except state.NotFoundError as error:
                assert type(pickle.loads(pickle.dumps(error))) is state.NotFoundError"""
        subprocess.run([sys.executable, "-c", code, tmp_path / "store.db"], env={"PYTHONPATH": str(tmp_path)},
                       check=True)

    # variables

    def test_variables_are_set_read_listed_and_removed_in_their_scopes(self, shell, store):
        scope = {"FLOW_PROCESS_BUCKET": "ci:job/1 a"}
        assert shell("set", "b", "of root") == b""
        assert shell("set", "a", "own", **scope) == b""
        assert shell("set", "--global", "c", "of root too", **scope) == b""
        assert store.list_process_buckets() == ["ci_job_1_a", "root"]
        assert shell("get", "b", **scope) == b"of root\n"
        assert shell("list", **scope) == b"a\town\nb\tof root\nc\tof root too\n"
        assert shell("list", "--global", **scope) == shell("list") == b"b\tof root\nc\tof root too\n"
        assert shell("get", "a", "--global", status=1, **scope) == b""
        assert shell("set", "b", "own", **scope) == b""
        assert shell("get", "b", **scope) == b"own\n"
        assert shell("remove", "b", **scope) == b""
        assert shell("remove", "b", **scope) == b""
        assert shell("get", "b", **scope) == b"of root\n"
        assert shell("remove", "--global", "b", **scope) == b""
        assert store.get_all_process_vars("ci_job_1_a") == {"a": "own", "c": "of root too"}

    def test_clear_empties_the_current_scope_the_root_scope_or_destroys_the_store(self, shell, store):
        for bucket in ("root", "scope", "other"):
            store.set_process_var(bucket, bucket, "v")
        assert shell("clear", FLOW_PROCESS_BUCKET="scope") == b""
        assert store.list_process_buckets() == ["other", "root"]
        assert shell("clear", "--global", FLOW_PROCESS_BUCKET="other") == b""
        assert store.list_process_buckets() == ["other"]
        assert shell("clear", "--all") == b""
        assert os.listdir(shell.folder) == []
        assert shell("clear", "--all") == b""

    @pytest.mark.parametrize(("words", "stdin", "value"), [
        (["v"], b"", "v"), ([""], b"", ""), (["-5"], b"", "-5"), (["--", "-x"], b"", "-x"),
        (["-"], b"v", "v"), ([], b"v\n", "v"),
        ([], b"", ""), (["-"], b"\n", ""), (["-"], b"two\nlines\n\n", "two\nlines\n"),
        (["-"], b"v\r\n", "v\r"),
        ([b"\xff\xc3\xbc"], b"", "\udcffü"), (["-"], b"\xff\0\xc3\xbc", "\udcff\0ü")])
    def test_value_comes_from_the_words_or_from_standard_input_less_one_newline(self, shell, store, words,
                                                                                stdin, value):
        shell("set", "k", *words, stdin=stdin)
        assert store.get_process_var("root", "k") == value

    @pytest.mark.parametrize("environment", [
        {}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "utf-16"},
        {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"}],
                             ids=["utf-8", "C", "ascii", "latin-1 streams", "utf-16 streams", "latin-1"])
    def test_bytes_go_through_unchanged_in_any_locale(self, shell, store, environment):
        if "ISO" in environment.get("LC_ALL", ""):
            before = locale.setlocale(locale.LC_CTYPE)
            try:
                locale.setlocale(locale.LC_CTYPE, environment["LC_ALL"])
            except locale.Error as error:
                pytest.skip(str(error))
            finally:
                locale.setlocale(locale.LC_CTYPE, before)
        data = bytes(range(256)) + "é\U0001f600\n\n".encode()
        shell("set", "schlüssel".encode(), "-", stdin=data + b"\n", **environment)
        assert shell("get", "schlüssel".encode(), **environment) == data + b"\n"
        shell("set", "other", stdin=shell("get", "schlüssel".encode(), **environment), **environment)
        assert store.get_process_var("root", "schlüssel") == store.get_process_var("root", "other")
        assert by_bytes(store.get_process_var("root", "other")) == data
        scope = {"FLOW_PROCESS_BUCKET": "prüf \U0001f600"}
        shell("set", "k", "größe".encode(), **scope, **environment)
        assert store.get_all_process_vars("prüf_\U0001f600")["k"] == "größe"

    # machines

    def test_json_is_one_document_with_the_originals_tags(self, shell, store):
        store.set_process_var("root", "é", "\udcff")
        store.save_background_run(run_of("b"))
        store.save_background_run(run_of("a", pid=0, completed_at=START))
        for record in HISTORY:
            store.record_execution(record)
        assert shell.json("list") == {"é": "\udcff"}
        assert shell.json("get", "é".encode()) == "\udcff"
        assert shell.json("history") == [record.to_dict() for record in HISTORY[::-1]]
        assert shell.json("history", "build app", "-n", "1") == [HISTORY[2].to_dict()]
        assert shell.json("history", "unknown") == []
        documents = shell.json("background")
        assert [document["id"] for document in documents] == ["a", "b"]
        assert documents[0] == shell.json("background", "a") == run_of("a", pid=0,
                                                                       completed_at=START).to_dict()
        assert shell.json("path") == str(shell.store)
        assert shell.json("migrate") == []
        for words in (["set", "k", "v"], ["remove", "k"], ["clear"], ["backup", "copy.db"],
                      ["clear", "--all"]):
            assert shell.json(*words) == {}

    def test_options_go_before_or_after_the_command(self, shell):
        other = str(shell.folder / "other.db")
        shell("--store", other, "set", "k", "v")
        assert not shell.store.exists()
        for words in (["--store", other, "--json", "get", "k"], ["get", "k", "--store", other, "--json"],
                      ["--json", "get", f"--store={other}", "k"],
                      ["--store", "unused.db", "get", "k", "--store", other, "--json"],
                      ["--json", "--store", "other.db", "get", "--json", "k"]):
            assert json.loads(shell(*words)) == "v"
        assert shell("--store", "", "path") == os.fsencode(shell.store) + b"\n"
        assert os.listdir(shell.folder) == ["other.db"]

    @pytest.mark.parametrize("words", [
        [], ["frobnicate"], ["get"], ["get", "a", "b"], ["set"], ["set", "a", "b", "c"],
        ["history", "-n", "many"], ["list", "--al"],
        ["get", "k", "--unknown"], ["--store"], ["backup"], ["get", ""], ["set", "", "v"], ["background", ""],
        ["history", ""],
        ["--store", ":memory:", "list"]])
    def test_wrong_usage_is_status_2(self, tmp_path, monkeypatch, capfd, words):
        monkeypatch.setenv("FLOWSTORE_PATH", str(tmp_path / "store.db"))
        with pytest.raises(SystemExit) as caught:
            flowstore.main(words)
        assert caught.value.code == 2
        assert capfd.readouterr().err.startswith(("usage: flowstore ", "flowstore: "))
        assert os.listdir(tmp_path) == []

    def test_help_names_every_command(self, shell):
        text = shell("--help").decode()
        for command in ("set", "get", "list", "remove", "clear", "history", "background", "run", "import",
                        "migrate", "prune",
                        "backup", "check", "path"):
            assert re.search(rf"^ *{command}\b", text, re.MULTILINE)
            if command in ("set", "history"):
                assert b"--store" in shell(command, "--help")

    # runs

    def test_history_is_newest_first_and_ends_after_n(self, shell, store):
        for number in range(30):
            store.record_execution(execution_of("ab"[number % 2],
                                                started_at=START + timedelta(seconds=number), pid=number))
        assert [record["pid"] for record in shell.json("history")] == [*range(29, 9, -1)] == [
            record["pid"] for record in shell.json("history", "-n20")]
        assert [record["pid"] for record in shell.json("history", "-n", "3")] == [29, 28, 27]
        assert [record.get("pid", 0) for record in shell.json("history", "a", "-n", "0")] == [*range(28, -1,
                                                                                                     -2)]
        assert len(shell.json("history", "-n", "0")) == 30
        assert len(shell("history", "-n", "4").splitlines()) == 4

    def test_equal_instants_are_shown_last_inserted_first(self, shell, store):
        for number in (1, 2, 3):
            store.record_execution(execution_of(pid=number))
        assert [record["pid"] for record in shell.json("history")] == [3, 2, 1]

    def test_background_shows_runs_and_a_missing_one_is_status_1(self, shell, store):
        store.save_background_run(run_of("a", status="completed"))
        store.save_background_run(run_of("b", status="failed", error="killed\x1b[2J"))
        lines = shell("background").decode().splitlines()
        assert [{"7", "serve"} | cells <= {*line.split("\t")} for line, cells in zip(
            lines, [{"a", "completed"}, {"b", "failed"}], strict=True)] == [True, True]
        assert "killed\\x1b[2J" in lines[1]
        assert shell("background", "b").decode().splitlines() == lines[1:]
        shell("background", "missing", status=1)

    # the file

    def test_commands_that_only_read_never_create_a_store(self, shell):
        shell("get", "k", status=1)
        assert shell("list") == b""
        assert shell("history") == b""
        assert shell("history", "k") == b""
        assert shell("background") == b""
        shell("background", "k", status=1)
        assert shell("path") == os.fsencode(shell.store) + b"\n"
        assert shell("remove", "k") == b""
        assert shell("clear") == b""
        assert shell("migrate") == b""
        shell("backup", "copy.db", status=1)
        shell("check", status=1)
        shell("get", "k", FLOWSTORE_PATH="no/folder/store.db", status=1)
        assert os.listdir(shell.folder) == []

    def test_default_store_is_in_the_cache_folder(self, shell):
        place = {"FLOWSTORE_PATH": "", "FLOW_CACHE_DIR": str(shell.folder / "cache")}
        shell("set", "k", "v", **place)
        assert os.listdir(shell.folder / "cache") == ["flowstore.db"]
        assert shell("path", **place) == os.fsencode(shell.folder / "cache" / "flowstore.db") + b"\n"

    def test_migrate_moves_legacy_tables_and_names_them(self, shell, store):
        with raw_sql(shell.store) as sql:
            sql.execute('CREATE TABLE "b\x1b" (key, value)')
            sql.executescript("CREATE TABLE a (key, value); INSERT INTO a VALUES (1, 2)")
        assert shell("list", FLOW_PROCESS_BUCKET="a") == b""
        assert shell("migrate") == b"a\nb\\x1b\n"
        assert shell("migrate") == b""
        assert store.get_all_process_vars("a") == {"1": "2"}

    def test_backup_copies_and_never_overwrites(self, shell, store):
        filled(store)
        shell("backup", "copy.db")
        assert mode_of(shell.folder / "copy.db") == 0o600
        assert contents_of(flowstore.SQLiteDataStore(shell.folder / "copy.db")) == contents_of(store)
        before = files_in(shell.folder)
        shell("backup", "copy.db", status=1)
        assert files_in(shell.folder) == before

    def test_check_says_what_is_in_the_store(self, shell, store):
        filled(store)
        store.record_execution(execution_of())
        store.set_cache_entry("large", bytes(100_000))
        store.delete_cache_entry("large")
        found = shell.json("check")
        assert {name: found[name] for name in ("cache", "history", "background", "process_vars")} == {
            "cache": 1, "history": 2, "background": 1, "process_vars": 1}
        assert found["size"] == shell.store.stat().st_size
        assert found["size"] > found["free"] > 90_000
        assert (found["schema"], found["sqlite"], found["path"]) == (1, sqlite3.sqlite_version,
                                                                     str(shell.store))
        assert sqlite3.sqlite_version in shell("check").decode()

    def test_store_of_an_older_schema_is_read(self, shell, store):
        store.set_process_var("root", "k", "v")
        with raw_sql(shell.store) as sql:
            sql.execute("DROP INDEX history_by_start")
        assert shell("get", "k") == b"v\n"
        assert shell("list") == b"k\tv\n"

    def test_check_of_a_damaged_store_is_status_1(self, shell, store):
        filled(store)
        [page] = sql_values(shell.store, "SELECT rootpage FROM sqlite_master WHERE name = 'cache'")
        [size] = sql_values(shell.store, "PRAGMA page_size")
        with open(shell.store, "r+b") as stream:
            stream.seek((page - 1) * size)
            stream.write(b"\xa5" * size)
        shell("check", status=1)

    @pytest.mark.parametrize("make", [make_text, make_bbolt, make_sqlite(TABLES), make_newer,
                                      pathlib.Path.mkdir])
    def test_what_is_no_store_is_one_line_and_status_1_and_stays(self, shell, make):
        make(shell.store)
        before = files_in(shell.folder)
        for words in (["set", "k", "v"], ["clear", "--all"]):
            shell(*words, status=1)
        assert files_in(shell.folder) == before

    def test_complaint_about_an_odd_path_is_one_line(self, shell):
        shell("get", "k\n", FLOWSTORE_PATH="new\nline\x1b", status=1)

    # terminals and pipes

    def test_values_go_out_as_they_are_and_tables_escape_control_characters(self, shell, store):
        store.set_process_var("root", "k\t\x1b[31m", "a\nb\r\x9b\u202e\udcff é")
        assert shell("list") == "k\\t\\x1b[31m\ta\\nb\\r\\x9b\\u202e\\udcff é\n".encode()
        assert shell("get", b"k\t\x1b[31m") == b"a\nb\r\xc2\x9b\xe2\x80\xae\xff \xc3\xa9\n"
        store.record_execution(execution_of("\x1b]0;title\x07", status="\x1b", error="a\nb"))
        assert b"\x1b" not in shell("history")
        assert len(shell("history").splitlines()) == 1
        shown = "\n".join(map(plain, shell.on_terminal("history") + shell.on_terminal("list")))
        assert "\x1b" not in shown
        assert "\\x1b]0;title\\x07" in shown

    def test_piped_history_is_plain_and_the_same_in_every_zone(self, shell, store):
        for record in HISTORY:
            store.record_execution(record)
        text = shell("history")
        assert text == shell("history", TZ="XYZ-9", COLUMNS="20", TERM="xterm", CLICOLOR_FORCE="1")
        lines = text.decode().splitlines()
        assert [len(line.split("\t")) for line in lines] == [len(lines[0].split("\t"))] * 3
        assert {"build app", "failed", "3", "exit status 3"} < set(lines[0].split("\t"))
        assert re.search(r"\t2024-01-02T03:06:05\.678901(000)?Z\t", lines[0])
        assert "completed" in lines[2]
        assert "\x1b" not in text.decode()

    def test_history_on_a_terminal_is_aligned_coloured_and_ends_in_sparklines(self, shell, store):
        for record in HISTORY:
            store.record_execution(record)
        store.record_execution(execution_of("another ref with a long name", status="running",
                                            started_at=START - timedelta(days=1)))
        lines = shell.on_terminal("history", TZ="XYZ-9")
        assert any("\x1b[31m✗\x1b[0m" in line for line in lines)
        assert any("\x1b[32m✓\x1b[0m" in line for line in lines)
        header, *rows = map(plain, lines[:5])
        assert [header[row.index("2024"):][:7] for row in rows] == ["STARTED"] * 4
        assert [row.index(ref) for row, ref in zip(rows, [*["build app"] * 3, "another"],
                                                   strict=True)] == [header.index("REF")] * 4
        assert re.match("✗ +2024-01-02 12:06:05 ", rows[0])
        assert rows[0].endswith("exit status 3")
        assert "✓" in rows[1]
        assert "●" in rows[3]
        assert header.index("REF") < header.index("EXIT")
        [chart] = [line for line in lines[5:] if line]
        ref, bars = chart.rsplit(None, 1)
        assert ref == "build app"
        assert re.fullmatch("[▁▂▃▄▅▆▇█]{3}", bars)
        assert list(bars) == sorted(bars)
        assert bars[0] < bars[2] == "█"

    def test_no_color_means_no_colour(self, shell, store):
        store.record_execution(HISTORY[2])
        lines = shell.on_terminal("history", NO_COLOR="1")
        assert "\x1b" not in "".join(lines)
        assert any(line.startswith("✗ ") for line in lines)
        assert "\x1b" in "".join(shell.on_terminal("history", NO_COLOR=""))

    def test_history_at_the_ends_of_time_is_shown(self, shell, store):
        for moment in (ZERO_TIME, LAST_TIME):
            store.record_execution(execution_of(started_at=moment, duration=-LONGEST))
        for zone in ("XYZ-12", "XYZ12"):
            lines = shell.on_terminal("history", TZ=zone)
            assert "9999-12-31" in lines[1]
            assert "0001-01-01" in lines[2]

    def test_list_on_a_terminal_has_a_header_and_columns(self, shell, store):
        store.set_process_var("root", "key", "1")
        store.set_process_var("root", "a longer key", "2")
        lines = shell.on_terminal("list")
        assert [line.split() for line in lines] == [["KEY", "VALUE"], ["a", "longer", "key", "2"],
                                                    ["key", "1"]]
        assert lines[0].index("VALUE") == lines[1].index("2") == lines[2].index("1")
        assert shell("list") == b"a longer key\t2\nkey\t1\n"

    @pytest.mark.parametrize(("words", "environment"), [
        (["get", "k"], {}), (["history"], {}), (["--help"], {}), (["get", "--help"], {}),
        (["get", "k"], {"PYTHONUNBUFFERED": "1"})])
    def test_closed_pipe_is_quiet(self, shell, store, words, environment):
        store.set_process_var("root", "k", "v" * 100_000)
        store.record_execution(execution_of())
        reader, writer = os.pipe()
        os.close(reader)
        done = shell.run(*words, stdout=writer, **environment)
        os.close(writer)
        assert done.stderr == b""

    @pytest.mark.parametrize(("words", "environment"), [
        (["get", "k"], {}), (["list"], {}), (["--help"], {}), (["get", "k"], {"PYTHONUNBUFFERED": "1"})])
    def test_full_device_is_one_line_and_status_1(self, shell, store, words, environment):
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full here")
        store.set_process_var("root", "k", "v")
        with open("/dev/full", "wb") as full:
            done = shell.run(*words, stdout=full, **environment)
        assert re.fullmatch(rb"flowstore: [^\n]+\n", done.stderr)
        assert done.returncode == 1

    def test_interrupt_is_quiet(self, shell, interruptible):
        with subprocess.Popen([*shell.program, "set", "k"], env=shell.environment, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) as process:
            process.stdin.write(b"v" * (1 << 20))  # more than a pipe holds: the command is reading then
            process.stdin.flush()
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            assert process.stderr.read() == process.stdout.read() == b""
        assert process.returncode in (130, -signal.SIGINT)
        assert not shell.store.exists()

    def test_main_ends_by_system_exit_with_the_status(self, shell, store, capfdbinary):
        store.set_process_var("root", "k", "é")
        for words, status in ((["get", "k"], 0), (["get", "missing"], 1), (["get", ""], 2), (["get"], 2)):
            with pytest.raises(SystemExit) as caught:
                flowstore.main(["--store", str(shell.store), *words])
            assert caught.value.code == status
        assert capfdbinary.readouterr().out == "é\n".encode()


posix_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
PATIENCE = 60  # seconds after which a test counts as hung


class Forked:
    """A child process that runs work(); result() awaits its end and returns, or raises, what it did."""

    def __init__(self, work, *arguments):
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        outcome = None
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(PATIENCE)
            outcome = work(*arguments), ""
        except BaseException:
            outcome = None, traceback.format_exc()
        finally:
            with open(writer, "wb") as stream:
                pickle.dump(outcome, stream)
            os._exit(0)

    def result(self):
        with open(self.reader, "rb") as stream:
            data = stream.read()
        os.waitpid(self.pid, 0)
        assert data, "the child was killed"
        value, error = pickle.loads(data)
        assert not error, error
        return value

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.reader)


class Gate:
    """Something that processes wait for: all forked before open() pass at the same moment."""

    def __init__(self):
        self.reader, self.writer = os.pipe()

    def wait(self):
        os.close(self.writer)
        os.read(self.reader, 1)

    def open(self):
        os.close(self.writer)
        os.close(self.reader)


def together(count, work):
    """What work(0) … work(count - 1) return, each in a process, all started at the same moment."""
    gate = Gate()

    def start(number):
        gate.wait()
        return work(number)

    children = [Forked(start, number) for number in range(count)]
    gate.open()
    return [child.result() for child in children]


class Held:
    """A child inside `with enter():` until it is told to go on; its result() is what rest() returns."""

    def __init__(self, enter, rest=lambda store: None):
        inside, go_on = os.pipe(), os.pipe()

        def work():
            os.close(go_on[1])
            with enter() as store:
                os.write(inside[1], b".")
                os.read(go_on[0], 1)
                return rest(store)

        self.child = Forked(work)
        os.close(inside[1])
        os.close(go_on[0])
        assert os.read(inside[0], 1), self.child.result()
        os.close(inside[0])
        self.go_on = go_on[1]

    def end(self):
        os.write(self.go_on, b".")
        os.close(self.go_on)

    def result(self):
        self.end()
        return self.child.result()


@contextlib.contextmanager
def locked(file_path, mode):
    """The file of a store, locked by plain SQLite."""
    sql = sqlite3.connect(file_path, isolation_level=None)
    try:
        if mode == "EXCLUSIVE":
            sql.execute("PRAGMA locking_mode = EXCLUSIVE")
        sql.execute(f"BEGIN {mode}")
        sql.execute("SELECT count(*) FROM cache").fetchone()
        yield sql
    finally:
        sql.close()


def files(file_path):
    return sorted(os.listdir(os.path.dirname(file_path)))


def intact(file_path):
    sql = sqlite3.connect(file_path)
    try:
        return sql.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        sql.close()


@pytest.fixture
def file_path(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    return str(folder / "store.db")


@posix_only
class TestWaiting:
    def test_storm_of_64_processes_fails_and_loses_nothing(self, file_path):
        store = flowstore.SQLiteDataStore(file_path, timeout=PATIENCE)

        def work(number):
            for step in range(40):
                store.set_cache_entry(f"{number}.{step}", b"%d" % step)
                assert store.get_cache_entry(f"{number}.{step}") == b"%d" % step

        together(64, work)
        assert files(file_path) == ["store.db"]
        found = store.get_cache_entries(f"{number}.{step}" for number in range(64) for step in range(40))
        assert len(found) == 64 * 40

    def test_writer_waits_for_another_up_to_the_timeout(self, file_path):
        store = flowstore.SQLiteDataStore(file_path, timeout=0.2)
        holder = Held(store.transaction)
        start = time.monotonic()
        with pytest.raises(flowstore.StoreBusyError, match=r"0\.2 seconds") as caught:
            store.set_cache_entry("key", b"")
        assert time.monotonic() - start >= 0.2
        assert caught.value.path == file_path and file_path in str(caught.value)
        holder.result()
        store.set_cache_entry("key", b"")

    def test_reader_does_not_wait_for_a_writer(self, file_path):
        store = flowstore.SQLiteDataStore(file_path, timeout=0)
        store.set_cache_entry("key", b"old")
        holder = Held(store.transaction, lambda transaction: transaction.set_cache_entry("key", b"new"))
        assert store.get_cache_entry("key") == b"old"
        holder.result()
        assert store.get_cache_entry("key") == b"new"

    @pytest.mark.parametrize("use", [
        lambda file_path: flowstore.SQLiteDataStore(file_path, timeout=PATIENCE),
        lambda file_path: flowstore.SQLiteDataStore(file_path).get_cache_entry("key"),
        lambda file_path: flowstore.SQLiteDataStore(file_path).set_cache_entry("key", b""),
        flowstore.destroy_store,
    ], ids=["open", "read", "write", "destroy"])
    def test_whoever_has_the_file_to_himself_is_waited_for(self, file_path, use):
        flowstore.SQLiteDataStore(file_path)
        holder = Held(lambda: locked(file_path, "EXCLUSIVE"))
        waiter = threading.Timer(0.1, holder.end)
        waiter.start()
        use(file_path)
        waiter.join()
        holder.child.result()

    def test_store_that_was_taken_out_of_wal_mode_serves(self, file_path):
        store = flowstore.SQLiteDataStore(file_path, timeout=PATIENCE)
        with contextlib.closing(sqlite3.connect(file_path)) as sql:
            sql.execute("PRAGMA journal_mode = DELETE")

        def work(number):
            for step in range(20):
                store.set_cache_entry(f"{number}.{step}", b"")
                store.get_cache_entry("key")

        together(8, work)
        flowstore.SQLiteDataStore(file_path)
        assert len(store.get_cache_entries(f"{n}.{step}" for n in range(8) for step in range(20))) == 160
        with contextlib.closing(sqlite3.connect(file_path)) as sql:
            assert sql.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def open_first(file_path, number):
    store = flowstore.SQLiteDataStore(file_path, timeout=PATIENCE)
    store.set_cache_entry(str(number), b"%d" % number)
    assert store.get_cache_entry(str(number)) == b"%d" % number


@posix_only
class TestFirstOpen:
    @pytest.mark.parametrize("start", ["missing", "empty"])
    def test_first_open_by_32_processes_fails_and_loses_nothing(self, file_path, start):
        for _ in range(10):
            if start == "empty":
                with open(file_path, "xb"):
                    os.chmod(file_path, 0o644)
            together(32, lambda number: open_first(file_path, number))
            assert files(file_path) == ["store.db"]
            assert os.stat(file_path).st_mode & 0o777 == 0o600
            store = flowstore.SQLiteDataStore(file_path)
            assert len(store.get_cache_entries(map(str, range(32)))) == 32
            os.unlink(file_path)

    def test_first_open_in_a_missing_folder_by_many(self, file_path):
        file_path = os.path.join(os.path.dirname(file_path), "a", "b", "store.db")
        together(16, lambda number: open_first(file_path, number))
        assert files(file_path) == ["store.db"]

    def test_killed_in_a_first_open_leaves_what_the_next_open_clears(self, file_path):
        dice = random.Random(3)
        for _ in range(40):
            children = [Forked(open_first, file_path, number) for number in range(2)]
            time.sleep(dice.random() * 0.008)
            for child in children:
                child.kill()
            open_first(file_path, 0)
            assert files(file_path) == ["store.db"] and intact(file_path)
            flowstore.destroy_store(file_path)
            assert files(file_path) == []


@posix_only
class TestKill:
    def test_acknowledged_writes_survive_kills(self, file_path):
        store = flowstore.SQLiteDataStore(file_path, timeout=PATIENCE)
        reader, writer = os.pipe()
        dice = random.Random(9)

        def write(name):
            for step in range(10**6):
                if step % 8:
                    store.set_cache_entry(f"{name}.{step}", bytes(dice.choice((1, 6000))))
                else:
                    with store.transaction() as transaction:
                        transaction.set_cache_entry(f"{name}.{step}!", b"")
                        transaction.set_cache_entry(f"{name}.{step}", bytes(50_000))
                os.write(writer, f"{name}.{step}\n".encode())

        def read():
            while not os.path.exists(file_path + ".stop"):
                store.get_cache_entries(["0.0.0", "1.1.1"])

        os.set_blocking(reader, False)
        acknowledged, kills = b"", 0
        readers = [Forked(read) for _ in range(2)]
        while kills < 220:
            children = [Forked(write, f"{kills}.{number}") for number in range(4)]
            time.sleep(dice.random() * 0.03)
            for child in children:
                child.kill()
            kills += len(children)
            with contextlib.suppress(BlockingIOError):
                while lines := os.read(reader, 1 << 20):
                    acknowledged += lines
        with open(file_path + ".stop", "x"):
            pass
        for child in readers:
            child.result()
        keys = acknowledged.decode().split()
        assert keys
        keys += [f"{key}!" for key in keys if int(key.rpartition(".")[2]) % 8 == 0]
        found = store.get_cache_entries(keys)
        assert [key for key in keys if key not in found] == []
        assert intact(file_path) and files(file_path) == ["store.db", "store.db.stop"]


FRAME = 24 + 4096


class Copies:
    """A store copied in the middle of its use: its WAL has 20 transactions that set the same three keys."""

    def __init__(self, file_path):
        self.folder = os.path.dirname(file_path)
        store = flowstore.SQLiteDataStore(file_path)
        with store.session() as session:
            for number in range(1, 21):
                with session.transaction() as transaction:
                    transaction.set_cache_entry("first", b"%d" % number)
                    transaction.set_process_var("bucket", "second", str(number))
                    transaction.set_cache_entry("third", b"%d" % number * 3000)
            with open(file_path, "rb") as main, open(file_path + "-wal", "rb") as wal:
                self.main, self.wal = main.read(), wal.read()
        sizes = [struct.unpack_from(">I", self.wal, at + 4)[0] for at in range(32, len(self.wal), FRAME)]
        self.commits = [index for index, size in enumerate(sizes, 1) if size]  # frames up to each commit
        self.count = 0

    def survivors(self, frames):
        """The number of transactions that the first so many frames hold."""
        return sum(commit <= frames for commit in self.commits)

    def opened(self, wal):
        """Which transaction is the last one in a store with this WAL; an error where it is a mixture."""
        self.count += 1
        file_path = os.path.join(self.folder, f"{self.count}.db")
        for name, data in ((file_path, self.main), (file_path + "-wal", wal)):
            with open(name, "xb") as stream:
                stream.write(data)
        store = flowstore.SQLiteDataStore(file_path)
        first = store.get_cache_entry("first") or b"0"
        assert store.get_cache_entry("third") == (first * 3000 if first != b"0" else None)
        assert store.get_all_process_vars("bucket").get("second", "0") == first.decode()
        store.set_cache_entry("first", b"after")
        assert store.get_cache_entry("first") == b"after" and intact(file_path)
        os.unlink(file_path)
        return int(first)


class TestPowerLoss:
    @pytest.fixture
    def copies(self, file_path):
        return Copies(file_path)

    def test_wal_cut_anywhere_is_a_prefix_of_what_was_acknowledged(self, copies):
        frames = (len(copies.wal) - 32) // FRAME
        assert len(copies.commits) == 20 and frames > 40
        for frame in range(frames + 1):
            for extra in (0, 2000):
                cut = 32 + frame * FRAME + extra
                assert copies.opened(copies.wal[:cut]) == copies.survivors(min(frame, frames)), cut

    def test_wal_damaged_anywhere_is_a_prefix_of_what_was_acknowledged(self, copies):
        dice = random.Random(11)
        for _ in range(100):
            at = dice.randrange(dice.choice((32, len(copies.wal))))
            wal = bytearray(copies.wal)
            wal[at] ^= dice.randrange(1, 256)
            assert copies.opened(wal) == copies.survivors(max(at - 32, 0) // FRAME * (at >= 32)), at

    @pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
    @pytest.mark.parametrize("kind", ["operation", "session", "transaction"])
    def test_write_is_synced_before_the_call_returns(self, file_path, kind):
        program = """if True:
            import contextlib, os, sys, flowstore
            store = flowstore.SQLiteDataStore(sys.argv[1])
            kind = sys.argv[2]
            with contextlib.nullcontext(store) if kind == "operation" else getattr(store, kind)() as user:
                for number in range(3):
                    user.set_cache_entry("key", b"%d" % number)
                    if kind != "transaction":
                        os.write(2, b"RETURNED")
            os.write(2, b"RETURNED")"""
        log = file_path + ".log"
        command = ["strace", "-f", "-y", "-e", "trace=write,pwrite64,fsync,fdatasync", "-o", log]
        environment = {**os.environ, "PYTHONPATH": os.path.dirname(flowstore.__file__)}
        done = subprocess.run([*command, sys.executable, "-c", program, file_path, kind], env=environment,
                              capture_output=True, timeout=PATIENCE)
        if done.returncode and b"ptrace" in done.stderr:
            pytest.skip("strace may not trace here")
        assert done.returncode == 0, done.stderr
        with open(log) as stream:
            lines = stream.read().splitlines()
        pending = returned = written = 0
        for line in lines:
            if "store.db-wal>" in line:
                written += "pwrite64(" in line
                pending = "pwrite64(" in line
            elif "RETURNED" in line:
                assert not pending, "the last write to the WAL was not synced"
                returned += 1
        assert written and returned == (1 if kind == "transaction" else 4)


@posix_only
class TestWal:
    def test_wal_stays_bounded_though_the_store_is_never_left_alone(self, file_path):
        store = flowstore.SQLiteDataStore(file_path, timeout=PATIENCE)

        def work(number):
            largest = 0
            with store.session() as session:  # held open, so that no close clears the WAL
                for step in range(100):
                    session.set_cache_entry(f"{number}.{step % 5}", os.urandom(40_000))
                    session.get_cache_entries([f"{other}.{step % 5}" for other in range(6)])
                    largest = max(largest, os.stat(file_path + "-wal").st_size)
            return largest

        largest = max(together(6, work))
        assert 4 << 20 < largest < 6 << 20  # of 24 MB written
        assert os.stat(file_path).st_size < 3 << 20
        assert files(file_path) == ["store.db"]

    def test_stalled_reader_makes_no_writer_wait(self, file_path):
        store = flowstore.SQLiteDataStore(file_path, timeout=0)  # any wait at all would be an error
        store.set_cache_entry("key", b"old")
        select = "SELECT value FROM cache"
        holder = Held(lambda: locked(file_path, "DEFERRED"), lambda sql: sql.execute(select).fetchall())
        for number in range(200):
            store.set_cache_entry("key", b"%d" % number * 20_000)
        assert os.stat(file_path + "-wal").st_size > 6 << 20  # what the reader sees can't be overwritten
        with store.session() as session:
            assert holder.result() == [(b"old",)]
            for number in range(3):
                session.set_cache_entry("key", b"%d" % number)
            assert os.stat(file_path + "-wal").st_size < 1 << 20


def overtaken(use, *arguments):
    """A child that stands still between SQLite's opening of a file and its first lock on it.

    What is returned lets it go on, and returns what it returns.
    """
    halted, go_on = os.pipe(), os.pipe()

    def work():
        armed = [True]

        def halt(event, _):
            if event == "sqlite3.connect/handle" and armed:
                armed.clear()
                os.write(halted[1], b".")
                os.read(go_on[0], 1)

        sys.addaudithook(halt)
        return use(*arguments)

    child = Forked(work)
    os.read(halted[0], 1)

    def resume():
        os.write(go_on[1], b".")
        return child.result()

    return resume


def set_mine(context):
    with context as user:
        user.set_cache_entry("mine", b"mine")


def use_for_a_while(file_path, seconds, kind, number):
    """A log of writes, each read back, or of destroys: (from, to, whether it was there; None: a destroy)."""
    store, dice, end, log, step = None, random.Random(number), time.monotonic() + seconds, [], 0
    pause = {"never pauses": 0, "destroys": 0.05}.get(kind, 0.02)
    while (start := time.monotonic()) < end:
        step += 1
        with contextlib.suppress(flowstore.StoreError):  # who loses a race may be told so
            if kind == "destroys":
                flowstore.destroy_store(file_path)
                log.append((start, time.monotonic(), None))
            elif kind == "reads":
                flowstore.SQLiteDataStore(file_path).get_cache_entries(["0.1", "1.1"])
            else:
                if store is None or kind == "opens first":
                    store = flowstore.SQLiteDataStore(file_path, timeout=PATIENCE)
                with store.session() if kind == "holds sessions" else contextlib.nullcontext(store) as user:
                    user.set_cache_entry(f"{number}.{step}", bytes(dice.choice((1, 9000))))
                    time.sleep(dice.random() * pause)
                    found = user.get_cache_entry(f"{number}.{step}")
                    log.append((start, time.monotonic(), found is not None))
        time.sleep(dice.random() * pause)
    return log


@posix_only
class TestDestroy:
    @pytest.mark.parametrize("crowd", [
        ["never pauses"] * 4,
        ["pauses"] * 24,
        ["opens first"] * 12,
        ["never pauses", "pauses", "opens first", "holds sessions", "reads"] * 12,
    ], ids=["never pause", "pause", "open first", "all kinds"])
    def test_destroys_under_use_lose_nothing_later(self, file_path, crowd):
        kinds = ["destroys", "destroys", *crowd]
        logs = together(len(kinds), lambda number: use_for_a_while(file_path, 1.5, kinds[number], number))
        entries = [entry for log in logs for entry in log]
        destroys = [entry[:2] for entry in entries if entry[2] is None]
        assert len(destroys) > 2 and len(entries) > len(destroys)
        for start, end, found in entries:
            assert found is not False or any(begun < end and start < ended for begun, ended in destroys)
        store = flowstore.SQLiteDataStore(file_path)
        store.set_cache_entry("key", b"")
        assert files(file_path) == ["store.db"] and intact(file_path)
        flowstore.destroy_store(file_path)
        assert files(file_path) == []

    @pytest.mark.parametrize("others", ["destroy", "make anew", "hold"])
    @pytest.mark.parametrize("use", [
        lambda store: store.get_cache_entry("key"),
        lambda store: store.set_cache_entry("mine", b"mine"),
        lambda store: flowstore.SQLiteDataStore(store.path).get_cache_entry("key"),
        lambda store: [*map(set_mine, [store.session()])],
        lambda store: [*map(set_mine, [store.transaction()])],
    ], ids=["read", "write", "open", "session", "transaction"])
    def test_overtaken_between_open_and_lock_uses_the_new_store(self, file_path, use, others):
        store = flowstore.SQLiteDataStore(file_path)
        store.set_cache_entry("key", b"old")
        resume = overtaken(use, store)
        flowstore.destroy_store(file_path)
        expected, holder = None, None
        if others != "destroy":
            expected = b"new"
            store.set_cache_entry("key", expected)
        if others == "hold":
            holder = Held(store.session, lambda session: session.get_cache_entry("key"))
            store.set_cache_entry("key", expected := b"newer")  # only in the WAL, while that is held
        found = resume()
        if isinstance(found, bytes):
            assert found == expected
        assert store.get_cache_entry("key") == expected
        if holder:
            assert holder.result() == expected
        assert store.get_cache_entry("key") == expected
        wrote = use.__code__.co_names[-1] != "get_cache_entry"
        assert store.get_cache_entry("mine") == (b"mine" if wrote else None)
        assert files(file_path) in (["store.db"], []) and (not files(file_path) or intact(file_path))

    def test_killed_destroyer_leaves_what_the_next_open_clears(self, file_path):
        dice = random.Random(5)
        for _ in range(60):
            store = flowstore.SQLiteDataStore(file_path)
            store.set_cache_entry("key", bytes(10_000))
            child = Forked(flowstore.destroy_store, file_path)
            time.sleep(dice.random() * 0.006)
            child.kill()
            flowstore.SQLiteDataStore(file_path).set_cache_entry("another", b"")
            assert files(file_path) == ["store.db"] and intact(file_path)

    def test_store_that_somebody_holds_is_emptied_and_stays(self, file_path):
        store = flowstore.SQLiteDataStore(file_path)
        store.set_process_var("root", "secret", "hunter2" * 500)
        holder = Held(store.session, lambda session: session.get_all_process_vars("root"))
        with pytest.raises(flowstore.StoreBusyError, match=r"emptied.* file is left"):
            flowstore.destroy_store(file_path)
        assert store.get_all_process_vars("root") == holder.result() == {}
        with open(file_path, "rb") as stream:
            assert b"hunter2" not in stream.read()
        flowstore.destroy_store(file_path)
        assert files(file_path) == []

    def test_wal_of_a_killed_process_goes_with_the_store(self, file_path):
        store = flowstore.SQLiteDataStore(file_path)
        holder = Held(store.session)
        store.set_cache_entry("key", bytes(10_000))
        holder.child.kill()
        assert files(file_path) == ["store.db", "store.db-shm", "store.db-wal"]
        flowstore.destroy_store(file_path)
        assert files(file_path) == []
        assert flowstore.SQLiteDataStore(file_path).get_cache_entry("key") is None

    @pytest.mark.parametrize("version", [0, 7])
    def test_file_of_another_program_is_refused_and_left_alone(self, file_path, version):
        with contextlib.closing(sqlite3.connect(file_path)) as sql:
            sql.executescript(f"CREATE TABLE cache (key, value); PRAGMA application_id = {version}")
        with open(file_path, "rb") as stream:
            before = stream.read()
        with pytest.raises(flowstore.CorruptStoreError):
            flowstore.destroy_store(file_path)
        with open(file_path, "rb") as stream:
            assert stream.read() == before
        assert files(file_path) == ["store.db"]


def is_free(store):
    """Whether nobody has the write lock, asked at once by another thread."""
    outcome = []

    def write():
        try:
            flowstore.SQLiteDataStore(store.path, timeout=0).set_cache_entry("is free", b"")
            outcome.append(True)
        except flowstore.StoreBusyError:
            outcome.append(False)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    return outcome[0]


class TestTransactionEnds:
    @pytest.fixture
    def store(self, file_path):
        return flowstore.SQLiteDataStore(file_path)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_any_exception_takes_it_back_and_frees_the_lock_at_once(self, store, error):
        with pytest.raises(error), store.transaction() as transaction:
            transaction.set_cache_entry("key", b"")
            assert not is_free(store)
            raise error("reason")
        assert is_free(store)
        assert store.get_cache_entry("key") is None

    def test_closed_generator_takes_it_back(self, store):
        def steps():
            with store.transaction() as transaction:
                transaction.set_cache_entry("key", b"")
                yield

        generator = steps()
        next(generator)
        generator.close()
        assert is_free(store)
        assert store.get_cache_entry("key") is None

    @posix_only
    def test_control_c_takes_it_back(self, store):
        def work():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with contextlib.suppress(KeyboardInterrupt), store.transaction() as transaction:
                transaction.set_cache_entry("key", b"")
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(PATIENCE)
            return is_free(store)

        assert Forked(work).result()
        assert store.get_cache_entry("key") is None

    def test_killed_one_is_taken_back(self, store):
        holder = Held(store.transaction)
        assert not is_free(store)
        holder.child.kill()
        assert is_free(store)

    def misuses(store, transaction):
        other = flowstore.SQLiteDataStore(store.path)
        with other.session() as session:
            yield transaction.transaction
            yield lambda: store.set_cache_entry("key", b"other")
            yield lambda: other.delete_process_bucket("bucket")
            yield lambda: session.set_cache_entry("key", b"other")
            yield lambda: flowstore.destroy_store(store.path)
            yield lambda: store.transaction().__enter__()
            yield lambda: session.transaction().__enter__()
            yield lambda: transaction.__enter__()

    @pytest.mark.parametrize("number", range(8))
    def test_waiting_for_oneself_is_refused_at_once(self, store, number):
        with store.transaction() as transaction:
            transaction.set_cache_entry("key", b"mine")
            start = time.monotonic()
            misuses = list(TestTransactionEnds.misuses(store, transaction))
            with pytest.raises(RuntimeError):
                misuses[number]()
            assert time.monotonic() - start < 1
            transaction.set_cache_entry("another", b"mine")
        assert store.get_cache_entries(["key", "another"]) == {"key": b"mine", "another": b"mine"}

    @pytest.mark.parametrize("misuse", [
        lambda session: session.set_cache_entry("key", b"other"),
        lambda session: session.transaction().__enter__(),
    ], ids=["write", "nest"])
    def test_misuse_of_its_session_does_not_end_it(self, store, misuse):
        with store.session() as session, session.transaction() as transaction:
            transaction.set_cache_entry("key", b"mine")
            with pytest.raises(RuntimeError):
                misuse(session)
            transaction.set_cache_entry("another", b"mine")
        assert store.get_cache_entries(["key", "another"]) == {"key": b"mine", "another": b"mine"}

    @pytest.mark.parametrize("kind", ["session", "transaction"])
    def test_use_after_its_end_is_refused(self, store, kind):
        with getattr(store, kind)() as ended:
            pass
        for use in (ended.list_execution_refs, lambda: ended.set_cache_entry("key", b""), ended.transaction):
            with pytest.raises(RuntimeError):
                use()

    @posix_only
    def test_full_disk_makes_it_dead_though_the_body_caught_the_error(self, store):
        store.set_cache_entry("key", b"before")

        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
            check_full_disk(store)

        Forked(work).result()
        assert store.get_cache_entries(["key", "value 0"]) == {"key": b"before"}
        assert is_free(store) and intact(store.path)

    @pytest.mark.skipif(sys.platform != "linux" or os.geteuid(), reason="needs to mount a small disk")
    def test_full_small_disk_makes_it_dead(self, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "small", disk]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("may not mount")
        try:
            store = flowstore.SQLiteDataStore(disk / "store.db")
            store.set_cache_entry("key", b"before")
            check_full_disk(store)
            assert store.get_cache_entries(["key", "value 0"]) == {"key": b"before"}
            store.set_cache_entry("key", b"after")
            assert os.listdir(disk) == ["store.db"]
        finally:
            gc.collect()
            subprocess.run(["umount", disk], check=True)


def check_full_disk(store):
    """A transaction that meets the end of the disk, once or again; it must not take effect."""
    errors = []
    with pytest.raises(flowstore.StoreError) as caught, store.transaction() as transaction:
        transaction.set_cache_entry("key", b"after")
        for number in range(100):
            try:
                transaction.set_cache_entry(f"value {number}", bytes(300_000))
            except flowstore.StoreError as error:
                errors.append(error)
    assert errors or caught.value
    assert all(store.path in str(error) for error in [*errors, caught.value])
    if errors:
        assert "rolled" in str(caught.value)


class TestThreads:
    def test_threads_share_a_store(self, file_path):
        store = flowstore.SQLiteDataStore(file_path, timeout=PATIENCE)
        errors = []

        def work(number):
            try:
                for step in range(30):
                    store.set_cache_entry(f"{number}.{step}", b"%d" % step)
                    assert store.get_cache_entry(f"{number}.{step}") == b"%d" % step
                with store.transaction() as transaction:
                    transaction.set_cache_entry(str(number), b"")
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(store.get_cache_entries(map(str, range(8)))) == 8
        assert files(file_path) == ["store.db"]

    @pytest.mark.parametrize("kind", ["session", "transaction"])
    def test_one_opened_by_another_thread_is_refused(self, file_path, kind):
        store = flowstore.SQLiteDataStore(file_path)
        errors = []

        def work():
            for use in (lambda: user.get_cache_entry("key"), lambda: user.set_cache_entry("key", b"")):
                try:
                    use()
                except RuntimeError as error:
                    errors.append(str(error))

        with getattr(store, kind)() as user:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            user.set_cache_entry("other", b"")
        assert len(errors) == 2 and all("thread" in error and file_path in error for error in errors)
        assert store.get_cache_entries(["key", "other"]) == {"other": b""}


@posix_only
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestForks:
    def test_forks_amid_the_operations_of_threads(self, file_path):
        store = flowstore.SQLiteDataStore(file_path, timeout=PATIENCE)
        stop, errors = threading.Event(), []

        def use(number):
            step = 0
            try:
                while not stop.is_set():
                    step += 1
                    store.set_cache_entry(f"thread {number}", b"%d" % step)
                    assert store.get_cache_entry(f"thread {number}") == b"%d" % step
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            start = time.monotonic()
            children = [Forked(open_first, file_path, number) for number in range(25)]
            forked_in = time.monotonic() - start
            for child in children:
                child.result()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert errors == []
        assert forked_in < 25  # each fork waits for operations in flight, not for its patience's end
        assert len(store.get_cache_entries(map(str, range(25)))) == 25
        assert files(file_path) == ["store.db"] and intact(file_path)

    def test_several_threads_fork_at_the_same_time(self, file_path):
        store = flowstore.SQLiteDataStore(file_path, timeout=PATIENCE)
        children, stop = [], threading.Event()

        def fork():
            for number in range(5):
                children.append(Forked(open_first, file_path, number))

        def use():
            while not stop.is_set():
                store.set_cache_entry("thread", b"")

        user = threading.Thread(target=use)
        threads = [threading.Thread(target=fork) for _ in range(4)]
        start = time.monotonic()
        for thread in (user, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        forked_in = time.monotonic() - start
        stop.set()
        user.join()
        for child in children:
            child.result()
        assert forked_in < 25
        assert intact(file_path)

    @pytest.mark.parametrize("kind", ["session", "transaction"])
    def test_one_opened_before_a_fork_is_refused_and_unharmed(self, file_path, kind):
        store = flowstore.SQLiteDataStore(file_path)

        def work():
            messages = []
            for use in (lambda: user.get_cache_entry("key"), lambda: user.set_cache_entry("key", b""),
                        lambda: store.get_cache_entry("key"), lambda: store.set_cache_entry("key", b"")):
                with pytest.raises(RuntimeError, match="fork") as caught:
                    use()
                messages.append(str(caught.value))
            user.__exit__(None, None, None)
            gc.collect()
            return messages

        with getattr(store, kind)() as user:
            user.set_cache_entry("mine", b"before")
            messages = Forked(work).result()
            user.set_cache_entry("mine", b"after")
            together(2, lambda number: number)
        assert all(file_path in message for message in messages)
        assert store.get_cache_entries(["key", "mine"]) == {"mine": b"after"}
        assert files(file_path) == ["store.db"] and intact(file_path)

    def test_another_store_serves_after_a_fork_in_a_session(self, file_path):
        flowstore.SQLiteDataStore(file_path)
        with flowstore.SQLiteDataStore(file_path + ".other").session():
            Forked(open_first, file_path, 1).result()
        assert flowstore.SQLiteDataStore(file_path).get_cache_entry("1") == b"1"

    @pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
    def test_multiprocessing(self, file_path, method):
        store = flowstore.SQLiteDataStore(file_path)
        store.set_cache_entry("key", b"")
        context = multiprocessing.get_context(method)
        commands = [["--store", file_path, "set", "--global", str(number), "value"] for number in range(3)]
        processes = [context.Process(target=flowstore.main, args=(command,)) for command in commands]
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 0
        assert store.get_all_process_vars("root") == dict.fromkeys("012", "value")
        assert files(file_path) == ["store.db"]


RUNS_MODULE = os.path.abspath(flowstore.__file__)
RUNS_EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
RUNS_LIMIT = 30  # seconds after which a process hangs
ON_LINUX = os.path.exists("/proc/self/ns/pid")
linux_only = pytest.mark.skipif(not ON_LINUX, reason="/proc tells where a process lives")
root_only = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="takes another user")


@pytest.fixture(autouse=True)
def runs_environment(monkeypatch, tmp_path):
    """A store of the test's own, and nothing in the environment that says otherwise."""
    for name in [name for name in os.environ if name.startswith(("FLOW_", "FLOWSTORE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLOWSTORE_PATH", str(tmp_path / "s.db"))
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(RUNS_MODULE))


@pytest.fixture
def runs_store(runs_environment):
    return flowstore.SQLiteDataStore()


def flowstore_words(*words):
    return [sys.executable, "-m", "flowstore", *words]


def flowstore_done(*words, program=(), **settings):
    """The command line run to its end, apart from any terminal."""
    command = [*program, *words] if program else flowstore_words(*words)
    settings = {"input": b"", **settings} if "stdin" not in settings else settings
    return subprocess.run(command, capture_output="stderr" not in settings, timeout=RUNS_LIMIT,
                          start_new_session=True, **settings)


@contextlib.contextmanager
def flowstore_started(*words, program=(), **settings):
    """The command line at work, once its command has said a line: that line is `.said`."""
    settings |= dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(program or flowstore_words(*words), start_new_session=True, **settings)
    try:
        process.said = process.stdout.readline().decode().strip()
        assert process.said, process.stderr.read()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # what an ended runner has left behind too
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=RUNS_LIMIT)


def flowstore_json(*words):
    result = flowstore_done(*words, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def said_in_one_line(stderr):
    return stderr.startswith(b"flowstore: ") and stderr.count(b"\n") == 1 and stderr.endswith(b"\n")


def eventually(condition):
    end = time.monotonic() + RUNS_LIMIT
    while not condition():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.005)


def process_is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def process_state(pid):
    """The fields of /proc/PID/stat from the third on."""
    with open(f"/proc/{pid}/stat") as stream:
        return stream.read().rpartition(")")[2].split()


def gone_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def newest_run(store, ref):
    return store.get_execution_history(ref, 1)[0]


def run_sql(store, statement, values=()):
    sql = sqlite3.connect(store.path)
    try:
        with sql:
            return sql.execute(statement, values).fetchall()
    finally:
        sql.close()


@contextlib.contextmanager
def write_lock(store):
    sql = sqlite3.connect(store.path, isolation_level=None)
    try:
        sql.execute("BEGIN IMMEDIATE")
        yield
    finally:
        sql.close()


def wal_commits(store):
    """How many transactions stand in the WAL, which somebody has to keep there."""
    with open(store.path + "-wal", "rb") as stream:
        data = stream.read()
    size = 24 + int.from_bytes(data[8:12], "big")
    frames = [data[at : at + 24] for at in range(32, len(data) - size + 1, size)]
    return sum(frame[4:8] != bytes(4) and frame[8:16] == data[16:24] for frame in frames)


class Body:
    """A with block that sets attributes of its run, and raises an error unless it is None."""

    def __init__(self, error, /, **attributes):
        self.error, self.attributes = error, attributes

    def __repr__(self):
        return f"{self.error!r} {self.attributes}"


class TestExecution:
    def test_entry_records_a_running_run_in_a_scope_of_its_name(self, runs_store):
        before = datetime.now(UTC)
        with runs_store.execution("build app", label="l", command="c", spec="s", log_archive_id="a") as run:
            record = newest_run(runs_store, "build app")
            assert before <= record.started_at <= datetime.now(UTC)
            assert record == flowstore.ExecutionRecord(
                "build app", record.started_at, id=run.id, status="running", pid=os.getpid(), label="l",
                command="c", spec="s", log_archive_id="a", source="cli", working_dir=os.getcwd())
            assert (run.ref, run.bucket) == ("build app", run.id)
            assert runs_store.list_process_buckets() == [run.bucket]

    @pytest.mark.parametrize(("body", "status", "exit_code", "error"), [
        (Body(None), "completed", 0, ""),
        (Body(None, exit_code=3), "failed", 3, ""),
        (Body(None, exit_code=-9), "failed", -9, ""),
        (Body(None, error="no luck"), "failed", 0, "no luck"),
        (Body(None, log_archive_id="log 7"), "completed", 0, ""),
        (Body(ValueError("boom")), "failed", 1, "boom"),
        (Body(ValueError()), "failed", 1, "ValueError"),
        (Body(OSError("a \udcff name")), "failed", 1, "name"),
        (Body(ValueError("boom"), exit_code=7), "failed", 7, "boom"),
        (Body(ValueError("boom"), error="mine"), "failed", 1, "mine"),
        (Body(flowstore.StoreError("the world's")), "failed", 1, "the world's"),
        (Body(SystemExit()), "completed", 0, ""),
        (Body(SystemExit(0)), "completed", 0, ""),
        (Body(SystemExit(4)), "failed", 4, ""),
        (Body(SystemExit(True)), "failed", 1, ""),
        (Body(SystemExit(False)), "completed", 0, ""),
        (Body(SystemExit("bad flag")), "failed", 1, "bad flag"),
        (Body(KeyboardInterrupt()), "failed", 130, "KeyboardInterrupt"),
        (Body(GeneratorExit()), "failed", 1, "GeneratorExit"),
    ], ids=repr)
    def test_each_exit_is_recorded_and_goes_on(self, runs_store, body, status, exit_code, error):
        caught = None
        try:
            with runs_store.execution("x", id="one") as run:
                for name, value in body.attributes.items():
                    setattr(run, name, value)
                runs_store.set_process_var(run.bucket, "secret", "v")
                if body.error is not None:
                    raise body.error
        except BaseException as raised:
            caught = raised
        assert caught is body.error
        [record] = runs_store.get_execution_history("x")
        assert (record.status, record.exit_code) == (status, exit_code)
        assert error in record.error and bool(error) == bool(record.error)
        assert record.started_at <= record.completed_at
        assert timedelta(0) <= record.duration < timedelta(seconds=RUNS_LIMIT)
        assert record.log_archive_id == body.attributes.get("log_archive_id", "")
        assert runs_store.list_process_buckets() == []
        assert "secret" not in runs_store.get_all_process_vars("one")

    def test_exit_code_too_large_for_the_file_still_exits(self, runs_store):
        with pytest.raises(SystemExit), runs_store.execution("x"):
            raise SystemExit(2**70)
        assert newest_run(runs_store, "x").status == "failed"

    def test_interrupted_process_records_its_run(self, runs_store):
        script = """
import flowstore, sys
with flowstore.SQLiteDataStore().execution("x"):
    print("ready", flush=True)
    sys.stdin.read()"""
        with flowstore_started(program=[sys.executable, "-c", script]) as process:
            process.send_signal(signal.SIGINT)
            assert process.wait(RUNS_LIMIT) in (-signal.SIGINT, 130)
        assert (newest_run(runs_store, "x").status, newest_run(runs_store, "x").exit_code) == ("failed", 130)

    def test_provenance_comes_from_the_environment(self, runs_store, monkeypatch):
        monkeypatch.setenv("FLOW_RUN_SOURCE", "${WHERE_FROM}")
        monkeypatch.setenv("WHERE_FROM", "mcp")
        monkeypatch.setenv("FLOW_RUN_CLIENT", "editor ${WHERE_FROM}")
        monkeypatch.setenv("FLOW_RUN_SESSION", "${NOT_SET}")
        with runs_store.execution("x"):
            record = newest_run(runs_store, "x")
        assert (record.source, record.client_name, record.session_id) == ("mcp", "editor ${WHERE_FROM}", "")

    def test_source_that_resolves_to_nothing_is_cli(self, runs_store, monkeypatch):
        monkeypatch.setenv("FLOW_RUN_SOURCE", "${NOT_SET}")
        with runs_store.execution("x"):
            assert newest_run(runs_store, "x").source == "cli"

    def test_provenance_that_is_given_wins(self, runs_store, monkeypatch):
        for name in ("FLOW_RUN_SOURCE", "FLOW_RUN_CLIENT", "FLOW_RUN_SESSION"):
            monkeypatch.setenv(name, "environment")
        with runs_store.execution("x", source="desktop", client_name="", session_id="s", working_dir="/e"):
            record = newest_run(runs_store, "x")
        assert (record.source, record.client_name, record.session_id) == ("desktop", "", "s")
        assert record.working_dir == "/e"

    @pytest.mark.parametrize("id", ["", "a\0b", "a:b", "a/b", "a b", "x" * 256, "é" * 128, "root", "\ud800"])
    def test_id_that_cannot_name_a_scope_is_a_value_error(self, runs_store, id):
        with pytest.raises(ValueError), runs_store.execution("x", id=id):
            pytest.fail("began")
        assert runs_store.list_execution_refs() == runs_store.list_process_buckets() == []

    @pytest.mark.parametrize("id", ["x" * 255, "é" * 127, "a\nb", "Root", "a\udcff", "🚀"])
    def test_id_is_the_scope_that_a_child_finds(self, runs_store, monkeypatch, id):
        with runs_store.execution("x", id=id) as run:
            monkeypatch.setenv("FLOW_PROCESS_BUCKET", run.env["FLOW_PROCESS_BUCKET"])
            assert flowstore.environment_bucket() == run.bucket == run.id == id
            assert newest_run(runs_store, "x").id == id

    @pytest.mark.parametrize(("arguments", "error"), [
        ({"ref": ""}, ValueError), ({"ref": 5}, TypeError), ({"id": 5}, TypeError), ({"id": b"x"}, TypeError),
        ({"label": None}, TypeError), ({"command": ["true"]}, TypeError), ({"source": "\ud800"}, ValueError),
    ])
    def test_wrong_argument_leaves_no_trace(self, runs_store, arguments, error):
        with pytest.raises(error), runs_store.execution(**{"ref": "x", **arguments}):
            pytest.fail("began")
        assert runs_store.list_execution_refs() == runs_store.list_process_buckets() == []

    def test_default_id_fits_a_scope_and_differs(self, runs_store):
        ids = set()
        for _ in range(5):
            with runs_store.execution("x") as run:
                ids.add(run.id)
        assert len(ids) == 5
        assert not any(set(id) & set("\0:/ ") for id in ids)

    def test_parallel_runs_of_one_ref_have_two_scopes(self, runs_store):
        with runs_store.execution("x") as one, runs_store.execution("x") as two:
            runs_store.set_process_var(one.bucket, "a", "1")
            runs_store.set_process_var(two.bucket, "a", "2")
            assert runs_store.get_process_var(one.bucket, "a") == "1"
            assert len(runs_store.get_execution_history("x")) == 2
        assert [record.status for record in runs_store.get_execution_history("x")] == ["completed"] * 2
        assert runs_store.list_process_buckets() == []

    def test_ending_one_run_leaves_the_scope_of_another(self, runs_store):
        with runs_store.execution("x") as one:
            runs_store.set_process_var(one.bucket, "a", "1")
            with runs_store.execution("x"):
                pass
            assert runs_store.list_process_buckets() == [one.bucket]
            assert runs_store.get_process_var(one.bucket, "a") == "1"

    def test_env_lets_a_child_find_scope_and_store(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        store = flowstore.SQLiteDataStore("elsewhere.db")
        environment = dict(os.environ)
        with store.execution("x") as run:
            assert {**run.env, **environment} == {**environment, "FLOW_PROCESS_BUCKET": run.bucket}
            assert flowstore_done("set", "A", "1", env=run.env, cwd="/").returncode == 0
            assert store.get_process_var(run.bucket, "A") == "1"
        assert os.environ == environment
        assert not os.path.exists(environment["FLOWSTORE_PATH"])

    def test_start_and_end_are_one_transaction_each(self, runs_store):
        reader = sqlite3.connect(runs_store.path)
        reader.execute("SELECT count(*) FROM history").fetchone()  # from now on the WAL stays
        runs_store.set_process_var("other", "a", "1")
        before = wal_commits(runs_store)
        with runs_store.execution("x") as run:
            assert wal_commits(runs_store) == before + 1
            runs_store.set_process_var(run.bucket, "a", "1")
        assert wal_commits(runs_store) == before + 3
        reader.close()

    def test_end_is_recorded_at_the_place_of_the_start(self, runs_store):
        with runs_store.execution("x") as one, runs_store.execution("x") as two:
            pass
        assert [record.id for record in runs_store.get_execution_history("x")] == [one.id, two.id]

    def test_removed_working_directory_does_not_matter(self, runs_store, tmp_path, monkeypatch):
        (tmp_path / "away").mkdir()
        monkeypatch.chdir(tmp_path / "away")
        (tmp_path / "away").rmdir()
        with runs_store.execution("x"):
            pass
        assert newest_run(runs_store, "x").status == "completed"
        monkeypatch.undo()

    def test_end_that_cannot_be_recorded_is_a_store_error(self, runs_store):
        with pytest.raises(flowstore.StoreError), runs_store.execution("x"):
            os.unlink(runs_store.path)
            os.mkdir(runs_store.path)

    def test_end_that_cannot_be_recorded_does_not_hide_the_error_of_the_body(self, runs_store):
        with pytest.raises(KeyError, match="mine"), runs_store.execution("x"):
            os.unlink(runs_store.path)
            os.mkdir(runs_store.path)
            raise KeyError("mine")

    def test_start_that_cannot_be_recorded_runs_no_body(self, runs_store):
        execution = runs_store.execution("x")
        os.unlink(runs_store.path)
        os.mkdir(runs_store.path)
        with pytest.raises(flowstore.StoreError), execution:
            pytest.fail("began")

    def test_execution_inside_a_transaction_is_refused_at_once(self, runs_store):
        with runs_store.transaction(), pytest.raises(RuntimeError), runs_store.execution("x"):
            pytest.fail("began")


@pytest.fixture(scope="module")
def flowstore_forms(tmp_path_factory):
    """A folder, and what Python is to be given there to run the program in each form of distribution."""
    folder = tmp_path_factory.mktemp("forms")
    packed, vendor = folder / "packed", folder / "myapp" / "vendor"
    for place in (packed, vendor):
        place.mkdir(parents=True)
        shutil.copy(RUNS_MODULE, place / "flowstore.py")
    (vendor / "__init__.py").touch()
    (vendor.parent / "__init__.py").touch()
    pyz = str(folder / "flowstore.pyz")
    subprocess.run([sys.executable, "-m", "zipapp", packed, "-m", "flowstore:main", "-o", pyz], check=True)
    return folder, {
        "module": ["-m", "flowstore"], "zipapp": [pyz], "vendored": ["-m", "myapp.vendor.flowstore"],
        "file": [RUNS_MODULE]}


RUN_STATUSES = [
    (["sh", "-c", "exit 3"], 3, "exit status 3"),
    (["sh", "-c", "kill -9 $$"], 137, "killed by signal 9"),
    (["no such command"], 127, "no such command"),
    (["/"], 126, "/"),
]


class TestRunCommand:
    @pytest.mark.parametrize("form", ["module", "zipapp", "vendored", "file"])
    def test_status_is_the_commands_own_in_every_form(self, runs_store, flowstore_forms, form):
        folder, words = flowstore_forms
        for command, status, error in RUN_STATUSES:
            program = [sys.executable, *words[form]]
            result = flowstore_done("run", "r", "--", *command, program=program, cwd=folder)
            assert result.returncode == status, result.stderr
            record = newest_run(runs_store, "r")
            assert (record.exit_code, record.status) == (status, "failed")
            assert error in record.error
        assert runs_store.list_process_buckets() == []

    @pytest.mark.parametrize("signum", [2, 6, 15], ids=lambda number: signal.Signals(number).name)
    def test_command_killed_by_a_signal_gives_128_and_its_number(self, runs_store, signum):
        assert flowstore_done("run", "r", "--", "sh", "-c", f"kill -{signum} $$").returncode == 128 + signum

    @pytest.mark.parametrize("command", [["no such command"], ["/"], ["/etc/hosts"]])
    def test_command_that_cannot_begin_is_said_in_one_line(self, runs_store, command):
        assert said_in_one_line(flowstore_done("run", "r", "--", *command).stderr)

    def test_all_after_the_first_dashes_is_the_commands(self, runs_store):
        words = ["%s|", "--", "a b", "--store", "x", "--json", "-h", "", "--", "é\n"]
        result = flowstore_done("run", "r", "--", "printf", *words)
        assert result.stdout.decode() == "--|a b|--store|x|--json|-h||--|é\n|"
        assert newest_run(runs_store, "r").command == shlex.join(["printf", *words])

    @pytest.mark.parametrize("words", [
        ["--store", "S", "--json", "run", "r"], ["--json", "--store", "S", "run", "r"],
        ["run", "--store", "S", "r"], ["run", "r", "--store=S", "--json"]], ids=" ".join)
    def test_options_stand_before_or_after(self, tmp_path, words):
        words = [word.replace("S", str(tmp_path / "other.db")) for word in words]
        result = flowstore_done(*words, "--", "sh", "-c", "echo said; exit 3")
        assert (result.returncode, result.stdout, result.stderr) == (3, b"said\n", b"")
        assert newest_run(flowstore.SQLiteDataStore(tmp_path / "other.db"), "r").exit_code == 3

    def test_empty_store_option_is_the_default_place(self, runs_store):
        assert flowstore_done("--store", "", "run", "r", "--", "sh", "-c", "exit 3").returncode == 3
        assert newest_run(runs_store, "r").exit_code == 3

    @pytest.mark.parametrize("words", [
        ["run"], ["run", "r"], ["run", "r", "--"], ["run", "r", "true"], ["run", "--", "r"],
        ["run", "", "--", "true"]], ids=" ".join)
    def test_wrong_usage_is_status_2_and_runs_nothing(self, words):
        result = flowstore_done(*words)
        assert result.returncode == 2
        assert b"Traceback" not in result.stderr
        assert not os.path.exists(os.environ["FLOWSTORE_PATH"])

    def test_streams_are_passed_through(self, runs_store):
        result = flowstore_done("run", "r", "--", "sh", "-c", "cat; echo bad >&2", input=b"\xff\0in")
        assert (result.returncode, result.stdout, result.stderr) == (0, b"\xff\0in", b"bad\n")

    def test_other_open_files_are_passed_through(self, runs_store):
        source, sink = os.pipe()
        command = f"echo through >&{sink}"
        assert flowstore_done("run", "r", "--", "bash", "-c", command, pass_fds=[sink]).returncode == 0
        os.close(sink)
        with open(source, "rb") as stream:
            assert stream.read() == b"through\n"

    def test_record_tells_the_whole_run(self, runs_store, monkeypatch):
        monkeypatch.setenv("FLOW_RUN_CLIENT", "cron")
        with flowstore_started("run", "deploy", "--", "sh", "-c", "echo ready; cat") as runner:
            record = newest_run(runs_store, "deploy")
            assert (record.status, record.pid, record.client_name) == ("running", runner.pid, "cron")
            assert (record.command, record.working_dir) == ("sh -c 'echo ready; cat'", os.getcwd())
            assert runs_store.list_process_buckets() == [record.id]
        assert newest_run(runs_store, "deploy").status == "running"  # killed: nobody has looked since

    def test_command_hands_variables_on_in_its_scope(self, runs_store):
        fs = f"{sys.executable} -m flowstore"
        script = f"{fs} set A 1; {fs} set --global G 2; {fs} get A; {fs} run inner -- {fs} list; {fs} list"
        result = flowstore_done("run", "outer", "--", "sh", "-c", script)
        assert result.stdout == b"1\nG\t2\nA\t1\nG\t2\n"
        assert runs_store.get_all_process_vars("root") == {"G": "2"}
        assert runs_store.list_process_buckets() == ["root"]

    def test_child_finds_the_store_of_the_option(self, tmp_path):
        other = str(tmp_path / "other.db")
        fs = f"{sys.executable} -m flowstore"
        script = f"cd /; {fs} set --global A 1; {fs} path"
        result = flowstore_done("--store", other, "run", "r", "--", "sh", "-c", script)
        assert result.stdout.decode() == other + "\n"
        assert flowstore.SQLiteDataStore(other).get_process_var("root", "A") == "1"
        assert not os.path.exists(os.environ["FLOWSTORE_PATH"])

    def test_parallel_runs_of_one_ref_do_not_see_each_other(self, runs_store):
        fs = f"{sys.executable} -m flowstore"
        script = f"{fs} set A $0; echo ready; read x; {fs} get A"
        with (flowstore_started("run", "r", "--", "sh", "-c", script, "one") as one,
              flowstore_started("run", "r", "--", "sh", "-c", script, "two") as two):
            assert len(runs_store.list_process_buckets()) == 2
            assert one.communicate(b"\n", RUNS_LIMIT)[0] == b"one\n"
            assert two.communicate(b"\n", RUNS_LIMIT)[0] == b"two\n"
        assert runs_store.list_process_buckets() == []

    def test_words_that_are_not_utf8_survive(self, runs_store):
        result = flowstore_done("run", b"r\xff", "--", "printf", "%s", b"a\xfe")
        assert (result.returncode, result.stdout) == (0, b"a\xfe")
        assert newest_run(runs_store, "r\udcff").command == "printf %s 'a\udcfe'"


class TestRunAndSignals:
    @pytest.mark.parametrize("name", ["TERM", "HUP", "INT", "QUIT", "USR1", "USR2"])
    def test_signal_is_passed_on_and_the_status_of_the_command_returned(self, runs_store, name):
        script = f"trap 'exit 41' {name}; echo ready; while :; do sleep 0.02; done"
        with flowstore_started("run", "r", "--", "sh", "-c", script) as runner:
            runner.send_signal(getattr(signal, "SIG" + name))
            assert runner.wait(RUNS_LIMIT) == 41
        assert newest_run(runs_store, "r").exit_code == 41

    def test_command_that_dies_of_a_passed_signal_is_recorded_with_it(self, runs_store):
        with flowstore_started("run", "r", "--", "sh", "-c", "echo ready; exec sleep 60") as runner:
            runner.send_signal(signal.SIGTERM)
            assert runner.wait(RUNS_LIMIT) == 143
            assert runner.stderr.read() == b""
        assert newest_run(runs_store, "r").error == "killed by signal 15"

    def test_nohup_run_outlives_the_hangup(self, runs_store):
        words = ["nohup", *flowstore_words("run", "r", "--", "sh", "-c", "echo ready; read x; exit 5")]
        with flowstore_started(program=words) as runner:
            os.killpg(runner.pid, signal.SIGHUP)
            runner.communicate(b"\n", RUNS_LIMIT)
            assert runner.returncode == 5
        assert newest_run(runs_store, "r").exit_code == 5

    def test_signal_after_the_command_does_not_lose_its_end(self, runs_store):
        with flowstore_started("run", "r", "--", "sh", "-c", "echo $$; read x; exit 6") as runner:
            with write_lock(runs_store):  # so that the end has to wait
                runner.stdin.write(b"\n")
                runner.stdin.flush()
                eventually(lambda: process_is_gone(int(runner.said)))
                runner.send_signal(signal.SIGINT)
                runner.send_signal(signal.SIGTERM)
            assert runner.wait(RUNS_LIMIT) == 6
        assert newest_run(runs_store, "r").exit_code == 6

    @linux_only
    @root_only
    def test_signal_that_may_not_be_passed_on_does_not_end_the_run(self, runs_store):
        ctypes = pytest.importorskip("ctypes")

        def without_the_right_to_kill():
            ctypes.CDLL(None).prctl(24, 5)  # PR_CAPBSET_DROP, CAP_KILL

        script = "import os, sys; os.setuid(65534); print('ready', flush=True); sys.stdin.read(); sys.exit(6)"
        with flowstore_started("run", "r", "--", sys.executable, "-c", script,
                               preexec_fn=without_the_right_to_kill) as runner:
            runner.send_signal(signal.SIGTERM)
            runner.communicate(b"", RUNS_LIMIT)
            assert runner.returncode == 6
        assert newest_run(runs_store, "r").exit_code == 6


def in_private_mounts(script, *words, **settings):
    """A shell script as root in mounts of its own, which go with it; $fs is the command line."""
    if not ON_LINUX or os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("takes root and mounts of its own")
    probe = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    if probe.returncode:
        pytest.skip("can't mount here")
    script = f'fs="{sys.executable} -m flowstore"\n{script}'
    return subprocess.run(["unshare", "-m", "sh", "-ec", script, "sh", *words], capture_output=True,
                          timeout=RUNS_LIMIT, **settings)


class TestRunThatCannotBeRecorded:
    def unrecorded(self, result, status=5):
        assert result.returncode == status, result
        assert said_in_one_line(result.stderr), result.stderr
        assert b"recorded" in result.stderr

    COMMAND = ("--", "sh", "-c", "echo ran; exit 5")

    @pytest.mark.parametrize("content", [
        None, b"something else" * 100, b"\0" * 16 + b"\xed\xda\x0c\xed" + b"\0" * 4076])
    def test_path_that_is_no_store_runs_the_command(self, tmp_path, content):
        path = tmp_path / "in the way"
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
        result = flowstore_done("run", "--store", str(path), "r", *self.COMMAND)
        self.unrecorded(result)
        assert result.stdout == b"ran\n"
        assert content is None or path.read_bytes() == content

    def test_unknown_place_runs_the_command(self, monkeypatch):
        for name in ("FLOWSTORE_PATH", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", "relative")
        self.unrecorded(flowstore_done("run", "r", *self.COMMAND))

    def test_limit_of_file_size_runs_the_command(self, runs_store):
        result = flowstore_done("run", "r", *self.COMMAND,
                                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
        self.unrecorded(result)

    def test_command_not_found_without_a_record_is_127(self):
        result = flowstore_done("--store", "/proc/none/s.db", "run", "r", "--", "no such command")
        assert result.returncode == 127

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
    @pytest.mark.parametrize("place", ["/proc/none/s.db", ""])
    def test_full_standard_error_does_not_change_the_status(self, place):
        with open("/dev/full", "wb") as full:
            result = flowstore_done("run", "--store", place, "r", "--", "sh", "-c", "exit 5", stderr=full,
                                    stdout=subprocess.PIPE)
            assert result.returncode == 5
            result = flowstore_done("run", "--store", place, "r", "--", "no such command", stderr=full,
                                    stdout=subprocess.PIPE)
            assert result.returncode == 127

    def test_standard_error_that_nobody_reads_does_not_change_the_status(self):
        source, sink = os.pipe()
        os.close(source)
        result = flowstore_done("--store", "/proc/none/s.db", "run", "r", *self.COMMAND, stderr=sink,
                                stdout=subprocess.PIPE)
        os.close(sink)
        assert (result.returncode, result.stdout) == (5, b"ran\n")

    def test_full_disk_runs_the_command(self, tmp_path):
        script = '''mount -t tmpfs -o size=256k none "$1"; export FLOWSTORE_PATH="$1/s.db"; $fs set A 1
            cat /dev/zero >"$1/fill" 2>/dev/null || :
            $fs run r -- sh -c 'exit 5' '''
        self.unrecorded(in_private_mounts(script, tmp_path))

    def test_disk_that_the_command_fills_loses_only_the_end(self, tmp_path):
        script = '''mount -t tmpfs -o size=256k none "$1"; export FLOWSTORE_PATH="$1/s.db"
            $fs run r -- sh -c 'cat /dev/zero >"$0/fill" 2>/dev/null; exit 5' "$1" && exit 1 || echo $?
            rm "$1/fill"; $fs history r'''
        result = in_private_mounts(script, tmp_path)
        assert said_in_one_line(result.stderr)
        status, history = result.stdout.decode().split("\n", 1)
        assert status == "5"
        assert "process exited unexpectedly" in history

    def test_read_only_disk_runs_the_command(self, tmp_path):
        script = '''mount -t tmpfs none "$1"; export FLOWSTORE_PATH="$1/s.db"; $fs set A 1
            mount -o remount,ro "$1"; $fs run r -- sh -c 'exit 5' '''
        self.unrecorded(in_private_mounts(script, tmp_path))

    def test_disk_that_the_command_makes_read_only_loses_only_the_end(self, tmp_path):
        script = '''mount -t tmpfs none "$1"; export FLOWSTORE_PATH="$1/s.db"
            $fs run r -- sh -c 'mount -o remount,ro "$0"; exit 5' "$1" && exit 1 || echo $?
            $fs history r'''  # a view of what can't be written any more
        result = in_private_mounts(script, tmp_path)
        assert said_in_one_line(result.stderr)
        status, history = result.stdout.decode().split("\n", 1)
        assert status == "5"
        assert "process exited unexpectedly" in history


def own_note(store):
    """Where this process lives, as execution() notes it: machine, boot, namespace and start."""
    with store.execution("note of mine") as run:
        [[note]] = run_sql(store, "SELECT process FROM history WHERE id = ?", (run.id,))
    store.delete_execution_history("note of mine")
    assert len(note.split(" ")) == 4
    return note.split(" ")


def add_running(store, table, ref="r", id="one", pid=None, started_at=None, note=""):
    """A run that is recorded as running, in a scope of its id."""
    pid = os.getpid() if pid is None else pid
    started_at = started_at or datetime.now(UTC)
    if table == "history":
        store.record_execution(flowstore.ExecutionRecord(ref, started_at, id=id, status="running", pid=pid))
        if note:
            run_sql(store, "UPDATE history SET process = ? WHERE ref = ? AND id = ?", (note, ref, id))
    else:
        store.save_background_run(flowstore.BackgroundRun(id, pid, ref, started_at, "running"))
    if id:
        store.set_process_var(id, "secret", "v")


def recorded(store, table, ref="r", id="one"):
    return newest_run(store, ref) if table == "history" else store.get_background_run(id)


def is_left_alone(store, table):
    """Whether reconcile() leaves the run alone, and else marks it as it should."""
    before = recorded(store, table)
    count = store.reconcile()
    record = recorded(store, table)
    if count == 0:
        assert record == before
        assert store.list_process_buckets() == ["one"]
        return True
    assert count == 1
    assert (record.status, record.error) == ("failed", "process exited unexpectedly")
    assert record.started_at < record.completed_at
    assert record._replace(status="running", error="", completed_at=None) == before
    assert store.list_process_buckets() == []
    assert store.reconcile() == 0
    return False


BOTH_TABLES = pytest.mark.parametrize("table", ["history", "background"])


class TestReconcile:
    @BOTH_TABLES
    def test_process_that_is_gone_has_failed(self, runs_store, table):
        add_running(runs_store, table, pid=gone_pid())
        assert not is_left_alone(runs_store, table)

    @BOTH_TABLES
    @pytest.mark.parametrize("pid", [2**31, 2**40, 2**62])
    def test_pid_beyond_all_pids_is_gone(self, runs_store, table, pid):
        add_running(runs_store, table, pid=pid)
        assert not is_left_alone(runs_store, table)

    @BOTH_TABLES
    @pytest.mark.parametrize("pid", [0, -1, -(2**40)])
    def test_run_without_a_pid_is_left_alone(self, runs_store, table, pid):
        add_running(runs_store, table, pid=pid)
        assert is_left_alone(runs_store, table)

    @BOTH_TABLES
    @pytest.mark.parametrize("pid", [1, os.getppid(), None])
    def test_process_that_lives_is_left_alone(self, runs_store, table, pid):
        add_running(runs_store, table, pid=pid)
        assert is_left_alone(runs_store, table)

    @linux_only
    @BOTH_TABLES
    def test_process_that_began_after_the_run_is_another(self, runs_store, table):
        add_running(runs_store, table, started_at=datetime(2001, 1, 1, tzinfo=UTC))
        assert not is_left_alone(runs_store, table)

    @root_only
    @BOTH_TABLES
    def test_process_of_another_user_is_alive(self, table):
        folder = tempfile.mkdtemp()
        os.chown(folder, 65534, 65534)
        child = os.fork()
        if not child:
            try:
                os.setgid(65534)
                os.setuid(65534)
                with contextlib.suppress(PermissionError):
                    os.kill(os.getppid(), 0)
                    os._exit(1)
                store = flowstore.SQLiteDataStore(os.path.join(folder, "s.db"))
                add_running(store, table, pid=os.getppid())
                os._exit(0 if is_left_alone(store, table) else 2)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        shutil.rmtree(folder)

    @linux_only
    @pytest.mark.parametrize("noted", [True, False])
    def test_zombie_is_gone(self, runs_store, noted):
        note = own_note(runs_store)
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)

        started_at = datetime.now(UTC)
        note[3] = process_state(process.pid)[19]
        process.stdin.close()
        eventually(lambda: process_state(process.pid)[0] == "Z")
        note = " ".join(note) if noted else ""
        add_running(runs_store, "history", pid=process.pid, started_at=started_at, note=note)
        assert not is_left_alone(runs_store, "history")
        process.wait()

    @linux_only
    @pytest.mark.parametrize(("changed", "alive"), [
        ({}, True),
        ({3: "-"}, True),
        ({3: "1"}, False),  # its pid has been given to another
        ({1: "another-boot"}, False),
        ({1: "another-boot", 2: "pid:[1]"}, False),
        ({0: "another-machine", 1: "another-boot"}, True),
        ({2: "pid:[1]"}, True),
        ({2: "pid:[1]", 3: "1"}, True),
    ], ids=str)
    def test_note_tells_whether_a_pid_is_still_the_run(self, runs_store, changed, alive):
        note = own_note(runs_store)
        for index, part in changed.items():
            note[index] = part
        add_running(runs_store, "history", note=" ".join(note))
        assert is_left_alone(runs_store, "history") == alive

    @linux_only
    @pytest.mark.parametrize(("changed", "left"), [
        ({}, False), ({3: "-"}, False), ({1: "another-boot"}, False), ({2: "pid:[1]"}, True),
        ({0: "another-machine", 1: "another-boot"}, True)], ids=str)
    def test_note_tells_whether_a_missing_pid_can_be_judged(self, runs_store, changed, left):
        note = own_note(runs_store)
        for index, part in changed.items():
            note[index] = part
        add_running(runs_store, "history", pid=gone_pid(), note=" ".join(note))
        assert is_left_alone(runs_store, "history") == left

    @linux_only
    def test_note_outweighs_a_clock_that_was_set(self, runs_store):
        past = datetime(2001, 1, 1, tzinfo=UTC)
        add_running(runs_store, "history", started_at=past, note=" ".join(own_note(runs_store)))
        assert is_left_alone(runs_store, "history")

    @BOTH_TABLES
    @pytest.mark.parametrize("status", ["completed", "failed", "", "paused", "Running"])
    def test_only_running_rows_are_touched(self, runs_store, table, status):
        add_running(runs_store, table, pid=gone_pid())
        run_sql(runs_store, f"UPDATE {table} SET status = ?", (status,))
        assert is_left_alone(runs_store, table)

    def test_run_that_ends_while_it_is_judged_keeps_its_end(self, runs_store, monkeypatch):
        record = flowstore.ExecutionRecord("r", RUNS_EPOCH, id="one", status="running", pid=gone_pid())
        runs_store.record_execution(record)
        really_kill = os.kill

        def kill(pid, signum):
            runs_store.record_execution(record._replace(status="completed", exit_code=0))
            really_kill(pid, signum)

        monkeypatch.setattr(os, "kill", kill)
        assert runs_store.reconcile() == 0
        assert newest_run(runs_store, "r").status == "completed"

    def test_all_that_are_gone_are_counted_and_no_others_touched(self, runs_store):
        pid = gone_pid()
        for number in range(20):
            add_running(runs_store, "history", f"r{number % 3}", str(number), pid if number % 2 else None)
            add_running(runs_store, "background", f"r{number % 3}", f"b{number}", pid if number % 2 else None)
        runs_store.set_process_var("root", "a", "1")
        assert runs_store.reconcile() == 20
        states = {record.id: record.status for records in runs_store.get_all_execution_history().values()
                  for record in records}
        assert states == {str(number): "failed" if number % 2 else "running" for number in range(20)}
        assert len(runs_store.list_process_buckets()) == 21

    def test_run_named_root_or_nothing_does_not_cost_the_root_scope(self, runs_store):
        runs_store.set_process_var("root", "a", "1")
        add_running(runs_store, "background", id="root", pid=gone_pid())
        add_running(runs_store, "history", id="", pid=gone_pid())
        assert runs_store.reconcile() == 2
        assert runs_store.get_process_var("root", "a") == "1"

    def test_scope_of_a_live_run_is_not_a_gone_background_runs(self, runs_store):
        with runs_store.execution("r") as run:
            runs_store.set_process_var(run.bucket, "a", "1")
            add_running(runs_store, "background", id=run.id, pid=gone_pid())
            assert runs_store.reconcile() == 1
            assert runs_store.get_process_var(run.bucket, "a") == "1"

    @pytest.mark.parametrize("cell", ["abc", 1.5, b"\xff"])
    def test_pid_of_a_wrong_type_is_a_damaged_store(self, runs_store, cell):
        add_running(runs_store, "history")
        run_sql(runs_store, "UPDATE history SET pid = ?", (cell,))
        with pytest.raises(flowstore.CorruptStoreError):
            runs_store.reconcile()

    def test_missing_store_has_nothing_to_reconcile(self, runs_store):
        flowstore.destroy_store(runs_store.path)
        assert runs_store.reconcile() == 0
        assert not os.path.exists(runs_store.path)


class TestReconciledViews:
    def test_history_reconciles_a_killed_runner(self, runs_store):
        with flowstore_started("run", "r", "--", "sh", "-c", "echo ready; cat") as runner:
            assert [run["status"] for run in flowstore_json("history", "r")] == ["running"]
            runner.kill()
            runner.wait()
        [shown] = flowstore_json("history")
        assert (shown["status"], shown["error"]) == ("failed", "process exited unexpectedly")
        assert newest_run(runs_store, "r").status == "failed"
        assert runs_store.list_process_buckets() == []
        assert b"process exited unexpectedly" in flowstore_done("history", "r").stdout

    @pytest.mark.parametrize("words", [(), ("one",)])
    def test_background_view_shows_and_saves_what_is_gone(self, runs_store, words):
        add_running(runs_store, "background", pid=gone_pid())
        shown = flowstore_json("background", *words)
        shown = shown if words else shown[0]
        assert (shown["status"], shown["error"]) == ("failed", "process exited unexpectedly")
        assert runs_store.get_background_run("one").status == "failed"

    def test_view_of_a_run_that_just_ended_shows_its_end(self, runs_store):
        record = flowstore.ExecutionRecord("r", RUNS_EPOCH, id="one", status="running", pid=gone_pid())
        runs_store.record_execution(record)
        script = f"""
import flowstore, os
from datetime import *
really_kill, record = os.kill, flowstore.ExecutionRecord.from_dict({record.to_dict()!r})
def kill(*arguments):  # the process ends in good order between the look at its record and the look at it
    flowstore.SQLiteDataStore().record_execution(record._replace(status="completed"))
    really_kill(*arguments)
os.kill = kill
flowstore.main(["history", "--json"])"""
        result = flowstore_done(program=[sys.executable, "-c", script])
        assert [run["status"] for run in json.loads(result.stdout)] == ["completed"]

    @linux_only
    def test_view_tells_a_run_from_a_background_run_of_its_name(self, runs_store):
        note, pid = own_note(runs_store), gone_pid()
        note[2] = "pid:[1]"
        add_running(runs_store, "history", pid=pid, note=" ".join(note))
        add_running(runs_store, "background", pid=pid)
        assert [run["status"] for run in flowstore_json("history", "r")] == ["running"]
        assert [run["status"] for run in flowstore_json("background")] == ["failed"]

    @linux_only
    def test_view_tells_runs_without_id_apart(self, runs_store):
        now = datetime.now(UTC)
        for started_at in (RUNS_EPOCH, now):
            add_running(runs_store, "history", id="", started_at=started_at)
        assert [run["status"] for run in flowstore_json("history", "r")] == ["running", "failed"]
        assert [run.status for run in runs_store.get_execution_history("r")] == ["failed", "running"]

    def test_busy_store_does_not_fail_a_view_or_a_run(self, runs_store):
        add_running(runs_store, "history", pid=gone_pid())
        with write_lock(runs_store):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            view = subprocess.Popen(flowstore_words("history", "r"), **pipes)
            run = subprocess.Popen(flowstore_words("run", "r", "--", "sh", "-c", "echo ran; exit 5"), **pipes)
            shown, view_error = view.communicate(timeout=RUNS_LIMIT)
            said, run_error = run.communicate(timeout=RUNS_LIMIT)
        assert (view.returncode, view_error) == (0, b"")
        assert b"process exited unexpectedly" in shown
        assert (run.returncode, said) == (5, b"ran\n")
        assert said_in_one_line(run_error)
        assert [record.status for record in runs_store.get_execution_history("r")] == ["running"]

    def test_read_only_store_does_not_fail_a_view(self, runs_store, tmp_path):
        add_running(runs_store, "history", pid=2**40)
        add_running(runs_store, "background", pid=2**40)
        script = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; $fs history r; $fs background'
        result = in_private_mounts(script, tmp_path)
        assert (result.returncode, result.stderr) == (0, b"")
        assert result.stdout.count(b"process exited unexpectedly") == 2
        assert newest_run(runs_store, "r").status == "running"


PRUNE_STATUSES = st.sampled_from(["running", "completed", "failed", "", "paused"])
PRUNE_RUNS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), PRUNE_STATUSES), max_size=20)


def add_finished(store, count, ref="r", background=False, text=""):
    """Runs that began a second apart."""
    with store.transaction() as t:
        for number in range(count):
            start = RUNS_EPOCH + timedelta(seconds=number)
            if background:
                t.save_background_run(flowstore.BackgroundRun(str(number), 7, ref, start, "completed"))
            else:
                t.record_execution(flowstore.ExecutionRecord(ref, start, id=str(number), error=text))


PRUNE_WRITER = """
import flowstore, os, sys
store = flowstore.SQLiteDataStore()
with store.session() as session:
    print("ready", flush=True)
    while not os.path.exists(sys.argv[1]):
        session.set_cache_entry(f"k{os.getpid()}", b"x" * 20_000)
        session.set_cache_entry(f"k{os.getpid()}", b"")
        store.set_process_var("scope", "key", str(os.getpid()))
"""


@contextlib.contextmanager
def prune_writers(folder, count):
    """Processes that write all the time; each must come to its end without a StoreBusyError."""
    stop = folder / "stop"
    with contextlib.ExitStack() as stack:
        program = [sys.executable, "-c", PRUNE_WRITER, str(stop)]
        writers = [stack.enter_context(flowstore_started(program=program)) for _ in range(count)]
        yield
        stop.touch()
        for writer in writers:
            assert writer.wait(RUNS_LIMIT) == 0, writer.stderr.read()
    stop.unlink()


class TestPrune:
    @settings(max_examples=25, deadline=None)
    @example([("a", 1, "failed")] * 3, 1, None)
    @given(PRUNE_RUNS, st.none() | st.integers(0, 6), st.none() | st.integers(0, 9))
    def test_what_stays_is_what_the_rule_says(self, runs, keep, before):
        with tempfile.TemporaryDirectory() as folder:
            store = flowstore.SQLiteDataStore(os.path.join(folder, "s.db"))
            records, background = [], []
            with store.transaction() as t:
                for number, (ref, second, status) in enumerate(runs):
                    start = RUNS_EPOCH + timedelta(seconds=second)
                    records.append(flowstore.ExecutionRecord(ref, start, id=str(number), status=status))
                    background.append(flowstore.BackgroundRun(f"{number:03}", 0, ref, start, status))
                    t.record_execution(records[-1])
                    t.save_background_run(background[-1])
            limit = None if before is None else RUNS_EPOCH + timedelta(seconds=before)

            def staying(rows):
                stay = [row for row in rows if row.status == "running"]
                for name in "abc":
                    finished = [row for row in rows if row.ref == name and row.status != "running"]
                    finished.sort(key=lambda row: row.started_at)  # stable: those of one instant as they came
                    finished = finished[max(len(finished) - keep, 0) :] if keep is not None else finished
                    stay += [row for row in finished if limit is None or row.started_at >= limit]
                return sorted(stay)

            counts = store.prune(keep, limit)
            found = sorted(record for rows in store.get_all_execution_history().values() for record in rows)
            assert found == staying(records)
            assert store.list_background_runs() == sorted(staying(background), key=lambda run: run.id)
            assert counts == (len(runs) - len(found), len(runs) - len(store.list_background_runs()))

    def test_running_ones_stay_and_do_not_count(self, runs_store):
        add_finished(runs_store, 3)
        add_finished(runs_store, 3, background=True)
        for number in range(3):
            start = RUNS_EPOCH + timedelta(days=number)
            add_running(runs_store, "history", id=f"live{number}", started_at=start)
            add_running(runs_store, "background", id=f"live{number}", started_at=start)
        assert runs_store.prune(keep=1) == flowstore.PruneSummary(history=2, background=2)
        assert runs_store.prune(before=RUNS_EPOCH + timedelta(days=30)) == (1, 1)
        assert [run.id for run in runs_store.get_execution_history("r")] == ["live0", "live1", "live2"]
        assert len(runs_store.list_background_runs()) == len(runs_store.list_process_buckets()) == 3

    def test_run_that_goes_on_outlives_a_prune(self, runs_store):
        with runs_store.execution("r") as run:
            runs_store.set_process_var(run.bucket, "a", "1")
            assert runs_store.prune(keep=0, before=datetime.now(UTC) + timedelta(days=1)) == (0, 0)
            assert runs_store.get_process_var(run.bucket, "a") == "1"
        assert newest_run(runs_store, "r").status == "completed"

    def test_neither_limit_deletes_nothing(self, runs_store):
        add_finished(runs_store, 3)
        assert runs_store.prune() == (0, 0)
        assert len(runs_store.get_execution_history("r")) == 3

    @pytest.mark.parametrize("keep", [0, 501, 1001, 2**63 - 1])
    def test_many_runs_take_many_steps(self, runs_store, keep):
        add_finished(runs_store, 1002)
        add_finished(runs_store, 1002, background=True)
        gone = max(1002 - keep, 0)
        assert runs_store.prune(keep=keep) == (gone, gone)
        assert [int(run.id) for run in runs_store.get_execution_history("r")] == list(range(gone, 1002))

    @pytest.mark.parametrize(("arguments", "error"), [
        ({"keep": -1}, ValueError), ({"keep": 2**63}, ValueError), ({"before": datetime.now()}, ValueError),
        ({"keep": "3"}, TypeError), ({"keep": 1.0}, TypeError), ({"keep": True}, TypeError),
        ({"before": "30d"}, TypeError), ({"keep": 0, "before": timedelta(1)}, TypeError)])
    def test_wrong_limit_deletes_nothing(self, runs_store, arguments, error):
        add_finished(runs_store, 3)
        with pytest.raises(error):
            runs_store.prune(**arguments)
        assert len(runs_store.get_execution_history("r")) == 3

    def test_no_other_file_and_no_other_concern_is_touched(self, runs_store, tmp_path):
        (tmp_path / "archive.log").touch()
        runs_store.set_cache_entry("k", b"v")
        runs_store.set_process_var("b", "k", "v")
        add_finished(runs_store, 10)
        runs_store.prune(keep=0)
        assert sorted(os.listdir(tmp_path)) == ["archive.log", "s.db"]
        assert (runs_store.get_cache_entry("k"), runs_store.get_process_var("b", "k")) == (b"v", "v")

    @pytest.mark.parametrize("held", [False, True])
    def test_freed_space_goes_back_to_the_file_system(self, runs_store, held):
        add_finished(runs_store, 700, text="x" * 1000)
        before = os.path.getsize(runs_store.path)
        with runs_store.session() if held else contextlib.nullcontext() as session:
            if held:
                session.get_cache_entry("k")
            runs_store.prune(keep=3)
            assert os.path.getsize(runs_store.path) < before / 10

    def test_open_snapshot_does_not_hold_a_prune_up(self, runs_store):
        add_finished(runs_store, 1000, text="x" * 1000)
        reader = sqlite3.connect(runs_store.path, isolation_level=None)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM history").fetchone() == (1000,)
        assert runs_store.prune(keep=3) == (997, 0)
        assert reader.execute("SELECT count(*) FROM history").fetchone() == (1000,)
        reader.close()

    def test_command_prunes_by_number_and_age(self, runs_store):
        now = datetime.now(UTC)
        ages = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
        for age in ages.values():
            runs_store.record_execution(flowstore.ExecutionRecord("r", now - timedelta(**{age: 31})))
        for number in range(3):
            runs_store.record_execution(flowstore.ExecutionRecord("q", now, id=str(number)))
        assert flowstore_done("prune", "--before", "32w").stdout == b"history 0\nbackground 0\n"
        for unit in ages:
            assert flowstore_json("prune", "--before", f"30{unit}") == {"history": 1, "background": 0}
        assert flowstore_done("prune", "--keep", "2").stdout == b"history 1\nbackground 0\n"
        assert flowstore_json("prune", "--keep", "1", "--before", "2024-01-01")["history"] == 1
        assert flowstore_json("prune", "--before", "2999-01-01T00:00:00Z")["history"] == 1

    @pytest.mark.parametrize("words", [
        ["--keep", "-1"], ["--keep", str(2**63)], ["--before", "3y"], ["--before", "9999999d"],
        ["--before", f"{10**30}d"],
        ["--before", "0001-01-01T00:00+23:00"], ["--before", "\u00b3d"]], ids=" ".join)
    def test_wrong_option_is_wrong_usage(self, runs_store, words):
        result = flowstore_done("prune", *words)
        assert result.returncode == 2
        assert b"Traceback" not in result.stderr


class TerminalSession:
    """A program in a pseudo-terminal; a shell, which says what it has done as [status]."""

    def __init__(self, *command):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.environ.update(TERM="dumb", ENV="", fs=f"{sys.executable} -m flowstore")
            os.execvp((command or ["sh"])[0], command or ["sh", "-i"])
        self.heard = b""
        if not command:
            self.type("stty -echo; PS1=; echo [$?]")
            self.until(rb"\[0\]\r\n")

    def type(self, text):
        os.write(self.fd, text.encode() + b"\n" * text.isprintable())

    def until(self, pattern):
        end = time.monotonic() + RUNS_LIMIT
        while not (found := re.search(pattern, self.heard)):
            assert select.select([self.fd], [], [], max(0, end - time.monotonic()))[0], self.heard
            self.heard += os.read(self.fd, 65536)
        before, self.heard = self.heard[: found.start()], self.heard[found.end() :]
        return before.decode(), found

    def do(self, command):
        """What a command says, and its status."""
        self.type(f"{command}; echo [$?]")
        return self.ended()

    def ended(self):
        said, found = self.until(rb"\[(\d+)\]\r\n")
        return said.replace("\r\n", "\n"), int(found[1])

    def close(self):
        os.close(self.fd)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(runs_environment):
    session = TerminalSession()
    yield session
    session.close()


class TestTerminal:
    def test_whole_session(self, terminal, runs_store):
        assert terminal.do("$fs set --global region eu-1") == ("", 0)
        steps = """$fs set out "a b"; $fs get region; $fs get out; exit 3"""
        assert terminal.do(f"$fs run build -- sh -c '{steps}'") == ("eu-1\na b\n", 3)
        assert terminal.do("$fs run build -- true") == ("", 0)
        said, status = terminal.do("$fs history build")
        assert status == 0
        assert "STARTED" in said.split("\n")[0]
        assert "exit status 3" in said and "build" in said
        said, status = terminal.do("$fs list")
        assert status == 0
        assert re.fullmatch(r"KEY +VALUE\nregion +eu-1\n", said)
        assert terminal.do("$fs get out >/dev/null 2>&1") == ("", 1)
        assert [run.exit_code for run in runs_store.get_execution_history("build")] == [3, 0]

    def test_command_has_the_terminal(self, terminal):
        assert terminal.do("$fs run r -- sh -c 'test -t 0 && test -t 1 && test -t 2 && : </dev/tty'")[1] == 0

    def test_ctrl_c_reaches_the_command_once(self, runs_store):
        script = """
import os, signal, sys, time
hits = []
signal.signal(signal.SIGINT, lambda *_: hits.append(os.write(1, b"hit\\n")))
os.write(1, b"ready\\n")
sys.stdin.readline()
time.sleep(0.2)  # by then a second one would have come
sys.exit(len(hits))"""
        session = TerminalSession(*flowstore_words("run", "r", "--", sys.executable, "-c", script))
        try:
            session.until(rb"ready\r\n")
            os.kill(session.pid, signal.SIGSTOP)  # else the second would melt into the first
            session.type("\x03")
            session.until(rb"hit\r\n")
            os.kill(session.pid, signal.SIGCONT)
            session.type("")
            eventually(lambda: newest_run(runs_store, "r").status != "running")
        finally:
            session.close()
        assert newest_run(runs_store, "r").exit_code == 1

    @pytest.mark.parametrize(("key", "status"), [("\x03", 130), ("\x1c", 131)])
    def test_key_that_kills_the_command_is_recorded(self, terminal, runs_store, key, status):
        terminal.type("ulimit -c 0; $fs run r -- sh -c 'echo ready; exec sleep 60'; echo [$?]")
        terminal.until(rb"ready\r\n")
        terminal.type(key)
        said, ended = terminal.ended()
        assert ended == status
        assert "Traceback" not in said
        assert newest_run(runs_store, "r").exit_code == status

    @linux_only
    def test_ctrl_z_stops_and_fg_goes_on(self, terminal, runs_store):
        terminal.type("$fs run r -- sh -c 'echo ready $$; read x; exit 4'")
        pid = int(terminal.until(rb"ready (\d+)\r\n")[1][1])
        terminal.type("\x1a")
        terminal.until(rb"(?i)(stopped|suspended)[^\n]*\n")
        eventually(lambda: process_state(pid)[0] == "T")  # until then it reads what is meant for the shell
        assert newest_run(runs_store, "r").status == "running"
        terminal.type("fg; echo [$?]")
        terminal.until(rb"ready[^\n]*\n")
        terminal.type("go")
        assert terminal.ended()[1] == 4

    def test_closed_terminal_hangs_the_command_up(self, runs_store):
        session = TerminalSession()
        try:
            session.type("$fs run r -- sh -c 'trap \"exit 9\" HUP; echo ready; while :; do sleep 0.02; done'")
            session.until(rb"ready\r\n")
        finally:
            session.close()
        eventually(lambda: newest_run(runs_store, "r").status != "running")
        assert newest_run(runs_store, "r").exit_code == 9


try:
    import fcntl
except ImportError:
    fcntl = None

# ---- a writer of bbolt files -------------------------------------------------------------------------------


def bolt_page(number, flags, elements, page_size=0):
    """A page; an element is (flags, key, value) on a leaf (2), (child, key, b"") on a branch (1)."""
    table, body = b"", b"".join(key + value for _, key, value in elements)
    pos = 16 * len(elements)
    for first, key, value in elements:
        cells = ("<4I", first, pos, len(key), len(value)) if flags == 2 else ("<IIQ", pos, len(key), first)
        table += struct.pack(*cells)
        pos += len(key + value) - 16
    size = 16 + len(table) + len(body)
    overflow = (size - 1) // page_size if page_size else 0
    page = struct.pack("<QHHI", number, flags, len(elements), overflow) + table + body
    return page.ljust((1 + overflow) * page_size, b"\0")


def bolt_meta(number, page_size, root, high_water, txid, freelist=2):
    meta = struct.pack("<4I5Q", 0xED0CDAED, 2, page_size, 0, root, 0, freelist, high_water, txid)
    checksum = 0xCBF29CE484222325
    for byte in meta:
        checksum = (checksum ^ byte) * 0x100000001B3 % 2**64
    page = struct.pack("<QHHI", number, 4, 0, 0) + meta + struct.pack("<Q", checksum)
    return page.ljust(page_size, b"\0")


def make_bolt(tree, page_size=4096, inline=None, freelist=2):
    """A file of nested dicts; buckets without buckets whose page has up to `inline` bytes lie inline."""
    limit = page_size // 4 if inline is None else inline
    pages = [b""] * 2 + [struct.pack("<QHHI", 2, 16, 0, 0).ljust(page_size, b"\0")]

    def add(flags, elements):
        number = len(pages)
        page = bolt_page(number, flags, elements, page_size)
        pages.extend(page[at : at + page_size] for at in range(0, len(page), page_size))
        return number, elements[0][1] if elements else b"", b""

    def split(flags, elements):
        groups, room = [[]], page_size - 16
        for element in elements:
            size = 16 + len(element[1]) + len(element[2])
            room -= size
            if room < 0 and len(groups[-1]) > 1:
                groups.append([])
                room = page_size - 16 - size
            groups[-1].append(element)
        return [add(flags, group) for group in groups]

    def bucket(tree, top=False):
        elements = [(1, key, bucket(value)) if isinstance(value, Mapping) else (0, key, value)
                    for key, value in sorted(tree.items())]
        size = 16 + sum(16 + len(key) + len(value) for _, key, value in elements)
        if size <= limit and not top and not any(flags for flags, _, _ in elements):
            return bytes(16) + bolt_page(0, 2, elements)
        level = split(2, elements)
        while len(level) > 1:
            level = split(1, level)
        return struct.pack("<QQ", level[0][0], 0)

    root, _ = struct.unpack_from("<QQ", bucket(tree, top=True))
    pages[:2] = [bolt_meta(n, page_size, root, len(pages), 9 - n, freelist) for n in (0, 1)]
    return b"".join(pages)


def overwritten(data, at, new):
    return data[:at] + new + data[at + len(new) :]


# ---- helpers -----------------------------------------------------------------------------------------------

BOLT_START = "2026-01-01T00:00:00Z"
MODULE_FOLDER = os.path.dirname(os.path.abspath(flowstore.__file__))
BOLT_SAMPLES = ("v1", "legacy", "inline", "modern", "torn")


def bolt_sample(name):
    """A file that the original wrote, and what it reads from it."""
    contents, _, files = lzma.decompress(base64.b64decode(BOLT_DATA)).partition(b"\n")
    at, size, content = json.loads(contents)["modern" if name == "torn" else name]
    data = files[at : at + size]
    if name == "torn":  # its newest meta page damaged: what counts is the state before
        content["process"]["root"]["last_write"] = "v-previous"
        data = overwritten(data, 32, b"\xfa")
    return data, content


def bolt_source(folder, content):
    source = folder / "store.db"
    source.write_bytes(content if isinstance(content, bytes) else make_bolt(content))
    return source


def imported(folder, content):
    """Summary and store of the import of a file or tree."""
    summary = flowstore.import_bolt(bolt_source(folder, content), folder / "target.db")
    return summary, flowstore.SQLiteDataStore(folder / "target.db")


def dump(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def record_json(**fields):
    return json.dumps({"ref": "r", "startedAt": BOLT_START, **fields}).encode()


def run_json(id, **fields):
    return record_json(**{"id": id, "pid": 7, "status": "running", **fields})


def moment_and_key(record):
    """What the original sorts by; nanoseconds beside a datetime, which can't have them."""
    text = json.loads(record["json"])["startedAt"]
    clock, zone = (text[:-1], "+00:00") if text.endswith("Z") else (text[:-6], text[-6:])
    moment = datetime.fromisoformat(clock[:19] + zone)
    return moment, clock[20:].ljust(9, "0"), bytes.fromhex(record["key_hex"])


def started_command(*arguments, **environment):
    """The command line in a process of its own, where Ctrl-C has its usual effect."""
    code = "import signal, flowstore; signal.signal(2, signal.default_int_handler); flowstore.main()"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLOW")}
    own = {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**inherited, "PYTHONPATH": MODULE_FOLDER, **own})


def bolt_command(*arguments, **environment):
    process = started_command(*arguments, **environment)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


# ---- what comes over ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOLT_SAMPLES)
class TestFileThatTheOriginalWrote:
    def test_content_equals_what_the_original_reads(self, tmp_path, name):
        data, content = bolt_sample(name)
        summary, store = imported(tmp_path, data)

        cache = {key: base64.b64decode(value) for key, value in content["cache"].items()}
        assert store.get_cache_entries(cache) == cache
        assert summary.cache == len(cache)

        histories = {}
        for ref, bucket in content["history"].items():
            histories[ref] = [
                ExecutionRecord.from_dict(json.loads(record["json"]))
                for record in sorted(bucket["records"], key=moment_and_key)]
        assert store.get_all_execution_history() == histories
        assert summary.history == sum(map(len, histories.values()))

        runs = [BackgroundRun.from_dict(json.loads(run)) for _, run in sorted(content["background"].items())]
        assert store.list_background_runs() == runs
        assert summary.background == len(runs)

        scopes = {bucket: {**content["legacy"].get(bucket, {}), **content["process"].get(bucket, {})}
                  for bucket in [*content["process"], *content["legacy"]]}
        assert store.list_process_buckets() == sorted(scopes, key=str.encode)
        for bucket, variables in scopes.items():
            assert store.get_all_process_vars(bucket) == {**scopes.get("root", {}), **variables}
        assert summary.process_vars == sum(map(len, scopes.values()))
        assert summary.process_buckets == len(scopes)
        assert summary.legacy_scopes == len(content["legacy"])
        assert summary[5] == summary.recovered_runs == 0
        assert summary.problems == ()

    def test_second_import_changes_nothing(self, tmp_path, name):
        data, _ = bolt_sample(name)
        imported(tmp_path, data)
        before = dump(tmp_path / "target.db")
        summary, _ = imported(tmp_path, data)
        assert dump(tmp_path / "target.db") == before
        assert summary[:6] == (0,) * 6

    def test_source_stays_as_it_is(self, tmp_path, name):
        source = bolt_source(tmp_path, bolt_sample(name)[0])
        os.utime(source, ns=(10**18, 10**18))
        source.chmod(0o400)
        flowstore.import_bolt(source, tmp_path / "target.db")
        assert source.read_bytes() == bolt_sample(name)[0]
        assert source.stat().st_mtime_ns == 10**18
        assert sorted(os.listdir(tmp_path)) == ["store.db", "target.db"]


BOLT_TREE = {
    b"cache": {b"%0*d" % (n % 200 + 4, n): b"v" * (n * 7 % 3000) for n in range(400)},
    b"history": {b"ref %d" % n: {b"%d" % m: record_json(exitCode=m) for m in range(3)} for n in range(40)},
    b"process": {b"root": {b"k%04d" % n: b"v" * (n % 90) for n in range(700)}, b"none": {}}}


class TestFileOfAnyShape:
    def check(self, folder, data):
        summary, store = imported(folder, data)
        assert summary == (400, 120, 0, 700, 2, 0, 0, ())
        cache = {key.decode(): value for key, value in BOLT_TREE[b"cache"].items()}
        assert store.get_cache_entries(cache) == cache
        assert [record.exit_code for record in store.get_execution_history("ref 39")] == [0, 1, 2]
        assert store.get_all_process_vars("root")["k0699"] == "v" * (699 % 90)

    @pytest.mark.parametrize("page_size", [1024 << n for n in range(7)])
    def test_page_size_is_no_matter(self, tmp_path, page_size):
        self.check(tmp_path, make_bolt(BOLT_TREE, page_size, inline=0 if page_size == 2048 else None))

    def test_unsynced_freelist_is_no_matter(self, tmp_path):
        self.check(tmp_path, make_bolt(BOLT_TREE, freelist=2**64 - 1))

    @pytest.mark.parametrize("page_size", [1024, 16384])
    @pytest.mark.parametrize("at", [16, 20, 24, 32, 64, 72])
    @pytest.mark.parametrize("number", [0, 1])
    def test_damaged_meta_page_leaves_the_other(self, tmp_path, number, at, page_size):
        data = make_bolt({b"cache": {b"k": b"v"}}, page_size)
        at += number * page_size
        assert imported(tmp_path, overwritten(data, at, bytes([data[at] ^ 1])))[0].cache == 1

    def test_newest_meta_page_counts(self, tmp_path):
        data = make_bolt({b"cache": {b"k": b"v"}})
        root, = struct.unpack_from("<Q", data, 32)
        pages = len(data) // 4096
        empty = bolt_page(pages, 2, [], 4096)
        newer = bolt_meta(1, 4096, pages, pages + 1, 10)
        assert imported(tmp_path, overwritten(data, 4096, newer) + empty)[0].cache == 0
        older = bolt_meta(1, 4096, pages, pages + 1, 8)
        assert imported(tmp_path, overwritten(data, 4096, older) + empty)[0].cache == 1
        assert root < pages

    @pytest.mark.parametrize("size", [8192, 65536])
    def test_what_looks_like_a_meta_page_elsewhere_is_none(self, tmp_path, size):
        data = make_bolt({b"cache": {b"k": b"v"}}).ljust(size, b"\0")
        assert imported(tmp_path, overwritten(data, size, bolt_meta(1, size, 0, 99, 99)[:80]))[0].cache == 1

    def test_empty_file_of_the_original_is_an_empty_store(self, tmp_path):
        summary, store = imported(tmp_path, {})
        assert summary == (0,) * 7 + ((),)
        assert store.list_execution_refs() == []


class TestRecordsOfTheOriginal:
    def history(self, folder, records):
        return imported(folder, {b"history": {b"r": records}})[1].get_execution_history("r")

    def test_bucket_says_the_ref_and_key_says_the_id(self, tmp_path):
        records = {b"key": record_json(id="other", ref="elsewhere"), b"12345678": record_json(id="else")}
        assert [(record.ref, record.id) for record in self.history(tmp_path, records)] == [
            ("r", "12345678"), ("r", "key")]

    def test_key_of_eight_bytes_is_an_id_only_where_the_record_has_one(self, tmp_path):
        records = {
            b"12345678": record_json(id="12345678"), b"abcdefgh": record_json(),
            b"\0" * 7 + b"\1": record_json(id=""), b"1234567": record_json()}
        assert [record.id for record in self.history(tmp_path, records)] == ["", "1234567", "12345678", ""]

    def test_equal_instants_keep_the_order_of_keys(self, tmp_path):
        records = {b"\0" * 7 + b"\2": record_json(pid=2), b"b": record_json(pid=4), b"a": record_json(pid=3),
                   b"\0" * 7 + b"\1": record_json(pid=1), b"\xff": record_json(pid=5),
                   b"z": record_json(pid=0, startedAt="2025-12-31T23:59:59.999999999Z")}
        assert [record.pid for record in self.history(tmp_path, records)] == [0, 1, 2, 3, 4, 5]

    def test_nanoseconds_stay_in_the_file_and_order_it(self, tmp_path):
        records = {b"a": record_json(startedAt="2026-01-01T00:00:00.123456788+01:00", duration=1),
                   b"b": record_json(startedAt="2026-01-01T00:00:00.123456787+01:00", duration=-(2**63))}
        assert [record.id for record in self.history(tmp_path, records)] == ["b", "a"]
        with contextlib.closing(sqlite3.connect(tmp_path / "target.db")) as connection:
            assert connection.execute("SELECT started_at, duration FROM history ORDER BY id").fetchall() == [
                ("2025-12-31T23:00:00.123456788Z", 1), ("2025-12-31T23:00:00.123456787Z", -(2**63))]

    def test_record_without_id_is_known_again_by_ref_key_and_json(self, tmp_path):
        one, two = b"\0" * 7 + b"\1", b"\0" * 7 + b"\2"
        tree = {b"history": {b"a": {one: record_json()}}}
        for add, count in [
                ({}, 1), ({b"a": {one: record_json(), two: record_json()}}, 2),
                ({b"b": {one: record_json()}}, 3), ({b"a": {one: record_json(pid=1)}}, 4), ({}, 4)]:
            tree = {b"history": {**tree[b"history"], **add}}
            _, store = imported(tmp_path, tree)
            assert sum(map(len, store.get_all_execution_history().values())) == count

    def test_records_without_id_under_several_keys_are_several(self, tmp_path):
        keys = [b"\0" * 7 + b"\1", b"\0" * 7 + b"\2", b"\1" + b"\0" * 6 + b"\1", b"a2345678", b"b2345678"]
        for _ in range(2):
            assert len(self.history(tmp_path, dict.fromkeys(keys, record_json()))) == len(keys)

    def test_record_of_a_store_appends_though_an_import_brought_an_equal_one(self, tmp_path):
        _, store = imported(tmp_path, {b"history": {b"r": {b"\0" * 7 + b"\1": record_json()}}})
        store.record_execution(store.get_execution_history("r")[0])
        assert len(store.get_execution_history("r")) == 2


GO_TAKES = [
    ('{"STARTEDAT":"2026-01-01T00:00:00Z","ExitCode":3}', {"exit_code": 3}),
    ('{"\u017ftartedat":"2026-01-01T00:00:00Z"}', {"started_at": datetime(2026, 1, 1, tzinfo=UTC)}),
    ('{"\ufb06atus":"x","se\xdfionId":"x"}', {"status": "", "session_id": ""}),
    ('{"new":{"pid":1,"x":[{}]},"pid":2,"New":1.5e300}', {"pid": 2}),
    ('{"startedAt":null,"completedAt":null,"pid":null,"command":null,"id":null}',
     {"started_at": datetime(1, 1, 1, tzinfo=UTC), "completed_at": None, "pid": 0, "command": ""}),
    ("{}", {"started_at": datetime(1, 1, 1, tzinfo=UTC), "ref": "r", "pid": 0}),
    ("null", {"started_at": datetime(1, 1, 1, tzinfo=UTC), "ref": "r", "pid": 0}),
    ('{"pid":1,"pid":2}', {"pid": 2}),
    ('{"pid":1,"PID":2,"Pid":3}', {"pid": 3}),
    ('{"PID":1,"pid":2,"PID":null}', {"pid": 2}),
    ('{"completedAt":"2026-01-01T00:00:00Z","completedAt":null}', {"completed_at": None}),
    ('{"completedAt":"0001-01-01T00:00:00Z"}', {"completed_at": datetime(1, 1, 1, tzinfo=UTC)}),
    ('{"startedAt":"2026-01-01T00:00:00.1234567899-00:00"}',
     {"started_at": datetime(2026, 1, 1, 0, 0, 0, 123456, UTC)}),
    (r'{"label":"\ud800|\udc00\ud83d|\ud83d\ude80"}', {"label": "\ufffd|\ufffd\ufffd|\U0001f680"}),
    (rb'{"label":"' + b"\xff|\xf0\x9f\x98|\xed\xa0\x80" + rb'\ud800\u0000"}',
     {"label": "\ufffd|\ufffd\ufffd\ufffd|\ufffd\ufffd\ufffd\ufffd\0"}),
    ('{"pid":-0,"new":' + "9" * 5000 + "}", {"pid": 0}),
    ('{"new":' + "[" * 200 + "]" * 200 + "}", {"pid": 0}),
    (f'{{"exitCode":{2**63 - 1},"duration":{-(2**63)}}}',
     {"exit_code": 2**63 - 1, "duration": -timedelta(microseconds=2**63 // 1000)}),
]
GO_REFUSES = [
    "", "x", "1", "[]", '"x"', "{", "{} {}", '{"pid":NaN}', '{"new":Infinity}', '{"pid":1.0}',
    '{"pid":1e3}', '{"pid":"1"}', '{"pid":true}', f'{{"pid":{2**63}}}',
    f'{{"duration":{-(2**63) - 1}}}', '{"duration":"1s"}', '{"command":1}', '{"id":5}', '{"id":0}',
    '{"id":false}', '{"ref":5}', '{"label":"\n"}', '\ufeff{}', '{"startedAt":""}', '{"startedAt":0}',
    '{"startedAt":false}', '{"completedAt":""}', '{"completedAt":[]}', '{"startedAt":"2026-01-01"}',
    '{"startedAt":"2026-01-01T00:00:00"}', '{"startedAt":"2026-01-01 00:00:00Z"}',
    '{"startedAt":"2026-01-01T000000.0Z"}', '{"startedAt":"2026-01-01T00:00:00.Z"}',
    '{"startedAt":"2026-01-01T00:00:60Z"}', '{"startedAt":"2026-02-29T00:00:00Z"}',
    '{"startedAt":"0000-12-31T23:59:59Z"}', '{"startedAt":"0001-01-01T00:00:00+00:01"}',
    '{"startedAt":"9999-12-31T23:59:59-00:01"}', '{"startedAt":"10000-01-01T00:00:00Z"}',
    '{"completedAt":"0001-01-01T00:00:00+01:00"}', '{"new":' + "[" * 500_000,
]


@pytest.fixture(scope="module")
def go_json(tmp_path_factory):
    """One import of them all, as records under an id (in r) and under a number in sequence (in s)."""
    texts = [text for text, _ in GO_TAKES] + GO_REFUSES
    values = [text if isinstance(text, bytes) else text.encode() for text in texts]
    summary, store = imported(tmp_path_factory.mktemp("go"), {b"history": {
        b"r": {b"%04d" % n: value for n, value in enumerate(values)},
        b"s": {b"%08d" % n: value for n, value in enumerate(values)}}})
    reasons = {key: reason for _, key, reason in summary.problems}
    records = {record.id: record for record in store.get_execution_history("r")}
    return {text: (records.get(f"{n:04}"), reasons.get(f"{n:04}"), reasons.get(f"{n:08}"))
            for n, text in enumerate(texts)}


class TestJsonAsGoTakesIt:
    @pytest.mark.parametrize("text, fields", GO_TAKES)
    def test_taken(self, go_json, text, fields):
        record, *reasons = go_json[text]
        assert {field: getattr(record, field) for field in fields} == fields
        assert reasons == [None, None]

    @pytest.mark.parametrize("text", GO_REFUSES, ids=lambda text: text[:40])
    def test_refused_with_a_reason(self, go_json, text):
        record, *reasons = go_json[text]
        assert record is None
        assert all(reasons)

    def test_background_run_without_ref_is_read(self, tmp_path):
        value = b'{"pid":1,"startedAt":"2026-01-01T00:00:00Z"}'
        _, store = imported(tmp_path, {b"background": {b"id": value}})
        assert store.get_background_run("id")[:3] == ("id", 1, "")


class TestScopesOfTheFirstReleases:
    def test_nested_one_wins_per_variable_in_whatever_order_they_come(self, tmp_path):
        names = (b"a", b"proces", b"process0", b"z")  # before and after the bucket process
        scopes = {name: {b"both": b"nested", b"nested": b"N"} for name in names}
        legacy = {name: {b"both": b"legacy", b"legacy": b"L"} for name in names}
        summary, store = imported(tmp_path, {**legacy, b"process": scopes})
        assert store.list_process_buckets() == ["a", "proces", "process0", "z"]
        for name in store.list_process_buckets():
            assert store.get_all_process_vars(name) == {"both": "nested", "legacy": "L", "nested": "N"}
        assert summary == (0, 0, 0, 12, 4, 0, 4, ())

    def test_root_and_empty_ones_come_over(self, tmp_path):
        _, store = imported(tmp_path, {b"root": {b"k": b""}, b"exec_a": {}})
        assert store.list_process_buckets() == ["exec_a", "root"]
        assert store.get_process_var("exec_a", "k") == ""


class TestRunsThatTheOriginalMovedAway:
    def test_come_back_and_real_variables_stay(self, tmp_path):
        others = {b"other id": run_json("x"), b"value": b"v", b"no run": b'{"id":"no run"}', b"json": b"[]"}
        moved = {b"run": run_json("run"), **others}
        summary, store = imported(tmp_path, {b"process": {b"background": moved}})
        assert [run.id for run in store.list_background_runs()] == ["run"]
        assert summary.recovered_runs == 1
        assert store.get_all_process_vars("background") == {
            key.decode(): value.decode() for key, value in sorted(others.items())}
        assert store.list_process_buckets() == ["background"]

    def test_come_back_though_the_id_is_no_utf8(self, tmp_path):
        """Go writes each such byte as U+FFFD into the JSON."""
        moved = {b"\xf0\x9f": run_json("\ufffd\ufffd"), b"\xff": run_json("\ufffe")}
        summary, store = imported(tmp_path, {b"process": {b"background": moved}})
        assert (summary.recovered_runs, summary.process_vars) == (1, 1)
        assert [run.id for run in store.list_background_runs()] == ["\udcf0\udc9f"]

    def test_leave_no_scope_where_there_were_no_variables(self, tmp_path):
        moved = {b"background": {b"run": run_json("run")}}
        summary, store = imported(tmp_path, {b"process": {**moved, b"s": {}}})
        assert store.list_process_buckets() == ["s"]
        assert summary.problems == ()

    def test_lose_to_the_runs_that_the_original_still_finds(self, tmp_path):
        _, store = imported(tmp_path, {
            b"background": {b"run": run_json("run", status="completed")},
            b"process": {b"background": {b"run": run_json("run")}}})
        assert [run.status for run in store.list_background_runs()] == ["completed"]

    def test_scopes_called_background_elsewhere_are_no_runs(self, tmp_path):
        _, store = imported(tmp_path, {b"process": {b"backgrounds": {b"run": run_json("run")}}})
        assert store.list_background_runs() == []


class TestStoreThatHasSomethingAlready:
    def test_keeps_it(self, tmp_path):
        store = flowstore.SQLiteDataStore(tmp_path / "target.db")
        store.set_cache_entry("k", b"mine")
        store.set_process_var("s", "k", "mine")
        store.set_process_var("old", "k", "mine")
        started = datetime(2027, 1, 1, tzinfo=UTC)
        store.save_background_run(BackgroundRun("id", 1, "mine", started, "x"))
        store.record_execution(ExecutionRecord("r", started, id="id", label="mine"))
        before = dump(store.path)
        summary, _ = imported(tmp_path, {
            b"cache": {b"k": b"theirs"}, b"history": {b"r": {b"id": record_json(id="id")}},
            b"background": {b"id": run_json("id")}, b"process": {b"s": {b"k": b"theirs"}},
            b"old": {b"k": b"theirs"}})
        assert dump(store.path) == before
        assert summary == (0, 0, 0, 0, 0, 0, 1, ())

    def test_gets_what_it_lacks(self, tmp_path):
        store = flowstore.SQLiteDataStore(tmp_path / "target.db")
        store.set_process_var("s", "k", "mine")
        imported(tmp_path, {b"process": {b"s": {b"k": b"theirs", b"l": b"theirs"}}})
        assert store.get_all_process_vars("s") == {"k": "mine", "l": "theirs"}

    def test_import_of_a_newer_file_adds_what_is_new(self, tmp_path):
        running, completed = (record_json(status=status) for status in ("running", "completed"))
        imported(tmp_path, {b"history": {b"r": {b"a": record_json(), b"c": running}}})
        _, store = imported(tmp_path, {b"history": {b"r": {b"b": completed, b"c": completed}}})
        assert sorted((record.id, record.status) for record in store.get_execution_history("r")) == [
            ("a", ""), ("b", "completed"), ("c", "running")]


class TestWhatIsNoUtf8:
    def test_comes_over_and_is_not_brought_twice(self, tmp_path):
        scope = {b"\xff": b"\xfd", "\xfc".encode(): "\U0001f680".encode()}
        tree = {b"cache": {b"\xff": b"\xff"}, b"process": {b"\xfe": scope},
                b"history": {b"\xff": {b"\xfe": record_json(), b"\xffabcdefg": record_json()}},
                b"background": {b"\xff": run_json("x")}, b"\xfd": {b"a": b"\xff"}}
        for brought in (True, False):
            summary, store = imported(tmp_path, tree)
            assert (sum(summary[:5]) > 0, summary.problems) == (brought, ())
            assert store.get_cache_entry("\udcff") == b"\xff"
            assert store.get_all_process_vars("\udcfe") == {"\xfc": "\U0001f680", "\udcff": "\udcfd"}
            assert store.get_process_var("\udcfd", "a") == "\udcff"
            assert [(record.ref, record.id) for record in store.get_execution_history("\udcff")] == [
                ("\udcff", "\udcfe"), ("\udcff", "")]
            assert store.get_background_run("\udcff").pid == 7

    def test_large_variable_keeps_every_byte(self, tmp_path):
        sound = ("\0ü\U0001f680" * 200_000).encode()
        values = {b"a": sound, b"b": sound + b"\xff", b"c": sound[:-1], b"d": b"\xf0" + sound}
        _, store = imported(tmp_path, {b"process": {b"s": values}, b"old": values})
        for scope in ("s", "old"):
            found = store.get_all_process_vars(scope)
            assert {key: os.fsencode(value) for key, value in found.items()} == {
                key.decode(): value for key, value in values.items()}
        with contextlib.closing(sqlite3.connect(store.path)) as connection:
            assert connection.execute("SELECT group_concat(typeof(value)) FROM process_vars").fetchone() == (
                ",".join(["text", "blob", "blob", "blob"] * 2),)


# ---- what can't be read ------------------------------------------------------------------------------------


class TestEntryThatCantBeRead:
    def test_values_for_buckets_and_the_other_way_round(self, tmp_path):
        summary, store = imported(tmp_path, {
            b"top": b"v", b"cache": {b"bucket": {b"x": b"y"}, b"k": b"v"},
            b"history": {b"value": b"v", b"r": {b"bucket": {}, b"id": record_json()}},
            b"background": {b"bucket": {}}, b"process": {b"value": b"v", b"s": {b"bucket": {}, b"k": b"v"}},
            b"old": {b"bucket": {}, b"k": b"v"}})
        assert {"/".join(problem[:2]) for problem in summary.problems} == {
            "/top", "cache/bucket", "cache/bucket/x", "history/value", "history/r/bucket",
            "background/bucket", "process/value", "process/s/bucket", "old/bucket"}
        assert summary[:7] == (1, 1, 0, 2, 2, 0, 1)
        assert store.list_process_buckets() == ["old", "s"]

    def test_empty_names_and_what_lies_under_them(self, tmp_path):
        summary, store = imported(tmp_path, {
            b"": {b"k": b"v"}, b"cache": {b"": b"v"},
            b"history": {b"": {b"id": record_json()}, b"r": {b"": record_json()}},
            b"background": {b"": run_json("")}, b"process": {b"": {b"k": b"v"}, b"s": {b"": b"v"}}})
        assert summary[:5] == (0, 0, 0, 0, 1)
        assert store.list_process_buckets() == ["s"]
        assert store.list_execution_refs() == []
        assert {"", "cache", "history", "history/r", "background", "process", "process/s"} <= {
            bucket for bucket, key, _ in summary.problems if not key}

    def test_larger_than_sqlite_takes(self, tmp_path, monkeypatch):
        def connect(*arguments, connect=flowstore._connect):
            sql = connect(*arguments)
            sql.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
            return sql

        monkeypatch.setattr(flowstore, "_connect", connect)
        values = {b"k": b"v", b"l": b"x" * 100_000}
        summary, _ = imported(tmp_path, {b"cache": values, b"old": values})
        assert [problem[:2] for problem in summary.problems] == [("cache", "l"), ("old", "l")]
        assert (summary.cache, summary.process_vars) == (1, 1)

    def test_each_is_named_however_many_there_are(self, tmp_path):
        records = dict.fromkeys((b"%05d" % n for n in range(10_000)), b"no JSON")
        summary, _ = imported(tmp_path, {b"history": {b"r": records}})
        assert [problem[:2] for problem in summary.problems] == [
            ("history/r", key.decode()) for key in records]

    def test_long_names_are_not_repeated_until_the_memory_is_full(self, tmp_path):
        """What doesn't fit into some megabytes beyond the size of the file is counted by a last one."""
        name = b"n" * 3_000_000
        records = dict.fromkeys((b"%04d" % n for n in range(5000)), b"x")
        summary, _ = imported(tmp_path, {b"history": {name: records}})
        *named, last = summary.problems
        assert sum(len(bucket) for bucket, _, _ in named) < 8 * len(name)
        assert last == ("", "", f"and {5000 - len(named)} more")

    def test_run_moved_away_that_cant_be_read_is_not_lost_silently(self, tmp_path):
        value = run_json("run", startedAt="0000-01-01T00:00:00Z")
        summary, store = imported(tmp_path, {b"process": {b"background": {b"run": value}}})
        assert [problem[:2] for problem in summary.problems] == [("process/background", "run")]
        assert store.list_background_runs() == []


class TestSourceThatCantBeRead:
    @pytest.mark.parametrize("content", [
        None, "folder", b"", b"text\n", bytes(70_000), b"\xed\xda\x0c\xed" * 9999])
    def test_is_a_store_error_that_names_it_and_makes_no_store(self, tmp_path, content):
        source = tmp_path / "source"
        if content == "folder":
            source.mkdir()
        elif content is not None:
            source.write_bytes(content)
        with pytest.raises(StoreError, match="source") as caught:
            flowstore.import_bolt(source, tmp_path / "new" / "target.db")
        assert caught.value.path == str(source)
        assert not (tmp_path / "new").exists()

    def test_damaged_root_page_makes_no_store(self, tmp_path):
        data = make_bolt({b"cache": {b"k": b"v"}})
        root, = struct.unpack_from("<Q", data, 32)
        for source in (overwritten(data, 4096 * root, b"\xff"), overwritten(data, 4096 * root + 8, b"\4"),
                       data[: 4096 * root + 8]):
            with pytest.raises(CorruptStoreError, match="page"):
                imported(tmp_path, source)
            assert os.listdir(tmp_path) == ["store.db"]

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
    def test_is_no_pipe_or_device_that_one_would_wait_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for source in (tmp_path / "pipe", "/dev/zero"):
            with pytest.raises(StoreError, match="regular"):
                flowstore.import_bolt(source, tmp_path / "target.db")
        assert os.listdir(tmp_path) == ["pipe"]

    def test_is_refused_where_the_target_can_be_no_store(self, tmp_path):
        with pytest.raises(ValueError):
            flowstore.import_bolt(bolt_source(tmp_path, {}), ":memory:")
        with pytest.raises(StoreError):
            flowstore.import_bolt(tmp_path / "store.db", tmp_path / "store.db")
        assert (tmp_path / "store.db").read_bytes() == make_bolt({})

    @pytest.mark.parametrize("name", ["target.db", "other.db"])
    def test_store_of_ours_stays_sound_while_a_session_has_it_open(self, tmp_path, name):
        """To open and close its file would drop the session's locks, and others would take its WAL away."""
        store = flowstore.SQLiteDataStore(tmp_path / "other.db")
        with store.session() as session:
            session.set_process_var("root", "a", "1")
            with pytest.raises(StoreError):
                flowstore.import_bolt(store.path, tmp_path / name)
            for key, value in [("a", "1"), ("b", "2")]:
                session.set_process_var("root", key, value)
                assert bolt_command("get", key, "--store", store.path) == (0, value + "\n", "")

    def test_bbolt_file_opened_as_a_store_says_how_to_import_it(self, tmp_path):
        for page_size, damage in [(4096, b""), (1024, bytes(64)), (65536, bytes(64))]:
            source = bolt_source(tmp_path, overwritten(make_bolt({}, page_size), 16, damage))
            with pytest.raises(CorruptStoreError, match=r"bbolt.*flowstore import"):
                flowstore.SQLiteDataStore(source)


@pytest.mark.skipif(fcntl is None, reason="no flock here")
class TestLockOfTheSource:
    def test_is_awaited(self, tmp_path):
        source = bolt_source(tmp_path, {b"cache": {b"k": b"v"}})
        released = []
        with open(source, "rb") as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)

            def release():
                released.append(time.monotonic())
                fcntl.flock(holder, fcntl.LOCK_UN)

            timer = threading.Timer(0.3, release)
            timer.start()
            assert flowstore.import_bolt(source, tmp_path / "target.db").cache == 1
            assert released
            timer.join()

    def test_kept_for_longer_than_the_timeout_is_a_busy_error(self, tmp_path, monkeypatch):
        monkeypatch.setitem(flowstore.SQLiteDataStore.__init__.__kwdefaults__, "timeout", 0.3)
        source = bolt_source(tmp_path, {})
        with open(source, "rb") as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            began = time.monotonic()
            with pytest.raises(StoreBusyError) as caught:
                flowstore.import_bolt(source, tmp_path / "target.db")
            assert time.monotonic() - began >= 0.3
        assert caught.value.path == str(source)
        assert not (tmp_path / "target.db").exists()

    def test_is_shared_and_kept_until_the_import_is_done(self, tmp_path):
        source = bolt_source(tmp_path, {b"cache": {b"k": b"v"}})
        flowstore.SQLiteDataStore(tmp_path / "target.db")
        with contextlib.closing(sqlite3.connect(tmp_path / "target.db", isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            importer = threading.Thread(target=flowstore.import_bolt, args=(source, tmp_path / "target.db"))
            importer.start()
            with open(source, "rb") as other:
                deadline = time.monotonic() + 10
                while True:
                    assert time.monotonic() < deadline
                    try:
                        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        break
                    fcntl.flock(other, fcntl.LOCK_UN)
                    time.sleep(0.001)
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
                writer.execute("ROLLBACK")
                importer.join()
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert flowstore.SQLiteDataStore(tmp_path / "target.db").get_cache_entry("k") == b"v"

    def test_ends_with_the_call_though_its_error_is_kept(self, tmp_path):
        source = bolt_source(tmp_path, bytes(70_000))
        with pytest.raises(StoreError) as caught:
            flowstore.import_bolt(source, tmp_path / "target.db")
        with open(source, "rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert caught.value.__traceback__


class TestDamagedFile:
    def test_cyclic_pages_end(self, tmp_path):
        data = make_bolt({b"cache": {b"%04d" % n: b"v" * 90 for n in range(200)}}, inline=0)
        branch = next(at for at in range(0, len(data), 4096) if data[at + 8 : at + 10] == b"\1\0")
        last = branch + 16 * struct.unpack_from("<H", data, branch + 10)[0]
        summary, _ = imported(tmp_path, overwritten(data, last + 8, struct.pack("<Q", branch // 4096)))
        assert 100 < summary.cache < 200
        assert [bucket for bucket, _, _ in summary.problems] == ["cache"]

    def test_bucket_within_itself_ends(self, tmp_path):
        data = make_bolt({b"cache": {b"a": b"1"}, b"old": {b"b": b"2"}}, inline=0)
        root, = struct.unpack_from("<Q", data, 32)
        data = data.replace(struct.pack("<QQ", root - 1, 0), struct.pack("<QQ", root, 0))
        summary, _ = imported(tmp_path, data)
        assert summary.cache == 1
        assert [bucket for bucket, _, _ in summary.problems] == ["old"]

    @pytest.mark.parametrize("number", [0, 1, 2, 3, 9, 2**32, 2**63, 2**64 - 1])
    def test_pages_elsewhere_are_a_problem(self, tmp_path, number):
        for page in (bolt_page(3, 1, [(number, b"k", b""), (4, b"l", b"")], 4096),
                     bolt_page(3, 2, [(1, b"bad", struct.pack("<QQ", number, 0)),
                                      (1, b"cache", struct.pack("<QQ", 4, 0))], 4096)):
            leaf = bolt_page(4, 2, [(1, b"cache", bytes(16) + bolt_page(0, 2, [(0, b"k", b"v")]))], 4096)
            if page[8] == 2:
                leaf = bolt_page(4, 2, [(0, b"k", b"v")], 4096)
            metas = [bolt_meta(n, 4096, 3, 5, 9 - n) for n in (0, 1)]
            summary, _ = imported(tmp_path, b"".join([*metas, bytes(4096), page, leaf]))
            assert [key for _, key, _ in summary.problems] == [""]
        assert flowstore.SQLiteDataStore(tmp_path / "target.db").get_cache_entry("k") == b"v"

    def test_pages_that_overlap_are_read_once(self, tmp_path):
        data = make_bolt({b"cache": {b"%04d" % n: b"v" * 900 for n in range(40)}}, inline=0)
        for page in range(3, len(data) // 4096):  # each says that it has those behind it too
            data = overwritten(data, 4096 * page + 12, b"\xff")
        summary, _ = imported(tmp_path, data)
        assert summary.cache < 5
        assert summary.problems

    def test_value_too_short_for_a_bucket_is_a_problem(self, tmp_path):
        page = bolt_page(3, 2, [(1, b"cache", bytes(15)), (1, b"old", bytes(16))], 4096)
        metas = [bolt_meta(n, 4096, 3, 4, 9 - n) for n in (0, 1)]
        summary, _ = imported(tmp_path, b"".join([*metas, bytes(4096), page]))
        assert [problem[:2] for problem in summary.problems] == [("", "cache"), ("old", "")]

    def test_buckets_without_end_are_a_problem(self, tmp_path):
        value = bolt_page(0, 2, [])
        for _ in range(3000):
            value = bolt_page(0, 2, [(1, b"b", bytes(16) + value)])
        page = bolt_page(3, 2, [(1, b"b", bytes(16) + value)], 4096)
        metas = [bolt_meta(n, 4096, 3, 3 + len(page) // 4096, 9 - n) for n in (0, 1)]
        summary, _ = imported(tmp_path, b"".join([*metas, bytes(4096), page]))
        assert summary.problems

    def test_flipped_bits_of_what_steers_give_an_error_or_a_summary(self, tmp_path):
        data, _ = bolt_sample("legacy")
        target = flowstore.SQLiteDataStore(tmp_path / "target.db").path
        pages = [page for page in range(len(data) // 4096) if any(data[4096 * page + 8 : 4096 * page + 12])]
        for at in (4096 * page + offset for page in pages for offset in range(8, 64, 5)):
            source = bolt_source(tmp_path, overwritten(data, at, bytes([data[at] ^ 1 << at % 8])))
            with contextlib.suppress(StoreError):
                assert isinstance(flowstore.import_bolt(source, target), flowstore.ImportSummary)

    @given(name=st.sampled_from(BOLT_SAMPLES), keep_metas=st.booleans(), edits=st.lists(
        st.tuples(st.sampled_from(("flip", "zero", "cut", "copy")), st.integers(0, 2**20),
                  st.integers(0, 4096)),
        min_size=1, max_size=6))
    @settings(max_examples=60, deadline=timedelta(seconds=20), derandomize=True, database=None)
    def test_any_damage_gives_an_error_or_what_can_be_read(self, tmp_path_factory, name, keep_metas, edits):
        original, _ = bolt_sample(name)
        used = 1 + max(at for at, byte in enumerate(original) if byte)
        data = bytearray(original)
        for what, place, size in edits:
            at = place % used
            if what == "flip":
                data[at : at + 1] = bytes(byte ^ 1 << size % 8 for byte in data[at : at + 1])
            elif what == "zero":
                data[at : at + size] = bytes(len(data[at : at + size]))
            elif what == "cut":
                del data[at:]
            else:
                data[at : at + 512] = original[size : size + 512][: len(data[at : at + 512])]
        if keep_metas:
            data[:8192] = original[:8192]
        folder = tmp_path_factory.mktemp("damaged")
        try:
            summary, store = imported(folder, bytes(data))
        except StoreError as error:
            assert error.path in (str(folder / "store.db"), str(folder / "target.db"))
        else:
            assert len(store.list_background_runs()) == summary.background + summary.recovered_runs
            histories = store.get_all_execution_history()
            assert sum(map(len, histories.values())) == summary.history
            assert all(record.ref == ref for ref, records in histories.items() for record in records)
            assert "" not in [*store.list_process_buckets(), *histories]
        assert (folder / "store.db").read_bytes() == data


# ---- one transaction, memory, the command ------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's record of the peak")
class TestImportOfLargeValues:
    def test_peak_memory(self, tmp_path):
        """Twice the value beyond the map. (SQLite holds a third one where another is its neighbour.)"""
        size = 24_000_000
        large = "\0ü\U0001f680".encode() * (size // 7)
        bolt_source(tmp_path, {b"cache": {b"k": large}, b"old": {b"k": large}})
        code = """if True:
            import flowstore, re, sys

            def peak():
                return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

            flowstore.SQLiteDataStore(sys.argv[2])
            before = peak()
            flowstore.import_bolt(*sys.argv[1:])
            print(peak() - before)
            """
        output = subprocess.run([sys.executable, "-c", code, tmp_path / "store.db", tmp_path / "target.db"],
                                capture_output=True, text=True, check=True, cwd=MODULE_FOLDER).stdout
        assert int(output) - os.path.getsize(tmp_path / "store.db") < 2.5 * size


class TestImportThatIsInterrupted:
    @pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
    def test_leaves_the_target_as_it_was(self, tmp_path):
        records = {b"%06d" % n: record_json(id=f"{n:06}", command="x" * 200) for n in range(10_000)}
        source = bolt_source(tmp_path, {b"cache": {b"k": b"v"}, b"history": {b"r": records}})
        for attempt in range(10):  # until it is met in the middle
            store = flowstore.SQLiteDataStore(tmp_path / f"target{attempt}.db")
            store.set_cache_entry("mine", b"v")
            before = dump(store.path)
            wal = pathlib.Path(store.path + "-wal")
            process = started_command("import", source, "--store", store.path)
            while process.poll() is None:
                with contextlib.suppress(FileNotFoundError):
                    if wal.stat().st_size:  # the transaction has outgrown SQLite's memory
                        process.send_signal(signal.SIGINT)
                        break
                time.sleep(0.0005)
            _, errors = process.communicate(timeout=60)
            status = process.returncode
            if status:
                break
        assert (status, errors) == (130, "")
        assert dump(store.path) == before
        assert not wal.exists()
        assert flowstore.import_bolt(source, store.path).history == 10_000

    def test_in_a_transaction_on_the_target_is_a_runtime_error(self, tmp_path):
        source = bolt_source(tmp_path, {b"cache": {b"k": b"v"}})
        store = flowstore.SQLiteDataStore(tmp_path / "target.db")
        with store.transaction(), pytest.raises(RuntimeError):
            flowstore.import_bolt(source, store.path)
        assert flowstore.import_bolt(source, store.path).cache == 1


class TestImportCommand:
    @pytest.fixture
    def option(self, tmp_path):
        return "--store", tmp_path / "target.db"

    def test_prints_its_summary(self, tmp_path, option):
        source = bolt_source(tmp_path, bolt_sample("legacy")[0])
        status, output, errors = bolt_command("import", source, *option)
        assert (status, errors) == (0, "")
        assert {"cache 1", "history 2", "legacy_scopes 5"} <= set(output.splitlines())

    def test_exits_1_and_names_what_it_couldnt_read(self, tmp_path, option):
        source = bolt_source(tmp_path, {b"history": {b"r\n": {b"\xff": b"x"}}, b"cache": {b"k": b"v"}})
        command = "--json", *option, "import", source
        status, output, errors = bolt_command(*command)
        summary = json.loads(output)
        assert (status, errors) == (1, "")
        problem, = summary.pop("problems")
        assert problem.pop("reason")
        assert problem == {"bucket": "history/r\n", "key": "\udcff"}
        assert summary == {"cache": 1, "history": 0, "background": 0, "process_vars": 0, "process_buckets": 0,
                           "recovered_runs": 0, "legacy_scopes": 0}
        status, output, errors = bolt_command(*command[1:])
        assert (status, errors) == (1, "")
        assert len([line for line in output.splitlines() if "history/r" in line]) == 1

    @pytest.mark.parametrize("content", [None, b"text"])
    def test_exits_1_with_one_line_where_the_file_is_none(self, tmp_path, option, content):
        source = tmp_path / "source"
        if content:
            source.write_bytes(content)
        status, output, errors = bolt_command("import", source, *option)
        assert (status, output, errors.count("\n")) == (1, "", 1)
        assert str(source) in errors
        assert not (tmp_path / "target.db").exists()


class TestStoreOfTheOriginalInTheDefaultFolder:
    @pytest.mark.parametrize("variable, folder", [("FLOW_CACHE_DIR", ""), ("XDG_CACHE_HOME", "flow")])
    @pytest.mark.parametrize("command", [("list",), ("set", "a", "b")], ids=["list", "set"])
    def test_is_pointed_out_once(self, tmp_path, variable, folder, command):
        if folder and sys.platform in ("darwin", "win32"):
            pytest.skip("cache folders are elsewhere here")
        (tmp_path / folder).mkdir(exist_ok=True)
        source = bolt_source(tmp_path / folder, {b"process": {b"root": {b"k": b"v"}}})
        environment = {variable: tmp_path}
        status, _, errors = bolt_command(*command, **environment)
        assert (status, errors.count("\n")) == (0, 1)
        assert f"flowstore import {source}" in errors
        bolt_command("import", source, **environment)
        assert bolt_command("get", "k", **environment) == (0, "v\n", "")
        assert source.read_bytes() == make_bolt({b"process": {b"root": {b"k": b"v"}}})

    def test_is_no_matter_where_another_store_is_named_or_there_is_one(self, tmp_path):
        bolt_source(tmp_path, {})
        other = tmp_path / "other.db"
        flowstore.SQLiteDataStore(other)
        folder = {"FLOW_CACHE_DIR": tmp_path}
        nothing = 0, "{}\n", ""
        assert bolt_command("--json", "list", "--store", other, **folder) == nothing
        assert bolt_command("--json", "list", **folder, FLOWSTORE_PATH=other) == nothing
        flowstore.SQLiteDataStore(tmp_path / "flowstore.db")
        assert bolt_command("--json", "list", **folder) == nothing


# ---- files that the original wrote, and what it reads from them: JSON in LZMA in base64 --------------------

BOLT_DATA = """
/Td6WFoAAATm1rRGAgAhARwAAAAQz1jM46a6EbJdAD2IisNDLEo2KcdKnygN4RHAzE5tN6hmIfvGYZfl2y1AJzwfIidyeQLd1gmCRgmRkqLfVs
DQbPWE/o28qKgZhWEdQkEFPAWUn6HVqjmAhPaVbzcmHNjMn3+IOT2u1oqULGdDsU0IDgf83xm76Ig2MPqQvnanFj9e1jSDUKpvmPg0knIF/fVS
0E+BSB//5s3WyRIR4wghybhxSPJWCWoHmkFNkmsrJrp8nWZau+utyRCHoxHGFCgZ6bl9syR+1OpsMX8857Hb+jnD7GMNaz6iRGFlfshRcpDCXH
HElyvxwLCV0UqazQfBJ/xkNyYJqBbwzWPu8CXZDdXXg0mL1B1m/rlMqJcPcNI4pzWYsKlv5lY/D8YalhTycxw6ZnaTXiKWU63iYRYVNZc2Kv2H
1XQR8/gDSGWplwvesnpe/B0Wu7oQ8SFHbvuxXSTRz4JVDumeY3CAPUllurIjAGsnig4Er71qJENqoyXs99vkLE/U/6gYWkYASAOjj4Id9o90V8
pnlO6td6XN+dAg67X/LE/X71mZerMTKPGHB3dIt5N9yLoAMIe8gBOSuGJB4rGrqTlPWweGaS9DI8sq3sPDJbZa4XsjrK0HMpzglum7/Jrk6sXn
m9Rme+xzQfF1ORQ6j4i/5P+oL3DtkLSZ8X+RrpMOGWXf1Tk/JhIM3hDC24Wr66kM8Ng9ZNx87l4a1kWOeD5yWJulhnX5mX5L2sdr2U9eNiqxAA
FgEOZNE0tA38YNYB/MK4jR9VhIXkjONdvQ41B4zjGvtY3z977FFbCbeR4JTBeHpU4ww8o9YJOJ/S4PwEHRbSkBDHd1elYLWQYzBLgt5Dk24nEA
uF5ytYSfl5dWafAzmxoSPUgOxlK1H4X63t6V2YSxPLjMAdjZ5MgZt0gRYFJFWxISg9sXgz9YhZ24Peu2S/ycxna8TeN65Ypl5gngGwF45ymKRq
6aUsTiGO7QDNsRsNraxAtLuzWkSN6GBSeYFotke1yWiTxxovdDpMkW1auiDc1dpP5h1wMphd/A3grhKj1GVGqZ4al5vzvUtArest4NE/NknnwY
NI/bI6iOGN4uDykfCnNC/mM6Y54eh4rpvE5wDy4jFOEScOLgIhGyFTmsBJl0dNdndgPoNVFWV7zRn015f31JBomZVwPoyJGxyNon7i9HpDf2xU
It+WSHbv0Eu50x7fUY4ZBH6zgI91OnX2fFY3u7IpRKjjEgK24GpeDiWruEKrBUMdQs4r3x7S7aiqjw43UcJHSEK0QT1BJoWTVjDHnNYdKaCqOs
+0NQ+SEw/Wp+cSc4+WNRGSGcP8v4KocKmRkbIs+fCxj5etI6cgRkZUWsSGwV4KasViIHI3d4phqBHJUR8AdFWliF6VUQgjeO7DG2wjivxX4OYI
qHV72z1HPCUHX+/5eYGwk0taC6Wk08Egsj7qRWfMymySWfNYCfdKJ0tl7ij3s3CWLycFGPat+2qAzboqb1Vne2ub/p3OlQMfKfhisVoJEKnZdt
sb6mcwPANF7LNpf0vt4/EEQMPx7TL0+yGwokN4o3D9Ek8fCA45pbXJrHwUvXXmfNJDhVEBwV2f08BBJ597hWbcvb17u3k8jAwHTfxmOEyob3O7
55fk2q8GL20dDDNROe4g17++LPsGCmZXbFc1fipndQBvdnnjr4PlPgeGh9GNnuW0lZiEQKMUq0gB74el4HSHeDqDXsbhIZruqimFTyl7dyvWrU
ghBD99mbA+sNa+FVjtEGmWz9WdRGAx2U5xOWiRGjnD838/Gn3U2Dxj2G48sQpcBMfGpUVGokMINO/nPjVVhgqOK9mr5pvHjtUF4TVkfY+39AjS
imXtIphhYOQ6LTMpkPz82UCCYMn8ZKEqgcJPT/7JVte1LIiChIMlpjK+udR4jaG13nK5WpvtGsynwqOQ3vSpatbSXOWBUdi/7KhvNKAyCKf8mM
UTkljdEAMAx06DjyxfhC2nsUIpofFBpkR8qwslP5h0b2mkta5JS3GYJiYQYZirxUp936uHOJmYjke2xHJx09oSuYGRXHaBKajhTApeakmxi335
5CV7/wkcXXBuWHiyYJPOUSMV6Gp8IZDASQ2m1nDLuRgeSHUILQ5KSbeeuv1utUI0DfyMQtbvTVxY55r4s6AM0jlxECNFENxrVPIgjpXrdpmtFg
b7qWI+PUhwzjbruzsGwa5XcUlQfR2hvP4Hy3ajkDK9x9Y2roRM3HkdSm9sKN6Vajk25IhJ4eEgn81OEAL08ZhRBZ7K386CS77BIkhej/C9qDuv
w9i3nzjd7h6dfBRwSCUg+6u6JzJZEOO1BRtHeQmRfWFtGJnwTRoQPRSkIPIJSD56ETtQ+rAAUg+lMG0rNdqWP1HDAyt9PfN3SWH3TGeOOYtiYb
WC5FTNtfKs8BEaNFnsYYZWNdv0MPWB6rN08sYyvD53cRpFCZsUVbO5VZbzo9Pz9QUYiMJE3kr65DOUPypI0TBS1nC87sSWpyAXzDTBLuRfde+x
v13c9q1MStrIRwz/nuJWAUAI+U4mohKFaA12BBO8yBOdTLqaAgrQHJdnUiNXgqj5pRN9UPWJtA3YjH8xsuHr3unNMN/twZoxlyKzGPO1NWsMBp
9QmB42//tyVfU/LPmsgudfy8790YbZOXzoFlFr3wWXP9A7GfyPkUDXUTmD7QxzGBnNw72dEnVj9UxcR/u1BUdwwJZp4wvPaCrxFYgefSXhbe9e
/0E0g8AvLERfhWEPSpztAk3PPsF+ygonuxT6zTgJLKz52Gu8Rfr92mzxOYWKrCH7H8HOo3UoFsTXmSwkuodnn/uZ1G9TATM2qIBkyqyUOgORdN
s1m8dRv0rS4zRNGbsnCNr9u7OO3162YL3hk6ZkzBrU56BwXWVaf8Xd0AXEwte+Kir/XJPKCMmWzFD0CR+lAhrB7xwxcSlritomqZWN/ToiWD5F
hDhvZ/Q7yuvzSJAGnFcVQCyg91RsgQS445qnfDcyICTpXjJ341XDWiJiaaptjALsUsxBkuU5RCcb+I+64yy98c3iYf3kfuDY5RBEW5CD+RGO7U
LWcMGlnFCQji7Je6NmqbXqKogkL9SOhlMK7OGlugrSmr7yY78oCWRdDyvFgcZgOxrTWOa1Nute/A3l9gYoaXGkTjCw4OsGgVNppq0di+hwCcT1
Fjc7vm0SbZAIMvGGWJ2PjefSD6yHsv3dF+j4mXG8MDYwbt/NhH1B8HjDO1q814v1TTA7HYgbYbsOyW6QlLP+o/BdRNy63RQvSsM62anymLPvTR
WUILTvDe7jnjmlpuCqzVwkEsO3brvnW3BREneZ/snUe91H99M9fG8ILu3kibHr8n/hw2Tx6ojMR2emp7tiqsdsgViEb2Pkt07S9N/+KjHDqz3I
GN+NPoGs/OzKrVnl0UcNjo6TodIP4R9eXRRcS1WsdQcXlTwzxW7b/Brekpfh6zd5z5Ul4Q6qmIa1b0WaCWmeX7ICOrKPnUYrssJLB/xspXoT6i
bNztLuXpgLFiOH8GqQDgtgwKMdhSh0SnejbAlr+Fu5wXc8Ad0oYj0VLBzafSp5jMdErRGc95dWBXF1ndW0b4mbhz98Mvy7TwWc9SVNZpV40Mns
lZ/asy1e5KjxzNsfN/NYF+Fd795Qwh3KfrPbxueTn3X2H+wbIXxpWzXRSaVJe7s8FZJG9h/BDEqkkWpKunLgzS0jBoAmKQYOfOsFXGigo93icP
fSQqKado5TDKD2QBFRnKUf6uJb4XYGgZKf7l4d1yaanu3+LIGvvawAGAP6QY08NaYATa/fzGrQVVW9Gl4DudTTUyko1uG6R/2cnU9qXxvt5+oS
s9aNn6q3I5XK+RsbFHBLltiYl3/Onj4dM0uVtIC1Bj+Cud28Tt3gMF7PfVOp0/4rVfzJ6iIzKq4KiBQrd8tiUCMXVjp7yDzDFwQJ+8DErQ4BXD
srO0lnVIFD10WHw/wtVd3+ro6v+8lHCkjsXZFmk7qHEGMwtHMWe1qe2GvOD8iPlC0IoMruF/WVr5XaGdiFoNW2LCZNMPWANqJKNQlHhVI075Fa
h/aszC291TZ/dYyvrsWXVxCxxW7alDxT43lgpkLrpInpqhe2eCXTosBVitmEXomUPDpF5xveLEaRob+XZ8Z1ABaqs37xKqPnmH8j3PXPDrh7uc
MbNAQK3IH+PW7XW1DqQIAsZzppgYgCc54o386BEiznA3E15xr0id1HqPIC3S6S1+QTMBqm36hYYXNflRProViFrjSSPd0uEtriB+1sWLkf8b4W
xHhjA+lpvGM2ga1eXXIZyEAnN0lJjOL/BWu+uH5duTIIQlgxjiU1qpwrPP5EYSgEj+wbxBxAXs52VLCSA1iES1yM3yp1z1oAid5uXnm2/x4bkG
ucTtt/Z9E2XWEHm0I9ccApfpVU0EGitBRCRh9AUxTVO3eZ8t1z2mtPyUi3fROI2voxFK0F6QeYYDsrD/QReMeHCrjVsaUR+203TI01Af0vQbja
Md1UlJ6h7CV2m2JXk6q1YOJR3VuksWph+9nIllB0bSEy7xVGIC8AN/76bY2dYjhgFGiwMb6FhD1SRCqcCBk8DLRUT5GkXHTaVBERPZG+Ax8pOz
C7i3TtZ1Vawxw7astqn2q7w6dPxoZeL97zhF88VlQCuHTytD++AyusqCDWHGWyz41ryc+vfv9Qp4m7EbAZn7Buyf60VVbZv2H/T1JKDbL06zpw
IsGEuNhk2jPm4Po7nRKgSM89YKnyC/9b+dBKE1JSCStXeRRWENIfarSX3yXVUXpa4oXMnb4xDR0PWAW4F+7DevGQ4lfvjP/1372U2lvYc6oEXw
7cgcKmtRdShPDufllLnvJDCUyRXUyX297jeutIWuWWg/HN+UVIYt8ANDq/l+mZgA3qjxc+xdO4buZJLR+zJ0tnyNRulPlLq1LU3xndglRDPnki
oDdSPlIme3ohOIk21Kitc746HbMYpX/PU0bH0Y3vhxXPG0UqDWaZY7HJZTZ6w5zR4H8hg+2JGvTyLK+IhE360n3t6dMclzx1oXnaRQ9EYI8LD9
32QWtmVBISr0ECnYoM1/9pxJIASa+gsq+qaEnVMZqolDV4bKYSPiAkNQLp/ZqxzvwtWkTIHS3vQ1CZmMrB8IJ2WaDuZwOrqyK5KqiTwRDP1Yl5
LnrwI6I8h0nByMvx/hoBbCZZRWbPfEo9lXMI4ZH7FLEj740viRn8vbhPRNzB2RH9inprLcerx1q8I53T3G7DJgVuHHdQTme+tZcopjTpxuDCxI
TVoi76MRcK/ANrorl/XI3M/TglG6gCzEilgZtEA/Qh89bb9m2A3pbWQZYqJuxA/svF+kUaMVvc6vxxBWjXt8atxKKEYcsvEO5oEsUsYjPO1zU7
92EANgLG9c8eJo6bq9RgycthV9ZTDP3+xFNuVCf81pUUrzxoNrdhSq+WCUUd9dx+ESBm0Plywf9Prwxk3EvGh8myg2qV+sfVS8Qj4z1kBvifA/
14yFK4+zDrHvywAQBA4fj2wBZZQJ8GzelUIi9PlPOnb7gvy5PfS+YSXa8uJL9WZTdAk/2xJEpj8IPL8hzOH7DZLv/HqKtoEAib/9x6cimyGaXv
DVWuR9VWv9WZB/tMzMTQiDHaQaYwmyJh9not5x4gmq9G5df9wRBKFIRPVK6Hr2JSYu0fpo3OtsFQRzTcItHOPaz8V9xfD+oSynx7A9Eb76tYMc
cXf6A+7+mKrjLKaiLu7StEP2/pXFW4U4q9D+607aBprRaiztAl4HEZVcdnufgo8bDY0RukJeLxFGg2q7PFaV6lzTQm+dHX+hmWYXje0+H1QIT/
SILrWBPENXmCvvn2W5MLuytmMW0xbim/AAM+RIQ74zv649K/RewRVFGSKwz+3JrzykQ8FkafU0sQQcNkFdCZCTjeN52VRwN40Ygi2hxY7+SSup
qLp3+mR5kZoMDdcc8s3elsUyXX1Q+X070gLi2eSQpaFL4QbG2IprycHWr0NgRqYmyQLbt7BT/5WVHcHCXVRT1jMQEptnM+1Sdkg7jjbiZUUCzL
TqlU1G9QYClpwWEr+1oBvQcK/8o/YpAAAAAF5HrCx/A70kAAHOI7vNDgDLH1GjscRn+wIAAAAABFla
"""


class TestReadme:
    def test_python_examples_run(self, tmp_path):
        text = (pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8")
        examples = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        environment = {**os.environ, "PYTHONPATH": os.path.dirname(flowstore.__file__)}
        assert len(examples) == 2
        for text in examples:
            command = [sys.executable, "-W", "error", "-c", text]
            subprocess.run(command, cwd=tmp_path, env=environment, check=True)
