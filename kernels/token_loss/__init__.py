"""Softmax, cross-entropy and the clipped policy losses over logits, in one pass; and the same from hidden states."""
