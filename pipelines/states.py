"""Hidden states for training: from the base model, or read again from a file where the run keeps them.

Shapes: b rows, n tokens, d base width.
"""

from pathlib import Path

import torch

from fms_spec.errors import UserError


class HiddenStates:
    """Calls `base_model.hidden_states`, and with a directory keeps each row's states in one memory-mapped file for the next pass.

    Costs rows x length x d x bytes of the base model's dtype on disk (`nbytes`); a corpus read once is never worth it. A row is
    flagged only after its states are written, so a run that dies half-way finds them again.
    """

    def __init__(self, base_model, directory=None, rows=0, length=0):
        self.base_model, self.directory = base_model, directory
        self.nbytes = rows * length * base_model.width * base_model.dtype.itemsize if directory else 0
        if directory:
            path = Path(directory)
            path.mkdir(parents=True, exist_ok=True)
            count = rows * length * base_model.width
            states = torch.from_file(str(path / "states.bin"), shared=True, size=count, dtype=base_model.dtype)
            self.states = states.view(rows, length, base_model.width)
            self.written = torch.from_file(str(path / "written.bin"), shared=True, size=rows, dtype=torch.uint8)

    def __call__(self, batch):
        """States [b, n, d] of a `Batch`, on the base model's device."""
        if not self.directory:
            return self.base_model.hidden_states(batch.tokens, batch.segment_ids)
        n = batch.tokens.shape[1]
        if n > self.states.shape[1] or int(batch.row_ids.max()) >= len(self.states):
            raise UserError(f"hidden-state cache {self.directory} was made for other data; remove it or turn hidden_state_cache off")
        missing = (self.written[batch.row_ids] == 0).nonzero()[:, 0]
        if len(missing):
            fresh = self.base_model.hidden_states(batch.tokens[missing], batch.segment_ids[missing])
            self.states[batch.row_ids[missing], :n] = fresh.cpu()
            self.written[batch.row_ids[missing]] = 1
        return self.states[batch.row_ids, :n].to(self.base_model.device)
