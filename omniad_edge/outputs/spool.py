"""Records on their way to a network: kept on disk until the other side has acknowledged them.

A `Spooled` output has two threads: the queue's appends to the spool, its own sends, oldest first. So a server
that is away delays nothing and loses nothing, also over a restart. Delivery is at least once: a record whose
acknowledgement was lost is sent again, with the same "id".
"""

import json
import sqlite3
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, strftime

from ..errors import OutputError
from ..sizes import size_bytes
from ..verdict import Record
from .delivery import FailureSeries, Output, OutputStatus, Tally, backoff, in_words
from .record_text import json_text

ROW_BYTES = 32  # what a record takes on disk besides its text, about
FREE_PAGES = 256  # of 4096 bytes, given back to the file system when so many are free
IDLE_S = 1.0  # a sender with nothing to send looks after its connection this often
CLOSE_S = 2.0  # for sending what is left; then it stays in the spool

TABLES = """
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS records (
        id INTEGER PRIMARY KEY AUTOINCREMENT, bytes INTEGER NOT NULL, text TEXT NOT NULL
    );
    CREATE TABLE IF NOT EXISTS total (id INTEGER PRIMARY KEY CHECK (id = 1), records INTEGER, bytes INTEGER);
    INSERT OR IGNORE INTO total VALUES (1, 0, 0);
    COMMIT;
"""


@dataclass(frozen=True)
class SpoolCounts:
    """depth: records in the spool now, of `bytes`; removed, dropped: since it was opened first."""

    depth: int = 0
    bytes: int = 0
    removed: int = 0
    dropped: int = 0


class Spool:
    """A queue of texts in a SQLite file, of one process alone. May be used by several threads.

    limit_bytes: of all texts; when over it the oldest are dropped and counted. The file is a little larger
    report:      report("spool damaged", detail) if the file was broken and another one was begun

    What `append` took survives the process being killed, and but for the last moment a power cut.
    Every method raises OutputError or OSError for what may pass: disk full, no permission, another process has it.
    """

    def __init__(
        self,
        path: str | Path,
        limit_bytes: int,
        report: Callable[[str, str], None] = lambda event, detail: None,
    ) -> None:
        self.path = Path(path)
        self.counts = SpoolCounts()  # replaced as a whole: reading takes no lock, so never waits for the disk
        self._limit_bytes, self._report = limit_bytes, report
        self._lock = threading.Lock()  # guards what follows
        self._opened = False
        self._db: sqlite3.Connection | None = None
        self._removed_up_to = 0

    @property
    def depth(self) -> int:
        return self.counts.depth

    def open(self) -> None:
        """Begin or continue the file; a damaged one is moved aside, beside it."""
        with self._lock:
            self._opened = True
            try:
                with self._errors():
                    self._connection()
            except _Damaged:
                with self._errors():
                    self._connection()

    def append(self, texts: list[str]) -> None:
        """On disk when this returns; all of them or, if it raises, none."""
        rows = [(len(text.encode()) + ROW_BYTES, text) for text in texts]
        self._transact(lambda db: self._append(db, rows))

    def oldest(self, n: int) -> list[tuple[int, str]]:
        """At most n of those not removed, as (id, text)."""
        query = "SELECT id, text FROM records WHERE id > ? ORDER BY id LIMIT ?"
        with self._lock, self._errors():
            return self._connection().execute(query, (self._removed_up_to, n)).fetchall()

    def remove(self, up_to_id: int) -> None:
        """Remove the oldest, to this one. `oldest` gives them no more, even if this raises."""
        with self._lock:
            self._removed_up_to = max(self._removed_up_to, up_to_id)
        self._transact(self._remove)
        with self._lock, self._errors():
            db = self._connection()
            if db.execute("PRAGMA freelist_count").fetchone()[0] > FREE_PAGES:
                db.executescript(f"PRAGMA incremental_vacuum({FREE_PAGES})")  # `execute` would free one page alone

    def close(self) -> None:
        with self._lock:
            self._opened = False
            self._disconnect()

    # ---- with the lock held

    def _append(self, db: sqlite3.Connection, rows: list[tuple[int, str]]) -> SpoolCounts:
        db.executemany("INSERT INTO records (bytes, text) VALUES (?, ?)", rows)
        size = self.counts.bytes + sum(row_bytes for row_bytes, _ in rows)
        dropped = last_id = 0
        if size > self._limit_bytes:
            for row_id, row_bytes in db.execute("SELECT id, bytes FROM records ORDER BY id"):
                last_id, dropped, size = row_id, dropped + 1, size - row_bytes
                if size <= self._limit_bytes:
                    break
            db.execute("DELETE FROM records WHERE id <= ?", (last_id,))
        counts = self.counts
        depth = counts.depth + len(rows) - dropped
        return replace(counts, depth=depth, bytes=size, dropped=counts.dropped + dropped)

    def _remove(self, db: sqlite3.Connection) -> SpoolCounts:
        which = (self._removed_up_to,)
        removed, size = db.execute("SELECT count(*), total(bytes) FROM records WHERE id <= ?", which).fetchone()
        db.execute("DELETE FROM records WHERE id <= ?", which)
        counts = self.counts
        depth, removed_before = counts.depth - removed, counts.removed
        return replace(counts, depth=depth, bytes=counts.bytes - int(size), removed=removed_before + removed)

    def _transact(self, work: Callable[[sqlite3.Connection], SpoolCounts]) -> None:
        with self._lock, self._errors():
            db = self._connection()
            try:
                db.execute("BEGIN IMMEDIATE")
                counts = work(db)
                db.execute("UPDATE total SET records = ?, bytes = ?", (counts.depth, counts.bytes))
                db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise
            self.counts = counts

    def _connection(self) -> sqlite3.Connection:
        if not self._opened:
            raise OutputError(f"spool {self.path}: it is closed")
        if self._db is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self.path, timeout=0.5, isolation_level=None, check_same_thread=False)
            try:
                depth, size = _prepare(db)
            except BaseException:
                db.close()
                raise
            self._db, self.counts = db, replace(self.counts, depth=depth, bytes=size)
        return self._db

    def _disconnect(self) -> None:
        if self._db is not None:
            db, self._db = self._db, None
            with suppress(sqlite3.Error):
                db.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, sqlite3.ProgrammingError) as exc:
            advice = (
                "another output or process uses it; give each its own" if "locked" in str(exc) else "free space"
            )
            if "full" not in str(exc):  # reading and sending go on with a full disk, which opening it would not
                self._disconnect()
                advice = advice if "locked" in str(exc) else "check its folder and disk"
            raise OutputError(f"spool {self.path}: {exc}; {advice}") from exc
        except sqlite3.DatabaseError as exc:
            raise _Damaged(f"spool {self.path}: {exc}; {self._move_aside(str(exc))}") from exc

    def _move_aside(self, reason: str) -> str:
        """In words what was done. What the damaged file held counts as dropped."""
        self._disconnect()
        aside = self.path.with_name(f"{self.path.name}.damaged-{strftime('%Y%m%dT%H%M%S')}")
        for ending in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                Path(f"{self.path}{ending}").replace(f"{aside}{ending}")
        counts = self.counts
        self.counts = replace(counts, depth=0, bytes=0, dropped=counts.dropped + counts.depth)
        self._removed_up_to = 0
        done = f"it was moved to {aside}, with what had not been sent, and another one begun"
        self._report("spool damaged", f"{self.path}: {reason}; {done}")
        return done


class _Damaged(OutputError):
    """The file was broken; the next try finds a new one."""


def _prepare(db: sqlite3.Connection) -> tuple[int, int]:
    """Settings and tables. -> number and bytes of the records there."""
    # Damaged text is sent as it is and refused there: as an error here it would come again at each try.
    db.text_factory = lambda data: data.decode(errors="replace")
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA locking_mode = EXCLUSIVE")  # two processes would send everything twice
    db.execute("PRAGMA journal_mode = WAL").fetchall()
    db.execute("PRAGMA synchronous = NORMAL")
    db.executescript(TABLES)
    return db.execute("SELECT records, bytes FROM total").fetchone()


@dataclass(frozen=True)
class Message:
    """A record to be sent: its JSON text and what is in it."""

    text: str
    record: dict


class Spooled(Output):
    """Base of network outputs: `write` appends to a spool, a thread sends from it what `send` can take.

    spool: path of the file, for this output alone; keep: its size, the oldest records go when it is full

    Its status counts delivered records as written, refused ones as failed and those the spool had no room for as
    dropped; when at rest: put + spooled at the start == written + failed + dropped + waiting + spooled.
    """

    images = False
    send_batch = 1  # at most so many records a `send`

    def __init__(self, name: str, spool: str | Path, keep: str) -> None:
        self.name = name
        self._spool = Spool(spool, size_bytes(keep), self._tell)
        self._failures = FailureSeries("output", self._tell)
        self._refusals, self._drops = Tally(self._tell, "output refused"), Tally(self._tell, "output dropped")
        self._refused = 0
        self._wake, self._stop = threading.Event(), threading.Event()
        self._sender: threading.Thread | None = None

    # ---- for the kind of network; all called from the sender's thread

    def connect(self) -> None:
        """Called before each `send` and every second without one. Raises OutputError or OSError."""

    @abstractmethod
    def send(self, messages: list[Message]) -> list[str]:
        """Return when all are acknowledged. -> why, for each that was refused for good.

        Raises OutputError or OSError if all are to be sent again later.
        """

    def disconnect(self) -> None:
        """At the end; must not raise."""

    # ---- for the queue

    def open(self) -> None:
        self._spool.open()
        self._stop.clear()
        self._sender = threading.Thread(target=self._run, name=f"sender {self.name}", daemon=True)
        self._sender.start()

    def write(self, records: list[Record]) -> None:
        self._spool.append([json_text(record) for record in records])
        self._wake.set()
        self._drops.update(self._spool.counts.dropped, "the spool was full or damaged")

    def close(self) -> None:
        """Send what is left for at most two seconds; the rest is sent after the next start."""
        self._stop.set()
        self._wake.set()
        if self._sender is not None:
            self._sender.join(CLOSE_S + 0.5)
        self._spool.close()

    def refine(self, status: OutputStatus) -> OutputStatus:
        counts = self._spool.counts
        return replace(
            status,
            written=counts.removed - self._refused,
            failed=status.failed + self._refused,
            dropped=status.dropped + counts.dropped,
            spooled=counts.depth,
        )

    def _tell(self, event: str, detail: str) -> None:
        self.report(event, detail)

    # ---- the sender's thread

    def _run(self) -> None:
        pauses, end_s = backoff(), None
        while end_s is None or monotonic() < end_s:
            self._wake.clear()
            stopping = self._stop.is_set()
            try:
                self.connect()
                sent = self._send_oldest()
            except Exception as exc:
                self._failures.bad(in_words(exc))
                if stopping:
                    break
                self._stop.wait(next(pauses))
                continue
            self._failures.good()
            pauses = backoff()
            if stopping:
                if not sent:
                    break
                end_s = end_s or monotonic() + CLOSE_S
            elif not sent:
                self._wake.wait(IDLE_S)
        self.disconnect()

    def _send_oldest(self) -> int:
        """-> how many records are done with."""
        rows = self._spool.oldest(self.send_batch)
        if not rows:
            return 0
        messages, refused = [], []
        for _, text in rows:
            try:
                messages.append(Message(text, json.loads(text)))
            except ValueError:
                refused.append("it was damaged on disk")
        if messages:
            refused += self.send(messages)
        before = self._spool.counts.removed
        self._spool.remove(rows[-1][0])
        if refused:
            # One that the full spool dropped meanwhile is counted there.
            self._refused += min(len(refused), self._spool.counts.removed - before)
            self._refusals.update(self._refused, refused[-1])
        return len(rows)
