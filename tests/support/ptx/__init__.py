"""Executing a compiled kernel for a Hopper GPU on a CPU, instruction by instruction."""
