"""The plan of a config: what it asks of the planner, the answer for a number of GPUs, and whether its own layout fits.

`spin-megatron plan` (launch/plan.py) prints it; `check`, `submit` and export refuse by `check_config_fits` a layout that cannot fit.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from spin_megatron.config import RunConfig
from spin_megatron.plan.duration import IterationTime, RunSettings, Storage, Workload, engine_gpus, engine_tensor, run_time
from spin_megatron.plan.hardware import Gpu, find_gpu
from spin_megatron.plan.layouts import Candidate, Question, Refusal, Search, check_fits, search, try_layout
from spin_megatron.plan.memory import RankMemory, Recompute, TrainSettings, all_ranks
from spin_megatron.plan.precision import PrecisionName, check_capability, check_precision
from spin_megatron.plan.shape import ModelShape

# First turns of UltraChat, the data of the paper: mean tokens of prompts and answers, and its number of prompts.
DEFAULT_PROMPT_TOKENS = 123
DEFAULT_ANSWER_TOKENS = 314
DEFAULT_EXAMPLES = 50_000
# The engine that decodes eagerly on one GPU, and those that are built before they are loaded.
_EAGER_ENGINE = "builtin"
_BUILT_ENGINES = ("trtllm-engine",)
# Below so many requests at a time an engine with in-flight batching reads its weights for too few of them.
_SMALL_BATCH = 128


@dataclass(frozen=True)
class Lengths:
    """What the config does not say about the data: number of prompts, mean tokens of prompts, human and generated answers."""

    examples: int
    prompt_tokens: float
    real_tokens: float
    generated_tokens: float


@dataclass(frozen=True)
class Plan:
    """The answer: every layout, and the best one's memory by rank and stages by iteration (empty when nothing fits).

    own: what becomes of the config's [parallel] and train.recompute; None when it is for another number of GPUs.
    engine_gpus: of each of the engines that answer side by side.
    """

    question: Question
    num_gpus: int
    search: Search
    own: Candidate | Refusal | None
    ranks: list[RankMemory]
    iterations: list[IterationTime]
    warnings: list[str]
    engine_gpus: int


def model_shape(config: RunConfig, model_config: Path | None = None) -> ModelShape:
    """The base model's shape: from `model_config`, the config's folder, or the hub's cache on this machine.

    Raises:
        ValueError: none of them is there, or the model is not one we compute.
    """
    if model_config is not None:
        if not model_config.is_file():
            raise ValueError(f"--model-config {model_config} does not exist; give the model's config.json.")
        return ModelShape.from_config(json.loads(model_config.read_text(encoding="utf-8")), str(model_config))
    shape = shape_on_this_machine(config)
    if shape is None:
        raise ValueError(
            f"model.path={config.model.path} is not on this machine; give --model-config with the model's config.json "
            "(a few kB: no weights are needed to plan)."
        )
    return shape


def shape_on_this_machine(config: RunConfig) -> ModelShape | None:
    """The base model's shape from its folder or the hub's cache; None when it is in neither. Raises ValueError as `model_shape`."""
    folder = Path(config.model.path)
    if folder.is_dir():
        return ModelShape.from_huggingface(folder)
    cached = _hub_cache() / f"models--{config.model.path.replace('/', '--')}" / "snapshots"
    snapshots = sorted(cached.glob(f"{config.model.revision or '*'}/config.json"))
    return ModelShape.from_huggingface(snapshots[-1].parent) if snapshots else None


def _hub_cache() -> Path:
    """Where the hub's client keeps models (HF_HOME and its like count), or would, where it is not installed."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return Path.home() / ".cache/huggingface/hub"
    return Path(HF_HUB_CACHE)


def make_question(config: RunConfig, shape: ModelShape, gpu: Gpu, lengths: Lengths, *, precision: PrecisionName | None = None) -> Question:
    """What the config asks for, layout left open.

    Raises:
        ValueError: the GPU does not have the precision.
    """
    precision = precision or config.train.precision
    check_capability(precision, gpu.capability, where=gpu.name)
    scalars = [config.at(iteration) for iteration in range(config.run.iterations)]
    workload = Workload(
        prompts=lengths.examples,
        prompt_tokens=lengths.prompt_tokens,
        real_tokens=lengths.real_tokens,
        generated_tokens=lengths.generated_tokens,
        train_pairs=tuple(lengths.examples * min(at.window, at.iteration + 1) for at in scalars),
        epochs=tuple(at.stop_epoch for at in scalars),
        held_out=config.data.num_held_out,
    )
    settings = TrainSettings(
        pack_tokens=config.train.pack_tokens,
        micro_batches=1,
        precision=precision,
        recompute=config.train.recompute,
        recompute_layers=config.train.recompute_layers,
        kept_logit_bytes=config.train.kept_logit_bytes,
        optimizer=config.optimizer.name,
        distributed_optimizer=config.train.distributed_optimizer,
        # "auto" overlaps on GPUs too, but what that hides was not measured yet: plans do not count on it unless it is asked for.
        overlap_data=config.parallel.overlap == "on",
        adapters=config.lora.shape(),
        offload_fraction=config.optimizer.offload_fraction,
        host_threads=config.slurm.of("train").cpus_per_rank if config.slurm.stages else config.launch.threads_per_process,
    )
    return Question(shape, gpu, settings, workload, config.train.global_batch_pairs, config.train.share_prompt)


def make_plan(config: RunConfig, question: Question, num_gpus: int, *, storage: Storage, recompute: Recompute | None = None) -> Plan:
    """Search the layouts and time the whole run with the best one."""
    found = search(question, num_gpus, recompute=recompute)
    layout = config.parallel.layout()
    own = try_layout(question, layout, recompute=config.train.recompute) if layout.world_size == num_gpus else None
    run, warnings = _run_settings(config, question, storage)
    gpus = engine_gpus(question.shape, question.gpu, question.workload, run)
    if not found.candidates:
        return Plan(question, num_gpus, found, own, [], [], [], gpus)
    best = found.candidates[0]
    iterations = run_time(question.shape, best.layout, best.settings, question.gpu, workload=question.workload, batch=best.batch, run=run)
    return Plan(question, num_gpus, found, own, all_ranks(question.shape, best.layout, best.settings), iterations, warnings, gpus)


def _run_settings(config: RunConfig, question: Question, storage: Storage) -> tuple[RunSettings, list[str]]:
    """What answers and how often training saves; a warning where the chosen engine cannot hold the model."""
    engine, warnings = config.generate.engine, []
    is_eager = engine == _EAGER_ENGINE
    element_bytes = 4 if config.generate.dtype == "float32" else 2
    if is_eager and engine_tensor(question.shape, question.gpu, element_bytes=element_bytes) > 1:
        is_eager = False
        warnings.append(
            f"generate.engine={engine} runs on one GPU, where this model's weights leave too little room; the times are those of an "
            "engine with tensor parallelism: set generate.engine to one (docs/engines.md)."
        )
    if not is_eager and config.generate.batch_size < _SMALL_BATCH:
        warnings.append(
            f"generate.batch_size={config.generate.batch_size} is all that the engine computes at a time, and the times hold for that; "
            "256 and more are usual for engines with in-flight batching."
        )
    run = RunSettings(
        engine_kind="eager" if is_eager else "compiled",
        engine_is_built=engine in _BUILT_ENGINES,
        max_batch=config.generate.batch_size,
        save_every_steps=config.train.save_every_steps,
        engine_bytes=element_bytes,
        export_threads=config.slurm.of("export").cpus_per_rank if config.slurm.stages else config.launch.threads_per_process,
        storage=storage,
    )
    return run, warnings


def check_model(config: RunConfig, shape: ModelShape) -> None:
    """Refuse a config that cannot train this model: by its layout, packs, precision, adapters or lengths. `check` and `export` call it.

    Raises:
        ValueError: names the setting, what the model has, and the cure.
    """
    layout, train = config.parallel.layout(), config.train
    layout.check_training(shape, train.pack_tokens)
    check_precision(train.precision, shape, layout, pack_tokens=train.pack_tokens, num_bf16_end_layers=train.num_bf16_end_layers)
    if (adapters := config.lora.shape()) is not None:
        adapters.check(shape)
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    if longest > shape.max_positions:
        raise ValueError(
            f"data.max_prompt_tokens + data.max_response_tokens = {longest} is beyond the model's {shape.max_positions} positions "
            f"({config.model.path}, config.json); lower one of them."
        )


def check_config_fits(config: RunConfig, gpu_name: str, *, model_config: Path | None = None) -> Candidate:
    """Refuse a config whose [parallel] does not fit on the GPUs it will run on; `check` and `submit` call it.

    Lengths are the defaults of `plan`: memory depends on them only through the number of packs an update has.

    Raises:
        ValueError: it does not fit; the message names the parts of the memory and a layout that fits.
    """
    shape = model_shape(config, model_config)
    lengths = Lengths(
        config.data.num_examples or DEFAULT_EXAMPLES,
        min(DEFAULT_PROMPT_TOKENS, config.data.max_prompt_tokens),
        min(DEFAULT_ANSWER_TOKENS, config.data.max_response_tokens),
        min(DEFAULT_ANSWER_TOKENS, config.data.max_response_tokens),
    )
    question = make_question(config, shape, find_gpu(gpu_name), lengths)
    return check_fits(question, config.parallel.layout(), config.train.recompute)
