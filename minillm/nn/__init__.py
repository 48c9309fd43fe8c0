"""Layers that own parameters and caches."""

from minillm.nn.attention import CausalSelfAttention
from minillm.nn.cache import KVCache
from minillm.nn.layers import Embedding, Linear, RMSNorm, SwiGLU
from minillm.nn.module import Module

__all__ = ["CausalSelfAttention", "Embedding", "KVCache", "Linear", "Module", "RMSNorm", "SwiGLU"]
