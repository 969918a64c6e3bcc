"""The pairs of a set read so far, kept on disk so that memory does not grow with the set."""

import os
import sqlite3
import weakref

from softpref.data.temporary import temporary_folder


class SeenPairs:
    """The uids and contents of the pairs read so far, in a temporary database.

    SQLite keeps a few megabytes in memory; the file is removed with the last reference.

    Attributes:
        form: the structure that all rows share, such as "text"; empty before the first row.
    """

    def __init__(self) -> None:
        self.form = ""
        self._sources: list[str] = []
        folder, remove = temporary_folder()
        weakref.finalize(self, remove)
        path = os.path.join(folder, "pairs.sqlite")
        self._database = sqlite3.connect(path, isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = OFF",  # the file is never read after a crash
            "PRAGMA synchronous = OFF",
            "CREATE TABLE uids (uid TEXT PRIMARY KEY, source INTEGER, row INTEGER) WITHOUT ROWID",
            "CREATE TABLE contents (key TEXT PRIMARY KEY, sorted INTEGER, reversed INTEGER,"
            " sorted_in INTEGER, reversed_in INTEGER) WITHOUT ROWID",
        ):
            self._database.execute(statement)

    def place_of(self, uid: str) -> tuple[str, int] | None:
        """Return the source and row of a uid, or None if it is new."""
        query = "SELECT source, row FROM uids WHERE uid = ?"
        found = self._database.execute(query, (uid,)).fetchone()
        return found and (self._sources[found[0]], found[1])

    def add_uid(self, uid: str, source: str, row: int) -> None:
        """Add a new uid."""
        values = (uid, self._number(source), row)
        self._database.execute("INSERT INTO uids VALUES (?, ?, ?)", values)

    def orders(self, key: str) -> tuple[int, int]:
        """Return how often a content was added in sorted and in reversed order of its responses."""
        query = "SELECT sorted, reversed FROM contents WHERE key = ?"
        return self._database.execute(query, (key,)).fetchone() or (0, 0)

    def first_source(self, key: str, *, is_sorted: bool) -> str:
        """Return the source in which a content first appeared in this order."""
        query = f"SELECT {'sorted_in' if is_sorted else 'reversed_in'} FROM contents WHERE key = ?"
        return self._sources[self._database.execute(query, (key,)).fetchone()[0]]

    def add_order(self, key: str, source: str, *, is_sorted: bool) -> None:
        """Count one more occurrence of a content, in sorted or in reversed order."""
        number = self._number(source)
        first_in = (number, None) if is_sorted else (None, number)
        self._database.execute(
            "INSERT INTO contents VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE"
            " SET sorted = sorted + excluded.sorted, reversed = reversed + excluded.reversed,"
            " sorted_in = ifnull(sorted_in, excluded.sorted_in),"
            " reversed_in = ifnull(reversed_in, excluded.reversed_in)",
            (key, int(is_sorted), int(not is_sorted), *first_in),
        )

    def _number(self, source: str) -> int:
        if source not in self._sources[-1:]:  # the rows of a source are consecutive
            self._sources.append(source)
        return len(self._sources) - 1
