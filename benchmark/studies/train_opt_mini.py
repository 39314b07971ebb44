"""Train ``opt_mini`` and its tokenizer from scratch on the training chapters of Moby Dick.

Run it as ``python -m benchmark.studies.train_opt_mini``. It makes the bundle
``benchmark/subject/models/opt_mini/`` in a quarter of an hour on two cores. Interrupted, it goes on from its
last checkpoint when it is run again with the same settings. The test split is never read.

Gradients are summed by thread, so another machine or thread count ends at weights that differ in their last
digits, and with them the digests, the identity of every cell and ``expected`` in
``benchmark/subject/models/opt.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.subject.lookup import get_model
from benchmark.subject.models.bundle import MANIFEST, TOKENIZER, read_manifest, seal_bundle, write_weights
from benchmark.subject.models.decoder import OUTPUT
from benchmark.subject.tasks.task import get_task
from quanttune.answers import UNSCORED
from quanttune.seeds import derive_seed, torch_generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from benchmark.subject.models.opt import BundledDecoder
    from quanttune.tuner import TrainingBatch

NAME = "opt_mini"
SEED = 0
SPECIAL_TOKENS = ("</s>", "<pad>")  # ids 0 and 1
SCHEDULE: dict[str, Any] = {
    "steps": 1500,
    "learning_rate": 1.5e-3,
    "batch_size": 8,
    "warmup": 0.05,
    "weight_decay": 0.1,
}


def train_tokenizer(text: str, vocabulary: int) -> str:
    """Fit byte-level BPE to a text.

    Returns:
        The tokenizer as the JSON of the library ``tokenizers``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return str(tokenizer.to_str(pretty=True))


def random_windows(
    tokens: Tensor, length: int, batch_size: int, generator: torch.Generator
) -> Iterator[TrainingBatch]:
    """Endless batches of windows that begin anywhere in a text, all tokens but the first scored.

    Args:
        tokens: Token ids of the text, ``(tokens,)``.
        length: Tokens of a window.
        batch_size: Windows a batch.
        generator: Draws where they begin.
    """
    import torch

    while True:
        starts = torch.randint(0, len(tokens) - length + 1, (batch_size,), generator=generator)
        windows = torch.stack([tokens[start : start + length] for start in starts.tolist()])
        targets = windows.clone()
        targets[:, 0] = UNSCORED
        yield {"input_ids": windows, "attention_mask": torch.ones_like(windows)}, targets


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write the bundle; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.studies.train_opt_mini", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, help="folder of the bundle; by default the package's own")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads; they decide the last digits")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / NAME,
        help="folder of the bundle in the making and of the checkpoint",
    )
    options = parser.parse_args(arguments)

    import torch

    torch.set_num_threads(options.threads)
    entry: Any = get_model(NAME)
    made = make_bundle(dataclasses.replace(entry, folder=options.work), options.threads)
    output = options.output or entry.folder
    shutil.copytree(
        options.work,
        output,
        dirs_exist_ok=True,
        ignore=lambda _, names: set(names) - {MANIFEST, *made["files"]},
    )
    sys.stdout.write(f"{output}: validation perplexity {made['validation_perplexity']}\n")
    return 0


def make_bundle(entry: BundledDecoder, threads: int) -> dict[str, Any]:
    """Train tokenizer and weights in ``entry.folder`` and return the manifest."""
    import tokenizers
    import torch
    import transformers

    from baselines.method import MemoryStages
    from benchmark.engine.measure import evaluate
    from quanttune.tuner import Schedule, tune

    task: Any = get_task(entry.task)
    entry.folder.mkdir(parents=True, exist_ok=True)
    text = task.text("train")
    tokenizer = train_tokenizer(text, entry.settings["vocab_size"])
    (entry.folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
    seal_bundle(entry.folder, {})  # the entry reads no file without a digest

    tokens = task.tokens(entry, "train")
    order = torch_generator(SEED, NAME, "windows")
    schedule = Schedule(**SCHEDULE)
    model = entry.build()
    tune(
        model,
        random_windows(tokens, task.length, schedule.batch_size, order),
        task.loss,
        schedule,
        seed=derive_seed(SEED, NAME),
        autocast=torch.bfloat16,  # a third less time; the weights themselves stay in float32
        checkpoint=entry.folder / "checkpoint",
        progress=_say,
    )
    state = {name: tensor for name, tensor in model.state_dict().items() if name != OUTPUT}
    write_weights(entry.folder, state)
    seal_bundle(entry.folder, {})
    model.load_state_dict(entry.make_reference(MemoryStages(), lambda *_: None))  # in half precision
    items = evaluate(
        model,
        task,
        entry,
        split="validation",
        device=torch.device("cpu"),
        progress=lambda *_: None,
    )
    seal_bundle(
        entry.folder,
        {
            "made_by": "python -m benchmark.studies.train_opt_mini",
            "data": task.fingerprint(),
            "tokens": len(tokens),
            "characters": len(text),
            "schedule": dataclasses.asdict(schedule),
            "autocast": "bfloat16",
            "seed": SEED,
            "threads": threads,
            "versions": {item.__name__: item.__version__ for item in (torch, transformers, tokenizers)},
            "validation_perplexity": round(task.metric_value(items.scores), 3),
        },
    )
    return read_manifest(entry.folder)


def _say(done: int, total: int, loss: float) -> None:
    if done % 50 == 0:
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} step {done}/{total}, loss {loss:.3f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
