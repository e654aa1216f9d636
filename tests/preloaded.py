"""Imports all that the commands import, vLLM excepted, into the process that tests/forked.py forks them off."""

import importlib
import sys
from pathlib import Path

import scripts

for name in [path.stem for path in Path(scripts.__path__[0]).glob("[!_]*.py")]:
    importlib.import_module(f"scripts.{name}")
    del sys.modules[f"scripts.{name}"]  # it runs as __main__, and Python would warn that it is there already
