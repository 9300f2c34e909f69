"""Starts training somewhere: `python -m launch.<place> --config C --workdir DIR [--dry-run]`.

Each place is one short file that renders what it does as text, a shell script or YAML, which
`--dry-run` prints. Nothing here needs JAX: a laptop without it can start a pod. All of them run the
same `python -m vtp_jax.train`; what follows the options (`--config.a.b=value`) is passed on to it.
"""
