"""What one rollout batch is, and how it is cut into minibatches, micro-batches and packed tokens.

An `Experience` holds the whole batch, not a rank's share: every rank has an equal one, so models of
different layouts cut it as each of them needs, by row numbers alone, and nothing here knows a layout.
Suffixes: B rows = prompts x samples, S longest response, R rows of a micro-batch, N response tokens of a
micro-batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Experience:
    """Row r answers prompt `r // samples` (its group) and is that prompt's sample `r % samples`.

    Tensors are float32 and right-padded; what lies outside `mask_BS` means nothing. Column k belongs to
    response token k: its log-prob, and the value of the state before it. `dataclasses.replace` adds what an
    iteration finds out. `logprobs_BS` are those that PPO starts from, `sampled_logprobs_BS` what generation
    gave, `correction_BS` weights made of both; `sampled_tokens` is how many tokens it drew, surplus ones
    included. `greedy_scores_P` are of each prompt's greedy response. The last `fill` groups only keep the
    batch's shape: no average and no loss counts them. `score_parts` are the scores (B,) of several rewards by
    name. Raises ValueError if rows and prompts do not fit
    together or a row is empty.
    """

    prompts: tuple[Tokens, ...]
    prompt_ids: tuple[int, ...]
    responses: tuple[Tokens, ...]
    samples: int = 1
    fill: int = 0
    greedy_scores_P: Tensor | None = None
    scores_B: Tensor | None = None
    score_parts: Mapping[str, Tensor] | None = None
    logprobs_BS: Tensor | None = None
    sampled_logprobs_BS: Tensor | None = None
    correction_BS: Tensor | None = None
    sampled_tokens: int | None = None
    ref_logprobs_BS: Tensor | None = None
    values_BS: Tensor | None = None
    advantages_BS: Tensor | None = None
    returns_BS: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.prompt_ids):
            raise ValueError(f"{len(self.prompts)} prompts but {len(self.prompt_ids)} ids")
        if len(self.responses) != len(self.prompts) * self.samples:
            raise ValueError(
                f"{len(self.prompts)} prompts x {self.samples} samples but {len(self.responses)} responses"
            )
        if not all(self.prompts) or not all(self.responses):
            raise ValueError("a prompt or response without tokens")
        if not 0 <= self.fill <= len(self.prompts):
            raise ValueError(f"{self.fill} of {len(self.prompts)} groups cannot be fill")

    def __len__(self) -> int:
        """B."""
        return len(self.responses)

    @cached_property
    def mask_BS(self) -> Tensor:
        """bool (B, S) on the CPU: True at response tokens."""
        lengths_B = torch.tensor([len(response) for response in self.responses])
        return torch.arange(int(lengths_B.max())) < lengths_B[:, None]

    @cached_property
    def counted_BS(self) -> Tensor:
        """bool (B, S) on the CPU: the response tokens of rows that are no fill."""
        count = len(self) - self.fill * self.samples
        return self.mask_BS & (torch.arange(len(self)) < count)[:, None]

    def counted(self, rows: Sequence[int]) -> list[int]:
        """Those of `rows` that are no fill."""
        return [row for row in rows if row < len(self) - self.fill * self.samples]

    def prompt(self, row: int) -> Tokens:
        """The prompt that a row answers."""
        return self.prompts[row // self.samples]

    def sequence(self, row: int) -> Tokens:
        """Prompt and response, to be packed."""
        return self.prompt(row) + self.responses[row]

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens of each row's sequence."""
        return [len(self.prompt(row)) + len(self.responses[row]) for row in rows]

    def tokens(self, rows: Sequence[int]) -> int:
        """Response tokens of the rows."""
        return sum(len(self.responses[row]) for row in rows)

    def targets_N(self, rows: Sequence[int]) -> Tensor:
        """int64 (N,): the response tokens of the rows, one row after the other."""
        return torch.tensor([token for row in rows for token in self.responses[row]], dtype=torch.int64)

    def states_N(self, rows: Sequence[int], width: int | None = None) -> Tensor:
        """int64 (N,): where, in the packed sequences of `rows`, the token before each response token stands.

        Log-probs and values of `targets_N` are computed from the hidden states there. With `width`, every
        sequence is padded to it.
        """
        places, start = [torch.empty(0, dtype=torch.int64)], 0
        for row, length in zip(rows, self.lengths(rows), strict=True):
            first = start + len(self.prompt(row)) - 1
            places.append(torch.arange(first, first + len(self.responses[row])))
            start += width or length
        return torch.cat(places)

    def take_N(self, x_BS: Tensor, rows: Sequence[int]) -> Tensor:
        """(N,): the response tokens' entries of a (B, S) tensor, one row after the other."""
        index = torch.tensor(rows, dtype=torch.int64)
        return x_BS[index.to(x_BS.device)][self.mask_BS[index].to(x_BS.device)]

    def put_RS(self, x_N: Tensor, rows: Sequence[int]) -> Tensor:
        """(R, S): the inverse of `take_N`; 0 outside the mask."""
        mask_RS = self.mask_BS[torch.tensor(rows, dtype=torch.int64)].to(x_N.device)
        return x_N.new_zeros(mask_RS.shape).masked_scatter(mask_RS, x_N)


def joined(parts: Sequence[Experience], groups: Sequence[tuple[int, int]]) -> Experience:
    """The groups (part, number in it) of several experiences, as generation and scores left them."""
    samples = parts[0].samples
    rows = [(part, group * samples + sample) for part, group in groups for sample in range(samples)]
    longest = max(len(parts[part].responses[row]) for part, row in rows)

    def taken(name: str) -> Tensor | None:
        whole = [getattr(part, name) for part in parts]
        if any(x is None for x in whole):
            return None
        picked = [whole[part][row] for part, row in rows]
        if whole[0].dim() == 2:
            picked = [F.pad(x_S, (0, longest - len(x_S))) for x_S in picked]  # longer ones are cut
        return torch.stack(picked)

    logprobs_BS = taken("logprobs_BS")
    same = all(part.sampled_logprobs_BS is part.logprobs_BS for part in parts)
    return Experience(
        tuple(parts[part].prompts[group] for part, group in groups),
        tuple(parts[part].prompt_ids[group] for part, group in groups),
        tuple(parts[part].responses[row] for part, row in rows),
        samples,
        scores_B=taken("scores_B"),
        score_parts={
            name: torch.stack([(parts[part].score_parts or {})[name][row] for part, row in rows])
            for name in parts[0].score_parts or {}
        },
        logprobs_BS=logprobs_BS,
        sampled_logprobs_BS=logprobs_BS if same else taken("sampled_logprobs_BS"),
        sampled_tokens=sum(part.sampled_tokens or 0 for part in parts),
    )


def minibatches(count: int, size: int, seed: int, iteration: int, epoch: int) -> list[list[int]]:
    """Rows of each minibatch of one epoch: a permutation of range(count) cut into pieces of `size`.

    The order is that of hashes of (seed, iteration, epoch, row): it depends on nothing else, in particular
    on no layout and on no library's generator.
    """

    def place(row: int) -> bytes:
        return hashlib.sha256(f"{seed} {iteration} {epoch} {row}".encode()).digest()

    order = sorted(range(count), key=place)
    return [order[start : start + size] for start in range(0, count, size)]
