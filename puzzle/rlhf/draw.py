"""The draws of an iteration: prompts, their responses, and what has to be scored before inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from puzzle.config.run import TrainConfig
from puzzle.data.prepare import RunData
from puzzle.data.prompts import Prompt
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.runtime.stage_timer import StageClock
from puzzle.rlhf.dynamic_sampling import Drawn, Refilled, refilled
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.models import Models
from puzzle.rlhf.overlong import shaped
from puzzle.rlhf.rollout import require_finite, rollout
from puzzle.rlhf.scoring import Heard, Scores


@dataclass(frozen=True)
class Draws:
    """What a run draws its responses with; `greedy`: the likeliest one to each prompt is scored, too."""

    config: TrainConfig
    data: RunData
    models: Models
    params: SamplingParams
    greedy: bool
    score: Callable[[Experience, Sequence[Prompt]], Scores]
    listen: Callable[[ModelRuntime, Sequence[Prompt]], Heard | None]

    def iteration(self, iteration: int, clock: StageClock) -> Refilled:
        """An iteration's prompts and responses; with dynamic sampling their raw scores, too."""
        options = self.config.algorithm.dynamic_sampling
        if options is None:
            prompts = self.data.train.next()
            return Refilled(prompts, self._rollout(prompts, iteration, clock), {})

        def draw(prompts: Sequence[Prompt]) -> Drawn:
            experience = self._rollout(prompts, iteration, clock)
            scores = self.score(experience, prompts)
            clock.end("inference")
            learned_B = shaped(experience, scores.total_B, self.config)
            scored = replace(experience, scores_B=scores.total_B, score_parts=scores.parts)
            return Drawn(prompts, scored, learned_B)

        return refilled(self.data.train.next, draw, options.rounds)

    def _rollout(self, prompts: Sequence[Prompt], iteration: int, clock: StageClock) -> Experience:
        generation, endings, likeliest = self.config.generation, self.data.endings, None
        generator, samples = self.models.generator, generation.samples
        with generator.weights(clock) as actor:
            self.models.offload.for_generation()
            how = (iteration, generation, endings, generator.passes)
            # The greedy responses are scored first.
            heard = None if self.greedy else self.listen(actor, prompts)
            experience = rollout(actor, prompts, samples, self.params, *how, heard)
            if self.greedy:
                params = replace(self.params, greedy=True)
                likeliest = rollout(actor, prompts, 1, params, *how)
        self.models.offload.for_inference()
        if likeliest is None:
            return experience
        raw = self.score(likeliest, prompts).total_B
        require_finite(likeliest, {"reward: the score": raw[:, None]})
        return replace(experience, greedy_scores_P=shaped(likeliest, raw, self.config))
