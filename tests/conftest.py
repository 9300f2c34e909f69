"""Eight fake CPU devices for the whole suite; a test that needs one takes `jax.devices()[:1]`.

Compiling is most of what the suite costs. Compiled programs are therefore cached while the suite
runs, for its workers and the processes that tests start; and XLA compiles fast rather than well: it
skips its expensive passes, and uses the CPU backend's older emitters of fusions (OmniVL's step in
the laws: 4.7 CPU seconds, 16.3 with the new ones). Programs that are compared with a reference in a
process of their own (tests/parity.py) are compiled as users compile them. VTP_TEST_OPTIMIZED=1 in
the environment does so everywhere.

Must run before anything imports jax: the flags are read when the backend starts.
"""

import atexit
import os
import shutil
import tempfile

FLAG = "--xla_force_host_platform_device_count"
FAST = [
    # One code unit per program: splitting it over threads pays off for large programs only.
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
]
# Eight devices on two busy cores: a collective may wait for its last device for longer than the 40
# seconds after which XLA ends the process.
PATIENT = [
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_cpu_collective_timeout_seconds=600",
]
fast = os.environ.get("VTP_TEST_OPTIMIZED", "0") == "0"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    flags = [os.environ.get("XLA_FLAGS", ""), f"{FLAG}=8", *PATIENT, *(FAST if fast else [])]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(fast))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the workers have it from the first process
    cache = tempfile.mkdtemp(prefix="vtp_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, cache, ignore_errors=True)

from hypothesis import settings  # noqa: E402 - jax reads the flags above when it starts

# Deadlines are timing assertions, and compiling counts against them. Examples are fixed, so that a
# failure can be reproduced.
settings.register_profile("suite", deadline=None, max_examples=12, derandomize=True)
settings.load_profile("suite")

pytest_plugins = ["tests.seconds"]
