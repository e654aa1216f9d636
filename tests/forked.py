"""The commands as a user starts them, without the six seconds that their imports take each time.

Each runs in a fork of one process, begun with the first of them, which has imported everything and started no thread that computes.
What is imported knows the environment of the tests: a variable that a test changes counts only where it is read later than that.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])


def become(words, cwd, env, output, errors):
    """Be `python -m` with these words, to the end."""
    for number, path in enumerate((os.devnull, output, errors)):
        os.dup2(os.open(path, os.O_RDWR), number)
    sys.stdin, sys.stdout, sys.stderr = (open(number, "w" if number else "r", closefd=False) for number in range(3))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0], sys.argv, code = cwd, words, 0
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.exit(code)


class Command:
    """A command that runs, to be used as a `subprocess.Popen`; what it prints is there at its end.

    Args:
        words: those after `python -m`. cwd: its folder. env: its whole environment; that of the tests by default.
    """

    def __init__(self, words, cwd=ROOT, env=None):
        self.args = [str(word) for word in words]
        self._printed = [tempfile.NamedTemporaryFile() for _ in range(2)]
        places = (str(cwd), dict(env or os.environ), *(file.name for file in self._printed))
        self._process = FORKS.Process(target=become, args=(self.args, *places), daemon=True)  # ends with the tests
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        assert self.returncode is not None, f"{' '.join(self.args)} still runs"
        return self.returncode

    def send_signal(self, sign):
        if self.poll() is None:
            os.kill(self.pid, sign)

    def communicate(self, timeout=None):
        """(what it printed, what it printed on stderr), once it has ended."""
        self.wait(timeout)
        return tuple(Path(file.name).read_text() for file in self._printed)


def run(*words, timeout=300, **places):
    """The `subprocess.CompletedProcess` of a command that has ended; places: cwd and env."""
    command = Command(words, **places)
    printed = command.communicate(timeout)
    return CompletedProcess(command.args, command.returncode, *printed)
