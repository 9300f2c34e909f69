"""`vtp_jax.load`: what a net gives from Python is what an evaluation of it computes."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vtp_jax
from tests import whole
from tests.convert import small
from tests.convert.test_convert import flags, put
from vtp_jax import api
from vtp_jax.convert import __main__ as convert
from vtp_jax.data import pipeline, text, video
from vtp_jax.evals import retrieval
from vtp_jax.types import UserError


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    return whole.make(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def net(moved):
    return vtp_jax.load(moved.workdir)


@pytest.fixture(scope="module")
def films(moved):
    return sorted(moved.films.iterdir())


def frames_of(path):
    return video.read_frames(path, np.arange)


def test_the_package_imports_nothing_until_it_is_used():
    code = "import sys, vtp_jax; assert not {'jax', 'tensorflow'} & set(sys.modules)\n"
    code += "assert not hasattr(vtp_jax, 'lode')\n"
    code += "sys.modules['tensorflow'] = None; vtp_jax.load"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_embeddings_are_those_of_an_evaluation(net, moved, films):
    """The evaluator's own function, on streams of the same files and captions."""
    streams = pipeline.given(net.run.config.data, films, [*moved.captions, "disc"], ways=8)
    embed = retrieval.embedder(
        encode=net.run.method.encode, streams=streams, mesh=net.run.mesh, stream="given"
    )
    videos, texts = embed(net.run.state)
    v, t = net.embed_video(films), net.embed_text([*moved.captions, "disc"])
    assert v.dtype == np.float32 and len(v) == 3
    np.testing.assert_array_equal(v, videos.vector)
    np.testing.assert_array_equal(t, texts.vector)
    cosines = net.similarity(t, v)
    wanted = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in v] for a in t]
    np.testing.assert_allclose(cosines, wanted, atol=1e-6)


def test_files_and_their_frames_are_the_same_video(net, films):
    a, b, c = films
    mixed = net.embed_video([str(a), frames_of(b), c])
    np.testing.assert_array_equal(mixed, net.embed_video(films))
    np.testing.assert_array_equal(net.embed_video(frames_of(b)), mixed[1:2])


@pytest.mark.parametrize("views", [None, (2, 1)])
def test_a_video_is_seen_as_its_evaluation_sees_it(net, films, views, tmp_path):
    """Test views included, of which an evaluation averages the embeddings."""
    look = dict(net.run.config.data["video"], views=views)
    data = dict(net.run.config.data, video=look, text=None, kind="files", train=dict(root="gone"))
    (tmp_path / "list.csv").write_text("".join(["path\n", *(f"{p}\n" for p in films)]))
    held = dict(root="/", list=str(tmp_path / "list.csv"), caption_column=None)
    known = pipeline.kept.Kept(1, False, {"data.train": 0}, {}, None, ())
    stream = pipeline.reopen(dict(data, evals=dict(v=held)), known, batch=8).streams["v"]
    (seen,) = stream.batches()
    own = api.Model(net.run._replace(config=net.run.config._replace(data=data)), "it")
    clips = api.open_given(films, None)
    (mine,) = own._streams(clips, own._look)["given"].batches()
    np.testing.assert_array_equal(mine["video"][:3], seen["video"][:3])


def test_nothing_is_compiled_again_for_other_words_or_fewer_videos(net, films):
    """A batch of one, of two and of three: on eight devices they are one size."""
    few = [films[0]]
    net.embed_text("one"), net.embed_video(few), net.reconstruct(few, "a disc")
    index = net.index(films)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    for words in (["a"], ["a much longer text than those before it"], ["b", "c", "d"]):
        net.embed_text(words)
        net.search(words[0], index)
    net.embed_video([frames_of(films[1]), films[2]])
    net.reconstruct([frames_of(films[1])], "other words")
    assert not compiled
    jax.jit(lambda x: x + 1.25)(np.ones(7))  # the count counts
    assert compiled


@pytest.mark.parametrize("batch, count, rows", [(16, 1, 8), (16, 9, 16), (16, 99, 16), (4, 3, 8)])
def test_batches_have_few_sizes(net, batch, count, rows):
    assert api.Model(net.run, "it", batch)._rows(count) == rows


def test_more_videos_than_a_batch_keep_their_order(net, films):
    several = api.Model(net.run, "it", 8)
    many = [films[i % 3] for i in range(11)]
    found = several.embed_video(many)
    np.testing.assert_allclose(found, net.embed_video(films)[np.arange(11) % 3], atol=1e-6)


def test_a_text_finds_the_video_of_the_largest_cosine(net, moved, films, tmp_path):
    (moved.films / "torn.mp4").write_bytes(b"no video")
    try:
        index = net.index([moved.films])
    finally:
        (moved.films / "torn.mp4").unlink()
    assert [str(path) for path in films] == index.paths
    hits = net.search("a disc", index, k=2)
    cosines = net.similarity(net.embed_text("a disc"), net.embed_video(films))[0]
    assert [hit.path for hit in hits] == [str(films[i]) for i in np.argsort(-cosines)[:2]]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosines)[::-1][:2], rtol=1e-6)


def test_classes_in_words_are_chosen_by_cosine(net, films):
    guesses = net.classify(films, ["a disc", "a star"], k=1)
    cosines = net.similarity(net.embed_text(["a disc", "a star"]), net.embed_video(films))
    assert [one[0].name for one in guesses] == [("a disc", "a star")[i] for i in cosines.argmax(0)]
    assert {one[0].by for one in guesses} == {"prompts"}


def test_hidden_parts_are_restored(net, films):
    a, b = net.reconstruct(films[:2], ["a disc moves", ""])
    np.testing.assert_array_equal(a.restored[~a.hidden], a.video[~a.hidden])  # what is seen stays
    assert a.hidden.any() and a.words and b.words is None
    again, other = (net.reconstruct(films[0], "a disc moves", seed=seed)[0] for seed in (0, 1))
    np.testing.assert_array_equal(again.hidden, a.hidden)
    assert (other.hidden != a.hidden).any()


def test_mistakes_are_one_line(net, films, tmp_path):
    can = "embed_video, embed_text, search, reconstruct, classify"
    lacks = r"cannot generate: its method \(simvtp\) has no encode 'generate'; it can "
    with pytest.raises(UserError, match=lacks + can):
        net.generate(films)
    with pytest.raises(UserError, match="has no classes of its own; pass classes"):
        net.classify(films)
    with pytest.raises(
        UserError, match=r"video 0 is an array of float32\[4, 8, 8, 3\]; frames are"
    ):
        net.embed_video([np.zeros((4, 8, 8, 3), np.float32)])
    (tmp_path / "torn.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="1 of 2 videos cannot be read: .*torn.mp4, not_a_video: "):
        net.embed_video([films[0], tmp_path / "torn.mp4"])
    with pytest.raises(UserError, match="no file or folder 'gone.mp4'"):
        net.embed_video(["gone.mp4"])
    with pytest.raises(UserError, match="is a folder; index"):
        net.embed_video([tmp_path])
    for nothing in (net.embed_video, net.embed_text):
        with pytest.raises(UserError, match="; give one at least"):
            nothing([])
    with pytest.raises(UserError, match="2 captions for 1 videos"):
        net.reconstruct([frames_of(films[0])], ["a", "b"])
    with pytest.raises(UserError, match="no folder 'nowhere'"):
        vtp_jax.load("nowhere")
    with pytest.raises(UserError, match="is no run, import or export"):
        vtp_jax.load(tmp_path)
    with pytest.raises(UserError, match="keeps none of that name"):
        vtp_jax.load(net.name, weights="ema")


# A net with the other verbs: its class is the brightness of the clip, which its caption tells too.


def bright(batch):
    return (batch["video"].astype(jnp.float32).mean((1, 2, 3, 4)) / 86).astype(jnp.int32)


def one_hot(batch, at):
    return {"score": 0.9 * jax.nn.one_hot(at % 3, 3)}


@pytest.fixture
def other(net):
    verbs = dict(
        classes=lambda params, extra, batch, rng=None: one_hot(batch, bright(batch)),
        answer=lambda params, extra, batch, rng=None: one_hot(
            batch, bright(batch) + batch["text_mask"].sum(1)
        ),
        generate=lambda params, extra, batch, rng=None: {
            "ids": jnp.tile(bright(batch)[:, None] + 5, (1, 4))
        },
    )
    run = net.run._replace(
        method=net.run.method._replace(encode=verbs),
        data=net.run.data._replace(labels=("dark", "grey")),
    )
    return api.Model(run, "it")


def test_a_head_gives_probabilities_of_named_classes(other):
    clips = [np.full((9, 40, 40, 3), level, np.uint8) for level in (10, 100, 250)]
    assert other.can == ["classify", "answer", "generate"]
    guesses = other.classify(clips, k=2)
    assert [one[0].name for one in guesses] == ["dark", "grey", "class 2"]
    assert {(one[0].by, len(one)) for one in guesses} == {("head", 2)}
    np.testing.assert_allclose([one[0].score for one in guesses], 0.9, rtol=1e-6)
    assert len(set(other.generate(clips))) == 3
    # Two questions of one length, and one that is a token longer.
    asked = [other.answer(clips[0], text)[0][0].name for text in ("a", "a", "aa a a")]
    lengths = [other._words.tokenizer.encode([text], 12)[1].sum() for text in ("a", "aa a a")]
    names = ["dark", "grey", "class 2"]
    assert asked == [names[n % 3] for n in (lengths[0], lengths[0], lengths[1])]
    with pytest.raises(UserError, match="cannot embed_text: .* it can classify, answer, generate"):
        other.embed_text("a dog")
    with pytest.raises(UserError, match="cannot search"):
        other.classify(clips, ["a", "b"])


# Imports and exports.


def test_an_export_is_the_run_that_it_came_from(net, moved, films, tmp_path):
    argv = ["export", "--checkpoint", str(moved.workdir), "--format", "safetensors"]
    convert.main([*argv, "--out", str(tmp_path / "out")])
    again = vtp_jax.load(tmp_path / "out")
    np.testing.assert_allclose(again.embed_video(films), net.embed_video(films), atol=1e-6)
    texts = [*moved.captions, "two"]
    np.testing.assert_allclose(again.embed_text(texts), net.embed_text(texts), atol=1e-6)
    assert again.can == net.can


def test_a_hugging_face_folder_classifies_as_its_import_does(films, tmp_path):
    tensors, _, heads = small.tensors_of("hf_videomae_finetune")
    folder = put(tmp_path, "hf_videomae_finetune", tensors, heads)
    argv = ["import", "--from", str(folder), "--format", "hf_videomae_finetune"]
    convert.main([*argv, "--out", str(tmp_path / "in")])
    convert.main(["export", "--checkpoint", str(tmp_path / "in"), "--format", "hf",
                  "--out", str(tmp_path / "out")])  # fmt: skip
    found = [vtp_jax.load(one) for one in (folder, tmp_path / "in", tmp_path / "out")]
    guesses = [one.classify(films, k=3) for one in found]
    assert guesses[0] == guesses[1] == guesses[2] and guesses[0][0][0].by == "head"
    assert {guess.name for guess in guesses[0][0]} <= set(found[0].labels)
    with pytest.raises(UserError, match=r"cannot embed_text: .*\(videomae\) has no encode 'text'"):
        found[0].embed_text("a dog")


def test_the_net_of_a_bare_import_reads_words_with_a_tokenizer(films, moved, tmp_path):
    tensors, params, heads = small.tensors_of("simvtp")
    path = put(tmp_path, "simvtp", tensors, heads)
    argv = ["import", "--from", str(path), "--format", "simvtp", "--out", str(tmp_path / "in")]
    convert.main([*argv, *flags(heads)])
    with pytest.raises(UserError, match="has no tokenizer; load it with text="):
        vtp_jax.load(tmp_path / "in").embed_text("a dog")
    words = dict(kind="sentencepiece", path=str(moved.workdir / "tokenizer.model"), length=6)
    with pytest.raises(UserError, match="the tokenizer has 1[0-9]+ pieces, the net 40; give"):
        vtp_jax.load(tmp_path / "in", text=words)
    text.train(["a dog", "no cat"], tmp_path / "words.model", 30)
    words["path"] = str(tmp_path / "words.model")
    net = vtp_jax.load(tmp_path / "in", text=words, video=dict(frames=4, size=16, stride=1))
    assert np.isfinite(net.embed_text("a dog")).all() and np.isfinite(net.embed_video(films)).all()


def test_a_part_of_a_net_is_refused(tmp_path):
    tensors, _, heads = small.tensors_of("vit")
    path = put(tmp_path, "vit", tensors, heads)
    argv = ["import", "--from", str(path), "--format", "vit", "--out", str(tmp_path / "in")]
    convert.main([*argv, *flags(heads)])
    with pytest.raises(UserError, match="of format 'vit' is a part, not a method; start a run"):
        vtp_jax.load(tmp_path / "in")
