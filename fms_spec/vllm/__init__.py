"""Serving in vLLM: the plugin that it loads, the drafter that runs inside it, and the mend of what its CPU build gets wrong."""
