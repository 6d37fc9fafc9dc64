"""Several plans side by side: which mesh, remat policy and chunks to choose; how a batch grows with the chips.

Every compilation is a process of its own, so that one that the compiler does not finish ends at its time limit, and its
result is a file, so that a search that was stopped goes on where it was.
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

# Of what the forward pass computes in a layer of the tower, the share that the backward pass computes again. The last
# product of a layer is never needed again; "up" and "dots" keep more.
_RECOMPUTED_SHARE = {"none": 0.0, "dots": 0.05, "up": 0.40, "full": 0.70}


@dataclass(frozen=True)
class SettingsCandidate:
    """A setting to try, with what is expected of it before anything is compiled."""

    overrides: tuple[str, ...]
    memory: float
    seconds: float

    def agrees(self, given: dict[str, str]) -> bool:
        """Whether none of `given`, by key, says otherwise; -1 leaves an axis of the mesh open."""
        own = (_split_override(one) for one in self.overrides)
        return all(given.get(key, value) in (value, "-1") for key, value in own)


def _split_override(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("-").partition("=")
    return key, value


class PlanRunner:
    """Plans in processes of their own.

    Args:
      config: the YAML file; `overrides` come after it.
      out: where results are kept; None keeps none.
      timeout: seconds for each.
      say: takes progress lines.
    """

    def __init__(self, config: str, overrides: list[str], out: Path | None, timeout: int, say: Callable[[str], None]):
        self.config, self.overrides, self.out, self.timeout, self.say = config, list(overrides), out, timeout, say

    def plan(self, topology: Topology, overrides: tuple[str, ...]) -> dict[str, Any]:
        """The plan, or {"fits": False, "problem": why not}."""
        extra = [*self.overrides, *overrides]
        # The embedding step needs less of everything.
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
        kept = self._file(topology, extra)
        if kept and kept.is_file():
            return json.loads(kept.read_text(encoding="utf-8"))
        if kept:
            command += ["--out", str(kept.with_suffix(""))]
        self.say(f"{topology} {' '.join(overrides)}")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.timeout, check=False)
        except subprocess.TimeoutExpired:
            return {"topology": str(topology), "fits": False, "problem": f"not compiled within {self.timeout} s"}
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        plan = json.loads(done.stdout) if done.stdout.strip() else {"fits": False, "problem": last}
        if kept and done.stdout.strip():
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(".partial")
            partial.write_text(json.dumps(plan, indent=2), encoding="utf-8")
            partial.replace(kept)
        return plan

    def _file(self, topology: Topology, extra: list[str]) -> Path | None:
        if self.out is None:
            return None
        resolved = configs.to_yaml(configs.load(self.config, extra))
        digest = hashlib.sha256(f"{topology}\n{resolved}".encode()).hexdigest()[:12]
        return self.out / f"{topology.chip.name}-{topology.chips}-{digest}.json"


def search_settings(runner: PlanRunner, config: Config, topology: Topology, limit: int) -> list[dict[str, Any]]:
    """Compiles the `limit` most promising settings; what fits first, the fastest first.

    What the runner's overrides say stays as it is.

    Raises:
      UserError: no mesh of the topology's chips goes with the config and the overrides.
    """
    given = dict(_split_override(one) for one in runner.overrides)
    candidates = sorted(
        (one for one in enumerate_settings(config, topology) if one.agrees(given)),
        key=lambda one: (one.memory > topology.chip.hbm_bytes, one.seconds, one.memory),
    )
    if not candidates:
        raise UserError(f"no mesh of {topology.chips} chips divides both the weights and the batch as it should")
    runner.say(f"{len(candidates)} settings; compiling {min(limit, len(candidates))}")
    rows = [make_table_row(runner.plan(topology, one.overrides), " ".join(one.overrides)) for one in candidates[:limit]]
    return sorted(rows, key=lambda one: (not one["fits"], -one.get("mfu_serial", 0.0)))


def enumerate_settings(config: Config, topology: Topology) -> Iterator[SettingsCandidate]:
    """Every mesh, remat policy and number of chunks that divides weights and batch, with a rough estimate."""
    chips, data = topology.chips, config.data
    whole = math.gcd(config.model.vision.width, config.model.text.width)
    heads = math.gcd(config.model.vision.num_heads, config.model.text.num_heads)
    size = _ModelSize.of(config)
    for tensor in (n for n in (1, 2, 4, 8) if heads % n == 0):
        for fsdp in (n for n in range(1, whole + 1) if whole % n == 0 and chips % (n * tensor) == 0):
            groups = chips // tensor
            for chunks in (1, 2, 4, 8):
                if any(count % (groups * chunks) for count in (data.pairs, data.rows, data.image_slots)):
                    continue
                # Slices meet on `data` alone.
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
    """From 16 to 1024 chips, the batch growing with them.

    Raises:
      UserError: the config's batch cannot be divided as far.
    """
    rows = []
    for one in _scaling_topologies(topology):
        larger = scale_batch(config, one.chips / topology.chips)
        rows.append(
            make_table_row(runner.plan(one, (*batch_overrides(larger), "--mesh.data=-1")), f"{larger.data.pairs} pairs")
        )
    return rows


def batch_overrides(config: Config) -> tuple[str, ...]:
    """The size of a config's batch, as overrides."""
    return tuple(f"--data.{key}={getattr(config.data, key)}" for key in ("pairs", "rows", "image_slots"))


def _scaling_topologies(topology: Topology) -> Iterator[Topology]:
    chip = topology.chip
    flat = [(4, 4), (8, 8), (16, 16)]
    deep = [(2, 2, 4), (4, 4, 4), (4, 8, 8), (8, 8, 8), (8, 8, 16)]
    for shape in flat if chip.dimensions == 2 else deep:
        yield Topology(chip, shape)
    if chip.dimensions == 2:
        # One slice ends at 256 chips.
        yield from (Topology(chip, (16, 16), slices) for slices in (2, 4))


def make_table_row(plan: dict[str, Any], label: str) -> dict[str, Any]:
    """A plan in one line of a table."""
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
    """A Markdown table of `row`s."""
    lines = [
        "| topology | what | peak GiB | sent GiB | compute / HBM / interconnect ms | MFU overlapped / serial "
        "| compiled in s (CPU) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for one in rows:
        start = f"| {one['topology']} | {one['what'].replace('--', '')} | "
        if not one["fits"]:
            lines.append(f"{start}{one['problem'].split(';')[0]} | | | | |")
            continue
        lines.append(
            f"{start}{one['peak_gib']:.2f} of {one['hbm_gib']:.0f} | {one['sent_gib']:.2f} | {one['compute_ms']:.0f} / "
            f"{one['hbm_ms']:.0f} / {one['interconnect_ms']:.0f} | {one['mfu_overlapped']:.1%} / "
            f"{one['mfu_serial']:.1%} | {one['compile_seconds']:.0f} ({one['compile_cpu_seconds']:.0f}) |"
        )
    return "\n".join(lines)


class _ModelSize(NamedTuple):
    """Of a config's model: parameters, those that are trained, and FLOPs of a step and of its forward pass."""

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
        moving = select(shapes, trained_mask(config, logical_axes(shapes))["model"])
        return cls(
            count_parameters(shapes),
            count_parameters(moving),
            flops.count_training_flops(config),
            flops.count_embedding_flops(config),
        )


def _estimate_memory(
    config: Config, size: _ModelSize, fsdp: int, tensor: int, groups: int, chunks: int, remat: str
) -> float:
    # Parameters; two moments and the gradients of what is trained; kept activations; one layer at work, its MLP in a
    # few copies.
    text, data = config.model.text, config.data
    bytes_each = 2 if config.model.dtype == "bfloat16" else 4
    tokens = data.rows * data.row_tokens / groups / chunks
    mlp, width = text.mlp_dim / tensor, text.width
    kept = {"full": width, "up": width + mlp, "dots": 6 * width + 2 * mlp, "none": 12 * width + 6 * mlp}[remat]
    state = (4 * size.parameters + 12 * size.trained) / (fsdp * tensor)
    return state + bytes_each * tokens * (text.depth * kept + 6 * mlp + 8 * width)


def _estimate_seconds(
    config: Config, topology: Topology, size: _ModelSize, fsdp: int, tensor: int, chunks: int, remat: str
) -> float:
    # Compute and interconnect one after the other: weights gathered for every pass and chunk, gradients scattered.
    chip = topology.chip
    again = _RECOMPUTED_SHARE[remat] + (1.0 if chunks > 1 else 0.0)
    work = (size.step + again * size.forward) / topology.chips / chip.flops
    travelling = size.parameters - config.model.text.vocab_size * config.model.text.width
    gathered = (2 * 2 + 2 * (chunks > 1)) * travelling + 4 * min(size.trained, travelling)
    moved = gathered / tensor * chunks * (fsdp > 1)
    tokens = config.data.rows * config.data.row_tokens * tensor / topology.chips
    # Two all-reduces of the residual stream in a layer, forward, again and back.
    exchanged = 0.0 if tensor == 1 else 2 * 2 * 5 * config.model.text.depth * tokens * config.model.text.width
    reduced = 8 * size.trained / (fsdp * tensor)
    slow = 0.0 if topology.slices == 1 else reduced / 16 / chip.dcn
    return work + (moved + exchanged + reduced) / (2 * chip.link) + slow
