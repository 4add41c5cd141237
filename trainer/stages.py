"""The stages of a cycle, in order. Each leaves a file in the cycle's folder and does nothing where it is there already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from deploy.gates import Evaluation
from deploy.lineage import forget
from deploy.manifest import ManifestFields, base_digests, write_adapter
from feedback import files
from feedback.errors import SnapshotRedacted, TrainingRefused
from feedback.snapshot import Snapshot, redacted
from trainer import distributed, metrics, raters, seeds
from trainer.budget import Step
from trainer.copied import copied, written
from trainer.critic import Warmup
from trainer.evaluation import Answers, Judge, Sampling, evaluate, kl_of, sample
from trainer.held_out import NORMAL_95, UnseenRaters, foretold, held_out, length_share, likelihood_gain, unseen_raters
from trainer.influence import Refits, influence
from trainer.knowledge import knowledge
from trainer.labels import Labels, Progress, features_of, from_snapshot
from trainer.policy import Policy
from trainer.ppo import Options, train
from trainer.reply import Reply
from trainer.reward_model import RewardModel, fit, load, split_raters
from trainer.ridge import CrossFit, cross_validate
from trainer.rollouts import rollouts_for
from trainer.schedule import Job, LearningSettings
from trainer.score import Scorer
from trainer.screening import of_another_base, prompts_of, within_context
from trainer.seeds import folder_of, seed_of
from trainer.tastes import tastes

NOT_FINITE = ("loss", "score")
"""Fields of the errors with which PPO ends on a number that is none. Its last checkpoint is good."""
FORESEEN_BY = "ridge's on frozen features, cross-fitted"
"""Whose held_out_nll, accuracy, calibration, side bias, standings of raters and likelihood gain are, whichever model scores."""
BASE_SEED, EVALUATION_SEED = 100_000, 200_000
"""Far from PPO's seeds, which count its steps: equal seeds would give equal random numbers to answers that should be independent."""


def write_json(path: Path, value: object) -> None:
    """Atomically: a reader or a restart sees all of it or nothing."""
    files.replace(path, json.dumps(value, indent=1, sort_keys=True).encode())


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def refuse_redacted(snapshot: Snapshot, folder: Path) -> None:
    """Raises SnapshotRedacted where somebody was erased from the snapshot, and leaves nothing of them in the cycle's folder."""
    if distributed.from_first(redacted(snapshot.path)):  # or some of several processes would go on
        if (folder / "adapter.json").exists():
            forget(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise SnapshotRedacted(f"somebody whose ratings are in snapshot {snapshot.digest[:16]} was erased; train from a new one")


def _save_replies(path: Path, replies: Sequence[Reply], features_ND: Tensor, warnings: Sequence[str]) -> None:
    about = {"replies": json.dumps([[reply.prompt, reply.tokens, reply.finished] for reply in replies]), "warnings": json.dumps(warnings)}
    files.replace(path, save({"features": features_ND.contiguous()}, metadata=about))


def _load_replies(path: Path) -> tuple[list[Reply], Tensor, list[str]]:
    with safe_open(path, framework="pt") as file:
        about = {name: json.loads(value) for name, value in file.metadata().items()}
        features_ND = file.get_tensor("features")
    return [Reply(tuple(prompt), tuple(tokens), finished) for prompt, tokens, finished in about["replies"]], features_ND, about["warnings"]


class Stages:
    """What the stages share: the job, its folder, and the policy, loaded once."""

    def __init__(self, job: Job, settings: LearningSettings, snapshot: Snapshot, folder: Path, progress: Progress) -> None:
        self.job, self.settings, self.snapshot, self.folder, self.progress = job, settings, snapshot, folder, progress
        self._policy: Policy | None = None

    @property
    def policy(self) -> Policy:
        """Loaded once, when a stage first needs it; the adapter is fresh until `improve`."""
        if self._policy is None:
            self._policy = self._fresh(0)
        return self._policy

    def _fresh(self, index: int) -> Policy:
        """What run number `index` of PPO starts from."""
        ppo = self.settings.ppo
        return self._load(rank=ppo.rank, alpha=ppo.alpha, seed=seed_of(self.settings.cycle.seed, index))

    def _load(self, **how: Any) -> Policy:
        return Policy.load(self.job.policy, **how, **self.settings.hardware.model_dump())

    def label(self) -> None:
        path = self.folder / "labels.safetensors"
        if not path.exists():
            single, job = self.settings.reward_model.allow_single_rater, self.job
            rows, warnings = within_context(self.snapshot.rows, self.policy, job.system_prompt, job.max_model_len)
            if not rows:
                raise TrainingRefused(f"labels: {warnings[0]}, so 0 are left; raise policy.max_model_len", field="labels")
            if job.answered_by is not None:
                warnings += of_another_base(rows, job.answered_by, base_digests(job.policy))
            labels = from_snapshot(rows, self.policy, job.system_prompt, allow_single_rater=single, progress=self.progress)
            labels = replace(labels, warnings=(*labels.warnings, *warnings))
            if self.settings.cycle.shuffle_labels:
                labels = labels.shuffled(self.settings.reward_model.seed)
            labels.save(path)

    def sample_base(self) -> None:
        """Answers of the base to the prompts that PPO will use: zero and unit of the score, and the critic's start."""
        path = self.folder / "base.safetensors"
        if path.exists():
            return
        job = self.job
        found = prompts_of(self.snapshot.rows, self.policy, job.system_prompt, job.max_model_len, job.max_tokens)
        prompts = found.fitting
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(self.settings.cycle.seed))
        chosen = [json.loads(prompts[int(i)]) for i in order[: self.settings.cycle.max_prompts]]
        how = self._sampling(self.settings.reward_model.base_samples, BASE_SEED)
        replies = sample(self.policy, chosen, how, reference=True, progress=self.progress, what="answers of the base")
        features_ND = features_of(self.policy, replies, self.progress, "features of the base's answers")
        _save_replies(path, replies, features_ND, found.warnings)

    def _sampling(self, samples: int, stream: int) -> Sampling:
        job = self.job
        return Sampling(job.system_prompt, job.temperature, job.max_tokens, samples, self.settings.cycle.seed * 1_000_003 + stream)

    def _labels(self) -> Labels:
        labels = Labels.load(self.folder / "labels.safetensors")
        return replace(labels, weights_U=raters.reliability(labels)) if self.settings.reward_model.discount_unreliable else labels

    def fit_rewards(self) -> None:
        """The reward model, where raters suffice another one from other raters, and what can be said about both."""
        if (self.folder / "reward.json").exists():
            return
        settings = self.settings.reward_model
        labels = self._labels()
        main, watch = split_raters(labels, settings.watch_share, settings.watch_min_raters, settings.watch_min_labels, settings.seed)
        self.progress("reward model", 0.0)
        # Map and ridge are chosen once, on all ratings, so that what was held out is known of them all.
        chosen = cross_validate(labels, settings)
        model = fit(main, settings, chosen, self._reader(main))
        model.save(self.folder / "reward_model.safetensors")
        if watch is not None:
            self.progress("second reward model", 0.5)
            fit(watch, settings, chosen, self._reader(watch)).save(self.folder / "watch_model.safetensors")
        self.progress("held-out accuracy", 0.8)
        others = unseen_raters(labels, settings, chosen)
        accuracy = held_out(labels, chosen, others)
        warnings = [*labels.warnings, *_load_replies(self.folder / "base.safetensors")[2]]
        if chosen.at_edge:
            warnings.append(f"reward model: the best ridge {chosen.ridge:g} lies on the edge of what was compared")
        body = {
            "id": model.id,
            "family": model.about["family"],
            "map": model.about["map"],
            "ridge": model.about["ridge"],
            "held_out_nll": model.about["held_out_nll"],
            "first_fold_nll": model.about.get("first_fold_nll"),
            "foreseen_by": FORESEEN_BY,
            "scalars": model.about["scalars"],
            "choices": len(labels.choices),
            "thumbs": len(labels.thumbs),
            "raters": len(labels.raters),
            "simulated_raters": sum("simulated" in cohorts for cohorts in labels.cohorts),
            "ratings_by_rater": {name: int(n) for name, n in zip(labels.raters, _ratings_by_rater(labels), strict=True)},
            "second": watch is not None,
            "accuracy": {name: asdict(value) if value else None for name, value in accuracy.items()},
            "length_share": length_share(labels, model.score(model.features(labels.replies, labels.features_ND))[0]),
            **_told(labels, chosen, others, model, discounted=settings.discount_unreliable),
            "likelihood_gain": asdict(likelihood_gain(labels, chosen)),
            "tastes": [asdict(taste) | {"words": taste.words} for taste in tastes(labels)],
            "warnings": warnings,
            "shuffled": self.settings.cycle.shuffle_labels,
        }
        write_json(self.folder / "reward.json", body)
        self.progress("reward model", 1.0)

    def _reader(self, labels: Labels) -> Policy | None:
        """The policy, where there are choices enough for a reward model that reads answers itself; loading it takes a while."""
        return self.policy if len(labels.choices) >= self.settings.reward_model.ensemble_from_choices else None

    def _scorer(self, name: str) -> Scorer:
        replies, frozen_ND, _ = _load_replies(self.folder / "base.safetensors")
        return Scorer.fit(load(self.folder / name, self.policy), replies, frozen_ND, self.settings.reward_model.clip)

    def improve(self) -> None:
        """PPO, once for each seed. A reward model that learned nothing is not worth a second look."""
        nothing = nothing_learned(read_json(self.folder / "reward.json")["likelihood_gain"], self.settings.reward_model.min_likelihood_gain)
        for index in range(1 if nothing else self.settings.cycle.seeds):
            folder = folder_of(self.folder, index)
            if not (folder / "ppo.json").exists():
                folder.mkdir(exist_ok=True)
                if index:
                    self._policy = self._fresh(index)
                self._improve(index, folder, nothing)

    def _improve(self, index: int, folder: Path, nothing: str | None) -> None:
        replies, _, _ = _load_replies(self.folder / "base.safetensors")
        score = self._scorer("reward_model.safetensors")
        watched = (self.folder / "watch_model.safetensors").exists()
        live = folder / "metrics.jsonl"
        settings = self.settings.ppo.model_copy(update={"iterations": 0}) if nothing else self.settings.ppo
        policy, seed = self.policy, seed_of(self.settings.cycle.seed, index)
        what = "PPO" if index == 0 else f"PPO, seed {index + 1} of {self.settings.cycle.seeds}"

        def on_step(step: Step) -> None:
            refuse_redacted(self.snapshot, self.folder)
            with live.open("a") as file:
                file.write(json.dumps(asdict(step)) + "\n")
            metrics.step(seed, asdict(step))
            self.progress(what, min(1.0, step.step / settings.iterations) if settings.iterations else 1.0)

        options = Options(
            rollouts=rollouts_for(policy, self.settings.rollouts, folder),
            watch=self._scorer("watch_model.safetensors").watched if watched else None,
            warmup=Warmup(replies, score.base_scores),
            on_step=on_step,
            checkpoint=folder / "ppo.pt",
        )
        prompts = list(dict.fromkeys(reply.prompt for reply in replies))
        tokens, temperature = self.job.max_tokens, self.job.temperature
        try:
            result = train(policy, prompts, score, settings, max_tokens=tokens, temperature=temperature, seed=seed, options=options)
        except TrainingRefused as exc:
            if exc.field not in NOT_FINITE:
                raise
            kept = f"it is {options.checkpoint}" if options.checkpoint and options.checkpoint.exists() else "there is none yet"
            raise TrainingRefused(
                f"{exc.message} ({kept}). `plaudit train` goes on there; where it ends at the same step again, this was no passing fault: "
                "set a smaller ppo.learning_rate, which begins another cycle about the same ratings",
                field=exc.field,
            ) from exc
        policy.save(folder / "policy")
        steps = [asdict(step) for step in result.steps]
        # A run that was killed between a line and its checkpoint left that line twice; now each step stands once.
        files.replace(live, "".join(json.dumps(step) + "\n" for step in steps).encode())
        scale = {"zero": score.normaliser.zero, "unit": score.normaliser.unit}
        body = asdict(result) | {"steps": steps, "seed": seed, "scale": scale}
        write_json(folder / "ppo.json", body | ({"stopped_because": nothing} if nothing else {}))

    def judge(self) -> None:
        if (self.folder / "evaluation.json").exists():
            return
        job, settings = self.job, self.settings
        self._policy = None
        candidate = self._load(adapter=self.folder / "policy")
        stable = self._load(adapter=job.stable) if job.stable else None
        model = load(self.folder / "reward_model.safetensors", candidate)
        how = self._sampling(settings.cycle.evaluation_samples, EVALUATION_SEED)
        judge = Judge.of(candidate, model, job.held_out, how, settings.reward_model.clip, self.progress)
        body, details, answers = evaluate(judge, candidate, stable, job.probes)
        body["seeds"] = self._seeds(judge, answers, body["kl_nats"])
        body["copied"] = self._copied(judge, candidate, answers)
        body["influence"] = self._influence(judge, answers)
        points = settings.cycle.facts_margin_points
        knows, shown = knowledge(job.facts, candidate, stable, how, points, self.progress)
        body, details = body | knows, details | shown
        body["kl_budget_nats"] = read_json(self.folder / "ppo.json")["kl_target_nats"]
        body["likelihood_gain"] = read_json(self.folder / "reward.json")["likelihood_gain"]
        body["shuffled"] = settings.cycle.shuffle_labels
        Evaluation.model_validate(body)  # what the gates could not read must fail here, not there
        write_json(self.folder / "details.json", details)
        write_json(self.folder / "evaluation.json", body)

    def _seeds(self, judge: Judge, candidate: Answers, kl_nats: float) -> dict[str, Any]:
        """What PPO's other runs led to, beside the candidate."""
        first = self.settings.cycle.seed
        outcomes = [seeds.Outcome(first, candidate, kl_nats, read_json(self.folder / "ppo.json"))]
        for index in range(1, self.settings.cycle.seeds):
            folder = folder_of(self.folder, index)
            if (folder / "ppo.json").exists():
                policy = self._load(adapter=folder / "policy")
                answers = judge.answers(policy, f"seed {index + 1}", stream=index)
                kl = kl_of(policy, answers.replies, self.job.temperature)["all_replies"]
                outcomes.append(seeds.Outcome(seed_of(first, index), answers, kl, read_json(folder / "ppo.json")))
        found = seeds.compare(outcomes, judge.base, judge.how.samples)
        return found | {"words": seeds.words(found), "lucky": seeds.undecided(found)}

    def _influence(self, judge: Judge, candidate: Answers) -> dict[str, Any]:
        """Whose ratings made the reward that the candidate gained."""
        reward, settings = read_json(self.folder / "reward.json"), self.settings
        self.progress("reward models without each cohort", 0.0)
        fits = Refits(self._labels(), settings.reward_model, reward["map"], reward["ridge"], (judge.base, candidate))
        found = influence(fits, judge.how.samples, None if settings.cycle.shuffle_labels else settings.reward_model.seed)
        self.progress("reward models without each cohort", 1.0)
        return found

    def _copied(self, judge: Judge, policy: Policy, candidate: Answers) -> dict[str, int]:
        """How much of what only few people wrote the candidate says. The strings stay in the cycle's folder."""
        prompts = [prompt for prompt in judge.prompts for _ in range(judge.how.samples)]
        replies, _, _ = _load_replies(self.folder / "base.safetensors")
        base = [*judge.base.texts, *(policy.decode(reply.tokens) for reply in replies), self.job.system_prompt or ""]
        figures, found = copied(written(self.snapshot.rows), prompts, candidate.texts, base)
        if found:
            write_json(self.folder / "copied.json", [asdict(each) for each in found])
        return figures

    def publish(self, adapters: Path) -> None:
        if (self.folder / "adapter.json").exists():
            return
        fields = ManifestFields(
            kind="trained",
            base_model=self.job.policy_name,
            base=base_digests(self.job.policy),
            temperature=self.job.temperature,
            system_prompt=self.job.system_prompt,
            max_tokens=self.job.max_tokens,
            snapshot=self.snapshot.digest,
            reward_model=read_json(self.folder / "reward.json")["id"],
            settings=self.settings.as_json(),
            code_version=self.settings.code_version,
            seed=self.settings.cycle.seed,
        )
        adapter_id, path = write_adapter(self.folder / "policy", adapters, fields)
        write_json(self.folder / "adapter.json", {"adapter_id": adapter_id, "path": str(path.absolute())})


def _told(labels: Labels, chosen: CrossFit, others: UnseenRaters | None, model: RewardModel, *, discounted: bool) -> dict[str, Any]:
    """Calibration, side bias, agreement and raters, in figures and in words."""
    calibrated, side = foretold(labels, chosen)
    agreed, found = raters.agreement(labels), raters.standings(labels, others)
    dissent = raters.dissenters(found)
    figures = {"calibration": calibrated, "side_bias": side, "agreement": agreed}
    words = [value.words for value in figures.values() if value] + raters.findings(found, dissent, discounted=discounted)
    words += whose_figures(model.about)
    return {
        **{name: asdict(value) if value else None for name, value in figures.items()},
        "raters_found": [asdict(each) for each in found],
        "dissenters": dissent,
        "findings": words,
    }


def whose_figures(about: Mapping[str, Any]) -> list[str]:
    """Whose the figures are where they are not the reward model's own."""
    if about["family"] != "ensemble":
        return []
    nll = about["first_fold_nll"]
    return [
        f"the reward model is an ensemble on an adapter of its own; accuracy, calibration and likelihood on unseen ratings are "
        f"{FORESEEN_BY}; on the first fold of prompts the ensemble took {nll['ensemble']:.3f} nats a rating and ridge {nll['ridge']:.3f}"
    ]


def _ratings_by_rater(labels: Labels) -> list[int]:
    counts: list[int] = torch.bincount(torch.cat([labels.choices.raters, labels.thumbs.raters]), minlength=len(labels.raters)).tolist()
    return counts


def nothing_learned(gain: dict[str, Any], least: float) -> str | None:
    """Why PPO has nothing to optimise, if so: it raises the score of any reward model, also of one that is noise.

    One standard error is enough to try; what comes out reaches people only by the gates, which want the 95 % bound.
    """
    if gain["low"] is None:
        return None
    error = (gain["mean"] - gain["low"]) / NORMAL_95
    if gain["mean"] - error > least:
        return None
    found = f"{gain['mean']:+.3f} nats a rating on unseen prompts with a standard error of {error:.3f}"
    return f"the reward model foresees {found}; needed beyond it > {least:g} (reward_model.min_likelihood_gain), so PPO was left out"
