"""Opens files in folders where others may have put something in their place: a link, a pipe, a device.

A link would have another file cut or written, a pipe would be waited for without end, a device never ends.
"""

import os
import stat
from pathlib import Path
from typing import IO, Any


class NotOurFileError(OSError):
    """Something that is no plain file stands in a file's place."""


def open_own(path: Path, flags: int, mode: str, **more: Any) -> IO[Any]:
    """Open a file of a folder of ours, made if need be, that is a plain file and no link.

    Args:
        path: which.
        flags: of ``os.open``; ``O_TRUNC`` takes effect only once the file is known to be plain.
        mode: for ``os.fdopen``, with ``more``.

    Raises:
        NotOurFileError: a link, a pipe, a folder or a device stands there.
        OSError: it cannot be opened.
    """
    if path.is_symlink():
        raise NotOurFileError(0, "it is a link; move it away", str(path))
    if path.exists() and not path.is_file():
        raise NotOurFileError(0, "it is no plain file; move it away", str(path))
    # Somebody may be quicker than these looks. Without O_NONBLOCK the opening itself would wait at a pipe.
    handle = os.open(path, (flags & ~os.O_TRUNC) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise NotOurFileError(0, "it is no plain file; move it away", str(path))
        if flags & os.O_TRUNC:
            os.ftruncate(handle, 0)
        return os.fdopen(handle, mode, **more)
    except BaseException:
        os.close(handle)
        raise
