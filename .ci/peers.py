"""flowstore beside what people take instead: the table *why not* of the README.

    python .ci/peers.py [FOLDER] [--quick] [--here]

Makes a virtual environment of its own in .ci/venvs/peers for the peers that have to be
installed, and runs itself there; with --here it runs in this one, with what is installed in
it. Each peer is used as its documentation shows, at its own defaults, but for the timeout:
3 seconds wherever one can be set. FOLDER should be on the disk that matters.

The columns: 16 processes that write 50 values each at once: their writes a second, the
slowest one, those that failed, and those that are missing afterwards though they did not;
how many of 20 writers that were killed lost an acknowledged write, or left a store that
can't be read; how many of 160 first opens, by 16 processes at once, failed; a read that
opens, reads one value and closes; and one where the store is kept open.
"""

from __future__ import annotations

import argparse
import contextlib
import dbm
import json
import multiprocessing
import os
import shelve
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
VENV = HERE.parent / "venvs" / "peers"
PACKAGES = ("diskcache",)
TIMEOUT = 3.0
SELECT = "SELECT value FROM cache WHERE key = ?"
sys.path.insert(0, str(HERE.parent.parent))

# ---- the peers: each has write(), read(), and kept_open(), which yields a read() ----


class Flowstore:
    def __init__(self, path):
        import flowstore

        self.store = flowstore.SQLiteDataStore(path, timeout=TIMEOUT)
        self.write = self.store.set_cache_entry
        self.read = self.store.get_cache_entry

    @contextlib.contextmanager
    def kept_open(self):
        with self.store.session() as session:
            yield session.get_cache_entry


class ByHand:
    """sqlite3 as its tutorial has it: a table, a connection per operation, the defaults."""

    def __init__(self, path):
        self.path = path
        with self.opened() as sql:
            sql.execute(
                "CREATE TABLE IF NOT EXISTS cache (key TEXT PRIMARY KEY, value BLOB)"
            )

    @contextlib.contextmanager
    def opened(self):
        sql = sqlite3.connect(self.path, timeout=TIMEOUT)
        with contextlib.closing(sql), sql:
            yield sql

    def write(self, key, value):
        with self.opened() as sql:
            sql.execute("INSERT OR REPLACE INTO cache VALUES (?, ?)", (key, value))

    def read(self, key):
        with self.opened() as sql:
            found = sql.execute(SELECT, (key,)).fetchone()
            return found and found[0]

    @contextlib.contextmanager
    def kept_open(self):
        with self.opened() as sql:
            yield lambda key: sql.execute(SELECT, (key,)).fetchone()[0]


class Shelve:
    def __init__(self, path):
        self.path = path
        with shelve.open(path):
            pass

    def write(self, key, value):
        with shelve.open(self.path) as shelf:
            shelf[key] = value

    def read(self, key):
        with shelve.open(self.path) as shelf:
            return shelf.get(key)

    @contextlib.contextmanager
    def kept_open(self):
        with shelve.open(self.path) as shelf:
            yield shelf.get


class Dbm:
    def __init__(self, path):
        self.path = path
        with dbm.open(path, "c"):
            pass

    def write(self, key, value):
        with dbm.open(self.path, "c") as database:
            database[key] = value

    def read(self, key):
        with dbm.open(self.path, "c") as database:
            return database.get(key)

    @contextlib.contextmanager
    def kept_open(self):
        with dbm.open(self.path, "c") as database:
            yield database.get


class JSONFile:
    """One file, read, changed and put in place of the old one, as people write it."""

    def __init__(self, path):
        self.path = path
        if not os.path.exists(path):
            self.replace({})

    def replace(self, data):
        part = f"{self.path}.{os.getpid()}"
        Path(part).write_text(json.dumps(data))
        os.replace(part, self.path)

    def write(self, key, value):
        self.replace({**json.loads(Path(self.path).read_text()), key: value.decode()})

    def read(self, key):
        value = json.loads(Path(self.path).read_text()).get(key)
        return value and value.encode()

    @contextlib.contextmanager
    def kept_open(self):
        yield self.read


class Diskcache:
    def __init__(self, path):
        import diskcache

        self.make = lambda: diskcache.Cache(path, timeout=TIMEOUT)
        with self.make():
            pass

    def write(self, key, value):
        with self.make() as cache:
            cache[key] = value

    def read(self, key):
        with self.make() as cache:
            return cache.get(key)

    @contextlib.contextmanager
    def kept_open(self):
        with self.make() as cache:
            yield cache.get


PEERS = {
    "flowstore": Flowstore,
    "sqlite3 by hand": ByHand,
    "diskcache": Diskcache,
    "shelve": Shelve,
    "dbm": Dbm,
    "a JSON file": JSONFile,
}

# ---- what is measured ----


def value(number):
    return b"%100d" % number


def at_once(task, processes, *arguments):
    """The results of a task in so many processes that begin at the same moment."""
    start = time.monotonic() + 0.5 + processes / 30
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        jobs = [(number, start, *arguments) for number in range(processes)]
        return pool.starmap(task, jobs, 1)


def write_many(number, start, peer, path, count):
    """When it ended, its slowest write, and the keys whose write was acknowledged."""
    time.sleep(max(start - time.monotonic(), 0))
    slowest, written, store = 0.0, [], None
    for n in range(count):
        began = time.monotonic()
        with contextlib.suppress(Exception):  # whatever a peer raises
            store = store or PEERS[peer](path)
            store.write(f"{number} {n}", value(n))
            written.append((f"{number} {n}", n))
        slowest = max(slowest, time.monotonic() - began)
    return time.monotonic(), slowest, written, start


def missing(peer, path, written):
    """How many of these writes can't be read again."""
    try:
        store = PEERS[peer](path)
    except Exception:
        return len(written)
    lost = 0
    for key, n in written:
        try:
            lost += store.read(key) != value(n)
        except Exception:
            lost += 1
    return lost


def storm(peer, path, count):
    """Writes a second that were acknowledged, the slowest, how many failed, how many are lost."""
    PEERS[peer](path)
    results = at_once(write_many, 16, peer, path, count)
    written = [each for result in results for each in result[2]]
    seconds = max(result[0] for result in results) - results[0][3]
    slowest = max(result[1] for result in results)
    failed = 16 * count - len(written)
    return len(written) / seconds, slowest, failed, missing(peer, path, written)


def killed_writer(peer, path, acknowledged):
    store, n = PEERS[peer](path), 0
    while True:
        store.write(f"key {n}", value(n))
        os.write(acknowledged, b".")
        n += 1


def kill(peer, path, delay):
    """Whether a writer that is killed lost an acknowledged write, or the whole store."""
    reading, writing = os.pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=killed_writer, args=(peer, path, writing))
    process.start()
    os.close(writing)
    count = len(os.read(reading, 1))  # it is at work
    time.sleep(delay)
    process.kill()
    process.join()
    with open(reading, "rb") as pipe:
        count += len(pipe.read())
    # whoever was killed with a lock held may have left it; that is a store that can't be read
    with contextlib.suppress(TimeoutError), limited(10):
        return missing(peer, path, [(f"key {n}", n) for n in range(count)]) > 0
    return True


@contextlib.contextmanager
def limited(seconds):
    def give_up(number, frame):
        raise TimeoutError

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def open_one(number, start, peer, path):
    """Whether opening a store that isn't there yet, and a write, failed."""
    time.sleep(max(start - time.monotonic(), 0))
    try:
        store = PEERS[peer](path)
        store.write(str(number), value(number))
        return False
    except Exception:
        return True


def median(read, seconds):
    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        read("key")
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def reads(peer, path, seconds):
    """The time of a read that opens and closes, and of one where it is kept open."""
    store = PEERS[peer](path)
    store.write("key", value(1))
    with store.kept_open() as read:
        kept_open = median(read, seconds)
    return median(store.read, seconds), kept_open


def row(peer, folder, quick):
    paths = (os.path.join(folder, f"{peer.split()[0]} {n}") for n in range(1000))
    rate, slowest, failed, lost = storm(peer, next(paths), 10 if quick else 50)
    kills = 4 if quick else 20
    damaged = sum(kill(peer, next(paths), 0.01 + n * 0.005) for n in range(kills))
    rounds = 2 if quick else 10
    failures = sum(sum(at_once(open_one, 16, peer, next(paths))) for _ in range(rounds))
    lone, kept_open = reads(peer, next(paths), 0.3 if quick else 2)
    cells = (
        f"{rate:,.0f}",
        f"{slowest:.2f} s",
        str(failed),
        str(lost),
        f"{damaged} of {kills}",
    )
    times = f"{lone * 1e3:.2f} ms", f"{kept_open * 1e3:.3f} ms"
    return (*cells, f"{failures} of {rounds * 16}", *times)


# ---- the program ----


def versions():
    from importlib.metadata import PackageNotFoundError, version

    import flowstore

    found = [
        f"flowstore {flowstore.__version__}",
        f"Python {sys.version.split()[0]}",
        f"SQLite {sqlite3.sqlite_version}",
    ]
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    with tempfile.TemporaryDirectory() as folder:
        Dbm(os.path.join(folder, "dbm"))
        found.append(f"{dbm.whichdb(os.path.join(folder, 'dbm'))} for dbm and shelve")
    return ", ".join([*found, sys.platform, f"{os.cpu_count()} cores"])


def main():
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
        "--here", action="store_true", help="make no environment of its own"
    )
    options = parser.parse_args()
    if not options.here:
        if not VENV.exists():
            subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        python = VENV / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        raise SystemExit(subprocess.call([python, HERE, *sys.argv[1:], "--here"]))
    print(f"{versions()}\n")
    heads = (
        "writes/s",
        "slowest",
        "failed",
        "lost",
        "killed",
        "first opens",
        "lone read",
        "kept open",
    )
    print(f"| {'16 processes at once':20} |", *(f"{head:>11} |" for head in heads))
    print("|---|" + "---:|" * len(heads))
    with tempfile.TemporaryDirectory(
        dir=options.folder, prefix="flowstore-peers-"
    ) as folder:
        for peer in PEERS:
            try:
                cells = row(peer, folder, options.quick)
            except ImportError:
                cells = ("not installed",) + ("",) * 7
            print(f"| {peer:20} |", *(f"{cell:>11} |" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
