"""From a training checkpoint to a directory that can be served: weights, config, and a model card that says how."""

import json
import shlex

from fms_spec.errors import UserError
from fms_spec.files import read_json
from fms_spec.speculators import from_config, save_speculator
from fms_spec.vllm_plugin import METHOD, TRIED
from pipelines.checkpoint import damage, load_weights, newest_checkpoint

CARD = """---
library_name: fms-spec
tags: [speculative-decoding]
---
# Speculator for {base_model}

{heads} attached heads of the {family} family, {parameters:.1f} million trained parameters, for exactly this base model: `{base_model}`
(fingerprint of its weights: {fingerprint}). It guesses up to {heads} tokens that the base model then checks in one pass; the text stays the
base model's own.

## Serve

With `fms-spec` and vLLM {versions} installed in the same environment:

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


def export(checkpoint, out_dir):
    """Write the speculator of a checkpoint, or of a run's newest one, in the base model's dtype; returns `out_dir`.

    Raises:
        UserError: no checkpoint there, one cut short, or an out_dir that exists.
    """
    if out_dir.exists():
        raise UserError(f"{out_dir} exists already; give a new out_dir")
    if (checkpoint / "checkpoints").is_dir():
        found = newest_checkpoint(checkpoint / "checkpoints")
        if not found:
            raise UserError(f"{checkpoint} has no whole checkpoint yet; let the run reach its first one")
        checkpoint = found
    elif not (checkpoint / "speculator.json").is_file():
        raise UserError(f"{checkpoint} is no checkpoint of a run; give RUN/checkpoints/step-N or RUN")
    elif problem := damage(checkpoint):
        raise UserError(f"checkpoint {checkpoint} is damaged ({problem}); give another one, or RUN for the newest whole one")
    config = read_json(checkpoint / "speculator.json", "give another checkpoint")
    speculator = from_config(config)
    load_weights(checkpoint, speculator)
    partial = out_dir.with_name(out_dir.name + ".partial")
    save_speculator(partial, speculator, config)
    (partial / "README.md").write_text(model_card(speculator, config, checkpoint, out_dir))
    partial.rename(out_dir)
    return out_dir


def model_card(speculator, config, checkpoint, out_dir):
    """README.md of an exported speculator, with the commands that serve and measure it from where it was written."""
    base_model, heads = config["base_model_name_or_path"], config["n_predict"]
    settings = {"method": METHOD, "model": str(out_dir), "num_speculative_tokens": heads}
    places = [f"--base_model={base_model}", f"--speculator={out_dir}", "--prompts=PROMPTS.jsonl"]
    return CARD.format(
        base_model=base_model, heads=heads, family=config["model_type"], fingerprint=config["base_model_fingerprint"], versions=TRIED,
        parameters=sum(weight.numel() for weight in speculator.parameters()) / 1e6, settings=settings,
        serve=shlex.join(["vllm", "serve", base_model, "--speculative-config", json.dumps(settings)]),
        measure=shlex.join(["python", "-m", "scripts.evaluate", *places]), training=training_facts(checkpoint),
    )  # fmt: skip


def training_facts(checkpoint):
    """What the checkpoint and the run around it say of the training, as Markdown."""
    progress = json.loads((checkpoint / "progress.json").read_text())
    hours = sum(progress["seconds"].values()) / 3600
    facts = [f"- {progress['step']} steps over {progress['tokens']:,} positions, in {hours:.2f} hours"]
    run = checkpoint.parent.parent
    if (run / "run.json").is_file():
        record = json.loads((run / "run.json").read_text())
        facts.append(f"- fms-spec {record['versions']['fms-spec']}, revision {record['git_revision']}, on {record['device']}")
    if (run / "metrics.jsonl").is_file():
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
            if line["step"] == progress["step"] and "validation/acceptance_length" in line:
                length = line["validation/acceptance_length"]
                facts.append(f"- acceptance length of a chain of all heads, greedy, on held-out prompts of the training data: {length:.2f}")
    return "\n".join(facts)
