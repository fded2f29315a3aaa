"""The sections of a run's config, each a TOML table with its settings, their defaults and what one section alone refuses.

`config` puts them together; `spin-megatron settings` prints them.
"""

import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from spin_megatron.plan.adapters import MODULES, AdapterShape, Target
from spin_megatron.plan.precision import PRECISIONS, REFUSED, PrecisionName
from spin_megatron.plan.shape import ParallelLayout

StageName = Literal["export", "prepare", "build-engine", "generate", "merge", "train", "evaluate", "benchmark"]


class Section(BaseModel):
    """A TOML table: frozen, strict types, finite numbers, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunSection(Section):
    """[run]"""

    name: str = Field("spin", description="of the run, in views, job names and the default of --run-dir")
    seed: int = Field(42, ge=0, lt=2**32, description="every random choice of the run follows from it")
    iterations: int = Field(3, gt=0, description="T: theta_1 ... theta_T are made")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        # It names a folder, stands in a list that squeue splits at commas, and in tables whose markup is in brackets.
        if not re.fullmatch(r"\w[\w .+=-]{0,59}", name):
            raise ValueError(
                f"run.name={name!r} must be 1 to 60 letters, digits, spaces and . _ - + = and begin with a letter or digit; where the "
                "run lives is said by --run-dir."
            )
        return name


class ModelSection(Section):
    """[model]: theta_0."""

    path: str = Field(description="a Hugging Face folder or a converted torch_dist one (relative to the config file), or a hub name")
    revision: str | None = Field(None, description="hub commit; required for a hub name")


class ColumnNames(Section):
    """[data.columns]: only where the usual names of the format do not fit."""

    id: str | None = None
    messages: str | None = None
    system: str | None = None
    prompt: str | None = None
    input: str | None = None
    response: str | None = None


class DataSection(Section):
    """[data]: the supervised set and how it becomes prompts and human answers."""

    source: str = Field(description="a .jsonl, .json or .parquet file or a folder of them (relative to the config file), or a hub name")
    subset: str | None = Field(None, description="the hub's configuration name")
    split: str = Field("train", description="of a hub's data set")
    revision: str | None = Field(None, description="hub commit; required for a hub name")
    format: Literal["auto", "messages", "prompt_response", "alpaca", "sharegpt"] = Field("auto", description="auto: told by the columns")
    columns: ColumnNames = ColumnNames()
    turns: Literal["first", "last"] = Field("first", description="train on the first or on the last assistant turn of a conversation")
    system: str | None = Field(None, description="system turn for conversations that have none; none is added when absent")
    num_examples: int | None = Field(None, gt=0, description="absent: all; nested: the 14k subset lies inside the 26k subset")
    num_held_out: int = Field(256, gt=0, description="pairs that are never trained on")
    max_prompt_tokens: int = Field(1024, gt=0, description="see over_long")
    max_response_tokens: int = Field(1024, gt=0, description="one cap for y and y', so that length does not tell them apart")
    over_long: Literal["drop", "truncate"] = Field("drop", description="cut: the start of a prompt, the end of an answer")
    deduplicate: bool = Field(True, description="keep the first of equal examples")
    window: int | list[int] = Field(2, description="train on the pairs of this many iterations, newest included; per iteration")


class EnvironmentSection(Section):
    """[generate.environment]: where an engine that cannot share our Python is started. It changes no answer.

    The command is launcher, prefix, python, the worker's script, its job: all lists of words, no shell in between. `submit` fills an
    empty launcher with srun and what slurm/env.sh says (SPIN_ENGINE_SRUN_OPTIONS, SPIN_ENGINE_PYTHON).
    """

    python: str = Field("python3", min_length=1, description="the interpreter in which the engine is installed")
    prefix: list[str] = Field(default_factory=list, description='before it, e.g. ["apptainer", "exec", "--nv", "/images/trtllm.sif"]')
    launcher: list[str] = Field(default_factory=list, description="before that: starts {ranks} processes, e.g. srun with its options")
    variables: list[str] = Field(default_factory=list, description='NAME=VALUE for its environment, e.g. ["NCCL_DEBUG=WARN"]')

    @model_validator(mode="after")
    def _check_words(self) -> Self:
        for variable in self.variables:
            if not re.fullmatch(r"[A-Za-z_]\w*=.*", variable, re.DOTALL):
                raise ValueError(f"generate.environment.variables: {variable!r} is not of the form NAME=VALUE.")
        return self


class GenerateSection(Section):
    """[generate]: how theta_t answers."""

    engine: str = Field("builtin", description="one of docs/engines.md")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    temperature: float = Field(1.0, ge=0, description="0 is greedy; the theory samples at 1")
    top_k: int = Field(0, ge=0, description="0 is off")
    top_p: float = Field(1.0, gt=0, le=1, description="1 is off")
    batch_size: int = Field(16, gt=0, description="answers in the making at a time")
    num_shards: int = Field(1, gt=0, description="processes or jobs that share the prompts")
    rows_per_part: int = Field(64, gt=0, description="a part file is written each time this many answers are finished")
    options: dict[str, str | int | float | bool] = Field(default_factory=dict, description="settings of the chosen engine")
    environment: EnvironmentSection = EnvironmentSection()


class QualitySection(Section):
    """[quality]: shares of a shard's answers above which it warns, or stops before they are trained on. They change no answer."""

    on_excess: Literal["warn", "stop"] = Field("warn", description="stop: the stage fails, with the answers that gave rise to it")
    max_empty: float = Field(0.05, ge=0, le=1, description="nothing before EOS")
    max_repeated: float = Field(0.1, ge=0, le=1, description="ends in a loop of at most 16 tokens")
    max_truncated: float = Field(0.5, ge=0, le=1, description="no EOS within data.max_response_tokens")
    max_identical: float = Field(0.2, ge=0, le=1, description="the same words as the answer to another prompt")


class ObjectiveSection(Section):
    """[objective]: the SPIN loss, equation 4.7 of the paper."""

    loss: Literal["logistic", "hinge", "exponential", "correlation"] = Field("logistic", description="docs/reading_a_run.md has them")
    beta: float | list[float] = Field(0.1, description="lambda of the paper; per iteration")
    nll_weight: float = Field(0.0, ge=0, description="weight of an added NLL term on the human answers")
    length_normalised: bool = Field(False, description="divide log-probabilities by the answer's length; off in the paper")


class OptimizerSection(Section):
    """[optimizer]"""

    name: Literal["adamw", "rmsprop"] = "rmsprop"
    learning_rate: float | list[float] = Field(5e-7, description="peak; per iteration")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="of the schedule's updates")
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    rmsprop_alpha: float = Field(0.99, gt=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(None, gt=0, description="absent: no clipping, as in the paper's 7B runs")
    offload_fraction: float = Field(
        0.0, ge=0, le=1, description="share of the main weights and moments that lie in the host's memory and are updated by its cores"
    )


class TrainSection(Section):
    """[train]"""

    precision: PrecisionName = Field("bf16", description="what the decoder multiplies in (plan/precision.py); log-probs and loss are fp32")
    num_bf16_end_layers: int = Field(0, ge=0, description="with FP8: so many of the first and of the last layers stay bf16")
    global_batch_pairs: int = Field(64, gt=0, description="pairs an update")
    pack_tokens: int = Field(4096, gt=0, description="tokens of a micro-batch; whole pairs are packed into it")
    max_pairs_per_pack: int | None = Field(None, gt=0, description="absent: as many as fit")
    share_prompt: bool = Field(True, description="compute a pair's prompt once for both answers")
    schedule_epochs: int | list[int] = Field(2, description="epochs the learning-rate schedule spans; per iteration")
    stop_epoch: int | list[int] | None = Field(None, description="leave after this many epochs of the schedule; per iteration")
    save_every_steps: int = Field(100, gt=0, description="the end of the stage saves in any case")
    keep_checkpoints: int = Field(2, gt=0, description="the newest ones")
    recompute: Literal["none", "selective", "full"] = Field("none", description="products made twice: none, the MLPs' or experts', all")
    recompute_layers: int | None = Field(None, gt=0, description='with "full": only so many layers of each stage; absent: all')
    kept_logit_bytes: int = Field(128 * 2**20, ge=0, description="logits a rank keeps for the backward; the others are made twice")
    distributed_optimizer: bool = Field(True, description="each data rank keeps a part of the optimizer's state")
    max_skipped_steps: int = Field(5, gt=0, description="non-finite updates in a row after which the run stops")

    @field_validator("precision", mode="before")
    @classmethod
    def _say_why_not(cls, value: object) -> object:
        if isinstance(value, str) and value in REFUSED:
            raise ValueError(f'train.precision="{value}": {REFUSED[value]}.')
        return value

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.recompute_layers is not None and self.recompute != "full":
            found = f'train.recompute_layers={self.recompute_layers} with train.recompute="{self.recompute}"'
            raise ValueError(f'{found}: only "full" can be limited to some layers; use that, or leave train.recompute_layers out.')
        if self.num_bf16_end_layers and PRECISIONS[self.precision].fp8_recipe is None:
            found = f'train.num_bf16_end_layers={self.num_bf16_end_layers} with train.precision="{self.precision}"'
            raise ValueError(f"{found}: no layer is FP8 there; use 0, or an FP8 precision.")
        return self

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Of the weights, in memory and as exported."""
        return PRECISIONS[self.precision].dtype


class LoraSection(Section):
    """[lora]: train low-rank adapters beside frozen weights. They are merged into theta_{t+1} on export: each iteration starts anew."""

    rank: int = Field(0, ge=0, description="0: no adapters, every weight is trained")
    alpha: float = Field(32.0, gt=0, description="the adapters' output is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, description="0 alone: reference and policy must compute the same")
    targets: list[Target] = Field(list(MODULES), min_length=1, description="Megatron Core's linear layers: qkv, proj, fc1, fc2")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dropout:
            raise ValueError(
                f"lora.dropout={self.dropout:g} is refused: with dropout the policy before its first update would not be its opponent "
                "theta_t, and no margin could be 0; use 0."
            )
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets={self.targets} names a layer twice; name each once.")
        return self

    def shape(self) -> AdapterShape | None:
        """The adapters' sizes; None when every weight is trained."""
        return AdapterShape(self.rank, tuple(self.targets)) if self.rank else None


class ParallelSection(Section):
    """[parallel]: ranks = tensor x pipeline x data x context."""

    tensor: int = Field(1, gt=0)
    pipeline: int = Field(1, gt=0)
    data: int = Field(1, gt=0)
    sequence: bool = Field(False, description="split what lies between tensor-parallel layers over their ranks as well")
    context: int = Field(1, gt=0, description="ranks that share the tokens of a pack")
    expert: int = Field(1, gt=0, description="ranks that share the experts of a mixture")
    virtual_pipeline: int = Field(1, gt=0, description="parts of the model that a pipeline rank holds")
    stage_layers: tuple[int, ...] = Field((), description="layers of each (virtual) stage, in the model's order; absent: equal")
    overlap: Literal["auto", "on", "off"] = Field(
        "auto", description="reduce gradients and gather weights over data ranks beside computation; auto: on GPUs"
    )

    @model_validator(mode="after")
    def _check_overlap(self) -> Self:
        if self.overlap == "on" and self.data * self.context == 1:
            raise ValueError('parallel.overlap="on" with parallel.data=1 and parallel.context=1: no gradient is reduced; use "auto".')
        return self

    def layout(self) -> ParallelLayout:
        return ParallelLayout(**self.model_dump(exclude={"overlap"}))


class EvaluateSection(Section):
    """[evaluate]: thresholds that warn, and benchmarks. They never change a run's result."""

    max_nll_increase: float = Field(0.1, gt=0, description="nats a token, of the human answers, theta_t to theta_{t+1}")
    max_logp_drop: float = Field(50.0, gt=0, description="nats, mean drop of log p(y) of the human answers")
    max_accuracy: float = Field(0.99, gt=0, le=1, description="held-out accuracy above which the pairs are trivially separable")
    lm_eval_tasks: list[str] = Field(default_factory=list, description="tasks of lm-evaluation-harness, a benchmark each; [eval] extra")
    lm_eval_model_args: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="further arguments of the harness's model, e.g. parallelize = true for several GPUs"
    )
    lm_eval_include: str | None = Field(None, description="folder of further task files (YAML), relative to the config file")


class StopSection(Section):
    """[stop]: rules that end a run before run.iterations, judged on each iteration's held-out pairs. They change no stage's result."""

    min_ln2_minus_loss: float | None = Field(
        None, description="nats; below it theta_{t+1} cannot tell theta_t's answers from human ones: the paper's convergence"
    )
    max_nll_increase: float | None = Field(None, description="nats a token, of the human answers, theta_t to theta_{t+1}")
    max_logp_drop: float | None = Field(None, description="nats, mean drop of log p(y) of the human answers")


class GuardSection(Section):
    """[guard]: signs of a training that goes wrong, judged at each step before its update (objective/guard.py)."""

    on_excess: Literal["warn", "skip", "stop"] = Field("warn", description="skip: leave the update out, as if it were not finite")
    window: int = Field(32, ge=8, description="updates whose median loss and gradient norm a step is compared with")
    max_loss_rise: float | None = Field(1.0, gt=0, description="nats over the median")
    max_grad_norm_ratio: float | None = Field(10.0, gt=1, description="times the median")
    max_logp_drop: float | None = Field(50.0, gt=0, description="nats, mean drop of log p(y) of a step's human answers since theta_t")
    max_margin: float | None = Field(20.0, gt=0, description="nats, beta times a step's mean margin; the loss is flat there")


class LaunchSection(Section):
    """[launch]: processes on one machine."""

    threads_per_process: int = Field(1, gt=0, description="OMP_NUM_THREADS of each rank")
    shard_processes: int = Field(1, gt=0, description="generate shards that run at the same time")


class SlurmStageSection(Section):
    """[slurm.stages.NAME]: what one stage asks Slurm for; NAME is a stage's name, e.g. build-engine."""

    nodes: int = Field(1, gt=0)
    ranks_per_node: int = Field(1, gt=0, description="nodes x ranks_per_node is parallel's number of ranks for train and evaluate, else 1")
    gpus_per_node: int = Field(0, ge=0)
    cpus_per_rank: int = Field(1, gt=0)
    memory: str | None = Field(None, description="as sbatch --mem; '0' is all of a node")
    time: str = Field("01:00:00", description="as sbatch --time")
    partition: str | None = Field(None, description="absent: [slurm] partition")
    max_parallel: int = Field(8, gt=0, description="elements of the generate or benchmark array that run at a time")
    slots: int = Field(4, gt=0, description="length of the train array: each element goes on from the newest checkpoint")
    options: list[str] = Field(default_factory=list, description='further sbatch options, e.g. ["--constraint=h100"]')


class SlurmSection(Section):
    """[slurm]: how `submit` asks for jobs. It never changes a result."""

    gpu: str | None = Field(None, description="the cluster's GPU, as `plan --gpu` names it: a layout that cannot fit on it is refused")
    partition: str | None = None
    account: str | None = None
    options: list[str] = Field(default_factory=list, description="further sbatch options of every job")
    signal_seconds: int = Field(300, gt=0, description="how long before its time limit a stage is asked to save and leave")
    max_failures: int = Field(3, gt=0, description="failures in a row of one stage after which the run stops")
    hang_seconds: int = Field(3600, gt=0, description="a stage that shows no progress for so long is ended and tried again")
    stages: dict[StageName, SlurmStageSection] = Field(default_factory=dict)

    def of(self, stage: StageName) -> SlurmStageSection:
        """The settings of one stage; evaluate runs on the ranks of train unless it has its own."""
        if stage == "evaluate" and stage not in self.stages:
            stage = "train"
        return self.stages.get(stage, SlurmStageSection())
