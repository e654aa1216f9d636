"""This machine and what is installed on it, the state of a run's folder, and a small model to try things with."""
