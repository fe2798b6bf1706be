"""The compiled CPU executor: Programs as fused loops and exact integer products, in machine code made by LLVM."""
