"""The launchers under stub commands: what they would run is what is meant to run."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture
def stubs(tmp_path):
    """Puts programs on PATH that append their arguments, one line a call, to `calls`; gives (environment, calls)."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), "HOME": str(tmp_path)}

    def add(**bodies):
        for name, body in bodies.items():
            program = programs / name
            program.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "$CALLS"\n{textwrap.dedent(body)}')
            program.chmod(0o755)
        return environment, calls

    return add


def bash(script, *arguments, environment=None, **variables):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env=(environment or dict(os.environ)) | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_shell_scripts_pass_shellcheck():
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), LAUNCH.parent / ".ci" / "run"]
    assert len(scripts) >= 6
    done = subprocess.run([shutil.which("shellcheck"), *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


POD = {"NAME": "pod", "ZONE": "us-west4-a", "TYPE": "v5litepod-256"}


@pytest.mark.parametrize(
    ("verb", "variables", "wanted"),
    [
        (["create"], {}, ["--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite --node-id=pod"]),
        (["create"], {"SLICES": "2", "SPOT": "1"}, ["--node-count=2 --node-prefix=pod --spot"]),
        (["install"], {"SLICES": "2"}, ["git archive", "tpu-vm scp", "pod-0:jfe.tar.gz", "pod-1:jfe.tar.gz"]),
        (["run", "train", "--config", "c.yaml"], {}, ["ssh pod --zone=us-west4-a --worker=all", "train"]),
        (["logs"], {"SLICES": "2"}, ["ssh pod-0 --zone=us-west4-a --worker=0"]),
        (["stop"], {"SLICES": "2"}, ["ssh pod-0", "ssh pod-1", "kill"]),
        (["delete"], {"PROJECT": "mine"}, ["queued-resources delete pod --zone=us-west4-a --project=mine --force"]),
    ],
)
def test_tpu_vm_says_what_it_would_run_and_runs_nothing(stubs, verb, variables, wanted):
    environment, calls = stubs(gcloud="exit 1", git="exit 1")
    done = bash("tpu_vm.sh", "--dry-run", *verb, environment=environment, **POD, **variables)
    assert done.returncode == 0, done.stderr
    for part in wanted:
        assert part in done.stdout
    assert not calls.exists()


def test_tpu_vm_waits_until_the_slices_are_there(stubs):
    states = """
        case "$*" in
          *describe*) if [ -e "$HOME/asked" ]; then echo ACTIVE; else touch "$HOME/asked"; echo PROVISIONING; fi ;;
        esac
    """
    environment, calls = stubs(gcloud=states, sleep="")
    done = bash("tpu_vm.sh", "create", environment=environment, **POD)
    assert done.returncode == 0 and done.stdout == "pod: PROVISIONING\n", done.stderr
    assert [line.split()[4] for line in calls.read_text().splitlines() if "gcloud" in line] == [
        "create",
        "describe",
        "describe",
    ]


def test_what_tpu_vm_starts_gets_its_arguments_and_the_signal(stubs, tmp_path):
    """The remote commands run here, in a home of their own, with a `jfe` that tells what it was given."""
    environment, _ = stubs(gcloud='for one in "$@"; do [[ $one != --command=* ]] || bash -c "${one#--command=}"; done')
    jfe = tmp_path / "jfe" / ".venv" / "bin" / "jfe"
    jfe.parent.mkdir(parents=True)
    jfe.write_text(
        '#!/usr/bin/env bash\ntrap "echo saved; exit" TERM\nprintf "<%s>" "$JFE_DISTRIBUTED" "$@"\n'
        "while :; do sleep 0.05; done\n"
    )
    jfe.chmod(0o755)
    log = tmp_path / "jfe" / "run.log"

    def wait_for(text):
        until = time.monotonic() + 20
        while text not in (log.read_text() if log.exists() else "") and time.monotonic() < until:
            time.sleep(0.05)
        assert text in log.read_text()

    done = subprocess.run(
        ["bash", str(LAUNCH / "tpu_vm.sh"), "run", "train", "--config", "a b.yaml", "--init="],
        env=environment | POD,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 0
    wait_for("<1><train><--config><a b.yaml><--init=>")
    subprocess.run(["bash", str(LAUNCH / "tpu_vm.sh"), "stop"], env=environment | POD, cwd=tmp_path, timeout=60)
    wait_for("saved")


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [([], {}, "set NAME and ZONE"), (["fly"], POD, "one of create"), (["run"], POD, "run what?")],
)
def test_tpu_vm_refuses_what_it_cannot_do(arguments, variables, said):
    done = bash("tpu_vm.sh", *arguments, **variables)
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.parametrize(
    ("note", "again"), [("runs/x: stopped at step 5 of 9, saved; run it again to continue", True), ("finished", False)]
)
def test_slurm_runs_a_process_for_each_gpu_and_asks_for_its_next_turn(stubs, note, again):
    environment, calls = stubs(srun=f'[ "$JFE_DISTRIBUTED" = 1 ] && echo "{note}"', scontrol="")
    done = bash(
        "slurm.sbatch", "--config", "c.yaml", "--mesh.fsdp=8", environment=environment, SLURM_JOB_ID="7", JFE="/x/jfe"
    )
    assert done.returncode == 0 and note in done.stdout, done.stderr
    wanted = ["srun --kill-on-bad-exit=1 /x/jfe train --config c.yaml --mesh.fsdp=8"]
    assert calls.read_text().splitlines() == wanted + ["scontrol requeue 7"] * again


def test_slurm_fails_with_its_step(stubs):
    environment, calls = stubs(srun="exit 3", scontrol="")
    assert bash("slurm.sbatch", "--config", "c", environment=environment, SLURM_JOB_ID="7").returncode == 3
    assert "scontrol" not in calls.read_text()
    dry = bash("slurm.sbatch", "--dry-run", "--config", "c", environment=environment, JFE="/x/jfe")
    assert dry.stdout.strip() == "env JFE_DISTRIBUTED=1 srun --kill-on-bad-exit=1 /x/jfe train --config c"
    assert bash("slurm.sbatch", environment=environment).returncode == 2


def gke(*arguments):
    return subprocess.run([sys.executable, str(LAUNCH / "gke_jobset.py"), *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "hosts", "chips"),
    [(["--topology", "v5e:16x16", "--slices", "2"], 64, 4), (["--topology", "v5p:4x4x8"], 32, 4)],
)
def test_the_jobs_of_the_manifest_are_valid(arguments, hosts, chips):
    done = gke(*arguments, "--image", "mine", "--spot", "--mesh.fsdp=16")
    tree = yaml.safe_load(done.stdout)
    (jobs,) = tree["spec"]["replicatedJobs"]
    # The set is an extension; what it makes are Kubernetes' own jobs.
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": jobs["template"]["spec"]}
    kubernetes_validate.validate(job, "1.30", strict=True)
    assert jobs["replicas"] == (2 if "--slices" in arguments else 1)
    assert jobs["template"]["spec"]["parallelism"] == jobs["template"]["spec"]["completions"] == hosts
    (container,) = jobs["template"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == chips
    assert container["command"][-1] == "--mesh.fsdp=16" and container["command"][:2] == ["jfe", "train"]


def test_the_manifest_beside_the_script_is_what_it_writes():
    assert gke().stdout == (LAUNCH / "gke_jobset.yaml").read_text()
    assert gke("--apply", "--dry-run").stdout == f"# kubectl apply -f -\n{gke().stdout}"
    for arguments, said in ((["--topology", "v9:4"], "chips: v5e, v5p, v6e"), (["--mesh.fsdp"], "--key.sub=value")):
        done = gke(*arguments)
        assert done.returncode == 2 and said in done.stderr


def local(*arguments):
    return [sys.executable, str(LAUNCH / "local.py"), *arguments]


def test_local_starts_processes_that_can_find_each_other():
    show = 'echo $JFE_PROCESS of $JFE_PROCESSES $JFE_COORDINATOR $(echo $XLA_FLAGS | grep -o "count=3")'
    done = subprocess.run(
        local("--processes", "2", "--devices", "3", "--", "bash", "-c", show), capture_output=True, text=True
    )
    lines = sorted(done.stdout.splitlines())
    assert done.returncode == 0 and len(lines) == 2
    port = lines[0].split()[3]
    assert lines == [f"0 of 2 {port} count=3", f"[1] 1 of 2 {port} count=3"] and port.startswith("127.0.0.1:")


def test_local_ends_the_others_when_one_fails():
    begun = time.monotonic()
    done = subprocess.run(local("--processes", "2", "--", "bash", "-c", "[ $JFE_PROCESS = 0 ] && sleep 60; exit 3"))
    assert done.returncode == 3 and time.monotonic() - begun < 30


def test_local_hands_signals_on():
    script = 'trap "echo saved; exit" TERM; echo ready; while :; do sleep 0.05; done'
    command = local("--processes", "2", "--", "bash", "-c", script)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert {running.stdout.readline(), running.stdout.readline()} == {"ready\n", "[1] ready\n"}
        running.send_signal(signal.SIGTERM)
        assert sorted(running.stdout.read().split("\n")) == ["", "[1] saved", "saved"]
        assert running.wait(timeout=20) == 0
