"""Every path of a run directory, and nothing else knows one.

run_dir/ config.toml  run.json  run.lock  slurm/
  data/                       prompts.parquet  held_out.parquet  report.json
  models/theta_0/ theta_1/    Hugging Face folders
  iter_0/ engine/  generate/shard_00000/{part_*.parquet}  pairs/  train/{reference,checkpoints}  evaluate/
          benchmark/task_00000/
          logs/<stage>/attempt_1/rank_0.log   slurm_jobs.json
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from spin_megatron.run.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class RunLayout:
    """Paths below one run directory. Methods take the SPIN iteration t, from 0."""

    root: Path

    @property
    def quoted(self) -> str:
        """The run directory as a word of the commands that a person is told to type."""
        return shlex.quote(str(self.root))

    @property
    def config_toml(self) -> Path:
        return self.root / "config.toml"

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def lock(self) -> Path:
        return self.root / "run.lock"

    @property
    def slurm(self) -> Path:
        return self.root / "slurm"

    @property
    def changes_json(self) -> Path:
        """The sections that a started run may change, as the last `run` or `submit` had them."""
        return self.root / "changes.json"

    @property
    def submit_lock(self) -> Path:
        return self.slurm / "submit.lock"

    @property
    def slurm_progress(self) -> Path:
        """What `advance` last saw done, and how often in a row it saw nothing new."""
        return self.slurm / "progress.json"

    @property
    def slurm_failures(self) -> Path:
        """One JSON line a failed element."""
        return self.slurm / "failures.jsonl"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def prompts(self) -> Path:
        return self.data / "prompts.parquet"

    @property
    def held_out(self) -> Path:
        return self.data / "held_out.parquet"

    @property
    def data_report(self) -> Path:
        return self.data / "report.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def theta(self, iteration: int) -> Path:
        """Folder of the export stage that makes theta_{iteration}."""
        return self.root / "models" / f"theta_{iteration}"

    def adapter(self, iteration: int) -> Path:
        """What [lora] trained on top of theta_{iteration - 1}, as PEFT reads it; theta_{iteration} has it merged in."""
        return self.theta(iteration) / "adapter"

    def iteration(self, iteration: int) -> Path:
        return self.root / f"iter_{iteration}"

    def engine(self, iteration: int) -> Path:
        return self.iteration(iteration) / "engine"

    def engine_record(self, iteration: int) -> Path:
        """What generate will run, in words and digests."""
        return self.engine(iteration) / "engine.json"

    def generate(self, iteration: int) -> Path:
        return self.iteration(iteration) / "generate"

    def shard(self, iteration: int, shard: int) -> Path:
        return self.generate(iteration) / f"shard_{shard:05d}"

    def shard_identity(self, iteration: int, shard: int) -> Path:
        """What the part files of an unfinished shard were made from; parts of something else are not continued."""
        return self.shard(iteration, shard) / "identity.json"

    def shard_work(self, iteration: int, shard: int) -> Path:
        """What an engine keeps while it answers a shard; gone when the shard is done."""
        return self.shard(iteration, shard) / "work"

    def part(self, iteration: int, shard: int, number: int) -> Path:
        return self.shard(iteration, shard) / f"part_{number:05d}.parquet"

    def pairs(self, iteration: int) -> Path:
        return self.iteration(iteration) / "pairs"

    def train_pairs(self, iteration: int) -> Path:
        return self.pairs(iteration) / "train.parquet"

    def held_out_pairs(self, iteration: int) -> Path:
        return self.pairs(iteration) / "held_out.parquet"

    def train_packs(self, iteration: int) -> Path:
        return self.pairs(iteration) / "train_packs.parquet"

    def held_out_packs(self, iteration: int) -> Path:
        return self.pairs(iteration) / "held_out_packs.parquet"

    def pairs_report(self, iteration: int) -> Path:
        return self.pairs(iteration) / "report.json"

    def train(self, iteration: int) -> Path:
        return self.iteration(iteration) / "train"

    def reference(self, iteration: int) -> Path:
        return self.train(iteration) / "reference"

    def checkpoints(self, iteration: int) -> Path:
        return self.train(iteration) / "checkpoints"

    def final_weights(self, iteration: int) -> Path:
        """Weights-only distributed checkpoint of theta_{t+1}, which export reads."""
        return self.train(iteration) / "weights"

    def probe(self, iteration: int) -> Path:
        """Log-probabilities of a few held-out pairs under the final weights; export compares its reload with them."""
        return self.train(iteration) / "probe.parquet"

    def reference_scores(self, iteration: int) -> Path:
        return self.reference(iteration) / "train.parquet"

    def held_out_reference_scores(self, iteration: int) -> Path:
        return self.reference(iteration) / "held_out.parquet"

    def metrics(self, iteration: int) -> Path:
        return self.train(iteration) / "metrics.jsonl"

    def train_events(self, iteration: int) -> Path:
        """TensorBoard events of an iteration's updates: a run of its own, since each iteration counts steps from 0."""
        return self.tensorboard / f"iter_{iteration}"

    @property
    def held_out_events(self) -> Path:
        """TensorBoard events of the evaluations, a point an iteration."""
        return self.tensorboard / "held_out"

    def evaluate(self, iteration: int) -> Path:
        return self.iteration(iteration) / "evaluate"

    def evaluation(self, iteration: int) -> Path:
        return self.evaluate(iteration) / "metrics.json"

    def benchmark(self, iteration: int, task: int) -> Path:
        """task: its number in evaluate.lm_eval_tasks."""
        return self.iteration(iteration) / "benchmark" / f"task_{task:05d}"

    def benchmark_result(self, iteration: int, task: int) -> Path:
        return self.benchmark(iteration, task) / "results.json"

    def logs(self, stage: str, iteration: int, shard: int | None = None) -> Path:
        """Folder of a stage's attempts."""
        folder = self.iteration(iteration) / "logs" / stage
        return folder if shard is None else folder / f"shard_{shard:05d}"

    def stage_lock(self, stage: str, iteration: int, shard: int | None) -> Path:
        return self._signal_file(stage, iteration, shard, "lock")

    def stop_file(self, stage: str, iteration: int, shard: int | None) -> Path:
        """Its existence asks the running stage to save and leave."""
        return self._signal_file(stage, iteration, shard, "stop")

    def heartbeat(self, stage: str, iteration: int, shard: int | None) -> Path:
        """Touched by rank 0 between steps."""
        return self._signal_file(stage, iteration, shard, "heartbeat")

    def _signal_file(self, stage: str, iteration: int, shard: int | None, kind: str) -> Path:
        name = stage if shard is None else f"{stage}_{shard:05d}"
        return self.iteration(iteration) / "locks" / f"{name}.{kind}"

    def redone(self, stamp: str) -> Path:
        """Where stages that are made anew are moved aside."""
        return self.root / "redone" / stamp

    def slurm_jobs(self, iteration: int) -> Path:
        return self.iteration(iteration) / "slurm_jobs.json"

    def all_slurm_jobs(self) -> list[Path]:
        return sorted(self.root.glob("iter_*/slurm_jobs.json"))

    @staticmethod
    def manifest(folder: Path) -> Path:
        return folder / MANIFEST_NAME
