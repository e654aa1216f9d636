"""The commands: arguments in, one call out. None imports another."""
