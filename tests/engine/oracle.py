"""What generation must draw: transformers, one sequence at a time, with the noise of each token's name."""

import torch
from transformers import AutoModelForCausalLM

from puzzle.engine.generate.requests import Request
from puzzle.model.noise import gumbel, row_keys
from tests.reference.same_tokens import TokenAgreement, same_tokens

LENGTHS = (9, 3, 17, 1, 9, 26, 4, 12)
NEW = 18


def prompts():
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, 259, (n,), generator=generator).tolist() for n in LENGTHS]


def requests():
    return [Request(p, prompt_id=40 + i // 2, sample=i % 2, iteration=5) for i, p in enumerate(prompts())]


class Oracle:
    """transformers, one sequence at a time and without a cache; noise added by name."""

    def __init__(self, folder, params):
        self.model, self.params = AutoModelForCausalLM.from_pretrained(folder), params
        self.rows = {}

    @torch.no_grad()
    def row(self, index):
        """Tokens, and the perturbed logits of each, of request `index`."""
        if index not in self.rows:
            request, params = requests()[index], self.params
            tokens, scores = [], []
            while len(tokens) < params.max_new_tokens:
                logits = self.model(torch.tensor([[*request.prompt, *tokens]])).logits[0, -1].double()
                if not params.greedy:
                    names = (torch.tensor([n]) for n in (request.prompt_id, request.sample, len(tokens)))
                    noise = gumbel(row_keys(params.seed, request.iteration, *names), 0, len(logits))[0]
                    logits = logits / params.temperature + noise.double()
                if len(tokens) < params.min_new_tokens:
                    logits[list(params.stop_ids)] = -torch.inf
                scores.append(logits)
                tokens.append(int(logits.argmax()))
                if tokens[-1] in params.stop_ids:
                    break
            self.rows[index] = tokens, scores
        return self.rows[index]

    def agreement(self, responses):
        expected = [self.row(i)[0] for i in range(len(responses))]
        got = [response.tokens for response in responses]
        return same_tokens(expected, got, lambda row, place: self.row(row)[1][place])


def check(agreement: TokenAgreement):
    assert not agreement.wrong
    assert agreement.near <= 1, "few rows here: at most one near tie"


def enough(total):
    """A stop rule: over from the token on with which the sum of all exceeds `total`."""

    def rule(prompt):
        heard = []
        return lambda token: heard.append(token) or sum(heard) > total

    return rule
