"""Hugging Face's VideoMAE in both directions: its folder imported into the JAX net, and an exported
folder loaded by `from_pretrained`. Random weights, tiny sizes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtp_jax import masking
from vtp_jax.convert import files, hf_folder, rules
from vtp_jax.convert.families import huggingface
from vtp_jax.methods import videomae
from vtp_jax.nn.sizes import Size
from vtp_jax.objectives import reconstruction
from vtp_jax.tasks import classify
from vtp_jax.types import UserError

torch = pytest.importorskip("torch", reason="torch is installed by `make test`")
transformers = pytest.importorskip("transformers", reason="installed by `make test`")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENCODER, DECODER = Size(32, 3, 4, 80), Size(24, 2, 3, 56)
CUBE, FRAMES, SIDE = (2, 8, 8), 4, 24
N, HIDDEN = 18, 13
LABELS = ("run", "jump", "sit")
TOLERANCE = 1e-5  # of the largest output
# What transformers has in `fc_norm` and `decoder.norm`, whatever its config has.
DEFAULT_EPS = 1e-5

VIDEO = np.random.default_rng(1).integers(0, 256, (2, FRAMES, SIDE, SIDE, 3)).astype(np.uint8)
MASK = np.stack([np.random.default_rng(i).permutation(N) < HIDDEN for i in range(2)])
PIXELS = ((VIDEO / 255 - MEAN) / STD).astype(np.float32).transpose(0, 1, 4, 2, 3)


class Kind(NamedTuple):
    """One of transformers' two nets: its class and config, the rules, and the JAX net."""

    architecture: str
    config: dict[str, Any]
    rules: list[rules.Rule]
    run: Any  # params -> {"logits": ...}, as transformers calls it
    shapes: Any

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.architecture)


def shapes_of(method: Any) -> Any:
    spec = dict(
        video=jax.ShapeDtypeStruct(VIDEO.shape, VIDEO.dtype),
        label=jax.ShapeDtypeStruct((2,), np.int32),
    )
    return jax.eval_shape(lambda rng: method.init(rng, spec), jax.random.key(0))


@pytest.fixture(scope="module")
def pretraining() -> Kind:
    recipe: Any = dict(size=ENCODER, decoder=DECODER, cube=CUBE, dtype="float32")
    net, made = videomae.build(**recipe, mean=MEAN, std=STD)
    shown = masking.of_dropped(jnp.asarray(MASK), HIDDEN)
    draws = videomae.Draws(shown, shown.drop, jnp.ones(shown.drop.shape, bool))
    batch = dict(video=jnp.asarray(VIDEO), valid=jnp.ones(2, bool))

    @jax.jit
    def run(params: Any) -> dict[str, Any]:
        predicted, target = videomae.forward(net, made, params, batch, draws)
        loss = reconstruction.squared_error(predicted, target, draws.scored)
        return dict(logits=predicted, loss=loss.value())

    sizes = dict(frames=FRAMES, side=SIDE, cube=CUBE)
    return Kind(
        hf_folder.PRETRAINING,
        hf_folder.pretraining_config(encoder=ENCODER, decoder=DECODER, **sizes),
        huggingface.pretrain_rules(ENCODER.heads, DECODER.heads, huggingface.V4),
        run,
        shapes_of(videomae.make(**recipe)),
    )


UNUSED = ["encoder_norm/.*", "encoder_to_decoder/.*", "mask_token", "decoder.*"]


@pytest.fixture(scope="module")
def classification() -> Kind:
    base = videomae.make(size=ENCODER, decoder=DECODER, cube=CUBE, dtype="float32")
    method = classify.make(base=base, classes=len(LABELS), drop=UNUSED)
    batch = dict(video=jnp.asarray(VIDEO))

    @jax.jit
    def run(params: Any) -> dict[str, Any]:
        return dict(logits=method.encode["classes"](params, {"base": {}}, batch)["classes"])

    sizes = dict(frames=FRAMES, side=SIDE, cube=CUBE)
    return Kind(
        hf_folder.CLASSIFICATION,
        hf_folder.classification_config(encoder=ENCODER, labels=LABELS, **sizes),
        huggingface.finetune_rules(ENCODER.heads, huggingface.V4),
        run,
        shapes_of(method),
    )


@pytest.fixture(params=["pretraining", "classification"])
def kind(request) -> Kind:
    return request.getfixturevalue(request.param)


def random_params(shapes: Any) -> Any:
    """No bias and no norm's scale stays at a value that hides it."""
    draw = np.random.default_rng(0)

    def values(path: Any, x: Any) -> np.ndarray:
        spread = 1 / np.sqrt(ENCODER.width) if x.ndim > 1 else 0.3
        value = spread * draw.standard_normal(x.shape) + path[-1].key.endswith("scale")
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(values, shapes)


def write_folder(folder: Path, kind: Kind, tensors: dict[str, np.ndarray]) -> Path:
    files.write(folder / "model.safetensors", tensors, hf_folder.METADATA)
    (folder / "config.json").write_text(json.dumps(kind.config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(hf_folder.preprocessor_config(side=SIDE, mean=MEAN, std=STD))
    )
    return folder


def run_transformers(kind: Kind, model: Any, pixels: Any = PIXELS) -> dict[str, np.ndarray]:
    mask = (
        {"bool_masked_pos": torch.tensor(MASK)}
        if kind.architecture == hf_folder.PRETRAINING
        else {}
    )
    with torch.no_grad():
        out = model.eval()(torch.tensor(pixels), **mask)
    return {name: out[name].numpy() for name in ("logits", "loss") if name in out}


def check(ours: dict[str, Any], theirs: dict[str, np.ndarray]) -> None:
    assert set(ours) == set(theirs)
    for name, wanted in theirs.items():
        atol = TOLERANCE * np.abs(wanted).max()
        np.testing.assert_allclose(ours[name], wanted, rtol=0, atol=atol, err_msg=name)


def test_a_folder_of_transformers_gives_the_same_numbers_here(kind, tmp_path):
    model = kind.model_class(transformers.VideoMAEConfig(**kind.config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = ENCODER.width**-0.5 if p.ndim > 1 else 0.3
            norm = name.endswith("weight") and p.ndim == 1
            p.copy_(norm + spread * torch.randn(p.shape, generator=generator))
    model.save_pretrained(tmp_path)
    said = hf_folder.read_config(tmp_path)
    assert said.architecture == kind.architecture
    assert (said.heads, said.eps, said.frames, said.side) == (4, 1e-6, FRAMES, SIDE)
    params = rules.to_params(kind.rules, huggingface.one_name(files.read(tmp_path).tensors))
    check(kind.run(params), run_transformers(kind, model))


def test_an_exported_folder_gives_the_same_numbers_in_transformers(kind, tmp_path):
    params = random_params(kind.shapes)
    tensors = rules.to_tensors(kind.rules, params)
    write_folder(tmp_path, kind, huggingface.add_names(tensors))
    model, info = kind.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    assert model.config.layer_norm_eps == 1e-6
    processor = transformers.VideoMAEImageProcessor.from_pretrained(tmp_path)
    pixels = processor([list(clip) for clip in VIDEO], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels, PIXELS, atol=1e-6)
    check(kind.run(params), run_transformers(kind, model, pixels))
    # And back again, bit for bit.
    back = rules.to_params(kind.rules, huggingface.one_name(files.read(tmp_path).tensors))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_labels_are_exported(classification, tmp_path):
    write_folder(tmp_path, classification, {"x": np.zeros(1, np.float32)})
    assert hf_folder.read_config(tmp_path).labels == LABELS
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.id2label == dict(enumerate(LABELS))
    assert config.label2id == {label: i for i, label in enumerate(LABELS)}


def test_an_omitted_bias_is_detected(kind, tmp_path):
    """Versions 5.5.1 to 5.17 left biases out of every published file, with only a warning."""
    params = random_params(kind.shapes)
    tensors = rules.to_tensors(kind.rules, params)
    (name, *_) = (n for n in tensors if n.endswith("layer.1.attention.attention.q_bias"))
    del tensors[name]
    with pytest.raises(UserError, match=f"biases are missing, under either name: {name}$"):
        huggingface.one_name(tensors)
    with pytest.raises(UserError, match=f"missing .*{name}"):
        rules.to_params(kind.rules, tensors)
    write_folder(tmp_path, kind, huggingface.add_names(tensors))
    model, info = kind.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {name.replace("q_bias", "query.bias")}
    with pytest.raises(AssertionError, match="logits"):
        check(kind.run(params), run_transformers(kind, model))


def test_default_epsilons_cost_what_the_documentation_says(kind):
    """1e-5 in the last norm where VideoMAE has 1e-6, in fp64: half of the difference, over the
    variance of what is normed."""
    config = transformers.VideoMAEConfig(**kind.config)
    model = kind.model_class(config).double()
    pretraining = kind.architecture == hf_folder.PRETRAINING
    norm = model.decoder.norm if pretraining else model.fc_norm
    head = model.decoder.head if pretraining else model.classifier
    assert norm.eps == DEFAULT_EPS
    assert model.videomae.encoder.layer[0].layernorm_before.eps == 1e-6
    head.bias.data.zero_()  # so that logits scale as what comes out of the norm
    variances = []
    norm.register_forward_hook(lambda _, x, y: variances.append(x[0].var(-1, unbiased=False)))
    pixels = PIXELS.astype(np.float64)
    default = run_transformers(kind, model, pixels)["logits"]
    norm.eps = hf_folder.EPS
    right = run_transformers(kind, model, pixels)["logits"]
    variance = variances[0].numpy()
    predicted = np.sqrt((variance + hf_folder.EPS) / (variance + DEFAULT_EPS)) - 1
    cost = default / right - 1
    np.testing.assert_allclose(cost, np.broadcast_to(predicted[..., None], cost.shape), rtol=1e-4)


# --- names


def some_tensors() -> dict[str, np.ndarray]:
    block = "videomae.encoder.layer.0.attention.attention."
    tensors = {f"{block}{x}.weight": np.full((4, 4), i) for i, x in enumerate(("query", "value"))}
    tensors |= {f"{block}q_bias": np.arange(4), f"{block}v_bias": np.arange(4) + 5}
    return {**tensors, "classifier.bias": np.ones(3)}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


def test_both_names_become_one():
    tensors = some_tensors()
    both = huggingface.add_names(tensors)
    assert len(both) == len(tensors) + 2
    new = {n: x for n, x in both.items() if not n.endswith("_bias")}
    for named in (tensors, both, new):
        assert equal(huggingface.one_name(named), tensors)


def test_key_biases_are_left_out():
    tensors = some_tensors()
    trained = {"videomae.encoder.layer.0.attention.attention.key.bias": np.ones(4)}
    assert equal(huggingface.one_name({**tensors, **trained}), tensors)


def test_two_names_that_differ_are_rejected():
    both = huggingface.add_names(some_tensors())
    (name,) = (n for n in both if n.endswith("value.bias"))
    with pytest.raises(UserError, match="v_bias and .*value.bias are two names .* differ"):
        huggingface.one_name({**both, name: both[name] + 1})


# --- config.json


def test_cubes_that_are_not_square_are_rejected():
    with pytest.raises(UserError, match="8 x 4 pixels"):
        hf_folder.classification_config(
            encoder=ENCODER, labels=LABELS, frames=4, side=24, cube=(2, 8, 4)
        )


def test_values_missing_from_a_config_are_transformers_defaults(tmp_path):
    said = dict(model_type="videomae", architectures=[hf_folder.CLASSIFICATION])
    (tmp_path / "config.json").write_text(json.dumps(said))
    found, theirs = hf_folder.read_config(tmp_path), transformers.VideoMAEConfig()
    assert found.heads == theirs.num_attention_heads
    assert found.decoder_heads == theirs.decoder_num_attention_heads
    assert (found.eps, found.frames) == (theirs.layer_norm_eps, theirs.num_frames)
    assert (found.side, found.labels, found.doubt) == (theirs.image_size, (), "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="vit"), "does not describe a VideoMAE"),
        (dict(architectures=None), r"architecture none; known.*net.save_pretrained\(FOLDER\)"),
        (dict(architectures=["VideoMAEModel"]), "architecture VideoMAEModel; known"),
        (dict(hidden_act="relu"), "hidden_act is 'relu'; vtp_jax supports 'gelu'"),
        (dict(use_mean_pooling=True), "use_mean_pooling is True; "),
        (dict(qkv_bias=False), "qkv_bias is False"),
        (dict(qv_bias=False), "qv_bias is False"),
        (dict(num_attention_heads="4"), "num_attention_heads is '4', not a positive"),
        (dict(image_size=[24, 24]), r"image_size is \[24, 24\], not a positive"),
    ],
)
def test_configs_of_other_nets_are_rejected(pretraining, tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(pretraining.config | change))
    with pytest.raises(UserError, match=message):
        hf_folder.read_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"videomae"'])
def test_files_that_are_not_configs_are_rejected(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="not JSON|does not describe a VideoMAE"):
        hf_folder.read_config(tmp_path)


def test_a_folder_without_a_config_is_rejected(tmp_path):
    with pytest.raises(UserError, match="no '.*config.json'"):
        hf_folder.read_config(tmp_path)


@pytest.mark.parametrize("averaged", [True, False])
def test_what_transformers_defaults_need_is_told(tmp_path, averaged):
    """The default of one architecture does not suit the other; a file may leave it out."""
    kind = hf_folder.PRETRAINING if averaged else hf_folder.CLASSIFICATION
    written = dict(model_type="videomae", architectures=[kind])
    told = " by default; .*" if averaged else "; .*"
    if not averaged:
        written["use_mean_pooling"] = False
    (tmp_path / "config.json").write_text(json.dumps(written))
    advice = rf"{averaged}{told}VideoMAEConfig\(use_mean_pooling={not averaged}\)"
    with pytest.raises(UserError, match=advice):
        hf_folder.read_config(tmp_path)


def test_the_wrong_number_of_heads_of_vit_s_is_doubted(pretraining, tmp_path):
    small = pretraining.config | dict(hidden_size=384, num_attention_heads=16)
    (tmp_path / "config.json").write_text(json.dumps(small))
    assert "the original ViT-S has 6" in hf_folder.read_config(tmp_path).doubt
