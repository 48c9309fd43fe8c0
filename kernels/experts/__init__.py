"""A mixture of experts: router, packing by counting, products of every expert's rows, weighted combination."""
