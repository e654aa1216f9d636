"""Small files that other processes read while they are written."""

import os

from fms_spec.errors import UserError


def write_whole(path, content):
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
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path, error):
    """The `UserError` for an `OSError` while `path` was written."""
    return UserError(f"{path}: cannot be written ({error.strerror or error}); make room or mend the folder, then start again")
