"""The repository as a whole: nothing half done, nothing of one machine, declared and pinned dependencies."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from spin_megatron.config_file import load_config
from tests.rules.sources import REPOSITORY, imports, package_sources, report, text_files

# Written in parts, so that this file does not break its own rules.
LEFT_OVERS = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
MACHINE = re.compile("|".join(("/wo" + "rk/", "/ro" + "ot/", "/opt/" + "pypi", "python" + "hosted", "pypi" + r"\.org")))
# Imported where they are installed: extras, another interpreter's packages, or alternatives that are built from source.
OPTIONAL = {
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "amp_C",
    "flash_attn",
    "lm_eval",
    "onnxruntime_genai",
    "tensorrt_llm",
    "triton",
    "vllm",
}
PYTHON_VERSIONS = ("3.11", "3.12", "3.13")


def setup_values() -> dict[str, Any]:
    """The lists of setup.py, read without running it."""
    tree = ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in ("RUNTIME", "EXTRAS"):
            values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def declared(*, extras: bool) -> list[Requirement]:
    values = setup_values()
    names = [*values["RUNTIME"], *(name for extra in values["EXTRAS"].values() for name in extra if extras)]
    return [Requirement(name) for name in names]


def pins(python: str) -> dict[str, str]:
    """Name -> exact version of constraints.txt under a Python version on Linux."""
    found = {}
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"constraints.txt: {text} does not pin one version"
        if applies(requirement, python):
            assert canonicalize_name(requirement.name) not in found, f"constraints.txt pins {requirement.name} twice for Python {python}"
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def applies(requirement: Requirement, python: str) -> bool:
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


@pytest.mark.parametrize("python", PYTHON_VERSIONS)
def test_every_requirement_is_pinned_to_a_version_it_accepts(python: str) -> None:
    pinned = pins(python)
    # What only GPU machines and evaluations install is not part of the tested set.
    untested = {"transformer-engine", "lm-eval"}
    offenders = []
    for requirement in declared(extras=True):
        name = canonicalize_name(requirement.name)
        if name in untested or not applies(requirement, python):
            continue
        if name not in pinned:
            offenders.append(f"{requirement} has no pin in constraints.txt")
        elif not requirement.specifier.contains(pinned[name]):
            offenders.append(f"{requirement} refuses its own pin {pinned[name]}")
    assert not offenders, report(offenders)


def test_megatron_core_follows_the_python_version() -> None:
    assert {python: pins(python)["megatron-core"] for python in PYTHON_VERSIONS} == {"3.11": "0.16.1", "3.12": "0.19.2", "3.13": "0.19.2"}
    assert pins("3.11")["torch"] == pins("3.12")["torch"] == "2.13.0"


def test_the_web_toolkit_named_apex_is_never_required() -> None:
    names = {canonicalize_name(requirement.name) for requirement in declared(extras=True)} | set(pins("3.11"))
    assert "apex" not in names


def test_every_imported_package_is_declared() -> None:
    providers = packages_distributions()
    names = {canonicalize_name(requirement.name) for requirement in declared(extras=False)}
    offenders = []
    for source in package_sources():
        for name, node in imports(source):
            package = name.partition(".")[0]
            if package in sys.stdlib_module_names or package in OPTIONAL or package == "spin_megatron":
                continue
            if not {canonicalize_name(provider) for provider in providers.get(package, [])} & names:
                offenders.append(f"{source.at(node)}: {package} is not in install_requires of setup.py")
    assert not offenders, report(offenders)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        pytest.param(LEFT_OVERS, "do it or drop it", id="left-over notes"),
        pytest.param(MACHINE, "means nothing on another machine", id="paths and hosts of one machine"),
    ],
)
def test_no_text_of_the_repository_holds(pattern: re.Pattern[str], reason: str) -> None:
    offenders = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            match = pattern.search(line)
            if match:
                offenders.append(f"{path.relative_to(REPOSITORY)}:{number}: {match.group()} {reason}")
    assert not offenders, report(offenders)


def test_shell_scripts_stop_at_the_first_error() -> None:
    scripts = [path for path in text_files() if path.suffix == ".sh" or path.parent.name == ".ci"]
    offenders = []
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        # A file that others source (no interpreter line) must not change its reader's options.
        if text.startswith("#!") and "set -euo pipefail" not in text:
            offenders.append(f"{path.relative_to(REPOSITORY)} lacks: set -euo pipefail")
    assert not offenders, report(offenders)


def test_every_example_config_is_valid() -> None:
    paths = sorted((REPOSITORY / "examples").rglob("*.toml"))
    assert REPOSITORY / "examples" / "quickstart" / "quickstart.toml" in paths
    offenders = []
    for path in paths:
        try:
            load_config(path)
        except ValueError as error:
            offenders.append(str(error))
    assert not offenders, report(offenders)


def test_test_names_are_sentences() -> None:
    offenders = []
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name.split("_")) < 4:
                offenders.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}: {node.name} says not what should be true")
    assert not offenders, report(offenders)


def test_modules_are_named_after_what_they_hold() -> None:
    vague = {"helper", "helpers", "util", "utils", "utilities", "manager", "misc", "common", "tools"}
    assert [str(source.path) for source in package_sources() if set(source.module.split(".")[1:]) & vague] == []


def test_every_folder_of_tests_holds_tests() -> None:
    folders = [path for path in (REPOSITORY / "tests").iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]
    assert sorted(folder.name for folder in folders if list(folder.rglob("*.py")) and not list(folder.rglob("test_*.py"))) == []
