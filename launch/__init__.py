"""Starts training somewhere: `python -m launch.<place> --config C --workdir DIR [--dry-run]`.

Each place is one short file that renders a shell script or YAML, which `--dry-run` prints. Nothing
here needs JAX: a laptop without it can start a pod. All places run `python -m vtp_jax.train`;
overrides (`--config.a.b=value`) are passed on to it.
"""
