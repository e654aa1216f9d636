"""A training run: `run` puts it together from top to bottom, `loop` goes through its steps, the other files are what they need."""
