"""The index: which equation stands where in code, kernels, tests and lessons.

``catalogue.json`` lists every id that has to exist: its name, formula and source, and whether the source has the formula,
names it, or only a heading. What implements an id is found by reading the tree as text (`scan`); nothing is imported. In
a checkout the tree is read anew; an installed package, which has no tests or lessons beside it, shows ``index.json``,
the same scan as it was committed.
"""

from minillm.equations.catalogue import Entry, load_catalogue
from minillm.equations.index import IndexRow, Problem, build_index, check, load_index, missing, write_index

__all__ = [
    "Entry",
    "IndexRow",
    "Problem",
    "build_index",
    "check",
    "load_catalogue",
    "load_index",
    "missing",
    "write_index",
]
