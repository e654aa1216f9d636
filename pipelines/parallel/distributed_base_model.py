"""A frozen base model of which each process holds a part: a forward is made by all processes of a group together.

Shapes: b batch, n tokens, d base width.

Every process of a group has to call for the same number of forwards. A training step does; where the numbers may differ, because
continuations end or states are read from disk, `together` keeps those that have less to do at it until the last one is done.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from fms_spec import fms_backend
from fms_spec.base_model import BaseModel


class DistributedBaseModel(BaseModel):
    """What both ways of sharing have in common, of a base model that `mesh.check_shared` let pass.

    Args:
        mesh: see `parallel.mesh_of`. settings: as for `BaseModel`.

    Attributes:
        group: the process group that holds one copy. rank, size: of this process in it, and its processes.

    Raises:
        UserError: as `BaseModel`.
    """

    def __init__(self, name, mesh, **settings):
        self.mesh, self.group = mesh, mesh.get_group("shard")
        self.rank, self.size = mesh.get_local_rank("shard"), mesh["shard"].size()
        self.copy, self.copies = mesh.get_local_rank("replicate"), mesh["replicate"].size()
        self._apart = False  # whether processes of the group may call for different numbers of forwards
        super().__init__(name, **settings)

    @contextmanager
    def together(self):
        self._apart = True
        yield
        while self._help():
            pass
        self._apart = False

    def own(self, rows):
        """Of rows that the group is to decode, those of this process."""
        raise NotImplementedError

    def _help(self):
        """Take part in one forward of the others; False, and no forward, once none of them needs one any more."""
        raise NotImplementedError


class ShardedBaseModel(DistributedBaseModel):
    """FSDP2: each layer's weights are split over the group, and gathered layer by layer as a forward reaches them.

    Embedding and lm_head stay whole: the heads read them at every step.
    """

    def own(self, rows):
        return rows[self.rank :: self.size]

    def _load_fms(self):
        # One layer at a time: no process ever holds more than one whole layer.
        split = lambda layer: fully_shard(layer.requires_grad_(False), mesh=self.mesh)  # noqa: E731
        model = fms_backend.load(self.path, self.config, self.dtype, self.device, settle_layer=split).requires_grad_(False)
        trunk = model.base_model
        whole = {parameter for name, parameter in trunk.named_parameters() if not name.startswith("layers.")}
        fully_shard(trunk, mesh=self.mesh, ignored_params=whole)  # the root, so that the next layer is gathered during this one
        return model

    def hidden_states(self, tokens, segment_ids):
        self._begin()
        return super().hidden_states(tokens, segment_ids)

    def extend(self, tokens, cache, tree=None):
        self._begin()
        return super().extend(tokens, cache, tree)

    def _begin(self):
        if self._apart:
            self._agree(True)

    def _agree(self, needed):
        """Whether any process of the group needs a forward now."""
        asked = torch.tensor([needed], dtype=torch.int32)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        return bool(asked)

    def _help(self):
        needed = self._agree(False)
        if needed:
            super().hidden_states(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
        return needed


class TensorParallelBaseModel(DistributedBaseModel):
    """ibm-fms's tensor parallelism: each layer's matrices are split over the group, embedding and lm_head stay whole.

    The group computes the states of one process's rows after those of another. It decodes as one: all its processes the same texts.
    """

    def own(self, rows):
        return rows

    def _load_fms(self):
        self.query_heads, self.kv_groups = self.query_heads // self.size, max(1, self.kv_groups // self.size)
        return fms_backend.load(self.path, self.config, self.dtype, self.device, group=self.group)

    def hidden_states(self, tokens, segment_ids):
        return self._round((tokens, segment_ids))[self.rank]

    def _round(self, job):
        """The states of every process's rows, None for those that have none; job: (tokens, segment_ids) or None."""
        jobs = [None] * self.size
        dist.all_gather_object(jobs, job, group=self.group)
        return [None if job is None else super(TensorParallelBaseModel, self).hidden_states(*job) for job in jobs]

    def _help(self):
        return any(states is not None for states in self._round(None))
