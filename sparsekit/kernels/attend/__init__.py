"""plan -> output: the implementations of attention over a plan."""
