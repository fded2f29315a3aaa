"""`spin-megatron check`, and what `run` and `submit` check of a config before anything is started."""

import argparse
import importlib
import logging
import tempfile
from importlib.util import find_spec
from pathlib import Path

from spin_megatron.config import RunConfig
from spin_megatron.config_file import load_config
from spin_megatron.data.sources import FILE_TYPES, is_commit, open_rows
from spin_megatron.generation.engine import EXTERNAL, Environment, provider
from spin_megatron.launch.local import DONE
from spin_megatron.launch.resources import check_resources
from spin_megatron.plan.hardware import find_gpu
from spin_megatron.plan.precision import PRECISIONS, check_capability
from spin_megatron.plan.run_plan import check_config_fits, check_model, shape_on_this_machine
from spin_megatron.plan.shape import ModelShape
from spin_megatron.run.layout import RunLayout
from spin_megatron.run.manifest import read_manifest

logger = logging.getLogger(__name__)


def check(arguments: argparse.Namespace) -> int:
    """Check everything that can be known before a stage runs, and print the line."""
    from spin_megatron.report.overview import print_example, print_line

    config = load_config(arguments.config, arguments.overrides)
    check_config(config)
    if config.slurm.stages:
        check_resources(config)
    check_num_rows(config)
    if Path(config.model.path).is_dir():
        importlib.import_module("spin_megatron.stages.export").check_folder(Path(config.model.path))
    examine_engine(config)
    if config.evaluate.lm_eval_tasks and not config.slurm.stages:  # the Python of a cluster's ranks is another
        check_harness(config)
    is_here = Path(config.model.path).is_dir() and Path(config.data.source).exists()
    example = importlib.import_module("spin_megatron.stages.prepare").preview(config) if is_here else None
    print_line(config)
    if example is not None:
        print_example(*example)
    else:
        logger.info("the data's first row and its template are checked by prepare: the model or the data is not on this machine yet")
    return DONE


def examine_engine(config: RunConfig) -> None:
    """Say what would answer, where the engine has an environment of its own that can be started here.

    Raises:
        ValueError: its options are wrong, its interpreter or package is missing, or its release does not fit.
    """
    chosen, settings = provider(config.generate.engine), config.generate.environment
    if config.generate.engine in EXTERNAL and config.slurm.stages and not settings.launcher:
        logger.info("engine %s is started by Slurm's jobs (slurm/env.sh): build-engine says what it finds there", config.generate.engine)
        return
    environment = Environment(settings.python, tuple(settings.prefix), tuple(settings.launcher), tuple(settings.variables))
    with tempfile.TemporaryDirectory(prefix="spin-check-") as folder:
        found = chosen.examine(config.generate.options, environment, Path(folder))
    if found:
        logger.info("engine %s: %s", config.generate.engine, found)


def check_harness(config: RunConfig) -> None:
    """Find out now, and not when the first iteration is trained, whether benchmarks can run.

    Raises:
        ValueError: lm-evaluation-harness is not installed, or its folder of further tasks is not there.
    """
    importlib.import_module("spin_megatron.stages.benchmark").harness_version()
    include = config.evaluate.lm_eval_include
    if include is not None and not Path(include).is_dir():
        raise ValueError(f"evaluate.lm_eval_include={include} is no folder; relative paths count from the config file's.")


def check_config(config: RunConfig) -> None:
    """Check the base model's config against the parallel layout and the lengths, where the model is on this machine.

    Raises:
        ValueError: the model is not one we compute, or the layout does not divide it, or a length is beyond its context.
    """
    _check_addresses(config)
    _check_device(config)
    shape = shape_on_this_machine(config)
    if shape is None:
        logger.info("model.path=%s is a hub name: its shape is checked when export 0 has fetched it", config.model.path)
        return
    check_model(config, shape)
    if config.slurm.gpu is not None:
        check_config_fits(config, config.slurm.gpu)


def check_num_rows(config: RunConfig) -> int | None:
    """Check that a data source on this machine has rows for both sides of the split; how many of them can be used is found by prepare.

    Returns:
        The number of rows; None where they cannot be counted here.

    Raises:
        ValueError: it has too few, or cannot be read.
    """
    data = config.data
    path = Path(data.source)
    # What a folder's files are the `datasets` library knows; a host that only submits may have it in the ranks' container alone.
    if not path.exists() or (path.is_dir() and find_spec("datasets") is None):
        return None
    found = open_rows(data.source, split=data.split, subset=data.subset, revision=data.revision).num_rows
    wanted = data.num_held_out + (data.num_examples or 1)
    if found < wanted:
        training = "one training example" if data.num_examples is None else f"data.num_examples={data.num_examples}"
        raise ValueError(
            f"data.source={data.source} has too few rows, {found} of {wanted} for data.num_held_out={data.num_held_out} and {training}; "
            "lower these numbers (a tenth of the rows is a good held-out set), or give more data."
        )
    return found


def check_started(config: RunConfig, layout: RunLayout) -> None:
    """Check what a started run may change, such as [parallel], against its newest theta; before theta_0 is there, as a new run.

    From then on the base model may be gone, and an earlier theta's files once the next one is there.

    Raises:
        ValueError: the model does not fit it, or as `check_config`.
    """
    if read_manifest(layout.theta(0)) is None:
        check_config(config)
        return
    _check_device(config)
    thetas = [theta for theta in map(layout.theta, range(config.run.iterations + 1)) if (theta / "config.json").is_file()]
    if thetas:
        check_model(config, ModelShape.from_huggingface(thetas[-1]))
        if config.slurm.gpu is not None:
            check_config_fits(config, config.slurm.gpu, model_config=thetas[-1] / "config.json")


def _check_device(config: RunConfig) -> None:
    """What needs a GPU: of the cluster where one is named, else of this machine. Imports torch for a config that needs one.

    Raises:
        ValueError: FP8 without its tensor cores, or an optimizer that is to be offloaded from no GPU.
    """
    precision, fraction = config.train.precision, config.optimizer.offload_fraction
    if PRECISIONS[precision].fp8_recipe is None and not fraction:
        return
    if config.slurm.gpu is not None:
        check_capability(precision, find_gpu(config.slurm.gpu).capability, where=f"slurm.gpu={config.slurm.gpu}")
        return
    device, _ = importlib.import_module("spin_megatron.report.doctor").examine_device()
    check_capability(precision, device and device.capability, where="this machine")
    if fraction and (device is None or not device.names):
        raise ValueError(
            f"optimizer.offload_fraction={fraction:g}: this machine has no GPU, and on a CPU the optimizer is in the host's memory as it "
            "is; use 0, or for a cluster name its GPU in slurm.gpu."
        )


def _check_addresses(config: RunConfig) -> None:
    """A hub name needs a pinned revision; anything that looks like a path must be there, and be absolute by now (config_file)."""
    model, data = config.model, config.data
    for name, address, revision in (("model.path", model.path, model.revision), ("data.source", data.source, data.revision)):
        path, rule = Path(address), "relative paths count from the config file's folder"
        section = name.partition(".")[0]
        if path.is_absolute() and path.exists():
            if section == "model" and not path.is_dir():
                raise ValueError(f"model.path={address} is a file; give the Hugging Face folder that it is in.")
            continue
        if path.exists():
            raise ValueError(f"{name}={address} is there in the current folder only, and {rule}; give {str(path.resolve())!r}.")
        if path.is_absolute() or path.suffix in FILE_TYPES:
            raise ValueError(f"{name}={address} does not exist ({rule}); give an existing path, or a hub name with {section}.revision.")
        if revision is None or not is_commit(revision):
            raise ValueError(
                f"{name}={address} is no path here, so it is a hub name, and {section}.revision={revision!r} does not pin it: a name or a "
                "branch may point to something else tomorrow. Give a commit of 40 hex digits, or an existing path."
            )
