"""RMSNorm, LayerNorm and both fused with the residual addition, forward and backward."""
