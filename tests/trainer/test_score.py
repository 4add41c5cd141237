"""A score's zero and unit, and that it hangs on nobody else's answer."""

from __future__ import annotations

import pytest
import torch
from rating_world import LINEAR, rated_world

from feedback.errors import TrainingRefused
from trainer.reward_model import fit
from trainer.score import Normaliser, Scorer


def test_each_prompt_gets_its_own_zero_and_the_base_its_unit() -> None:
    labels = rated_world(10).labels
    model = fit(labels, LINEAR)
    prompts = [(int(p),) for p in labels.prompts_N]
    scorer = Scorer(model, Normaliser.fit(model, prompts, labels.features_ND), clip=4.0)
    scores = scorer.score(prompts, labels.features_ND)
    assert scorer.base_scores.mean().item() == pytest.approx(0.0, abs=0.02)
    spread = torch.stack([scores[labels.prompts_N == p].var() for p in range(3)]).mean().sqrt().item()
    assert 0.5 < spread < 1.5
    # A score does not hang on who else is scored.
    backwards = scorer.score(prompts[::-1], labels.features_ND.flip(0)).flip(0)
    alone = torch.cat([scorer.score(prompts[i : i + 1], labels.features_ND[i : i + 1]) for i in range(10)])
    assert torch.allclose(scores, backwards, atol=1e-5)
    assert torch.allclose(scores[:10], alone, atol=1e-5)
    # A shift of all answers to a prompt, zero included, changes nothing.
    moved = labels.features_ND + 7.0
    shifted = Scorer(model, Normaliser.fit(model, prompts, moved), clip=4.0).score(prompts, moved)
    assert torch.allclose(scores, shifted, atol=1e-4)
    assert scorer.score(prompts[:1], 1000 * labels.features_ND[:1]).abs().item() == 4.0
    with pytest.raises(TrainingRefused, match="1 prompts have no base answers"):
        scorer.score([(99,)], labels.features_ND[:1])
    with pytest.raises(TrainingRefused, match="at least 2"):
        Normaliser.fit(model, [(0,)], labels.features_ND[:1])
