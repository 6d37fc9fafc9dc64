"""Parts of parameter trees: plain nested dicts, of arrays or of what stands for them."""

from typing import Any


def select(tree: dict[str, Any], mask: dict[str, Any]) -> dict[str, Any]:
    """The leaves of `tree` where the same tree of bools is True; dicts that are left empty go too."""
    kept = {}
    for name, node in tree.items():
        if isinstance(node, dict):
            inner = select(node, mask[name])
            kept |= {name: inner} if inner else {}
        elif mask[name]:
            kept[name] = node
    return kept


def overlay(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """All leaves of both; where both have one, that of `high`."""
    merged = dict(low)
    for name, node in high.items():
        both = isinstance(node, dict) and isinstance(low.get(name), dict)
        merged[name] = overlay(low[name], node) if both else node
    return merged


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path."""
    flat = {}
    for name, node in tree.items():
        flat |= flatten(node, f"{prefix}{name}.") if isinstance(node, dict) else {f"{prefix}{name}": node}
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The tree whose `flatten` is this."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
