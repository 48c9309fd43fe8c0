"""SwiGLU and GEGLU: a product of a value and a gate through a nonlinearity, in one pass over memory."""
