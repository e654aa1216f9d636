"""From a config to what a command does: each folder is one thing that is done with a run."""
