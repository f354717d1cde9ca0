"""The parts of the example trainer; `examples/train_tpu.py` puts them together."""
