"""The equations as written: pure functions of tensors, composed of primitives, in the catalogue's symbols."""
