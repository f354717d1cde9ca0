"""Decoding with a key-value cache: one token at a time, or speculatively."""
