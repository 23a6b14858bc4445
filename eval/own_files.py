"""Safe opening of files in places where there may be something else: a link, a pipe, a device.

Writing through a link would change another file, opening a pipe may block forever, and a device may never end.
"""

import errno
import os
import stat
from pathlib import Path
from typing import IO, Any


class NotOurFileError(OSError):
    """A link, a pipe, a folder or a device in the place of a file."""


def open_plain(path: Path, flags: int, mode: str, **more: Any) -> IO[Any]:
    """Open a regular file, also one that a link leads to.

    Args:
        path: of the file.
        flags: of ``os.open``; ``O_TRUNC`` takes effect only once the file is known to be a regular one.
        mode: for ``os.fdopen``, with ``more``.

    Raises:
        OSError: the file cannot be opened, or is no regular one.
    """
    # Without O_NONBLOCK the opening itself would wait at a pipe.
    handle = os.open(path, (flags & ~os.O_TRUNC) | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        kind = os.fstat(handle).st_mode
        if not stat.S_ISREG(kind):
            what = "Is a directory" if stat.S_ISDIR(kind) else "it is no regular file"
            raise OSError(errno.EINVAL, what, str(path))
        if flags & os.O_TRUNC:
            os.ftruncate(handle, 0)
        return os.fdopen(handle, mode, **more)
    except BaseException:
        os.close(handle)
        raise


def open_own(path: Path, flags: int, mode: str, **more: Any) -> IO[Any]:
    """Open a file of an output folder; refuse links and everything else that is no regular file.

    Args:
        path: of the file.
        flags, mode: as in :func:`open_plain`, with ``more``.

    Raises:
        NotOurFileError: a link, a pipe, a folder or a device is in the file's place.
        OSError: the file cannot be opened, or was replaced a moment ago.
    """
    if path.is_symlink():
        raise NotOurFileError(0, "it is a link; move it away", str(path))
    if path.exists() and not path.is_file():
        raise NotOurFileError(0, "it is no plain file; move it away", str(path))
    return open_plain(path, flags | os.O_NOFOLLOW, mode, **more)  # the file may be replaced after the checks above
