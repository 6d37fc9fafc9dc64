"""Writes the JobSet that runs one stage of training on TPU slices of a GKE cluster.

    python launch/gke_jobset.py --topology v5e:16x16 --slices 2 --image IMAGE --config FILE > jobset.yaml
    python launch/gke_jobset.py … --apply              hands it to kubectl
    python launch/gke_jobset.py … --apply --dry-run    prints what would be handed over, and how

The cluster needs the JobSet controller and a node pool of the topology; the image needs jfe_jax with its `tpu` extra
and, under its working directory, the config. `gke_jobset.yaml` beside this file is what it writes without options.
"""

import argparse
import math
import subprocess
import sys
from typing import Any

import yaml

# GKE's names of accelerators; a host of each has four chips once a slice spans several hosts.
ACCELERATORS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
CHIPS_PER_HOST = 4
# Preempted machines have half a minute: what a checkpoint of a pod's share takes, and some more.
GRACE_SECONDS = 120


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="jfe")
    parser.add_argument("--topology", default="v5e:16x16", help="as v5e:16x16, v5p:4x4x8")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--image", default="IMAGE", help="container image")
    parser.add_argument("--config", default="configs/paligemma_3b/stage2.yaml")
    parser.add_argument("--spot", action="store_true", help="machines that may be taken away at any time")
    parser.add_argument("--restarts", type=int, default=100, help="how often a preempted run starts again")
    parser.add_argument("--apply", action="store_true", help="kubectl apply instead of printing")
    parser.add_argument("--dry-run", action="store_true", help="with --apply: print the command and its input")
    args, overrides = parser.parse_known_args()
    unknown = [one for one in overrides if not one.startswith("--") or "=" not in one]
    if unknown:
        parser.error(f"{' '.join(unknown)}: overrides of the config are written --key.sub=value")
    try:
        text = yaml.safe_dump(jobset(args, overrides), sort_keys=False, width=120)
    except ValueError as error:
        parser.error(str(error))
    command = ["kubectl", "apply", "-f", "-"]
    if args.apply and not args.dry_run:
        return subprocess.run(command, input=text, text=True, check=False).returncode
    print((f"# {' '.join(command)}\n" if args.apply else "") + text, end="")
    return 0


def jobset(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """The manifest as a tree. Raises ValueError for a topology that there is not."""
    chip, _, shape = args.topology.partition(":")
    sides = shape.split("x")
    if chip not in ACCELERATORS or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(f"--topology {args.topology}: write it as v5e:16x16; chips: {', '.join(ACCELERATORS)}")
    chips = math.prod(map(int, sides))
    hosts = max(1, chips // CHIPS_PER_HOST)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[chip],
        "cloud.google.com/gke-tpu-topology": shape,
    }
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    container = {
        "name": "jfe",
        "image": args.image,
        # A run that saved and stopped because its machine was taken is not done: Kubernetes is to start it again.
        "command": ["jfe", "train", "--config", args.config, "--stopped-status", "75", *overrides],
        # jax finds the slice's other hosts by what GKE sets in each pod.
        "env": [{"name": "JFE_DISTRIBUTED", "value": "1"}],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"limits": {"google.com/tpu": min(chips, CHIPS_PER_HOST)}},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": selector,
        "containers": [container],
    }
    job = {"parallelism": hosts, "completions": hosts, "backoffLimit": 0, "template": {"spec": pod}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": args.name,
            # One slice, one node pool.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            # A host that is gone stops all: the set starts again, and the run goes on from its newest checkpoint.
            "failurePolicy": {"maxRestarts": args.restarts},
            "replicatedJobs": [{"name": "slice", "replicas": args.slices, "template": {"spec": job}}],
        },
    }


if __name__ == "__main__":
    sys.exit(main())
