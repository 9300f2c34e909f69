"""Captions to token ids and back. Three kinds of tokenizer behind one set of functions.

`sentencepiece` is trained on the corpus (`train`); `wordpiece` is BERT's, from its vocab.txt;
`clip` is CLIP's, from its bpe_simple_vocab_16e6.txt.gz. Ids are [CLS] pieces [SEP] and then [PAD];
a caption that is too long loses its last pieces, but not [SEP].
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
from absl import logging
from jaxtyping import Bool, Int
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Pieces

from vtp_jax import lines
from vtp_jax.types import UserError

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL = (PAD, UNK, CLS, SEP, MASK)
NAMED = {piece[1:-1].lower(): piece for piece in SPECIAL}
UNSEEN = ("pad", "cls", "sep")  # left out by `decode`
# CLIP's vocabulary has every byte, so it needs no [UNK]; padding is the first byte, id 0.
CLIP_SPECIAL = dict(pad="!", cls="<|startoftext|>", sep="<|endoftext|>")
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
SMALL = 256  # pieces of a tokenizer that is trained for one run, unless the config sets a number
# Facts of the published vocabularies; for SentencePiece, the ids that `train` assigns.
FACTS: Mapping[str, Mapping[str, int]] = dict(
    sentencepiece=dict(pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4),
    wordpiece=dict(pad_id=0, unk_id=100, cls_id=101, sep_id=102, mask_id=103, vocab_size=30_522),
    clip=dict(pad_id=0, cls_id=49_406, sep_id=49_407, vocab_size=49_408),
)
ALPHABETS = "\u0530"  # the end of Latin, Greek and Cyrillic letters
SPELLING = "tokenizer_config.json"  # beside a BERT's vocabulary
HF_SPELLING = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
LINE, RESERVED = 4192, "\u2585"  # bytes of a line, and a character, that SentencePiece stops at
CLIP_MERGES = 48_894  # lines of the file after the first; CLIP does not use the rest

Encoding = tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]


class Tokenizer(NamedTuple):
    """encode: (captions, length) -> ids i32, mask bool (True: not padding), maskable bool (True: no
            special id, so word masking may hide it), each "b l"
    decode: ids "b l" -> a line of words for each row; [MASK] and [UNK] stay visible
    pieces: ids "l" -> the piece of each id
    count:  captions -> the tokens that each has when none is cut, "b", with [CLS] and [SEP]
    facts:  vocab_size, pad_id, cls_id, sep_id; except for CLIP's, also unk_id and mask_id
    file:   the content of its file
    beside: files that belong beside it, by name
    """

    encode: Callable[[Sequence[str], int], Encoding]
    decode: Callable[[Int[np.ndarray, "b l"]], list[str]]
    pieces: Callable[[Int[np.ndarray, "l"]], list[str]]
    count: Callable[[Sequence[str]], Int[np.ndarray, "b"]]
    facts: Mapping[str, int]
    file: bytes = b""
    beside: Mapping[str, bytes] = {}


def expected(kind: str, vocab_size: int | None = None) -> dict[str, int]:
    """The facts of the published tokenizer of a kind, with `vocab_size` pieces if given;
    SentencePiece has no published number. Raises UserError on an unknown kind."""
    if kind not in FACTS:
        raise UserError(f"text.kind={kind!r} is not a tokenizer; known: {', '.join(FACTS)}")
    return {**FACTS[kind], **({} if vocab_size is None else dict(vocab_size=vocab_size))}


def make(*, kind: str, path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a SentencePiece model file, of a BERT vocab.txt, or of CLIP's merges."""
    kinds = dict(sentencepiece=load_sentencepiece, wordpiece=load_wordpiece, clip=load_clip)
    expected(kind)
    return kinds[kind](path)


def load_sentencepiece(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a model file that `train` wrote."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no SentencePiece model '{path}'; train one: vtp prepare tokenizer "
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
    )._replace(file=model)


def load_wordpiece(path: str | os.PathLike[str]) -> Tokenizer:
    """BERT's tokenizer from its vocab.txt: one piece on each line.

    Words are lower-cased and lose their accents, unless the vocabulary has capitals or accents. A
    tokenizer_config.json beside it, as Hugging Face's folders have it, decides instead.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no vocabulary '{path}'; text.path must be BERT's vocab.txt")
    vocabulary = [piece for _, piece in lines.each(path)]
    bert = Pieces(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token=UNK))
    rules = spelling(vocabulary, path.parent)
    bert.normalizer = normalizers.BertNormalizer(**rules)
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return assemble(
        vocabulary,
        lambda texts: [e.ids for e in bert.encode_batch(list(texts))],
        lambda pieces: " ".join(pieces).replace(" ##", ""),
        str(path),
    )._replace(file=path.read_bytes(), beside={SPELLING: write_spelling(rules)})


def spelling(vocabulary: Sequence[str], folder: Path) -> dict[str, bool]:
    """How words are normalised before they are looked up: arguments of BertNormalizer."""
    words = [p.removeprefix("##") for p in vocabulary if not re.fullmatch(r"\[.*\]", p)]
    # Of alphabets that have both: a few others have capitals that BERT's own lower-casing left.
    letters = {c for word in words for c in word if c < ALPHABETS}
    lowercase = not any(c.isupper() for c in letters)
    plain = all(unicodedata.normalize("NFD", c)[0] == c for c in letters if c.isalpha())
    found = dict(lowercase=lowercase, strip_accents=lowercase and plain, handle_chinese_chars=True)
    path = folder / SPELLING
    if path.exists():
        written = lines.read_object(path)
        keys = dict(zip(found, HF_SPELLING, strict=True))
        given = {k: written[name] for k, name in keys.items() if name in written}
        if "lowercase" in given and given.get("strip_accents") is None:
            given["strip_accents"] = given["lowercase"]  # as Hugging Face's default
        if wrong := [keys[k] for k, value in given.items() if not isinstance(value, bool)]:
            raise UserError(f"{path}: {wrong[0]} must be true or false")
        found |= given
    return found


def write_spelling(rules: Mapping[str, bool]) -> bytes:
    """The tokenizer_config.json that `spelling` and Hugging Face read these rules from."""
    found = dict(zip(HF_SPELLING, rules.values(), strict=True))
    return json.dumps({"tokenizer_class": "BertTokenizer", **found}, indent=1).encode()


def load_clip(path: str | os.PathLike[str]) -> Tokenizer:
    """CLIP's tokenizer (arXiv 2103.00020): lower-case BPE of bytes, from the file of its merges.

    CLIP's code also repairs broken text with ftfy and resolves HTML entities; this does not.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file '{path}'; text.path must be CLIP's bpe_simple_vocab_16e6.txt.gz")
    try:
        listed = itertools.islice(lines.each(path), 1, 1 + CLIP_MERGES)
        merges = [(a, b) for a, b in (line.split(" ", 2) for _, line in listed)]
    except ValueError as error:
        raise UserError(f"{path} is not CLIP's file of merges: {error}") from None
    if not merges:
        raise UserError(f"{path} is not CLIP's file of merges: it has none")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [letter + "</w>" for letter in letters]
    joined = [a + b for a, b in merges]
    vocabulary = [*letters, *ends, *joined, CLIP_SPECIAL["cls"], CLIP_SPECIAL["sep"]]
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    clip = Pieces(models.BPE(ids, merges, end_of_word_suffix="</w>"))
    clip.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    clip.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bytes_of = decoders.ByteLevel()
    return assemble(
        vocabulary,
        lambda texts: [e.ids for e in clip.encode_batch(list(texts))],
        lambda pieces: bytes_of.decode(list(pieces)).replace("</w>", " "),
        str(path),
        CLIP_SPECIAL,
    )._replace(file=path.read_bytes())


def assemble(
    vocabulary: Sequence[str],
    split: Callable[[Sequence[str]], list[list[int]]],
    join: Callable[[Sequence[str]], str],
    where: str,
    special: Mapping[str, str] = NAMED,
) -> Tokenizer:
    """A tokenizer of a vocabulary. split: captions -> ids; join: pieces -> words; special: the
    pieces that are not text, by name."""
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    if missing := [piece for piece in special.values() if piece not in ids]:
        raise UserError(f"{where} has no piece {missing[0]}; it needs {' '.join(special.values())}")
    facts = {f"{name}_id": ids[piece] for name, piece in special.items()}
    reserved = np.asarray(list(facts.values()))
    pad, cls, sep = (facts[f"{name}_id"] for name in UNSEEN)
    unseen = {special[name] for name in UNSEEN}
    marks = set(special.values()) - unseen

    def parts(captions: Sequence[str]) -> list[list[int]]:
        # Without lone surrogates.
        return split([c.encode("utf-8", "replace").decode() for c in captions])

    def count(captions: Sequence[str]) -> Int[np.ndarray, "b"]:
        return np.asarray([len(found) + 2 for found in parts(captions)], np.int64)

    def encode(captions: Sequence[str], length: int) -> Encoding:
        rows = np.full((len(captions), length), pad, np.int32)
        mask = np.zeros(rows.shape, bool)
        for row, real, pieces in zip(rows, mask, parts(captions), strict=True):
            line = [cls, *pieces[: length - 2], sep]
            row[: len(line)] = line
            real[: len(line)] = True
        return rows, mask, mask & ~np.isin(rows, reserved)

    def pieces(row: Int[np.ndarray, "l"]) -> list[str]:
        return [vocabulary[int(i)] for i in row]

    def decode(rows: Int[np.ndarray, "b l"]) -> list[str]:
        return [write(pieces(row)) for row in np.asarray(rows)]

    def write(line: Sequence[str]) -> str:
        # Spaces around special pieces; no double spaces.
        shown = [f" {p} " if p in marks else p for p in line if p not in unseen]
        return " ".join(join(shown).split())

    return Tokenizer(encode, decode, pieces, count, dict(facts, vocab_size=len(vocabulary)))


def unknown(tokenizer: Tokenizer, captions: Sequence[str]) -> float:
    """The share of the pieces of these captions that are [UNK]."""
    if "unk_id" not in tokenizer.facts or not captions:
        return 0.0
    ids, mask, maskable = tokenizer.encode(captions, max(map(len, captions)) + 2)
    missed = mask & (ids == tokenizer.facts["unk_id"])
    return float(missed.sum() / max((missed | maskable).sum(), 1))


def to_lines(caption: str) -> Iterator[str]:
    """A caption as lines that SentencePiece does not skip: short ones, cut at blanks if there are
    any, without RESERVED."""
    caption = caption.replace(RESERVED, " ")
    while len(data := caption.encode("utf-8", "replace")) > LINE:
        head = data[:LINE].decode("utf-8", "ignore")
        end = head.rfind(" ") + 1 or len(head)
        yield caption[:end]
        caption = caption[end:]
    yield data.decode("utf-8")


def train(
    captions: Iterable[str], path: str | os.PathLike[str] | None, vocab_size: int
) -> Tokenizer:
    """Trains SentencePiece (BPE, lower case) on captions, writes it to `path` and returns it.

    The same captions give the same file. vocab_size is an upper bound: a corpus with fewer pieces
    gives a smaller vocabulary, which is logged. path: None keeps the model in memory only.
    """
    listed = [line for caption in captions for line in to_lines(caption) if line.strip()]
    if not listed:
        raise UserError("no captions to train a tokenizer on")
    if not 0 < vocab_size < 2**31:
        raise UserError(f"vocab_size={vocab_size}; it must be a number of pieces, such as 8000")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(listed),
            model_writer=out,
            model_type="bpe",  # unigram shrinks to letters on a small corpus
            vocab_size=max(vocab_size, len(SPECIAL)),  # fewer end it before it counts
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
        raise UserError(f"SentencePiece finds no pieces in these captions ({error})") from None
    tokenizer = read_model(out.getvalue())
    if (size := tokenizer.facts["vocab_size"]) < vocab_size:
        logging.info("the captions have only %d pieces; vocab_size=%d", size, vocab_size)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        partial = Path(f"{path}.partial")
        partial.write_bytes(out.getvalue())
        partial.replace(path)
    return tokenizer
