"""Trained nets from Python: `vtp_jax.load`."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from vtp_jax import evals, tree
from vtp_jax.convert import export, reload
from vtp_jax.data import collect, pipeline, video
from vtp_jax.data.look import Look
from vtp_jax.data.open import Words, open_given
from vtp_jax.data.order import list_order
from vtp_jax.data.sources import Clip
from vtp_jax.evals import caption, classify, retrieval
from vtp_jax.setup import build
from vtp_jax.show import pictures
from vtp_jax.show.draw import Restored
from vtp_jax.types import Stream, UserError

Video = str | os.PathLike[str] | np.ndarray
# What can be asked of a net, and the functions of `Method.encode` that each needs.
NEEDS: Mapping[str, tuple[str, ...]] = dict(
    embed_video=("video",),
    embed_text=("text",),
    search=("video", "text"),
    classify=("classes",),
    answer=("answer",),
    reconstruct=("reconstruct",),
    generate=("generate",),
)


class Index(NamedTuple):
    """Videos that can be searched. paths: of the files; vectors: their embeddings."""

    paths: Sequence[str]
    vectors: Float[np.ndarray, "n d"]


class Hit(NamedTuple):
    """A video that was found. score: the cosine of its embedding and the text's."""

    path: str
    score: float


class Guess(NamedTuple):
    """A class of a video. by: "head", the score is its probability; "prompts", the cosine of the
    video and the name of the class."""

    name: str
    score: float
    by: Literal["head", "prompts"]


def load(
    path: str | os.PathLike[str],
    step: int | str = "latest",
    *,
    weights: str | None = None,
    batch: int = 16,
    text: Mapping[str, Any] | None = None,
    video: Mapping[str, Any] | None = None,
) -> Model:
    """The trained net in a folder, on all devices of this machine.

    path: a workdir of `vtp train`, a folder of `vtp convert import` or `export`, or a Hugging Face
    folder of a VideoMAE. step: of a run: a step, "latest" or "best". weights: "ema" for the
    averaged weights of a run that keeps them. batch: the most videos or texts that are computed at
    once; fewer are padded to a power of two, so that a few programs are compiled in all.

    text: of a folder without a tokenizer, `config.data.text`, such as
    dict(kind="wordpiece", path="vocab.txt", length=32); video: of an import or export, changes of
    `config.data.video`, such as dict(stride=2).

    Raises UserError if there is no net in the folder.
    """
    folder = epath.Path(path)
    if not folder.exists():
        raise UserError(f"no folder '{path}'")
    if (folder / "checkpoints").exists() and not (folder / export.FACTS).exists():
        if text or video:
            raise UserError("text and video are for imports and exports; a run has its own")
        run = build.restore(os.fspath(path), step)
    else:
        run = reload.load(Path(path), text, video)
    if weights:
        encode = tree.under(run.method.encode, f"{weights}/")
        if not encode:
            raise UserError(f"weights='{weights}': the run keeps none of that name")
        run = run._replace(method=run.method._replace(encode=encode))
    return Model(run, str(path), batch)


class Model:
    """A trained net. Videos are paths, or uint8 arrays (t, h, w, 3) of RGB frames; a list of them
    may mix both. Frames are sampled and cropped as the run's evaluation does. What the net cannot
    do is a UserError that names what it can."""

    def __init__(self, run: build.Run, name: str, batch: int = 16):
        self.run, self.name, self.batch = run, name, batch

    def __repr__(self) -> str:
        method = self.run.config.method["name"]
        return f"<{method} of {self.name}, step {int(self.run.state.step)}: {', '.join(self.can)}>"

    @property
    def can(self) -> list[str]:
        """The names of the methods that this net can be asked for."""
        have = set(self.run.method.encode)
        found = [name for name, verbs in NEEDS.items() if have.issuperset(verbs)]
        if "search" in found and "classify" not in found:
            found.append("classify")
        return found

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, in their order; empty if they are unknown."""
        return self.run.data.labels

    def embed_video(self, videos: Sequence[Video] | Video) -> Float[np.ndarray, "n d"]:
        """The embeddings of videos, float32 (n, d), not normalised. If the run is evaluated on
        several views of a video, the mean over them.

        Raises UserError if one cannot be read.
        """
        self._need("embed_video")
        return self._over(videos, None, self._embed_video)

    def embed_text(self, texts: Sequence[str] | str) -> Float[np.ndarray, "n d"]:
        """The embeddings of texts, float32 (n, d), not normalised. Words beyond the run's length
        are not read."""
        self._need("embed_text")
        return self._of_texts(texts)

    def similarity(
        self, texts: Float[np.ndarray, "m d"], videos: Float[np.ndarray, "n d"]
    ) -> Float[np.ndarray, "m n"]:
        """The cosines of every text with every video, by which retrieval ranks."""
        return retrieval.normalise(texts) @ retrieval.normalise(videos).T

    def index(self, paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> Index:
        """The embeddings of video files, and of all videos in folders, for `search`. Files that
        cannot be read are logged and left out."""
        self._need("search")
        clips = open_given(listed(paths), None)
        ids, vectors = self._run(self._streams(clips, self._look)["given"], self._embed_video)
        if not len(ids):
            raise UserError("none of the videos can be read; `vtp prepare check` lists the causes")
        return Index([clips.source.clips[i].path for i in ids], vectors)

    def search(self, text: str, index: Index, k: int = 5) -> list[Hit]:
        """The k videos of an index that fit a text best, best first."""
        self._need("search")
        scores = self.similarity(self._of_texts(text), index.vectors)[0]
        return [Hit(index.paths[i], float(scores[i])) for i in best(scores, k)]

    def classify(
        self,
        videos: Sequence[Video] | Video,
        classes: Sequence[str] | None = None,
        k: int = 5,
    ) -> list[list[Guess]]:
        """The k most likely classes of each video, best first.

        By the net's own head, if it has one and `classes` is None: scores are probabilities.
        Otherwise by the texts `classes`, such as "a video of a dog": scores are cosines.
        """
        if classes is None and "classes" in self.run.method.encode:
            return self._guesses(self._over(videos, None, self._scores("classes")), k)
        if classes is None:
            self._need("classify", "search")
            raise UserError(f"{self.name} has no classes of its own; pass classes=[...], in words")
        self._need("search")
        scores = self.similarity(self._of_texts(classes), self.embed_video(videos)).T
        return [[Guess(classes[i], float(row[i]), "prompts") for i in best(row, k)]
                for row in scores]  # fmt: skip

    def answer(self, videos: Sequence[Video] | Video, questions: Sequence[str] | str,
               k: int = 5) -> list[list[Guess]]:  # fmt: skip
        """The k most likely answers to a question on each video, best first, by the head of a net
        that was trained to answer: scores are probabilities."""
        self._need("answer")
        asked = [questions] if isinstance(questions, str) else list(questions)
        return self._guesses(self._over(videos, asked, self._scores("answer")), k)

    def reconstruct(
        self,
        videos: Sequence[Video] | Video,
        captions: Sequence[str] | str | None = None,
        *,
        seed: int = 0,
    ) -> list[Restored]:
        """What the net restores of each video, and of its caption, if it reads both, when parts are
        hidden as in training; `seed` draws which.

        Of each: `video`, the frames that it saw, uint8 (t, h, w, 3); `hidden`, bool (t, h, w);
        `restored`, uint8 (t, h, w, 3); `interpolated`, uint8 (t, h, w, 3), hidden pixels filled in
        from visible ones without a net, to compare; `words`, or None without a caption.
        """
        self._need("reconstruct")
        captions = [captions] if isinstance(captions, str) else captions
        clips = open_given(listed(videos), captions)
        stream = self._streams(clips, self._middle)["given"]
        made = pictures.restore(self.run, stream, len(clips.source.clips), seed=seed)
        self._check([one.id for one in made], clips.source.clips)
        return made

    def generate(self, videos: Sequence[Video] | Video) -> list[str]:
        """A caption of each video, as the net writes it."""
        self._need("generate")
        return [" ".join(line.split()) for line in
                self.run.data.decode(self._over(videos, None, self._write))]  # fmt: skip

    # The programs, compiled once for each size of a batch.

    @functools.cached_property
    def _embed_video(self) -> Any:
        verb = evals.verb("embed_video", self.run.method.encode, "video", "embedding")
        return retrieval.jitted(lambda *a: retrieval.embed_video(verb, *a), self.run.mesh)

    @functools.cached_property
    def _embed_text(self) -> Any:
        verb = evals.verb("embed_text", self.run.method.encode, "text", "embedding")
        return retrieval.jitted(lambda *a: verb(*a)["embedding"], self.run.mesh)

    @functools.cached_property
    def _write(self) -> Any:
        verb = evals.verb("generate", self.run.method.encode, "generate", "ids")
        return caption.writer(verb, self.run.mesh)

    @functools.cache  # noqa: B019 - a model lives as long as its programs
    def _scores(self, name: str) -> Any:
        verb = evals.verb(name, self.run.method.encode, name, "score")

        def f(params: Any, extra: Any, batch: Any) -> Any:
            return batch["id"], batch["valid"], classify.mean_score(verb, params, extra, batch)

        return evals.jitted(f, self.run.mesh)

    # Data, as an evaluation reads it.

    @functools.cached_property
    def _words(self) -> Words | None:
        return pipeline.words_of(self.run.config.data)

    @functools.cached_property
    def _look(self) -> Look:
        return pipeline.look_of(self.run.config.data, views=True)

    @functools.cached_property
    def _middle(self) -> Look:
        return pipeline.look_of(self.run.config.data, views=False)

    def _rows(self, count: int) -> int:
        """The rows of a batch for `count` videos or texts: a power of two, which the devices
        divide."""
        ways = math.prod(self.run.mesh.shape.values())
        rows = min(1 << max(count - 1, 0).bit_length(), self.batch)
        return -(-rows // ways) * ways

    def _streams(self, clips: Any, look: Look) -> dict[str, Stream]:
        rows = self._rows(len(clips.source.clips))
        return pipeline.given_streams(clips, look, self._words, rows)

    def _run(self, stream: Stream, f: Any) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the valid rows of a stream, and what f gives for them."""
        run, parts = self.run, []
        for _, (ids, valid, found) in evals.over(
            self.name, {"given": stream}, "given", f, run.state, run.mesh
        ):
            parts.append((ids[valid], found[valid]))
        ids, found = (np.concatenate(column) for column in zip(*parts, strict=True))
        return ids, found

    def _over(self, videos: Any, captions: Sequence[str] | None, f: Any) -> Any:
        """f of all videos. Raises UserError if one cannot be read."""
        videos = listed(videos)
        for one in videos:
            if not isinstance(one, np.ndarray) and os.path.isdir(one):
                raise UserError(f"'{one}' is a folder; index([...]) takes folders")
        clips = open_given(videos, captions)
        ids, found = self._run(self._streams(clips, self._look)["given"], f)
        self._check(ids.tolist(), clips.source.clips)
        return found

    def _check(self, ids: Sequence[int], clips: Sequence[Clip]) -> None:
        lost = sorted(set(range(len(clips))) - set(ids))
        if lost:
            path = clips[lost[0]].path
            raise UserError(
                f"{len(lost)} of {len(clips)} videos cannot be read: {path}, {why(path)}"
            )

    def _of_texts(self, texts: Sequence[str] | str) -> Float[np.ndarray, "n d"]:
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError("no texts; give one at least")
        if self._words is None:
            raise UserError(
                f"{self.name} has no tokenizer; load it with "
                "text=dict(kind=..., path=..., length=...)"
            )
        order = functools.partial(list_order, self._rows(len(texts)), (0, 1))
        known = [Clip("", (text,)) for text in texts]
        return self._run(collect.stream_captions(known, self._words, order, {}), self._embed_text)[
            1
        ]

    def _guesses(self, scores: Float[np.ndarray, "n c"], k: int) -> list[list[Guess]]:
        def name(i: int) -> str:
            return self.labels[i] if i < len(self.labels) else f"class {i}"

        return [[Guess(name(i), float(row[i]), "head") for i in best(row, k)] for row in scores]

    def _need(self, *names: str) -> None:
        """Raises UserError unless the net can do one of these."""
        have = set(self.run.method.encode)
        if not any(have.issuperset(NEEDS[name]) for name in names):
            verbs = "', '".join(verb for verb in NEEDS[names[0]] if verb not in have)
            raise UserError(
                f"{self.name} cannot {names[0]}: its method "
                f"({self.run.config.method['name']}) has no encode '{verbs}'; it can "
                f"{', '.join(self.can) or 'do nothing here'}"
            )


def listed(videos: Any) -> list[Any]:
    """A list of videos, or of the one that is given. Raises UserError if there is none."""
    if isinstance(videos, (str, os.PathLike)) or getattr(videos, "ndim", 0) == 4:
        return [videos]
    found = list(videos)
    if not found:
        raise UserError("no videos; give one at least")
    return found


def best(scores: Float[np.ndarray, "n"], k: int) -> list[int]:
    """The places of the k largest scores, descending; equal ones in their order."""
    return np.argsort(-scores, kind="stable")[:k].tolist()


def why(path: str) -> str:
    """Why a video cannot be read, in words."""
    try:
        video.probe(path)
    except video.Unreadable as error:
        return f"{error.cause}: {video.CAUSES[error.cause]}"
    return "the frames that are needed cannot be decoded"
