"""Whether this process may write to a run: one writer at a time, or two would overwrite each other's rows."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hessprobe.errors import UserError

try:
    import fcntl
except ImportError:  # a system without POSIX locks: nothing is checked there
    fcntl = None

LOCK = ".log.zarr.lock"


class RunLock:
    """The right to write to the run in a folder, until `release` or the end of the process, kill -9 included.

    A POSIX record lock: data-loading workers forked from the process do not inherit it, so an orphan of a
    killed run cannot keep it from being resumed; and the same process may take it again after a writer it
    lost. UserError if another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder.absolute() / LOCK
        self._file: int | None = None
        while fcntl is not None and self._file is None:
            try:
                file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except PermissionError as error:
                raise UserError(f"cannot write to the run in {folder}: {error.strerror}") from error
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(file)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise UserError(
                        f"another process is writing to the run in {folder}; wait until it has ended, "
                        "or give another folder"
                    ) from error
                return  # a file system without locks
            if self._is_current(file):
                self._file = file
            else:
                os.close(file)  # its owner removed it between our opening and our lock

    def _is_current(self, file: int) -> bool:
        try:
            return os.fstat(file).st_ino == os.stat(self._path).st_ino
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Gives the right back and removes the lock's file. Harmless if repeated."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None
