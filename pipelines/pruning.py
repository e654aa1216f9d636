"""A smaller draft vocabulary for heads that are exported: the most frequent of its tokens in the rows and continuations of their run."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data.continuations.shard import read_shard
from data.manifest import data_fingerprint
from data.reader import read_token_counts
from fms_spec.errors import UserError
from fms_spec.model_config import read_config, read_eos_token_ids, resolve_base_model
from fms_spec.speculators.directory import sizes_of
from fms_spec.speculators.draft_vocabulary import coverage, most_frequent
from pipelines.train.run_record import read_record


class Pruning:
    """What `--draft_vocab_size` asks for, before any weight is read.

    Args:
        size: tokens that stay. config: a checkpoint's speculator.json, checked. run: the folder of its run.

    Raises:
        UserError: heads without a draft vocabulary, or with a smaller one; no counts, or those of other data; continuations that are
        damaged or another base model's; no base model to ask for EOS.
    """

    def __init__(self, size, config, run):
        known = getattr(sizes_of(config), "draft_vocab_size", None)
        if known is None:
            raise UserError(f"--draft_vocab_size={size}: {config['architectures'][0]} has no draft vocabulary to prune; leave it out")
        if size > known:
            raise UserError(f"--draft_vocab_size={size}: the heads draft from {known} tokens; give at most as many")
        self.size, self.data_dir, self.folder, counts = size, *counts_of(run)
        self.token_counts = written_counts(self.folder, config)
        self.written = int(self.token_counts.sum())
        known = min(len(counts), len(self.token_counts))  # a tokenizer may have more ids than the base model, which no row holds
        self.token_counts[:known] += counts[:known]
        base = resolve_base_model(config["base_model_name_or_path"])
        eos = read_eos_token_ids(base, read_config(base))
        self.base_model = SimpleNamespace(vocab_size=config["vocab_size"], eos_token_ids=eos)

    def apply(self, speculator):
        """Prune a speculator; returns what config.json says of it: how many tokens were counted, their shares within it before and now."""
        before, ids = speculator.draft_ids, most_frequent(self.token_counts, self.size, self.base_model, speculator.draft_ids)
        speculator.prune(torch.isin(before, ids).nonzero()[:, 0])
        shares = {when: round(coverage(self.token_counts, which), 6) for when, which in [("before", before), ("share", ids)]}
        counted = {"counted_tokens": int(self.token_counts.sum()), "written_tokens": self.written}
        return {"draft_vocab_coverage": counted | {"pruned_from": len(before)} | shares}

    def told(self, config):
        """What `apply` did, in a sentence."""
        found = config["draft_vocab_coverage"]
        rows = f"the {found['counted_tokens'] - self.written:,} tokens in the training rows of {self.data_dir}"
        none = f"(and none that the base model wrote: {self.folder} has none)"
        written = f"and the {self.written:,} that the base model wrote in {self.folder}" if self.written else none
        return (
            f"draft vocabulary pruned from {found['pruned_from']:,} to {config['draft_vocab_size']:,} tokens: "
            f"{found['share']:.2%} of {rows} {written} are in it, "
            f"{100 * (found['before'] - found['share']):.2f} points fewer than before"
        )


def counts_of(run):
    """(prepared folder of a run, folder of its continuations, how often each token is trained on there: int64 [tokenizer vocabulary]).

    Raises:
        UserError: the run's folder says of none, it isn't there, or holds other data by now.
    """
    record, what = read_record(run), "--draft_vocab_size takes the counts of the run's prepared data"
    if record is None:
        raise UserError(f"{what}, and {run} has no run.json that names them; give a checkpoint within its run")
    try:
        data, known = record["config"]["data"], record["inputs"]["data_fingerprint"]
        data_dir, folder = data["dir"], Path(data.get("continuations") or run / "continuations")
        same, counts = data_fingerprint(data_dir) == known, read_token_counts(data_dir, data.get("train_on"))
    except (KeyError, TypeError):
        raise UserError(f"{what}, and {run}/run.json names none; export all of the vocabulary") from None
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    if not same:
        raise UserError(f"{what}, and {data_dir} holds other data than the run was given; put those back")
    return data_dir, folder, counts


def written_counts(folder, config):
    """How often each token stands in the continuations of a folder, int64 [v]; zeros where it has none. config: as for `Pruning`.

    Raises:
        UserError: a shard that is damaged, or that another base model wrote.
    """
    counts = torch.zeros(config["vocab_size"], dtype=torch.int64)
    for path in sorted(folder.glob("continuations-*.parquet")):
        table, made_by = read_shard(path)
        if made_by.get("base_model") != config["base_model_fingerprint"]:
            raise UserError(f"{path}: another base model wrote it than these heads are for; move it away, or put the run's own back")
        tokens = table.column("continuation").combine_chunks().values.to_numpy()
        counts += torch.from_numpy(np.bincount(tokens, minlength=len(counts)))
    return counts
