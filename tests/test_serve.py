"""The page of a net: what its parts show."""

import sys

import numpy as np
import pytest
from PIL import Image

import vtp_jax
from tests import whole
from vtp_jax import serve
from vtp_jax.types import UserError


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    return whole.make(tmp_path_factory.mktemp("serve"))


def test_words_find_pictures_and_a_video_is_restored(moved):
    net = vtp_jax.load(moved.workdir)
    films = sorted(map(str, moved.films.iterdir()))
    index = net.index(films)
    found = serve.find(net, index, "a disc")
    hits = net.search("a disc", index, serve.SHOWN)
    assert [label.split("  ") for _, label in found] == [
        [f"{hit.score:.3f}", hit.path.rsplit("/", 1)[1]] for hit in hits
    ]
    first = np.asarray(found[0][0].resize((whole.SIDE, whole.SIDE), Image.Resampling.BOX))
    gap = first.astype(int) - serve.thumbnail(hits[0].path)
    assert np.abs(gap).mean() < 3
    board, bare = (serve.restore(net, films[0], text) for text in ("a disc", ""))
    assert board.height > bare.height  # the words
    assert serve.own_videos(net) == []  # its evaluation set is gone


def test_the_page_shows_what_the_net_can_do_and_says_what_is_missing(moved):
    gradio = pytest.importorskip("gradio", reason="the extra `serve`")
    net = vtp_jax.load(moved.workdir)
    film = str(moved.films / "0.mp4")
    called = {
        one.api_name: one.fn for one in serve.page(net, net.index(film)).fns.values() if one.fn
    }
    assert set(called) >= {"search", "restore"}
    assert len(called["search"]("a disc")) == 1
    assert called["restore"](film, "a disc").width > 0
    for name, given in dict(search=("",), restore=(None, "a disc")).items():
        with pytest.raises(gradio.Error):
            called[name](*given)
    bare = serve.page(net, None)
    assert "search" not in {one.api_name for one in bare.fns.values()}


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch, moved):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"^the page needs gradio: pip install 'vtp_jax\[serve\]'"):
        serve.main([str(moved.workdir)])
