"""TRL's side of train_step.py, in the interpreter that has TRL: reads a `Work` as JSON from standard input, prints an `Outcome`.

Its configuration is the fastest that TRL 1.16 has for these numbers: reference log-probs computed before training, no gradient
checkpointing (but in a row that asks for it, to save memory), torch's fused AdamW and the chunked head TRL always uses; on CUDA Liger's
layer kernels and bf16 autocast over fp32 weights, which is what Megatron Core's bf16 with fp32 main parameters computes. Padding-free
batches are switched off in TRL 1.16 itself ("temporarily unavailable after a refactor"), so batches are padded to their longest
sequence; --trl-pairs says how many pairs make one.
"""

import importlib.util
import itertools
import json
import sys
import tempfile
import time
from typing import Any

import torch

from tools.benchmarks.problem import peak_bytes


def settings_of(work: dict[str, Any], folder: str) -> Any:
    """TRL's configuration."""
    from trl import DPOConfig

    on_cuda, per_batch = work["device"] != "cpu", work["trl_pairs"]
    return DPOConfig(
        output_dir=folder,
        loss_type="sigmoid",
        beta=work["beta"],
        precompute_ref_log_probs=True,
        max_length=None,
        per_device_train_batch_size=per_batch,
        gradient_accumulation_steps=len(work["pairs"]) // per_batch,
        num_train_epochs=work["steps"],
        learning_rate=work["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=work["dtype"] == "bfloat16",
        use_cpu=not on_cuda,
        use_liger_kernel=on_cuda,
        gradient_checkpointing=work.get("trl_checkpointing", False),
        dataloader_pin_memory=on_cuda,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        seed=0,
    )


def trainer_of(work: dict[str, Any], folder: str) -> Any:
    """A DPOTrainer over the work's pairs that notes each step's loss and seconds."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOTrainer

    on_cuda = work["device"] != "cpu"

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Wall and CPU seconds at the start of training and at the end of each step."""

        ticks: list[tuple[float, float]] = []  # noqa: RUF012 (one clock a process)

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._tick()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self._tick()

        def _tick(self) -> None:
            if on_cuda:
                torch.cuda.synchronize()
            self.ticks.append((time.perf_counter(), time.process_time()))

    class TokenTrainer(DPOTrainer):  # type: ignore[misc]
        """Takes token ids as they are: no template, no EOS of its own."""

        clock = Clock()
        micro_losses: list[torch.Tensor] = []  # noqa: RUF012

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.micro_losses.append(loss.detach())
            return loss

    attention = "flash_attention_2" if on_cuda and importlib.util.find_spec("flash_attn") else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32, attn_implementation=attention)
    pairs = [{"prompt_ids": pair["prompt"], "chosen_ids": pair["real"], "rejected_ids": pair["generated"]} for pair in work["pairs"]]
    special = dict.fromkeys(("pad_token", "eos_token"), "<pad>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, "<pad>")), **special)
    trainer = TokenTrainer(model, args=settings_of(work, folder), train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    trainer.add_callback(trainer.clock)
    return trainer


def main() -> None:
    """Train and print what was found as one line of JSON."""
    work = json.load(sys.stdin)
    torch.set_num_threads(work["threads"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(work, folder)
        trainer.train()
    ticks, per_step = trainer.clock.ticks, len(trainer.micro_losses) // work["steps"]
    # sum over the step's micro-batches: the trainer divides each by their number
    losses = [float(sum(trainer.micro_losses[start : start + per_step])) for start in range(0, len(trainer.micro_losses), per_step)]
    reference = {name: list(map(float, trainer.train_dataset[f"ref_{name}_logps"])) for name in ("chosen", "rejected")}
    outcome = {
        "wall_seconds": [after[0] - before[0] for before, after in itertools.pairwise(ticks)],
        "cpu_seconds": [after[1] - before[1] for before, after in itertools.pairwise(ticks)],
        "losses": losses,
        "peak_bytes": peak_bytes(work["device"]),
        "reference_real": reference["chosen"],
        "reference_generated": reference["rejected"],
        "versions": {"trl": importlib.import_module("trl").__version__},
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
