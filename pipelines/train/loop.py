"""The training loop: both phases on the frozen base model, in the order the schedule says."""

import math
import sys
from functools import cached_property

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from data.progress import progress
from fms_spec.acceptance import pooled_acceptance
from fms_spec.alignment import choose_positions, make_windows, usable_positions
from fms_spec.batch import upload
from fms_spec.draft_shape import DraftShape
from fms_spec.errors import UserError
from fms_spec.seeds import mixed
from fms_spec.speculators.directory import describe
from fms_spec.timing import Stopwatch
from pipelines.parallel.mesh import gathered
from pipelines.parallel.processes import Processes
from pipelines.parallel.stopping import Stopped, stopping
from pipelines.schedule import learning_rate_factor
from pipelines.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, sweep, whole_checkpoints
from pipelines.train.metrics import Metrics, read_lines


class Trainer:
    """One run. What it needs of the world is passed in: a base model, an attached speculator, and a source of batches for each phase.

    Args:
        config: `RunConfig`. speculator: fp32 weights, on the base model's device. batches: {phase: iterator of `Batch` with
        state_dict and load_state_dict}. supply: where phase 2's continuations come from, see data.continuations.supply. states: {phase:
        `HiddenStates`}. validation: a function that makes the `Validation`, called when it is first needed, or None. out_dir: of the run,
        already claimed with `claim_out_dir`. device_metrics: `DeviceMetrics`.
        processes: `Processes`; each trains on batches of its own, and gradients are added up where the speculator is shared
        (`parallel.distribute_speculator`).
    """

    def __init__(
        self, config, base_model, speculator, batches, supply, states, out_dir, device_metrics, validation=None, processes=Processes()
    ):
        self.config, self.base_model, self.speculator = config, base_model, speculator
        self.processes, self.device_metrics = processes, device_metrics
        self.batches, self.supply, self.states, self.out_dir, self.make_validation = batches, supply, states, out_dir, validation
        self.schedule = config.schedule.build()
        self.phase_steps = self.schedule.phase_steps()
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            speculator.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        self.weights = {phase: getattr(config, phase).loss.weights(speculator.n_predict) for phase in self.phase_steps}
        self.step = 0
        self.watch = Stopwatch({"generation": 0.0, "waiting": 0.0})
        self.tokens = 0  # positions trained on, in both phases
        self.logged = {}  # phase -> device tensors since the last log line, read only when logged
        self.log_lines = 0  # of metrics.jsonl when the run was saved
        self.saved_step = 0  # of the checkpoint that was loaded or written last

    def resume(self):
        """Go on from the newest whole checkpoint, if there is one; returns the step."""
        if self.processes.main:
            sweep(self.out_dir / "checkpoints")
        newest = newest_checkpoint(self.out_dir / "checkpoints", self.processes)
        logged = max((line["step"] for line in read_lines(self.out_dir / "metrics.jsonl")), default=0)
        if not newest and logged > self.config.checkpoint.every:
            mend = "bring it back, or remove metrics.jsonl to begin again"
            raise UserError(f"{self.out_dir / 'checkpoints'}: holds none, and metrics.jsonl tells of step {logged}; {mend}")
        if newest:
            progress = load_checkpoint(newest, self.speculator, self.optimizer)
            self.speculator.attach(self.base_model)  # what is frozen is chosen by the draft vocabulary, which has only now been read
            self.step, self.tokens, self.log_lines = progress["step"], progress["tokens"], progress["log_lines"]
            self.saved_step = self.step
            self.watch = Stopwatch(progress["seconds"])
            for phase, state in progress["batches"].items():
                self.batches[phase].load_state_dict(state)
        return self.step

    def save(self):
        """Write a checkpoint of this moment; returns its directory."""
        progress = {
            "step": self.step, "tokens": self.tokens, "seconds": self.watch.seconds, "log_lines": self.metrics.lines,
            "batches": {phase: batches.state_dict() for phase, batches in self.batches.items()},
        }  # fmt: skip
        with self.watch.measure("checkpoint"):
            saved = save_checkpoint(
                self.out_dir / "checkpoints", self.step, self.speculator, self.optimizer,
                describe(self.speculator, self.base_model), progress, self.config.checkpoint.keep, self.processes,
            )  # fmt: skip
        self.saved_step = self.step
        return saved

    def train(self, profiler=None):
        """Run the schedule to its end; returns the last checkpoint's directory.

        profiler: a `torch.profiler.profile` that has been started; told of every step.

        Raises:
            Stopped: the process got SIGTERM; the step it was at is finished and saved. Of several processes all stop at the same step.
        """
        total, saved = self.schedule.steps, None
        self.metrics = Metrics(self.out_dir, self.step, self.log_lines, keeps=self.processes.main)
        with stopping() as stop, progress(total=total, initial=self.step, desc="train", unit="step", mininterval=1) as bar:
            while self.step < total:
                phase, step_in_phase = self.schedule.phase(self.step)
                position = self.batches[phase].state_dict()
                try:
                    with stop.waiting(alone=self.processes.count == 1):
                        if phase == "phase2":
                            self.have_continuations()
                        micro_batches = self.read(phase)
                except (UserError, Stopped) as reason:
                    self.batches[phase].load_state_dict(position)  # as the step before left them
                    self.save_finished()
                    self.tell(reason)
                    raise
                self.train_step(phase, step_in_phase, micro_batches)
                self.step += 1
                bar.update()
                if profiler:
                    profiler.step()
                stopped = self.processes.any(stop.asked) and self.step < total
                saved = self.finish_step(bar, stopped) or saved
                if stopped:
                    self.tell(Stopped())
                    raise Stopped
        self.metrics.close()
        return saved or whole_checkpoints(self.out_dir / "checkpoints")[-1]

    def finish_step(self, bar, stopped):
        """Log, validate and save what is due after a step; returns the checkpoint's directory if one was written."""
        config, last = self.config, self.step == self.schedule.steps
        saving = self.step % config.checkpoint.every == 0 or last or stopped
        if self.step % config.log_every == 0 or saving:  # so that what is saved has been seen to be finite
            values = self.read_log()
            self.metrics.write(self.step, values)
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items() if name.endswith("/loss")}, refresh=False)
        if self.make_validation and (self.step % config.validation.every == 0 or last):
            with self.watch.measure("validation"):
                self.metrics.write(self.step, self.validate())
        return self.save() if saving else None

    def tell(self, reason):
        """Close the log, and say so where the reason is that the run was asked to stop."""
        self.metrics.close()
        if isinstance(reason, Stopped) and self.processes.main:
            saved = f"step {self.step} of {self.schedule.steps} is saved" if self.step else "before its first step"
            tqdm.write(f"stopped by SIGTERM, {saved}; start it again to go on, scripts.train with --resume", file=sys.stderr)

    def have_continuations(self):
        """Have the texts there that the next step of phase 2 reads: generated now, waited for, or there already."""
        needed = self.batches["phase2"].needed(self.config.phase2.accumulate)
        for index, begun in self.watch.timed("data", needed):
            self.watch.add(self.supply.have(index, begun))

    def read(self, phase):
        """The next step's micro-batches."""
        with self.watch.measure("data"):
            return [next(self.batches[phase]) for _ in range(getattr(self.config, phase).accumulate)]

    def save_finished(self):
        """Keep what has been trained when the run can't go on; its reason stays the one that is told, even if this fails too.

        Of several processes one alone can't: a checkpoint is written by all.
        """
        if self.processes.count > 1:
            return
        try:
            if self.logged:  # so that what is saved has been seen to be finite
                self.metrics.write(self.step, self.read_log())
            if self.step > self.saved_step:
                self.save()
        except (UserError, OSError) as error:
            print(f"warning: what was trained up to step {self.step} is not saved: {error}", file=sys.stderr)

    def train_step(self, phase, step_in_phase, micro_batches):
        """One optimiser step.

        Nothing in it waits for the device, except where `only_accepted` asks for the base model's own tokens of rows not kept on disk.
        """
        settings = getattr(self.config, phase)
        factor = learning_rate_factor(step_in_phase, self.phase_steps[phase], **settings.lr.model_dump())
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * factor
        with self.watch.measure("base_model"):
            states = [self.states[phase](batch) for batch in micro_batches]
        with self.watch.measure("heads"):
            losses, counts = self.backward(phase, micro_batches, states)
            norm = torch.nn.utils.clip_grad_norm_(self.speculator.parameters(), self.config.optimizer.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        line = torch.cat([losses, counts[:1], norm[None], upload(torch.tensor([factor]), norm.device)])
        self.logged.setdefault(phase, []).append(line)

    def backward(self, phase, micro_batches, states):
        """Add up the step's gradients, over all processes.

        Returns:
            (this process's part of each head's loss, positions of each head over all processes), both fp32 [h] on the device.
        """
        chosen = self.choose(phase, micro_batches, states)
        counts = torch.tensor([positions.counts for positions in chosen], dtype=torch.float32).sum(0)
        counts = self.processes.add_up(upload(counts, self.base_model.device))
        total = 0.0
        for number, (batch, (hidden, _), positions) in enumerate(zip(micro_batches, states, chosen)):
            seen = batch.segment_ids if self.speculator.context_width else None
            windows = make_windows(hidden, batch.tokens, positions, self.speculator.n_predict, seen)
            if self.processes.count > 1:
                self.speculator.set_requires_gradient_sync(number == len(chosen) - 1)
            loss, parts = self.speculator.losses(windows, self.base_model, self.weights[phase], counts)
            loss.backward()
            total = total + parts
        return total, counts

    def choose(self, phase, micro_batches, states):
        """The `Positions` of each micro-batch, drawn by its number within the step over all processes."""
        settings, heads = getattr(self.config, phase), self.speculator.n_predict
        chosen = []
        for number, (batch, (_, greedy)) in enumerate(zip(micro_batches, states)):
            index = number * self.processes.count + self.processes.rank
            generator = torch.Generator().manual_seed(mixed(self.config.seed, self.step, index))
            greedy = greedy if settings.loss.only_accepted else None
            usable = usable_positions(batch.segment_ids, batch.first_states, heads, greedy, batch.trained)
            chosen.append(choose_positions(usable, settings.positions, generator))
        return chosen

    @cached_property
    def validation(self):
        return self.make_validation()

    def validate(self):
        """Acceptance of a chain as deep as there are heads, as decoding would count it."""
        proposer = DraftShape().proposer(self.speculator)
        with torch.no_grad(), gathered(self.speculator):
            own = self.validation.accepted(proposer)
        accepted = [count for share in self.processes.gather(own) for counts in share for count in counts]
        acceptance = pooled_acceptance(accepted, proposer.lookahead)
        shares = {f"validation/acceptance_at_{position}": share for position, share in enumerate(acceptance.per_position, start=1)}
        return {"validation/acceptance_length": acceptance.length} | shares

    def read_log(self):
        """Means since the last log line, as plain numbers: the only place where the host waits for the device."""
        values = {}
        for phase, lines in self.logged.items():
            with self.watch.measure("device"):  # what was queued on a GPU in the parts above, until it is done
                mean = torch.stack(lines).mean(0)
                self.processes.add_up(mean[: self.speculator.n_predict])
                *losses, count, norm, factor = mean.tolist()
            self.tokens += round(count * len(lines))
            if not math.isfinite(sum(losses) + norm):
                raise UserError(f"{phase}: the loss is not finite at step {self.step}; lower optimizer.lr in a new run")
            values |= {f"{phase}/loss": sum(losses), f"{phase}/grad_norm": norm, f"{phase}/lr": factor * self.config.optimizer.lr}
            values |= {f"{phase}/loss_head_{i}": loss for i, loss in enumerate(losses)}
        steps, self.logged = {phase: len(lines) for phase, lines in self.logged.items()}, {}
        spent = sum(self.watch.seconds.values())
        values |= self.device_metrics.figures(steps)
        values |= {f"time_share/{part}": seconds / spent for part, seconds in self.watch.seconds.items()}
        values |= self.supply.figures()
        return values | {"tokens": self.tokens, "tokens_per_s": self.tokens / spent}
