"""Video-text pretraining in JAX: SimVTP and its published relatives on shared parts."""

__version__ = "0.1.0"
