"""What the tests share: oracles, reference cases, batches and comparisons."""
