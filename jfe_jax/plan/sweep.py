"""Compares plans: searches meshes, remat policies and chunk counts, and scales the batch with the number of chips.

Every compilation runs in a separate process, so that one that does not finish can be stopped at a time limit. Its
result is stored in a file, so that an interrupted search resumes.
"""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jfe_jax import config as configs
from jfe_jax.config import Config
from jfe_jax.errors import UserError
from jfe_jax.plan import flops
from jfe_jax.plan.aot_compile import scale_batch
from jfe_jax.plan.topology import Topology

# Share of a tower layer's forward FLOPs that the backward pass recomputes. The last product of a layer is never
# recomputed. "up" and "dots" save more activations.
_RECOMPUTED_SHARE = {"none": 0.0, "dots": 0.05, "up": 0.40, "full": 0.70}


@dataclass(frozen=True)
class SettingsCandidate:
    """A setting to try, with its memory in bytes and its step time in seconds, both estimated before compilation."""

    overrides: tuple[str, ...]
    memory: float
    seconds: float

    def agrees(self, given: dict[str, str]) -> bool:
        """Returns True if no value in `given`, by key, conflicts with this setting; -1 leaves a mesh axis open."""
        overrides = map(_split_override, self.overrides)
        return all(given.get(key, value) in (value, "-1") for key, value in overrides)


def _split_override(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("-").partition("=")
    return key, value


class PlanRunner:
    """Makes each plan in a separate process.

    Args:
      config: YAML file of the config.
      overrides: Overrides of the config, for all plans.
      out: Directory to store results in; None stores none.
      timeout: Time limit per plan, in seconds.
      say: Callback for progress lines.
    """

    def __init__(self, config: str, overrides: list[str], out: Path | None, timeout: int, say: Callable[[str], None]):
        self.config, self.overrides, self.out, self.timeout, self.say = config, list(overrides), out, timeout, say

    def plan(self, topology: Topology, overrides: tuple[str, ...]) -> dict[str, Any]:
        """Makes the plan, or {"fits": False, "problem": reason}."""
        extra = [*self.overrides, *overrides]
        # The training step only: the embedding step needs less memory and compute.
        command = [
            sys.executable,
            "-m",
            "jfe_jax.cli.main",
            "plan",
            "--config",
            self.config,
            "--json",
            "--step",
            "train",
        ]
        name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
        command += ["--config", self.config, "--topology", name, "--slices", str(topology.slices), *extra]
        result_file = self._result_file(topology, extra)
        if result_file and result_file.is_file():
            return json.loads(result_file.read_text(encoding="utf-8"))
        if result_file:
            command += ["--out", str(result_file.with_suffix(""))]
        self.say(f"{topology} {' '.join(overrides)}")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.timeout, check=False)
        except subprocess.TimeoutExpired:
            return {"topology": str(topology), "fits": False, "problem": f"not compiled within {self.timeout} s"}
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        plan = json.loads(done.stdout) if done.stdout.strip() else {"fits": False, "problem": last}
        if result_file and done.stdout.strip():
            result_file.parent.mkdir(parents=True, exist_ok=True)
            partial = result_file.with_suffix(".partial")
            partial.write_text(json.dumps(plan, indent=2), encoding="utf-8")
            partial.replace(result_file)
        return plan

    def _result_file(self, topology: Topology, extra: list[str]) -> Path | None:
        if self.out is None:
            return None
        resolved = configs.to_yaml(configs.load(self.config, extra))
        digest = hashlib.sha256(f"{topology}\n{resolved}".encode()).hexdigest()[:12]
        return self.out / f"{topology.chip.name}-{topology.chips}-{digest}.json"


def search_settings(runner: PlanRunner, config: Config, topology: Topology, limit: int) -> list[dict[str, Any]]:
    """Compiles the `limit` most promising settings and returns table rows: first those that fit, fastest first.

    Values that the runner's overrides set are not varied.

    Raises:
      UserError: No mesh of the topology's chips is compatible with the config and the overrides.
    """
    given = dict(map(_split_override, runner.overrides))
    candidates = sorted(
        (candidate for candidate in enumerate_settings(config, topology) if candidate.agrees(given)),
        key=lambda candidate: (candidate.memory > topology.chip.hbm_bytes, candidate.seconds, candidate.memory),
    )
    if not candidates:
        raise UserError(
            f"no mesh of {topology.chips} chips evenly divides both the weights and the batch; change the batch or the "
            "overrides"
        )
    runner.say(f"{len(candidates)} settings; compiling {min(limit, len(candidates))}")
    rows = [
        make_table_row(runner.plan(topology, candidate.overrides), " ".join(candidate.overrides))
        for candidate in candidates[:limit]
    ]
    return sorted(rows, key=lambda row: (not row["fits"], -row.get("mfu_serial", 0.0)))


def enumerate_settings(config: Config, topology: Topology) -> Iterator[SettingsCandidate]:
    """Yields every mesh, remat policy and chunk count that divides weights and batch, with rough estimates."""
    chips, data = topology.chips, config.data
    width = math.gcd(config.model.vision.width, config.model.text.width)
    heads = math.gcd(config.model.vision.num_heads, config.model.text.num_heads)
    size = _ModelSize.of(config)
    for tensor in (n for n in (1, 2, 4, 8) if heads % n == 0):
        for fsdp in (n for n in range(1, width + 1) if width % n == 0 and chips % (n * tensor) == 0):
            groups = chips // tensor
            for chunks in (1, 2, 4, 8):
                if any(count % (groups * chunks) for count in (data.pairs, data.rows, data.image_slots)):
                    continue
                # Only the `data` axis spans slices.
                if (chips // (fsdp * tensor)) % topology.slices:
                    continue
                for remat in _RECOMPUTED_SHARE:
                    yield SettingsCandidate(
                        (
                            f"--mesh.data={chips // (fsdp * tensor)}",
                            f"--mesh.fsdp={fsdp}",
                            f"--mesh.tensor={tensor}",
                            f"--model.remat={remat}",
                            f"--loss.grad_cache_chunks={chunks}",
                        ),
                        _estimate_memory(config, size, fsdp, tensor, groups, chunks, remat),
                        _estimate_seconds(config, topology, size, fsdp, tensor, chunks, remat),
                    )


def plan_scaling(runner: PlanRunner, config: Config, topology: Topology) -> list[dict[str, Any]]:
    """Plans from 16 to 1024 chips, with the batch proportional to the number of chips (weak scaling).

    Raises:
      UserError: The config's batch cannot be scaled to one of the sizes.
    """
    rows = []
    for scaled_topology in _scaling_topologies(topology):
        scaled = scale_batch(config, scaled_topology.chips / topology.chips)
        plan = runner.plan(scaled_topology, (*batch_overrides(scaled), "--mesh.data=-1"))
        rows.append(make_table_row(plan, f"{scaled.data.pairs} pairs"))
    return rows


def batch_overrides(config: Config) -> tuple[str, ...]:
    """Returns the size of a config's batch as command-line overrides."""
    return tuple(f"--data.{key}={getattr(config.data, key)}" for key in ("pairs", "rows", "image_slots"))


def _scaling_topologies(topology: Topology) -> Iterator[Topology]:
    chip = topology.chip
    flat = [(4, 4), (8, 8), (16, 16)]
    deep = [(2, 2, 4), (4, 4, 4), (4, 8, 8), (8, 8, 8), (8, 8, 16)]
    for shape in flat if chip.dimensions == 2 else deep:
        yield Topology(chip, shape)
    if chip.dimensions == 2:
        # A slice has at most 256 chips.
        yield from (Topology(chip, (16, 16), slices) for slices in (2, 4))


def make_table_row(plan: dict[str, Any], label: str) -> dict[str, Any]:
    """Summarizes a plan as a table row."""
    if not plan["fits"]:
        return {"topology": plan.get("topology", ""), "what": label, "fits": False, "problem": plan["problem"]}
    line, train = plan["train"]["roofline"], plan["train"]
    return {
        "topology": plan["topology"],
        "chips": plan["chips"],
        "what": label,
        "fits": True,
        "peak_gib": plan["memory"]["peak"] / 2**30,
        "hbm_gib": plan["memory"]["hbm"] / 2**30,
        "sent_gib": math.fsum(item["sent"] for item in train["collectives"]) / 2**30,
        "compute_ms": line["compute"] * 1e3,
        "hbm_ms": line["hbm"] * 1e3,
        "interconnect_ms": line["interconnect"] * 1e3,
        "mfu_overlapped": line["mfu_overlapped"],
        "mfu_serial": line["mfu_serial"],
        "compile_seconds": train["compile_seconds"],
        "compile_cpu_seconds": train["compile_cpu_seconds"],
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows of `make_table_row` as a Markdown table."""
    lines = [
        "| topology | what | peak GiB | sent GiB | compute / HBM / interconnect ms | MFU overlapped / serial "
        "| compiled in s (CPU) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        start = f"| {row['topology']} | {row['what'].replace('--', '')} | "
        if not row["fits"]:
            lines.append(f"{start}{row['problem'].split(';')[0]} | | | | |")
            continue
        lines.append(
            f"{start}{row['peak_gib']:.2f} of {row['hbm_gib']:.0f} | {row['sent_gib']:.2f} | {row['compute_ms']:.0f} / "
            f"{row['hbm_ms']:.0f} / {row['interconnect_ms']:.0f} | {row['mfu_overlapped']:.1%} / "
            f"{row['mfu_serial']:.1%} | {row['compile_seconds']:.0f} ({row['compile_cpu_seconds']:.0f}) |"
        )
    return "\n".join(lines)


class _ModelSize(NamedTuple):
    """Size of a config's model: all and trained parameters, and FLOPs of a training step and of its forward pass."""

    parameters: int
    trained: int
    step: float
    forward: float

    @classmethod
    def of(cls, config: Config) -> "_ModelSize":
        from jfe_jax.models.abstract_model import shapes_of
        from jfe_jax.models.layers.blocks import count_parameters, logical_axes
        from jfe_jax.train.optimizer import trained_mask
        from jfe_jax.utils.pytrees import select

        _, shapes = shapes_of(config.model)
        trained = select(shapes, trained_mask(config, logical_axes(shapes))["model"])
        return cls(
            count_parameters(shapes),
            count_parameters(trained),
            flops.count_training_flops(config),
            flops.count_embedding_flops(config),
        )


def _estimate_memory(
    config: Config, size: _ModelSize, fsdp: int, tensor: int, groups: int, chunks: int, remat: str
) -> float:
    # Parameters; two moments and gradients of the trained ones; saved activations; the working memory of one layer,
    # with a few copies of its MLP activations.
    text, data = config.model.text, config.data
    bytes_each = 2 if config.model.dtype == "bfloat16" else 4
    tokens = data.rows * data.row_tokens / groups / chunks
    mlp, width = text.mlp_dim / tensor, text.width
    saved = {"full": width, "up": width + mlp, "dots": 6 * width + 2 * mlp, "none": 12 * width + 6 * mlp}[remat]
    state = (4 * size.parameters + 12 * size.trained) / (fsdp * tensor)
    return state + bytes_each * tokens * (text.depth * saved + 6 * mlp + 8 * width)


def _estimate_seconds(
    config: Config, topology: Topology, size: _ModelSize, fsdp: int, tensor: int, chunks: int, remat: str
) -> float:
    # Compute and interconnect without overlap: weights are all-gathered for every pass and chunk, gradients are
    # reduce-scattered.
    chip = topology.chip
    recomputed = _RECOMPUTED_SHARE[remat] + (1.0 if chunks > 1 else 0.0)
    compute = (size.step + recomputed * size.forward) / topology.chips / chip.flops
    # The token embedding table stays sharded (see `parallel.fsdp.sharded_embedding_lookup`).
    gathered = size.parameters - config.model.text.vocab_size * config.model.text.width
    fsdp_bytes = (2 * 2 + 2 * (chunks > 1)) * gathered + 4 * min(size.trained, gathered)
    fsdp_bytes = fsdp_bytes / tensor * chunks * (fsdp > 1)
    tokens = config.data.rows * config.data.row_tokens * tensor / topology.chips
    # Two all-reduces of the residual stream per layer, each in the forward, recomputed and backward pass.
    tensor_bytes = 0.0 if tensor == 1 else 2 * 2 * 5 * config.model.text.depth * tokens * config.model.text.width
    data_bytes = 8 * size.trained / (fsdp * tensor)
    dcn_seconds = 0.0 if topology.slices == 1 else data_bytes / 16 / chip.dcn
    return compute + (fsdp_bytes + tensor_bytes + data_bytes) / (2 * chip.link) + dcn_seconds
