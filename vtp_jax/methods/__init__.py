"""The published methods, one file each: `make(**cfg) -> Method`."""
