"""The same random weights in JAX and in PyTorch, each made where it is to lie: a number is a function of its place.

Both sides hash parameter and index with integers, so that nothing of 3 B parameters has to be carried from one process
to another.
"""

import math
import zlib
from typing import Any

from jfe_jax.hf import mapping
from jfe_jax.utils.pytrees import flatten, unflatten

# Finalizer of MurmurHash3 (Appleby 2011, public domain): 32 bits in, 32 well mixed bits out.
_FIRST, _SECOND = 0x85EBCA6B, 0xC2B2AE35


def for_jax(abstract: dict[str, Any]) -> dict[str, Any]:
    """Parameters of our model on their devices.

    Args:
      abstract: the tree of ShapeDtypeStructs with shardings, as `Blueprint.abstract`.
    """
    import jax
    import jax.numpy as jnp

    scales = _scales(shapes_of(abstract))

    def leaf(name: str, want: Any) -> jax.Array:
        def make() -> jax.Array:
            if name not in scales:
                return jnp.full(want.shape, _constant(name), want.dtype)
            x = jax.lax.iota(jnp.uint32, want.size) + jnp.uint32(_seed(name))
            x = (x ^ (x >> 16)) * jnp.uint32(_FIRST)
            x = (x ^ (x >> 13)) * jnp.uint32(_SECOND)
            unit = ((x ^ (x >> 16)) >> 8).astype(jnp.float32) * 2.0**-24 - 0.5
            return (unit * scales[name]).reshape(want.shape)

        return jax.jit(make, out_shardings=want.sharding)()

    return unflatten({name: leaf(name, want) for name, want in flatten(abstract).items()})


def into_torch(model: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Fills transformers' PaliGemmaModel with the same numbers, on the device where its parameters are.

    Args:
      model: a torch.nn.Module.
      shapes: of our parameters, see `shapes_of`.
    """
    import torch

    scales = _scales(shapes)
    with torch.no_grad():
        for parameter, piece in pieces(model, shapes):
            parameter.copy_(_theirs(piece, _make(piece, scales, parameter.device)))


def pieces(model: Any, shapes: dict[str, tuple[int, ...]]) -> list[tuple[Any, mapping.Piece]]:
    """Every parameter of transformers' model and what it is of ours.

    Raises:
      ValueError: one of ours is not there.
    """
    known = mapping.pieces(shapes)
    found = [(parameter, known.pop(mapping.canonical(name))) for name, parameter in model.named_parameters()]
    if known:
        raise ValueError(f"transformers' model lacks {', '.join(known)}")
    return found


def ours(piece: mapping.Piece, tensor: Any) -> Any:
    """A torch tensor in our order, as a view."""
    if piece.entry.convolution:
        return tensor.permute(2, 3, 1, 0)
    return (tensor.T if piece.entry.inner else tensor).reshape(piece.shape)


def shapes_of(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter by dotted path."""
    return {name: leaf.shape for name, leaf in flatten(tree).items()}


def _make(piece: mapping.Piece, scales: dict[str, float], device: Any) -> Any:
    # In our order.
    import torch

    name, size = piece.entry.ours, math.prod(piece.shape)
    if name not in scales:
        return torch.full(piece.shape, _constant(name), device=device)
    mask = 0xFFFFFFFF
    x = torch.arange(size, device=device) + (_seed(name) + (piece.layer or 0) * size)
    x &= mask
    for shift, factor in ((16, _FIRST), (13, _SECOND)):
        # The low 32 bits of a product that overflows 64 are right all the same.
        x = ((x ^ (x >> shift)) * factor) & mask
    unit = ((x ^ (x >> 16)) >> 8).to(torch.float32) * 2.0**-24 - 0.5
    return (unit * scales[name]).reshape(piece.shape)


def _theirs(piece: mapping.Piece, tensor: Any) -> Any:
    entry, shape = piece.entry, piece.shape
    if entry.convolution:
        return tensor.permute(3, 2, 0, 1)
    if entry.inner:
        return tensor.reshape(math.prod(shape[: entry.inner]), -1).T
    return tensor.reshape(entry.their_shape(shape))


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def _scales(shapes: dict[str, tuple[int, ...]]) -> dict[str, float]:
    # Width of uniform numbers of variance 1 / inputs, for matrices and tables; what is left out is constant.
    scales = {}
    for piece in mapping.pieces(shapes).values():
        entry, shape = piece.entry, piece.shape
        inner = 3 if entry.convolution else entry.inner
        if len(shape) > 1 and "bias" not in entry.ours:
            scales[entry.ours] = math.sqrt(12 / math.prod(shape[:inner] if inner else shape[-1:]))
    return scales


def _constant(name: str) -> float:
    # Layer norms' scales are ones, everything else is added to something.
    return float(name.startswith("vision.") and name.endswith("scale_d"))
