"""The embedded engine of processes that hold one base model between them."""

import torch.distributed as dist

from pipelines.generate.engines import EmbeddedEngine


class GroupEngine(EmbeddedEngine):
    """The first process of the group leads: what it decodes, all decode with it, each its share of a sharded model's rows.

    Its base model is a `DistributedBaseModel`.

    Attributes:
        leads: whether this process leads. The others `follow` until the leader calls `dismiss`.
    """

    @property
    def leads(self):
        return self.base_model.rank == 0

    def dismiss(self):
        """Let the others go on."""
        self._tell(None)

    def follow(self):
        """Work for the leader until it calls `dismiss`."""
        while (job := self._tell(None)) is not None:
            index, prompts = job
            self.decode(index, prompts, range(len(prompts)))

    def step(self):
        self._tell(self._submitted)
        return super().step()

    def decode(self, index, prompts, rows):
        model, mine = self.base_model, self.base_model.own(rows)
        with model.together():
            decoded = super().decode(index, prompts, mine) if len(mine) else []
        shares = [None] * model.size
        dist.all_gather_object(shares, dict(zip(mine, decoded)), group=model.group)
        by_row = {row: continued for share in shares for row, continued in share.items()}
        return [by_row[row] for row in rows]

    def _tell(self, job):
        """What the leader says, in all processes of the group: (index, prompts), or None for the end."""
        said = [job]
        dist.broadcast_object_list(said, group=self.base_model.group, group_src=0)
        return said[0]
