"""Programs: the operator table, their encoding, the lowering from torch, and the reference executor."""
