"""How well does a reward model on frozen features agree with real people? 1,600 pairs that crowd workers judged, a fifth held out.

    make bench-human_pairs        all pairs; the features take about half an hour on two cores and are kept in build/
    PAIRS=400 make bench-human_pairs
    QUICK=1 make bench-human_pairs        40 pairs: shows that it runs, too few to conclude from

Goes the way of `plaudit feedback import`: file, event log, archive, snapshot, labels. Length alone stands beside the
figure, and the control is the same fit on shuffled labels, which must agree with nobody.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness import Report
from examples.smollm2.convert import policy_dir
from feedback import snapshot
from feedback.config import FeedbackSettings, Settings
from feedback.importer import import_file
from feedback.stores import open_stores
from trainer.config import RewardModelSettings
from trainer.held_out import Accuracy, choice_accuracy
from trainer.labels import Labels, from_snapshot
from trainer.policy import Policy
from trainer.reply import Reply
from trainer.reward_model import fit
from trainer.ridge import folds_of

PAIRS_FILE = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "hh-harmless-dev.jsonl.gz"
CACHE = Path("build/bench/human_pairs")
TAIL = 192
"""Tokens of a conversation that are read, from its end."""
QUICK_PAIRS = 40
SEED = 0


def tail(reply: Reply) -> Reply:
    """The last TAIL tokens, at least one of the prompt."""
    tokens = reply.tokens[-(TAIL - 1) :]
    return Reply(reply.prompt[-(TAIL - len(tokens)) :], tokens, reply.finished)


class TailPolicy(Policy):
    """Reads only the last TAIL tokens, and keeps what it computed, so that an interrupted run goes on."""

    def features(self, replies: Sequence[Reply]) -> Tensor:
        short = [tail(reply) for reply in replies]
        name = hashlib.sha256(repr([(reply.prompt, reply.tokens) for reply in short]).encode()).hexdigest()
        path = CACHE / f"{name}.safetensors"
        if not path.exists():
            found_BD = super().features(short)
            CACHE.mkdir(parents=True, exist_ok=True)
            save_file({"features": found_BD.contiguous()}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        kept_BD: Tensor = load_file(path)["features"]
        return kept_BD


def import_pairs(folder: Path, pairs: int) -> tuple[list[snapshot.Row], int]:
    """Rows of the first pairs, and how many a second import of them added (none)."""
    lines = gzip.decompress(PAIRS_FILE.read_bytes()).splitlines()[:pairs]
    part = folder / "pairs.jsonl.gz"
    part.write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    stores = open_stores(Settings(feedback=FeedbackSettings(data_dir=folder / "data")))
    try:
        import_file(part, "hh-harmless", stores.log, stores.subjects)
        again = import_file(part, "hh-harmless", stores.log, stores.subjects)
        stores.archive.ingest(stores.logs)
        return snapshot.build(stores.archive, stores.subjects, folder / "snapshots").rows, again.added
    finally:
        stores.close()


def held_out_fifth(labels: Labels, settings: RewardModelSettings) -> tuple[Accuracy, Accuracy]:
    """Accuracy of the model, and of length alone, on the prompts of one fifth that neither saw."""
    fold_of = folds_of(len(labels.prompts), 5, SEED)
    inside, outside = labels.where_prompt(fold_of != 0), labels.where_prompt(fold_of == 0)
    model = fit(inside, settings)
    lengths_N = torch.tensor([answer.tokens for answer in labels.answers], dtype=torch.float64)
    rule = 1.0 if choice_accuracy(inside, lengths_N).value >= 0.5 else -1.0
    return choice_accuracy(outside, model.score(labels.features_ND)[0]), choice_accuracy(outside, rule * lengths_N)


def main() -> int:
    report = Report("human_pairs", seed=SEED)
    if not PAIRS_FILE.exists():
        return report.skip(f"{PAIRS_FILE.name} is not there; it is not part of the repository")
    pairs = QUICK_PAIRS if os.environ.get("QUICK") else int(os.environ.get("PAIRS", "1600"))
    with tempfile.TemporaryDirectory() as name:
        rows, added_again = import_pairs(Path(name), pairs)
    policy = TailPolicy.load(policy_dir(Path("data")))
    labels = from_snapshot(rows, policy, None, progress=lambda what, share: print(f"{what}: {share:.0%}", flush=True))
    settings = RewardModelSettings()
    accuracy, length = held_out_fifth(labels, settings)
    shuffled, _ = held_out_fifth(labels.shuffled(SEED), settings)
    report.check("pairs imported", len(rows), at_least=pairs - pairs // 100)
    report.check("pairs that a second import added", added_again, at_most=0)
    # With 40 pairs the interval is wider than the effect.
    report.check("lower end of the accuracy on held-out pairs", accuracy.low, at_least=0.0 if pairs < 400 else 0.5)
    report.control("the same fit on shuffled labels agrees with nobody", caught=shuffled.low <= 0.5 <= shuffled.high)
    return report.finish({"accuracy": asdict(accuracy), "length_alone": asdict(length), "shuffled": asdict(shuffled), "pairs": len(rows)})


if __name__ == "__main__":
    raise SystemExit(main())
