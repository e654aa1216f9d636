"""How a run uses its device: what stands in the metrics of it."""

import time

import torch

from fms_spec.errors import UserError
from pipelines.plan.devices import DEVICES
from pipelines.plan.plan import Plan

OTHERS = ("pcie", "nvl", "gb200", "laptop", "mig")  # cards, or slices of one, with the names of `DEVICES` and other rates


class DeviceMetrics:
    """Memory of a GPU, and the share of its rate that the useful work of training has reached.

    Useful work is what a plan says of the base model's forward and of heads and losses; whatever else takes time lowers the share.

    Args:
        config: `RunConfig`. sizes: `plan.Sizes`. processes: `Processes`, whose main one's figures are kept. device: of the base model.
    """

    def __init__(self, config, sizes, processes, device):
        self.device, self.work, self.rate, self.since = device, {}, 0, time.perf_counter()
        if device.type == "cpu" or not processes.main:
            return
        known = known_device(torch.cuda.get_device_name(device))
        try:
            plan = known and Plan(config, sizes, processes, known)  # 12 s for Llama-3.1-8B
        except UserError:  # of a base model that no plan can be made of
            return
        if plan:
            parts = ["heads and losses"] if config.hidden_state_cache else ["base model", "heads and losses"]
            self.rate, self.work = known.flops, {phase: sum(plan.work(phase)[part][0] for part in parts) for phase in plan.phases}

    def figures(self, steps):
        """{metric: number}: gpu/allocated_peak_gb and gpu/reserved_peak_gb, of the time since the call before; gpu/rate_share, in the
        same time, of the data sheet's dense bf16 rate, all waits included. What isn't known is left out: on a CPU, all of it.

        steps: {phase: optimiser steps since the call before}.
        """
        if self.device.type == "cpu":
            return {}
        metrics = {
            "gpu/allocated_peak_gb": torch.cuda.max_memory_allocated(self.device) / 1e9,
            "gpu/reserved_peak_gb": torch.cuda.max_memory_reserved(self.device) / 1e9,
        }
        torch.cuda.reset_peak_memory_stats(self.device)
        before, self.since = self.since, time.perf_counter()
        if self.rate:
            done = sum(self.work[phase] * count for phase, count in steps.items())
            metrics["gpu/rate_share"] = done / (self.since - before) / self.rate
        return metrics


def known_device(name):
    """The `devices.Device` of a GPU as the driver names it, or None. One of another size of memory may be given: rates are the same."""
    words = "".join(name.lower().split())
    if any(kind in words for kind in OTHERS):
        return None
    return next((device for key, device in DEVICES.items() if key.partition("-")[0] in words), None)
