"""SIGTERM, as schedulers send it before they take a machine away: the step is finished and saved, and the run ends with a code for it."""

import os
import signal
import threading
from contextlib import contextmanager

STOPPED = 128 + signal.SIGTERM  # 143, the exit code of a run that was asked to stop and saved what it had


class Stopped(SystemExit):
    """The run was asked to stop."""

    def __init__(self):
        super().__init__(STOPPED)


class Stop:
    """Whether this process has been asked to stop. A second SIGTERM ends it at once, as it does any program."""

    def __init__(self):
        self.asked, self._waiting = False, False

    def ask(self, *_):
        if self.asked:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.asked = True
        if self._waiting:
            raise Stopped

    @contextmanager
    def waiting(self, alone=True):
        """What the block does may take hours and can be left at any point: SIGTERM raises `Stopped` in it, if this process is `alone`."""
        if self.asked and alone:
            raise Stopped
        self._waiting = alone
        try:
            yield
        finally:
            self._waiting = False


@contextmanager
def stopping():
    """The `Stop` of this process while the block runs; in another thread than the main one nothing can ask."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
