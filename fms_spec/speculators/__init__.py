"""Attached heads: one file a family, the interface they stand behind, the registry that knows them, and their directories on disk."""
