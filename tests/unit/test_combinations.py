"""Every combination of settings is either legal, by rules stated a second time in combinations.py, or refused with a field and a cure."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from spin_megatron.config_file import load_config
from spin_megatron.launch.check import check_config, examine_engine
from spin_megatron.report import doctor
from tests.unit.combinations import Settings, drawn, faults, layouts, overrides, pairs, write_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    write_models(made)
    return made


def refusal(folder: Path, settings: Settings) -> str | None:
    """What `spin-megatron check` says against it, before it looks at weights and data."""
    try:
        config = load_config(folder / "config.toml", overrides(settings))
        check_config(config)
        examine_engine(config)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("combinations", "least_legal"),
    [pytest.param(layouts(), 100, id="layouts"), pytest.param(pairs(), 1000, id="pairs"), pytest.param(drawn(1500), 100, id="drawn")],
)
def test_a_combination_is_taken_or_refused_by_a_field_that_is_to_blame(
    combinations: Iterable[Settings], least_legal: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = doctor.Device("cpu"), doctor.Finding("device", "absent", "CPU only", "")
    monkeypatch.setattr(doctor, "examine_device", lambda: cpu)
    num_legal = 0
    for settings in combinations:
        message, blamed = refusal(folder, settings), faults(settings)
        if not blamed:
            assert message is None, f"{overrides(settings)}: {message}"
            num_legal += 1
            continue
        assert message is not None, f"{overrides(settings)}: expected {blamed}"
        fields = "|".join(map(re.escape, blamed))
        assert re.search(rf"({fields})\b.*(use|lower|raise|give) ", message, re.DOTALL), f"{overrides(settings)}, {blamed}: {message}"
    assert num_legal >= least_legal
