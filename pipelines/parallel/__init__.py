"""Several processes: who they are, how they share models, and how they end together."""
