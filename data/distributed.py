"""Dealing one stream of batches to several processes."""


class Share:
    """Of every `count` batches of a stream the one at `place`: the processes' shares together are the stream.

    A position is that of the whole stream, between two rounds, so that it may be resumed by another number of processes.

    Args:
        batches: a stream with skip(count), state_dict and load_state_dict, such as `RowReader` and `Continuations`.
    """

    def __init__(self, batches, place, count):
        self.batches, self.place, self.count = batches, place, count

    def __iter__(self):
        return self

    def __next__(self):
        self.batches.skip(self.place)
        batch = next(self.batches)
        self.batches.skip(self.count - self.place - 1)
        return batch

    def state_dict(self):
        return self.batches.state_dict()

    def load_state_dict(self, state):
        self.batches.load_state_dict(state)
