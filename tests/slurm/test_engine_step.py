"""An engine of another environment in a Slurm job: its driver in the batch shell, its ranks a step of their own."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from spin_megatron.config_file import load_config
from spin_megatron.generation.engine import Environment
from spin_megatron.launch.resources import check_resources
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import read_manifest
from spin_megatron.stage_table import StageRef, folder_of
from tests.doubles.installation import H100, Site, skip_where_paths_are_split
from tests.slurm.cluster_run import REPOSITORY, ClusterRun
from tests.tiny_run import make_tiny_run, spin_megatron
from tools.local_slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

# As upstream's does: rank 0 runs the command, which it splits at spaces; the others serve it until it has ended.
LAUNCH = """
echo "$SLURM_PROCID of $SLURM_NTASKS" >> "$STARTED"
if [ "$SLURM_PROCID" = 0 ]; then TLLM_SPAWN_PROXY_PROCESS=1 $*; touch "$STARTED.$SLURM_STEP_ID"; exit; fi
while [ ! -e "$STARTED.$SLURM_STEP_ID" ]; do sleep 0.1; done
"""


def run_job(run: ClusterRun, ref: StageRef, variables: dict[str, str]) -> str:
    """Run a stage as its job does, less the GPUs that no node here has; returns the job's log."""
    root = run.layout.root
    script, log = root / "job.sh", root / f"{ref.name}.log"
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    body = f"exec {shlex.quote(sys.executable)} -m spin_megatron.launch.supervise {shlex.quote(str(root))} {ref.name} 0\n"
    script.write_text(f"#!/bin/bash\n{exports}{body}")
    shape = ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2", "--array=0-0", f"--output={log}", f"--chdir={REPOSITORY}"]
    job = run.slurm("sbatch", "--parsable", *shape, str(script)).strip()
    # `sbatch --wait` looks after 2, 8 and 32 seconds.
    run.wait(lambda: run.job_state(f"{job}_0") in ("COMPLETED", "FAILED"), f"the end of {ref}")
    return log.read_text()


def prepared(cluster: Cluster, folder: Path, environment: Environment, engine: dict[str, object]) -> ClusterRun:
    """A run of which theta_0 and the prompts are there. engine: its settings."""
    settings = {
        "generate.environment.python": environment.python,
        "generate.environment.prefix": list(environment.prefix),
        "generate.environment.variables": list(environment.variables),
        "parallel.pipeline": 1,
        **engine,
    }
    tiny_run = make_tiny_run(folder / "model", head_dim=32)  # the smallest that vLLM takes on a CPU
    config = load_config(tiny_run, [f"{name}={json.dumps(value)}" for name, value in settings.items()])
    check_resources(config)
    layout = RunLayout(folder / "it's an \"engine\" run")
    layout.root.mkdir()
    layout.run_json.write_text(config.model_dump_json())
    for verb in ("export", "prepare"):
        done = spin_megatron(verb, "--run-dir", layout.root, "--iteration", "0")
        assert done.returncode == 0, done.stderr
    return ClusterRun(cluster, layout)


def test_two_ranks_build_and_answer_in_steps_of_a_job_with_one_task(cluster: Cluster, tmp_path: Path) -> None:
    skip_where_paths_are_split()
    site, started = Site(tmp_path / "site"), tmp_path / "started"
    site.gpus(H100, H100)
    site.program("trtllm-llmapi-launch", LAUNCH)
    engine = {
        "generate.engine": "trtllm-engine",
        "generate.dtype": "bfloat16",
        "generate.options.tensor_parallel": 2,
        "slurm.stages.build-engine.gpus_per_node": 2,
        "slurm.stages.generate.gpus_per_node": 2,
    }
    run = prepared(cluster, tmp_path, site.environment(f"STARTED={started}", "DOUBLE_IN_FLIGHT=16"), engine)
    layout = run.layout
    # This Slurm has no pmix, which the real launcher needs and the double does not.
    variables = {"SPIN_ENGINE_SRUN_OPTIONS": "--mpi=none"}
    log = run_job(run, StageRef("build-engine", 0), variables)
    engine = folder_of(layout, StageRef("build-engine", 0))
    manifest = read_manifest(engine)
    assert manifest is not None, log
    assert {"rank0.engine", "rank1.engine"} <= {output.path for output in manifest.outputs}
    log = run_job(run, StageRef("generate", 0, 0), variables)
    answered = read_manifest(folder_of(layout, StageRef("generate", 0, 0)))
    assert answered is not None, log
    assert answered.summary["responses"] == 40
    assert answered.summary["engine"]["version"] == "1.2.1"
    # Two ranks to build and two to answer; looking what is there took one process each, without the launcher.
    assert sorted(started.read_text().splitlines()) == ["0 of 2", "0 of 2", "1 of 2", "1 of 2"]




def test_vllm_answers_on_a_cluster_that_has_neither_gpus_nor_pmix(cluster: Cluster, tmp_path: Path) -> None:
    site = Site(tmp_path / "site")
    site.gpus()
    run = prepared(cluster, tmp_path, site.environment("DOUBLE_IN_FLIGHT=16"), {"generate.engine": "vllm"})
    for ref in (StageRef("build-engine", 0), StageRef("generate", 0, 0)):
        log = run_job(run, ref, {})
        manifest = read_manifest(folder_of(run.layout, ref))
        assert manifest is not None, log
    assert manifest.summary["responses"] == 40
    assert manifest.summary["engine"]["engine"] == "vllm"
