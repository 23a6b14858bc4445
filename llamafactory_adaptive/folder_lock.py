"""The lock that keeps a second run out of an output folder."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from llamafactory_adaptive.errors import OutputError
from llamafactory_adaptive.files import LOCK_FILE, cannot_write


# A killed run may take some seconds to end, until all of its processes are gone.
_LOCK_SECONDS = 15.0


@contextmanager
def locked(folder: Path, seconds: float = _LOCK_SECONDS) -> Iterator[None]:
    """Lock ``folder`` for this process alone; the operating system releases the lock however the process ends.

    Raises:
        OutputError: another process holds the lock for longer than ``seconds``, or the folder cannot be written.
    """
    path, made = folder / LOCK_FILE, not folder.exists()
    lock = FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise OutputError(
            f"another run works in {folder} ({_owner(path)}): wait until it has ended, or choose another folder"
        ) from error
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')}\n")
        yield
    finally:
        with suppress(OSError):  # while it is held: whoever waits for it then sees that it is gone
            path.unlink()
            if made and not os.listdir(folder):  # nothing came of it
                folder.rmdir()
        lock.release()


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[:200] or "it does not say which"
    except OSError:
        return "it does not say which"
