"""PyTorch's own files are read as PyTorch reads them, and PyTorch reads exported ones."""

import argparse

import numpy as np
import pytest
import safetensors.torch
import torch

from vtp_jax.convert import files, torch_files
from vtp_jax.types import UserError


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 3)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.LayerNorm(3)])
        self.tied = self.fc
        self.register_buffer("position_ids", torch.arange(4).expand((1, -1)))
        self.scale = 2

    def forward(self, x):
        return self.layers[0](self.tied(x)) * self.scale + self.position_ids.sum()


def bits(x):
    """dtype, shape and bytes, of an array or a tensor."""
    if isinstance(x, torch.Tensor):
        flat = x.detach().contiguous().reshape(-1).view(torch.uint8)
        return str(x.dtype).removeprefix("torch."), tuple(x.shape), flat.numpy().tobytes()
    return x.dtype.name, x.shape, x.tobytes()


def assert_same(tensors, reference):
    assert list(tensors) == list(reference)
    for name, x in reference.items():
        assert bits(tensors[name]) == bits(x), name


NAMES = [name for name in torch_files.DTYPES if name != "bool"]


def of_every_dtype():
    raw = torch.from_numpy(np.frombuffer(np.random.default_rng(0).bytes(96), np.uint8).copy())
    tensors = {n: raw.clone().view(getattr(torch, n)).reshape(2, -1) for n in NAMES}
    return {**tensors, "bool": raw > 99, "empty": torch.zeros(0, 3), "scalar": torch.tensor(3.0)}


def views():
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "base": base,
        "t": base.t(),
        "steps": base[::2, 1::3],
        "row": base[2],
        "expanded": base[:, :1].expand(4, 3),
        "parameter": torch.nn.Parameter(base[1:]),
        "own": base.clone(),
    }


@pytest.mark.parametrize("new", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("make", [of_every_dtype, views, lambda: Net().state_dict()])
def test_what_torch_saves_is_read(tmp_path, make, protocol, new):
    tensors = make()
    if not new:  # the stream cannot hold the newest dtypes
        tensors = {k: x for k, x in tensors.items() if k[:4] != "uint" and k[:6] != "float8"}
    path = tmp_path / "x.pth"
    torch.save(tensors, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    file = files.read(path)
    assert_same(file.tensors, tensors)
    if "base" in tensors:
        assert np.shares_memory(file.tensors["base"], file.tensors["steps"])
        assert not np.shares_memory(file.tensors["base"], file.tensors["own"])


@pytest.mark.parametrize("new", [True, False], ids=["zip", "stream"])
def test_a_training_checkpoint_is_read(tmp_path, new):
    """As the VideoMAE code saves one: weights, optimizer, arguments."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": {f"module.{k}": v for k, v in net.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "args": argparse.Namespace(
            lr=1e-3, size=torch.Size([2]), dtype=torch.float16, to=torch.device("cpu")
        ),
        "best": np.float64(0.5),
    }
    torch.save(checkpoint, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    file = files.read(tmp_path / "x.pth")
    assert_same(file.tensors, net.state_dict())
    assert file.wrappers == ("model", "module.")
    assert file.dropped == ("optimizer", "epoch", "scaler", "args", "best")


@pytest.mark.filterwarnings("ignore")  # torch warns that TorchScript, as in CLIP's files, is old
@pytest.mark.parametrize("make", [torch.jit.script, lambda n: torch.jit.trace(n, torch.ones(2))])
def test_torchscript_archives_are_read(tmp_path, make):
    script = make(Net().half() if make is torch.jit.script else Net())
    torch.jit.save(script, tmp_path / "x.pt")
    file = files.read(tmp_path / "x.pt")
    assert file.tensors.keys() == script.state_dict().keys()
    assert_same({n: file.tensors[n] for n in script.state_dict()}, script.state_dict())


def test_a_pickled_module_is_rejected(tmp_path):
    torch.save(torch.nn.Linear(2, 3), tmp_path / "x.pt")
    with pytest.raises(UserError, match="torch.nn.modules.linear.Linear"):
        files.read(tmp_path / "x.pt")


def test_a_wrong_checksum_is_reported(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(64)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(bytes(256)) + 100] = 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged.*Bad CRC-32"):
        files.read(path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("wrapper", ["", "model"])
def test_torch_reads_what_is_written(tmp_path, suffix, wrapper):
    path = tmp_path / f"x{suffix}"
    torch.save(of_every_dtype(), path)
    tensors = files.read(path).tensors
    files.write(path, tensors, wrapper=wrapper)
    loaded = torch.load(path, weights_only=True)
    assert_same(loaded[wrapper] if wrapper else loaded, of_every_dtype())
    file = files.read(path)
    assert_same(file.tensors, tensors)
    assert file.wrappers == ((wrapper,) if wrapper else ())


def test_the_safetensors_library_agrees(tmp_path):
    tensors = {k: x for k, x in of_every_dtype().items() if k != "complex128"}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    file = files.read(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"} and file.tensors.keys() == tensors.keys()
    assert_same({k: file.tensors[k] for k in tensors}, tensors)
    files.write(tmp_path / "y.safetensors", file.tensors, file.metadata)
    loaded = safetensors.torch.load_file(tmp_path / "y.safetensors")
    assert_same({k: loaded[k] for k in tensors}, tensors)
    with safetensors.safe_open(tmp_path / "y.safetensors", "np") as f:
        assert f.metadata() == {"format": "pt"}
