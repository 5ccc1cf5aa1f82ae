"""What flowstore costs beside sqlite3 by hand: the table of the README.

    python .ci/bench.py [FOLDER] [--quick] [--rows GROUP ...] [--json FILE]

By hand is: connect, one statement, close, at synchronous=FULL, in a file of the same schema;
in a session it is one held connection, with a transaction around a write and none around a
read. Both sides take turns, in FOLDER (the disk matters). A ratio is that of the medians, by
the clock and by processor time, which is the steadier of the two on a busy machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench_pg

import flowstore

FIELDS = ", ".join(flowstore.ExecutionRecord._fields)
GET = "SELECT value FROM cache WHERE key = ?"
SET = """
    INSERT INTO cache (key, value) VALUES (?, ?)
    ON CONFLICT (key) DO UPDATE SET value = excluded.value"""
NEWEST = f"SELECT {FIELDS} FROM history WHERE ref = ? ORDER BY started_at DESC LIMIT 10"
EVERYTHING = f"SELECT {FIELDS} FROM history ORDER BY ref, started_at"
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
LINE = "{:42}{:>12}{:>12}{:>9}{:>9}{:>9}  {}"

# What `run x -- true` does, with what any program in Python has for it.
RUN_BY_HAND = """
import sqlite3, subprocess, sys
def write(status):
    sql = sqlite3.connect(sys.argv[1], isolation_level=None)
    sql.execute("UPDATE history SET status = ? WHERE ref = 'by hand'", (status,))
    sql.close()
write("running")
status = subprocess.call(["true"])
write("completed")
sys.exit(status)
"""

# ---- the two sides ----


def connect(path, timeout=3.0):
    return sqlite3.connect(path, timeout=timeout, isolation_level=None)


def by_hand(path, statement, values=()):
    """Connect, one statement, close; its rows. FULL is SQLite's default, said all the same."""
    sql = connect(path)
    sql.execute("PRAGMA synchronous = FULL")
    rows = sql.execute(statement, values).fetchall()
    sql.close()
    return rows


def write_by_hand(sql, number):
    """A write in a transaction of its own on a connection that is held."""
    sql.execute("BEGIN IMMEDIATE")
    sql.execute(SET, ("key", value(number)))
    sql.execute("COMMIT")


def value(number):
    """100 bytes, other ones each time: SQLite doesn't write what is there already."""
    return b"%100d" % number


def record(number, ref):
    return flowstore.ExecutionRecord(
        ref,
        START + timedelta(seconds=number),
        timedelta(milliseconds=number),
        id=str(uuid.uuid4()),
        status="completed",
        log_archive_id=str(uuid.uuid4()),
        completed_at=START + timedelta(seconds=number + 1),
        pid=number % 32768,
        command="make -j4 all",
        source="cli",
        working_dir="/home/me/projects/app",
    )


def filled(path, records):
    """A store with these records."""
    store = flowstore.SQLiteDataStore(path)
    with store.transaction() as transaction:
        for each in records:
            transaction.record_execution(each)
    return store


def filled_fast(path, count):
    """A store with a long history of one ref: a record of flowstore's, many times."""
    store = filled(path, [record(0, "long")])
    sql = connect(path)
    found = sql.execute("SELECT * FROM history")
    row = dict(
        zip([column[0] for column in found.description], found.fetchone(), strict=True)
    )
    columns = ", ".join(name for name in row if name != "seq")
    marks = ", ".join(f":{name}" for name in row if name != "seq")
    sql.execute("BEGIN")
    for number in range(1, count):
        row["id"] = f"{number:036}"
        row["started_at"] = (
            f"{START + timedelta(seconds=number):%Y-%m-%dT%H:%M:%S}.000000Z"
        )
        sql.execute(f"INSERT INTO history ({columns}) VALUES ({marks})", row)
    sql.execute("COMMIT")
    sql.close()
    return store


# ---- measuring ----


def now():
    """By the clock, and the processor time of this process and the children it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = time.process_time() + children.ru_utime + children.ru_stime
    return time.perf_counter(), processor


def measured(call, number):
    clock, processor = now()
    call(number)
    clock_after, processor_after = now()
    return clock_after - clock, processor_after - processor


def quantity(seconds):
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


class Bench:
    """Its public methods are the groups of rows."""

    def __init__(self, folder, quick):
        self.folder, self.quick = folder, quick
        self.names, self.rows = itertools.count(), []

    def _path(self):
        return os.path.join(self.folder, f"{next(self.names)}.db")

    def _store(self):
        """A store, and a twin of its file for the other side."""
        store, twin = flowstore.SQLiteDataStore(self._path()), self._path()
        shutil.copyfile(store.path, twin)
        return store, twin

    def _row(self, name, ours, hand, by_clock="", by_processor="", *, goal="", met=()):
        missed = [where for where, is_met in zip(("clock", "CPU"), met) if not is_met]
        shown = "met" if met else ""
        if missed:
            shown = f"missed: {', '.join(missed)}"
        print(
            LINE.format(name, ours, hand, by_clock, by_processor, goal, shown), flush=True
        )
        ratios = {"by_clock": by_clock, "by_processor": by_processor}
        self.rows.append(
            {"row": name, "flowstore": ours, "by_hand": hand, **ratios, "goal": goal}
        )

    def _compare(self, name, goal, ours, hand, *, times=1, seconds=6.0):
        """A row of a call that does a thing `times` times. No two calls get the same number."""
        numbers = itertools.count()
        taken = {ours: [], hand: []}
        for call in (ours, hand):
            call(next(numbers))  # caches and imports
        end = time.perf_counter() + (seconds / 10 if self.quick else seconds)
        while time.perf_counter() < end or len(taken[ours]) < 5:
            for call in (ours, hand):
                taken[call].append(measured(call, next(numbers)))
        medians = [
            [statistics.median(each) / times for each in zip(*taken[call], strict=True)]
            for call in taken
        ]
        [[ours_clock, ours_processor], [hand_clock, hand_processor]] = medians
        by_clock, by_processor = ours_clock / hand_clock, ours_processor / hand_processor
        met = (by_clock <= goal, by_processor <= goal) if goal else ()
        cells = (
            quantity(ours_clock),
            quantity(hand_clock),
            f"{by_clock:.2f}",
            f"{by_processor:.2f}",
        )
        self._row(name, *cells, goal=f"{goal:.2f}" if goal else "", met=met)

    # ---- the rows ----

    def lone(self):
        store, twin = self._store()
        self._compare(
            "lone write",
            1.10,
            lambda n: store.set_cache_entry("key", value(n)),
            lambda n: by_hand(twin, SET, ("key", value(n))),
        )
        self._compare(
            "lone read",
            1.28,
            lambda n: store.get_cache_entry("key"),
            lambda n: by_hand(twin, GET, ("key",)),
        )

    def session(self):
        store, twin = self._store()
        store.set_cache_entry("key", value(0))
        by_hand(twin, SET, ("key", value(0)))
        with store.session() as session, contextlib.closing(connect(twin)) as sql:
            sql.execute("PRAGMA synchronous = FULL")
            self._compare(
                "a session's read",
                2.5,
                lambda n: [session.get_cache_entry("key") for _ in range(1000)],
                lambda n: [sql.execute(GET, ("key",)).fetchone()[0] for _ in range(1000)],
                times=1000,
            )
            self._compare(
                "a session's write",
                1.10,
                lambda n: session.set_cache_entry("key", value(n)),
                lambda n: write_by_hand(sql, n),
            )

    def transaction(self):
        store, twin = self._store()
        keys = [f"key {number}" for number in range(1000)]

        def ours(n):
            with store.transaction() as transaction:
                for key in keys:
                    transaction.set_cache_entry(key, value(n))

        def hand(n):
            sql = connect(twin)
            sql.execute("BEGIN IMMEDIATE")
            for key in keys:
                sql.execute(SET, (key, value(n)))
            sql.execute("COMMIT")
            sql.close()

        self._compare(
            "a write in a transaction of 1,000", 2.5, ours, hand, times=len(keys)
        )

    def history(self):
        store = filled(
            self._path(), (record(n, f"ref {n % 1000}") for n in range(10_000))
        )
        self._compare(
            "all history of 1,000 refs, 10 each",
            2.0,
            lambda n: store.get_all_execution_history(),
            lambda n: by_hand(store.path, EVERYTHING),
        )

    def start(self):
        folder, path = os.path.join(self.folder, "start"), self._path()
        os.mkdir(folder)
        shutil.copy(flowstore.__file__, folder)
        store = flowstore.SQLiteDataStore(path)
        store.set_process_var("root", "key", "value")
        store.record_execution(flowstore.ExecutionRecord("by hand", START))
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FLOW"))
        }
        environment["FLOWSTORE_PATH"] = path
        # else each start would compile the source
        subprocess.run([sys.executable, "-m", "compileall", "-q", folder], check=True)

        def python(*arguments):
            return lambda n: subprocess.run(
                [sys.executable, *arguments],
                cwd=folder,
                env=environment,
                check=True,
                stdout=subprocess.DEVNULL,
            )

        bare = python("-c", "import sqlite3")
        program = ("-m", "flowstore")
        self._compare(
            "import, times `import sqlite3`", 1.25, python("-c", "import flowstore"), bare
        )
        self._compare(
            "`get`, times `import sqlite3`", 1.8, python(*program, "get", "key"), bare
        )
        run, run_by_hand = (
            python(*program, "run", "x", "--", "true"),
            python("-c", RUN_BY_HAND, path),
        )
        self._compare("`run x -- true`", 1.35, run, run_by_hand)

    def size(self):
        count = 5000 if self.quick else 100_000
        store = filled(self._path(), (record(n, f"ref {n % 100}") for n in range(count)))
        size = os.path.getsize(store.path) * (100_000 / count) / 1e6
        self._row(
            "100,000 records with uuids",
            f"{size:.1f} MB",
            "",
            goal="37 MB",
            met=(size <= 37,) * 2,
        )

    def newest(self):
        sizes = (100, 1000, 10_000) if self.quick else (100, 10_000, 1_000_000)
        stores = [filled_fast(self._path(), size) for size in sizes]
        for size, store in zip(sizes, stores, strict=True):
            self._compare(
                f"newest 10 of {size:,}",
                None,
                lambda n, store=store: store.get_execution_history("long", 10),
                lambda n, path=store.path: by_hand(path, NEWEST, ("long",)),
                seconds=3,
            )
        calls = [
            lambda n, store=store: store.get_execution_history("long", 10)
            for store in stores
        ]
        self._compare("newest 10 of most, times of fewest", 1.15, calls[-1], calls[0])

    def storm(self):
        for processes, each in ((16, 10),) if self.quick else ((16, 100), (64, 25)):
            store, twin = self._store()
            ours = storm(operation_of_flowstore, store.path, processes, each)
            hand = storm(operation_by_hand, twin, processes, each)
            name = f"storm of {processes}:"
            self._row(
                f"{name} writes and reads a second", f"{ours[0]:,.0f}", f"{hand[0]:,.0f}"
            )
            self._row(f"{name} slowest", quantity(ours[1]), quantity(hand[1]))
            self._row(f"{name} errors", ours[2], hand[2])

    def server(self):
        if not bench_pg.programs() or not importlib.util.find_spec("psycopg"):
            self._row("PostgreSQL: its programs or psycopg are missing", "", "")
            return
        with bench_pg.server() as url:
            store = flowstore.PostgresDataStore(url, schema="bench")
            hand = bench_pg.ByHand(url, "bench")
            for write, what in ((True, "write"), (False, "read")):
                self._compare(
                    f"PostgreSQL: a lone {what}",
                    1.15,
                    lambda n, write=write: act(store, write, n),
                    lambda n, write=write: hand.lone(write, n),
                )
            with store.session() as session, hand.connect() as connection:
                for write, what in ((True, "write"), (False, "read")):
                    self._compare(
                        f"PostgreSQL: a session's {what}",
                        1.3,
                        lambda n, write=write: act(session, write, n),
                        lambda n, write=write: hand.whole(connection, write, n),
                    )

            def ours(n, write):
                with store.transaction() as transaction:
                    for number in range(200):
                        act(transaction, write, n * 200 + number)

            def by_hand(n, write):
                with contextlib.closing(hand.connect()) as connection:
                    hand.begin(connection, True)
                    for number in range(200):
                        hand.act(connection, write, n * 200 + number)
                    connection.commit()

            for write, what in ((True, "write"), (False, "read")):
                self._compare(
                    f"PostgreSQL: a {what} in a transaction of 200",
                    1.5,
                    lambda n, write=write: ours(n, write),
                    lambda n, write=write: by_hand(n, write),
                    times=200,
                )


def act(store, write, number):
    if write:
        store.set_process_var("bucket", "key", str(number))
    else:
        store.get_process_var("bucket", "key")


def operation_of_flowstore(path):
    """What writes a value and reads it."""
    store, key = flowstore.SQLiteDataStore(path), str(os.getpid())

    def operation(number):
        store.set_cache_entry(key, value(number))
        store.get_cache_entry(key)

    return operation


def operation_by_hand(path):
    key = str(os.getpid())

    def operation(number):
        by_hand(path, SET, (key, value(number)))
        by_hand(path, GET, (key,))

    return operation


def storm_process(make, path, each, start):
    operation, errors, slowest = make(path), 0, 0.0
    time.sleep(max(start - time.monotonic(), 0))
    for number in range(each):
        before = time.monotonic()
        try:
            operation(number)
        except (flowstore.StoreError, sqlite3.Error):
            errors += 1
        slowest = max(slowest, time.monotonic() - before)
    return time.monotonic(), slowest, errors


def storm(make, path, processes, each):
    """Writes and reads a second, the slowest write with its read, and the number of errors."""
    start = time.monotonic() + 1 + processes / 30
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        found = pool.starmap(storm_process, [(make, path, each, start)] * processes, 1)
    ended, slowest, errors = zip(*found, strict=True)
    return 2 * each * processes / (max(ended) - start), max(slowest), sum(errors)


# ---- the program ----


def main():
    groups = [name for name in vars(Bench) if not name.startswith("_")]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", help="where to make a temporary folder to work in"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small and short, to try it out"
    )
    parser.add_argument(
        "--rows", nargs="+", choices=groups, default=groups, metavar="GROUP"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    options = parser.parse_args()
    machine = (
        f"flowstore {flowstore.__version__}, Python {sys.version.split()[0]},"
        f" SQLite {sqlite3.sqlite_version}, {sys.platform}, {os.cpu_count()} cores"
    )
    print(f"{machine}\n")
    print(LINE.format("", "flowstore", "by hand", "clock", "CPU", "goal", ""))
    with tempfile.TemporaryDirectory(
        dir=options.folder, prefix="flowstore-bench-"
    ) as folder:
        bench = Bench(folder, options.quick)
        for group in options.rows:
            getattr(bench, group)()
    if options.json:
        document = {"machine": machine, "rows": bench.rows}
        Path(options.json).write_text(
            json.dumps(document, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
