"""What a source has shown so far, kept on disk: memory does not grow with the pairs."""

import os
import sqlite3
import tempfile


class Books:
    """The uids and the contents of the pairs seen so far, in a temporary database.

    SQLite keeps a few megabytes of it in memory; the file goes with the last reference.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="softpref-")
        path = os.path.join(self._folder.name, "books.sqlite")
        self._database = sqlite3.connect(path, isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = OFF",  # nobody reads it after a crash
            "PRAGMA synchronous = OFF",
            "CREATE TABLE uids (uid TEXT PRIMARY KEY, row INTEGER) WITHOUT ROWID",
            "CREATE TABLE contents (key TEXT PRIMARY KEY, ahead INTEGER, reverse INTEGER)"
            " WITHOUT ROWID",
        ):
            self._database.execute(statement)

    def row_of(self, uid: str) -> int | None:
        """The row that was entered under a uid; None where there is none."""
        found = self._database.execute("SELECT row FROM uids WHERE uid = ?", (uid,)).fetchone()
        return found and int(found[0])

    def enter_uid(self, uid: str, row: int) -> None:
        """Enters a uid that is not there yet."""
        self._database.execute("INSERT INTO uids VALUES (?, ?)", (uid, row))

    def orders(self, key: str) -> tuple[int, int]:
        """How often a content was entered with its responses in sorted and in reverse order."""
        query = "SELECT ahead, reverse FROM contents WHERE key = ?"
        return self._database.execute(query, (key,)).fetchone() or (0, 0)

    def enter_order(self, key: str, *, ahead: bool) -> None:
        """Counts a content once more, in sorted order or in reverse."""
        self._database.execute(
            "INSERT INTO contents VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE"
            " SET ahead = ahead + excluded.ahead, reverse = reverse + excluded.reverse",
            (key, int(ahead), int(not ahead)),
        )
