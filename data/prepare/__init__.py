"""From a source of text to a prepared folder: `run` goes through it from top to bottom, the other files are its parts."""
