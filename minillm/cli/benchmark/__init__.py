"""What `minillm bench` runs: the same training step in this engine and in eager PyTorch, a process each."""
