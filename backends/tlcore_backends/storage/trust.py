"""Whether somebody else could divert what is written below a directory."""

from __future__ import annotations

import os
import pwd
import stat

from tlcore.errors import BackendError

_MOST_LINKS = 40


def check_trusted(directory: str) -> None:
    """Raise BackendError when another user could replace ``directory`` or one above it.

    That is so where a directory that everybody can write (such as ``/tmp``) holds a directory or symbolic
    link of another user on the way, or lets everybody rename what it holds (it has no sticky bit). What
    does not exist yet is not looked at. Directories shared with a group are the group's own affair.
    """
    parent, waiting, links = "/", _parts(directory), 0
    while waiting:
        part = waiting.pop(0)
        if part == "..":
            parent = os.path.dirname(parent)
            continue
        path = os.path.join(parent, part)
        try:
            status = os.lstat(path)
            open_to_all = bool(os.stat(parent).st_mode & stat.S_IWOTH)
        except OSError:
            return
        if open_to_all:
            _check_owner(path, status, directory)
        if stat.S_ISLNK(status.st_mode):
            links += 1
            target = os.readlink(path)
            if links > _MOST_LINKS:
                raise BackendError(f"{directory}: too many symbolic links on the way")
            waiting = _parts(target) + waiting
            parent = "/" if os.path.isabs(target) else parent
        else:
            _check_mode(path, status, directory)
            parent = path


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _check_owner(path: str, status: os.stat_result, wanted: str) -> None:
    if status.st_uid in (0, os.geteuid()):
        return
    kind = "symbolic link" if stat.S_ISLNK(status.st_mode) else "directory"
    raise BackendError(
        f"{wanted}: the {kind} {path} belongs to {_user(status.st_uid)}, who could read or divert what is"
        " written there; choose an output_dir of your own (such as one in your home directory)"
    )


def _check_mode(path: str, status: os.stat_result, wanted: str) -> None:
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise BackendError(
            f"{wanted}: everybody can write {path} and replace what lies in it; choose another output_dir,"
            f" or protect it (chmod o-w {path}, or chmod +t {path} as for /tmp)"
        )


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"
