"""Makes a plan: the memory, FLOPs and traffic of one config on one topology, as plain values and as text."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jfe_jax.config import Config
from jfe_jax.plan import flops
from jfe_jax.plan.aot_compile import CompiledProgram, OutOfMemory, compile_embedding_step, compile_train_step
from jfe_jax.plan.buffer_assignment import describe_buffer
from jfe_jax.plan.collectives import find_collectives
from jfe_jax.plan.hlo import HloModule
from jfe_jax.plan.hlo_costs import count_hlo_costs
from jfe_jax.plan.roofline import ASSUMPTIONS, compute_roofline
from jfe_jax.plan.topology import GroupLinks, Topology, find_links

GIB = 2**30


def make_plan(
    config: Config,
    topology: Topology,
    logs: Path,
    say: Callable[[str], None],
    keep: Path | None = None,
    embedding: bool = True,
) -> dict[str, Any]:
    """Compiles and analyzes the training step and, optionally, the embedding step.

    Args:
      config: The config that `jfe train` would run.
      topology: The TPU slices to compile for, after `aot_compile.configure_libtpu` was called for them.
      logs: Directory of libtpu's log files.
      say: Callback for progress lines.
      keep: Directory to write the programs' HLO to.
      embedding: If true, compile the embedding step too.

    Returns:
      A tree of plain values; `format_plan` formats it. "fits" is true if the step compiles within a chip's memory.
      Otherwise "problem" gives the needed and the available memory.

    Raises:
      UserError: The config and the topology are incompatible.
    """
    from jfe_jax.parallel import sharding
    from jfe_jax.train import train_state

    mesh = sharding.make_mesh(config.mesh, topology.devices())
    abstract = train_state.make_train_setup(config, mesh).abstract
    groups = sharding.group_count(mesh)
    data, chunks = config.data, config.loss.grad_cache_chunks
    plan: dict[str, Any] = {
        "topology": str(topology),
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "batch": {"pairs": data.pairs, "rows": data.rows, "row_tokens": data.row_tokens, "images": data.image_slots},
        "per_group": {name: getattr(data, name) / groups for name in ("pairs", "rows", "image_slots")},
        "remat": config.model.remat,
        "grad_cache_chunks": chunks,
        "dtype": config.model.dtype,
        "memory": {
            "hbm": topology.chip.hbm_bytes,
            "parameters": _count_tree_bytes(abstract.params),
            "optimizer": _count_tree_bytes(abstract.optimizer),
        },
        "unsplit": _find_replicated(abstract.params, mesh),
    }

    def links_of(group: tuple[int, ...]) -> GroupLinks:
        devices = [mesh.devices.flat[number] for number in group]
        return find_links(topology, [(getattr(device, "slice_index", 0) or 0, device.coords) for device in devices])

    def analyze(name: str, program: CompiledProgram, model_flops: float) -> dict[str, Any]:
        say(f"{name}: compiled in {program.seconds:.0f} s")
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{name.replace(' ', '_')}.hlo.txt").write_text(program.hlo)
        module = HloModule(program.hlo)
        costs, collectives = count_hlo_costs(module), find_collectives(module)
        return {
            "compile_seconds": round(program.seconds, 1),
            "compile_cpu_seconds": round(program.cpu_seconds, 1),
            "model_flops": model_flops / topology.chips,
            "executed_flops": costs.flops,
            "hbm_traffic": costs.bytes,
            "collectives": [
                {key: value for key, value in asdict(item).items() if key != "group"}
                | {"chips": len(item.group), "links": links_of(item.group).axes}
                for item in collectives
            ],
            "roofline": asdict(compute_roofline(topology, costs, collectives, links_of, model_flops)),
            "rematerialized": list(program.warnings),
        }

    memory = plan["memory"]
    try:
        say(f"compiling the training step for {topology}")
        program = compile_train_step(config, mesh, logs)
    except OutOfMemory as error:
        return plan | {"fits": False, "problem": str(error), "largest": list(error.largest)}
    memory |= {
        "arguments": program.arguments,
        "temporaries": program.temporaries,
        "program": program.code,
        "peak": program.peak,
        "loss": program.buffers.temporaries("loss"),
        "loss_on_chip": program.buffers.temporaries("loss", space=1),
        "largest": [describe_buffer(value) for value in program.buffers.largest(5)],
    }
    plan["train"] = analyze("training step", program, flops.count_training_flops(config))
    if embedding:
        program = compile_embedding_step(config, mesh, logs)
        memory["embedding_peak"] = program.peak
        plan["embed"] = analyze("embedding step", program, flops.count_embedding_flops(config))
    return plan | {"fits": True}


def format_plan(plan: dict[str, Any]) -> str:
    """Formats a plan for people, without the "problem" of a plan that does not fit, which the caller reports."""
    memory, batch = plan["memory"], plan["batch"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    each = plan["per_group"]
    lines = [
        f"{plan['topology']}, {plan['chips']} chips; mesh {mesh}",
        f"batch {batch['pairs']} pairs in {batch['rows']} rows of {batch['row_tokens']} tokens, {batch['images']} "
        f"images; a group has {each['pairs']:g} pairs, {each['rows']:g} rows, {each['image_slots']:g} images",
        f"remat {plan['remat']}, GradCache chunks {plan['grad_cache_chunks']}, {plan['dtype']}",
        "",
        "GiB per chip",
        *(
            f"  {name.replace('_', ' '):16s}{memory[name] / GIB:8.2f}"
            for name in ("parameters", "optimizer", "arguments", "temporaries", "program", "peak", "hbm")
            if name in memory
        ),
    ]
    if plan["fits"]:
        share = memory["loss"] / max(memory["temporaries"], 1)
        lines += [
            f"  the loss has {memory['loss'] / GIB:.3f} GiB of temporaries at its peak, {share:.1%} of the step's, and "
            f"{memory['loss_on_chip'] / 2**20:.0f} MiB in on-chip memory",
            f"  largest buffers at the memory peak: {'; '.join(memory['largest'])}",
        ]
        if "embed" in plan:
            lines.append(f"  peak of the embedding step: {memory['embedding_peak'] / GIB:.2f}")
    unsplit = plan["unsplit"]
    lines += ["", f"replicated on every chip: {unsplit['share']:.2%} of the parameters' bytes"]
    lines += [f"  {leaf['name']:48s}{leaf['bytes'] / 2**20:10.2f} MiB" for leaf in unsplit["largest"]]
    if not plan["fits"]:
        return "\n".join(lines)
    for title, key in (("Training step", "train"), ("Embedding step", "embed")):
        if key in plan:
            lines += ["", *_format_step(title, plan[key])]
    return "\n".join([*lines, "", "Assumptions", *(f"  {assumption}" for assumption in ASSUMPTIONS)])


def _format_step(title: str, step: dict[str, Any]) -> list[str]:
    line = step["roofline"]
    collectives = step["collectives"]
    lines = [
        f"{title} (compiled in {step['compile_seconds']:.0f} s, {step['compile_cpu_seconds']:.0f} s of CPU)",
        f"  TFLOP per chip: model {step['model_flops'] / 1e12:.1f}, executed {step['executed_flops'] / 1e12:.1f}",
        f"  ms: compute {line['compute'] * 1e3:.1f}, HBM {line['hbm'] * 1e3:.1f} "
        f"({step['hbm_traffic'] / GIB:.0f} GiB), interconnect {line['interconnect'] * 1e3:.1f}; "
        f"bound by {line['bound']}",
        f"  MFU at most {line['mfu_overlapped']:.1%} overlapped, {line['mfu_serial']:.1%} serial",
        f'  arrays copied to change layout ("involuntary full rematerialization"): {len(step["rematerialized"])}',
        "  collectives per chip             array                      runs     MiB full   MiB sent  links",
    ]
    for item in collectives:
        if item["bytes"] >= 2**20:
            label = f"{item['kind']} of {item['chips']}"
            lines.append(
                f"    {label:28s} {item['array']:24s} {item['count']:6.0f} {item['bytes'] / 2**20:12.1f} "
                f"{item['sent'] / 2**20:10.1f}  {item['links']:6s} {item['what']}"
            )
    small = [item for item in collectives if item["bytes"] < 2**20]
    lines.append(
        f"    {len(small)} others under 1 MiB, {math.fsum(item['sent'] for item in small) / 2**20:.1f} MiB sent"
    )
    lines.append(f"    all: {math.fsum(item['sent'] for item in collectives) / GIB:.2f} GiB sent per chip")
    return lines


def _count_tree_bytes(tree: Any) -> int:
    import jax

    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _find_replicated(params: Any, mesh: Any) -> dict[str, Any]:
    from jfe_jax.models.abstract_model import named_leaves, nbytes, unsplit

    whole = sorted(unsplit(params, mesh), key=lambda one: -one[1])
    total = sum(nbytes(leaf) for _, leaf in named_leaves(params))
    return {
        "share": sum(size for _, size in whole) / total,
        "largest": [{"name": name, "bytes": size} for name, size in whole[:8]],
    }
