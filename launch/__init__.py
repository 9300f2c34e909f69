"""Starts training on this machine or on a cluster, one module for each place.

Each renders a shell script or YAML, which `--dry-run` prints. Nothing here needs JAX: a laptop
without it can start a pod. All places run `python -m vtp_jax.train`, and pass the overrides
(`--config.a.b=value`) on to it. A wheel has this folder as vtp_jax/launch.
"""
