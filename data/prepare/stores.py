"""Files on this machine and behind URLs (s3://, gs://, hf://, memory://, …): `fsspec` opens either, so that both are read in one way."""

import glob
import hashlib
import io
import os
from contextlib import contextmanager

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data.manifest import reason
from fms_spec.errors import UserError

BUFFER = 2**20  # bytes read at once


def is_url(path):
    return "://" in path


@contextmanager
def reaching(url):
    """What can go wrong on the way to a store, as a UserError that names it: each library of theirs raises its own kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_url(url):
            raise
        raise UserError(f"source {url}: cannot be read ({reason(error)}); mend the URL, its library or the rights to it") from None


def store_of(path):
    """(file system, path in it) of a file or folder; raises what `fsspec` does."""
    return fsspec.url_to_fs(path) if is_url(path) else (LocalFileSystem(), path)


def open_binary(path):
    """A file to be read from its beginning, as a buffered binary one."""
    store, inner = store_of(path)
    return io.BufferedReader(store.open(inner, "rb"), BUFFER)


def size_of(path):
    """Bytes of a file."""
    store, inner = store_of(path)
    return store.size(inner)


def digest_of(path):
    """Hexadecimal sha256 of a file's bytes."""
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_at(url):
    """(URLs of the files, the folder that their names are told from) behind a URL: a file, a folder or a pattern; hidden ones left out.

    Raises:
        UserError: there are none, the store is not known, its library is missing, or it can't be reached.
    """
    if "::" in url:
        raise UserError(f"source {url}: URLs within URLs aren't read; unpack it, or name one file or folder")
    with reaching(url):
        store, inner = store_of(url)
        if glob.has_magic(inner):
            root = os.path.dirname(inner[: min(inner.index(mark) for mark in "*?[" if mark in inner)])
            files = [file for file in store.glob(inner) if store.isfile(file)]
        elif store.isfile(inner):
            return [url], os.path.dirname(url)
        else:
            root, files = inner, store.find(inner)
        shown = [file for file in files if not any(part.startswith(".") for part in os.path.relpath(file, root or "/").split("/"))]
        if not shown:
            raise UserError(f"source {url}: no such file or folder")
        return [store.unstrip_protocol(file) for file in shown], store.unstrip_protocol(root)
