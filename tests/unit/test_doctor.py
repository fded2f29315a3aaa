"""The doctor on site-packages made by hand: it tells the apexes apart and names what differs, without importing anything."""

import json
import sys
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

import spin_megatron.mcore.attention  # noqa: F401 (with it Megatron Core, which imports any apex it finds: not those of this file)
from spin_megatron.report import doctor
from spin_megatron.report.doctor import Device, Finding

HOPPER = Device("cuda", ("NVIDIA H100 80GB HBM3",), 80 * 2**30, (9, 0))
AMPERE = Device("cuda", ("NVIDIA A100-SXM4-80GB",), 80 * 2**30, (8, 0))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty site-packages in front of the real one, which is searched no more for what only some machines have."""
    monkeypatch.syspath_prepend(str(tmp_path))
    optional = {"apex", "amp_C", "transformer_engine_torch"}
    monkeypatch.setattr(doctor, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)] if name in optional else None))
    real = doctor.installed

    def installed(package: str) -> Distribution | None:
        if not package.startswith(("apex", "transformer-engine")):
            return real(package)
        return next(iter(distributions(name=package, path=[str(tmp_path)])), None)

    monkeypatch.setattr(doctor, "installed", installed)
    return tmp_path


def install(site: Path, name: str, version: str, *files: str, summary: str = "") -> None:
    """What pip leaves behind: a dist-info folder and files; a module that is imported would raise."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n"
    (info / "METADATA").write_text(text, encoding="utf-8")
    for file in files:
        path = site / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('the doctor imported this')\n", encoding="utf-8")


def by_topic(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.topic: finding for finding in findings}


@pytest.mark.usefixtures("site")
def test_without_an_apex_the_doctor_warns_of_the_one_on_pypi() -> None:
    finding = doctor.examine_apex()
    assert (finding.state, finding.found) == ("absent", "not installed")
    assert "never `pip install apex`" in finding.advice


def test_the_web_toolkit_is_told_by_its_files(site: Path) -> None:
    # The files of apex 0.9.10dev as PyPI has it.
    install(site, "apex", "0.9.10.dev0", "apex/__init__.py", "apex/lib/libapex.py", "apex/scaffolds/__init__.py")
    finding = doctor.examine_apex()
    assert (finding.state, finding.found) == ("problem", "the web toolkit from PyPI, not NVIDIA's")
    assert "pip uninstall apex" in finding.advice


def test_the_web_toolkit_is_told_by_its_metadata_too(site: Path) -> None:
    install(site, "apex", "0.9.11", "apex/__init__.py", summary="Pyramid toolkit to add Velruse, Flash Messages and Sessions")
    assert doctor.apex_kind() == "web toolkit"


def test_nvidias_apex_with_its_extensions_is_fine(site: Path) -> None:
    install(site, "apex", "0.1", "apex/__init__.py", "apex/multi_tensor_apply/__init__.py", "apex/optimizers/fused_adam.py", "amp_C.py")
    assert doctor.examine_apex() == Finding("apex", "ok", "NVIDIA's, with its extensions")


def test_nvidias_apex_without_extensions_turns_nothing_on(site: Path) -> None:
    install(site, "apex", "0.1", "apex/__init__.py", "apex/multi_tensor_apply/__init__.py")
    finding = doctor.examine_apex()
    assert (finding.state, finding.found) == ("warning", "NVIDIA's, Python only")
    kernels = by_topic(list(doctor.examine_kernels(HOPPER)))
    assert kernels["kernel: AdamW, clipping"].found == "torch"


def test_any_other_package_named_apex_is_a_problem(site: Path) -> None:
    install(site, "apex", "3.0", "apex/__init__.py", summary="Something else")
    assert (doctor.examine_apex().state, doctor.apex_kind()) == ("problem", "unknown")


def test_nothing_of_apex_was_imported(site: Path) -> None:
    install(site, "apex", "0.1", "apex/__init__.py", "apex/multi_tensor_apply/__init__.py", "amp_C.py")
    doctor.examine_apex()
    assert not {"apex", "amp_C"} & set(sys.modules)


def test_transformer_engine_needs_its_torch_part(site: Path) -> None:
    assert doctor.examine_transformer_engine().state == "absent"
    install(site, "transformer-engine", "2.9.0")
    assert doctor.examine_transformer_engine().state == "problem"
    install(site, "transformer-engine-torch", "2.9.0")
    assert doctor.examine_transformer_engine() == Finding("transformer-engine", "ok", "2.9.0")


def test_transformer_engine_turns_on_fused_adam_and_on_hopper_fp8(site: Path) -> None:
    before = by_topic(list(doctor.examine_kernels(HOPPER)))
    assert before["kernel: AdamW, clipping"].found == "torch"
    assert before["kernel: FP8 matrix products"].advice == "needs Transformer Engine"
    install(site, "transformer-engine", "2.9.0")
    install(site, "transformer-engine-torch", "2.9.0")
    hopper, ampere = by_topic(list(doctor.examine_kernels(HOPPER))), by_topic(list(doctor.examine_kernels(AMPERE)))
    recipes = "fp8-blockwise, fp8-tensorwise"
    assert (hopper["kernel: AdamW, clipping"].found, hopper["kernel: FP8 matrix products"].found) == ("fused", recipes)
    assert (ampere["kernel: AdamW, clipping"].found, ampere["kernel: FP8 matrix products"].found) == ("fused", "off")
    assert "8.9" in ampere["kernel: FP8 matrix products"].advice


def test_the_attention_kernel_is_the_one_training_chooses(site: Path) -> None:
    install(site, "flash-attn", "2.8.3", "flash_attn/__init__.py")
    assert by_topic(list(doctor.examine_kernels(HOPPER)))["kernel: attention"].found == "flash_attn"
    assert by_topic(list(doctor.examine_kernels(Device("cpu"))))["kernel: attention"].found == "cpu_flash"


def test_the_allocator_of_a_cpu_is_named_with_what_a_better_one_is_worth(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_tcmalloc", lambda: "libtcmalloc_minimal.so.4")
    assert by_topic(list(doctor.examine_kernels(Device("cpu"))))["allocator"] == Finding("allocator", "ok", "libtcmalloc_minimal.so.4")
    monkeypatch.setattr(doctor, "find_tcmalloc", lambda: None)
    found = by_topic(list(doctor.examine_kernels(Device("cpu"))))["allocator"]
    assert (found.state, "apt-get install" in found.advice) == ("absent", True)
    assert "allocator" not in by_topic(list(doctor.examine_kernels(HOPPER)))


def test_versions_are_compared_with_the_constraints_of_this_interpreter(site: Path, tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(
        "# pins\nnumpy==1.0.0\nrich==99.0; python_version < '3'\npsutil==7.1  # why\ntorch==2.13.0\n", encoding="utf-8"
    )
    install(site, "numpy", "2.0.0")
    install(site, "psutil", "7.1")
    install(site, "torch", "2.13.0+cu130")
    findings = by_topic(list(doctor.examine_versions(constraints)))
    assert findings["numpy"] == Finding("numpy", "warning", "2.0.0", "tested with 1.0.0: pip install -c constraints.txt numpy")
    assert findings["psutil"] == Finding("psutil", "ok", "7.1", "as tested")
    # The CUDA and CPU builds of the tested release are the tested release.
    assert findings["torch"].state == "ok"
    assert findings["rich"].advice == "", "a pin for another Python does not count"


def test_a_missing_psutil_is_a_problem_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda package: None if package == "psutil" else real(package))
    finding = by_topic(list(doctor.examine_versions(doctor.CONSTRAINTS)))["psutil"]
    assert finding.state == "problem"
    assert "distributed checkpoints hang" in finding.advice


def test_an_old_python_is_refused_with_the_cure() -> None:
    assert doctor.examine_python((3, 10, 4)).state == "problem"
    assert doctor.examine_python((3, 11, 0)).state == "ok"


def test_little_disk_is_a_warning_also_for_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "new"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 19 * 2**30})())
    disk = by_topic(list(doctor.examine_machine(folder)))[f"disk of {folder}"]
    assert disk.state == "warning"
    assert "a checkpoint takes 8 to 14 bytes a trained parameter" in disk.advice
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 21 * 2**30})())
    assert by_topic(list(doctor.examine_machine(folder)))[f"disk of {folder}"].state == "ok"


def test_the_exit_code_and_the_json_say_whether_a_problem_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for state, code in (("warning", 0), ("problem", 2)):
        monkeypatch.setattr(doctor, "examine", lambda folder, state=state: [Finding("a", state, "found", "advice")])
        assert doctor.main(["--json", "--run-dir", str(tmp_path)]) == code
        report = json.loads(capsys.readouterr().out)
        assert report == {
            "is_healthy": code == 0,
            "findings": [{"topic": "a", "state": state, "found": "found", "advice": "advice"}],
        }


def test_markup_in_what_was_found_is_shown_as_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    doctor.print_findings([Finding("gpu", "absent", "none", "pip install -e '.[gpu]'")])
    assert "pip install -e '.[gpu]'" in capsys.readouterr().out
