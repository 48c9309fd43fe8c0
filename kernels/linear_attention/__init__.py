"""Causal linear attention in chunks, with the state passed in and out, forward and backward."""
