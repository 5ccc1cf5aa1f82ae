"""What flowstore costs beyond bare `sqlite3`: the table of the README, and whether each target in it is met.

    python .ci/bench.py [FOLDER] [--quick] [--json FILE] [--rows GROUP ...]

Each row is one task done by flowstore, and by sqlite3 written by hand for it with the same schema, pragmas and
durability, but no checks. They take turns, in FOLDER (the disk matters), until the median of their ratios is
known within 1 % or the row's time is up; ± is its standard error. Peers are added where installed.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
import uuid
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import flowstore

RECORD, RUN = (", ".join(cls._fields) for cls in (flowstore.ExecutionRecord, flowstore.BackgroundRun))
GET = "SELECT value FROM cache WHERE key = ?"
SET = "INSERT INTO cache VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = ?2"
ADD_RECORD = f"""INSERT INTO history ({RECORD}, identity, process)
    VALUES (:{RECORD.replace(", ", ", :")}, :identity, :process)"""
NEWEST = f"SELECT {RECORD} FROM history WHERE ref = ? ORDER BY started_at DESC LIMIT 10"
CREATE = [*zip(("PRAGMA journal_mode = WAL", "BEGIN IMMEDIATE", *map("CREATE {}".format, flowstore._SCHEMA.values()),
                f"PRAGMA application_id = {flowstore._APPLICATION_ID}", "PRAGMA user_version = 1", "COMMIT"))]
START = datetime(2026, 1, 1, tzinfo=UTC)

# ---- the sides ---------------------------------------------------------------------------------------------


def connect(path):
    sql = sqlite3.connect(path, timeout=5, isolation_level=None)
    sql.executescript(flowstore._SETTINGS)
    return sql


def bare(path, *steps):
    """Bare sqlite3: connect, these statements with their values, close; returns the rows of the last."""
    sql = connect(path)
    for step in steps:
        rows = sql.execute(*step).fetchall()
    sql.close()
    return rows


def bare_write(path, *steps):
    bare(path, ("PRAGMA synchronous = FULL",), ("BEGIN IMMEDIATE",), *steps, ("COMMIT",))


PEERS = {}  # at the same durability, but for the files in which diskcache keeps large values
with contextlib.suppress(ImportError):
    import diskcache

    PEERS["diskcache"] = lambda path: diskcache.Cache(f"{path}.diskcache", timeout=5, sqlite_synchronous=2)
with contextlib.suppress(ImportError):
    import sqlitedict

    def _sqlitedict(path):
        peer = sqlitedict.SqliteDict(f"{path}.sqlitedict", journal_mode="WAL")
        peer.conn.execute("PRAGMA synchronous = FULL")
        return peer

    PEERS["sqlitedict"] = _sqlitedict
LINE = "{:34}{:>11}{:>11}{:>14}{:>9}{:>7}" + "{:>12}" * len(PEERS)


def peer_set(peer, key, data):
    peer[key] = data
    getattr(peer, "commit", int)()


def lone_operations(kind, path):
    """How that kind of store sets and gets a value, opened for it alone."""
    def peer_write(key, data):
        with PEERS[kind](path) as peer:
            peer_set(peer, key, data)

    def peer_read(key):
        with PEERS[kind](path) as peer:
            return peer[key]

    if kind == "flowstore":
        store = flowstore.SQLiteDataStore(path)
        return store.set_cache_entry, store.get_cache_entry
    if kind == "sqlite3":
        return lambda key, data: bare_write(path, (SET, (key, data))), lambda key: bare(path, (GET, (key,)))
    return peer_write, peer_read


def value(n, size=96):
    return b"%15d " % n * (size // 16)


def record(n, ref):
    return flowstore.ExecutionRecord(
        ref, START + timedelta(seconds=n), timedelta(milliseconds=n), id=str(uuid.uuid4()), status="completed",
        log_archive_id=str(uuid.uuid4()), completed_at=START, source="cli", working_dir="/home/me/projects/app")


def fill(path, refs, count):
    store = flowstore.SQLiteDataStore(path)
    with contextlib.closing(connect(path)) as sql:
        sql.execute("BEGIN")
        sql.executemany(ADD_RECORD, (flowstore._history_row(record(n, f"ref {n % refs}")) for n in range(count)))
        sql.execute("COMMIT")
    return store


def storm_process(kind, path, operations, start):
    write, read = lone_operations(kind, path)
    key, errors, slowest = str(os.getpid()), 0, 0.0
    time.sleep(max(start - time.monotonic(), 0))
    for n in range(operations):
        for call in partial(write, key, value(n)), partial(read, key):
            before = time.monotonic()
            try:
                call()
            except Exception:  # noqa: BLE001 - whatever a peer raises
                errors += 1
            slowest = max(slowest, time.monotonic() - before)
    return time.monotonic(), slowest, errors


def storm(kind, path, processes, operations):
    """Operations per second, the slowest one's time, and the number of errors."""
    lone_operations(kind, path)[0]("key", b"")
    start = time.monotonic() + 1 + processes / 30
    with multiprocessing.Pool(processes) as pool:
        found = pool.starmap(storm_process, [(kind, path, operations, start)] * processes, 1)
    ended, slowest, errors = zip(*found, strict=True)
    return 2 * operations * processes / (max(ended) - start), max(slowest), sum(errors)


# ---- the rows ----------------------------------------------------------------------------------------------


class Bench:
    """Its public methods are the groups of rows."""

    def __init__(self, folder, quick):
        self._folder, self._quick = folder, quick
        self._names, self._rows = itertools.count(), []

    def _path(self):
        return os.path.join(self._folder, str(next(self._names)))

    def _store(self):
        """A store, and a twin of its file for the other sides."""
        store, twin = flowstore.SQLiteDataStore(self._path()), self._path()
        shutil.copyfile(store.path, twin)
        return store, twin

    def _row(self, name, target, sides, unit="s", ratio=None, error=0.0):
        """Add a row. A target is a comparison and a limit: of the ratio or, with a unit, of flowstore's own."""
        ratio = ratio or (sides["flowstore"] / sides["sqlite3"] if sides.get("sqlite3") else None)
        comparison, limit, *own = target.split() or ("", "0")
        excess = (sides["flowstore"] if own else ratio or 0) - float(limit)
        met = {"": None, "<=": excess <= 0, ">=": excess >= 0}[comparison]
        self._rows.append(dict(sides, row=name, unit=unit, ratio=ratio, error=error, target=target, met=met))
        cells = [quantity(sides[side], unit) if side in sides else "" for side in ("flowstore", "sqlite3", *PEERS)]
        cells[2:2] = ["" if not ratio else f"{ratio:.2f} ± {error:.2f}" if error else f"{ratio:.2f}", target,
                      {None: "", True: "met", False: "MISSED"}[met]]
        print(LINE.format(name, *cells), flush=True)

    def _compare(self, name, target, sides, times=1, seconds=8.0):
        """A row of times per operation. A call does `times` of them; no two calls get the same number."""
        taken = {side: [] for side in sides}
        numbers, ratios, error = itertools.count(), [], 1.0
        for call in sides.values():
            call(next(numbers))
        end = time.perf_counter() + seconds * (0.06 if self._quick else 1)
        while len(ratios) < 5 or (time.perf_counter() < end and (error > 0.01 or len(ratios) < 40)):
            for side in [*sides][:: 1 if len(ratios) % 2 else -1]:
                number, began = next(numbers), time.perf_counter()
                sides[side](number)
                taken[side].append((time.perf_counter() - began) / times)
            ratios.append(taken["flowstore"][-1] / taken["sqlite3"][-1])
            low, _, high = statistics.quantiles(ratios) if len(ratios) > 1 else (0, 0, 9)
            error = 0.93 * (high - low) / len(ratios) ** 0.5
        medians = {side: statistics.median(each) for side, each in taken.items()}
        self._row(name, target, medians, ratio=statistics.median(ratios), error=error)

    def lone(self):
        store, twin = self._store()
        kinds = {"flowstore": store.path, **dict.fromkeys(("sqlite3", *PEERS), twin)}
        kinds = {kind: lone_operations(kind, path) for kind, path in kinds.items()}
        [[auto_vacuum]] = bare(twin, ("PRAGMA auto_vacuum",))
        records = [record(n, "ref") for n in range(4000)]
        cells = [flowstore._history_row(each) for each in records]
        self._compare("lone write", "<= 1.10", {
            kind: lambda n, write=write: write("key", value(n)) for kind, (write, _) in kinds.items()}, 1, 15)
        self._compare("lone read", "<= 1.15", {
            kind: lambda n, read=read: read("key") for kind, (_, read) in kinds.items()}, 1, 15)
        self._compare("first open", "<= 1.5", {
            "flowstore": lambda n: flowstore.SQLiteDataStore(self._path()),
            "sqlite3": lambda n: bare(self._path(), (f"PRAGMA auto_vacuum = {auto_vacuum}",), *CREATE),
            **{kind: lambda n, kind=kind: lone_operations(kind, self._path())[0]("key", b"") for kind in PEERS}})
        self._compare("recording an execution", "", {
            "flowstore": lambda n: store.record_execution(records[n % 4000]),
            "sqlite3": lambda n: bare_write(twin, (ADD_RECORD, cells[n % 4000]))})
        for size, name in (100_000, "100 KB"), (10_000_000, "10 MB"):
            self._compare(f"writing {name}", "", {
                kind: lambda n, write=write, size=size: write("key", value(n, size))
                for kind, (write, _) in kinds.items()})
            self._compare(f"reading {name}", "", {
                kind: lambda n, read=read: read("key") for kind, (_, read) in kinds.items()})
        data, peaks = value(0, size), dict.fromkeys(kinds, 0.0)
        tracemalloc.start()
        for kind, (write, read) in kinds.items():
            for call in partial(write, "key", data), partial(read, "key"):
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                call()
                peaks[kind] += (tracemalloc.get_traced_memory()[1] - before) / 1e6
        tracemalloc.stop()
        self._row("memory of writing + reading 10 MB", "<= 1.05", peaks, "MB")

    def session(self):
        store, twin = self._store()
        keys = [f"key {i}" for i in range(1000)]

        def write_held(n):
            sql.execute("BEGIN IMMEDIATE")
            sql.execute(SET, ("key", value(n)))
            sql.execute("COMMIT")

        def write_many(n):
            with store.transaction() as transaction:
                for key in keys:
                    transaction.set_cache_entry(key, value(n))

        with store.session() as session, contextlib.closing(connect(twin)) as sql, contextlib.ExitStack() as stack:
            sql.execute("PRAGMA synchronous = FULL")
            peers = {kind: stack.enter_context(make(twin)) for kind, make in PEERS.items()}
            self._compare("write in a session", "<= 1.10", {
                "flowstore": lambda n: session.set_cache_entry("key", value(n)), "sqlite3": write_held,
                **{kind: lambda n, peer=peer: peer_set(peer, "key", value(n)) for kind, peer in peers.items()}})
            self._compare("read in a session", "<= 1.8", {
                "flowstore": lambda n: [session.get_cache_entry("key") for _ in range(200)],
                "sqlite3": lambda n: [sql.execute(GET, ("key",)).fetchone()[0] for _ in range(200)],
                **{kind: lambda n, peer=peer: [peer["key"] for _ in range(200)] for kind, peer in peers.items()},
            }, 200)
        self._compare("write in a transaction of 1,000", "<= 2.5", {
            "flowstore": write_many,
            "sqlite3": lambda n: bare_write(twin, *((SET, (key, value(n))) for key in keys))}, 1000)

    def many(self):
        sizes = (100, 1000, 10_000) if self._quick else (100, 10_000, 100_000, 1_000_000)
        stores = [fill(self._path(), 1, size) for size in sizes]
        newest = [lambda n, store=store: store.get_execution_history("ref 0", 10) for store in stores]
        for size, store, ours in zip(sizes, stores, newest, strict=True):
            self._compare(f"newest 10 of {size:,}", "", {
                "flowstore": ours, "sqlite3": lambda n, path=store.path: bare(path, (NEWEST, ("ref 0",)))})
        self._compare("... beside flowstore's of 100", "<= 1.15", {"flowstore": newest[-1], "sqlite3": newest[0]})
        store = fill(self._path(), 1000, 10_000)
        with store.transaction() as transaction:
            for n in range(1000):
                transaction.save_background_run(flowstore.BackgroundRun(
                    str(uuid.uuid4()), n, "build app", START, "completed", str(uuid.uuid4()), "", START))
            for n in range(20):
                transaction.set_process_var("root", f"key {n}", "value")
                transaction.set_process_var("scope", f"key {n + 10}", "value")
        for name, target, ours, statement in (
                ("all history, 1,000 refs of 10", "<= 2", lambda n: store.get_all_execution_history(10),
                 f"SELECT {RECORD} FROM history ORDER BY ref, started_at"),
                ("refs, 1,000 of 10", "", lambda n: store.list_execution_refs(), "SELECT DISTINCT ref FROM history"),
                ("listing 1,000 background runs", "<= 1.6", lambda n: store.list_background_runs(),
                 f"SELECT {RUN} FROM background ORDER BY id"),
                ("merged variables of 20 + 20", "", lambda n: store.get_all_process_vars("scope"),
                 "SELECT key, value FROM process_vars WHERE bucket IN ('root', 'scope')")):
            self._compare(name, target, {
                "flowstore": ours, "sqlite3": lambda n, statement=statement: bare(store.path, (statement,))})
        count = 2000 if self._quick else 100_000
        size = os.path.getsize(fill(self._path(), 100, count).path) / 1e6 * (100_000 / count)
        self._row("size of 100,000 records", "<= 35 MB", {"flowstore": size}, "MB")

    def start(self):
        folder, store = self._path(), self._path()
        os.mkdir(folder)
        shutil.copy(flowstore.__file__, folder)
        flowstore.SQLiteDataStore(store).set_process_var("root", "key", "value")
        environment = {name: text for name, text in os.environ.items() if name[:6] != "PYTHON"}
        environment["FLOWSTORE_PATH"] = store

        def python(*arguments):
            return lambda n: subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True,
                                            stdout=subprocess.DEVNULL)

        python("-m", "compileall", "-q", "-b", folder)(0)  # else each start would compile the source
        python("-m", "zipapp", folder, "-o", f"{folder}.pyz", "-m", "flowstore:main")(0)
        for name, target, *ours in (("import", "<= 1.5", "-c", "import flowstore"),
                                    ("get", "<= 1.9", "-m", "flowstore", "get", "key"),
                                    ("get by zipapp", "<= 2.4", f"{folder}.pyz", "get", "key")):
            self._compare(f"start: {name}", target, {
                "flowstore": python(*ours), "sqlite3": python("-c", "import sqlite3")}, seconds=15)

    def storms(self):
        store, twin = self._store()
        processes, operations, rounds = (16, 10, 1) if self._quick else (64, 40, 3)
        found = {kind: [] for kind in ("flowstore", "sqlite3", *PEERS)}
        for kind in [*found][:2] * (rounds - 1) + [*found]:  # peers once: they take their time
            found[kind].append(storm(kind, store.path if kind == "flowstore" else twin, processes, operations))
        for at, what, unit, target, of in ((0, "throughput", "/s", ">= 0.85", statistics.median),
                                           (1, "slowest", "s", "<= 0.5 s", max), (2, "errors", "", "<= 0 x", sum)):
            sides = {kind: of(each[at] for each in results) for kind, results in found.items()}
            self._row(f"storm of {processes}: {what}", target, sides, unit)


def quantity(number, unit):
    if unit == "s":
        number, unit = (number * 1e6, "µs") if number < 1e-4 else (number * 1e3, "ms")
    return f"{number:,.{0 if number > 1000 or not unit else 2}f} {unit}"


def main():
    groups = [name for name in vars(Bench) if name[0] != "_"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="where to make a temporary folder to work in")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, for trying it out")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too, times in seconds")
    parser.add_argument("--rows", nargs="+", choices=groups, default=groups, metavar="GROUP", help=", ".join(groups))
    options = parser.parse_args()
    machine = (f"flowstore {flowstore.__version__}, Python {sys.version.split()[0]}, SQLite"
               f" {sqlite3.sqlite_version}, {sys.platform}, {os.cpu_count()} cores")
    print(machine, "", LINE.format("", "flowstore", "sqlite3", "ratio", "target", "", *PEERS), sep="\n")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="flowstore-bench-") as folder:
        bench = Bench(folder, options.quick)
        for group in options.rows:
            getattr(bench, group)()
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine, "rows": bench._rows}, indent=1) + "\n")
    missed = [row["row"] for row in bench._rows if row["met"] is False]
    sys.exit(f"\nmissed: {'; '.join(missed)}" if missed else None)


if __name__ == "__main__":
    main()
