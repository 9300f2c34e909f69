"""Package metadata. Tool settings live in pyproject.toml, exact versions in requirements.lock."""

from pathlib import Path

from setuptools import find_packages, setup

# Lower bounds are what the test suite was last run with on the oldest supported Python, upper
# bounds the newest it was run with: JAX 0.10.2 on Python 3.11, JAX 0.12.0 on Python 3.12.
CORE = [
    "absl-py>=2.1",
    "av>=18,<20",
    "clu>=0.0.12",
    "etils[epath]>=1.12",
    "flax>=0.12.8,<0.13",
    "jax>=0.10.2,<0.13",
    "jaxtyping>=0.3.9",
    "matplotlib>=3.10",
    "ml-dtypes>=0.5",
    "ml_collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=11",
    "rich>=14",
    "scipy>=1.14",
    "sentencepiece>=0.2.1",
    "tensorboard>=2.19",
    "tokenizers>=0.22",
    # tf.data runs on the host only: the CPU build where there is one.
    "tensorflow-cpu>=2.20; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "tensorflow>=2.20; sys_platform != 'linux' or platform_machine != 'x86_64'",
]
# Builders of the community's sets, and parquet. TFDS imports importlib_resources without saying so.
TFDS = ["importlib_resources>=6.5", "tensorflow-datasets>=4.9.10"]
BEAM = ["apache-beam>=2.77"]  # `prepare shards --runner beam`

# The page of `vtp serve`; everything else runs without it.
SERVE = ["gradio>=6.0"]

# Configs are data that the loader finds by name (vtp_jax/setup/shipped.py), and `vtp launch` runs
# the launchers: both install below vtp_jax and not as top-level packages of their own.
CONFIGS = Path(__file__).with_name("configs")
FOLDERS = [CONFIGS, *sorted(d for d in CONFIGS.rglob("*") if any(d.glob("*.py")))]
PACKAGES = [".".join(["vtp_jax", "configs", *d.relative_to(CONFIGS).parts]) for d in FOLDERS]

setup(
    name="vtp_jax",
    version="0.1.0",
    description="Video-text pretraining in JAX: SimVTP and its relatives",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["vtp_jax", "vtp_jax.*"]), *PACKAGES, "vtp_jax.launch"],
    package_dir={"vtp_jax.configs": "configs", "vtp_jax.launch": "launch"},
    entry_points=dict(console_scripts=["vtp = vtp_jax.__main__:main"]),
    install_requires=CORE,
    extras_require={
        "cpu": [],  # JAX's default wheels are the CPU build
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # To write .pth files, and for the tests that hold our nets against PyTorch's.
        "torch": ["torch==2.13.0", "transformers>=5.23,<6", "safetensors>=0.8"],
        "serve": SERVE,
        "tfds": TFDS,
        "beam": BEAM,
        # Workdirs in a bucket. Orbax lists one with Google's clients; etils uses TensorFlow's, or
        # gcsfs where TensorFlow is not installed.
        "gs": ["gcsfs>=2025.1", "google-cloud-storage>=2.19"],
        "dev": [
            *TFDS,
            *BEAM,
            "beartype>=0.22",
            "hypothesis>=6.150",
            "pyright>=1.1.400",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
        ],
    },
)
