"""SimVTP (Ma et al., arXiv 2212.03490) in PyTorch: a single file that needs only `torch`.

It belongs in a folder with config.json and model.safetensors. In Python, started in that folder:

    import torch, simvtp
    net = simvtp.load(".")                          # in eval mode, on the CPU, in the file's dtype
    video = net.encode_video(frames)                # (B, T, H, W, 3) uint8, or floats in [0, 1]
    text = net.encode_text(ids, mask)               # (B, L) ids; (B, L) True where not padding
    likeness = torch.nn.functional.cosine_similarity(text, video)

config.json defines which net it is: "simvtp", a single encoder of videos, texts and pairs, as
pretrained; or "simvtp_finetune", an encoder of videos and one of texts. Tensors have the names of
the authors' release, so `load_state_dict` also accepts the released files. Written for vtp_jax from
the paper and from outputs of the released code, not from the code itself.

Licence of this file: Apache-2.0. Weights keep the licence of the weights and data that they were
trained from.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS, WORDS_EPS = 1e-6, 1e-12  # of layer norms, and of that of word embeddings
# Tensors of released files that no output depends on.
UNUSED = re.compile(
    r".*position_ids|video_encoder\.text_embeddings\..*|text_encoder\.patch_embed\..*"
)
DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)


def load(folder, **changes):
    """The net of a folder. changes: entries of its config.json to override, such as
    pool_padding=True."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    if (path := folder / "model.safetensors").exists():
        tensors = read_safetensors(path)
    else:
        tensors = torch.load(folder / "model.pth", map_location="cpu", weights_only=True)
    net = NETS[config["kind"]](config).to(next(iter(tensors.values())).dtype)
    net.load_state_dict(tensors)
    return net.eval()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = bytearray(file.read())

    def read(dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
        begin, end = data_offsets
        return torch.frombuffer(data[begin:end], dtype=DTYPES[dtype]).view(shape)

    return {name: read(**entry) for name, entry in header.items() if name != "__metadata__"}


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, N, d) -> (B, d): the mean over tokens where mask (B, N) is True, summed in fp32 or
    wider."""
    w = mask[..., None].to(torch.promote_types(x.dtype, torch.float32))
    return ((x * w).sum(1) / w.sum(1).clamp(min=1)).to(x.dtype)


def places(config: dict, d: int) -> Tensor:
    """(N, d) fp32, with row p for cube p of the config's video (T, H, W): in column j, the sine (j
    even) or cosine (j odd) of p / 10000^(2 (j // 2) / d)."""
    n = math.prod(a // step for a, step in zip(config["video"], config["cube"], strict=True))
    column = torch.arange(d, dtype=torch.float64)
    power = torch.pow(10000.0, 2 * (column // 2) / d)
    angle = torch.arange(n, dtype=torch.float64)[:, None] / power
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if mask is not None:  # added to the scores, so that a row with no key stays finite
            lowest = torch.finfo(x.dtype).min
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, lowest)[:, None, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, EPS)
        fc1, fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Blocks(nn.ModuleList):
    def __init__(self, width: int, depth: int, heads: int, mlp: int):
        super().__init__(Block(width, heads, mlp) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self:
            x = block(x, mask)
        return x


class Words(nn.Module):
    """BERT's embedding module: word + position + type 0, norm, dropout."""

    def __init__(self, config: dict):
        super().__init__()
        width = config["encoder"]["width"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], width, config["pad_id"])
        self.position_embeddings = nn.Embedding(config["text_length"], width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, WORDS_EPS)
        self.dropout = nn.Dropout(config["dropout"])

    def forward(self, ids: Tensor) -> Tensor:
        place = self.position_embeddings.weight[: ids.shape[1]]
        x = self.word_embeddings(ids) + place + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))


class Cubes(nn.Module):
    """Frames (B, T, H, W, 3) -> a token for each cube, ordered by time, then rows, then columns."""

    def __init__(self, config: dict):
        super().__init__()
        cube, width = config["cube"], config["encoder"]["width"]
        self.mean, self.std = config["mean"], config["std"]
        self.proj = nn.Conv3d(len(self.mean), width, cube, cube)
        self.register_buffer("place", places(config, width), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames.to(self.proj.weight.dtype)
        x = x if frames.is_floating_point() else x / 255
        x = (x - x.new_tensor(self.mean)) / x.new_tensor(self.std)
        return self.proj(x.permute(0, 4, 1, 2, 3)).flatten(2).transpose(1, 2) + self.place


class Net(nn.Module):
    """The base class of the two nets."""

    def __init__(self, config: dict):
        super().__init__()
        self.pool_padding = config["pool_padding"]  # True: means include padding, as released

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Also accepts the released files: {"model": tensors} or {"module": tensors}."""
        tensors = state_dict.get("model", state_dict.get("module", state_dict))
        used = {name: x for name, x in tensors.items() if not UNUSED.fullmatch(name)}
        return super().load_state_dict(used, strict=strict, assign=assign)

    def forward(self, frames: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both embeddings (B, d), of videos and of texts."""
        return self.encode_video(frames), self.encode_text(ids, mask)


class SimVTP(Net):
    """The pretrained net: one encoder, which reads videos, texts, or both concatenated."""

    def __init__(self, config: dict):
        super().__init__(config)
        width, narrow = config["encoder"]["width"], config["decoder"]["width"]
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.patch_embed = Cubes(config)
        self.encoder.blocks = Blocks(**config["encoder"])
        self.encoder.norm = nn.LayerNorm(width, EPS)
        self.text_embeddings = Words(config)
        self.encoder_to_decoder = nn.Linear(width, narrow, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, narrow))
        self.decoder.blocks = Blocks(**config["decoder"])
        self.decoder.norm = nn.LayerNorm(narrow, EPS)
        self.decoder.head = nn.Linear(narrow, math.prod(config["cube"]) * len(config["mean"]))
        self.register_buffer("place", places(config, narrow), persistent=False)
        self.text_cls = nn.Linear(width, config["vocab_size"])
        self.vtm_head = nn.Linear(width, 2)

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.encoder.norm(self.encoder.blocks(tokens, mask))

    def encode_video(self, frames: Tensor) -> Tensor:
        """(B, T, H, W, 3) -> (B, d), not normalised."""
        return self.encode(self.encoder.patch_embed(frames)).mean(1)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L), (B, L) -> (B, d), not normalised."""
        mask = mask.bool()
        return mean(self.encode(self.text_embeddings(ids), mask), mask | self.pool_padding)

    def encode_pair(self, video: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        tokens = torch.cat([video, self.text_embeddings(ids)], 1)
        return self.encode(tokens, joint(video, mask))

    def score_pair(self, frames: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B,): log odds that the video and text of a row are a pair."""
        mask, video = mask.bool(), self.encoder.patch_embed(frames)
        tokens = self.encode_pair(video, ids, mask)
        seen = mean(tokens, joint(video, mask | self.pool_padding))
        return self.vtm_head(seen) @ seen.new_tensor([-1, 1])

    def reconstruct(
        self, frames: Tensor, hidden: Tensor, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predictions for a partly hidden pair.

        hidden (B, N): True where a cube is hidden, the same number in every row. ids: with [MASK]
        in place of hidden words. -> normalised pixels (B, hidden cubes, t h w c) in ascending
        order, and logits of every word (B, L, vocabulary).
        """
        # Ascending indices of hidden and of visible cubes, the same number in every row.
        drop, keep = (torch.stack([row.nonzero()[:, 0] for row in x]) for x in (hidden, ~hidden))
        rows, k = torch.arange(len(hidden), device=hidden.device)[:, None], keep.shape[1]
        video = self.encoder.patch_embed(frames)[rows, keep]
        tokens = self.encode_pair(video, ids, mask.bool())
        seen = self.encoder_to_decoder(tokens[:, :k]) + self.place[keep]
        asked = self.mask_token + self.place[drop]
        x = self.decoder.blocks(torch.cat([seen, asked], 1))[:, k:]
        return self.decoder.head(self.decoder.norm(x)), self.text_cls(tokens[:, k:])


def joint(video: Tensor, mask: Tensor) -> Tensor:
    """The mask (B, N + L) of a video's tokens, all True, followed by a text's."""
    return torch.cat([mask.new_ones(video.shape[:2]), mask], 1)


class DualSimVTP(Net):
    """The net fine-tuned for retrieval: an encoder of videos and one of texts."""

    def __init__(self, config: dict):
        super().__init__(config)
        self.video_encoder, self.text_encoder = nn.Module(), nn.Module()
        self.video_encoder.patch_embed = Cubes(config)
        self.text_encoder.text_embeddings = Words(config)
        for tower in (self.video_encoder, self.text_encoder):
            tower.blocks = Blocks(**config["encoder"])
            tower.fc_norm = nn.LayerNorm(config["encoder"]["width"], EPS)

    def encode_video(self, frames: Tensor) -> Tensor:
        """(B, T, H, W, 3) -> (B, d), not normalised."""
        tower = self.video_encoder
        return tower.fc_norm(tower.blocks(tower.patch_embed(frames)).mean(1))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L), (B, L) -> (B, d), not normalised."""
        tower, mask = self.text_encoder, mask.bool()
        tokens = tower.blocks(tower.text_embeddings(ids), mask)
        return tower.fc_norm(mean(tokens, mask | self.pool_padding))


NETS = {"simvtp": SimVTP, "simvtp_finetune": DualSimVTP}
