"""One stream of batches for several processes."""


class DistributedBatches:
    """Of every `count` batches of a stream the one of this `rank`: what all ranks read together is the stream.

    A position is that of the whole stream, between two rounds, so that it may be resumed by another number of processes.

    Args:
        batches: a stream with skip(count), state_dict and load_state_dict, such as `RowReader` and `Continuations`.
    """

    def __init__(self, batches, rank, count):
        self.batches, self.rank, self.count = batches, rank, count

    def __iter__(self):
        return self

    def __next__(self):
        self.batches.skip(self.rank)
        batch = next(self.batches)
        self.batches.skip(self.count - self.rank - 1)
        return batch

    def needed(self, batches):
        """As `Continuations.needed`, for so many batches of each rank."""
        return self.batches.needed(batches * self.count)

    def state_dict(self):
        return self.batches.state_dict()

    def load_state_dict(self, state):
        self.batches.load_state_dict(state)
