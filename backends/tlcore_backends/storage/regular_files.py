"""Regular files of this machine: opened, read and copied in few calls of the system."""

from __future__ import annotations

import errno
import os
import stat

# Larger writes make ext4 look for larger pieces of free memory, which takes far longer than it saves.
_PIECE_BYTES = 256 << 10


def open_regular(path: str, flags: int) -> int:
    """A handle of a regular file; a pipe or device, which could block or never end, is refused."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, "not a regular file", path)


def read_all(handle: int, start: int, count: int) -> bytes:
    """The ``count`` bytes from ``start`` on, or fewer at the file's end; a large file is not copied twice."""
    data = os.pread(handle, count, start)
    if len(data) == count or not data:
        return data
    # The system reads at most 2 GiB at a time.
    parts, done = [data], len(data)
    while done < count and (more := os.pread(handle, count - done, start + done)):
        parts.append(more)
        done += len(more)
    return b"".join(parts)


def copy_bytes(source: int, target: int) -> int:
    """Append all that one open file has from where it stands to another; returns how many bytes it was."""
    memory = memoryview(bytearray(_PIECE_BYTES))
    total = 0
    while count := os.readv(source, [memory]):
        part = memory[:count]
        while part:
            part = part[os.write(target, part) :]
        total += count
    return total
