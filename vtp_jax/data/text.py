"""Captions to token ids and back. Two kinds of tokenizer behind one set of functions.

`sentencepiece` is trained on the corpus (`train`); `wordpiece` is BERT's, from its vocab.txt. Ids
are [CLS] pieces [SEP] and then [PAD]; what is too long loses its last pieces, never [SEP].
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
from absl import logging
from jaxtyping import Bool, Int
from tokenizers import Tokenizer as BertTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from vtp_jax.types import UserError

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL = (PAD, UNK, CLS, SEP, MASK)
UNSEEN = (PAD, CLS, SEP)  # left out of what `decode` writes

Encoding = tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]


class Tokenizer(NamedTuple):
    """encode: (captions, length) -> ids i32, mask bool (True: not padding), maskable bool (True: no
            special id, so word masking may hide it), each "b l"
    decode: ids "b l" -> a line of words for each row; [MASK] and [UNK] stay visible
    pieces: ids "l" -> the piece behind each id
    facts:  vocab_size, pad_id, unk_id, cls_id, sep_id, mask_id
    """

    encode: Callable[[Sequence[str], int], Encoding]
    decode: Callable[[Int[np.ndarray, "b l"]], list[str]]
    pieces: Callable[[Int[np.ndarray, "l"]], list[str]]
    facts: Mapping[str, int]


def make(*, kind: str, path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a SentencePiece model file or of a BERT vocab.txt."""
    kinds = dict(sentencepiece=load_sentencepiece, wordpiece=load_wordpiece)
    if kind not in kinds:
        raise UserError(f"text.kind={kind!r} is not a tokenizer; known: {', '.join(kinds)}")
    return kinds[kind](path)


def load_sentencepiece(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a model file that `train` wrote."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no SentencePiece model '{path}'; train one: python -m vtp_jax.prepare tokenizer "
            f"--captions FILE --out {path}"
        )
    return read_model(path.read_bytes(), str(path))


def read_model(model: bytes, where: str = "the model") -> Tokenizer:
    """The tokenizer of a serialised SentencePiece model."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise UserError(f"{where} is not a SentencePiece model") from None
    vocabulary = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    return assemble(
        vocabulary,
        lambda texts: processor.encode(list(texts)),
        lambda pieces: "".join(pieces).replace("\u2581", " ").strip(),
        where,
    )


def load_wordpiece(path: str | os.PathLike[str]) -> Tokenizer:
    """BERT's uncased tokenizer from its vocab.txt: one piece on each line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no vocabulary '{path}'; text.path must be BERT's vocab.txt")
    vocabulary = path.read_text(encoding="utf-8").splitlines()
    bert = BertTokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token=UNK)
    )
    bert.normalizer = normalizers.BertNormalizer(lowercase=True)
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return assemble(
        vocabulary,
        lambda texts: [e.ids for e in bert.encode_batch(list(texts))],
        lambda pieces: " ".join(pieces).replace(" ##", ""),
        str(path),
    )


def assemble(
    vocabulary: Sequence[str],
    split: Callable[[Sequence[str]], list[list[int]]],
    join: Callable[[Sequence[str]], str],
    where: str,
) -> Tokenizer:
    """A tokenizer of a vocabulary, of split: captions -> ids, and of join: pieces -> words."""
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    if missing := [piece for piece in SPECIAL if piece not in ids]:
        raise UserError(f"{where} has no piece {missing[0]}; it needs {' '.join(SPECIAL)}")
    special = np.asarray([ids[piece] for piece in SPECIAL])
    facts = dict(vocab_size=len(vocabulary))
    facts |= {f"{piece[1:-1].lower()}_id": ids[piece] for piece in SPECIAL}

    def encode(captions: Sequence[str], length: int) -> Encoding:
        rows = np.full((len(captions), length), ids[PAD], np.int32)
        mask = np.zeros(rows.shape, bool)
        for row, real, pieces in zip(rows, mask, split(captions), strict=True):
            line = [ids[CLS], *pieces[: length - 2], ids[SEP]]
            row[: len(line)] = line
            real[: len(line)] = True
        return rows, mask, mask & ~np.isin(rows, special)

    def pieces(row: Int[np.ndarray, "l"]) -> list[str]:
        return [vocabulary[int(i)] for i in row]

    def decode(rows: Int[np.ndarray, "b l"]) -> list[str]:
        return [write(pieces(row)) for row in np.asarray(rows)]

    def write(line: Sequence[str]) -> str:
        # Spaces around the pieces that stand for something else; one space anywhere.
        shown = [f" {p} " if p in SPECIAL else p for p in line if p not in UNSEEN]
        return " ".join(join(shown).split())

    return Tokenizer(encode, decode, pieces, facts)


def train(
    captions: Iterable[str], path: str | os.PathLike[str] | None, vocab_size: int
) -> Tokenizer:
    """Trains SentencePiece (BPE, lower case) on captions, writes it to `path` and returns it.

    The same captions give the same file. vocab_size is an upper bound: a corpus with fewer pieces
    gives a smaller vocabulary, and the log says so. path None keeps the model in memory.
    """
    captions = list(captions)
    if not captions:
        raise UserError("no captions to train a tokenizer on")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=out,
            model_type="bpe",  # unigram shrinks to letters on a small corpus
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=PAD,
            unk_piece=UNK,
            bos_piece=CLS,
            eos_piece=SEP,
            control_symbols=[MASK],
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        if needed := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(
                f"vocab_size={vocab_size} is too small: these captions need {needed[1]} at least, "
                "a piece for every character"
            ) from None
        raise
    tokenizer = read_model(out.getvalue())
    if (size := tokenizer.facts["vocab_size"]) < vocab_size:
        logging.info("the captions have %d pieces only; vocab_size=%d asked", size, vocab_size)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        partial = Path(f"{path}.partial")
        partial.write_bytes(out.getvalue())
        partial.replace(path)
    return tokenizer
