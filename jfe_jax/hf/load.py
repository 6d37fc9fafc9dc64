"""Reads a Hugging Face PaliGemma directory, single file or sharded, without torch or transformers.

The headers of the files are checked first, all of them; then any part of any parameter can be read, and no more of the
files than that part.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from jfe_jax.checkpoint.streaming import Index, StreamedArray
from jfe_jax.config import Config, MeshConfig, ModelConfig
from jfe_jax.errors import UserError
from jfe_jax.hf import mapping
from jfe_jax.hf.safetensors_io import DTYPES, INDEX, SINGLE, tensor_starts
from jfe_jax.hf.settings import read_config
from jfe_jax.models.abstract_model import blueprint, named_leaves, shapes_of
from jfe_jax.parallel.sharding import make_mesh, path_name

_LOG = logging.getLogger(__name__)


class HfWeights(NamedTuple):
    """A directory's weights, checked and not read.

    Attributes:
      config: `model` and `tokens` as the directory says, the rest default.
      arrays: every parameter by its dotted path, in the type it is stored in.
      prefixes: how the files spell the three parts' names, as `mapping.prefixes`.
    """

    config: Config
    arrays: dict[str, StreamedArray]
    prefixes: dict[str, str]


class _Stored(NamedTuple):
    """A tensor of a file, whose numbers begin at byte `start`."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def read(self, index: Index) -> np.ndarray:
        """A view of the file's own pages. Opened anew each time: whoever keeps it keeps what was read in memory."""
        try:
            return np.memmap(self.file, self.dtype, "r", self.start, self.shape)[index].view(np.ndarray)
        except (ValueError, OSError) as error:
            raise UserError(f"{self.file}: cannot read {self.name} ({error})") from error


def open_hf(directory: str | Path) -> HfWeights:
    """Checks a directory that transformers wrote.

    Raises:
      UserError: a file is missing or damaged; or a tensor of the files has no place, a parameter no tensor, or the two
        another shape, or a tensor is no floating-point number: all of them are listed.
    """
    directory = Path(directory)
    config = read_config(directory)
    shapes = parameter_shapes(config.model)
    pieces = mapping.pieces(shapes)
    problems: list[str] = []
    stored: dict[str, _Stored] = {}
    names: list[str] = []
    for file in weight_files(directory):
        try:
            with safe_open(file, "numpy") as tensors:
                starts = tensor_starts(file)
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    known = mapping.canonical(name)
                    if known is None:
                        continue
                    problem = _problem(name, tensors.get_slice(name), pieces.get(known), known in stored)
                    problems += [problem] if problem else []
                    names.append(name)
                    tensor = tensors.get_slice(name)
                    dtype = DTYPES.get(tensor.get_dtype(), DTYPES["F32"])
                    stored[known] = _Stored(file, name, dtype, tuple(tensor.get_shape()), starts[name])
        except SafetensorError as error:
            raise UserError(f"{file}: damaged ({error}); copy it again") from error
    problems += [f"{name} is missing" for name in pieces if name not in stored]
    by_path: dict[str, list[str]] = {}
    for name, piece in pieces.items():
        by_path.setdefault(piece.entry.ours, []).append(name)
    for layers in by_path.values():
        dtypes = {stored[name].dtype for name in layers if name in stored}
        if len(dtypes) > 1:
            problems.append(f"the layers of {pieces[layers[0]].entry.theirs} have types {', '.join(map(str, dtypes))}")
    if problems:
        raise UserError(f"{directory}: the weights do not fit config.json: {'; '.join(problems)}")
    arrays = {
        path: _array(shapes[path], [(pieces[name], stored[name]) for name in layers])
        for path, layers in by_path.items()
    }
    return HfWeights(config, arrays, mapping.prefixes(names))


def load_hf(directory: str | Path, mesh: Mesh | None = None) -> tuple[Config, nnx.State]:
    """Opens a directory that transformers wrote.

    Args:
      mesh: where the parameters are to lie; None is the first device. Each device's share is read for itself.

    Returns:
      The configuration and the parameters, float32, in the tree of `nnx.split(build_model(config.model, …))`. Stored
      bfloat16 or float16 is widened, which loses nothing.

    Raises:
      UserError: as `open_hf`.
    """
    weights = open_hf(directory)
    plan = blueprint(weights.config.model, mesh or make_mesh(MeshConfig(data=1)))

    def leaf(path: Any, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        array = weights.arrays[path_name(path)]

        def read(index: Index) -> np.ndarray:
            whole = tuple(slice(*one.indices(size)[:2]) for one, size in zip(index, array.shape, strict=True))
            return array.read(whole).astype(abstract.dtype, copy=False)

        return jax.make_array_from_callback(abstract.shape, abstract.sharding, read)

    return weights.config, nnx.State(jax.tree_util.tree_map_with_path(leaf, plan.abstract))


def weight_files(directory: Path) -> list[Path]:
    """Lists the safetensors files that hold a directory's weights, by transformers' precedence.

    A single `model.safetensors` comes before an index of shards. Weights that are passed over are logged.

    Raises:
      UserError: There is none, or one that the index names is missing.
    """
    files = _weight_files(directory)
    unused = sorted({path.name for path in directory.glob("*.safetensors")} - {path.name for path in files})
    if unused:
        _LOG.warning(
            "%s: the weights are those of %s, which transformers loads too; not read: %s",
            directory,
            files[0].name if len(files) == 1 else INDEX,
            _shortened(unused),
        )
    return files


def _weight_files(directory: Path) -> list[Path]:
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).exists():
        try:
            names = sorted(set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{directory / INDEX}: not an index of safetensors ({error})") from error
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise UserError(f"{directory}: {INDEX} names files that are not there: {_shortened(missing)}")
        return [directory / name for name in names]
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{directory}: only pickled weights ({_shortened(pickles)}), and opening those can run any code; "
            "save them as safetensors with transformers' save_pretrained"
        )
    raise UserError(f"{directory}: no {SINGLE} and no {INDEX}")


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each of a model's parameters by dotted path; no array is made."""
    return {path: leaf.shape for path, leaf in named_leaves(shapes_of(model)[1])}


def _problem(name: str, tensor: Any, piece: mapping.Piece | None, twice: bool) -> str | None:
    """What is wrong with a tensor of a file."""
    if piece is None:
        return f"{name} is unknown"
    if twice:
        return f"{name} is there twice"
    if tensor.get_dtype() not in DTYPES:
        return f"{name} has type {tensor.get_dtype()}, not {' or '.join(DTYPES)}"
    shape, wanted = tuple(tensor.get_shape()), piece.entry.their_shape(piece.shape)
    return None if shape == wanted else f"{name} has shape {list(shape)}, not {list(wanted)}"


def _array(shape: tuple[int, ...], layers: list[tuple[mapping.Piece, _Stored]]) -> StreamedArray:
    """One parameter, read from the tensors of its layers."""

    dtype = layers[0][1].dtype

    def fill(index: Index, out: np.ndarray) -> None:
        if layers[0][0].layer is None:
            own, outs = layers, [out]
        else:
            own, index, outs = layers[index[0]], index[1:], list(out)
        for (piece, stored), one in zip(own, outs, strict=True):
            piece.entry.part(piece.shape, index, stored.read, one)

    def read(index: Index) -> np.ndarray:
        out = np.empty([one.stop - one.start for one in index], dtype)
        fill(index, out)
        return out

    return StreamedArray(shape, dtype, read, fill)
