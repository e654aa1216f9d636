"""Hidden states for training: from the base model, or read again from files where the run keeps them.

Shapes: b rows, n tokens, d base width.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from fms_spec.batch import upload
from fms_spec.errors import UserError

FILL_ROWS = 8  # rows of a base-model forward when hidden states are kept


class HiddenStates:
    """Calls the frozen base model, and with a directory keeps what it gave in memory-mapped files for the next pass.

    A row is flagged only after its states are written, so a run that dies half-way finds the whole ones again, and processes of one node
    may share the files. The files are sparse: they take space for the rows that were written, at most `nbytes`.

    Args:
        best_tokens: function of states [..., d] giving the base model's own best next token, int64 [...]; None where nobody asks,
            which spares its read-out and, on a GPU, a wait.
        rows, length: size of the table the batches come from; used: how many of its rows the run reads.
    """

    def __init__(self, base_model, best_tokens, directory=None, rows=0, length=0, used=0):
        self.base_model, self.best_tokens, self.directory = base_model, best_tokens, directory
        self.nbytes = used * length * base_model.width * base_model.dtype.itemsize if directory else 0
        if directory:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self.states = self._map("states", (rows, length, base_model.width), base_model.dtype)
            self.greedy = self._map("greedy", (rows, length), torch.bool)
            self.written = self._map("written", (rows,), torch.bool)

    def _map(self, name, shape, dtype):
        path, size = Path(self.directory) / f"{name}.bin", torch.Size(shape).numel()
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def __call__(self, batch):
        """(states [b, n, d] on the base model's device, greedy bool [b, n] on the CPU) of a `Batch`.

        greedy says of each token whether it is the base model's own best guess for its place; all False without `best_tokens`.

        Raises:
            UserError: kept states of other data.
        """
        if not self.directory:
            return self.compute(batch.tokens, batch.segment_ids)
        n = batch.tokens.shape[1]
        if n > self.states.shape[1] or int(batch.row_ids.max()) >= len(self.states):
            raise UserError(f"hidden-state cache {self.directory} was made for other data; remove it or turn hidden_state_cache off")
        missing = (~self.written[batch.row_ids]).nonzero()[:, 0]
        with self.base_model.together():
            if len(missing):
                states, greedy = self.compute(batch.tokens[missing], batch.segment_ids[missing])
                self.states[batch.row_ids[missing], :n], self.greedy[batch.row_ids[missing], :n] = states.cpu(), greedy
                self.written[batch.row_ids[missing]] = True
        return upload(self.states[batch.row_ids, :n], self.base_model.device), self.greedy[batch.row_ids, :n]

    def fill(self, batches, count):
        """Run the base model over `count` batches beforehand, so that training's own pace shows from its first step on."""
        with tqdm(total=count, desc="hidden states", unit="batch", dynamic_ncols=True) as bar:
            for _ in range(count):
                self(next(batches))
                bar.update()

    @torch.no_grad()
    def compute(self, tokens, segment_ids):
        """One forward of the base model: tokens int64 [b, n], segment_ids int [b, n]."""
        states = self.base_model.hidden_states(tokens, segment_ids)
        greedy = torch.zeros(tokens.shape, dtype=torch.bool)
        if self.best_tokens is not None:
            greedy[:, 1:] = self.best_tokens(states[:, :-1]).cpu() == tokens[:, 1:]
        return states, greedy
