"""From a config to the parts of a run: what every entry needs before it starts."""
