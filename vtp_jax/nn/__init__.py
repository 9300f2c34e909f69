"""Nets and their parts in Flax Linen: no losses, no configs, no meshes."""
