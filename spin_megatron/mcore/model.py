"""The policy: Megatron Core's GPTModel whose output is log-probabilities of given tokens, not logits.

One forward takes a pack (data.batches.PackBatch): embedding -> decoder, whose attention reads the branches -> hidden states of the
rows that predict a response token -> `objective.logprobs.vocab_parallel_logprobs`. No [tokens, vocabulary] tensor exists. The
same chunks score the reference and are trained.

Shapes: T tokens of the pack (a sequence-parallel rank holds T/TP of them between layers), R rows, H hidden, V vocabulary
(local: padded V/TP), D head size.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from spin_megatron.convert.families import Fetch, global_name, megatron_shard
from spin_megatron.convert.hf_io import HfFolder, check_tensors
from spin_megatron.data.batches import to_device
from spin_megatron.mcore.attention import choose_backend
from spin_megatron.mcore.context import own_tokens, sum_rows
from spin_megatron.mcore.embedding import embed, share_with_head
from spin_megatron.mcore.fused import choose_weight_gradients
from spin_megatron.mcore.layers import LayerSpec, SpecKind, choose_layer_spec, layer_submodules, make_inputs_again
from spin_megatron.mcore.precision import Fp8, require_fp8
from spin_megatron.mcore.rotary import inverse_frequencies, rotary_angles
from spin_megatron.mcore.runtime import Runtime
from spin_megatron.objective.logprobs import KEPT_BYTES, vocab_parallel_logprobs
from spin_megatron.plan.parameters import padded_vocab
from spin_megatron.plan.shape import ModelShape, ParallelLayout
from spin_megatron.run.telemetry import progress_bar

logger = logging.getLogger(__name__)

Recompute = Literal["none", "selective", "full"]


class SpinModel(GPTModel):
    """A pipeline stage (or virtual stage) of the policy.

    shape: the model's shape. kept_logit_bytes: logits the head keeps for its backward. Everything else is GPTModel's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        submodules: TransformerBlockSubmodules,
        *,
        kept_logit_bytes: int = KEPT_BYTES,
        **stage: Any,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=submodules,
            vocab_size=padded_vocab(shape.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=shape.max_positions,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=shape.tied_embeddings,
            parallel_output=True,
            **stage,
        )
        self.shape, self.kept_logit_bytes = shape, kept_logit_bytes
        # Megatron Core knows Llama 3's scaling with one set of constants only; ours come from the model's config.
        self.rotary_pos_emb.inv_freq = inverse_frequencies(shape).to(self.rotary_pos_emb.inv_freq.device)
        if self.pre_process:
            self.embedding.word_embeddings.forward = functools.partial(embed, self.embedding.word_embeddings)
            if self.post_process and shape.tied_embeddings:
                share_with_head(self.embedding.word_embeddings.weight)
        if self.post_process:
            # What waits for a weight that is still being gathered (Megatron Core's DDP) hooks the call of the module that holds it.
            self.output_layer.forward = self._logprobs

    def forward(self, tokens_1T: Tensor, positions_1T: Tensor, branches_B4: Tensor, rows_R: Tensor, targets_R: Tensor) -> Tensor:
        """Compute this stage.

        Args:
            tokens_1T, positions_1T: int64 [1, T]. branches_B4: int64 [B, 4] on the CPU. rows_R, targets_R: int64 [R].

        Returns:
            Inner stages: hidden states [T or T/TP, 1, H]. Last stage: logp_R, fp32 nats, the same bits on every tensor rank.
            Gradient flows to all parameters of the stage and to the hidden states received.
        """
        own_T = None
        if self.config.context_parallel_size > 1:
            group = self.pg_collection.cp
            own_T = to_device(own_tokens(tokens_1T.shape[1], group.size(), group.rank()), tokens_1T.device)
            tokens_1T, positions_1T = tokens_1T[:, own_T], positions_1T[:, own_T]
        embedded_T1H = self.embedding(input_ids=tokens_1T, position_ids=positions_1T) if self.pre_process else None
        hidden_T1H: Tensor = self.decoder(
            hidden_states=embedded_T1H,
            attention_mask=branches_B4,
            # Local layers rotate in our attention, Transformer Engine's with its fused kernel.
            rotary_pos_emb=rotary_angles(positions_1T[0], self.rotary_pos_emb.inv_freq) if self.config.apply_rope_fusion else None,
        )
        return self.score(hidden_T1H, rows_R, targets_R, own_T) if self.post_process else hidden_T1H

    def score(self, hidden_T1H: Tensor, rows_R: Tensor, targets_R: Tensor, own_T: Tensor | None) -> Tensor:
        """Log-probabilities of the targets from final hidden states: [R] fp32.

        Args:
            own_T: with context parallelism, which tokens of the pack the hidden states are of; each rank scores its rows.
        """
        if own_T is not None:
            group, num_rows = self.pg_collection.cp, rows_R.shape[0]
            local_T = torch.full((own_T.shape[0] * group.size(),), -1, device=own_T.device)
            local_T[own_T] = torch.arange(own_T.shape[0], device=own_T.device)
            local_R = local_T[rows_R]
            places = (local_R >= 0).nonzero().squeeze(1)  # the one place where the host waits for the device
            logp_own = self.score(hidden_T1H, local_R[places], targets_R[places], None)
            return sum_rows(logp_own, places, num_rows, group)
        if self.config.sequence_parallel:
            # Its backward sums over ranks while it scatters, so the head leaves its gradient unsummed.
            hidden_T1H = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_T1H, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        # A row occurs at most twice (the last prompt token), and a + b = b + a: the backward's adds have one result in any order.
        hidden_RH = hidden_T1H.squeeze(1).index_select(0, rows_R)
        logp_R: Tensor = self.output_layer(hidden_RH, targets_R)
        return logp_R

    def _logprobs(self, hidden_RH: Tensor, targets_R: Tensor) -> Tensor:
        """What stands in the place of the output layer's product."""
        tensor_group = self.pg_collection.tp
        weight_VH = self.shared_embedding_or_output_weight() if self.shape.tied_embeddings else self.output_layer.weight
        return vocab_parallel_logprobs(
            hidden_RH,
            weight_VH,
            targets_R,
            group=tensor_group,
            vocab_start=tensor_group.rank() * weight_VH.shape[0],
            vocab_size=self.shape.vocab_size,
            kept_bytes=self.kept_logit_bytes,
            reduce_hidden_grad=not self.config.sequence_parallel,
        )


def build_model(
    shape: ModelShape,
    runtime: Runtime,
    *,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    recompute_layers: int | None = None,
    kept_logit_bytes: int = KEPT_BYTES,
    fp8: Fp8 | None = None,
) -> list[SpinModel]:
    """Build this rank's stages, parameters uninitialised: `load_huggingface` or a checkpoint fills them.

    Args:
        recompute: "selective" computes MLPs (and experts) again in the backward, the largest activations at about a fifth more time;
            "full" whole layers. Attention's own softmax is never stored in any case.
        recompute_layers: with "full", how many layers of each chunk, from its first on; None: all.
        kept_logit_bytes: logits that the head keeps between forward and backward; the others it computes twice, to the same bits.
        fp8: the recipe of the linear layers; dtype must be bfloat16 then.

    Returns:
        One chunk, or parallel.virtual_pipeline of them.

    Raises:
        ValueError: the layout does not divide the model, or the FP8 recipe is not computed here.
    """
    layout = runtime.layout
    layout.check(shape)
    spec = choose_layer_spec(runtime.device)
    if fp8 is not None:
        require_fp8(fp8, spec)
    attention = choose_backend(runtime.device, dtype, head_dim=shape.head_dim, sliding_window=shape.sliding_window)
    if runtime.rank == 0:
        logger.info("layers: %s (%s)", spec.kind, spec.reason)
        logger.info("attention: %s (%s)", attention.name, attention.reason)
        logger.info("precision: %s", dtype if fp8 is None else fp8)
        gradients = choose_weight_gradients(spec, runtime.device)
        logger.info("weight gradients: %s (%s)", gradients.maker, gradients.reason)
    config = transformer_config(
        shape, runtime, dtype=dtype, recompute=recompute, recompute_layers=recompute_layers, spec=spec.kind, fp8=fp8
    )
    layer, norm = layer_submodules(
        spec.kind, num_experts=shape.num_experts, qk_norm=shape.qk_norm, attention=attention, inv_freq=inverse_frequencies(shape)
    )
    virtual = layout.virtual_pipeline
    chunks = []
    for stage in range(virtual):
        vp_stage = stage if virtual > 1 else None
        num_layers = get_num_layers_to_build(config, vp_stage, runtime.pipeline_rank)
        chunk = SpinModel(
            config,
            shape,
            TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm),
            kept_logit_bytes=kept_logit_bytes,
            pre_process=runtime.is_first_stage and stage == 0,
            post_process=runtime.is_last_stage and stage == virtual - 1,
            pg_collection=runtime.groups.megatron,
            vp_stage=vp_stage,
        )
        if spec.kind == "local":
            make_inputs_again(chunk)
        chunks.append(chunk.to(runtime.device))
    return chunks


def transformer_config(
    shape: ModelShape,
    runtime: Runtime,
    *,
    dtype: torch.dtype,
    recompute: Recompute,
    spec: SpecKind,
    recompute_layers: int | None = None,
    fp8: Fp8 | None = None,
) -> TransformerConfig:
    """Megatron Core's settings for this model, layout and device. Dropout is off; fusions follow what is installed."""
    layout = runtime.layout
    has_te = spec == "transformer_engine"
    on_cuda = runtime.device.type == "cuda"
    is_dense = shape.num_experts is None
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        qk_layernorm=shape.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        # Our own gated activation stands where Transformer Engine's would (mcore.layers).
        use_te_activation_func=not has_te,
        window_size=None if shape.sliding_window is None else (shape.sliding_window - 1, 0),
        rotary_interleaved=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not on_cuda,
        perform_initialization=False,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=_stages(layout),
        # With two ranks and virtual stages a batch holds an activation and a gradient from one rank to the other and back: matched by
        # order, they are taken for each other. One by one, Megatron Core gives each direction its own group.
        batch_p2p_comm=not (layout.pipeline == 2 and layout.virtual_pipeline > 1),
        sequence_parallel=layout.sequence,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.tensor,
        apply_rope_fusion=has_te,
        bias_activation_fusion=has_te,
        bias_dropout_fusion=on_cuda,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=choose_weight_gradients(LayerSpec(spec, ""), runtime.device).maker == "apex",
        **_expert_settings(shape, has_te=has_te, on_cuda=on_cuda),
        **_recompute_settings(recompute, recompute_layers, is_dense=is_dense),
        **({} if fp8 is None else fp8.settings()),
    )


def _stages(layout: ParallelLayout) -> list[list[str]] | None:
    """What each pipeline stage holds, as Megatron Core names it; None where all have as many layers."""
    if not layout.stage_layers:
        return None
    stages = [["decoder"] * count for count in layout.stage_layers]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _expert_settings(shape: ModelShape, *, has_te: bool, on_cuda: bool) -> dict[str, Any]:
    """Routing as Mixtral and Qwen3-MoE have it: softmax over the chosen experts, no auxiliary loss, no dropped tokens."""
    if shape.num_experts is None:
        return {}
    return {
        "num_moe_experts": shape.num_experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.expert_ffn_hidden_size,
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": has_te,
        # Without it a token's experts are summed by atomic adds on a GPU: of three and more the last bits differ from pass to pass, and
        # margins would not start at exactly 0. Transformer Engine's kernel sums them in one order.
        "moe_permute_fusion": has_te,
        # Megatron Core's alltoall hands gloo its split sizes as tensors, which only the path over CUDA turns into numbers.
        "moe_token_dispatcher_type": "alltoall" if on_cuda else "allgather",
    }


def _recompute_settings(recompute: Recompute, num_layers: int | None, *, is_dense: bool) -> dict[str, Any]:
    if recompute == "none":
        return {}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp" if is_dense else "moe"]}
    method = {"recompute_method": "uniform", "recompute_num_layers": 1}
    if num_layers is not None:
        method = {"recompute_method": "block", "recompute_num_layers": num_layers}
    return {"recompute_granularity": "full", **method}


def load_huggingface(chunks: Sequence[SpinModel], folder: Path, shape: ModelShape, runtime: Runtime, *, show: bool) -> None:
    """Fill every parameter of this rank's chunks from a Hugging Face folder, reading only the slices it holds.

    Raises:
        ValueError: the folder lacks a tensor, or one has another shape than config.json says.
    """
    source = HfFolder(folder)
    check_tensors(source, shape)
    load_parameters(chunks, source.get_slice, shape, runtime, show=show)


def load_parameters(chunks: Sequence[SpinModel], fetch: Fetch, shape: ModelShape, runtime: Runtime, *, show: bool) -> None:
    """Fill every parameter from a source of Hugging Face tensor slices. Padded vocabulary rows become 0."""
    named = [(name, parameter) for chunk in chunks for name, parameter in global_parameters(chunk, shape, runtime)]
    with torch.no_grad(), progress_bar("load weights (parameters)", len(named), show=show) as advance:
        for name, parameter in named:
            shard = megatron_shard(name, shape, fetch, runtime.layout.tensor, runtime.tensor_rank)
            parameter.copy_(shard)
            advance(1)


def global_parameters(chunk: torch.nn.Module, shape: ModelShape, runtime: Runtime) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name in the whole model as convert.families has it, parameter) of a chunk, wrapped in DDP or not."""
    inner = unwrapped(chunk)
    layers = [layer.layer_number - 1 for layer in inner.decoder.layers]
    experts_per_rank = (shape.num_experts or 0) // runtime.layout.expert
    first_expert = runtime.expert_rank * experts_per_rank
    for local_name, parameter in inner.named_parameters():
        name = global_name(local_name, layers=layers, first_expert=first_expert)
        assert name is not None, local_name
        yield name, parameter


def unwrapped(chunk: torch.nn.Module) -> SpinModel:
    """The model inside Megatron Core's wrappers (DistributedDataParallel), or the chunk itself."""
    while not isinstance(chunk, SpinModel):
        inner = chunk.module
        assert isinstance(inner, torch.nn.Module)
        chunk = inner
    return chunk
