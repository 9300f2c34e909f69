"""BERT: the format of its embedding tables, and the rules of its blocks, which nets that start from
BERT share."""

from __future__ import annotations

import re

import jax.numpy as jnp

from vtp_jax.convert import nets, rules
from vtp_jax.convert.formats import Format, Proof, Tensors
from vtp_jax.convert.nets import Arrays, Heads, Net
from vtp_jax.convert.reference import bert as reference
from vtp_jax.convert.rules import BlockNames, Rule
from vtp_jax.nn import embed
from vtp_jax.types import Params

POSITION_IDS = r"(.*\.)?position_ids"  # 0, 1, 2, ...: a buffer of BERT's up to 2022
BERT = BlockNames(
    "attention.output.LayerNorm",
    tuple(f"attention.self.{x}.weight" for x in ("query", "key", "value")),
    tuple(f"attention.self.{x}.bias" for x in ("query", "key", "value")),
    "attention.output.dense",
    "output.LayerNorm", "intermediate.dense", "output.dense",
)  # fmt: skip
UNUSED = (POSITION_IDS, r"cls\..*")  # of a whole BERT: the buffer, and the heads of pretraining


def embedding_rules(param: str, tensor: str) -> list[Rule]:
    """The rules of `nn.embed.WordEmbed` and BERT's embedding module."""
    tables = dict(word="word", position="position", type="token_type")
    return [
        *(
            Rule(f"{param}/{a}", f"{tensor}.{b}_embeddings.weight", rules.SAME)
            for a, b in tables.items()
        ),
        *rules.norm(f"{param}/norm", f"{tensor}.LayerNorm"),
    ]


def bert_rules(heads: int) -> list[Rule]:
    """The rules of `nn.text.Bert` and BERT as saved by `transformers.BertModel`: 199 tensors at
    depth 12. Its pretraining files have a prefix: `rules.under(bert_rules(12), tensor="bert.")`."""
    return [
        *embedding_rules("text_embed", "embeddings"),
        *rules.stack("encoder", "encoder.layer", heads, BERT),
        *rules.linear("pooler", "pooler.dense"),
    ]


def cross_rules(param: str, tensor: str, heads: int) -> list[Rule]:
    """The rules of cross-attention in the BERT blocks `tensor.{i}` (`transformers`; ALBEF's and
    BLIP's fusion encoders and decoders)."""
    mine, other = f"{param}/blocks", tensor + ".{i}.crossattention."
    kv = [tuple(f"{other}self.{x}.{y}" for x in ("key", "value")) for y in ("weight", "bias")]
    return [
        Rule(f"{mine}/cross/q", f"{other}self.query.weight", rules.head_kernel(heads)),
        Rule(f"{mine}/cross/q_bias", f"{other}self.query.bias", rules.per_head(heads)),
        Rule(f"{mine}/cross/kv", kv[0], rules.fused_qkv(heads, 2)),
        Rule(f"{mine}/cross/kv_bias", kv[1], rules.fused_bias(heads, 2)),
        *rules.linear(f"{mine}/cross/proj", f"{other}output.dense"),
        *rules.norm(f"{mine}/norm_cross", f"{other}output.LayerNorm"),
    ]


def tidy(tensors: Tensors) -> Tensors:
    """Only the tensors of the embeddings; old files call scale and bias gamma and beta."""
    ends = {".gamma": ".weight", ".beta": ".bias"}
    found = {}
    for name, x in tensors.items():
        if inner := re.fullmatch(r"(?:.*[._])?(embeddings\.\w+\.\w+)", name):
            found[re.sub(r"\.(gamma|beta)$", lambda m: ends[m[0]], inner[1])] = x
    return found


def embeddings(params: Params, inputs: Arrays, heads: Heads) -> Net:
    words, width = params["text_embed"]["word"].shape
    length, types = (len(params["text_embed"][n]) for n in ("position", "type"))
    net = embed.WordEmbed(words, width, 0, length, types, dropout=0.0, dtype=jnp.float64)
    ids = jnp.asarray(inputs["ids"], jnp.int32)
    return Net(
        lambda key: dict(text_embed=net.init(key, ids)["params"]),
        lambda params: dict(tokens=net.apply({"params": params["text_embed"]}, ids)),
    )


FORMATS = {
    "bert_embeddings": Format(
        "the embedding tables of a BERT",
        {},
        lambda: embedding_rules("text_embed", "embeddings"),
        embeddings,
        tidy=tidy,
        proof=Proof(
            nets.draw_words(
                "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
            ),
            lambda t, inputs, heads: dict(tokens=reference.embeddings(t, inputs["ids"])),
        ),
    )
}
