"""AdamW in one launch over all tensors of a model."""
