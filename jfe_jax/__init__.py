"""Joint Fusion Encoder: one early-fusion tower that embeds text, images and both, for retrieval.

from jfe_jax import Item, Retriever
embeddings = Retriever.load("runs/jfe").encode([Item(text="a red car", image=Path("car.png"))])
"""

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jfe_jax.data.item import Item
    from jfe_jax.embedding.retriever import Retriever

__all__ = ["Item", "Retriever", "__version__"]


def __getattr__(name: str) -> Any:
    # Resolved on first use: `jfe --help` must not wait for jax.
    if name == "__version__":
        return metadata.version("jfe-jax")
    if name == "Item":
        from jfe_jax.data.item import Item

        return Item
    if name == "Retriever":
        from jfe_jax.embedding.retriever import Retriever

        return Retriever
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
