"""Which experts of an unfinished pack are safely on disk: a line each, written after the bytes are synced."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from foregate.errors import PackError

NAME = "journal.jsonl"


class Journal:
    """The journal in ``directory``. Holding it open keeps a second pack away from the same output."""

    def __init__(self, directory: Path, plan: str) -> None:
        """Open or begin the journal of ``plan`` (a hash of what is packed). Raises PackError if another pack runs."""
        self._plan = plan
        self.checksums: list[str] = []
        """Of the experts that are done, in order."""
        self.resumes = False
        """True where there is an earlier run of the same plan to go on with."""
        self._file = (directory / NAME).open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load()
        except BlockingIOError:
            self.close()
            raise PackError(f"{directory}: another process is writing this pack") from None
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        lines = self._complete_lines()
        self.resumes = bool(lines) and lines[0] == {"plan": self._plan}
        if self.resumes:
            self.checksums = [line["checksum"] for line in lines[1:]]
        else:
            self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self.checksums = []
        self._file.truncate(0)
        self._append([{"plan": self._plan}])

    def add(self, checksums: list[str]) -> None:
        """The next experts are on disk. Survives a crash once it returns."""
        self._append([{"checksum": checksum} for checksum in checksums])
        self.checksums += checksums

    def close(self) -> None:
        self._file.close()

    def _append(self, lines: list[dict[str, str]]) -> None:
        self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _complete_lines(self) -> list[dict[str, str]]:
        """What is there; a last line that a crash cut off is cut away."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            return []
