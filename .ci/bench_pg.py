"""For bench.py: a PostgreSQL server of its own, and its statements by hand with psycopg."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

# The settings that a careful program sends too; a shorter text is no measure of the store.
BEGIN = """
    BEGIN ISOLATION LEVEL {}; SET LOCAL statement_timeout = 0;
    SET LOCAL idle_in_transaction_session_timeout = 0; SET LOCAL client_encoding = 'UTF8';
    SET LOCAL bytea_output = 'hex'; SET LOCAL tcp_keepalives_idle = 10;
    SET LOCAL tcp_keepalives_interval = 5; SET LOCAL tcp_keepalives_count = 3;
    SET LOCAL tcp_user_timeout = 25000; SET LOCAL lock_timeout = 3000;
    SET LOCAL search_path = "{}", pg_temp"""
SET = """INSERT INTO process_vars (bucket, key, value) VALUES (%s, %s, %s)
    ON CONFLICT (bucket, key) DO UPDATE SET value = excluded.value"""
GET = """SELECT COALESCE(
    (SELECT value FROM process_vars WHERE bucket = %s AND key = %s),
    (SELECT value FROM process_vars WHERE bucket = 'root' AND key = %s))"""


class ByHand:
    """A variable set and read in the store's own tables."""

    def __init__(self, url, schema):
        self.url, self.schema = url, schema

    def connect(self):
        import psycopg

        return psycopg.connect(
            self.url, autocommit=True, prepare_threshold=None, connect_timeout=3
        )

    def begin(self, connection, write):
        level = "READ COMMITTED READ WRITE" if write else "REPEATABLE READ READ ONLY"
        connection.execute(BEGIN.format(level, self.schema))
        if write:
            connection.execute("SELECT version FROM store FOR UPDATE").fetchall()

    def act(self, connection, write, number):
        if write:
            connection.execute(SET, ("bucket", "key", str(number)))
        else:
            connection.execute(GET, ("bucket", "key", "key")).fetchall()

    def whole(self, connection, write, number):
        """An operation in a transaction of its own."""
        self.begin(connection, write)
        self.act(connection, write, number)
        (connection.commit if write else connection.rollback)()

    def lone(self, write, number):
        with contextlib.closing(self.connect()) as connection:
            self.whole(connection, write, number)


def programs():
    """The folder of PostgreSQL's programs, or None."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@contextlib.contextmanager
def server():
    """Yields the URL of a server that is there for the time being, at its own defaults."""
    user = {}
    if os.geteuid() == 0:  # it refuses to run as root
        user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
    with tempfile.TemporaryDirectory(prefix="flowstore-", dir="/tmp") as folder:
        if user:
            shutil.chown(folder, "nobody")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        options = {"cwd": folder, "stdout": subprocess.DEVNULL, **user}
        options["stderr"] = subprocess.DEVNULL
        make = [
            "initdb",
            "--encoding=UTF8",
            "--locale=C",
            "--auth=trust",
            "--username=owner",
        ]
        make[0] = programs() / make[0]
        subprocess.run([*make, f"--pgdata={folder}/data"], check=True, **options)
        start = [
            programs() / "postgres",
            "-D",
            f"{folder}/data",
            "-p",
            port,
            "-k",
            folder,
        ]
        running = subprocess.Popen([*start, "-h", ""], **options)
        ready = [programs() / "pg_isready", "-q", "-h", folder, "-p", port]
        while subprocess.run(ready, check=False).returncode:
            time.sleep(0.05)
        try:
            yield f"postgresql://owner@/postgres?host={folder}&port={port}"
        finally:
            running.send_signal(signal.SIGINT)
            running.wait()
