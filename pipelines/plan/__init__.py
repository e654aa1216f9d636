"""What a run will need, said before anything is loaded: memory, work, time, and whether it can be at all."""
