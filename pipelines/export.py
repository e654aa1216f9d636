"""From a training checkpoint to a directory that can be served: weights, config, and a model card that says how."""

import errno
import hashlib
import json
import os
import shlex
import shutil
import sys
from contextlib import contextmanager

import torch

from fms_spec.errors import UserError
from fms_spec.files import cannot_write, owned, owner_of, read_json, sync
from fms_spec.model_config import read_config, resolve_base_model
from fms_spec.speculators.directory import Description, check_config, from_config, save_speculator, speculative_config
from fms_spec.speculators.registry import family_of
from fms_spec.vllm.versions import TRIED
from pipelines.pruning import Pruning
from pipelines.train.checkpoint import HEADS, damage, load_weights, newest_checkpoint
from pipelines.train.metrics import read_lines

OWN = "vllm"  # the layout of every family, read by vLLM itself or by our plugin
CARD = """---
library_name: fms-spec
tags: [speculative-decoding]
---
# Speculator for {base_model}

{heads} attached heads of the {family} family, {parameters:.1f} million trained parameters, for exactly this base model: `{base_model}`
(fingerprint of its weights: {fingerprint}). It guesses up to {heads} tokens that the base model then checks in one pass; the text stays the
base model's own.

## Serve

With {needed}:

```bash
{serve}
```

`num_speculative_tokens` may be any number from 1 to {heads}. The same in Python:
`LLM({base_model!r}, speculative_config={settings!r})`.

## Measure

```bash
{measure}
```

## Training

{training}
"""


def export(checkpoint, out_dir, draft_vocab_size=None, layout=OWN):
    """Write the speculator of a checkpoint, or of a run's newest one, in the base model's dtype; returns `out_dir`.

    draft_vocab_size: see `Pruning`. layout: `OWN`, or one of the family's `layouts`.

    Raises:
        UserError: no checkpoint there, a damaged one, an out_dir that exists or can't be written, a layout that the family hasn't, or as
        `Pruning`.
    """
    checkpoint, config = find_checkpoint(checkpoint)
    layout = find_layout(layout, config)
    pruning = draft_vocab_size and Pruning(draft_vocab_size, config, checkpoint.parent.parent)
    with appearing(out_dir) as partial:
        speculator, facts = read_weights(checkpoint, config), []
        if pruning:
            config = config | pruning.apply(speculator) | speculator.saved_config()
            facts.append(pruning.told(config))
        facts += training_facts(checkpoint)
        save_speculator(partial, speculator, config, layout)
        (partial / "README.md").write_text(model_card(speculator, config, out_dir, facts), encoding="utf-8")
    if pruning:
        print(facts[0])
    return out_dir


def find_layout(name, config):
    """What makes a layout, for `save_speculator`; None for the family's own. Raises UserError where there is none of this name."""
    if name == OWN:
        return None
    layouts = family_of(config["model_type"]).layouts
    if name not in layouts:
        known = ", ".join([f"{OWN} (SGLang's too)" if layouts else OWN, *layouts])
        raise UserError(f"--layout={name}: {config['architectures'][0]} can be written as {known}")
    base_config = read_config(resolve_base_model(config["base_model_name_or_path"]))
    return lambda *own: layouts[name](*own, base_config)


def find_checkpoint(path):
    """(directory of a whole checkpoint, its speculator.json) of a checkpoint or a run.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if (path / "checkpoints").is_dir():
        newest = newest_checkpoint(path / "checkpoints")
        if not newest:
            raise UserError(f"{path} has no whole checkpoint yet; let the run reach its first one")
        path = newest
    elif not (path / HEADS).is_file():
        raise UserError(f"{path} is no checkpoint of a run; give RUN/checkpoints/step-N or RUN")
    elif problem := damage(path):
        raise UserError(f"checkpoint {path} is damaged ({problem}); give another one, or RUN for the newest whole one")
    file = path / HEADS
    return path.resolve(), check_config(read_json(file, "give another checkpoint"), file, Description)  # its run is two folders above


def read_weights(checkpoint, config):
    """The speculator of a checkpoint, fp32, on the CPU; raises UserError where its files hold less than its config asks for."""
    with torch.device("meta"):
        speculator = from_config(config)
    asked = sum(value.nbytes for value in speculator.state_dict().values())
    if asked > sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")):
        raise UserError(f"checkpoint {checkpoint}: its speculator.json asks for {asked:,} bytes of weights that aren't there; take another")
    speculator.to_empty(device="cpu")
    load_weights(checkpoint, speculator)
    return speculator


@contextmanager
def appearing(out_dir):
    """A folder of a private name beside `out_dir` that takes its name when it is whole, and is gone where that fails.

    Raises:
        UserError: `out_dir` exists, or can't be written.
    """
    try:
        try:
            out_dir.lstat()  # a link that leads nowhere is there too
        except FileNotFoundError:
            pass
        else:
            raise UserError(f"{out_dir} exists already; give a new out_dir")
        own = ".export-" + hashlib.sha256(out_dir.name.encode()).hexdigest()[:12]  # the name may be as long as names can be
        partial = out_dir.with_name(f"{own}-{os.getpid()}")
        for stale in out_dir.parent.glob(f"{own}-*"):
            if owner_of(stale) is None:  # it was killed
                shutil.rmtree(stale)
        try:
            with owned(partial):
                yield partial
                for file in partial.iterdir():
                    sync(file)
            sync(partial)
            partial.rename(out_dir)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(out_dir.parent)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise UserError(f"{out_dir} exists already, another export was faster; give a new out_dir") from None
        raise cannot_write(out_dir, error) from None


def model_card(speculator, config, out_dir, facts):
    """README.md of an exported speculator, with the commands that serve and measure it from where it was written, and a list of facts."""
    base_model, heads = config["base_model_name_or_path"], config["n_predict"]
    settings = speculative_config(out_dir, config, heads)
    needed = "vLLM, which knows its layout" if speculator.vllm_method else f"`fms-spec` and vLLM {TRIED} installed in the same environment"
    flags = [f"--base_model={base_model}", f"--speculator={out_dir}", "--prompts=PROMPTS.jsonl"]
    return CARD.format(
        base_model=base_model, heads=heads, family=speculator.name, fingerprint=config["base_model_fingerprint"], needed=needed,
        parameters=sum(weight.numel() for weight in speculator.parameters()) / 1e6, settings=settings,
        serve=shlex.join(["vllm", "serve", base_model, "--host", "127.0.0.1", "--speculative-config", json.dumps(settings)]),
        measure=shlex.join(["python", "-m", "scripts.evaluate", *flags]), training="\n".join(f"- {fact}" for fact in facts),
    )  # fmt: skip


def training_facts(checkpoint):
    """What the checkpoint and the run around it say of the training, a line each; what can't be read is left out, and told on stderr."""
    run, facts = checkpoint.parent.parent, []
    for file, tell in ((checkpoint / "progress.json", progress), (run / "run.json", origin), (run / "metrics.jsonl", acceptance)):
        if not file.exists():
            continue
        try:
            facts += tell(file, checkpoint)
        except (UserError, AttributeError, LookupError, TypeError, ValueError):
            print(f"warning: {file}: can't be used, and the model card leaves it out", file=sys.stderr)
    return facts


def progress(file, _):
    saved = read_json(file, "")
    hours = sum(saved["seconds"].values()) / 3600
    return [f"{saved['step']} steps over {saved['tokens']:,} positions, in {hours:.2f} hours"]


def origin(file, _):
    record = read_json(file, "")
    return [f"fms-spec {record['versions']['fms-spec']}, revision {record['git_revision']}, on {record['device']}"]


def acceptance(file, checkpoint):
    step, key = int(checkpoint.name.removeprefix("step-")), "validation/acceptance_length"
    lengths = [line[key] for line in read_lines(file) if line["step"] == step and key in line]
    what = "acceptance length of a chain of all heads, greedy, on held-out prompts of the training data"
    return [f"{what}: {length:.2f}" for length in lengths]
