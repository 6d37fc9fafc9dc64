"""What every device runs on its own part of the arrays, because the compiler cannot split it: kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jfe_jax.parallel.sharding import activation_spec, auto_axes


def shard_kernel(
    function: Callable[..., jax.Array], in_axes: Sequence[Sequence[str | None]], out_axes: Sequence[str | None]
) -> Callable[..., jax.Array]:
    """`function` run by every device on its own part of arguments and result, for what the compiler cannot split.

    Inside a `shard_map` the backward pass computes the function again.

    Args:
      function: of arrays, whose first has the result's shape.
      in_axes, out_axes: logical names of each argument's and of the result's axes.
    """

    def mapped(function: Callable[..., Any], names: Sequence[Any], out: Any) -> Callable[..., Any]:
        # A kernel does not say on which devices its results differ: nothing is checked, and inside another shard_map
        # it has to be said afterwards.
        mesh = jax.sharding.get_abstract_mesh()

        def run(*args: jax.Array) -> Any:
            specs = [activation_spec(axes, x.shape) for axes, x in zip(names, args, strict=True)]
            outs = jax.tree.map(lambda place: specs[place], out)
            run = jax.shard_map(
                function, in_specs=tuple(specs), out_specs=outs, axis_names=auto_axes(mesh), check_vma=False
            )
            if not mesh.manual_axes:
                return run(*args)
            return jax.tree.map(lambda x: jax.lax.pcast(x, mesh.manual_axes, to="varying"), run(*args))

        return run

    def forward(*args: jax.Array) -> jax.Array:
        return mapped(lambda *args: function(*args[:-1]), [*in_axes, out_axes], len(args))(*args, args[0])

    def backward(args: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array | None, ...]:
        real = [place for place, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)]

        def own(*args: jax.Array) -> tuple[jax.Array, ...]:
            # A product made in here says nothing about devices, as a kernel's result does not: so the gradient that is
            # asked for and the one that is given are of one type.
            *args, gradient = (x * jnp.ones((), x.dtype) for x in args)

            def of_real(*given: jax.Array) -> jax.Array:
                return function(*(given[real.index(place)] if place in real else x for place, x in enumerate(args)))

            found = jax.vjp(of_real, *(args[place] for place in real))[1](gradient)
            # What is whole on several devices has a part of its gradient from each.
            return tuple(jax.lax.psum(x, shared[place]) for x, place in zip(found, real, strict=True))

        free = auto_axes(jax.sharding.get_abstract_mesh())
        specs = [activation_spec(axes, x.shape) for axes, x in zip(in_axes, args, strict=True)]
        shared = [tuple(free - {*jax.tree.leaves(tuple(spec))}) for spec in specs]
        found = mapped(own, [*in_axes, out_axes], tuple(real))(*args, gradient)
        return tuple(found[real.index(place)] if place in real else None for place in range(len(args)))

    def run(*args: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        if not auto_axes(mesh):
            return function(*args)
        if not mesh.manual_axes:
            return forward(*args)
        nested = jax.custom_vjp(forward)
        nested.defvjp(lambda *args: (forward(*args), args), backward)
        return nested(*args)

    return run
