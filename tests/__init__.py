"""The tests of minillm and kernels; a package so that `tests.oracles` and `tests.typecheck` import by name."""
