"""Files that are believed later: written whole or not at all, and told from damaged ones; folders that one process owns."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from fms_spec.errors import UserError

PARTIAL = re.compile(r"\..+\.\d+\.partial")  # what write_whole is writing: .NAME.PROCESS.partial
OWNER = ".owner"  # in a folder that one process writes: whose it is; locked for as long as it is
NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what file systems without locks answer, as some of clusters' do


def write_whole(path: Path, content: bytes) -> None:
    """Write bytes so that the file is there whole or not at all, even after a power failure; makes the folder.

    Raises:
        UserError: the folder or the file cannot be written; no partial file is left.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def write_json(path: Path | str, value: Any, **how: Any) -> None:
    """`write_whole` of a JSON value, indented. how: more of `json.dumps`'s arguments."""
    write_whole(Path(path), (json.dumps(value, indent=2, **how) + "\n").encode())


@contextmanager
def whole_folder(directory: Path) -> Iterator[Path]:
    """A new folder beside `directory` that takes its name when the block has filled it; raises OSError where it can't be made."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    yield partial
    partial.rename(directory)


def read_json(path: Path | str, mend: str) -> Any:
    """The JSON value in a file. mend: what to do about one that can't be read.

    Raises:
        UserError: missing, damaged or no JSON; names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = getattr(error, "strerror", None) or "it may be cut short or damaged"
        raise UserError(f"{path}: can't be read ({problem}); {mend}") from None


def sync(path: Path | str) -> None:
    """Have a file's contents, or a folder's names, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path | str) -> str:
    """Hexadecimal sha256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(path: Path | str) -> None:
    """Try that a file can be made at `path`, or appended to, before the work whose outcome goes there; what is there stays as it is.

    Its folder need not be there yet, if one above it is.

    Raises:
        UserError: it can't, there are no 4 KiB left, or a link stands there that leads nowhere.
    """
    path = Path(path)
    try:
        new = not path.exists()
        if new and path.is_symlink():
            raise UserError(f"{path}: a link that leads nowhere; remove it, or give another place")
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(4096))
        if folder == path.absolute().parent:
            open(path, "ab").close()
            if new:
                path.unlink()
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path | str, error: OSError) -> UserError:
    """The `UserError` for an `OSError` while `path` was written."""
    return UserError(f"{path}: cannot be written ({error.strerror or error}); make room or mend the folder, then start again")


def knows_flock(folder: Path) -> bool:
    """Whether the file system of `folder` locks files; raises OSError where nothing can be made there."""
    with tempfile.TemporaryFile(dir=folder) as trial:
        try:
            fcntl.flock(trial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            return False
    return True


def locked(path: Path, seconds: float = 0) -> BaseFileLock | None:
    """The `filelock` of `path` for this process alone, or None if another one holds it for `seconds`; raises OSError if it can't be made.

    It is let go when the process ends, however it ends, by the system. Where that knows no flock, the next process of the same host that
    wants it takes it over, if the file system can exchange two names; else the file has to be removed. A link is not followed: in a folder
    from someone else it may lead to a file of the user's. End it with `let_go`.
    """
    kind = FileLock if knows_flock(path.parent) else SoftFileLock
    lock = kind(path, timeout=seconds, thread_local=False)
    while True:
        try:
            lock.acquire()
            return lock
        except Timeout:
            # The holder removes the file before it lets go: a lock on a removed file excludes nobody, so it is sought again.
            if os.path.lexists(path):
                return None


def let_go(lock: BaseFileLock) -> None:
    """End a lock of `locked`, and remove its file."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def owner_of(folder: Path | str) -> str | None:
    """Who holds a folder with `owned` at this moment, as text; None if nobody does."""
    path = Path(folder) / OWNER
    try:
        with open(path, "rb") as file:
            try:
                # Not filelock's: that is exclusive, which a network disk grants to nobody who may only read.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                return signed(file)
            except OSError as error:
                if error.errno not in NO_FLOCK:
                    raise
                lock = locked(path)
                if lock is None:
                    return signed(file)
                let_go(lock)
                return None
    except OSError:
        return None


def signed(file: BinaryIO) -> str:
    """Who has signed an open file, as text."""
    lines = file.read().decode(errors="replace").split()
    return f"process {lines[0]} on {lines[1].partition('?')[0]}" if len(lines) > 1 else "another process"


@contextmanager
def owned(folder: Path | str) -> Iterator[None]:
    """Hold `folder`, made if it is missing, for this process alone; one that was made here and is still empty in the end is removed again.

    Raises:
        UserError: another process holds it (says which, and on which host), or it can't be written.
    """
    folder = Path(folder)
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = locked(folder / OWNER)
        if lock is None:
            more = "" if knows_flock(folder) else f"; if that one is gone, remove {folder / OWNER}"
            owner = owner_of(folder) or "another process"
            raise UserError(f"{folder}: {owner} is writing there; wait for it, or give another folder{more}")
        if not isinstance(lock, SoftFileLock):  # which has signed by itself
            (folder / OWNER).write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
        for name in filter(PARTIAL.fullmatch, os.listdir(folder)):  # of an owner that was killed
            (folder / name).unlink()
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        yield
    finally:
        with suppress(OSError):  # of a disk that is gone, of which the block has told
            (folder / OWNER).unlink(missing_ok=True)
            for path in made:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
        lock.release()
