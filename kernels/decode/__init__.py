"""Attention of a few new tokens over a cache of keys and values, split over the keys."""
