"""The PyTorch module that exported SimVTP folders carry, against the JAX net and the goldens.

It is loaded from a folder, as outside this package: a copy, with weights and config.json.
"""

import importlib.util
import json
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax import masking
from vtp_jax.convert import files, pytorch, rules
from vtp_jax.convert.families import simvtp as published
from vtp_jax.methods import simvtp
from vtp_jax.nn.sizes import Size
from vtp_jax.tasks import retrieve

torch = pytest.importorskip("torch", reason="torch is installed by `make test`")

GOLDEN = Path(__file__).parents[1] / "golden"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENCODER, DECODER = Size(32, 2, 4, 80), Size(24, 2, 3, 56)
CUBE, VIDEO = (2, 8, 4), (4, 16, 12)  # nothing is square
WORDS, PLACES = 50, 10
TOLERANCE = {np.float32: 1e-5, np.float64: 1e-12}
N, HIDDEN = 12, 7  # the numbers of cubes and of hidden ones


def module_in(folder: Path):
    spec = importlib.util.spec_from_file_location("simvtp_of_folder", folder / "simvtp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Case(NamedTuple):
    """A folder, its net, a batch for it, and what the JAX net of the same weights returns."""

    folder: Path
    net: Any
    batch: dict[str, np.ndarray]
    ours: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]  # of the sum over sin(video) * text, by their names
    tolerance: float

    def inputs(self, *names: str) -> list:
        return [torch.tensor(self.batch[name]) for name in names]

    def check(self, **theirs: Any) -> None:
        for name, x in theirs.items():
            ours, x = self.ours[name], x.detach().numpy()
            assert x.shape == ours.shape
            atol = self.tolerance * np.abs(ours).max()
            np.testing.assert_allclose(x, ours, rtol=0, atol=atol, err_msg=name)


def draw_batch(dtype: Any) -> dict[str, np.ndarray]:
    """uint8 frames in single precision, floats in [0, 1] in double."""
    draw = np.random.default_rng(3)
    mask = np.arange(7) < np.array([7, 4, 2])[:, None]
    ids = np.where(mask, draw.integers(2, WORDS, (3, 7)), 1).astype(np.int32)
    video = draw.integers(0, 256, (3, *VIDEO, 3)).astype(np.uint8)
    return dict(
        video=video if dtype == np.float32 else video / 255,
        text=ids,
        text_mask=mask,
        valid=np.ones(3, bool),
        hidden=np.stack([draw.permutation(N) < HIDDEN for _ in range(3)]),
        masked=np.where(mask & (draw.uniform(size=ids.shape) < 0.5), 3, ids).astype(np.int32),
    )


def randomise(shapes: Any, dtype: Any) -> Any:
    """No bias and no norm's scale stays at a value that hides it."""
    draw = np.random.default_rng(0)

    def values(path: Any, x: Any) -> np.ndarray:
        spread = 0.3 / np.sqrt(x.shape[-2]) if x.ndim > 1 else 0.1
        value = spread * draw.standard_normal(x.shape) + path[-1].key.endswith("scale")
        return value.astype(dtype)

    return jax.tree_util.tree_map_with_path(values, shapes)


def build(folder: Path, dtype: Any, pool_padding: bool, finetuned: bool) -> Case:
    with jax.enable_x64(dtype == np.float64):
        net, recipe = simvtp.build(
            size=ENCODER, decoder=DECODER, cube=CUBE, dtype=np.dtype(dtype).name,
            pool_padding=pool_padding, vocab_size=WORDS, text_length=PLACES, pad_id=1,
            weights=dict(video=1.0, text=1.0, vtc=0.0, vtm=0.0),
        )  # fmt: skip
        batch = jax.tree.map(jnp.asarray, draw_batch(dtype))
        spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
        method = simvtp.make(
            size=ENCODER, decoder=DECODER, cube=CUBE, dtype=net.dtype, pool_padding=pool_padding,
            vocab_size=WORDS, text_length=PLACES, pad_id=1,
        )  # fmt: skip
        table, extra = published.pretrain_rules(ENCODER.heads, DECODER.heads), {}
        if finetuned:
            method = retrieve.make(base=method, pool_padding=pool_padding, drop=DROPPED)
            table, extra = published.finetune_rules(ENCODER.heads), {"video": {}, "text": {}}
        params = randomise(
            jax.eval_shape(lambda rng: method.init(rng, spec), jax.random.key(0)), dtype
        )

        def run(params: Any) -> dict[str, Any]:
            found = {k: method.encode[k](params, extra, batch) for k in ("video", "text")}
            out = {k: x["embedding"] for k, x in found.items()}
            if not finetuned:
                draws = simvtp.Draws(
                    masking.of_dropped(batch["hidden"], HIDDEN),
                    batch["text_mask"], batch["masked"], jnp.arange(3),
                )  # fmt: skip
                said = simvtp.forward(net, recipe, params, batch, draws)
                out.update(pixels=said.pixels, words=said.words)
                out.update(method.encode["pair"](params, extra, found["video"], found["text"]))
            return out

        def total(params: Any) -> tuple[Any, Any]:
            out = run(params)
            return (jnp.sin(out["video"]) * out["text"]).sum(), out

        grad, ours = jax.jit(jax.grad(total, has_aux=True))(params)
    shutil.copy(pytorch.MODULE, folder)
    config = pytorch.config(
        encoder=ENCODER, decoder=None if finetuned else DECODER, video=VIDEO, cube=CUBE, mean=MEAN,
        std=STD, vocab_size=WORDS, text_length=PLACES, pad_id=1, dropout=0.1, pool_padding=False,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    files.write(folder / "model.safetensors", rules.to_tensors(table, params))
    theirs = module_in(folder).load(folder, pool_padding=pool_padding)
    gradient = rules.to_tensors(table, jax.tree.map(np.asarray, grad))
    ours = jax.tree.map(np.asarray, ours)
    return Case(folder, theirs, draw_batch(dtype), ours, gradient, TOLERANCE[dtype])


UNUSED = ["encoder_norm/.*", "encoder_to_decoder/.*", "mask_token", "decoder.*", "vtm_head/.*"]
DROPPED = dict(
    video=[*UNUSED, "text_embed/.*", "text_cls/.*"], text=[*UNUSED, "patch_embed/.*", "text_cls/.*"]
)
KINDS = [(np.float64, False), (np.float32, True)]
NAMES = ["fp64", "fp32-pool_padding"]


@pytest.fixture(scope="module", params=KINDS, ids=NAMES)
def one(request, tmp_path_factory) -> Case:
    return build(tmp_path_factory.mktemp("one"), *request.param, finetuned=False)


@pytest.fixture(scope="module", params=KINDS, ids=NAMES)
def two(request, tmp_path_factory) -> Case:
    return build(tmp_path_factory.mktemp("two"), *request.param, finetuned=True)


def test_embeddings_of_one_encoder_agree(one):
    video, text = one.net(*one.inputs("video", "text", "text_mask"))
    one.check(video=video, text=text)


def test_scores_of_pairs_agree(one):
    score = one.net.score_pair(*one.inputs("video", "text", "text_mask"))
    # The JAX net's are in single precision.
    one._replace(tolerance=max(one.tolerance, 1e-6)).check(score=score)


def test_reconstructions_of_hidden_cubes_agree(one):
    pixels, words = one.net.reconstruct(*one.inputs("video", "hidden", "masked", "text_mask"))
    one.check(pixels=pixels, words=words)


def test_rows_that_hide_different_numbers_of_cubes_are_rejected(one):
    video, hidden, ids, mask = one.inputs("video", "hidden", "masked", "text_mask")
    hidden[0] = ~hidden[0]
    with pytest.raises(RuntimeError, match="equal size"):
        one.net.reconstruct(video, hidden, ids, mask)


def test_embeddings_of_two_towers_agree(two):
    video, text = two.net(*two.inputs("video", "text", "text_mask"))
    two.check(video=video, text=text)


def test_gradients_of_one_encoder_agree(one):
    check_gradients(one)


def test_gradients_of_two_towers_agree(two):
    check_gradients(two)


def check_gradients(case: Case) -> None:
    video, text = case.net(*case.inputs("video", "text", "text_mask"))
    case.net.zero_grad()
    (video.sin() * text).sum().backward()
    atol = case.tolerance * max(np.abs(x).max() for x in case.gradient.values())
    assert {name for name, _ in case.net.named_parameters()} == set(case.gradient)
    for name, p in case.net.named_parameters():
        got = np.zeros(p.shape) if p.grad is None else p.grad.numpy()
        np.testing.assert_allclose(got, case.gradient[name], rtol=0, atol=atol, err_msg=name)


def test_a_row_of_padding_alone_is_finite(one):
    ids = torch.ones((1, 4), dtype=torch.long)
    assert one.net.encode_text(ids, torch.zeros((1, 4))).isfinite().all()


def test_wrong_weights_are_rejected(one):
    tensors = one.net.state_dict()
    lacking = {k: v for k, v in tensors.items() if not k.endswith("blocks.1.attn.q_bias")}
    with pytest.raises(RuntimeError, match=r"Missing[^U]*encoder\.blocks\.1\.attn\.q_bias"):
        one.net.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match="Unexpected.*\n?.*surplus"):
        one.net.load_state_dict({**tensors, "surplus": torch.zeros(1)})


@pytest.mark.parametrize("key", ["model", "module"])
def test_released_files_load_as_they_are(two, key):
    """With tensors that no output reads, under the release's key."""
    surplus = {
        "video_encoder.text_embeddings.word_embeddings.weight": torch.zeros(50, 32),
        "text_encoder.patch_embed.proj.bias": torch.zeros(32),
        "text_encoder.text_embeddings.position_ids": torch.arange(10)[None],
    }
    loaded = two.net.load_state_dict({key: {**two.net.state_dict(), **surplus}, "epoch": 3})
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pytorch_file_keeps_its_type(one, dtype, tmp_path):
    dtype = getattr(torch, dtype)
    for name in ("config.json", "simvtp.py"):
        shutil.copy(one.folder / name, tmp_path)
    torch.save({k: v.to(dtype) for k, v in one.net.state_dict().items()}, tmp_path / "model.pth")
    net = module_in(tmp_path).load(tmp_path, pool_padding=one.net.pool_padding)
    video, text = net(*one.inputs("video", "text", "text_mask"))
    assert video.dtype == text.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    one._replace(tolerance=tolerance).check(video=video.double(), text=text.double())


def test_towers_can_be_traced_for_other_runtimes(two, monkeypatch):
    """As docs/convert.md does for ONNX: any number of rows and of words."""
    rows, words = torch.export.Dim("rows"), torch.export.Dim("words", max=PLACES)
    frames, ids, mask = two.inputs("video", "text", "text_mask")
    for verb, inputs, free in (
        ("encode_video", (frames,), ({0: rows},)),
        ("encode_text", (ids, mask), ({0: rows, 1: words},) * 2),
    ):
        run = getattr(two.net, verb)
        monkeypatch.setattr(two.net, "forward", run)
        traced = torch.export.export(two.net, inputs, dynamic_shapes=free).module()
        fewer = tuple(x[:2, :5] if x.ndim == 2 else x[:2] for x in inputs)
        torch.testing.assert_close(traced(*fewer), run(*fewer))


# --- the goldens, which depend on neither the JAX net nor its rules


def golden_tensors(net) -> dict[str, Any]:
    tensors = {}
    for name, x in net.state_dict().items():
        draw = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
        draw = draw.standard_normal(tuple(x.shape))
        if name.endswith(".weight") and "norm" in name.rpartition(".")[0].lower():
            value = 1 + 0.1 * draw
        elif x.ndim == 1 or name == "mask_token" or name.endswith("_embeddings.weight"):
            value = 0.05 * draw
        else:
            value = draw / np.sqrt(np.prod(x.shape[1:]))
        tensors[name] = torch.tensor(value.astype(np.float32))
    return tensors


def golden_inputs(case: dict[str, Any]):
    """Frames in [0, 1] fp64, clean ids, mask."""
    b, length = case["batch"], case["text_len"]
    sides = [case["size"]] * 2 if isinstance(case["size"], int) else case["size"]
    shape = (b, 3, case.get("frames", 16), *sides)
    video = np.random.RandomState(1).standard_normal(shape).astype(np.float32).astype(np.float64)
    low, high = case.get("ids", (1000, 30000))
    ids = np.random.RandomState(2).randint(low, high, (b, length))
    for row, words in enumerate(case["lens"]):
        ids[row, 0], ids[row, words - 1], ids[row, words:] = 101, 102, 0
    mask = np.arange(length) < np.array(case["lens"])[:, None]
    mean, std = (np.array(x, np.float32).astype(np.float64) for x in (MEAN, STD))
    frames = torch.tensor(video.transpose(0, 2, 3, 4, 1) * std + mean)
    return frames, ids, torch.tensor(mask), (mean.tolist(), std.tolist())


def released(case: dict[str, Any], **parts: Any):
    """The module at a golden's sizes, fp64, with the golden's weights."""
    frames, _, _, (mean, std) = golden_inputs(case)
    config = pytorch.config(
        video=frames.shape[1:4], cube=(2, 16, 16), mean=mean, std=std,
        vocab_size=case.get("vocab", 30522), text_length=case.get("positions", 512),
        pad_id=0, dropout=0.1, pool_padding=True, **parts,
    )  # fmt: skip
    module = module_in(pytorch.MODULE.parent)
    net = module.NETS[config["kind"]](config)
    net.load_state_dict(golden_tensors(net))
    return net.double().eval()


def check_golden(x, golden: dict[str, Any]) -> None:
    x = x.detach().numpy()
    assert list(x.shape) == golden["shape"]
    near = dict(rel=1e-9, abs=1e-9 * golden["std"])
    assert float(x.mean()) == pytest.approx(golden["mean"], **near)
    assert float(x.std()) == pytest.approx(golden["std"], **near)
    assert x.ravel()[:4].tolist() == pytest.approx(golden["first"], **near)
    assert x.ravel()[-4:].tolist() == pytest.approx(golden["last"], **near)


def test_the_released_pretraining_net_has_the_goldens_numbers():
    """What is hidden, words, and scores; the golden's embeddings are of visible cubes alone."""
    (case,) = json.loads((GOLDEN / "simvtp_tiny.json").read_text()).values()
    net = released(case, encoder=(768, 2, 12, 3072), decoder=(384, 1, 6, 1536))
    frames, clean, mask, _ = golden_inputs(case)
    asked = (np.random.RandomState(3).uniform(size=clean.shape) < 0.75) & (clean >= 1000)
    ids = torch.tensor(np.where(asked, 103, clean))
    hidden = np.zeros((3, 8, 4), bool)
    for row in range(3):
        hidden[row][:, np.random.RandomState(10 + row).permutation(4)[:2]] = True
    with torch.no_grad():
        pixels, words = net.reconstruct(frames, torch.tensor(hidden.reshape(3, -1)), ids, mask)
        text = net.encode_text(ids, mask)
    check_golden(pixels, case["pixel_pred"])
    check_golden(words, case["mlm_logits"])
    check_golden(text, case["text_feat"])


@pytest.mark.parametrize("name", ["released", "small"])
def test_the_released_finetuned_net_has_the_goldens_numbers(name):
    cases = json.loads((GOLDEN / "simvtp_finetune_tiny.json").read_text())["cases"]
    case = cases[name]
    size = case["width"], case["depth"], case["heads"], case["mlp"]
    net = released(case, encoder=size, decoder=None)
    frames, ids, mask, _ = golden_inputs(case)
    with torch.no_grad():
        video, text = net(frames, torch.tensor(ids), mask)
        likeness = torch.cosine_similarity(text[:, None], video[None], -1)
    check_golden(video, case["video"])
    check_golden(text, case["text"])
    np.testing.assert_allclose(likeness, case["sim"], rtol=0, atol=1e-9)
