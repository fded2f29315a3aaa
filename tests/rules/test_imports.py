"""Who may import whom: a module imports only its own layer and those below."""

import json
import subprocess
import sys

import pytest

from tests.rules.sources import PACKAGE, REPOSITORY, Source, imports, package_sources, report

# The longest matching prefix decides.
LAYERS = {
    "spin_megatron": 0,
    "spin_megatron.config": 0,
    "spin_megatron.config_file": 0,
    "spin_megatron.config_sections": 0,
    "spin_megatron.run": 0,
    "spin_megatron.plan": 0,
    "spin_megatron.stage_table": 0,
    "spin_megatron.data": 1,
    "spin_megatron.objective": 1,
    "spin_megatron.convert.families": 1,
    "spin_megatron.convert": 2,
    "spin_megatron.mcore": 2,
    "spin_megatron.generation": 2,
    "spin_megatron.stages": 3,
    "spin_megatron.pipeline": 4,
    "spin_megatron.report": 4,
    "spin_megatron.launch": 4,
    # What srun starts: it is the command line, with a rank's coordinates.
    "spin_megatron.launch.rank": 5,
    "spin_megatron.cli": 5,
}
# Plain arguments instead of the config: what computes can be used and tested without a run.
WITHOUT_CONFIG = ("spin_megatron.data", "spin_megatron.objective", "spin_megatron.convert.families")
TORCH_FREE = ("config", "config_file", "config_sections", "run", "plan", "stage_table", "pipeline", "launch", "report", "cli")
HEAVY = ("torch", "transformers", "datasets", "megatron", "transformer_engine", "tensorrt_llm")

# package -> where it may be imported
CONFINED = {
    "megatron": ("spin_megatron/mcore/",),
    "transformer_engine": ("spin_megatron/mcore/",),
    "transformer_engine_torch": ("spin_megatron/mcore/",),
    "apex": ("spin_megatron/mcore/",),
    "amp_C": ("spin_megatron/mcore/",),
    "tensorrt_llm": ("spin_megatron/generation/trtllm_worker.py",),
    "vllm": ("spin_megatron/generation/vllm_worker.py",),
    "triton": ("spin_megatron/objective/logprobs_triton.py", "spin_megatron/mcore/"),
}


def layer_of(name: str) -> int | None:
    """The layer of a dotted name; None outside the package."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        layer = LAYERS.get(".".join(parts[:length]))
        if layer is not None:
            return layer
    return None


def within(source: Source, places: tuple[str, ...]) -> bool:
    """Whether a file lies in one of these folders ("a/b/") or is one of these files."""
    path = source.path.as_posix()
    return any(path == place or (place.endswith("/") and path.startswith(place)) for place in places)


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"} - {"__init__", "__pycache__"}
    assert sorted(part for part in parts if f"spin_megatron.{part}" not in LAYERS) == []


def test_modules_import_only_their_own_layer_and_those_below() -> None:
    offenders = []
    for source in package_sources():
        layer = layer_of(source.module)
        assert layer is not None
        for name, node in imports(source):
            imported = layer_of(name)
            if imported is not None and imported > layer:
                offenders.append(f"{source.at(node)}: {source.module} (layer {layer}) imports {name} (layer {imported})")
    assert not offenders, report(offenders)


def test_what_computes_takes_plain_arguments_not_the_config() -> None:
    offenders = [
        f"{source.at(node)}: {source.module} imports {name}; pass the values it uses as arguments"
        for source in package_sources()
        if source.module.startswith(WITHOUT_CONFIG)
        for name, node in imports(source)
        if name.startswith("spin_megatron.config")
    ]
    assert not offenders, report(offenders)


def test_the_lowest_layer_never_imports_torch_not_even_inside_a_function() -> None:
    offenders = [
        f"{source.at(node)}: imports {name}"
        for source in package_sources()
        if layer_of(source.module) == 0
        for name, node in imports(source)
        if name.partition(".")[0] in HEAVY
    ]
    assert not offenders, report(offenders)


@pytest.mark.parametrize("package", CONFINED)
def test_heavy_packages_are_imported_only_where_they_belong(package: str) -> None:
    offenders = [
        f"{source.at(node)}: imports {name}, allowed only in {', '.join(CONFINED[package])}"
        for source in package_sources()
        if not within(source, CONFINED[package])
        for name, node in imports(source)
        if name.partition(".")[0] == package
    ]
    assert not offenders, report(offenders)


def test_the_command_line_and_what_it_needs_import_without_torch() -> None:
    names = [
        source.module
        for source in package_sources()
        if source.module.split(".")[1:2] and source.module.split(".")[1] in TORCH_FREE
    ]
    # One fresh interpreter: after each import, which heavy packages have come in.
    program = (
        "import importlib, json, sys\n"
        f"heavy, names, seen, blame = {HEAVY!r}, {names!r}, set(), {{}}\n"
        "for name in names:\n"
        "    importlib.import_module(name)\n"
        "    new = [package for package in heavy if package in sys.modules and package not in seen]\n"
        "    seen.update(new)\n"
        "    if new: blame[name] = new\n"
        "print(json.dumps(blame))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    blame = json.loads(result.stdout.splitlines()[-1])
    assert not blame, report([f"importing {name} imports {', '.join(packages)}" for name, packages in blame.items()])
