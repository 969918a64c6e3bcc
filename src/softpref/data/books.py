"""What a set has shown so far, kept on disk: memory does not grow with the pairs."""

import os
import sqlite3
import weakref

from softpref.data.temporary import temporary_folder


class Books:
    """The uids and the contents of the pairs seen so far, in a temporary database.

    SQLite keeps a few megabytes of it in memory; the file goes with the last reference.

    Attributes:
        form: what is alike in all rows of the set, in words; empty before the first.
    """

    def __init__(self) -> None:
        self.form = ""
        self._sources: list[str] = []
        folder, remove = temporary_folder()
        weakref.finalize(self, remove)
        path = os.path.join(folder, "books.sqlite")
        self._database = sqlite3.connect(path, isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = OFF",  # nobody reads it after a crash
            "PRAGMA synchronous = OFF",
            "CREATE TABLE uids (uid TEXT PRIMARY KEY, source INTEGER, row INTEGER) WITHOUT ROWID",
            "CREATE TABLE contents (key TEXT PRIMARY KEY, ahead INTEGER, reverse INTEGER,"
            " ahead_in INTEGER, reverse_in INTEGER) WITHOUT ROWID",
        ):
            self._database.execute(statement)

    def place_of(self, uid: str) -> tuple[str, int] | None:
        """The source and row that were entered under a uid; None where there are none."""
        query = "SELECT source, row FROM uids WHERE uid = ?"
        found = self._database.execute(query, (uid,)).fetchone()
        return found and (self._sources[found[0]], found[1])

    def enter_uid(self, uid: str, source: str, row: int) -> None:
        """Enters a uid that is not there yet."""
        values = (uid, self._number(source), row)
        self._database.execute("INSERT INTO uids VALUES (?, ?, ?)", values)

    def orders(self, key: str) -> tuple[int, int]:
        """How often a content was entered with its responses in sorted and in reverse order."""
        query = "SELECT ahead, reverse FROM contents WHERE key = ?"
        return self._database.execute(query, (key,)).fetchone() or (0, 0)

    def first_source(self, key: str, *, ahead: bool) -> str:
        """The source in which a content that was entered in this order came first so."""
        query = f"SELECT {'ahead_in' if ahead else 'reverse_in'} FROM contents WHERE key = ?"
        return self._sources[self._database.execute(query, (key,)).fetchone()[0]]

    def enter_order(self, key: str, source: str, *, ahead: bool) -> None:
        """Counts a content of a source once more, in sorted order or in reverse."""
        number = self._number(source)
        self._database.execute(
            "INSERT INTO contents VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE"
            " SET ahead = ahead + excluded.ahead, reverse = reverse + excluded.reverse,"
            " ahead_in = ifnull(ahead_in, excluded.ahead_in),"
            " reverse_in = ifnull(reverse_in, excluded.reverse_in)",
            (key, int(ahead), int(not ahead), number if ahead else None, None if ahead else number),
        )

    def _number(self, source: str) -> int:
        if source not in self._sources[-1:]:  # one source's rows come together
            self._sources.append(source)
        return len(self._sources) - 1
