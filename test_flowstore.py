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
from concurrent.futures import ThreadPoolExecutor
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

posix_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SOURCE = pathlib.Path(flowstore.__file__).resolve()
APPLICATION_ID = 0x464C5753
START = datetime(2024, 1, 2, 3, 4, 5, 678901, UTC)
ZERO_TIME = datetime(1, 1, 1, tzinfo=UTC)
LAST_TIME = datetime(9999, 12, 31, 23, 59, 59, 999999, UTC)
LONGEST = timedelta(microseconds=2**63 // 1000)
TEXTS = ["two\nlines\0'\"`;--", "Grüße \U0001f600", "\udcff", "a\udc80b\udcc3", "x" * 100_000]
NO_TEXTS = ["\ud800", "\udc7f", "a\udfffb", "\udcc3\udcbc", "\udcf0\udc9f\udc98\udc80"]

# ---- the model --------------------------------------------------------------------------------------------


def by_bytes(name):
    return name.encode("utf-8", "surrogateescape")


def model_text(value):
    if not isinstance(value, str):
        raise TypeError
    try:
        survives = by_bytes(value).decode("utf-8", "surrogateescape") == value
    except UnicodeEncodeError:
        survives = False
    if not survives:
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

PATIENCE = 60  # seconds after which a process counts as hung


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
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).exception(PATIENCE)


def each_raises(error, store, calls):
    for method, arguments in calls:
        with pytest.raises(error):
            getattr(store, method)(*arguments)


class Forked:
    """A child process that runs work(), as another user where one is named.

    result() awaits its end and returns what work() did, or raises its StoreError or what went wrong.
    """

    def __init__(self, work, *arguments, user=None):
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        outcome = None
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(PATIENCE)
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            outcome = work(*arguments), None
        except StoreError as error:
            outcome = None, error
        except BaseException:
            outcome = None, AssertionError(traceback.format_exc())
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
        if error:
            raise error
        return value

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.reader)


def together(count, work):
    """What work(0) … work(count - 1) return, each in a process, all started at the same moment."""
    reader, writer = os.pipe()

    def start(number):
        os.close(writer)
        os.read(reader, 1)
        return work(number)

    children = [Forked(start, number) for number in range(count)]
    os.close(writer)
    os.close(reader)
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
        if self.go_on:
            os.write(self.go_on, b".")
            os.close(self.go_on)
        self.go_on = None

    def result(self):
        self.end()
        return self.child.result()


@contextlib.contextmanager
def locked(path, *statements):
    """While another process, of plain SQLite, holds what these statements have taken."""
    holder = Held(lambda: raw_sql(path, *statements))
    try:
        yield holder
    finally:
        holder.result()


@contextlib.contextmanager
def raw_sql(path, *statements):
    """The file as any program may use it."""
    sql = sqlite3.connect(path, isolation_level=None)
    try:
        for statement in statements:
            sql.execute(statement).fetchall()
        yield sql
    finally:
        sql.close()


def sql_values(path, query, *values):
    with raw_sql(path) as sql:
        return [row[0] if len(row) == 1 else row for row in sql.execute(query, values)]


def intact(path):
    return sql_values(path, "PRAGMA integrity_check") == ["ok"]


def files_in(folder):
    """The files below a folder, with their bytes and modes."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


def files(path):
    return sorted(os.listdir(os.path.dirname(path)))


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


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeping moves: a wait takes no time, and its length is exact."""
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.append(now.pop() + max(seconds, 1e-6)))
    return now


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="takes root to become somebody else")
NOBODY = 65534

# ---- the contract -----------------------------------------------------------------------------------------

SUBJECTS = ["store", "session", "transaction", "model"]
if "FLOWSTORE_TEST_FACTORY" in os.environ:
    SUBJECTS.append("factory")
carried_bytes = st.binary(max_size=12).map(lambda data: data.decode("utf-8", "surrogateescape"))
surviving_texts = carried_bytes | st.text(max_size=12)
all_texts = st.text(st.characters(codec=None) | st.characters(categories=["Cs"]), max_size=6)


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

    @pytest.mark.parametrize(("error", "names"), [
        (ValueError, ["", *NO_TEXTS]), (TypeError, [None, b"k", 1, ("k",)])], ids=["value", "type"])
    def test_name_that_is_none_is_refused_and_changes_nothing(self, store, error, names):
        before = contents_of(filled(store))
        for name in names:
            each_raises(error, store, calls_with(name))
        assert contents_of(store) == before

    def test_one_str_in_place_of_several_names_is_a_type_error(self, store):
        for method in ("get_cache_entries", "get_execution_histories", "get_background_runs"):
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

    def test_value_of_another_kind_is_refused(self, store):
        before = contents_of(filled(store))
        for value, error in [*((text, ValueError) for text in NO_TEXTS), *((value, TypeError) for value in (
                b"v", None, 1))]:
            with pytest.raises(error):
                store.set_process_var("k", "k", value)
        for value in ("text", None, 1, [1], object()):
            with pytest.raises(TypeError):
                store.set_cache_entry("k", value)
        assert contents_of(store) == before

    def test_cache_value_is_any_bytes_like_object(self, store):
        for value in (bytearray(b"aabb"), memoryview(b"aabb"), memoryview(b"a-a-b-b")[::2],
                      array.array("H", [0x6161, 0x6262])):
            store.set_cache_entry("k", b"")
            store.set_cache_entry("k", value)
            assert store.get_cache_entry("k") == b"aabb"
            assert type(store.get_cache_entry("k")) is bytes

    # cache

    def test_cache_entry_replaces_the_earlier_one_until_it_is_deleted(self, store):
        for value in (bytes(range(256)) * 1000, b"new"):
            store.set_cache_entry("k", value)
            assert store.get_cache_entry("k") == value
        for _ in range(2):  # a missing one is no error
            store.delete_cache_entry("k")
            assert store.get_cache_entry("k") is None

    def test_bulk_read_takes_more_keys_than_sqlite_has_variables_by_default(self, store):
        store.set_cache_entry("first", b"1")
        store.set_cache_entry("last", b"2")
        keys = ("first", *map(str, range(32_766)), "last")
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

    def test_instants_come_back_in_utc(self, store):
        for moment in (ZERO_TIME, LAST_TIME, START, START.replace(microsecond=0),
                       datetime(1, 1, 1, 23, tzinfo=timezone(timedelta(hours=23))),
                       datetime(1969, 12, 31, 23, 59, 59, 999999, UTC),
                       datetime(2024, 3, 31, 2, 30, tzinfo=timezone(timedelta(hours=-5, minutes=-30)))):
            store.record_execution(execution_of("k", id="1", started_at=moment, completed_at=moment))
            store.save_background_run(run_of("k", started_at=moment, completed_at=moment))
            for read in (*store.get_execution_history("k"), store.get_background_run("k")):
                assert read.started_at == read.completed_at == moment
                assert read.started_at.tzinfo is read.completed_at.tzinfo is UTC

    def test_durations_and_numbers_of_64_bits_come_back(self, store):
        durations = [timedelta(0), timedelta(microseconds=1), timedelta(microseconds=-1),
                     timedelta(days=-3, microseconds=5), LONGEST, -LONGEST]
        for duration, number in zip(durations, [0, -1, 1, 2**31, 2**63 - 1, -(2**63)], strict=True):
            record = execution_of("k", id="1", duration=duration, exit_code=number, pid=number)
            store.record_execution(record)
            store.save_background_run(run_of("k", pid=number))
            assert store.get_execution_history("k") == [record]
            assert store.get_background_run("k").pid == number

    @pytest.mark.parametrize("text", ["", *TEXTS], ids=lambda text: ascii(text[:20]))
    def test_variable_and_every_text_field_hold_any_text(self, store, text):
        names = set(ExecutionRecord._fields[4:]) - {"completed_at", "pid"}
        record = execution_of("k", **dict.fromkeys(names, text))
        run = run_of("k", status=text, log_archive_id=text, error=text)
        store.record_execution(record)
        store.save_background_run(run)
        store.set_process_var("scope", "k", text)
        assert store.get_execution_history("k") == [record]
        assert store.get_background_run("k") == run
        assert store.get_process_var("scope", "k") == text
        assert store.get_all_process_vars("scope") == {"k": text}

    def test_members_of_enumerations_count_as_their_values(self, store):
        text = enum.StrEnum("text", {"TEXT": "é"}).TEXT
        store.record_execution(execution_of(text, exit_code=signal.SIGTERM, status=text))
        store.set_process_var(text, text, text)
        assert store.get_execution_history("é") == [execution_of("é", exit_code=15, status="é")]
        assert store.get_all_process_vars("é") == {"é": "é"}

    def test_field_out_of_range_is_a_value_error_and_of_another_type_a_type_error(self, store):
        before = contents_of(filled(store))
        early, late = (datetime(year, month, day, 12, tzinfo=timezone(timedelta(hours=hours)))
                       for year, month, day, hours in [(1, 1, 1, 13), (9999, 12, 31, -13)])
        wrong = {
            ValueError: {"started_at": (datetime(2024, 1, 1), early), "pid": (2**63,), "error": ("\ud800",),
                         "completed_at": (datetime(2024, 1, 1), late)},
            TypeError: {"started_at": (None, "2024-01-01T00:00:00Z", 0), "completed_at": ("",),
                        "pid": (1.0, True, None), "error": (None,), "status": (b"failed",)}}
        wrong_in_executions = {
            ValueError: {"duration": (LONGEST + timedelta(microseconds=1), timedelta.min),
                         "exit_code": (-(2**63) - 1,), "id": ("\udcc3\udcbc",)},
            TypeError: {"duration": (1, None), "exit_code": ("0",), "id": (None,)}}
        for save, make, cases in [(store.save_background_run, run_of, wrong),
                                  (store.record_execution, execution_of, wrong),
                                  (store.record_execution, execution_of, wrong_in_executions)]:
            for error, fields in cases.items():
                for field, values in fields.items():
                    for value in values:
                        with pytest.raises(error):
                            save(make("k", **{field: value}))
        assert contents_of(store) == before

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
                         4: [1, 2, 3, 4], 5: [0, 1, 2, 3, 4], 6: [0, 1, 2, 3, 4]}
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

    def test_limit_is_an_integer(self, store):
        for limit, error in ((1.0, TypeError), ("1", TypeError), (None, TypeError), (2**63, ValueError)):
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
        pairs = [("a", "\0b"), ("a\0", "b"), ("a", "b"), ("ab", "\0"), ("plumless", "x"), ("buckeroo", "x"),
                 ("k", "plumless"), ("k", "buckeroo")]  # of one CRC-32
        for ref, id in pairs * 2:
            store.record_execution(execution_of(ref, id=id))
        found = [(record.ref, record.id) for records in store.get_all_execution_history().values()
                 for record in records]
        assert sorted(found) == sorted(pairs)

    def test_deleted_history_is_gone_and_others_stay_and_an_unknown_one_is_no_error(self, store):
        store.delete_execution_history("k")
        assert store.get_execution_history("k") == store.list_execution_refs() == []
        assert store.get_all_execution_history() == {}
        for ref in ("k", "k", "other"):
            store.record_execution(execution_of(ref))
        store.delete_execution_history("k")
        assert store.get_execution_history("k") == []
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

    def test_variable_replaces_the_earlier_one_and_outlives_the_creation_of_its_bucket(self, store):
        for value in ("1", "2"):
            store.set_process_var("scope", "k", value)
            store.create_process_bucket("scope")
            assert store.get_all_process_vars("scope") == {"k": value}

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

    def test_transaction_leaves_nothing_behind_an_exception_which_goes_on(self, outer):
        outer.set_cache_entry("k", b"before")
        before = contents_of(outer)
        for kind in (Exception, KeyboardInterrupt, SystemExit, StoreBusyError, NotFoundError):
            raised = kind("stop")
            with pytest.raises(kind) as caught, outer.transaction() as transaction:
                filled(transaction)
                transaction.delete_cache_entry("k")
                raise raised
            assert caught.value is raised
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

    def test_nested_transaction_is_a_runtime_error_and_the_outer_one_goes_on(self, outer):
        with outer.transaction() as transaction:
            transaction.set_cache_entry("a", b"1")
            with pytest.raises(RuntimeError), transaction.transaction():
                pass
            with pytest.raises(RuntimeError), outer.transaction():
                pass
            transaction.set_cache_entry("b", b"2")
        assert outer.get_cache_entries(["a", "b"]) == {"a": b"1", "b": b"2"}

    def test_transaction_after_its_end_or_in_another_thread_is_a_runtime_error(self, outer):
        with outer.transaction() as transaction:
            for method, arguments in CALLS:
                assert isinstance(in_a_thread(lambda m=method, a=arguments: getattr(transaction, m)(*a)),
                                  RuntimeError)
            transaction.set_cache_entry("k", b"1")
        each_raises(RuntimeError, transaction, CALLS)
        with pytest.raises(RuntimeError), transaction.transaction():
            pass
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

    @pytest.mark.parametrize(("value", "bucket"), [
        (None, "root"), ("", "root"), ("a:b/c d::", "a_b_c_d__"), ("a\tb\\c-é", "a\tb\\c-é"), ("  ", "__")])
    def test_environment_bucket_replaces_colon_slash_and_space(self, monkeypatch, value, bucket):
        monkeypatch.delenv("FLOW_PROCESS_BUCKET", raising=False)
        if value is not None:
            monkeypatch.setenv("FLOW_PROCESS_BUCKET", value)
        assert flowstore.environment_bucket() == bucket

    @pytest.mark.parametrize(("value", "expected"),
                             [(None, ""), ("", ""), ("plain", "plain"), ("${OTHER}", "its value"),
                              ("${MISSING}", ""), ("${OTHER} ", "${OTHER} "), ("$OTHER", "$OTHER"),
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
    status=some_values, error=some_values, completed_at=st.none() | some_instants)
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
            max_examples=15, stateful_step_count=30, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck)))

    @settings(max_examples=60, deadline=None, derandomize=True, database=None,
              suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(all_texts.filter(bool))
    @example("\ud800")
    @example("\udcc3\udcbc")
    @example("\udcff")
    def test_text_is_a_name_exactly_where_it_survives_utf8(self, tmp_path, text):
        store = flowstore.SQLiteDataStore(tmp_path / "store.db")
        call = "get_cache_entry", (text,)
        assert outcome_of(store, *call) == outcome_of(DictStore(), *call)

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
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
    "status": "running", "logArchiveId": "log", "error": "killed", "completedAt": "2024-01-02T03:04:07.5Z",
}


class TestRecords:
    """Records on their own: the named tuples and the original's JSON."""

    def test_fields_come_in_their_order_with_their_defaults(self):
        assert ExecutionRecord._fields == (
            "ref", "started_at", "duration", "exit_code", "error", "log_archive_id", "id", "completed_at",
            "status", "pid", "command", "spec", "label", "source", "client_name", "session_id", "working_dir")
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

    @pytest.mark.parametrize("record", [execution_of(), run_of()])
    def test_record_pickles_and_copies(self, record):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
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

    def test_missing_tag_is_a_value_error_that_names_it(self):
        for kind, full, tags in [(ExecutionRecord, FULL_EXECUTION, ["ref", "startedAt"]),
                                 (BackgroundRun, FULL_BACKGROUND, ["id", "ref", "startedAt"])]:
            for tag in tags:
                for incomplete in (full | {tag: None}, {key: full[key] for key in full if key != tag}):
                    with pytest.raises(ValueError, match=tag):
                        kind.from_dict(incomplete)

    def test_tag_of_another_type_is_a_type_error(self):
        for tag, value in [
                ("ref", 1), ("startedAt", 0), ("startedAt", START), ("duration", 1.0), ("duration", "1s"),
                ("exitCode", True), ("pid", "7"), ("error", b"x"), ("completedAt", 5), ("status", [""])]:
            for kind, full in ((ExecutionRecord, FULL_EXECUTION), (BackgroundRun, FULL_BACKGROUND)):
                if tag in full:
                    with pytest.raises(TypeError):
                        kind.from_dict(full | {tag: value})

    def test_document_of_another_type_is_a_type_error(self):
        for document in (None, [], "{}", (("ref", "r"),)):
            for kind in (ExecutionRecord, BackgroundRun):
                with pytest.raises(TypeError):
                    kind.from_dict(document)

    @pytest.mark.parametrize(("tag", "value"), [
        ("duration", 2**63), ("pid", -(2**63) - 1), ("exitCode", 2**64), ("error", "\ud800"),
        *(("startedAt", text) for text in (
            "", "Z", "2024-01-02", "2024-01-02T03:04:05", "2024-01-02 03:04:05Z", "20240102T030405Z",
            "2024-01-02T03:04Z", "2024-1-2T03:04:05Z", "2024-01-02T03:04:05.Z", "2024-01-02T03:04:05,5Z",
            "2024-13-02T03:04:05Z", "2024-01-02T24:00:01Z", "2024-01-02T03:04:60Z", "now",
            "2024-01-02T03:04:05+0200", "2024-01-02T03:04:05+02", "2024-01-02T03:04:05+25:00",
            "2024-01-02T03:04:05+02:00Z", "2024-01-02T03:04:05.\uff15Z", "\uff12024-01-02T03:04:05Z",
            "2024-W01-2T03:04:05Z", "2024-01-02T03:04.05Z", "2024-01-02T03040506Z", "0000-01-01T00:00:00Z",
            "10000-01-01T00:00:00Z", "0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01"))])
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

    def test_memory_and_nul_are_value_errors_and_another_type_a_type_error(self):
        for function in (
                flowstore.SQLiteDataStore, flowstore.destroy_store, flowstore.migrate_process_buckets):
            for path in (":memory:", b":memory:", pathlib.Path(":memory:"), "a\0b"):
                with pytest.raises(ValueError):
                    function(path)
            for path in (1, ["x"], object()):
                with pytest.raises(TypeError):
                    function(path)
        assert os.listdir() == []

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

    def test_timeout_that_is_none_is_refused_before_the_file_is_made(self):
        for timeout in (float("nan"), -1, -0.001, float("-inf"), True, "3", None):
            with pytest.raises(ValueError if type(timeout) in (int, float) else TypeError):
                flowstore.SQLiteDataStore("store.db", timeout=timeout)
        with pytest.raises(TypeError):
            flowstore.SQLiteDataStore("store.db", 3.0)
        assert os.listdir() == []

    def test_timeout_is_clamped_to_what_works(self):
        for timeout in (0, 1e-9, 3, float("inf"), 10**400):
            store = flowstore.SQLiteDataStore("store.db", timeout=timeout)
            assert filled(store).get_cache_entry("k") == b"value"

    def test_store_pickles_and_copies(self):
        store = flowstore.SQLiteDataStore("store.db", timeout=0)
        with locked(filled(store).path, "BEGIN IMMEDIATE"):
            for other in (pickle.loads(pickle.dumps(store)), copy.copy(store), copy.deepcopy(store)):
                assert other.path == store.path
                assert contents_of(store) == contents_of(other)
                with pytest.raises(StoreBusyError):
                    other.set_cache_entry("k", b"new")

    def test_repr_names_the_file(self, tmp_path):
        assert repr(str(tmp_path / "store.db")) in repr(flowstore.SQLiteDataStore("store.db"))


class TestFile:
    """What lies on the disk."""

    def test_one_file_is_at_rest_after_each_operation(self, tmp_path, path):
        store = filled(flowstore.SQLiteDataStore(path))
        for method, arguments in [*CALLS, ("list_process_buckets", ()), ("close", ())]:
            outcome_of(store, method, arguments)
            assert os.listdir(tmp_path) == ["store.db"], method
        for context in (store.session, store.transaction):
            with pytest.raises(ArithmeticError), context() as inner:
                filled(inner)
                raise ArithmeticError
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
        each_raises((ValueError, TypeError), store, refused)
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
        columns = sql_values(path, "SELECT name, pk FROM pragma_table_info('process_vars') WHERE pk")
        assert columns == [("bucket", 1), ("key", 2)]

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

        modes = Forked(work, user=NOBODY).result()
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
        os.chmod(path, 0o640)  # of a store it is its owner's choice
        filled(flowstore.SQLiteDataStore(path))
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
            each_raises(StoreError, store, calls_with("k")[:5:4])
            return read

        assert Forked(work, user=NOBODY).result() == [expected, expected]
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


def make_text(path):
    path.write_text("# no store, but somebody's notes\n" * 50)


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
    (lambda path: path.write_text("x"), CorruptStoreError, "no SQLite file"),
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
                  "foreign id", "foreign id wal", "newer", "directory", "pipe", "device"]


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
    def test_error_has_its_bases_and_pickles(self, kind, bases):
        assert all(issubclass(kind, base) for base in bases)
        assert issubclass(kind, OSError) == (kind is StoreBusyError)
        error = kind("/a/b: what is wrong: what to do", "/a/b")
        pickled = [pickle.loads(pickle.dumps(error, n)) for n in range(pickle.HIGHEST_PROTOCOL + 1)]
        for again in (*pickled, copy.copy(error), copy.deepcopy(error)):
            assert (type(again), str(again), again.path) == (kind, "/a/b: what is wrong: what to do", "/a/b")

    @pytest.mark.parametrize(("make", "kind", "phrase"), NO_STORES, ids=NO_STORE_NAMES)
    def test_what_is_no_store_is_refused_by_name_and_left_untouched(self, tmp_path, make, kind, phrase):
        path = tmp_path / "store.db"
        store = flowstore.SQLiteDataStore(path)  # until then
        path.unlink()
        make(path)
        before = files_in(tmp_path)
        for function in (
                flowstore.SQLiteDataStore, flowstore.migrate_process_buckets, flowstore.destroy_store):
            with pytest.raises(StoreError, match=phrase) as caught:
                function(path)
            assert isinstance(checked_error(caught.value, path), kind)
            assert files_in(tmp_path) == before
        for work in (lambda: store.get_cache_entry("k"), lambda: store.set_cache_entry("k", b"v"),
                     store.list_execution_refs, lambda: store.session().__enter__(),
                     lambda: store.transaction().__enter__(), lambda: store.backup(tmp_path / "backup")):
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
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        for name in ("x" * 300, "/".join(["x" * 200] * 3), "a"):
            with pytest.raises(StoreError) as caught:
                flowstore.SQLiteDataStore(tmp_path / name)
            checked_error(caught.value, tmp_path / name)

    @needs_root
    def test_folder_that_is_closed_to_the_user_is_refused(self, public_folder):
        folder = public_folder / "closed"
        folder.mkdir(0o700)
        path = folder / "store.db"
        filled(flowstore.SQLiteDataStore(path))
        for closed in (path, public_folder / "new.db", public_folder / "a" / "new.db"):
            with pytest.raises(StoreError) as caught:
                Forked(flowstore.SQLiteDataStore, closed, user=NOBODY).result()
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

    @pytest.mark.parametrize("timeout", [0, 0.2, 3])
    def test_lock_of_another_process_is_a_store_busy_error_after_the_timeout(self, path, clock, timeout):
        filled(flowstore.SQLiteDataStore(path))
        store = flowstore.SQLiteDataStore(path, **({} if timeout == 3 else {"timeout": timeout}))
        with locked(path, "BEGIN IMMEDIATE"):
            works = [lambda method=method, arguments=arguments: getattr(store, method)(*arguments)
                     for method, arguments in calls_with("k")[:5:4]]
            for work in (*works, lambda: store.transaction().__enter__()):
                start = clock[0]
                with pytest.raises(StoreBusyError, match=rf"{timeout:.1f} seconds") as caught:
                    work()
                assert clock[0] - start == pytest.approx(timeout, abs=0.01)
                checked_error(caught.value, path)
            assert contents_of(store) == contents_of(filled(DictStore()))
        store.set_cache_entry("k", b"new")
        assert store.get_cache_entry("k") == b"new"

    def test_process_that_has_the_file_to_itself_makes_reads_a_store_busy_error(self, path, clock):
        filled(flowstore.SQLiteDataStore(path))
        store = flowstore.SQLiteDataStore(path, timeout=0.1)
        modes = "PRAGMA locking_mode = EXCLUSIVE", "PRAGMA journal_mode = DELETE"
        with locked(path, *modes, "BEGIN EXCLUSIVE"):
            for work in (lambda: flowstore.SQLiteDataStore(path, timeout=0),
                         lambda: store.get_cache_entry("k"), lambda: store.session().__enter__()):
                with pytest.raises(TimeoutError) as caught:
                    work()
                assert type(checked_error(caught.value, path)) is StoreBusyError

    def test_lock_is_awaited(self, path):
        store = flowstore.SQLiteDataStore(path, timeout=float("inf"))
        with locked(path, "BEGIN IMMEDIATE") as locker:
            thread = threading.Thread(target=store.set_cache_entry, args=("k", b"v"), daemon=True)
            thread.start()
            assert store.get_cache_entry("k") is None
            locker.end()
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

    def test_interrupt_by_a_signal_leaves_nothing(self, store, interruptible):
        with pytest.raises(KeyboardInterrupt), store.transaction() as transaction:
            for number in range(1000):
                transaction.set_cache_entry(str(number), b"1")
                if number == 500:
                    signal.raise_signal(signal.SIGINT)
        assert store.get_cache_entries(map(str, range(1000))) == {}

    def test_writing_by_another_handle_in_its_thread_is_a_runtime_error_at_once(self, store, path, tmp_path):
        with raw_sql(path, "CREATE TABLE legacy (key, value)"):
            pass
        (tmp_path / "link.db").symlink_to(path)
        other, linked = (flowstore.SQLiteDataStore(each, timeout=60) for each in (path, tmp_path / "link.db"))
        with other.session() as session, store.session() as own, own.transaction() as transaction:
            transaction.set_cache_entry("before", b"1")
            writes = [call for call in CALLS if re.match("set|delete|record|save|create", call[0])]
            for handle in (store, other, linked, session, own):
                each_raises(RuntimeError, handle, writes)
                with pytest.raises(RuntimeError), handle.transaction():
                    pass
            for function in (flowstore.destroy_store, flowstore.migrate_process_buckets):
                with pytest.raises(RuntimeError):
                    function(path)
            transaction.set_cache_entry("after", b"2")
        assert store.get_cache_entries(["k", "before", "after"]) == {"before": b"1", "after": b"2"}
        assert sql_values(path, "SELECT name FROM sqlite_master WHERE name = 'legacy'") == ["legacy"]

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
        store = filled(flowstore.SQLiteDataStore(path))

        def work():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            with store.transaction() as transaction:
                transaction.set_cache_entry("small", b"1")
                with pytest.raises(StoreError):
                    transaction.set_cache_entry("large", b"x" * (8 << 20))
                each_raises(StoreError, transaction, CALLS)
            raise AssertionError("the exit was quiet")

        with pytest.raises(StoreError, match="rolled") as caught:
            Forked(work).result()
        checked_error(caught.value, path)
        assert contents_of(store) == contents_of(filled(DictStore()))
        assert store.get_cache_entries(["small", "large"]) == {}
        assert os.listdir(tmp_path) == ["store.db"]

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
        assert store.get_cache_entries(["a", "b", "c"]) == {"a": b"1", "b": b"2", "c": b"3"}

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
        each_raises(RuntimeError, session, [*CALLS, ("transaction", ())])
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
        "Grüße \U0001f600", "select", "sqlitefoo", "%s", "key", "Caches", "x" * 1000, "bac\u212aground"])
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

        def write(numbers):
            for number in numbers:
                with store.transaction() as transaction:
                    for key in ("a", "b"):
                        transaction.set_cache_entry(key, b"%d " % number * 5000)

        write([0])
        writer = Forked(write, range(10**6))
        for number in range(10):
            store.backup(tmp_path / f"backup {number}")
        writer.kill()
        for number in range(10):
            copied = flowstore.SQLiteDataStore(tmp_path / f"backup {number}")
            values = copied.get_cache_entries(["a", "b"])
            assert values["a"] == values["b"]
            assert intact(copied.path)

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
        with pytest.raises(StoreError):
            store.backup(path)
        assert files_in(tmp_path) == before

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
        store = flowstore.SQLiteDataStore(path)
        store.set_cache_entry("k", b"x" * (2 << 20))

        def work():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            store.backup(tmp_path / "backup")

        with pytest.raises(StoreError) as caught:
            Forked(work).result()
        checked_error(caught.value, tmp_path / "backup")
        assert os.listdir(tmp_path) == ["store.db"]

    @needs_root
    def test_backup_from_a_place_that_cannot_be_written_starts_anew_where_the_store_changes(
        self, public_folder, monkeypatch):
        path, target = public_folder / "store.db", public_folder / "new" / "backup"
        filled(flowstore.SQLiteDataStore(path))
        path.chmod(0o644)
        target.parent.mkdir()
        os.chown(target.parent, NOBODY, NOBODY)
        connect, changer = sqlite3.connect, Held(
            lambda: contextlib.nullcontext(flowstore.SQLiteDataStore(path)),
            lambda store: store.set_cache_entry("k", b"changed"))

        class Connection(sqlite3.Connection):
            def backup(self, *arguments):
                super().backup(*arguments)
                if changer.go_on:
                    changer.end()
                    os.read(changer.child.reader, 1)  # it has changed the store

        monkeypatch.setattr(sqlite3, "connect", lambda *values, **options: connect(
            *values, **options, factory=Connection))
        store = flowstore.SQLiteDataStore(path, timeout=60)
        Forked(store.backup, target, user=NOBODY).result()
        changer.child.kill()
        assert flowstore.SQLiteDataStore(target).get_cache_entry("k") == b"changed"


# ---- the command line -------------------------------------------------------------------------------------

HISTORY = [execution_of("build app", started_at=START + timedelta(minutes=minute),
                        duration=timedelta(seconds=seconds),
                        exit_code=code, status=status, error=error, id=str(minute))
           for minute, seconds, code, status, error in [
               (0, 1, 0, "completed", ""), (1, 2, 0, "completed", ""), (2, 8, 3, "failed", "exit status 3")]]


def run_forked(words, input=b"", env=None, cwd=None):
    """What subprocess.run() would return of flowstore with these words; in a fork, which starts sooner."""
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        streams[0].write(input)
        streams[0].seek(0)
        pid = os.fork()
        if not pid:
            status = 70
            try:
                os.setsid()
                signal.alarm(PATIENCE)
                for number, stream in enumerate(streams):
                    os.dup2(stream.fileno(), number)
                sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in enumerate("rww"))
                environment = dict(os.environ if env is None else env)
                os.environ.clear()
                os.environ.update(environment)
                time.tzset()
                os.chdir(cwd or ".")
                flowstore.main([os.fsdecode(word) for word in words])
            except SystemExit as ended:
                status = ended.code
                sys.stdout.flush()
                sys.stderr.flush()
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for stream in streams:
            stream.seek(0)
        return subprocess.CompletedProcess(words, status, *(stream.read() for stream in streams[1:]))


def said_in_one_line(stderr):
    return stderr.startswith(b"flowstore: ") and stderr.count(b"\n") == 1 and stderr.endswith(b"\n")


class Shell:
    """flowstore as a shell runs it, with a store of its own; a program is run as one, else it is forked."""

    def __init__(self, folder, program=None, module_path=SOURCE.parent):
        self.folder = folder
        self.program = program
        self.store = folder / "store.db"
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(module_path),
                            "FLOWSTORE_PATH": str(self.store), "PYTHONDONTWRITEBYTECODE": "1"}

    def __call__(self, *words, stdin=b"", status=0, **environment):
        """What a command prints, once its exit status is as expected, and its complaint one line."""
        if self.program:
            done = self.run(*words, input=stdin, stdout=subprocess.PIPE, **environment)
        else:
            done = run_forked(words, stdin, self.environment | environment, self.folder)
        assert done.returncode == status, done.stderr
        if status == 1:
            assert said_in_one_line(done.stderr)
            assert done.stdout == b""
        elif status == 2:
            assert done.stderr.startswith((b"usage: flowstore", b"flowstore: "))
            assert b"Traceback" not in done.stderr
        else:
            assert done.stderr == b""
        return done.stdout

    def run(self, *words, input=b"", **options):
        """A new process, with what subprocess.run() takes and variables of its environment."""
        variables = {name: options.pop(name) for name in list(options) if name.isupper()}
        return subprocess.run([*(self.program or flowstore_words()), *words], cwd=self.folder, input=input,
                              env=self.environment | variables, stderr=subprocess.PIPE, timeout=60, **options)

    def json(self, *words, **options):
        return json.loads(self(*words, "--json", **options))

    def on_terminal(self, *words, **environment):
        """The lines that a command prints on a terminal."""
        reader, writer = pty.openpty()
        with open(reader, "rb", buffering=0) as screen:
            process = subprocess.Popen(flowstore_words(*words), cwd=self.folder, stdin=subprocess.DEVNULL,
                                       env={**self.environment, "TERM": "xterm", **environment},
                                       stdout=writer, stderr=writer)
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

    @pytest.mark.parametrize("form", ["module", "vendored", "zipapp", "script"])
    def test_each_form_of_distribution_is_the_same_program(self, tmp_path, form):
        folder = tmp_path / "myapp" / "vendor"
        folder.mkdir(parents=True)
        shutil.copy(SOURCE, folder / "flowstore.py")
        packed = tmp_path / "flowstore.pyz"
        zipapp.create_archive(folder, packed, main="flowstore:main")
        words, path = {
            "module": (["-m", "flowstore"], folder), "vendored": (["-m", "myapp.vendor.flowstore"], tmp_path),
            "script": ([folder / "flowstore.py"], ""), "zipapp": ([packed], "")}[form]
        shell = Shell(tmp_path, [sys.executable, *words], path)
        assert shell("run", "r", "--", "sh", "-c", "echo ran; exit 3", status=3) == b"ran\n"
        assert shell.json("history", "r")[0]["exitCode"] == 3
        shell("get", "missing", status=1)
        shell("frobnicate", status=2)

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

    def test_value_comes_from_the_words_or_from_standard_input_less_one_newline(self, shell, store):
        for words, stdin, value in [
                (["v"], b"", "v"), ([""], b"", ""), (["-5"], b"", "-5"), (["--", "-x"], b"", "-x"),
                (["-"], b"v", "v"), ([], b"v\n", "v"), ([], b"", ""), (["-"], b"\n", ""),
                (["-"], b"two\nlines\n\n", "two\nlines\n"), (["-"], b"v\r\n", "v\r"),
                ([b"\xff\xc3\xbc"], b"", "\udcffü"), (["-"], b"\xff\0\xc3\xbc", "\udcff\0ü")]:
            shell("set", "k", *words, stdin=stdin)
            assert store.get_process_var("root", "k") == value
        shell("set", "other", stdin=shell("get", "k"))
        assert store.get_process_var("root", "other") == value

    @pytest.mark.parametrize("environment", [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "utf-16"},
        {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"}], ids=["ascii", "utf-16 streams", "latin-1"])
    def test_bytes_go_through_unchanged_in_any_locale(self, tmp_path, environment):
        if "ISO" in environment.get("LC_ALL", ""):
            before = locale.setlocale(locale.LC_CTYPE)
            try:
                locale.setlocale(locale.LC_CTYPE, environment["LC_ALL"])
            except locale.Error as error:
                pytest.skip(str(error))
            finally:
                locale.setlocale(locale.LC_CTYPE, before)
        shell = Shell(tmp_path, flowstore_words())
        data = bytes(range(256)) + "é\U0001f600\n\n".encode()
        shell("set", "schlüssel".encode(), "-", stdin=data + b"\n", **environment)
        assert shell("get", "schlüssel".encode(), **environment) == data + b"\n"
        shell("set", "k", "größe".encode(), FLOW_PROCESS_BUCKET="prüf \U0001f600", **environment)
        variables = flowstore.SQLiteDataStore(shell.store).get_all_process_vars("prüf_\U0001f600")
        assert {key: by_bytes(value) for key, value in variables.items()} == {
            "k": "größe".encode(), "schlüssel": data}

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

    def test_wrong_usage_is_status_2(self, shell):
        for words in ([], ["frobnicate"], ["get"], ["get", "a", "b"], ["set"], ["set", "a", "b", "c"],
                      ["history", "-n", "many"], ["list", "--al"], ["get", "k", "--unknown"], ["--store"],
                      ["backup"], ["get", ""], ["set", "", "v"], ["background", ""], ["history", ""],
                      ["--store", ":memory:", "list"], ["run"], ["run", "r"], ["run", "r", "--"],
                      ["run", "r", "true"], ["run", "--", "r"], ["run", "", "--", "true"]):
            shell(*words, status=2)
        assert os.listdir(shell.folder) == []

    def test_help_names_every_command(self, shell):
        text = shell("--help").decode()
        for command in ("set", "get", "list", "remove", "clear", "history", "background", "run", "import",
                        "migrate", "prune", "backup", "check", "path"):
            assert re.search(rf"^ *{command}\b", text, re.MULTILINE)
            if command in ("set", "history"):
                assert b"--store" in shell(command, "--help")
        assert shell("--version") == f"flowstore {flowstore.__version__}\n".encode()

    # runs

    def test_history_is_newest_first_and_ends_after_n(self, shell, store):
        for number in range(30):
            start = START + timedelta(seconds=number)
            store.record_execution(execution_of("ab"[number % 2], started_at=start, exit_code=number))
        for number in (30, 31, 32):
            store.record_execution(execution_of("c", exit_code=number))  # all of one instant, the oldest

        def shown(*words):
            return [record["exitCode"] for record in shell.json("history", *words)]

        assert shown() == shown("-n20") == [*range(29, 9, -1)]
        assert shown("-n", "3") == [29, 28, 27]
        assert shown("a", "-n", "0") == [*range(28, -1, -2)]
        assert shown("c") == [32, 31, 30]
        assert len(shown("-n", "0")) == 33
        assert len(shell("history", "-n", "4").splitlines()) == 4

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
        shell("get", "k\n", FLOWSTORE_PATH="new\nline\x1b", status=1)
        assert os.listdir(shell.folder) == []

    def test_migrate_moves_legacy_tables_and_names_them(self, shell, store):
        with raw_sql(shell.store) as sql:
            sql.execute('CREATE TABLE "b\x1b" (key, value)')
            sql.executescript("CREATE TABLE a (key, value); INSERT INTO a VALUES (1, 2)")
        assert shell("list", FLOW_PROCESS_BUCKET="a") == b""
        assert shell("migrate") == b"a\nb\\x1b\n"
        assert shell("migrate") == b""
        assert store.get_all_process_vars("a") == {"1": "2"}

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

    def test_check_of_a_damaged_store_is_status_1(self, shell, store):
        filled(store)
        [page] = sql_values(shell.store, "SELECT rootpage FROM sqlite_master WHERE name = 'cache'")
        [size] = sql_values(shell.store, "PRAGMA page_size")
        with open(shell.store, "r+b") as stream:
            stream.seek((page - 1) * size)
            stream.write(b"\xa5" * size)
        shell("check", status=1)

    @pytest.mark.parametrize("make", [make_text, make_sqlite(TABLES), make_newer, pathlib.Path.mkdir])
    def test_what_is_no_store_is_one_line_and_status_1_and_stays(self, shell, make):
        make(shell.store)
        before = files_in(shell.folder)
        for words in (["set", "k", "v"], ["clear", "--all"]):
            shell(*words, status=1)
        assert files_in(shell.folder) == before

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
        text = shell("history", TZ="XYZ-9", COLUMNS="20", TERM="xterm", CLICOLOR_FORCE="1")
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

    @pytest.mark.parametrize("zone", ["XYZ-12", "XYZ12"])
    def test_history_at_the_ends_of_time_is_shown(self, shell, store, zone):
        for moment in (ZERO_TIME, LAST_TIME):
            store.record_execution(execution_of(started_at=moment, duration=-LONGEST))
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
        (["get", "k"], {}), (["--help"], {}), (["get", "k"], {"PYTHONUNBUFFERED": "1"})])
    def test_closed_pipe_is_quiet_and_a_full_device_one_line(self, shell, store, words, environment):
        store.set_process_var("root", "k", "v" * 100_000)
        reader, writer = os.pipe()
        os.close(reader)
        assert shell.run(*words, stdout=writer, **environment).stderr == b""
        os.close(writer)
        if os.path.exists("/dev/full"):
            with open("/dev/full", "wb") as full:
                done = shell.run(*words, stdout=full, **environment)
            assert said_in_one_line(done.stderr)
            assert done.returncode == 1

    def test_interrupt_is_quiet(self, shell, interruptible):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen(flowstore_words("set", "k"), env=shell.environment, **pipes) as process:
            process.stdin.write(b"v" * (1 << 20))  # more than a pipe holds: the command is reading then
            process.stdin.flush()
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            assert process.stderr.read() == process.stdout.read() == b""
        assert process.returncode in (130, -signal.SIGINT)
        assert not shell.store.exists()


class TestWaiting:
    def test_storm_of_64_processes_fails_and_loses_nothing(self, path):
        store = flowstore.SQLiteDataStore(path, timeout=PATIENCE)

        def work(number):
            for step in range(40):
                store.set_cache_entry(f"{number}.{step}", b"%d" % step)
                assert store.get_cache_entry(f"{number}.{step}") == b"%d" % step

        together(64, work)
        assert files(path) == ["store.db"]
        found = store.get_cache_entries(f"{number}.{step}" for number in range(64) for step in range(40))
        assert len(found) == 64 * 40

    @pytest.mark.parametrize("use", [
        lambda path: flowstore.SQLiteDataStore(path, timeout=PATIENCE), flowstore.destroy_store,
        lambda path: flowstore.SQLiteDataStore(path).get_cache_entry("key"),
        lambda path: flowstore.SQLiteDataStore(path).set_cache_entry("key", b"")],
        ids=["open", "destroy", "read", "write"])
    def test_whoever_has_the_file_to_himself_is_waited_for(self, path, use):
        flowstore.SQLiteDataStore(path)
        mode = "PRAGMA locking_mode = EXCLUSIVE"
        with locked(path, mode, "BEGIN EXCLUSIVE", "SELECT * FROM cache") as holder:
            waiter = threading.Timer(0.1, holder.end)
            waiter.start()
            use(path)
            waiter.join()

    def test_store_that_was_taken_out_of_wal_mode_serves(self, path):
        store = flowstore.SQLiteDataStore(path, timeout=PATIENCE)
        assert sql_values(path, "PRAGMA journal_mode = DELETE") == ["delete"]

        def work(number):
            for step in range(10):
                store.set_cache_entry(f"{number}.{step}", b"")
                store.get_cache_entry("key")

        together(4, work)
        flowstore.SQLiteDataStore(path)
        assert len(store.get_cache_entries(f"{n}.{step}" for n in range(4) for step in range(10))) == 40
        assert sql_values(path, "PRAGMA journal_mode") == ["wal"]


def open_first(path, number):
    store = flowstore.SQLiteDataStore(path, timeout=PATIENCE)
    store.set_cache_entry(str(number), b"%d" % number)
    assert store.get_cache_entry(str(number)) == b"%d" % number


class TestFirstOpen:
    @pytest.mark.parametrize("start", ["missing", "empty"])
    def test_first_open_by_32_processes_fails_and_loses_nothing(self, path, start):
        for _ in range(10):
            if start == "empty":
                with open(path, "xb"):
                    os.chmod(path, 0o644)
            together(32, lambda number: open_first(path, number))
            assert files(path) == ["store.db"]
            assert mode_of(path) == 0o600
            store = flowstore.SQLiteDataStore(path)
            assert len(store.get_cache_entries(map(str, range(32)))) == 32
            os.unlink(path)

    def test_first_open_in_a_missing_folder_by_many(self, path):
        path = os.path.join(os.path.dirname(path), "a", "b", "store.db")
        together(16, lambda number: open_first(path, number))
        assert files(path) == ["store.db"]

    def test_killed_in_a_first_open_leaves_what_the_next_open_clears(self, path):
        dice = random.Random(3)
        for _ in range(12):
            children = [Forked(open_first, path, number) for number in range(2)]
            time.sleep(dice.random() * 0.008)
            for child in children:
                child.kill()
            open_first(path, 0)
            assert files(path) == ["store.db"] and intact(path)
            flowstore.destroy_store(path)
            assert files(path) == []


class TestKill:
    def test_acknowledged_writes_survive_kills(self, path):
        store = flowstore.SQLiteDataStore(path, timeout=PATIENCE)
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
            while not os.path.exists(path + ".stop"):
                store.get_cache_entries(["0.0.0", "1.1.1"])

        os.set_blocking(reader, False)
        acknowledged, kills = b"", 0
        readers = [Forked(read) for _ in range(2)]
        while kills < 200:
            children = [Forked(write, f"{kills}.{number}") for number in range(4)]
            time.sleep(dice.random() * 0.03)
            for child in children:
                child.kill()
            kills += len(children)
            with contextlib.suppress(BlockingIOError):
                while lines := os.read(reader, 1 << 20):
                    acknowledged += lines
        with open(path + ".stop", "x"):
            pass
        for child in readers:
            child.result()
        keys = acknowledged.decode().split()
        assert keys
        keys += [f"{key}!" for key in keys if int(key.rpartition(".")[2]) % 8 == 0]
        found = store.get_cache_entries(keys)
        assert [key for key in keys if key not in found] == []
        assert intact(path) and files(path) == ["store.db", "store.db.stop"]


FRAME = 24 + 4096


class Copies:
    """A store copied in the middle of its use: its WAL has 20 transactions that set the same three keys."""

    def __init__(self, path):
        self.folder = os.path.dirname(path)
        store = flowstore.SQLiteDataStore(path)
        with store.session() as session:
            for number in range(1, 21):
                with session.transaction() as transaction:
                    transaction.set_cache_entry("first", b"%d" % number)
                    transaction.set_process_var("bucket", "second", str(number))
                    transaction.set_cache_entry("third", b"%d" % number * 3000)
            with open(path, "rb") as main, open(path + "-wal", "rb") as wal:
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
        path = os.path.join(self.folder, f"{self.count}.db")
        for name, data in ((path, self.main), (path + "-wal", wal)):
            with open(name, "xb") as stream:
                stream.write(data)
        store = flowstore.SQLiteDataStore(path)
        first = store.get_cache_entry("first") or b"0"
        assert store.get_cache_entry("third") == (first * 3000 if first != b"0" else None)
        assert store.get_all_process_vars("bucket").get("second", "0") == first.decode()
        store.set_cache_entry("first", b"after")
        assert store.get_cache_entry("first") == b"after" and intact(path)
        os.unlink(path)
        return int(first)


class TestPowerLoss:
    @pytest.fixture
    def copies(self, path):
        return Copies(path)

    def test_wal_cut_anywhere_is_a_prefix_of_what_was_acknowledged(self, copies):
        frames = (len(copies.wal) - 32) // FRAME
        assert len(copies.commits) == 20 and frames > 40
        for frame in range(frames + 1):
            cut = 32 + frame * FRAME + frame % 2 * 2000
            assert copies.opened(copies.wal[:cut]) == copies.survivors(frame), cut

    def test_wal_damaged_anywhere_is_a_prefix_of_what_was_acknowledged(self, copies):
        dice = random.Random(11)
        for _ in range(40):
            at = dice.randrange(dice.choice((32, len(copies.wal))))
            wal = bytearray(copies.wal)
            wal[at] ^= dice.randrange(1, 256)
            assert copies.opened(wal) == copies.survivors(max(at - 32, 0) // FRAME * (at >= 32)), at

    def traced(self, path, kind, count):
        """The system calls of so many writes, as lines of strace."""
        program = """if True:
            import contextlib, os, sys, flowstore
            store, kind = flowstore.SQLiteDataStore(sys.argv[1]), sys.argv[2]
            with contextlib.nullcontext(store) if kind == "operation" else getattr(store, kind)() as user:
                for number in range(int(sys.argv[3])):
                    user.set_cache_entry(f"key {number}", b"%d" % number)
                    if kind != "transaction":
                        os.write(2, b"RETURNED")
            os.write(2, b"RETURNED")"""
        if not shutil.which("strace"):
            pytest.skip("needs strace")
        command = ["strace", "-f", "-y", "-e", "trace=write,pwrite64,fsync,fdatasync", "-o", path + ".log",
                   sys.executable, "-c", program, path, kind, str(count)]
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE)
        if done.returncode and b"ptrace" in done.stderr:
            pytest.skip("strace may not trace here")
        assert done.returncode == 0, done.stderr
        with open(path + ".log") as stream:
            return stream.read().splitlines()

    @pytest.mark.parametrize("kind", ["operation", "session", "transaction"])
    def test_write_is_synced_before_the_call_returns(self, path, kind):
        pending = returned = written = 0
        for line in self.traced(path, kind, 3):
            if "store.db-wal>" in line:
                written += "pwrite64(" in line
                pending = "pwrite64(" in line
            elif "RETURNED" in line:
                assert not pending, "the last write to the WAL was not synced"
                returned += 1
        assert written and returned == (1 if kind == "transaction" else 4)

    def test_transaction_lands_with_the_syncs_of_one_write(self, path):
        flowstore.SQLiteDataStore(path)
        one, many = (sum("sync(" in line for line in self.traced(path, "transaction", n)) for n in (1, 100))
        assert one == many > 0


class TestWal:
    def test_wal_stays_bounded_though_the_store_is_never_left_alone(self, path):
        store = flowstore.SQLiteDataStore(path, timeout=PATIENCE)

        def work(number):
            largest = 0
            with store.session() as session:  # held open, so that no close clears the WAL
                for step in range(100):
                    session.set_cache_entry(f"{number}.{step % 5}", os.urandom(40_000))
                    session.get_cache_entries([f"{other}.{step % 5}" for other in range(6)])
                    largest = max(largest, os.stat(path + "-wal").st_size)
            return largest

        largest = max(together(6, work))
        assert 4 << 20 < largest < 6 << 20  # of 24 MB written
        assert os.stat(path).st_size < 3 << 20
        assert files(path) == ["store.db"]

    def test_stalled_reader_makes_no_writer_wait(self, path):
        store = flowstore.SQLiteDataStore(path, timeout=0)  # any wait at all would be an error
        store.set_cache_entry("key", b"old")
        select = "SELECT value FROM cache"
        holder = Held(lambda: raw_sql(path, "BEGIN", select), lambda sql: sql.execute(select).fetchall())
        for number in range(200):
            store.set_cache_entry("key", b"%d" % number * 20_000)
        assert os.stat(path + "-wal").st_size > 6 << 20  # what the reader sees can't be overwritten
        with store.session() as session:
            assert holder.result() == [(b"old",)]
            for number in range(3):
                session.set_cache_entry("key", b"%d" % number)
            assert os.stat(path + "-wal").st_size < 1 << 20


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


def use_for_a_while(path, seconds, kind, number):
    """A log of writes, each read back, or of destroys: (from, to, whether it was there; None: a destroy)."""
    store, dice, end, log, step = None, random.Random(number), time.monotonic() + seconds, [], 0
    pause = {"never pauses": 0, "destroys": 0.05}.get(kind, 0.02)
    while (start := time.monotonic()) < end:
        step += 1
        with contextlib.suppress(StoreError):  # who loses a race may be told so
            if kind == "destroys":
                try:
                    flowstore.destroy_store(path)
                finally:  # one that is busy has emptied it too
                    log.append((start, time.monotonic(), None))
            elif kind == "reads":
                flowstore.SQLiteDataStore(path).get_cache_entries(["0.1", "1.1"])
            else:
                if store is None or kind == "opens first":
                    store = flowstore.SQLiteDataStore(path, timeout=PATIENCE)
                with store.session() if kind == "holds sessions" else contextlib.nullcontext(store) as user:
                    user.set_cache_entry(f"{number}.{step}", bytes(dice.choice((1, 9000))))
                    time.sleep(dice.random() * pause)
                    found = user.get_cache_entry(f"{number}.{step}")
                    log.append((start, time.monotonic(), found is not None))
        time.sleep(dice.random() * pause)
    return log


class TestDestroy:
    @pytest.mark.parametrize("crowd", [
        ["never pauses"] * 4, ["pauses"] * 24,
        ["never pauses", "pauses", "opens first", "holds sessions", "reads"] * 6],
        ids=["never pause", "pause", "all kinds"])
    def test_destroys_under_use_lose_nothing_later(self, path, crowd):
        kinds = ["destroys", "destroys", *crowd]
        logs = together(len(kinds), lambda number: use_for_a_while(path, 0.5, kinds[number], number))
        entries = [entry for log in logs for entry in log]
        destroys = [entry[:2] for entry in entries if entry[2] is None]
        assert destroys and len(entries) > len(destroys)
        for start, end, found in entries:
            assert found is not False or any(begun < end and start < ended for begun, ended in destroys)
        store = flowstore.SQLiteDataStore(path)
        store.set_cache_entry("key", b"")
        assert files(path) == ["store.db"] and intact(path)
        flowstore.destroy_store(path)
        assert files(path) == []

    @pytest.mark.parametrize("others", ["destroy", "make anew", "hold"])
    @pytest.mark.parametrize("use", [
        lambda store: store.get_cache_entry("key"),
        lambda store: store.set_cache_entry("mine", b"mine"),
        lambda store: flowstore.SQLiteDataStore(store.path).get_cache_entry("key"),
        lambda store: [*map(set_mine, [store.session()])],
        lambda store: [*map(set_mine, [store.transaction()])],
    ], ids=["read", "write", "open", "session", "transaction"])
    def test_overtaken_between_open_and_lock_uses_the_new_store(self, path, use, others):
        store = flowstore.SQLiteDataStore(path)
        store.set_cache_entry("key", b"old")
        resume = overtaken(use, store)
        flowstore.destroy_store(path)
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
        assert files(path) in (["store.db"], []) and (not files(path) or intact(path))

    def test_killed_destroyer_leaves_what_the_next_open_clears(self, path):
        dice = random.Random(5)
        for _ in range(60):
            store = flowstore.SQLiteDataStore(path)
            store.set_cache_entry("key", bytes(10_000))
            child = Forked(flowstore.destroy_store, path)
            time.sleep(dice.random() * 0.006)
            child.kill()
            flowstore.SQLiteDataStore(path).set_cache_entry("another", b"")
            assert files(path) == ["store.db"] and intact(path)

    def test_store_that_somebody_holds_is_emptied_and_stays(self, path, clock):
        store = flowstore.SQLiteDataStore(path)
        store.set_process_var("root", "secret", "hunter2" * 500)
        holder = Held(store.session, lambda session: session.get_all_process_vars("root"))
        start = clock[0]
        with pytest.raises(StoreBusyError, match=r"emptied.* file is left") as caught:
            flowstore.destroy_store(path)
        assert caught.value.path == path
        assert clock[0] - start == pytest.approx(3, abs=0.01)
        assert store.get_all_process_vars("root") == holder.result() == {}
        with open(path, "rb") as stream:
            assert b"hunter2" not in stream.read()
        flowstore.destroy_store(path)
        assert files(path) == []

    def test_wal_of_a_killed_process_goes_with_the_store(self, path):
        store = flowstore.SQLiteDataStore(path)
        holder = Held(store.session)
        store.set_cache_entry("key", bytes(10_000))
        holder.child.kill()
        assert files(path) == ["store.db", "store.db-shm", "store.db-wal"]
        flowstore.destroy_store(path)
        assert files(path) == []
        assert flowstore.SQLiteDataStore(path).get_cache_entry("key") is None


def is_free(store):
    """Whether nobody has the write lock, asked at once by another thread."""
    brief = flowstore.SQLiteDataStore(store.path, timeout=0)
    return in_a_thread(lambda: brief.set_cache_entry("is free", b"")) is None


class TestTransactionEnds:
    @pytest.fixture
    def store(self, path):
        return flowstore.SQLiteDataStore(path)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
    def test_any_exception_takes_it_back_and_frees_the_lock_at_once(self, store, error):
        def steps():
            with store.transaction() as transaction:
                transaction.set_cache_entry("key", b"")
                yield

        generator = steps()
        next(generator)
        assert not is_free(store)
        with contextlib.suppress(error):
            generator.throw(error("reason"))
        assert is_free(store)
        assert store.get_cache_entry("key") is None

    @posix_only
    def test_interrupt_at_any_moment_leaves_no_lock(self, store):
        def interrupt(*_):
            raise KeyboardInterrupt

        def use(nested):
            outer = store.session() if nested else contextlib.nullcontext(store)
            with outer as user, user.transaction() as transaction:
                for number in range(3):
                    transaction.set_cache_entry("key", b"%d" % number)

        def work():
            dice, interrupted = random.Random(4), 0
            signal.signal(signal.SIGALRM, interrupt)
            for number in range(400):
                try:
                    signal.setitimer(signal.ITIMER_REAL, dice.random() * 0.003 + 1e-6)
                    try:
                        use(number % 2)
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
                assert is_free(store)
            return interrupted

        assert Forked(work).result() > 50

    def test_killed_one_is_taken_back(self, store):
        holder = Held(store.transaction)
        assert not is_free(store)
        holder.child.kill()
        assert is_free(store)

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
            with pytest.raises(StoreError, match="rolled") as caught, store.transaction() as transaction:
                transaction.set_cache_entry("key", b"after")
                with pytest.raises(StoreError, match=r"disk/store\.db.* full"):
                    transaction.set_cache_entry("large", bytes(3_000_000))
            checked_error(caught.value, store.path)
            assert store.get_cache_entries(["key", "large"]) == {"key": b"before"}
            store.set_cache_entry("key", b"after")
            assert os.listdir(disk) == ["store.db"]
        finally:
            gc.collect()
            subprocess.run(["umount", disk], check=True)


class TestThreads:
    def test_threads_share_a_store(self, path):
        store = flowstore.SQLiteDataStore(path, timeout=PATIENCE)

        def work(number):
            for step in range(20):
                store.set_cache_entry(f"{number}.{step}", b"%d" % step)
                assert store.get_cache_entry(f"{number}.{step}") == b"%d" % step
            with store.transaction() as transaction:
                transaction.set_cache_entry(str(number), b"")

        with ThreadPoolExecutor(8) as pool:
            assert [*pool.map(work, range(8))] == [None] * 8
        assert len(store.get_cache_entries(map(str, range(8)))) == 8
        assert files(path) == ["store.db"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestForks:
    def test_forks_of_several_threads_amid_the_operations_of_others(self, path):
        store, stop = flowstore.SQLiteDataStore(path, timeout=PATIENCE), threading.Event()

        def use(number):
            step = 0
            while not stop.is_set():
                step += 1
                store.set_cache_entry(f"thread {number}", b"%d" % step)
                assert store.get_cache_entry(f"thread {number}") == b"%d" % step

        def fork(number):
            return [Forked(open_first, path, child) for child in range(5 * number, 5 * number + 5)]

        with ThreadPoolExecutor(8) as pool:
            users = [pool.submit(use, number) for number in range(4)]
            try:
                children = [child for each in pool.map(fork, range(4)) for child in each]
            finally:
                stop.set()
            assert [user.result() for user in users] == [None] * 4
        for child in children:
            child.result()
        assert len(store.get_cache_entries(map(str, range(20)))) == 20
        assert files(path) == ["store.db"] and intact(path)

    @pytest.mark.parametrize("kind", ["session", "transaction"])
    def test_one_opened_before_a_fork_is_refused_and_unharmed(self, path, kind):
        store = flowstore.SQLiteDataStore(path)

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
        assert all(path in message for message in messages)
        assert store.get_cache_entries(["key", "mine"]) == {"mine": b"after"}
        assert files(path) == ["store.db"] and intact(path)

    def test_another_store_serves_after_a_fork_in_a_session(self, path):
        flowstore.SQLiteDataStore(path)
        with flowstore.SQLiteDataStore(path + ".other").session():
            Forked(open_first, path, 1).result()
        assert flowstore.SQLiteDataStore(path).get_cache_entry("1") == b"1"

    @pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
    def test_multiprocessing(self, path, method):
        store = flowstore.SQLiteDataStore(path)
        store.set_cache_entry("key", b"")
        context = multiprocessing.get_context(method)
        commands = [["--store", path, "set", "--global", str(number), "value"] for number in range(3)]
        processes = [context.Process(target=flowstore.main, args=(command,)) for command in commands]
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 0
        assert store.get_all_process_vars("root") == dict.fromkeys("012", "value")
        assert files(path) == ["store.db"]


ON_LINUX = os.path.exists("/proc/self/ns/pid")
linux_only = pytest.mark.skipif(not ON_LINUX, reason="/proc tells where a process lives")


@pytest.fixture(autouse=True)
def runs_environment(monkeypatch, tmp_path):
    """A store of the test's own, and nothing in the environment that says otherwise."""
    for name in [*os.environ]:
        if name.startswith(("FLOW_", "FLOWSTORE_")) and name != "FLOWSTORE_TEST_FACTORY":
            monkeypatch.delenv(name)
    monkeypatch.setenv("FLOWSTORE_PATH", str(tmp_path / "s.db"))
    monkeypatch.setenv("PYTHONPATH", str(SOURCE.parent))


@pytest.fixture
def runs_store(runs_environment):
    return flowstore.SQLiteDataStore()


def flowstore_words(*words):
    return [sys.executable, "-m", "flowstore", *words]


def flowstore_done(*words, **settings):
    """The command line run to its end, apart from any terminal; forked, but for what takes a new process."""
    if not settings.keys() - {"input", "env", "cwd"}:
        return run_forked(words, **settings)
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **settings}
    return subprocess.run(flowstore_words(*words), timeout=PATIENCE, start_new_session=True, **settings)


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
        process.communicate(timeout=PATIENCE)


def flowstore_json(*words):
    result = flowstore_done(*words, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def eventually(condition):
    end = time.monotonic() + PATIENCE
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


class TestExecution:
    def test_entry_records_a_running_run_in_a_scope_of_its_name(self, runs_store):
        before = datetime.now(UTC)
        with runs_store.execution("build app", label="l", command="c", spec="s", log_archive_id="a") as run:
            record = newest_run(runs_store, "build app")
            assert before <= record.started_at <= datetime.now(UTC)
            assert record == ExecutionRecord(
                "build app", record.started_at, id=run.id, status="running", pid=os.getpid(), label="l",
                command="c", spec="s", log_archive_id="a", source="cli", working_dir=os.getcwd())
            assert (run.ref, run.bucket) == ("build app", run.id)
            assert runs_store.list_process_buckets() == [run.bucket]

    @pytest.mark.parametrize(("raised", "fields", "status", "exit_code", "error"), [
        (None, {}, "completed", 0, ""),
        (None, {"exit_code": 3}, "failed", 3, ""),
        (None, {"error": "no luck"}, "failed", 0, "no luck"),
        (None, {"log_archive_id": "log 7"}, "completed", 0, ""),
        (ValueError("boom"), {}, "failed", 1, "boom"),
        (ValueError(), {}, "failed", 1, "ValueError"),
        (OSError("a \udcff name"), {}, "failed", 1, "name"),
        (ValueError("boom"), {"exit_code": 7}, "failed", 7, "boom"),
        (ValueError("boom"), {"error": "mine"}, "failed", 1, "mine"),
        (SystemExit(), {}, "completed", 0, ""),
        (SystemExit(4), {}, "failed", 4, ""),
        (SystemExit(True), {}, "failed", 1, ""),
        (SystemExit("bad flag"), {}, "failed", 1, "bad flag"),
        (SystemExit(2**70), {}, "failed", 2**63 - 1, ""),
        (KeyboardInterrupt(), {}, "failed", 130, "KeyboardInterrupt"),
    ])
    def test_each_exit_is_recorded_and_goes_on(self, runs_store, raised, fields, status, exit_code, error):
        caught = None
        try:
            with runs_store.execution("x", id="one") as run:
                for name, value in fields.items():
                    setattr(run, name, value)
                runs_store.set_process_var(run.bucket, "secret", "v")
                if raised is not None:
                    raise raised
        except BaseException as error_of_the_block:
            caught = error_of_the_block
        assert caught is raised
        [record] = runs_store.get_execution_history("x")
        assert (record.status, record.exit_code) == (status, exit_code)
        assert error in record.error and bool(error) == bool(record.error)
        assert record.started_at <= record.completed_at
        assert timedelta(0) <= record.duration < timedelta(seconds=PATIENCE)
        assert record.log_archive_id == fields.get("log_archive_id", "")
        assert runs_store.list_process_buckets() == []
        assert "secret" not in runs_store.get_all_process_vars("one")

    def test_provenance_comes_from_the_environment_unless_it_is_given(self, runs_store, monkeypatch):
        monkeypatch.setenv("FLOW_RUN_SOURCE", "${WHERE_FROM}")
        monkeypatch.setenv("FLOW_RUN_CLIENT", "editor ${WHERE_FROM}")
        monkeypatch.setenv("FLOW_RUN_SESSION", "${NOT_SET}")
        found = []
        for variable, fields in [("mcp", {}), ("", {}), ("mcp", {
                "source": "desktop", "client_name": "", "session_id": "s", "working_dir": "/e"})]:
            monkeypatch.setenv("WHERE_FROM", variable)
            with runs_store.execution("x", **fields):
                record = newest_run(runs_store, "x")
            found.append((record.source, record.client_name, record.session_id))
        client = "editor ${WHERE_FROM}"
        assert found == [("mcp", client, ""), ("cli", client, ""), ("desktop", "", "s")]
        assert record.working_dir == "/e"

    @pytest.mark.parametrize(("arguments", "error"), [
        *(({"id": id}, ValueError) for id in (
            "", "a\0b", "a:b", "a/b", "a b", "x" * 256, "é" * 128, "root", "\ud800")),
        ({"ref": ""}, ValueError), ({"ref": 5}, TypeError), ({"id": 5}, TypeError), ({"id": b"x"}, TypeError),
        ({"label": None}, TypeError), ({"command": ["true"]}, TypeError), ({"source": "\ud800"}, ValueError)])
    def test_wrong_argument_leaves_no_trace(self, runs_store, arguments, error):
        with pytest.raises(error), runs_store.execution(**{"ref": "x", **arguments}):
            pytest.fail("began")
        assert runs_store.list_execution_refs() == runs_store.list_process_buckets() == []

    @pytest.mark.parametrize("id", ["x" * 255, "é" * 127, "a\nb", "Root", "a\udcff", "🚀"])
    def test_id_is_the_scope_that_a_child_finds(self, runs_store, monkeypatch, id):
        with runs_store.execution("x", id=id) as run:
            monkeypatch.setenv("FLOW_PROCESS_BUCKET", run.env["FLOW_PROCESS_BUCKET"])
            assert flowstore.environment_bucket() == run.bucket == run.id == id
            assert newest_run(runs_store, "x").id == id

    def test_parallel_runs_of_one_ref_have_two_scopes_and_keep_their_order(self, runs_store):
        with runs_store.execution("x") as one:
            runs_store.set_process_var(one.bucket, "a", "1")
            with runs_store.execution("x") as two:
                runs_store.set_process_var(two.bucket, "a", "2")
                assert runs_store.get_process_var(one.bucket, "a") == "1"
                assert len(runs_store.get_execution_history("x")) == 2
            assert runs_store.list_process_buckets() == [one.bucket]
            assert runs_store.get_process_var(one.bucket, "a") == "1"
        records = runs_store.get_execution_history("x")
        assert [(record.id, record.status) for record in records] == [
            (one.id, "completed"), (two.id, "completed")]
        assert runs_store.list_process_buckets() == []
        assert not set(one.id) & set("\0:/ ")

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

    def test_start_and_end_are_one_transaction_each(self, runs_store, monkeypatch):
        statements = []
        with_watched_connections(monkeypatch, lambda sql: sql.set_trace_callback(statements.append))
        with runs_store.execution("x"):
            assert statements.count("COMMIT") == 1
        assert statements.count("COMMIT") == 2

    def test_removed_working_directory_does_not_matter(self, runs_store, tmp_path, monkeypatch):
        (tmp_path / "away").mkdir()
        monkeypatch.chdir(tmp_path / "away")
        (tmp_path / "away").rmdir()
        with runs_store.execution("x"):
            pass
        assert newest_run(runs_store, "x").status == "completed"
        monkeypatch.undo()

    def test_start_or_end_that_cannot_be_recorded_is_a_store_error(self, runs_store):
        execution = runs_store.execution("x")
        with pytest.raises(StoreError), runs_store.execution("x"):
            os.unlink(runs_store.path)
            os.mkdir(runs_store.path)
        with pytest.raises(StoreError), execution:
            pytest.fail("began")

    def test_end_that_cannot_be_recorded_does_not_hide_the_error_of_the_body(self, runs_store):
        with pytest.raises(KeyError, match="mine"), runs_store.execution("x"):
            os.unlink(runs_store.path)
            os.mkdir(runs_store.path)
            raise KeyError("mine")

    def test_execution_inside_a_transaction_is_refused_at_once(self, runs_store):
        with runs_store.transaction(), pytest.raises(RuntimeError), runs_store.execution("x"):
            pytest.fail("began")


RUN_STATUSES = [
    (["sh", "-c", "exit 3"], 3, "exit status 3"), (["sh", "-c", "kill -9 $$"], 137, "killed by signal 9"),
    (["sh", "-c", "kill -2 $$"], 130, "killed by signal 2"),
    (["no such command"], 127, "no such command"), (["/"], 126, "/"), (["/etc/hosts"], 126, "/etc/hosts")]


class TestRunCommand:
    def test_status_is_the_commands_own(self, runs_store):
        for command, status, error in RUN_STATUSES:
            result = flowstore_done("run", "r", "--", *command)
            assert result.returncode == status, result.stderr
            assert said_in_one_line(result.stderr) if status in (126, 127) else result.stderr == b""
            record = newest_run(runs_store, "r")
            assert (record.exit_code, record.status) == (status, "failed")
            assert error in record.error
        assert runs_store.list_process_buckets() == []

    def test_all_after_the_first_dashes_is_the_commands(self, runs_store):
        words = ["%s|", "--", "a b", "--store", "x", "--json", "-h", "", "--", "é\n"]
        result = flowstore_done("run", "r", "--", "printf", *words)
        assert result.stdout.decode() == "--|a b|--store|x|--json|-h||--|é\n|"
        assert newest_run(runs_store, "r").command == shlex.join(["printf", *words])

    def test_options_stand_before_or_after(self, tmp_path):
        other = str(tmp_path / "other.db")
        for words in (["--store", other, "--json", "run", "r"], ["--json", "--store", other, "run", "r"],
                      ["run", "--store", other, "r"], ["run", "r", f"--store={other}", "--json"]):
            result = flowstore_done(*words, "--", "sh", "-c", "echo said; exit 3")
            assert (result.returncode, result.stdout, result.stderr) == (3, b"said\n", b"")
        assert len(flowstore.SQLiteDataStore(other).get_execution_history("r")) == 4
        assert flowstore_done("--store", "", "run", "r", "--", "true").returncode == 0
        assert len(flowstore.SQLiteDataStore().get_execution_history("r")) == 1

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
            assert runner.wait(PATIENCE) == 41
        assert newest_run(runs_store, "r").exit_code == 41

    def test_command_that_dies_of_a_passed_signal_is_recorded_with_it(self, runs_store):
        with flowstore_started("run", "r", "--", "sh", "-c", "echo ready; exec sleep 60") as runner:
            runner.send_signal(signal.SIGTERM)
            assert runner.wait(PATIENCE) == 143
            assert runner.stderr.read() == b""
        assert newest_run(runs_store, "r").error == "killed by signal 15"

    def test_nohup_run_outlives_the_hangup(self, runs_store):
        words = ["nohup", *flowstore_words("run", "r", "--", "sh", "-c", "echo ready; read x; exit 5")]
        with flowstore_started(program=words) as runner:
            os.killpg(runner.pid, signal.SIGHUP)
            runner.communicate(b"\n", PATIENCE)
            assert runner.returncode == 5
        assert newest_run(runs_store, "r").exit_code == 5

    def test_signal_after_the_command_does_not_lose_its_end(self, runs_store):
        with flowstore_started("run", "r", "--", "sh", "-c", "echo $$; read x; exit 6") as runner:
            with raw_sql(runs_store.path, "BEGIN IMMEDIATE"):  # so that the end has to wait
                runner.stdin.write(b"\n")
                runner.stdin.flush()
                eventually(lambda: process_is_gone(int(runner.said)))
                runner.send_signal(signal.SIGINT)
                runner.send_signal(signal.SIGTERM)
            assert runner.wait(PATIENCE) == 6
        assert newest_run(runs_store, "r").exit_code == 6

    @linux_only
    @needs_root
    def test_signal_that_may_not_be_passed_on_does_not_end_the_run(self, runs_store):
        ctypes = pytest.importorskip("ctypes")

        def without_the_right_to_kill():
            ctypes.CDLL(None).prctl(24, 5)  # PR_CAPBSET_DROP, CAP_KILL

        script = "import os, sys; os.setuid(65534); print('ready', flush=True); sys.stdin.read(); sys.exit(6)"
        with flowstore_started("run", "r", "--", sys.executable, "-c", script,
                               preexec_fn=without_the_right_to_kill) as runner:
            runner.send_signal(signal.SIGTERM)
            runner.communicate(b"", PATIENCE)
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
                          timeout=PATIENCE, **settings)


class TestRunThatCannotBeRecorded:
    def unrecorded(self, result, status=5):
        assert result.returncode == status, result
        assert said_in_one_line(result.stderr), result.stderr
        assert b"recorded" in result.stderr

    COMMAND = ("--", "sh", "-c", "echo ran; exit 5")

    @pytest.mark.parametrize("make", [pathlib.Path.mkdir, make_text, make_bbolt])
    def test_path_that_is_no_store_runs_the_command(self, tmp_path, make):
        make(tmp_path / "in the way")
        before = files_in(tmp_path)
        result = flowstore_done("run", "--store", tmp_path / "in the way", "r", *self.COMMAND)
        self.unrecorded(result)
        assert result.stdout == b"ran\n"
        assert files_in(tmp_path) == before

    def test_unknown_place_runs_the_command(self, monkeypatch):
        for name in ("FLOWSTORE_PATH", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", "relative")
        self.unrecorded(flowstore_done("run", "r", *self.COMMAND))

    def test_command_not_found_without_a_record_is_127(self):
        result = flowstore_done("--store", "/proc/none/s.db", "run", "r", "--", "no such command")
        assert result.returncode == 127

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
    def test_full_standard_error_does_not_change_the_status(self):
        with open("/dev/full", "wb") as full:
            result = flowstore_done("run", "--store", "/proc/none/s.db", "r", *self.COMMAND, stderr=full)
            assert result.returncode == 5
            result = flowstore_done("run", "r", "--", "no such command", stderr=full)
            assert result.returncode == 127

    def test_standard_error_that_nobody_reads_does_not_change_the_status(self):
        source, sink = os.pipe()
        os.close(source)
        result = flowstore_done("--store", "/proc/none/s.db", "run", "r", *self.COMMAND, stderr=sink)
        os.close(sink)
        assert (result.returncode, result.stdout) == (5, b"ran\n")

    @pytest.mark.parametrize("spoil", [
        'cat /dev/zero >"$1/fill" 2>/dev/null || :', 'mount -o remount,ro "$1"'], ids=["full", "read-only"])
    def test_full_or_read_only_disk_runs_the_command(self, tmp_path, spoil):
        script = f'''mount -t tmpfs -o size=256k none "$1"; export FLOWSTORE_PATH="$1/s.db"; $fs set A 1
            {spoil}; $fs run r -- sh -c 'exit 5' '''
        self.unrecorded(in_private_mounts(script, tmp_path))

    @pytest.mark.parametrize(("spoil", "repair"), [
        ('cat /dev/zero >"$0/fill" 2>/dev/null', 'rm "$1/fill"'),
        ('mount -o remount,ro "$0"', ":")], ids=["full", "read-only"])
    def test_disk_that_the_command_spoils_loses_only_the_end(self, tmp_path, spoil, repair):
        script = f'''mount -t tmpfs -o size=256k none "$1"; export FLOWSTORE_PATH="$1/s.db"
            $fs run r -- sh -c '{spoil}; exit 5' "$1" && exit 1 || echo $?
            {repair}; $fs history r'''
        result = in_private_mounts(script, tmp_path)
        assert said_in_one_line(result.stderr)
        status, history = result.stdout.decode().split("\n", 1)
        assert status == "5"
        assert "process exited unexpectedly" in history


def own_note(store):
    """Where this process lives, as execution() notes it: machine, boot, namespace and start."""
    with store.execution("note of mine") as run:
        [note] = sql_values(store.path, "SELECT process FROM history WHERE id = ?", run.id)
    store.delete_execution_history("note of mine")
    assert len(note.split(" ")) == 4
    return note.split(" ")


def add_running(store, table, ref="r", id="one", pid=None, started_at=None, note=""):
    """A run that is recorded as running, in a scope of its id."""
    pid = os.getpid() if pid is None else pid
    started_at = started_at or datetime.now(UTC)
    if table == "history":
        store.record_execution(ExecutionRecord(ref, started_at, id=id, status="running", pid=pid))
        if note:
            sql_values(store.path, "UPDATE history SET process = ? WHERE ref = ? AND id = ?", note, ref, id)
    else:
        store.save_background_run(BackgroundRun(id, pid, ref, started_at, "running"))
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
    def test_process_that_is_gone_has_failed_and_so_has_a_pid_beyond_all(self, runs_store, table):
        for pid in (gone_pid(), 2**31, 2**62):
            add_running(runs_store, table, pid=pid)
            assert not is_left_alone(runs_store, table)

    @BOTH_TABLES
    def test_run_without_a_pid_or_whose_process_lives_is_left_alone(self, runs_store, table):
        for pid in (0, -1, -(2**40), 1, os.getppid(), os.getpid()):
            add_running(runs_store, table, pid=pid)
            assert is_left_alone(runs_store, table)

    @linux_only
    @BOTH_TABLES
    def test_process_that_began_after_the_run_is_another_unless_its_note_says_it(self, runs_store, table):
        past = datetime(2001, 1, 1, tzinfo=UTC)
        add_running(runs_store, table, started_at=past)
        assert not is_left_alone(runs_store, table)
        if table == "history":
            add_running(runs_store, table, started_at=past, note=" ".join(own_note(runs_store)))
            assert is_left_alone(runs_store, table)

    @needs_root
    @BOTH_TABLES
    def test_process_of_another_user_is_alive(self, public_folder, table):
        os.chown(public_folder, NOBODY, NOBODY)

        def work():
            with pytest.raises(PermissionError):
                os.kill(os.getppid(), 0)
            store = flowstore.SQLiteDataStore(public_folder / "s.db")
            add_running(store, table, pid=os.getppid())
            return is_left_alone(store, table)

        assert Forked(work, user=NOBODY).result()

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
    @pytest.mark.parametrize(("changed", "alive", "gone"), [  # left if its pid lives, and if it is gone?
        ({}, True, False), ({3: "-"}, True, False),
        ({3: "1"}, False, False),  # its pid has been given to another
        ({1: "another-boot"}, False, False), ({1: "another-boot", 2: "pid:[1]"}, False, False),
        ({0: "another-machine", 1: "another-boot"}, True, True),
        ({2: "pid:[1]"}, True, True), ({2: "pid:[1]", 3: "1"}, True, True)], ids=str)
    def test_note_tells_whether_a_pid_is_still_the_run(self, runs_store, changed, alive, gone):
        note = own_note(runs_store)
        for index, part in changed.items():
            note[index] = part
        for pid, left in ((os.getpid(), alive), (gone_pid(), gone)):
            add_running(runs_store, "history", pid=pid, note=" ".join(note))
            assert is_left_alone(runs_store, "history") == left

    @BOTH_TABLES
    def test_only_running_rows_are_touched(self, runs_store, table):
        add_running(runs_store, table, pid=gone_pid())
        for status in ("completed", "", "paused", "Running"):
            sql_values(runs_store.path, f"UPDATE {table} SET status = ?", status)
            assert is_left_alone(runs_store, table)

    def test_all_that_are_gone_are_counted_and_no_others_touched(self, runs_store):
        pid = gone_pid()
        for number in range(8):
            add_running(runs_store, "history", f"r{number % 3}", str(number), pid if number % 2 else None)
            add_running(runs_store, "background", f"r{number % 3}", f"b{number}", pid if number % 2 else None)
        runs_store.set_process_var("root", "a", "1")
        assert runs_store.reconcile() == 8
        states = {record.id: record.status for records in runs_store.get_all_execution_history().values()
                  for record in records}
        assert states == {str(number): "failed" if number % 2 else "running" for number in range(8)}
        assert len(runs_store.list_process_buckets()) == 9

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

    def test_pid_of_a_wrong_type_is_a_damaged_store(self, runs_store):
        add_running(runs_store, "history")
        for cell in ("abc", 1.5, b"\xff"):
            sql_values(runs_store.path, "UPDATE history SET pid = ?", cell)
            with pytest.raises(CorruptStoreError):
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

    def test_background_view_shows_and_saves_what_is_gone(self, runs_store):
        for words in ((), ("one",)):
            add_running(runs_store, "background", pid=gone_pid())
            shown = flowstore_json("background", *words)
            shown = shown if words else shown[0]
            assert (shown["status"], shown["error"]) == ("failed", "process exited unexpectedly")
            assert runs_store.get_background_run("one").status == "failed"

    def test_view_of_a_run_that_just_ended_shows_its_end(self, runs_store, monkeypatch):
        record = ExecutionRecord("r", START, id="one", status="running", pid=gone_pid())
        runs_store.record_execution(record)
        really_kill = os.kill

        def kill(*arguments):  # it ends in good order between the look at its record and that at its process
            runs_store.record_execution(record._replace(status="completed"))
            really_kill(*arguments)

        monkeypatch.setattr(os, "kill", kill)
        assert runs_store.reconcile() == 0
        runs_store.record_execution(record)
        assert [run["status"] for run in flowstore_json("history")] == ["completed"]

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
        for started_at in (START, now):
            add_running(runs_store, "history", id="", started_at=started_at)
        assert [run["status"] for run in flowstore_json("history", "r")] == ["running", "failed"]
        assert [run.status for run in runs_store.get_execution_history("r")] == ["failed", "running"]

    def test_busy_store_does_not_fail_a_view_or_a_run(self, runs_store, clock):
        add_running(runs_store, "history", pid=gone_pid())
        with locked(runs_store.path, "BEGIN IMMEDIATE"):
            view = flowstore_done("history", "r")
            run = flowstore_done("run", "r", "--", "sh", "-c", "echo ran; exit 5")
        assert (view.returncode, view.stderr) == (0, b"")
        assert b"process exited unexpectedly" in view.stdout
        assert (run.returncode, run.stdout) == (5, b"ran\n")
        assert said_in_one_line(run.stderr)
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
            start = START + timedelta(seconds=number)
            if background:
                t.save_background_run(BackgroundRun(str(number), 7, ref, start, "completed"))
            else:
                t.record_execution(ExecutionRecord(ref, start, id=str(number), error=text))


class TestPrune:
    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @example([("a", 1, "failed")] * 3, 1, None)
    @example([("a", 0, "failed"), ("a", 1, "failed")], None, 1)
    @given(PRUNE_RUNS, st.none() | st.integers(0, 6), st.none() | st.integers(0, 9))
    def test_what_stays_is_what_the_rule_says(self, runs, keep, before):
        with tempfile.TemporaryDirectory() as folder:
            store = flowstore.SQLiteDataStore(os.path.join(folder, "s.db"))
            records, background = [], []
            with store.transaction() as t:
                for number, (ref, second, status) in enumerate(runs):
                    start = START + timedelta(seconds=second)
                    records.append(ExecutionRecord(ref, start, id=str(number), status=status))
                    background.append(BackgroundRun(f"{number:03}", 0, ref, start, status))
                    t.record_execution(records[-1])
                    t.save_background_run(background[-1])
            limit = None if before is None else START + timedelta(seconds=before)

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

    def test_run_that_goes_on_outlives_a_prune(self, runs_store):
        with runs_store.execution("r") as run:
            runs_store.set_process_var(run.bucket, "a", "1")
            assert runs_store.prune(keep=0, before=datetime.now(UTC) + timedelta(days=1)) == (0, 0)
            assert runs_store.get_process_var(run.bucket, "a") == "1"
        assert newest_run(runs_store, "r").status == "completed"

    @pytest.mark.parametrize("keep", [0, 501, 1001, 2**63 - 1])
    def test_many_runs_take_many_steps(self, runs_store, keep):
        add_finished(runs_store, 1002)
        add_finished(runs_store, 1002, background=True)
        gone = max(1002 - keep, 0)
        assert runs_store.prune(keep=keep) == (gone, gone)
        assert [int(run.id) for run in runs_store.get_execution_history("r")] == list(range(gone, 1002))

    def test_wrong_limit_deletes_nothing(self, runs_store):
        add_finished(runs_store, 3)
        for arguments, error in [
                ({"keep": -1}, ValueError), ({"keep": 2**63}, ValueError),
                ({"before": datetime.now()}, ValueError), ({"keep": "3"}, TypeError),
                ({"keep": 1.0}, TypeError), ({"keep": True}, TypeError),
                ({"before": "30d"}, TypeError), ({"keep": 0, "before": timedelta(1)}, TypeError)]:
            with pytest.raises(error):
                runs_store.prune(**arguments)
        assert runs_store.prune() == (0, 0)
        assert len(runs_store.get_execution_history("r")) == 3

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
            runs_store.record_execution(ExecutionRecord("r", now - timedelta(**{age: 31})))
        for number in range(3):
            runs_store.record_execution(ExecutionRecord("q", now, id=str(number)))
        assert flowstore_done("prune", "--before", "32w").stdout == b"history 0\nbackground 0\n"
        for unit in ages:
            assert flowstore_json("prune", "--before", f"30{unit}") == {"history": 1, "background": 0}
        assert flowstore_done("prune", "--keep", "2").stdout == b"history 1\nbackground 0\n"
        assert flowstore_json("prune", "--keep", "1", "--before", "2024-01-01")["history"] == 1
        assert flowstore_json("prune", "--before", "2999-01-01T00:00:00Z")["history"] == 1

    def test_wrong_option_is_wrong_usage(self, runs_store):
        for words in ("--keep=-1", f"--keep={2**63}", "--before=3y", "--before=9999999d", "--before=\u00b3d",
                      f"--before={10**30}d", "--before=0001-01-01T00:00+23:00"):
            result = flowstore_done("prune", words)
            assert result.returncode == 2, words
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
        end = time.monotonic() + PATIENCE
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


# ---- bad places and bad files ------------------------------------------------------------------------------

READS = [each for each in CALLS if each[0].startswith(("get_", "list_"))]
WRITES = [each for each in CALLS if each not in READS]
ADDITIONS = [("set_cache_entry", ("new", b"x")), ("set_cache_entry", ("new", b"x" * 300_000)),
             ("record_execution", (execution_of("new"),)), ("save_background_run", (run_of("new"),)),
             ("create_process_bucket", ("new",)), ("set_process_var", ("new", "new", "x"))]
VIEWS = [["list"], ["history"], ["background"], ["check"]]
WHAT_IS_READ = [getattr(filled(DictStore()), method)(*arguments) for method, arguments in READS]


def called(store, calls):
    """What each call returns, or its StoreError."""
    return [stored(getattr(store, method), *arguments) for method, arguments in calls]


def stored(work, *arguments):
    """What work returns, or the StoreError that it raises."""
    try:
        return work(*arguments)
    except StoreError as error:
        return error


def is_refused(path, work, *arguments, match="."):
    with pytest.raises(StoreError, match=match) as caught:
        work(*arguments)
    assert str(path) in str(caught.value)


def all_are_refused(path, store, calls, match="."):
    for method, arguments in calls:
        is_refused(path, getattr(store, method), *arguments, match=match)


def status_of(*words):
    with pytest.raises(SystemExit) as ended:
        flowstore.main([*map(str, words)])
    return ended.value.code


def serves(store):
    """Whether a filled() store still has what it held, and takes it anew."""
    before = contents_of(store)
    for name in ("cache_entry", "execution_history", "background_run", "process_bucket"):
        getattr(store, f"delete_{name}")("k")
    return before == contents_of(filled(store)) == contents_of(filled(DictStore()))


def as_a_plain_user(work, user=NOBODY):
    """What work returns in a process without root's rights."""
    def child():
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        return work()

    return Forked(child).result()


def mount(*words):
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


def on_a_disk(folder, options, work):
    """What work returns in a process that sees a disk of its own, in memory, at a folder."""
    import ctypes

    def child():
        alone = ctypes.CDLL(None).unshare(0x20000) == 0 and mount("--make-rprivate", "/")  # CLONE_NEWNS
        return (work(),) if alone and mount("-t", "tmpfs", "-o", options, "none", folder) else None

    result = Forked(child).result() if sys.platform == "linux" else None
    return result[0] if result else pytest.skip("can't mount here")


class Disk:
    """A small disk, or a limit on the size of files, that can be full and have room again."""

    def __init__(self, kind, folder):
        self.kind, self.folder, self.path = kind, folder, folder / "store.db"
        folder.mkdir()

    def __call__(self, work):
        if self.kind == "limit":
            return Forked(work).result()
        return on_a_disk(self.folder, {"bytes": "size=400k", "inodes": "nr_inodes=6"}[self.kind], work)

    def fill(self):
        with contextlib.suppress(OSError):
            if self.kind == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, -1))
            for number in range(1000 * (self.kind != "limit")):
                with open(self.folder / f"fill {number}", "wb", buffering=0) as stream:
                    while self.kind == "bytes":
                        stream.write(bytes(4096))

    def make_room(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        for file in self.folder.glob("fill *"):
            file.unlink()


@posix_only
class TestFullDisk:
    SAID = "(?i)full|no space"

    @pytest.fixture(params=["bytes", "inodes", "limit"])
    def disk(self, request, tmp_path):
        return Disk(request.param, tmp_path / "disk")

    def test_writes_say_so_and_work_again_once_there_is_room(self, disk):
        def work():
            store = filled(flowstore.SQLiteDataStore(disk.path))
            make_sqlite(TABLES)(disk.path)
            disk.fill()
            all_are_refused(disk.path, store, ADDITIONS, self.SAID)
            with pytest.raises(StoreError, match=self.SAID), store.transaction() as transaction:
                filled(transaction, "new")
            is_refused(disk.path, flowstore.migrate_process_buckets, disk.path, match=self.SAID)
            disk.make_room()
            assert flowstore.migrate_process_buckets(disk.path) == ["root"]
            assert store.get_all_process_vars("root") == {"k": "v"}
            store.delete_process_var("root", "k")
            with store.session() as session:
                disk.fill()
                if disk.kind != "inodes":  # those of the session are there already
                    is_refused(disk.path, session.set_cache_entry, "k", b"x" * 300_000, match=self.SAID)
                assert contents_of(session) == contents_of(filled(DictStore()))
                disk.make_room()
                session.set_cache_entry("k", b"new")
                session.set_cache_entry("k", b"value")
            return serves(store), os.listdir(disk.folder)

        assert disk(work) == (True, ["store.db"])

    def test_reads_work(self, disk):
        def work():
            before = filled(flowstore.SQLiteDataStore(disk.path))
            disk.fill()
            after = flowstore.SQLiteDataStore(disk.path)
            with before.session() as session:
                for store in (before, after, session):
                    assert called(store, READS) == WHAT_IS_READ
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the file that pytest makes it may not grow either
            return [status_of("--store", disk.path, *words) for words in VIEWS]

        assert disk(work) == [0] * len(VIEWS)

    def test_first_open_says_so_and_works_again_once_there_is_room(self, disk):
        def work():
            disk.fill()
            is_refused(disk.path, flowstore.SQLiteDataStore, disk.path, match=self.SAID)
            if disk.kind == "inodes":
                (disk.folder / "fill 0").unlink()  # room for the file, but not for its WAL
                is_refused(disk.path, flowstore.SQLiteDataStore, disk.path, match=self.SAID)
            assert {file for file in os.listdir(disk.folder) if file[:4] != "fill"} <= {"store.db"}
            assert status_of("--store", disk.path, "list") == 0
            disk.make_room()
            return serves(filled(flowstore.SQLiteDataStore(disk.path)))

        assert disk(work)

    def test_backup_says_so_and_leaves_nothing(self, disk, tmp_path):
        store = flowstore.SQLiteDataStore(tmp_path / "store.db")
        store.set_cache_entry("large", bytes(1_000_000))

        def work():
            disk.fill()
            is_refused(disk.path, store.backup, disk.path, match=self.SAID)
            return disk.path.exists()

        assert not disk(work)


# A process that writes each line it reads, and keeps all of them in the WAL
COUNTER = """
import flowstore, sys
with flowstore.SQLiteDataStore(sys.argv[1]).session() as session:
    print("ready", flush=True)
    for line in sys.stdin:
        session.set_cache_entry("k", line.strip().encode())
        print("done", flush=True)
"""


def kill_a_writer(path):
    """Leave a store with the WAL of a process that was killed, in which there is a newer value."""
    def die():
        with filled(flowstore.SQLiteDataStore(path)).session() as session:
            session.set_cache_entry("k", b"newer")
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AssertionError, match="killed"):
        Forked(die).result()


@posix_only
class TestReadOnlyPlaces:
    SAID = "(?i)writ|read-only"

    @pytest.fixture(params=["file", "folder", "both", "mount"])
    def place(self, request, public_folder):
        """Runs work(path) where a store can't be written to, in one of the ways, and looks for changes."""
        kind, path = request.param, public_folder / "place" / "store.db"
        path.parent.mkdir()

        def run(work, prepare=None):
            def prepared():
                prepare(path) if prepare else filled(flowstore.SQLiteDataStore(path))
                if kind == "mount":
                    assert mount("-o", "remount,ro", path.parent)
                else:
                    for file in path.parent.iterdir():
                        file.chmod(0o666 if kind == "folder" else 0o444)
                    path.parent.chmod(0o755 if kind == "file" else 0o555)
                    if kind == "file" and os.getuid() == 0:
                        os.chown(path.parent, NOBODY, NOBODY)
                return files_in(path.parent)

            if kind == "mount":
                before, result, after = on_a_disk(path.parent, "size=1m", lambda: (
                    prepared(), work(path), files_in(path.parent)))
            else:
                before, result, after = prepared(), as_a_plain_user(lambda: work(path)), files_in(path.parent)
            assert after.keys() == before.keys()
            assert after == before or (kind == "folder" and prepare)  # then the WAL may go into the file
            return result

        yield run
        path.parent.chmod(0o755)

    def test_reads_and_views_are_right_and_leave_nothing(self, place, public_folder):
        (target := public_folder / "elsewhere").mkdir()
        target.chmod(0o777)

        def work(path):
            store = flowstore.SQLiteDataStore(path)
            with store.session() as session:
                for reader in (store, session, store):
                    assert called(reader, READS) == WHAT_IS_READ
            store.backup(target / "backup")
            assert contents_of(flowstore.SQLiteDataStore(target / "backup")) == contents_of(store)
            return [status_of("--store", path, *words) for words in (*VIEWS, ["path"])]

        assert place(work) == [0] * 5

    def test_writes_say_what_cannot_be_written(self, place):
        def work(path):
            store = flowstore.SQLiteDataStore(path)
            all_are_refused(path, store, [*WRITES, ("prune", (0,))], self.SAID)
            is_refused(path, store.execution("r").__enter__, match=self.SAID)
            for context in (store.session, store.transaction):
                with pytest.raises(StoreError, match=self.SAID), context() as inner:
                    inner.set_cache_entry("k", b"new")
            return contents_of(store)

        assert place(work) == contents_of(filled(DictStore()))

    def test_wal_of_a_killed_writer_is_not_passed_over(self, place):
        result = place(lambda path: stored(lambda: flowstore.SQLiteDataStore(path).get_cache_entry("k")),
                       kill_a_writer)
        assert result == b"newer" or isinstance(result, StoreError)

    @needs_root
    @pytest.mark.parametrize("mode", [0o755, 0o777])
    def test_reads_beside_a_running_writer_are_its_newest_or_refused(self, public_folder, mode):
        path = public_folder / "store.db"
        filled(flowstore.SQLiteDataStore(path))
        path.chmod(0o644)
        public_folder.chmod(mode)
        environment = {**os.environ, "PYTHONPATH": MODULE_FOLDER}
        program = [sys.executable, "-c", COUNTER, str(path)]
        with flowstore_started(program=program, env=environment) as writer:
            for number in (b"1", b"2", b"3"):
                writer.stdin.write(number + b"\n")
                writer.stdin.flush()
                assert writer.stdout.readline() == b"done\n"
                result = as_a_plain_user(
                    lambda: stored(lambda: flowstore.SQLiteDataStore(path).get_cache_entry("k")))
                assert result == number or isinstance(result, StoreError)
        assert flowstore.SQLiteDataStore(path).get_cache_entry("k") == b"3"

    @pytest.mark.parametrize("closed", ["folder", "folder/store.db"])
    def test_what_may_not_be_read_is_not_taken_for_an_empty_store(self, public_folder, closed):
        (public_folder / "folder").mkdir()
        path = public_folder / "folder" / "store.db"
        store = filled(flowstore.SQLiteDataStore(path))
        (public_folder / closed).chmod(0)

        def work():
            all_are_refused(path, store, READS)
            for function in (flowstore.SQLiteDataStore, flowstore.destroy_store,
                             flowstore.migrate_process_buckets):
                is_refused(path, function, path)
            return [status_of("--store", path, *words)
                    for words in (*VIEWS, ["get", "k"], ["remove", "k"], ["clear"], ["prune", "--keep", "1"])]

        try:
            assert as_a_plain_user(work) == [1] * 8
        finally:
            (public_folder / closed).chmod(0o700)
        assert contents_of(store) == contents_of(filled(DictStore()))


@contextlib.contextmanager
def folder_in_memory():
    """A folder where syncing costs nothing, if there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield pathlib.Path(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a store's file, its WAL and its -shm, while the newest values are only in the WAL."""
    path = tmp_path_factory.mktemp("whole") / "store.db"
    store = filled(flowstore.SQLiteDataStore(path))
    for number in range(30):
        store.record_execution(execution_of(f"ref {number}", id=str(number)))
    with store.session() as session:
        filled(session, "new").set_cache_entry("large", b"x" * 20_000)
        return {suffix: pathlib.Path(f"{path}{suffix}").read_bytes() for suffix in ("", "-wal", "-shm")}


def damaged(data, kind, at, other):
    """Data with one bit flipped, a page zeroed or exchanged with another, or cut off."""
    if not data or kind == "cut":
        return data[: at % (len(data) + 1)]
    data, at, other = bytearray(data), at % len(data), other % len(data)
    page, other_page = (slice(place & -4096, (place & -4096) + 4096) for place in (at, other))
    if kind == "flip":
        data[at] ^= 1 << other % 8
    elif kind == "zero":
        data[page] = bytes(len(data[page]))
    elif len(data[page]) == len(data[other_page]):
        data[page], data[other_page] = data[other_page], data[page]
    return bytes(data)


def is_typed(result):
    """Whether a read has returned what its annotation says, or a StoreError."""
    if isinstance(result, (ExecutionRecord, BackgroundRun)):
        return type(result).from_dict(result.to_dict()) == result
    if isinstance(result, dict):
        return all(type(key) is str and is_typed(value) for key, value in result.items())
    return all(map(is_typed, result)) if isinstance(result, list) else isinstance(
        result, (str, bytes, StoreError, type(None)))


def use(path):
    """What all operations return on a file that may hold anything: typed values, or StoreErrors."""
    store = stored(lambda: flowstore.SQLiteDataStore(path, timeout=0.2))
    results = [store]
    if not isinstance(store, StoreError):
        with contextlib.suppress(StoreError), store.session() as session:
            results = called(session, READS)
            assert is_typed(results), results
        others = [("list_process_buckets", ()), ("reconcile", ()), ("prune", (1,))]
        results += called(store, [*others, *ADDITIONS])
        with contextlib.suppress(StoreError), store.transaction() as transaction:
            results += called(transaction, [*WRITES, *READS])
    assert all(str(path) in str(result) for result in results if isinstance(result, StoreError))
    assert {status_of("--store", path, command) for command in ("check", "migrate")} <= {0, 1}
    return results


class TestDamagedStore:
    @given(damages=st.lists(min_size=1, max_size=5, elements=st.tuples(
        st.sampled_from(["", "", "-wal", "-shm"]), st.sampled_from(["flip", "zero", "cut", "swap"]),
        st.integers(0, 1 << 20), st.integers(0, 1 << 20))))
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    def test_any_damage_gives_values_or_store_errors(self, whole, damages):
        files = dict(whole)
        for suffix, *damage in damages:
            files[suffix] = damaged(files[suffix], *damage)
        with folder_in_memory() as folder:
            for suffix, data in files.items():
                (folder / f"store.db{suffix}").write_bytes(data)
            assert use(folder / "store.db")


REFUSED = {
    "view": "DROP TABLE process_buckets; CREATE VIEW PROCESS_BUCKETS AS SELECT 'x' AS bucket",
    "virtual table": "DROP TABLE cache; CREATE VIRTUAL TABLE cache USING fts5 (key, value)",
    "trigger": "CREATE TRIGGER spy BEFORE DELETE ON process_vars BEGIN DELETE FROM cache; END",
    "generated column": "ALTER TABLE cache ADD COLUMN spy AS (upper(key))",
    "check": "ALTER TABLE cache ADD COLUMN spy TEXT CHECK (length(value) < 9)",
    "expression index": "CREATE INDEX spy ON cache (upper(key))",
    "condition index": "CREATE INDEX spy ON history (ref) WHERE length(error) > 1",
    "unique index": "CREATE UNIQUE INDEX spy ON history (status)",
    "huge version": f"PRAGMA user_version = {2**31 - 1}",
    "other index": "DROP INDEX history_by_start; CREATE INDEX history_by_start ON history (pid)"}


class TestCraftedStore:
    """What others may have put into the file, by hand or as a newer flowstore."""

    @pytest.mark.parametrize("statements", REFUSED.values(), ids=REFUSED)
    def test_what_would_run_or_change_ours_is_refused_and_left_alone(self, tmp_path, path, statements):
        store = filled(flowstore.SQLiteDataStore(path))
        make_sqlite(statements)(path)
        before = files_in(tmp_path)
        all_are_refused(path, store, [READS[0], ADDITIONS[0], ("backup", (tmp_path / "backup",))])
        for work in (lambda: flowstore.SQLiteDataStore(path), store.session().__enter__):
            is_refused(path, work)
        assert status_of("--store", path, "list") == 1
        assert files_in(tmp_path) == before

    @pytest.mark.parametrize("cell", ["CAST({} AS BLOB)", "CAST({} || x'80' AS TEXT)", "7", "NULL", "''"])
    @pytest.mark.parametrize("column", ["type", "name", "tbl_name", "sql"])
    def test_register_with_odd_cells_is_refused_or_read_and_nothing_run(self, column, cell):
        with folder_in_memory() as folder:
            path = folder / "store.db"
            filled(flowstore.SQLiteDataStore(path))
            make_sqlite("CREATE TABLE notes (note); CREATE INDEX by_note ON notes (note);")(path)
            before = path.read_bytes()
            for name in ("cache", "history_by_start", "notes", "by_note", "spy"):
                (path := folder / name).write_bytes(before)
                spy = "CREATE TRIGGER spy AFTER INSERT ON cache BEGIN UPDATE process_vars SET value = 7; END"
                make_sqlite(f"""
                    {spy * (name == "spy")}; PRAGMA writable_schema = ON;
                    UPDATE sqlite_master SET {column} = {cell.format(column)} WHERE name = '{name}'""")(path)
                assert "7" not in use(path)  # as the trigger would have it

    CELLS = ("''", "x''", "x'ff00'", "-1", "1.5", "9e999", str(2**63 - 1), "'k'", "CAST(x'6bff' AS TEXT)",
             "'2024-01-02'", "'0000-01-02T03:04:05.000000000Z'", "'2024-01-02T03:04:05.678901000+01:00'")

    @pytest.mark.parametrize("cell", CELLS)
    def test_cell_of_any_type_in_any_column_is_refused_or_read(self, cell):
        with folder_in_memory() as folder:
            filled(flowstore.SQLiteDataStore(path := folder / "store.db"))
            before = path.read_bytes()
            tables = sql_values(path, "SELECT name FROM sqlite_master WHERE type = 'table'")
            for table, column in [(name, row[1]) for name in tables
                                  for row in sql_values(path, f"PRAGMA table_info({name})")]:
                (path := folder / f"{table} {column}").write_bytes(before)
                make_sqlite(f"UPDATE {table} SET {column} = {cell}")(path)
                store = flowstore.SQLiteDataStore(path)
                with store.session() as session:
                    results = called(session, READS)
                assert is_typed(results)
                results += called(store, [("list_process_buckets", ()), ("reconcile", ()), ("prune", (0,))])
                assert not os.path.exists(f"{path}-wal")

    @pytest.mark.parametrize("version", [-1, -(2**31)])
    def test_negative_version_is_refused_or_that_of_an_older_store(self, path, version):
        filled(flowstore.SQLiteDataStore(path))
        make_sqlite(f"PRAGMA user_version = {version}")(path)
        store = stored(flowstore.SQLiteDataStore, path)
        assert isinstance(store, StoreError) or serves(store)

    OTHERS = (
        'CREATE TABLE "cache (" (a, b)', 'CREATE TABLE "a -- b" (x /* ( */, y TEXT DEFAULT \'(((\')',
        "CREATE TABLE t -- of mine (\n (a, b)", "CREATE TABLE /* cache */ t (a CHECK (length(a) > (1)), b)",
        "CREATE TABLE t (a, b, UNIQUE (a), FOREIGN KEY (a) REFERENCES cache (key) ON DELETE CASCADE)",
        "CREATE TABLE t (a, b AS (upper(a))); CREATE INDEX i ON t (lower(a), abs(b)) WHERE length(a) > 0",
        "CREATE TABLE t (a INTEGER PRIMARY KEY AUTOINCREMENT, b)", 'CREATE TABLE "" (a, b)',
        'CREATE TABLE "two\nlines \U0001f600" (a, b)', 'CREATE TABLE "quo""te\'s" (a, b)',
        "CREATE TABLE [cache ] (a, b)", "CREATE TABLE t AS SELECT 1 AS a; ANALYZE",
        "CREATE VIRTUAL TABLE t USING fts5 (a, b)", "CREATE VIEW v AS SELECT upper(key) FROM cache",
        "CREATE TABLE t (a, b); CREATE TRIGGER g AFTER INSERT ON t BEGIN DELETE FROM cache; END",
        """CREATE TABLE t (a); PRAGMA writable_schema = ON;
        UPDATE sqlite_master SET name = CAST(x'6e80' AS TEXT), tbl_name = CAST(x'6e80' AS TEXT),
            sql = 'CREATE TABLE n' || CAST(x'80' AS TEXT) || ' (a)' WHERE name = 't'""")
    NEWER = (
        "CREATE INDEX added ON history (source, pid DESC, label COLLATE NOCASE)",
        "CREATE INDEX added ON history (session_id) WHERE session_id <> ''",
        'CREATE INDEX "added (index" ON process_vars (value)',
        "CREATE TABLE added (ref TEXT REFERENCES history (ref)); CREATE UNIQUE INDEX tag ON added (ref)",
        *("".join(f'ALTER TABLE {name} ADD COLUMN x {column}; ALTER TABLE {name} ADD COLUMN "2nd" {column};'
                  for name in ("cache", "history", "background", "process_vars", "process_buckets"))
          for column in (
              "", "VARCHAR(10)", "DECIMAL (5, 2) NOT NULL DEFAULT 1.50", "TEXT NOT NULL DEFAULT ''",
              "INTEGER DEFAULT (-1)",
              "BLOB DEFAULT x'00'", "TEXT COLLATE NOCASE DEFAULT NULL", "BOOLEAN NOT NULL DEFAULT TRUE")))

    @pytest.mark.parametrize("statements", [*OTHERS, *NEWER])
    def test_what_others_or_a_newer_flowstore_have_added_is_left_alone(self, path, statements):
        store = filled(flowstore.SQLiteDataStore(path))
        make_sqlite(statements)(path)
        query = "SELECT type, CAST(name AS BLOB), CAST(sql AS BLOB) FROM sqlite_master ORDER BY rowid"
        before = sql_values(path, query)
        for each in (store, flowstore.SQLiteDataStore(path)):
            assert serves(each)
            each.prune(keep=1)
        assert flowstore.migrate_process_buckets(path) == []
        assert status_of("--store", path, "check") == 0
        assert sql_values(path, query) == before
        flowstore.destroy_store(path)
        assert not os.path.exists(path)


class TestPlaces:
    @posix_only
    def test_pipe_is_no_file_to_import(self, tmp_path, path):
        os.mkfifo(tmp_path / "pipe")

        def work():
            signal.alarm(5)
            is_refused(tmp_path / "pipe", flowstore.import_bolt, tmp_path / "pipe", path)
            return "refused"

        assert Forked(work).result() == "refused"

    @pytest.mark.parametrize("name", ["?mode=memory", "100%25#", "'quo\"te\\", "new\nline", "\udcff"])
    def test_linked_folder_of_any_name_serves(self, tmp_path, monkeypatch, name):
        (tmp_path / "real").mkdir()
        (tmp_path / name).symlink_to("real")
        monkeypatch.chdir(tmp_path)
        store = filled(flowstore.SQLiteDataStore(os.path.join(name, name)))
        monkeypatch.chdir("/")
        with store.session() as session, store.transaction() as transaction:
            assert contents_of(session) == contents_of(transaction) == contents_of(filled(DictStore()))
        store.backup(tmp_path / name / "backup")
        assert serves(flowstore.SQLiteDataStore(tmp_path / "real" / "backup"))
        assert sorted(os.listdir(tmp_path / "real")) == sorted([name, "backup"])
        flowstore.destroy_store(tmp_path / "real" / name)
        assert contents_of(store) == contents_of(DictStore())
        make_text(tmp_path / name / name)
        is_refused(name, flowstore.SQLiteDataStore, store.path)


def plant_a_file(place):
    """A whole store or a whole WAL, which SQLite would take over, for all to write to."""
    with tempfile.TemporaryDirectory() as folder:
        kill_a_writer(bait := f"{folder}/store.db")
        shutil.copyfile(bait if place.suffix == ".db" else f"{bait}-wal", place)


PLANTS = {
    "file": plant_a_file, "empty file": pathlib.Path.touch, "pipe": os.mkfifo,
    "link": lambda place: place.symlink_to(place.parent / "mine" / "precious"),
    "link into the void": lambda place: place.symlink_to(place.parent / "mine" / "made")}


@needs_root
class TestFolderThatAnyoneMayWriteTo:
    """As /tmp: what another user has put where a store or SQLite's files go is neither used nor followed."""

    ME = 65533

    @pytest.fixture
    def path(self, public_folder):
        public_folder.chmod(0o1777)
        (public_folder / "mine").mkdir(0o700)
        (public_folder / "mine" / "precious").write_text("precious")
        for file in ("mine", "mine/precious"):
            os.chown(public_folder / file, self.ME, self.ME)
        return public_folder / "store.db"

    @pytest.mark.parametrize("exists", [False, True])
    @pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
    @pytest.mark.parametrize("kind", PLANTS)
    def test_what_another_user_has_planted_is_refused(self, path, kind, suffix, exists):
        def looked_at():
            return {str(file): (file.lstat().st_mode, file.is_file() and file.read_bytes())
                    for file in path.parent.rglob("*")}

        def work():
            signal.alarm(10)
            is_refused(path, lambda: flowstore.SQLiteDataStore(path, timeout=0.1))
            if store:
                all_are_refused(path, store, [*READS[:3], *WRITES[:3]])
                is_refused(path, store.session().__enter__)
            return status_of("--store", path, "set", "k", "v")

        store = None
        if exists and suffix:
            store = as_a_plain_user(lambda: filled(flowstore.SQLiteDataStore(path, timeout=0.1)), self.ME)
        as_a_plain_user(lambda: [os.umask(0), PLANTS[kind](path.with_name(f"store.db{suffix}"))][:0])
        before = looked_at()
        assert as_a_plain_user(work, self.ME) == 1
        assert looked_at() | before == looked_at()
        assert not os.path.exists(path.parent / "mine" / "made")

    def test_ones_own_store_serves_there_with_the_wal_of_ones_killed_process(self, path):
        def work():
            kill_a_writer(path)
            return flowstore.SQLiteDataStore(path).get_cache_entry("k")

        assert as_a_plain_user(work, self.ME) == b"newer"
        assert sorted(os.listdir(path.parent)) == ["mine", "store.db"]


SECRET = "s3cr3t-of-the-test"


class TestPrivacy:
    @pytest.mark.parametrize("umask", [0, 0o777])
    @pytest.mark.parametrize("kind", ["session", "transaction"])
    def test_deleted_value_is_in_no_file_at_rest_and_each_is_0600(self, tmp_path, path, kind, umask):
        umask = os.umask(umask)
        try:
            store = flowstore.SQLiteDataStore(path)
            for value in (SECRET * 500, "another", SECRET):
                with getattr(store, kind)() as inner:
                    inner.set_process_var("s", "k", value)
            store.delete_process_var("s", "k")
            store.backup(tmp_path / "backup")
        finally:
            os.umask(umask)
        assert {file.name: mode_of(file) for file in tmp_path.iterdir()} == dict.fromkeys(
            ["store.db", "backup"], 0o600)
        assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.iterdir())

    def test_no_error_shows_a_value(self, path):
        store = filled(flowstore.SQLiteDataStore(path, timeout=0))
        shown = []

        def fail(store, *calls):
            for method, *arguments in calls:
                with pytest.raises(Exception) as caught:
                    getattr(store, method)(*arguments)
                shown.append("".join(traceback.format_exception(caught.value)))

        writes = [("set_process_var", "k", "k", SECRET), ("set_cache_entry", "k", SECRET.encode()),
                  ("record_execution", execution_of("k", error=SECRET))]
        fail(store, ("set_process_var", "k", "k", SECRET.encode()), ("set_cache_entry", "k", SECRET),
             ("set_process_var", "k", "k", f"{SECRET}\ud800"),
             ("record_execution", execution_of("k", error=f"{SECRET}\ud800")))
        fail(ExecutionRecord, *(("from_dict", {"ref": "k", "startedAt": text, "pid": SECRET})
                                for text in (SECRET, "2024-01-02T03:04:05Z")))
        with locked(path, "BEGIN IMMEDIATE"):
            fail(store, *writes)
        with raw_sql(path) as sql:
            for cell in "process_vars.value", "cache.value", "history.error", "background.pid":
                sql.execute(f"UPDATE {cell.replace('.', ' SET ')} = CAST('{SECRET}' || x'80' AS TEXT)")
        for context in (contextlib.nullcontext(store), store.session(), store.transaction()):
            with context as reader:
                fail(reader, ("get_process_var", "k", "k"), *((f"get_{name}", "k") for name in (
                    "cache_entry", "execution_history", "background_run", "all_process_vars")))
        make_text(pathlib.Path(path))
        fail(store, *writes)
        assert len(shown) == 27
        assert not [text for text in shown if SECRET in text]

    @pytest.mark.parametrize("words", [
        ["set", "k", f"-{SECRET}"], ["set", "k", f"--keep={SECRET}"], ["set", "-x", "k", SECRET],
        ["set", "k", "v", SECRET], ["set", "k", f"--json={SECRET}"], ["sett", "k", SECRET]])
    def test_wrong_usage_shows_no_value(self, capfd, words):
        assert status_of(*words) == 2
        printed = capfd.readouterr()
        assert printed.err
        assert SECRET not in printed.out + printed.err


@pytest.mark.skipif(os.name != "posix", reason="takes SQLite's VFS unix-dotfile")
class TestWithoutWal:
    """A file system on which processes can share no memory, as SQLite's VFS unix-dotfile makes one."""

    def test_error_names_file_and_reason(self, tmp_path, path, monkeypatch):
        connect = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", lambda name, *values, **options: connect(
            f"{name}&vfs=unix-dotfile" if "?" in name else name, *values, **options))
        for _ in range(2):
            is_refused(path, flowstore.SQLiteDataStore, path, match="(?i)wal.*disk|disk.*wal|file system")
            assert os.listdir(tmp_path) in ([], ["store.db"])


HYGIENE = """if True:
    import gc, os, pickle, sqlite3, subprocess, sys, flowstore
    path, calls, bad_files = pickle.load(sys.stdin.buffer)
    folder, kept = "/proc/self/fd" if os.path.exists("/proc/self/fd") else ".", []
    def attempt(work, *arguments):
        before = len(os.listdir(folder))
        try:
            work(*arguments)
        except (flowstore.StoreError, TypeError, ValueError, AttributeError) as error:
            kept.append(error)
        if len(os.listdir(folder)) != before:
            print("left open:", work, arguments)
    def attempt_all(store):
        for method, arguments in calls:
            attempt(getattr(store, method), *arguments)
    def within(context):
        with context() as inner:
            attempt_all(inner)
            raise ValueError
    def run_sql(statement):
        sql = sqlite3.connect(path, isolation_level=None)
        sql.execute(statement)
        sql.close()
    store = flowstore.SQLiteDataStore(path, timeout=0)
    locker = subprocess.Popen([sys.executable, "-c", '''if True:
        import sqlite3, sys
        sql = sqlite3.connect(sys.argv[1], isolation_level=None)
        sql.execute("BEGIN IMMEDIATE")
        print("locked", flush=True)
        sys.stdin.read()
        sql.close()''', path], stdin=-1, stdout=-1)
    locker.stdout.readline()
    for break_it in (lambda: None, locker.communicate,
                     lambda: run_sql("UPDATE history SET ref = CAST(x'6bff' AS TEXT)"),
                     lambda: os.truncate(path, 9000)):
        break_it()
        attempt_all(store)
        for context in (store.session, store.transaction, lambda: store.execution("r")):
            attempt(within, context)
        for work in (store.reconcile, lambda: store.prune(1), lambda: store.backup(path + ".copy"),
                     lambda: store.backup(path + ".copy"), lambda: flowstore.destroy_store(path + ".copy")):
            attempt(work)
    for bad_file in bad_files:
        for work in (flowstore.SQLiteDataStore, flowstore.destroy_store, flowstore.migrate_process_buckets,
                     flowstore.import_bolt, store.backup):
            attempt(work, bad_file)
    print(len(kept))
    del kept[:]
    gc.collect()
"""


class TestHygiene:
    def test_nothing_stays_open_beside_an_error_and_no_warning_comes(self, tmp_path, path):
        bad_files = [str(tmp_path / f"bad {number}") for number in range(len(NO_STORES) - 2)]
        for file, (make, _, _) in zip(bad_files, NO_STORES[:-2], strict=True):
            make(pathlib.Path(file))
        calls = [*ADDITIONS, *CALLS, ("set_cache_entry", ("k", "x")), ("get_cache_entry", ("",))]
        program = [sys.executable, "-W", "error", "-X", "dev", "-c", HYGIENE]
        done = subprocess.run(program, capture_output=True, timeout=PATIENCE,
                              input=pickle.dumps((path, calls, bad_files)))
        assert (done.returncode, done.stderr.decode()) == (0, "")
        *left_open, errors = done.stdout.decode().splitlines()
        assert int(errors) > 100
        assert left_open == []


# A store of version 1.0.0
OLD_STORE = (
    "T>t<81poj4|NsC0{{ShJMV(;C8Tck-h>j-yF_rzthkyzdJXU*Y34NQ&&WHUA=$<xN(K^N?zkO&Yz^?~9HhTs7+rn@H6;9sMi8nf`HlcA"
    "rm)e?sh8Mju!!OEr@U(k#kVUt#e%kRtWkvmuh}QfI5fmi_U?>R!ovHuFBMgk;q?Zpc$-?o6XiPe?2E2ZwFfO_ot&a(G_Sq?SAN&P+mby"
    "}j{z)i7KRFSjc76~@-*lRATm7f_)InD<Z11OPj;YDx*78COr6vMzwugyq55IRY2C=f`bZE|toL`r$4f=ZS4A`I^DA2TxLKsAI-<!&95#"
    "6NA^Q0DwJ`}cEsmHu0Eq#Y7Z`Mumi`=DDB*r_Ht-I*N5-XjmYKOJPNHI&`UIMBVFf>UyoLiguh1|SEmm~Q8`huZBXNwa~Jg-6LJqUFH("
    "=acqmZy0>@g^`rIpSAgYsxFFdSuW|D{;0HyIHDr_R)A}H<gprf;<RPHx?skKSrT<9&hEEKG+Iz;)3sek=!0}2<T%X66!~m@3__dW4GG9"
    "Fvo*bF!rwDGH4VfokdDvw2Eb#t;=-DyUPEcp#iupP_O-plJ@B4Xh<F10~g-mYABzNBH~Gs>Dzo;t+4)w$2OwGx<cVJt%YD_y5`U_u-C9"
    "=SVaDG6=6P^j)0GZse5sfMf1~3r?xjcOo4W=o5rP1zs%f2|KGGmwf(i!uNo6<&AAW(pzI3=IuZ3HS6+K*F&_K>vS2zYX9-$IJV@JrgeM"
    "rf*$8?nI1QRF;d>Q;zEL>SJy2>hyCLHmRbr@VY`vlii^7qY_tDs-kne^OVo+`WzfOPrTL{4mE9_r}MzmexcsoP=84C2O;Bx~~fbZvH%$"
    "mz4jQ0YLj++E_Um^pQQ)|)U`J`6Jix|1Hr{pvhQj5@v2(lPW1KsboEZhW>17RHEmx|l<3G%nE5ZbE|H%kej29t4Yp+F^Q&#fnS-4g0hW"
    "cZxa>`w0I@_vncr?x9uVHNAx<f^M+noCTlg~O1ZLv;8ryjrbVml-?Vmo0;rXDwlb$bCTPhn(2v&k2sOhnyFrsL2&7O)99=3NY}pzT%~V"
    "m4x1dXbQ~lYgpN6$qyCmL~&232YDt)QlyEqF3n#-PSRqSWb&rt4+ZxDyW?hOAATVgc_Z2&gG-lzZfYCxj%AyMnLYmSte&nmJXtBLqRRG"
    "f`Jdd4sjOZ^)L9S6{9u^wKUq$Ho1Amj43Rg}SrpX~bJxggzI9a}%xFS0@57%gPKMyy=Ya-({hR*o`$)w")


class TestUpgrade:
    @posix_only
    @pytest.mark.parametrize("statements", [
        "PRAGMA user_version = 0", "DROP INDEX history_running",
        "DROP TABLE background; DROP TABLE cache; DROP INDEX history_by_start; PRAGMA user_version = 0"])
    def test_older_schema_is_completed_by_16_processes_at_once(self, statements):
        def work(number):
            store = flowstore.SQLiteDataStore(path, timeout=PATIENCE)
            store.set_process_var("new", str(number), "x")
            return store.get_process_var("k", "k"), len(store.get_execution_history("k"))

        query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"
        with folder_in_memory() as folder:
            path = folder / "store.db"
            filled(flowstore.SQLiteDataStore(path))
            before = sql_values(path, query)
            make_sqlite(statements)(path)
            assert together(16, work) == [("value", 1)] * 16
            assert sql_values(path, query) == before
            assert sql_values(path, "PRAGMA user_version") == [1]
            assert len(flowstore.SQLiteDataStore(path).get_process_var_keys("new")) == 16
            assert os.listdir(folder) == ["store.db"]

    def test_store_of_version_1_0_0_is_read_and_written(self, path):
        pathlib.Path(path).write_bytes(lzma.decompress(base64.b85decode(OLD_STORE)))
        assert status_of("--store", path, "check") == 0
        store = flowstore.SQLiteDataStore(path)
        assert store.get_cache_entry("k") == b"value"
        assert store.get_execution_history("k") == [execution_of("k"), execution_of(
            "k", started_at=START + timedelta(1), id="1", status="completed", duration=timedelta(seconds=5),
            completed_at=START + timedelta(1, 5))]
        assert store.list_background_runs() == [run_of("k")]
        assert store.get_all_process_vars("k") == {"k": "value", "\udcff": "Grüße"}
        store.record_execution(execution_of("k", id="1"))
        assert store.get_execution_history("k") == [execution_of("k"), execution_of("k", id="1")]


class TestReadme:
    def test_python_examples_run(self, tmp_path):
        text = (pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8")
        examples = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        environment = {**os.environ, "PYTHONPATH": os.path.dirname(flowstore.__file__)}
        assert len(examples) == 2
        for text in examples:
            command = [sys.executable, "-W", "error", "-c", text]
            subprocess.run(command, cwd=tmp_path, env=environment, check=True)
