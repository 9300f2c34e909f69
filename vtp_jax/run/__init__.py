"""The machinery of a training run, which knows no config: step, optimizer, sharding, saving."""
