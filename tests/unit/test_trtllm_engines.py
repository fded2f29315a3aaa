"""The TensorRT-LLM engines: releases, identity, cache, calibration, GPUs, against a strict double of the package.

Nothing here shows that the real package works; it shows that what we call is what the table says.
"""

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_megatron.generation.engine import Sampling, provider
from tests.doubles.installation import H100, Site, skip_where_paths_are_split
from tests.doubles.scene import GREEDY, SAMPLED, answers, by_id, expected, make_prompts, make_spec
from tests.unit.tiny_models import TINY, write_model


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "1.2.1", "1.2.0rc4"])
@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_the_engine_gives_the_same_answers_on_every_release_line_that_has_it(
    version: str, sampling: Sampling, model: Path, site: Site, tmp_path: Path
) -> None:
    site.install("tensorrt_llm", version)
    assert answers("trtllm-engine", make_spec(model, site), tmp_path, sampling, make_prompts()) == expected(model, make_prompts(), sampling)


def test_the_engine_needs_a_release_that_still_builds_engines(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site)
    for version in ("1.3.0", "1.3.0rc21", "0.21.0"):
        site.install("tensorrt_llm", version)
        with pytest.raises(ValueError, match=rf"trtllm-engine.*{version}.*trtllm-torch"):
            provider("trtllm-engine").build(spec, tmp_path / "engine")
    site.install("tensorrt_llm", "1.3.0rc21")
    assert answers("trtllm-torch", make_spec(model, site), tmp_path / "torch", GREEDY, make_prompts()) == expected(
        model, make_prompts(), GREEDY
    )


def test_a_release_whose_sampler_takes_no_seeds_is_told(
    model: Path, site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = make_spec(model, site, "trtllm-torch")
    told = {}
    for version in ("1.0.0", "1.2.1", "1.3.0rc26"):
        site.install("tensorrt_llm", version)
        provider("trtllm-torch").build(spec, tmp_path / version)
        with closing(provider("trtllm-torch").load(spec, tmp_path / version, tmp_path / f"work-{version}")) as engine:
            rows = by_id(engine.generate(make_prompts(), SAMPLED))
            told[version] = engine.describe()["row_seeds"]
        assert (rows == expected(model, make_prompts(), SAMPLED)) == told[version]
    assert told == {"1.0.0": True, "1.2.1": True, "1.3.0rc26": False}
    warned = [record.getMessage() for record in caplog.records if "without the rows' seeds" in record.getMessage()]
    assert [message.partition(" draws")[0] for message in warned] == ["engine trtllm-torch (version 1.3.0rc26)"]


def test_what_ran_is_told(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site)
    facts = provider("trtllm-engine").build(spec, tmp_path / "engine")
    assert (facts["engine"], facts["tensorrt_llm"], facts["gpu"]) == ("trtllm-engine", "1.2.1", "NVIDIA H100 80GB HBM3")
    assert (facts["compute_capability"], facts["max_input_len"], facts["from_cache"]) == ("9.0", 13, False)
    with closing(provider("trtllm-engine").load(spec, tmp_path / "engine", tmp_path / "work")) as engine:
        list(engine.generate(make_prompts(), GREEDY))
        told = engine.describe()
    assert (told["engine"], told["version"], told["row_seeds"]) == ("trtllm-engine", "1.2.1", True)


def test_the_engine_s_limits_are_those_of_the_data(model: Path, site: Site, tmp_path: Path) -> None:
    provider("trtllm-engine").build(make_spec(model, site), tmp_path / "engine")
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert (config["max_input_len"], config["max_seq_len"]) == (13, 25)  # the longest prompt has 13 tokens, the cap is 20


def test_an_engine_is_built_from_each_iteration_s_weights(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, cache=str(tmp_path / "cache"))
    first = answers("trtllm-engine", spec, tmp_path / "a", GREEDY, make_prompts())
    write_model(model, TINY, dtype=torch.float32, seed=8)
    with pytest.raises(ValueError, match="weights: built with"):
        provider("trtllm-engine").load(spec, tmp_path / "a" / "engine", tmp_path / "work")
    second = answers("trtllm-engine", spec, tmp_path / "b", GREEDY, make_prompts())
    assert second == expected(model, make_prompts(), GREEDY) != first


def test_equal_weights_come_from_the_cache_and_timings_are_reused(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, cache=str(tmp_path / "cache"))
    engine = provider("trtllm-engine")
    assert not engine.build(spec, tmp_path / "a")["from_cache"]
    assert engine.build(spec, tmp_path / "b")["from_cache"]
    assert (tmp_path / "b" / "rank0.engine").exists()
    assert not (tmp_path / "b" / "work" / "build").exists()
    write_model(model, TINY, dtype=torch.float32, seed=8)
    engine.build(spec, tmp_path / "c")
    timings = [json.loads((tmp_path / name / "config.json").read_text())["timings"] for name in ("a", "c")]
    assert timings == ["", "timed\n"]


def test_the_library_s_own_cache_stays_off_where_an_image_turns_it_on(model: Path, site: Site, tmp_path: Path) -> None:
    # It is keyed by the model's path: theta_1's engine could be theta_0's. The double refuses to start with it.
    spec = replace(make_spec(model, site), environment=site.environment("TLLM_LLMAPI_BUILD_CACHE=1"))
    assert not provider("trtllm-engine").build(spec, tmp_path / "engine")["from_cache"]


@pytest.mark.parametrize("change", ["version", "gpu"])
def test_shards_refuse_an_engine_of_another_release_or_gpu(change: str, model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site)
    provider("trtllm-engine").build(spec, tmp_path / "engine")
    if change == "version":
        site.install("tensorrt_llm", "1.2.0")
    else:
        site.gpus("NVIDIA A100-SXM4-80GB, 8.0, 580.65")
    with pytest.raises(ValueError, match="tensorrt_llm: built with '1.2.1'" if change == "version" else "gpu: built with 'NVIDIA H100"):
        provider("trtllm-engine").load(spec, tmp_path / "engine", tmp_path / "work")


def test_fp8_is_calibrated_on_the_run_s_own_prompts(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, quantization="fp8", calibration_prompts=3)
    provider("trtllm-engine").build(spec, tmp_path / "engine")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = json.loads((tmp_path / "engine" / "config.json").read_text())["calibrated_on"]
    assert texts == [tokenizer.decode(prompt.token_ids, skip_special_tokens=False) for prompt in make_prompts()[:3]]


def test_fp8_refuses_a_path_that_calibration_would_take_for_another_model(model: Path, site: Site, tmp_path: Path) -> None:
    spec = make_spec(model, site, quantization="fp8")
    named = tmp_path / "savila" / "theta"
    shutil.copytree(model, named)
    with pytest.raises(ValueError, match="as a 'vila' model, for its path"):
        provider("trtllm-engine").build(replace(spec, model=named), tmp_path / "engine")


@pytest.mark.parametrize("name", ["trtllm-engine", "trtllm-torch"])
def test_a_machine_without_a_gpu_is_refused(name: str, model: Path, site: Site, tmp_path: Path) -> None:
    site.gpus()
    with pytest.raises(ValueError, match="nvidia-smi shows none"):
        provider(name).build(make_spec(model, site, name), tmp_path / "engine")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel": -1}, "tensor_parallel=-1"),
        ({"tensor_parallel": 2}, "a replica on 2 GPUs .* does not fit on the 1 that are there"),
        ({"tensor_parallel": 2.5}, "tensor_parallel=2.5.*of type int"),
        ({"quantization": "int4"}, "quantization='int4'.*'none' or 'fp8'"),
        ({"free_gpu_memory_fraction": 1.0}, "between 0 and 1"),
        ({"quantisation": "fp8"}, "quantisation"),
        ({"in_flight": True}, "of type int"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], words: str, model: Path, site: Site, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        provider("trtllm-engine").build(make_spec(model, site, **options), tmp_path / "engine")


def test_a_dtype_the_engine_is_not_built_in_is_refused(model: Path, site: Site, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generate\.dtype=float32"):
        provider("trtllm-engine").build(replace(make_spec(model, site), dtype="float32"), tmp_path / "engine")


def test_several_gpus_start_as_ranks_of_the_launcher_tied_together(model: Path, site: Site, tmp_path: Path) -> None:
    skip_where_paths_are_split()
    site.gpus(H100, H100)
    # As srun would: so many processes, of which the first is rank 0; as trtllm-llmapi-launch: split at spaces, deaf to failures.
    site.program("launcher", 'echo "$@" >> ' + str(tmp_path / "started") + '; shift; exec "$@"')
    site.program("trtllm-llmapi-launch", "TLLM_SPAWN_PROXY_PROCESS=1 $*; code=$?; [ $code -eq 0 ] || sleep 600")
    launcher = (str(site.folder / "bin" / "launcher"), "--ntasks={ranks}")
    spec = replace(make_spec(model, site, tensor_parallel=2), environment=site.environment(launcher=launcher))
    folder = tmp_path / "it's an engine"  # with spaces and a quote in every path of a job
    provider("trtllm-engine").build(spec, folder)
    assert sorted(path.name for path in folder.glob("rank*.engine")) == ["rank0.engine", "rank1.engine"]
    with closing(provider("trtllm-engine").load(spec, folder, folder / "a shard")) as engine:
        assert by_id(engine.generate(make_prompts(), GREEDY)) == expected(model, make_prompts(), GREEDY)
    started = (tmp_path / "started").read_text().splitlines()
    words = [(line.split()[0], "trtllm-llmapi-launch" in line) for line in started]
    # Looking what is there takes one process, building and answering take both GPUs.
    assert words == [("--ntasks=1", False), ("--ntasks=2", True), ("--ntasks=1", False), ("--ntasks=2", True)]
    (folder / "rank1.engine").unlink()
    failed = pytest.raises(RuntimeError, match="lacks the engine files of ranks")
    with closing(provider("trtllm-engine").load(spec, folder, tmp_path / "work")) as engine, failed:
        list(engine.generate(make_prompts(), GREEDY))


def test_several_gpus_without_a_launcher_are_one_process_that_spawns(model: Path, site: Site, tmp_path: Path) -> None:
    site.gpus(H100, H100)
    facts = provider("trtllm-engine").build(make_spec(model, site, tensor_parallel=1, pipeline_parallel=2), tmp_path / "engine")
    assert (tmp_path / "engine" / "rank1.engine").exists()
    assert facts["options"]["pipeline_parallel"] == 2


@pytest.mark.parametrize(("gpu", "chosen"), [(H100, 1), ("NVIDIA A100-SXM4-40GB, 8.0, 580.65", 1)])
def test_the_planner_chooses_one_gpu_a_replica_for_a_model_that_fits_on_one(
    gpu: str, chosen: int, model: Path, site: Site, tmp_path: Path
) -> None:
    site.gpus(gpu, gpu, gpu, gpu)
    facts = provider("trtllm-torch").build(make_spec(model, site, "trtllm-torch"), tmp_path / "engine")
    assert facts["options"]["tensor_parallel"] == facts["options.tensor_parallel"] == chosen


def test_a_gpu_the_planner_does_not_know_needs_a_given_number(model: Path, site: Site, tmp_path: Path) -> None:
    site.gpus("NVIDIA Quantum 9000, 12.0, 580.65")
    with pytest.raises(ValueError, match=r"tensor_parallel is not set.*Quantum 9000"):
        provider("vllm").build(make_spec(model, site, "vllm"), tmp_path / "engine")
    assert provider("vllm").build(make_spec(model, site, "vllm", tensor_parallel=1), tmp_path / "engine")["gpu"] == "NVIDIA Quantum 9000"
