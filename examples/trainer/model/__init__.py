"""The language model: its layers, its experts, and the heads that its loss needs."""
