"""Plays a schedule with symbols instead of tensors, ignorant of how it was built or checked.

Transfers move values between buffers by their place in the channel, whatever they are called, as NCCL does.
What a pass reads must have been waited for. `play` returns None if every stage ends with the values that
training, inference or generation must give, and otherwise what went wrong.
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from puzzle.plan.pipeline.actions import Action, Op, RingSpec, Schedule


class Wrong(Exception):
    pass


def play(schedule: Schedule, seed: int = 0) -> str | None:
    player = Player(schedule)
    order = random.Random(seed)
    try:
        while True:
            stages = list(range(schedule.num_stages))
            order.shuffle(stages)
            if not sum(player.advance(s) for s in stages):
                break
        player.final()
    except Wrong as wrong:
        return str(wrong)
    return None


def need(condition: object, why: str) -> None:
    if not condition:
        raise Wrong(why)


class Player:
    def __init__(self, schedule: Schedule) -> None:
        self.lists, self.last, self.at = schedule.actions, schedule.num_stages - 1, [0] * schedule.num_stages
        self.spec: dict[str, Any] = {w.model: w for w in schedule.specs}
        self.buffers = [{} for _ in self.lists]  # received and waited for, or yielded by a pass
        self.landed = [{} for _ in self.lists]  # received, not waited for
        self.queues = defaultdict(lambda: ([], []))
        self.moved = defaultdict(int)
        self.sent, self.posted = [set() for _ in self.lists], [set() for _ in self.lists]
        self.gone = [set() for _ in self.lists]
        self.stash = [{} for _ in self.lists]
        self.pending = [{} for _ in self.lists]  # for the second part of a split backward
        self.grads = [defaultdict(list) for _ in self.lists]  # of matrices
        self.small = [defaultdict(list) for _ in self.lists]  # of norms, biases, embeddings
        self.outputs = defaultdict(list)
        self.state = [defaultdict(str) for _ in self.lists]  # of each optimizer
        self.norms = [[] for _ in self.lists]
        self.cache = [defaultdict(int) for _ in self.lists]
        self.prefilled = [set() for _ in self.lists]
        self.tokens = defaultdict(list)

    def advance(self, stage: int) -> bool:
        moved = False
        while self.at[stage] < len(self.lists[stage]) and self.act(stage, self.lists[stage][self.at[stage]]):
            self.at[stage] += 1
            moved = True
        return moved

    def act(self, s: int, a: Action) -> bool:
        key, peer = (a.model, a.payload, a.microbatch, a.step), -1 if a.peer is None else a.peer
        if a.op is Op.SEND:
            need((s, peer, key) not in self.sent[s], "sent twice")
            self.sent[s].add((s, peer, key))
            self.queues[s, peer, a.payload][0].append((key, self.take(s, ("out", *key))))
            self.move(s, peer, a.payload)
        elif a.op is Op.RECV:
            need(key not in self.posted[s], "received twice")
            self.posted[s].add(key)
            self.queues[peer, s, a.payload][1].append(key)
            self.move(peer, s, a.payload)
        elif a.op is Op.WAIT_SEND:
            need((s, peer, key) in self.sent[s], "waits for no send")
            if (peer, key) not in self.gone[s]:
                return False
            self.sent[s].remove((s, peer, key))
        elif a.op is Op.WAIT_RECV:
            need(key in self.posted[s], "waits for no receive")
            if key not in self.landed[s]:
                return False
            self.buffers[s]["in", *key] = self.landed[s].pop(key)
        elif a.op in (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT):
            self.train_pass(s, a)
        elif a.op in (Op.PREFILL, Op.DECODE):
            self.generate_pass(s, a)
        else:
            return self.optimize(s, a)
        return True

    def take(self, s: int, key: tuple) -> object:
        need(key in self.buffers[s], f"nothing at {key}")
        return self.buffers[s].pop(key)

    def move(self, src: int, dst: int, payload: object) -> None:
        sends, recvs = self.queues[src, dst, payload]
        while min(len(sends), len(recvs)) > self.moved[src, dst, payload]:
            k = self.moved[src, dst, payload]
            self.moved[src, dst, payload] += 1
            self.landed[dst][recvs[k]] = sends[k][1]
            self.gone[src].add((dst, sends[k][0]))

    def train_pass(self, s: int, a: Action) -> None:
        m, name = a.microbatch, a.model
        need(self.state[s][name] not in ("step", "gather", "done"), "pass after the step")
        if a.op is Op.FORWARD:
            x = ("x", name, m) if s == 0 else self.take(s, ("in", name, "activation", m, 0))
            self.stash[s][name, m] = x
            if s < self.last:
                self.buffers[s]["out", name, "activation", m, 0] = (s, x)
            else:
                self.outputs[name].append((m, x))
            return
        need((a.op is Op.BACKWARD) is not self.spec[name].split, "a backward of the other kind")
        if a.op is Op.BACKWARD_WEIGHT:
            need((name, m) in self.pending[s], "no gradient of outputs")
            self.grads[s][name].append(self.pending[s].pop((name, m)))
            return
        need((name, m) in self.stash[s], "backward without forward")
        x = self.stash[s].pop((name, m))
        g = ("loss", name, m) if s == self.last else self.take(s, ("in", name, "gradient", m, 0))
        self.small[s][name].append((g, x))
        if a.op is Op.BACKWARD:
            self.grads[s][name].append((g, x))
        else:
            self.pending[s][name, m] = (g, x)
        if s > 0:
            self.buffers[s]["out", name, "gradient", m, 0] = (s, g)

    def optimize(self, s: int, a: Action) -> bool:
        steps = ["", "reduce", "reduced", "norm", "normed", "step", "gather", "done"]
        ops = [Op.REDUCE, Op.WAIT_REDUCE, Op.NORM, Op.WAIT_NORM, Op.STEP, Op.GATHER, Op.WAIT_GATHER]
        before, after = steps[ops.index(a.op)], steps[ops.index(a.op) + 1]
        need(self.state[s][a.model] == before, "optimizer out of order")
        need(len(self.grads[s][a.model]) == self.spec[a.model].microbatches, "gradients are missing")
        if a.op is Op.NORM:
            self.norms[s].append(a.model)
        if a.op is Op.WAIT_NORM:
            k = self.norms[s].index(a.model)
            if any(len(norms) <= k for norms in self.norms):
                return False
            need(all(norms[k] == a.model for norms in self.norms), "norms of different models are summed")
        self.state[s][a.model] = after
        return True

    def generate_pass(self, s: int, a: Action) -> None:
        spec, name, m, t = self.spec[a.model], a.model, a.microbatch, a.step
        joined = [sum(map(len, spec.prefills[:n])) for n in range(len(spec.prefills) + 1)]
        if s > 0:
            x = self.take(s, ("in", name, "activation", m, t))
        elif a.op is Op.PREFILL or t == 1:
            x = ("asked", m)
        elif self.last:
            x = self.take(s, ("in", name, "tokens", m, t - 1))
        else:
            x = self.tokens[m][-1] if self.tokens[m] else "nothing"
        need(x == (("asked", m) if t <= 1 else (m, t - 1)), f"wrong input {x}")
        if a.op is Op.PREFILL:
            # Whoever joins is known when all micro-batches have ended the round before.
            done = min(self.cache[s][j] for j in range(len(spec.decode)))
            need(m < joined[min(done + 1, spec.rounds)], "a prefill before it is known who joins")
            self.prefilled[s].add(m)
        else:
            need(self.cache[s][m] == t - 1, "keys and values are missing")
            need(self.prefilled[s].issuperset(range(joined[t])), "prefilled keys and values are missing")
            self.cache[s][m] += 1
        if s < self.last:
            self.buffers[s]["out", name, "activation", m, t] = x
        elif a.op is Op.DECODE:
            self.tokens[m].append((m, t))
            self.buffers[s]["out", name, "tokens", m, t] = (m, t)

    def final(self) -> None:
        for s, actions in enumerate(self.lists):
            need(
                self.at[s] == len(actions),
                f"stage {s} is stuck in {actions[min(self.at[s], len(actions) - 1)]}",
            )
            need(not self.sent[s] and not self.landed[s], "not waited for")
            need(
                not self.stash[s] or not any(getattr(p, "backward", 0) for p in self.spec.values()),
                "no backward",
            )
        for spec in self.spec.values():
            if isinstance(spec, RingSpec):
                for j in range(len(spec.decode)):
                    need(self.tokens[j] == [(j, t + 1) for t in range(spec.rounds)], "tokens are missing")
                    if self.last and spec.rounds:
                        got = self.buffers[0].get(("in", spec.model, "tokens", j, spec.rounds))
                        need(got == (j, spec.rounds), "last tokens are not collected")
                continue
            for s in range(self.last + 1):
                xs = [self.hidden(s, spec.model, m) for m in range(spec.microbatches)]
                gs = [(self.gradient(s, spec.model, m), x) for m, x in enumerate(xs)]
                for grads in (self.grads, self.small):
                    need(grads[s][spec.model] == (gs if spec.backward else []), "wrong gradients")
                need(self.state[s][spec.model] == ("done" if spec.optimizer else ""), "optimizer not done")
            outs = {m: self.hidden(self.last, spec.model, m) for m in range(spec.microbatches)}
            need(dict(self.outputs[spec.model]) == outs, "wrong outputs")

    def hidden(self, stage: int, model: str, m: int) -> object:
        x = ("x", model, m)
        for s in range(stage):
            x = (s, x)
        return x

    def gradient(self, stage: int, model: str, m: int) -> object:
        g = ("loss", model, m)
        for s in range(self.last, stage, -1):
            g = (s, g)
        return g
