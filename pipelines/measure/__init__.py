"""What a speculator earns and what a step costs: evaluation, the choice of a tree, and one file a benchmark."""
