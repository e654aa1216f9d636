"""One process writes a folder or a shard, also on file systems without locks; what it leaves when it is killed holds up nobody."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest
from continuation_helpers import open_store
from test_house import ROOT

import pipelines.train.state_cache
from fms_spec.errors import UserError
from fms_spec.files import owned, owner_of
from pipelines.train.state_cache import HiddenStates

HOLD = """
import fcntl, os, sys, time
from fms_spec.files import owned
if "NO_LOCKS" in os.environ:
    def flock(*_):
        raise OSError(int(os.environ["NO_LOCKS"]), "no locks")
    fcntl.flock = flock
with owned(sys.argv[1]):
    open(sys.argv[1] + "/.figures.json.1.partial", "w").close()
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture(params=[None, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=["locks", "ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def disk(request, monkeypatch, tmp_path):
    """A folder on a file system with locks, and on ones that answer each call for one with an error."""

    def flock(*_):
        raise OSError(request.param, os.strerror(request.param))

    if request.param:
        monkeypatch.setattr(fcntl, "flock", flock)
        monkeypatch.setenv("NO_LOCKS", str(request.param))
    return tmp_path


def test_a_folder_has_one_owner_who_is_named_until_it_is_killed_and_what_it_was_writing_is_removed(disk):
    folder = disk / "new/run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    named = f"process {holder.pid} on {socket.gethostname()}"
    assert owner_of(folder) == named
    with pytest.raises(UserError, match=f"run: {named} is writing there; wait for it, or give another folder"), owned(folder):
        pass
    holder.kill()
    holder.communicate()
    assert (folder / ".figures.json.1.partial").exists() and owner_of(folder) is None
    with owned(folder):
        assert owner_of(folder) == f"process {os.getpid()} on {socket.gethostname()}"
        assert os.listdir(folder) == [".owner"]
    assert os.listdir(folder) == [] and owner_of(folder) is None


@pytest.mark.parametrize("disk", [errno.ENOLCK], indirect=True)
def test_without_locks_an_owner_on_another_host_is_believed_and_the_file_to_remove_is_named(disk):
    (disk / ".owner").write_text("123\nelsewhere\n")
    with (
        pytest.raises(UserError, match=r"process 123 on elsewhere is writing .*; if that one is gone, remove .*/\.owner") as error,
        owned(disk),
    ):
        pass
    assert "\n" not in str(error.value) and owner_of(disk) == "process 123 on elsewhere"


def test_a_lock_that_is_a_link_is_not_written_through(disk):
    (disk / "thesis.txt").write_text("do not lose")
    (disk / "run").mkdir()
    (disk / "run/.owner").symlink_to(disk / "thesis.txt")
    with pytest.raises(UserError), owned(disk / "run"):
        pass
    assert (disk / "thesis.txt").read_text() == "do not lose"


def test_a_shard_is_claimed_once_with_and_without_locks(disk):
    first, second = open_store(disk / "shards"), open_store(disk / "shards")
    claim = first.claim(0)
    assert second.claim(0) is None and first.claim(0) is None
    claim.release()
    claim.release()
    second.claim(0).release()
    assert os.listdir(disk / "shards") == []


def test_processes_that_share_hidden_states_open_them_one_after_the_other(disk, base_model, monkeypatch):
    monkeypatch.setattr(pipelines.train.state_cache, "PATIENCE", 0.1)
    HiddenStates(base_model, None, disk / "cache", 2, 4, 2)
    assert not (disk / "cache/.identity.lock").exists()
    held = pytest.raises(UserError, match=r"identity.lock: another process has held it for 0.1 s")
    with pipelines.train.state_cache.locked(disk / "cache/.identity.lock"), held:
        HiddenStates(base_model, None, disk / "cache", 2, 4, 2)
    HiddenStates(base_model, None, disk / "cache", 2, 4, 2)
