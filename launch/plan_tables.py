"""The README's table of stage 2 at 3 B parameters: what its compiled step needs on TPU slices, at fixed work per chip.

v5e from 16 to 1024 chips (beyond 256 over several slices), v5p and v6e. Results are kept in runs/plan, or the folder
given; what is there is not compiled again. Minutes for each; needs `pip install 'jax[tpu]'`.
"""

import sys
from pathlib import Path

from jfe_jax import config as configs
from jfe_jax.plan import search
from jfe_jax.plan.compile import scaled
from jfe_jax.plan.topology import Topology

CONFIG = "configs/paligemma_3b/stage2.yaml"
# The config's batch is for so many chips.
CHIPS = 256
TOPOLOGIES = [
    ("v5e:16x16", 1),
    ("v6e:16x16", 1),
    ("v5p:4x4x4", 1),
    ("v5e:16x16", 2),
    ("v5e:8x8", 1),
    ("v5e:4x4", 1),
    ("v5e:16x16", 4),
]


def main(out: Path) -> None:
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    config = configs.load(CONFIG)
    runner = search.Runner(CONFIG, [], out, timeout=3600, say=say)
    rows = []
    for name, slices in TOPOLOGIES:
        topology = Topology.parse(name, slices)
        data = scaled(config, topology.chips / CHIPS).data
        batch = tuple(f"--data.{key}={getattr(data, key)}" for key in ("pairs", "rows", "image_slots"))
        rows.append(search.row(runner.plan(topology, batch), f"{data.pairs} pairs"))
        say(search.as_text(rows[-1:]).splitlines()[-1])
    rows.sort(key=lambda row: (row["topology"].split(":")[0].split()[-1], row.get("chips", 0)))
    print(search.as_text(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/plan"))
