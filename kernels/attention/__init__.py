"""Flash attention: exact attention in tiles, forward and backward, without a matrix of scores in memory."""
