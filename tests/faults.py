"""What a run, its data and its exports survive: python -m tests.faults [--tries=N] [--kinds=kills,operations,damage,disk] [--seed=S]

Prints for each kind what was tried, survived and lost. A kill (at a drawn moment, or just before a drawn file operation) is survived if
the same command, given again, ends with the bytes of one that was never killed. Damage to a file is survived if the bytes are those all
the same, or if one line says which file is damaged and nothing was written. A full disk is survived if one line says so, and with room the
bytes are right. The commands run in processes forked off this one, which has imported everything: a try takes a second. A full disk is a
tmpfs, which takes the right to mount one; without it that kind says so.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads doesn't survive a fork

import conftest  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

from scripts import decode, evaluate, export, generate_continuations, prepare_data, train  # noqa: E402, F401 (imported before the forks)

KINDS = ("kills", "operations", "damage", "disk")
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "open"}
RUN = ["schedule.steps=14", "checkpoint.every=3", "checkpoint.keep=3", "hidden_state_cache=true", "phase1.accumulate=1"]


def command(module, words, kill_at=None, count=None):
    """Start a command in a fork of this process; returns (process id, file of what it printed on stderr).

    kill_at: the number of the file operation before which it dies. count: a file to which the number of its operations is written.
    """
    errors = Path(tempfile.mkstemp(dir=PLACE)[1])
    pid = os.fork()
    if pid:
        return pid, errors
    tqdm.set_lock(threading.RLock())  # the forks would share one, and one that was killed would hold it for ever
    for number, path in ((0, "/dev/null"), (1, "/dev/null"), (2, errors)):
        os.dup2(os.open(path, os.O_RDWR), number)
    done = 0

    def watch(event, values):
        nonlocal done
        if event in WRITES and not (event == "open" and not values[2] & (os.O_WRONLY | os.O_RDWR)):
            done += 1
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    sys.argv, code = [module, *map(str, words)], 0
    try:
        runpy.run_module(f"scripts.{module}", run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    if count:
        Path(count).write_text(str(done))
    sys.stderr.flush()
    os._exit(code)


def ended(started, seconds=120):
    """(exit code, what was printed on stderr) of a started command; it is killed after `seconds`."""
    pid, errors = started
    deadline, code = time.monotonic() + seconds, None
    while code is None:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            code = 124
        time.sleep(0.005)
    said = errors.read_text(errors="replace").replace("\r", "\n")
    errors.unlink()
    return code, said


def contents(folder):
    """{name: digest} of all that decides what comes next; tensors by their values, since safetensors' header has a drawn order."""
    found = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if any(part in name for part in ("tensorboard", "hidden_states", ".damaged")) or re.search(r"checkpoints/step-(?!00000014)", name):
            continue  # these follow from the others, or are kept to be looked at, or are not the last
        if path.name in ("run.json", "progress.json", "checksums.json", "README.md"):
            continue  # with times or the folder's name in them
        if path.name == "manifest.json" and (path.parent / "continuations-00000.parquet").exists():
            continue  # says who wrote the last shard
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            content = repr([json.loads(line)["step"] for line in content.splitlines()]).encode()
        if path.name.startswith("continuations-"):
            content = repr(pq.read_table(path).to_pydict()).encode()  # a flipped byte of a footer may say nothing
        if path.suffix == ".safetensors":
            content = b"".join(key.encode() + value.numpy().tobytes() for key, value in sorted(load_file(path).items()))
        found[name] = hashlib.sha256(content).hexdigest()
    return found


class Place:
    """Inputs, the commands and what each gives when nothing goes wrong."""

    def __init__(self, place):
        self.place = place
        conftest.write_model(place / "base")
        (place / "corpus").mkdir()
        generator = torch.Generator().manual_seed(0)
        for i in range(12):
            words = torch.randint(0, conftest.WORDS - 2, (40 + 10 * i,), generator=generator).tolist()
            (place / "corpus" / f"{i:02}.txt").write_text(" ".join(f"w{word}" for word in words))
        self.run("prepare_data", place / "data", place)
        conftest.write_config(place / "run.yaml", place / "base", place / "data")
        (place / "p.jsonl").write_text('{"prompt": "w1 w2 w3 w4"}\n{"prompt": "w5 w6"}\n')
        self.run("train", place / "run", place)
        self.run("export", place / "spec", place)
        self.run("generate_continuations", place / "continuations", place)
        outputs = {"prepare_data": "data", "train": "run", "export": "spec", "generate_continuations": "continuations"}
        self.expected = {module: contents(place / name) for module, name in outputs.items()}

    def words(self, module, out, place):
        """Arguments of a command that reads from `place` and writes to `out`."""
        model, data = f"--base_model={place}/base", ["--seq_length=64", "--prompt_length=8", "--held_out=3"]
        generation = ["--engine=embedded", "--max_tokens=12", "--temperature=0.8", "--shard_prompts=5", "--dtype=float32"]
        return {
            "prepare_data": [f"--source={place}/corpus", f"--tokenizer={place}/base", *data, f"--out_dir={out}"],
            "train": [f"--config={place}/run.yaml", f"--out_dir={out}", "--resume", *RUN],
            "export": [f"--checkpoint={place}/run", f"--out_dir={out}"],
            "generate_continuations": [model, f"--prompts={place}/data", *generation, f"--out_dir={out}"],
            "evaluate": [model, f"--speculator={place}/spec", f"--prompts={place}/p.jsonl", "--max_new_tokens=8", f"--out={out}"],
            "decode": [model, "--prompt=w1 w2", "--max_new_tokens=8", "--dtype=float32"],
        }[module]  # fmt: skip

    def run(self, module, out, place, **watched):
        return ended(command(module, self.words(module, out, place), **watched))

    def verdict(self, module, out, code, said):
        """None if the command ended well, with the right bytes and without litter; else what is wrong."""
        if code:
            return f"code {code}: {(said.strip().splitlines() or ['no word'])[-1][:150]}"
        if out.is_dir():
            found, expected = contents(out), self.expected.get(module, {})
            told = {"metrics.jsonl"} if "before step" in said else set()  # of lines that a damaged log has lost
            wrong = sorted(name for name in {*found, *expected} - told if found.get(name) != expected.get(name))
            if wrong:
                return f"{wrong[0]} is {'there' if wrong[0] not in expected else 'another one' if wrong[0] in found else 'missing'}"
        litter = [path.name for path in out.parent.glob(f".{out.name}*")]
        return f"{litter[0]} is left" if litter else None


def kills(place, module, tries, chance):
    """Killed at a drawn moment, given again, killed again at times; (what, verdict) each."""
    began = time.monotonic()
    place.run(module, PLACE / "timed", place.place)
    whole = time.monotonic() - began
    remove(PLACE / "timed")
    for _ in range(tries):
        out, sign = PLACE / "killed", chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        for _ in range(chance.choice([1, 1, 2])):
            started = command(module, place.words(module, out, place.place))
            time.sleep(chance.uniform(0.02, whole))
            os.kill(started[0], sign)
            ended(started)
        yield f"{module} {sign.name}", again(place, module, out)


def operations(place, module, tries, chance):
    """Killed just before a drawn file operation."""
    place.run(module, PLACE / "counted", place.place, count=PLACE / "count")
    total = int((PLACE / "count").read_text())
    remove(PLACE / "counted")
    for number in sorted(chance.sample(range(1, total + 1), min(tries, total))):
        out = PLACE / "killed"
        place.run(module, out, place.place, kill_at=number)
        yield f"{module} at operation {number} of {total}", again(place, module, out)


def again(place, module, out):
    """The verdict on the command given again."""
    if module == "export" and out.exists():
        problem = place.verdict(module, out, 0, "")
    else:
        problem = place.verdict(module, out, *place.run(module, out, place.place))
    remove(out)
    return problem


def cut(path, chance):
    path.write_bytes(path.read_bytes()[: chance.randrange(1, max(2, path.stat().st_size))])


def empty(path, chance):
    path.write_bytes(b"")


def delete(path, chance):
    path.unlink()


def flip(path, chance):
    content = bytearray(path.read_bytes()) or bytearray(b"\0")
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def lengthen(path, chance):
    path.write_bytes(path.read_bytes() + b"\0" * 64)


def swap_for_a_folder(path, chance):
    path.unlink()
    path.mkdir()


DAMAGES = (cut, empty, delete, flip, lengthen, swap_for_a_folder)
# What is damaged, and the command that reads it: each file below the folder, of the names that the pattern matches.
READERS = [
    ("data", r".*", "train"), ("run/checkpoints", r".*", "train"), ("run/checkpoints", r".*", "export"),
    ("run/continuations", r".*", "train"), ("run/hidden_states", r".*", "train"), ("run", r"run\.json|metrics\.jsonl", "train"),
    ("spec", r"[^R].*", "evaluate"), ("base", r".*", "decode"), ("base", r".*", "train"), (".", r"p\.jsonl", "evaluate"),
    (".", r"run\.yaml", "train"), ("continuations", r".*\.parquet|manifest\.json", "generate_continuations"),
]  # fmt: skip


def damage(place, tries, chance):
    """A file of every kind, damaged in every way: so many each. A run is gone on with from before its last steps."""
    whole = PLACE / "whole"
    shutil.copytree(place.place, whole)
    for folder, names, module in READERS:
        for harm in DAMAGES:
            for _ in range(tries):
                if module == "train":
                    shutil.rmtree(place.place / "run/checkpoints/step-00000014")
                pattern = "*" if folder in (".", "run") else "**/*"
                files = [path for path in sorted((place.place / folder).glob(pattern)) if path.is_file()]
                chosen = chance.choice([path for path in files if re.fullmatch(names, path.name)])
                harm(chosen, chance)
                yield f"{chosen.relative_to(place.place)} {harm.__name__}, {module}", judged(place, module, chosen)
                remove(place.place)
                shutil.copytree(whole, place.place)  # where it was: the paths in it still hold


def judged(place, module, chosen):
    """The verdict on a command that reads a damaged file."""
    out = place.place / {"train": "run", "generate_continuations": "continuations"}.get(module, "out")
    code, said = place.run(module, out, place.place)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if "Traceback" in said or code not in (0, 1) or (code == 1 and len(errors) != 1):
        return f"code {code}: {(said.strip().splitlines() or ['no word'])[-1][:150]}"
    if code == 1:
        known = (chosen.name, str(chosen.parent), "config ", "override ", "another base_model_fingerprint")
        if chosen.name != "run.yaml" and not any(word in errors[0] for word in known):  # a changed path is a path, which is told
            return f"names no file: {errors[0][:150]}"
        return "half-written output" if module in ("export", "evaluate") and out.exists() else None
    if module == "export" and "step-00000014 is damaged (" in said:
        return None  # it is of the checkpoint before
    if module in ("train", "export", "generate_continuations"):
        return place.verdict(module, out, code, said)
    if module == "evaluate":
        undamaged = PLACE / "undamaged.json"
        if not undamaged.exists():
            place.run(module, undamaged, PLACE / "whole")
        figures = [[value for key, value in json.loads(path.read_text()).items() if "acceptance" in key] for path in (undamaged, out)]
        return None if figures[0] == figures[1] or chosen.name == "p.jsonl" else "other figures"
    return None


def disk(place, chance, sizes=(16, 64, 128, 256, 1024)):
    """A disk of so many KiB, full in the middle; then one with room."""
    for module in ("prepare_data", "train", "generate_continuations", "export"):
        for size in sizes:
            mount = PLACE / "disk"
            mount.mkdir(exist_ok=True)
            if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "t", mount], capture_output=True).returncode:
                yield "no right to mount a tmpfs", "skipped"
                return
            try:
                code, said = place.run(module, mount / "out", place.place)
                if "Traceback" in said or code not in (0, 1) or (code == 1 and sum("error: " in line for line in said.splitlines()) != 1):
                    yield f"{module} on {size} KiB", f"code {code}: {(said.strip().splitlines() or ['no word'])[-1][:150]}"
                    continue
                subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
                if module == "export" and code == 0:
                    yield f"{module} on {size} KiB", place.verdict(module, mount / "out", 0, "")
                else:
                    yield f"{module} on {size} KiB", place.verdict(module, mount / "out", *place.run(module, mount / "out", place.place))
            finally:
                subprocess.run(["umount", "-l", mount], check=True)  # lazily: what hangs there may hold it


def remove(path):
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20, help="kills of each command, of both kinds; of each damage a tenth as many")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance, tries = random.Random(asked.seed), asked.tries
    place = Place(PLACE / "place")
    modules = ("train", "prepare_data", "generate_continuations", "export")
    found = {
        "kills": lambda: (one for module in modules for one in kills(place, module, tries, chance)),
        "operations": lambda: (one for module in modules for one in operations(place, module, tries, chance)),
        "damage": lambda: damage(place, max(1, tries // 10), chance),
        "disk": lambda: disk(place, chance),
    }
    lost = 0
    for kind in asked.kinds.split(","):
        counts = Counter()
        for what, problem in found[kind]():
            counts["skipped" if problem == "skipped" else "lost" if problem else "survived"] += 1
            if problem:
                print(f"{kind}: {what}: {problem}", flush=True)
        lost += counts["lost"]
        print(f"{kind}: {counts.total()} tried, {counts['survived']} survived, {counts['lost']} lost", flush=True)
    sys.exit(lost > 0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        PLACE = Path(directory)
        (PLACE / "place").mkdir()
        main()
