"""Lowering rules: each core ATen operator as primitives. A new operator is a few lines in one of these modules.

A rule takes the Lowering (builder, slices, random words) and the operator's arguments with tensors as Values. The order
of operations follows torch's own decompositions where forward and backward share values, so that they are shared.
"""

from runtime.program.aten import elementwise, indexing, movement, products, reductions
from runtime.program.aten.registry import RULES, Unsupported

__all__ = ["RULES", "Unsupported", "elementwise", "indexing", "movement", "products", "reductions"]
