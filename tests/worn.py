"""A corpus of which every twentieth file is damaged, each in a way of its own."""

from vtp_jax.data import shapes

DAMAGE = {11: "missing", 23: "not_a_video", 42: "not_a_video", 64: "damaged"}


def write(root, side, frames):
    """80 videos under `root`, of which those that DAMAGE names cannot be read, for these causes."""
    shapes.write(root, shapes.Plan(train=80, val=1, side=side, frames=frames), workers=1)

    def path(number):
        return root / f"train/{number:05d}.mp4"

    whole = path(1).read_bytes()
    (root / "inner.ts").write_bytes(whole)
    path(11).unlink()
    path(23).write_bytes(b"")
    path(42).write_text(f"#EXTM3U\n#EXTINF:1,\n{root}/inner.ts\n#EXT-X-ENDLIST\n")
    body = whole.index(b"mdat") + 4
    path(64).write_bytes(whole[:body] + bytes(len(whole) - body))
    return root
