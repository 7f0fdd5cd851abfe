"""PPO whose generation has a layout of its own, on gloo processes, against the reference."""

from __future__ import annotations

import pytest

from tests.rlhf.test_trainer_reference import Bench, Shape, run_all

# Training and generation layouts; options, models and strategies take turns.
CASES: list[tuple[str, str, Shape, str]] = [
    ("plain", "llama", {"actor": (1, 4, 1), "generation": (2, 2, 1)}, "planned"),
    ("kl in loss", "tied", {"actor": (2, 2, 1), "generation": (1, 1, 4)}, "planned"),
    ("no reference", "qwen2", {"actor": (1, 2, 2), "generation": (4, 1, 1)}, "gather-all"),
]
LONG: list[tuple[str, str, Shape, str]] = [
    ("mean of means", "qwen3", {"actor": (4, 1, 1), "generation": (1, 2, 2)}, "fixed-order"),
    ("whitened", "llama", {"actor": (1, 1, 4), "generation": (2, 2, 1)}, "planned"),
    ("plain", "tied", {"actor": (2, 1, 2), "generation": (1, 4, 1)}, "planned"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("switched"))


@pytest.mark.parametrize("names", [CASES, pytest.param(LONG, marks=pytest.mark.long)])
def test_ppo_with_switches_equals_the_reference(bench: Bench, names: list) -> None:
    cases = []
    for option, kind, shape, strategy in names:
        case = bench.case(option, kind, shape)
        transport = "peer" if option == "kl in loss" else "auto"
        fill = "shards" if shape["actor"][2] > 1 else "gathered"
        # A case is not verified, so that what it costs is seen to be spent where it is asked for alone.
        options = {"strategy": strategy, "transport": transport, "fill": fill}
        case.config["switch"] = {**options, "verify": strategy != "gather-all"}
        cases.append(case)
    for name, case, watches in zip(names, cases, run_all(cases, 4), strict=True):
        try:
            bench.check(case, watches)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        switches = watches[0].switches
        assert len(switches) == case.config["iterations"]
        shards = case.config["switch"]["fill"] == "shards"
        assert all(watch.owed == [shards] * len(switches) for watch in watches)
        checked = list(range(len(switches))) if case.config["switch"]["verify"] else []
        assert all(watch.checked == checked for watch in watches)
        assert all(watch.held == [0] * len(switches) for watch in watches)
        for fields in switches:
            assert fields["strategy"] == name[3]
            assert fields["transport"] == ("peer" if name[0] == "kl in loss" else "messages")
            assert fields["seconds"] >= fields["fill_seconds"] > 0
            if name[3] != "gather-all":
                assert fields["bytes"] == fields["lower_bound_bytes"]
    assert not bench.agreement.wrong
