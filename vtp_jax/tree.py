"""Parameter names and rules on them: the mechanism behind sharding, rates, decay and freezing.

A name is the path of a leaf joined by `/`, as in `encoder/blocks/attn/qkv/kernel`. A rule is
`(regex, value)`; the regex must match the whole name, and the first rule that matches wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import traverse_util

from vtp_jax.types import UserError

T = TypeVar("T")


def key_name(key: Any) -> str:
    """The text of one step of a tree path: a dict key, an attribute or a position."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def names(tree: Any) -> Any:
    """The tree with every leaf replaced by its name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "/".join(key_name(k) for k in path), tree
    )


def flatten(tree: Any) -> dict[str, Any]:
    """{name: leaf}, in the tree's order."""
    return {
        "/".join(key_name(k) for k in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def map_named(f: Callable[..., T], tree: Any, *rest: Any) -> Any:
    """Maps f(name, leaf, *leaves of the other trees) over a tree."""
    return jax.tree.map(f, names(tree), tree, *rest)


def match(
    rules: Sequence[tuple[str, T]], tree: Any, what: str = "rules", idle_ok: bool = False
) -> Any:
    """The tree with every leaf replaced by the value of the first rule that matches its name.

    Raises UserError on a bad regex, on a leaf that no rule covers, and, unless `idle_ok`, on a
    rule that applies to no leaf: it is misspelt, or earlier rules hide it.
    """
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise UserError(f"{what}: '{pattern}' is not a regular expression: {error}") from None
    used: set[int] = set()

    def find(name: str, _: Any) -> Any:
        for i, (pattern, value) in enumerate(compiled):
            if pattern.fullmatch(name):
                used.add(i)
                return Boxed(value)
        raise UserError(
            f"{what}: no rule covers '{name}'; add one, or end the list with ('.*', ...)"
        )

    boxed = map_named(find, tree)
    idle = [p for i, (p, _) in enumerate(rules) if i not in used]
    if idle and not idle_ok:
        raise UserError(
            f"{what}: the rule '{idle[0]}' matches nothing (misspelt, or hidden by an earlier rule)"
        )
    return jax.tree.map(lambda b: b.value, boxed, is_leaf=lambda b: isinstance(b, Boxed))


class Boxed:
    """Holds a rule's value as a single leaf while trees are mapped: values may be dicts or
    tuples."""

    def __init__(self, value: Any):
        self.value = value


def split(tree: Mapping[str, Any], take: Callable[[str], bool]) -> tuple[dict, dict]:
    """Two nested dicts: the leaves whose name `take` accepts, and the rest. `merge` undoes it."""
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    chosen = {k: v for k, v in flat.items() if take(k)}
    rest = {k: v for k, v in flat.items() if k not in chosen}
    return traverse_util.unflatten_dict(chosen, sep="/"), traverse_util.unflatten_dict(
        rest, sep="/"
    )


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict:
    """The nested dict with the leaves of both, which must not overlap."""
    flat_a = traverse_util.flatten_dict(dict(a), sep="/")
    flat_b = traverse_util.flatten_dict(dict(b), sep="/")
    if both := flat_a.keys() & flat_b.keys():
        raise ValueError(f"merge: both trees have '{min(both)}'")
    return traverse_util.unflatten_dict({**flat_a, **flat_b}, sep="/")


def replace(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict:
    """The nested dict with some leaves, given by name, in place of its own."""
    if not leaves:
        return dict(tree)
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    if odd := leaves.keys() - flat.keys():
        raise ValueError(f"replace: the tree has no '{min(odd)}'")
    return traverse_util.unflatten_dict({**flat, **leaves}, sep="/")


def under(leaves: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The leaves whose names begin with `prefix`, by name without it."""
    return {k.removeprefix(prefix): v for k, v in leaves.items() if k.startswith(prefix)}


def without(tree: Mapping[str, Any], names: Sequence[str], what: str = "drop") -> dict:
    """A nested dict without the leaves whose names match these regexes. Raises UserError on a regex
    that matches none."""
    kept = flatten(match([*((regex, False) for regex in names), (".*", True)], tree, what))
    return split(tree, lambda name: kept[name])[0]


def size(tree: Any) -> int:
    """The number of elements in a tree of arrays."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))
