"""What a run that shall go on was: its last process's settings, whether it is over, and what is other now."""

from typing import Any

import pytest

from puzzle.runlog.past import differences, past_of
from puzzle.runlog.record import Line, Record
from puzzle.runlog.records import End, Resume, Warned
from tests.runlog import texts


def past(*records: Record) -> Any:
    return past_of([Line(seq, record) for seq, record in enumerate(records)])


def test_without_a_header_there_is_no_run() -> None:
    assert past() is None
    assert past(Resume(0), End("completed")) is None


@pytest.mark.parametrize(
    ("records", "config", "given", "completed"),
    [
        ([], "first", "mine", False),
        ([Warned("odd"), End("completed")], "first", "mine", True),
        ([End("failed")], "first", "mine", False),
        ([End("completed"), Resume(1)], "first", "mine", False),
        ([Resume(1, changed={"config": {"a": "second"}})], "second", "mine", False),
        ([Resume(1, changed={"config": {"a": "second"}, "given": {"a": "other"}})], "second", "other", False),
        # What is other is other than in the header: the last process went back to it.
        (
            [Resume(1, changed={"config": {"a": "second"}}), Resume(2), End("completed")],
            "first",
            "mine",
            True,
        ),
        ([Resume(1), Resume(2, changed={"config": {"a": "third"}})], "third", "mine", False),
        ([Resume(1, changed={"given": None})], "first", None, False),
    ],
)
def test_settings_are_those_of_the_last_process(
    records: list[Record], config: str, given: str | None, completed: bool
) -> None:
    header = texts.header(config={"a": "first"}, given={"a": "mine"})
    found = past(header, *records)
    assert found.run == header
    assert found.config == {"a": config}
    assert found.given == (None if given is None else {"a": given})
    assert found.completed is completed


def test_settings_that_differ_are_named_by_dotted_keys() -> None:
    """Those that both have; a section that became a value, or the reverse, is one setting."""
    before = {
        "seed": 1,
        "same": 2,
        "gone": 3,
        "a": {"b": {"c": 1, "d": [1]}, "e": 5},
        "was": {"x": 1},
        "is": 1,
    }
    now = {
        "seed": 2,
        "same": 2,
        "new": 3,
        "a": {"b": {"c": 1, "d": [2]}, "e": 6},
        "was": None,
        "is": {"x": 1},
    }
    assert list(differences(before, now).items()) == [
        ("a.b.d", ([1], [2])),
        ("a.e", (5, 6)),
        ("is", (1, {"x": 1})),
        ("seed", (1, 2)),
        ("was", ({"x": 1}, None)),
    ]


def sections(**values: Any) -> dict[str, Any]:
    """A configuration whose roles took over the actor's model and the layout above them."""
    model = {"model": values.get("model", "old"), "init": values.get("init", 1), "lr": values.get("lr", 0.5)}
    layout = {"tp": values.get("tp", 1)}
    made = {role: {**model, "layout": layout} for role in ("actor", "critic", "reference", "reward")}
    return {**made, "generation": {"layout": layout}, "layout": layout}


@pytest.mark.parametrize(
    ("change", "own", "told"),
    [
        ({"model": "new"}, None, ["actor.model", "reward.model"]),
        ({"init": 2}, None, ["actor.init", "reward.init"]),
        ({"lr": 1.0}, None, ["actor.lr", "critic.lr", "reference.lr", "reward.lr"]),
        ({"tp": 2}, None, ["layout.tp"]),
        ({"model": "new"}, ("critic", "model", "mine"), ["actor.model", "critic.model", "reward.model"]),
        ({}, ("critic", "model", "mine"), ["critic.model"]),
        ({}, ("generation", "layout", {"tp": 4}), ["generation.layout.tp"]),
        ({}, ("actor", "layout", {"tp": 4}), ["actor.layout.tp"]),
    ],
)
def test_what_roles_take_over_is_one_change(
    change: dict[str, Any], own: tuple[str, str, Any] | None, told: list[str]
) -> None:
    """Critic and reference take the actor's model, every role the layout above, generation the actor's."""
    now = sections(**change)
    if own is not None:
        section, name, value = own
        now[section] = {**now[section], name: value}
    assert list(differences(sections(), now)) == told
