"""A run: settings, devices, checkpoints, evaluation and compiling ahead of time."""
