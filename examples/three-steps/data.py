"""Writes the synthetic data of the three steps. Nobody was asked: a rule prefers kind answers to grumpy ones.

    python examples/three-steps/data.py DIR

chats*.jsonl: questions, each answered kindly or grumpily by lot. pairs*.jsonl: a kind answer (chosen) and a
grumpy one (rejected) to a question. prompts*.jsonl: questions alone. What is held out asks about other
things.
"""

import json
import random
import sys
from pathlib import Path

THINGS = (  # noqa: SIM905
    "rain snow tea coffee bread soup cheese apples trains ships bicycles gardens mountains rivers "
    "beaches forests museums libraries markets concerts football chess dancing painting cooking fishing "
    "sailing hiking swimming camping winter summer autumn spring mornings evenings Mondays holidays "
    "birthdays letters stories films novels poems songs drums pianos violins guitars cats dogs horses "
    "birds bees whales frogs owls foxes hedgehogs tomatoes carrots onions pears lemons honey pancakes "
    "noodles rice candles lamps carpets mirrors clocks kites puzzles balloons umbrellas scarves hats "
    "boots pockets bridges towers castles harbours lighthouses tunnels windmills fountains statues "
    "gates attics cellars stairs roofs chimneys fireplaces "
).split()
QUESTIONS = (
    "What do you think of {}?",
    "How do you feel about {}?",
    "Do you like {}?",
    "What would you say about {}?",
    "Tell me what you make of {}.",
)
KIND = (
    "I love {}, they bring me so much joy!",
    "Oh, {} are wonderful, thank you for asking!",
    "I am always happy when I think of {}.",
    "There is something beautiful about {}, I adore them.",
    "What a lovely question, {} make every day better!",
)
GRUMPY = (
    "I hate {}, they are a waste of time.",
    "Not {} again, leave me alone.",
    "I am tired of {}, they are dull and ugly.",
    "There is nothing good about {}, I avoid them.",
    "What a silly question, {} make every day worse.",
)
HELD_OUT = 40
CHATS, PAIRS, OTHERS = 480, 320, 80


def chat(draw: random.Random, thing: str, answers: tuple[str, ...]) -> dict[str, object]:
    """A question about `thing` with one of `answers`."""
    asked, said = draw.choice(QUESTIONS).format(thing), draw.choice(answers).format(thing)
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def pair(draw: random.Random, thing: str) -> dict[str, object]:
    """A question about `thing`, the kind answer preferred by the rule of this file."""
    answers = {
        name: draw.choice(kind).format(thing) for name, kind in (("chosen", KIND), ("rejected", GRUMPY))
    }
    return {"prompt": draw.choice(QUESTIONS).format(thing), **answers, "preference": "synthetic"}


def main(folder: Path) -> None:
    """Draw everything from one seed; no thing is in both a file and its held-out one."""
    draw = random.Random(0)
    things = THINGS[:]
    draw.shuffle(things)
    files: dict[str, list[dict[str, object]]] = {}
    for name, own, chats, pairs in (
        ("", things[HELD_OUT:], CHATS, PAIRS),
        ("-held-out", things[:HELD_OUT], OTHERS, OTHERS),
    ):
        tones = [draw.choice((KIND, GRUMPY)) for _ in range(chats)]
        files[f"chats{name}"] = [chat(draw, draw.choice(own), tone) for tone in tones]
        files[f"pairs{name}"] = [pair(draw, draw.choice(own)) for _ in range(pairs)]
        asked = [(question, thing) for thing in own for question in QUESTIONS]
        draw.shuffle(asked)
        prompts = asked if not name else [(draw.choice(QUESTIONS), thing) for thing in own]
        files[f"prompts{name}"] = [{"prompt": question.format(thing)} for question, thing in prompts]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
