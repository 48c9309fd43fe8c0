"""The equations as derived: one tape node each, with a VJP worked out by hand in the docstring.

Each function takes arrays and returns its value and a closure ``vjp``, which maps the cotangent of the
value to the cotangents of the arguments. The `derived` decorator makes it callable on tensors and enters it
in the registry beside its as-written twin of the same name.
"""
