"""A small real training run for the tests: transformers' Trainer on a tiny GPT-NeoX, saving a checkpoint every ten steps and announcing each.

    python training_run.py FOLDER RUN LAST GATE TORN

It goes on from the last whole checkpoint that FOLDER has. After the checkpoint of step S it waits until the file GATE-S is there. Where TORN is a step (not
0), its checkpoint is left as a crash in mid-save leaves it, and the process kills itself.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from flows.announce import AnnounceCheckpoints

EVERY = 10


class Gate(TrainerCallback):
    """Holds the training after each checkpoint until the test has looked."""

    def __init__(self, gate: str):
        self.gate = gate

    def on_save(self, args, state, control, **kwargs):
        while not Path(f"{self.gate}-{state.global_step}").exists():
            time.sleep(0.1)


class TornTrainer(Trainer):
    """Dies in the middle of saving one checkpoint: half the weights, and nothing of what the Trainer writes after them."""

    torn = 0

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self.torn and output_dir and output_dir.endswith(f"checkpoint-{self.torn}"):
            weights = Path(output_dir) / "model.safetensors"
            os.truncate(weights, weights.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, run: str, last: int, gate: str, torn: int) -> None:
    set_seed(0)
    shape = GPTNeoXConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
    )
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{i}": i for i in range(1, 97)}}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>", pad_token="<eos>")
    ids = torch.randint(1, 97, (64, 32))
    arguments = TrainingArguments(
        folder,
        max_steps=last,
        save_steps=EVERY,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = TornTrainer(
        AutoModelForCausalLM.from_config(shape),
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        processing_class=wrapped,
        callbacks=[AnnounceCheckpoints(run), Gate(gate)],
    )
    trainer.torn = torn
    whole = [p for p in Path(folder).glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    newest = max(whole, key=lambda p: json.loads((p / "trainer_state.json").read_text())["global_step"], default=None)
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
