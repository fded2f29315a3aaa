"""A run's config: the sections of `config_sections` together, what they refuse of each other, and one iteration's scalars. No torch.

Settings that may change from one SPIN iteration to the next take a list whose last value repeats; `RunConfig.at(t)` gives the
scalars of iteration t. `config_file` reads a config from a TOML file; a started run reads its frozen run.json, never the TOML again.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from pydantic import model_validator

from spin_megatron.config_sections import (
    DataSection,
    EvaluateSection,
    GenerateSection,
    GuardSection,
    LaunchSection,
    LoraSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    ParallelSection,
    QualitySection,
    RunSection,
    Section,
    SlurmSection,
    StopSection,
    TrainSection,
)

Value = TypeVar("Value")

# Of what training reads: how the work is done, not what comes out.
OPERATIONAL = (
    *("train.save_every_steps", "train.keep_checkpoints", "train.max_skipped_steps"),
    *("train.recompute", "train.recompute_layers", "train.kept_logit_bytes", "train.distributed_optimizer", "optimizer.offload_fraction"),
)
HARNESS = ("lm_eval_tasks", "lm_eval_model_args", "lm_eval_include")
# A started run may be moved to another layout or machine, go on for longer and be measured by more: these sections and settings decide how
# its stages run and which there are, not what one of them gives.
CHANGEABLE = (
    *("run.iterations", "parallel", "launch", "slurm", "quality", "guard", "stop", "generate.environment", "generate.batch_size"),
    *OPERATIONAL,
    *(f"evaluate.{name}" for name in HARNESS),
)
PER_ITERATION = ("data.window", "objective.beta", "optimizer.learning_rate", "train.schedule_epochs", "train.stop_epoch")


@dataclass(frozen=True)
class IterationConfig:
    """The scalars of one SPIN iteration."""

    iteration: int
    window: int
    beta: float
    learning_rate: float
    schedule_epochs: int
    stop_epoch: int


class RunConfig(Section):
    """All sections. Build it with `config_file.load_config` or `config_file.read_frozen`."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    generate: GenerateSection = GenerateSection()
    quality: QualitySection = QualitySection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    lora: LoraSection = LoraSection()
    parallel: ParallelSection = ParallelSection()
    evaluate: EvaluateSection = EvaluateSection()
    stop: StopSection = StopSection()
    guard: GuardSection = GuardSection()
    launch: LaunchSection = LaunchSection()
    slurm: SlurmSection = SlurmSection()

    @model_validator(mode="after")
    def _check_across_fields(self) -> Self:
        for path in PER_ITERATION:
            section, name = path.split(".")
            value = getattr(getattr(self, section), name)
            values = value if isinstance(value, list) else [value]
            if not values:
                raise ValueError(f"{path} is an empty list; give one value, or one an iteration.")
            for item in values:
                if item is not None and item <= 0:
                    raise ValueError(f"{path}={value!r} must be positive.")
        pair_tokens = self.data.max_prompt_tokens + 2 * self.data.max_response_tokens
        if not self.train.share_prompt:
            pair_tokens += self.data.max_prompt_tokens
        if self.train.pack_tokens < pair_tokens:
            raise ValueError(
                f"train.pack_tokens={self.train.pack_tokens} cannot hold the longest pair ({pair_tokens} tokens: data.max_prompt_tokens + "
                "2 x data.max_response_tokens, the prompt twice without train.share_prompt); raise pack_tokens or lower the caps."
            )
        for iteration in range(self.run.iterations):
            scalars = self.at(iteration)
            if scalars.stop_epoch > scalars.schedule_epochs:
                raise ValueError(
                    f"train.stop_epoch={scalars.stop_epoch} is beyond train.schedule_epochs={scalars.schedule_epochs} "
                    f"in iteration {iteration}; lower stop_epoch or drop it."
                )
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        fraction = self.optimizer.offload_fraction
        cures = (
            (
                self.train.dtype == "float32",
                f'train.precision="{self.train.precision}": what the host would hold are fp32 copies of bf16 weights; use "bf16"',
            ),
            (
                not self.train.distributed_optimizer,
                "train.distributed_optimizer=false: Megatron Core offloads the distributed optimizer's shards; use true",
            ),
            (self.lora.rank > 0, f"lora.rank={self.lora.rank}: the state of adapters is too small to gain by it; use 0"),
        )
        for is_refused, cure in cures:
            if fraction and is_refused:
                raise ValueError(f"optimizer.offload_fraction={fraction:g} with {cure}.")
        return self

    def at(self, iteration: int) -> IterationConfig:
        """The scalars of one iteration; a list's last value repeats."""
        schedule_epochs = _at(self.train.schedule_epochs, iteration)
        return IterationConfig(
            iteration=iteration,
            window=_at(self.data.window, iteration),
            beta=_at(self.objective.beta, iteration),
            learning_rate=_at(self.optimizer.learning_rate, iteration),
            schedule_epochs=schedule_epochs,
            stop_epoch=schedule_epochs if self.train.stop_epoch is None else _at(self.train.stop_epoch, iteration),
        )


def _at(value: Value | list[Value], iteration: int) -> Value:
    return value[min(iteration, len(value) - 1)] if isinstance(value, list) else value


@functools.cache
def default_settings() -> Mapping[str, Any]:
    """{"section.key": value} of everything that a config may leave out."""
    required = {"model.path": "m", "data.source": "d"}
    least = {name.partition(".")[0]: {name.partition(".")[2]: value} for name, value in required.items()}
    flat = flat_settings(RunConfig.model_validate(least), tuple(RunConfig.model_fields))
    return {name: value for name, value in flat.items() if name not in required}


def flat_settings(config: RunConfig, sections: Sequence[str]) -> dict[str, Any]:
    """{"section.key": value} of the named sections, for manifests and diffs."""
    values = config.model_dump(mode="json")
    return {f"{section}.{key}": value for section in sections for key, value in values[section].items()}
