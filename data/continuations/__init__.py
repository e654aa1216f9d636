"""Phase 2's text: the shards on disk, who writes them and when, and the batches a run reads from them."""
