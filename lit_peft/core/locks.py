"""A lock on a file, which ends with the process that holds it."""

import errno
from pathlib import Path

from filelock import FileLock


def try_lock(file: Path) -> FileLock | None:
    """Takes a lock that lasts until its release, or until the process ends in whatever way.

    Returns:
        The lock; None on a file system that has none.

    Raises:
        filelock.Timeout: When another process holds it.
        OSError: When the file cannot be made.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return None
    return lock
