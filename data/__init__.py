"""Batches of text: prepared folders and how they are read, prompts, continuations. Nothing here knows a run or its config."""
