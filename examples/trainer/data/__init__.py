"""Data: documents to tokens, tokens to packed rows, rows to batches."""
