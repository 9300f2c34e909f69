"""Laws of the tokenizers, and the errors of each."""

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from vtp_jax.data import open, sources, text
from vtp_jax.types import UserError

CAPTIONS = [
    "a man opens a door",
    "two dogs run on a beach",
    "a woman opens the window",
    "the dogs run to the door",
] * 3
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
BERT = [*text.SPECIAL, *WORDS, *"abcdefghijklmnopqrstuvwxyz", "##s", "##ing", ",", "."]
sentences = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@pytest.fixture(scope="module", params=["sentencepiece", "wordpiece"])
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / request.param
    if request.param == "sentencepiece":
        text.train(CAPTIONS, path, vocab_size=100)
    else:
        path.write_text("\n".join(BERT) + "\n", encoding="utf-8")
    return text.make(kind=request.param, path=path)


@given(captions=st.lists(sentences, max_size=4), length=st.integers(3, 40))
def test_rows_have_their_layout(tokenizer, captions, length):
    """[CLS] pieces [SEP] [PAD]...; masks mark which; [SEP] survives truncation."""
    ids, mask, maskable = tokenizer.encode(captions, length)
    facts = tokenizer.facts
    assert ids.shape == mask.shape == maskable.shape == (len(captions), length)
    assert (ids.dtype, mask.dtype, maskable.dtype) == (np.int32, bool, bool)
    special = [facts[f"{name}_id"] for name in ("pad", "unk", "cls", "sep", "mask")]
    assert len(set(special)) == 5 and ids.max(initial=0) < facts["vocab_size"]
    for row, real, may_hide in zip(ids, mask, maskable, strict=True):
        count = real.sum()
        assert real[:count].all() and row[0] == facts["cls_id"]
        assert row[count - 1] == facts["sep_id"]
        assert (row[count:] == facts["pad_id"]).all() and (row[:count] != facts["pad_id"]).all()
        np.testing.assert_array_equal(may_hide, real & ~np.isin(row, special))


@given(caption=sentences)
def test_decoding_undoes_encoding(tokenizer, caption):
    ids, mask, _ = tokenizer.encode([caption], 64)
    assert tokenizer.decode(ids) == [caption]
    assert len(tokenizer.pieces(ids[0])) == 64
    # Length changes nothing but the padding.
    count = int(mask.sum())
    if count >= 3:
        np.testing.assert_array_equal(tokenizer.encode([caption], count)[0][0], ids[0, :count])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """CLIP's tokenizer with seven merges of its thousands."""
    path = tmp_path_factory.mktemp("text") / "merges.txt.gz"
    merges = ["c a", "ca t</w>", "t h", "th e</w>", "' s</w>", "Ã ©", "! !</w>"]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(["a first line", *merges, ""]))
    return text.make(kind="clip", path=path)


def test_clip_reads_bytes_and_joins_them_by_its_merges(clip):
    facts = clip.facts
    assert facts == dict(vocab_size=521, pad_id=0, cls_id=519, sep_id=520)
    ids, mask, maskable = clip.encode(["The CAT's", "café!! 12", "", "cat cat cat cat"], 6)
    ends = 256  # a letter at the end of a word is another piece
    one, two = (ends + ord(x) - ord("!") for x in "12")
    f = ord("f") - ord("!")
    assert ids[0].tolist() == [519, 512 + 3, 512 + 1, 512 + 4, 520, 0]
    # é is two bytes, joined in the middle of words only; of "12" each digit is a word.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    e = [letters.index("Ã"), ends + letters.index("©")]
    assert ids[1].tolist() == [519, 512, f, *e, 520]
    whole = clip.encode(["café!! 12"], 12)[0][0].tolist()
    assert whole[:5] == [519, 512, f, *e] and whole[5:9] == [512 + 6, one, two, 520]
    assert ids[2].tolist() == [519, 520, 0, 0, 0, 0] and ids[3, -1] == 520 and mask[3].all()
    np.testing.assert_array_equal(maskable, mask & (ids != 519) & (ids != 520))
    assert clip.decode(clip.encode(["The cat's CAFÉ !!"], 16)[0]) == ["the cat 's café !!"]


def test_another_file_than_clips_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match="must be CLIP's bpe_simple_vocab_16e6.txt.gz"):
        text.make(kind="clip", path=tmp_path / "none")
    for content in ("a b c", "first\na b c"):
        (tmp_path / "plain").write_text(content)
        with pytest.raises(UserError, match="is not CLIP's file of merges") as error:
            text.make(kind="clip", path=tmp_path / "plain")
        assert "\n" not in str(error.value)
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"first\n" + b"a b\n" * 99)[:-4])
    with pytest.raises(UserError, match="broken.gz is damaged"):
        text.make(kind="clip", path=tmp_path / "broken.gz")


def test_capitals_are_lost_and_the_unknown_shows(tokenizer):
    ids, _, maskable = tokenizer.encode(["A MAN opens 門"], 16)
    assert tokenizer.decode(ids) == ["a man opens [UNK]"]
    unknown = ids == tokenizer.facts["unk_id"]
    assert unknown.sum() == 1 and not maskable[unknown].any()


def test_masked_words_are_shown(tokenizer):
    ids, _, _ = tokenizer.encode(["two dogs run"], 8)
    ids[0, 2] = tokenizer.facts["mask_id"]
    assert tokenizer.decode(ids) == ["two [MASK] run"]


def test_a_caption_cannot_name_a_special_piece(tokenizer):
    ids, _, _ = tokenizer.encode(["a [SEP] [MASK] door"], 32)
    assert (ids == tokenizer.facts["sep_id"]).sum() == 1
    assert not (ids == tokenizer.facts["mask_id"]).any()


def test_wordpiece_splits_as_bert(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(BERT), encoding="utf-8")
    wordpiece = text.make(kind="wordpiece", path=path)
    ids, _, _ = wordpiece.encode(["Doors, opens?"], 8)
    assert wordpiece.pieces(ids[0]) == [
        *("[CLS]", "door", "##s", ",", "opens", "[UNK]", "[SEP]", "[PAD]")
    ]
    assert wordpiece.decode(ids) == ["doors , opens [UNK]"]


def test_training_is_deterministic_and_bounded(tmp_path):
    made = [text.train(iter(CAPTIONS), tmp_path / name, 60) for name in ("a", "b")]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert made[0].facts["vocab_size"] == 60
    assert text.train(CAPTIONS, None, 5000).facts["vocab_size"] < 500


def test_enough_pieces_give_whole_words():
    ids, _, _ = text.train(CAPTIONS, None, 500).encode([" ".join(WORDS)], 64)
    assert (ids > 4).sum() == len(WORDS)


@pytest.mark.parametrize(
    "call, told",
    [
        (
            lambda p: text.make(kind="sentencepiece", path=p / "no.model"),
            "vtp prepare tokenizer",
        ),
        (lambda p: text.make(kind="wordpiece", path=p / "no.txt"), "vocab.txt"),
        (lambda p: text.make(kind="bpe", path=p / "x"), "known: sentencepiece, wordpiece"),
        (lambda p: text.make(kind="sentencepiece", path=p / "text"), "not a SentencePiece model"),
        (lambda p: text.make(kind="wordpiece", path=p / "text"), r"no piece \[PAD\]"),
        (lambda p: text.train(CAPTIONS, None, 9), "vocab_size=9 is too small"),
        (lambda p: text.train([], None, 100), "no captions"),
    ],
)
def test_mistakes_are_one_line_errors(tmp_path, call, told):
    (tmp_path / "text").write_text("a\nb\n")
    with pytest.raises(UserError, match=told) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


SPELLINGS = {  # a vocabulary's own words, a caption -> its pieces
    "uncased": (["a", "dog", "cafe"], "A Dog café", "a dog cafe"),
    "cased": (["A", "Dog", "Runs", "a"], "A Dog Runs a", "A Dog Runs a"),
    "one capital": (["a", "dog", "##S"], "a dogS dog", "a dog ##S dog"),
    "cased and accents": (["Café", "cafe"], "Café cafe", "Café cafe"),
    "uncased and accents": (["straße", "über"], "Straße ÜBER", "straße über"),
    "Cyrillic": (["Собака", "бежит"], "Собака бежит", "Собака бежит"),
    "symbols": (["a", "\u211d"], "A \u211d", "a \u211d"),  # as in BERT's uncased vocabulary
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_words_are_spelt_as_the_vocabulary_spells_them(tmp_path, name):
    words, caption, wanted = SPELLINGS[name]
    (tmp_path / "vocab.txt").write_text("\n".join([*text.SPECIAL, *words]), encoding="utf-8")
    tokenizer = text.make(kind="wordpiece", path=tmp_path / "vocab.txt")
    ids = tokenizer.encode([caption], 9)[0][0]
    assert [p for p in tokenizer.pieces(ids) if p not in ("[CLS]", "[SEP]", "[PAD]")] == (
        wanted.split()
    )
    assert text.unknown(tokenizer, [caption]) == 0


def test_a_configuration_beside_the_vocabulary_decides(tmp_path):
    """Hugging Face's tokenizer_config.json."""
    (tmp_path / "vocab.txt").write_text("\n".join([*text.SPECIAL, "Dog", "dog", "café", "cafe"]))
    config = tmp_path / "tokenizer_config.json"
    for written, wanted in (
        ('{"do_lower_case": true}', "dog cafe"),
        ('{"do_lower_case": true, "strip_accents": false}', "dog café"),
        ('{"do_lower_case": false, "strip_accents": null}', "Dog café"),
        ('{"model_max_length": 512}', "Dog café"),
    ):
        config.write_text(written)
        tokenizer = text.make(kind="wordpiece", path=tmp_path / "vocab.txt")
        assert tokenizer.decode(tokenizer.encode(["Dog café"], 8)[0]) == [wanted]
    for written, told in (
        ('{"do_lower_case": "no"}', "do_lower_case must be true or false"),
        ("{", "tokenizer_config.json: is not JSON"),
        ("[]", "it must be an object"),
    ):
        config.write_text(written)
        with pytest.raises(UserError, match=told):
            text.make(kind="wordpiece", path=tmp_path / "vocab.txt")


def test_captions_of_any_length_train_a_tokenizer():
    """SentencePiece skips lines of more than 4,192 bytes, and those that have U+2585."""
    for captions in (
        ["a red dog runs over the hill " * 200, "\u72d7\u5728\u8dd1\u6b65" * 20_000],
        ["\u2585 zebra dog", "dog"],
        ["a\nb\tc", " ", "\ufeff"],
        ["one"],
    ):
        tokenizer = text.train(captions, None, 300)
        seen = [c.replace("\u2585", " ") for c in captions]
        assert text.unknown(tokenizer, [c for c in seen if c.strip()]) == 0
    long = "a red dog " * 999 + "\u72d7" * 5000
    assert "".join(text.to_lines(long)) == long
    assert all(len(line.encode()) <= text.LINE for line in text.to_lines(long))


@pytest.mark.parametrize(
    "captions, size, told",
    [
        *[(CAPTIONS, n, f"vocab_size={n} is too small.*need 2. at least") for n in (1, 3, 5, 6)],
        (["1 2 3"], 2, "vocab_size=2 is too small"),
        *[(CAPTIONS, n, f"vocab_size={n}; it must be a number") for n in (0, -1, 2**31)],
        ([" ", "\t", ""], 99, "no captions"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained_is_a_one_line_error(captions, size, told):
    with pytest.raises(UserError, match=told) as caught:
        text.train(captions, None, size)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_of_another_language_is_refused(tmp_path, caplog):
    """Its share of [UNK] is told before anything else is made."""
    (tmp_path / "vocab.txt").write_text("\n".join(BERT), encoding="utf-8")

    def opened(*captions):
        clips = tuple(sources.Clip(f"{i}.mp4", (c,)) for i, c in enumerate(captions))
        source = sources.Source("", clips)
        open.open_text(source, kind="wordpiece", path=str(tmp_path / "vocab.txt"), length=8)

    with pytest.raises(UserError, match="vocab.txt: 100% of the pieces of the captions are"):
        opened(*["\u72d7 \u8dd1"] * 9)
    opened(*["two dogs"] * 9)
    assert "pieces are [UNK]" not in caplog.text
    opened(*["two dogs \u72d7"] * 9)
    assert "33 % of the captions' pieces are [UNK]" in caplog.text
    opened("\u72d7 \u8dd1")  # one caption, as in `vtp visualize --captions`, proves nothing


def test_lone_surrogates_do_not_stop_a_tokenizer(tokenizer):
    assert tokenizer.encode(["two \ud83d dogs"], 8)[1].any()
