"""Eight fake CPU devices for the whole suite; a test that needs one takes `jax.devices()[:1]`.

Must run before anything imports jax: the flags are read when the backend starts.
"""

import os

FLAG = "--xla_force_host_platform_device_count"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from hypothesis import settings  # noqa: E402 - jax reads the flags above when it starts

# Deadlines are timing assertions, and compiling counts against them; fixed examples, so that a
# failure is one for everybody.
settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("suite")
