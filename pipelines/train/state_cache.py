"""Hidden states for training: from the base model, or read again from files where the run keeps them.

Shapes: b rows, n tokens, d width of the base model's states.
"""

import json
import mmap
import os
import sys
import zlib
from pathlib import Path

import torch

from data.progress import progress
from fms_spec.batch import upload
from fms_spec.errors import UserError
from fms_spec.files import cannot_write, let_go, locked, write_whole

PATIENCE = 60  # seconds for what takes milliseconds


class HiddenStates:
    """Calls the frozen base model, and with a directory keeps what it gave in memory-mapped files for the next pass.

    A row's checksum is written after its states, over them and the tokens they were computed of, and compared before a process first
    believes the row: one that is damaged, half-written or of other tokens is computed again. Processes of one node may share the files.
    They are sparse: they take space for the rows that were written, at most `nbytes`.

    Args:
        best_tokens: function of states [..., d] giving the base model's own best next token, int64 [...]; None where nobody asks,
            which spares its read-out and, on a GPU, a wait.
        rows, length: size of the table the batches come from; used: how many of its rows the run reads.

    Raises:
        UserError: the directory can't be written.
    """

    def __init__(self, base_model, best_tokens, directory=None, rows=0, length=0, used=0):
        self.base_model, self.best_tokens, self.directory = base_model, best_tokens, directory and Path(directory)
        self.nbytes = used * length * base_model.state_width * base_model.dtype.itemsize if directory else 0
        if directory:
            self.files, self.told, self.compared = {}, False, torch.zeros(rows, dtype=torch.bool)
            try:
                self._settle_identity([rows, length, base_model.state_width])
                self.states = self._map("states", (rows, length, base_model.state_width), base_model.dtype)
                self.greedy = self._map("greedy", (rows, length), torch.bool)
                self.written = self._map("written", (rows,), torch.int64)  # checksums, 0 where there is no row
            except OSError as error:
                raise cannot_write(error.filename or directory, error) from None
            self._allocate("written", 0, self.written.nbytes)

    def _settle_identity(self, shape):
        """Forget what was kept of another base model or other layers, or in another layout; raises OSError."""
        model = self.base_model
        identity = {"base_model": model.fingerprint, "backend": model.backend, "dtype": str(model.dtype), "states": shape}
        identity |= {"layers": model.inner_layers} if model.inner_layers else {}
        wanted = json.dumps(identity | {"greedy": self.best_tokens is not None}).encode()
        self.directory.mkdir(parents=True, exist_ok=True)
        written, record, lock_path = (self.directory / name for name in ("written.bin", "identity.json", ".identity.lock"))
        lock = locked(lock_path, PATIENCE)  # processes that share the files open them at the same time
        if lock is None:
            raise UserError(f"{lock_path}: another process has held it for {PATIENCE} s; remove it if that one is gone")
        try:
            if not record.exists() or record.read_bytes() != wanted:
                if written.exists():
                    self._warn("was kept of another base model, dtype or backend, or in another layout; it is computed again")
                written.unlink(missing_ok=True)  # and not emptied: a process that maps it would be killed
                write_whole(record, wanted)
        finally:
            let_go(lock)

    def _map(self, name, shape, dtype):
        """A tensor in `name`.bin, which becomes as large as it has to be; raises OSError."""
        file = os.fdopen(os.open(self.directory / f"{name}.bin", os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        size = torch.Size(shape).numel() * dtype.itemsize
        file.truncate(size)
        self.files[name] = file
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(shape)

    def _allocate(self, name, start, size):
        """Have the disk's room for a part of a file: a mapped write that finds none would kill the process."""
        try:
            os.posix_fallocate(self.files[name].fileno(), start, size)
        except OSError as error:
            reason = f"{error.strerror}; the states of all rows take {self.nbytes:,} bytes"
            raise cannot_write(self.directory / f"{name}.bin", OSError(error.errno, reason)) from None

    def __call__(self, batch):
        """(states [b, n, d] on the base model's device, greedy bool [b, n] on the CPU) of a `Batch`.

        greedy says of each token whether it is the base model's own best guess for its position; all False without `best_tokens`. Kept
        padding is zero.

        Raises:
            UserError: kept states of other data, or no room for more.
        """
        if not self.directory:
            return self.compute(batch.tokens, batch.segment_ids)
        n = batch.tokens.shape[1]
        if n > self.states.shape[1] or int(batch.row_ids.max()) >= len(self.states):
            raise UserError(f"hidden-state cache {self.directory} was made for other data; remove it or turn hidden_state_cache off")
        missing = self._missing(batch)
        with self.base_model.together():
            if missing:
                states, greedy = self.compute(batch.tokens[missing], batch.segment_ids[missing])
                for index, *row in zip(missing, states.cpu(), greedy):
                    self._keep(batch, index, *row)
        padding = batch.segment_ids < 0
        states = self.states[batch.row_ids, :n]
        states[padding] = 0
        return upload(states, self.base_model.device), self.greedy[batch.row_ids, :n] & ~padding

    def _missing(self, batch):
        """Indices in a batch of the rows that can't be read; those that can are compared with their checksums once."""
        missing, damaged = [], 0
        for index in (~self.compared[batch.row_ids]).nonzero()[:, 0].tolist():
            row = batch.row_ids[index]
            if self.written[row] and self.written[row] == self._checksum(batch, index):
                self.compared[row] = True
            else:
                missing.append(index)
                damaged += bool(self.written[row])
        if damaged and not self.told:
            self._warn(f"has rows that don't fit their checksums ({damaged} of {len(batch.row_ids)} in a batch); they are computed again")
            self.told = True
        return missing

    def _keep(self, batch, index, states, greedy):
        """Write a row: states [n, d], greedy [n]."""
        row, length = int(batch.row_ids[index]), tokens_in(batch, index)
        for name, kept, computed in (("states", self.states, states), ("greedy", self.greedy, greedy)):
            self._allocate(name, kept[row].storage_offset() * kept.itemsize, kept[row, :length].nbytes)
            kept[row, :length] = computed[:length]
        self.written[row] = self._checksum(batch, index)
        self.compared[row] = True

    def _checksum(self, batch, index):
        """Of what is kept of a row and of the tokens it is for: an int from 1 on. CRC-32 takes 4 GB/s on a core, sha256 less than half."""
        row, length, checksum = batch.row_ids[index], tokens_in(batch, index), 0
        for part in (batch.tokens[index], batch.segment_ids[index], self.greedy[row], self.states[row]):
            checksum = zlib.crc32(part[:length].contiguous().view(torch.uint8).numpy(), checksum)
        return checksum or 1

    def _warn(self, problem):
        print(f"warning: hidden-state cache {self.directory} {problem}", file=sys.stderr)

    def fill(self, batches, count):
        """Run the base model over `count` batches beforehand, so that training's own pace shows from its first step on."""
        with progress(total=count, desc="hidden states", unit="batch") as bar:
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


def tokens_in(batch, index):
    """Tokens of a batch's row that are no padding."""
    return int((batch.segment_ids[index] >= 0).sum())
