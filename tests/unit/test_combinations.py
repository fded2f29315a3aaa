"""Every combination of parallelisms is either legal, by rules stated here a second time, or refused with a field and a cure."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from spin_megatron.config_file import load_config
from spin_megatron.plan.precision import check_precision
from spin_megatron.plan.shape import ModelShape, ParallelLayout

DENSE = ModelShape("llama", 8, 512, 1536, 8, 2, 64, 1000, 4096, 1e-5, 1e4)
MIXTURE = replace(DENSE, family="mixtral", num_experts=4, experts_per_token=2, expert_ffn_hidden_size=1536)
PACK_TOKENS = 4096
CONFIG = '[model]\npath = "org/model"\nrevision = "abc"\n[data]\nsource = "org/data"\nrevision = "def"\n[train]\npack_tokens = 4096\n'


def layouts() -> Iterator[ParallelLayout]:
    for tensor, sequence, pipeline, virtual, context, expert, data in itertools.product(
        (1, 2, 3, 8), (False, True), (1, 2, 3), (1, 2), (1, 2, 3), (1, 2, 3), (1, 2)
    ):
        yield ParallelLayout(tensor, pipeline, data, sequence, context, expert, virtual)


def faults(layout: ParallelLayout, shape: ModelShape) -> set[str]:
    """Which fields are to blame; empty where the layout is legal."""
    ranks, found = layout.data * layout.context, set()
    if layout.tensor == 3:  # 8 heads; 2 key-value heads are shared by 8 ranks, and 1, 2 and 8 divide the FFN
        found.add("parallel.tensor")
    if layout.pipeline == 3:  # 8 layers
        found.add("parallel.pipeline")
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        found.add("parallel.virtual_pipeline")
    if layout.sequence and layout.tensor == 1:
        found.add("parallel.sequence")
    if layout.expert > 1 and (shape.num_experts is None or 4 % layout.expert or ranks % layout.expert):
        found.add("parallel.expert")
    return found


@pytest.mark.parametrize("shape", [DENSE, MIXTURE], ids=["dense", "experts"])
def test_a_layout_is_taken_or_refused_by_a_field_that_is_to_blame(shape: ModelShape) -> None:
    num_legal = 0
    for layout in layouts():
        blamed = faults(layout, shape)
        if blamed:
            with pytest.raises(ValueError, match=rf"^({'|'.join(blamed)})\b.*\(config\.toml \[parallel\]\).*use "):
                layout.check(shape)
            continue
        layout.check(shape)
        num_legal += 1
        layers = [layout.layers_of_rank(shape.num_layers, rank) for rank in range(layout.pipeline)]
        assert sum(layers) == shape.num_layers
    assert num_legal > 50


@pytest.mark.parametrize(
    ("layout", "pack_tokens", "cure"),
    [
        (ParallelLayout(context=2), 4098, "multiple of 4, .* use 4100"),
        (ParallelLayout(tensor=2, sequence=True), 4097, "multiple of 2, .* use 4098"),
        (ParallelLayout(tensor=8, context=3, sequence=True), 4096, "multiple of 48, .* use 4128"),
        (ParallelLayout(tensor=8, context=4, sequence=True), 4096, None),
        (ParallelLayout(tensor=2, data=3), 4097, None),
    ],
)
def test_packs_must_divide_into_what_a_rank_holds(layout: ParallelLayout, pack_tokens: int, cure: str | None) -> None:
    if cure is None:
        layout.check_pack(pack_tokens)
        return
    with pytest.raises(ValueError, match=rf"train\.pack_tokens={pack_tokens} is not a {cure}"):
        layout.check_pack(pack_tokens)


@pytest.mark.parametrize(
    ("precision", "layout", "message"),
    [
        ("fp8-tensorwise", ParallelLayout(data=2, expert=2), r"parallel\.expert=2 with train\.precision"),
        ("fp8-blockwise", ParallelLayout(data=2, expert=2), None),
        ("fp8-blockwise", ParallelLayout(context=2), None),
        ("fp8-blockwise", ParallelLayout(tensor=8, context=8, sequence=True), r"train\.pack_tokens=4096 is not a multiple of 8192"),
    ],
)
def test_fp8_asks_more_of_a_layout(precision: str, layout: ParallelLayout, message: str | None) -> None:
    if message is None:
        check_precision(precision, MIXTURE, layout, pack_tokens=PACK_TOKENS)
        return
    with pytest.raises(ValueError, match=message):
        check_precision(precision, MIXTURE, layout, pack_tokens=PACK_TOKENS)


def test_overlap_that_has_nothing_to_overlap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG, encoding="utf-8")
    assert load_config(path, ["parallel.overlap=on", "parallel.context=2"]).parallel.overlap == "on"
    with pytest.raises(ValueError, match=r'parallel\.overlap="on" .* use "auto"'):
        load_config(path, ["parallel.overlap=on"])
