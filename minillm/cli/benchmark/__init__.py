"""What `minillm bench` runs: the same work in this engine and in eager PyTorch, a process each."""
