from pathlib import Path

import pytest

from puzzle.campaign.experiments import Experiment, Job, Selection, expand, fitted, read_table
from puzzle.config.resolve import resolve
from puzzle.config.run import LayoutConfig
from puzzle.errors import UserError
from puzzle.runlog import load_runs

ROOT = Path(__file__).parents[2]
FIGURES = {"figure8", "figure9", "figure10", "figure11", "figure12", "table3", "ablation"}
# Published runs whose arguments are not those of their figure's table, and in what they differ.
IRREGULAR = {
    ("orion", "figure8", "33B/7B", "opt"): "training",
    ("orion", "table3", "7B/7B", "opt"): "training",
    ("phoenix", "figure8", "7B/7B", "base"): "decode",
    ("phoenix", "figure11", "7B/7B", "train_opt"): "decode",
    ("phoenix", "figure12", "7B/7B", "base"): "decode",
}


@pytest.fixture(scope="module")
def table():
    return read_table()


def axes(layout: LayoutConfig) -> dict[str, int]:
    return {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp}


def by_run(experiments: list[Experiment]) -> dict[tuple, Experiment]:
    """Keyed as a figure finds its runs; a run of several figures several times."""
    found: dict[tuple, Experiment] = {}
    for experiment in experiments:
        log, layout = experiment.config.log, experiment.config.actor.layout
        for figure in log.figures:
            key = (figure, f"{log.actor}/{log.critic}", log.variant)
            if figure == "figure10":
                key += (experiment.config.batch, layout.tp, layout.pp, layout.dp)
            assert key not in found
            found[key] = experiment
    return found


@pytest.mark.parametrize("cluster", ["orion", "phoenix"])
def test_the_paper_scale_is_the_published_runs(table, cluster):
    ours = by_run(expand(table, Selection("paper", cluster=cluster)))
    runs = [run for run in load_runs(ROOT / "logs/published").runs if run.cluster == cluster]
    compared = 0
    for run in (run for run in runs if run.variant != "theoretical"):
        training = run.layouts["training"]
        for figure in run.figures:
            key = (figure, f"{run.actor}/{run.critic}", run.variant)
            if figure == "figure10":
                key += (run.config["global_batch_size"], training["tp"], training["pp"], training["dp"])
            config = ours[key].config
            pairs = {
                "training": (axes(config.actor.layout), training),
                "batch": (config.batch, run.config["global_batch_size"]),
                "microbatch": (config.algorithm.microbatch, run.config["micro_batch_size"]),
            }
            if run.variant != "dschat":
                sizes, generation = config.generation, run.layouts["generation"]
                pairs["generation"] = (axes(sizes.layout), generation)
                pairs["prefill"] = (sizes.prefill_microbatch, run.config["prefill_microbatch"])
                pairs["decode"] = (sizes.decode_microbatch, run.config["decode_microbatch"])
            different = {name for name, (mine, theirs) in pairs.items() if mine != theirs}
            irregular = IRREGULAR.get((cluster, *key))
            assert (irregular in different) if irregular else not different, (key, different)
            compared += 1
    assert compared >= 30


@pytest.mark.parametrize(
    ("scale", "devices"),
    [("cpu", None), ("node", 8), ("node", 4), ("node", 1), ("paper", None), ("rehearsal", None)],
)
def test_every_run_is_possible_and_named_once(table, scale, devices):
    experiments = expand(table, Selection(scale, devices=devices))
    assert len({experiment.name for experiment in experiments}) == len(experiments)
    assert {figure for e in experiments for figure in e.config.log.figures} == FIGURES
    for experiment in experiments:
        config = experiment.config
        assert config.world <= (devices or table.scales[scale].devices)
        resolve(config)
        assert config.log.provenance == ("rehearsal" if config.device == "cpu" else "measured")


def test_the_rehearsal_is_the_paper_with_toys(table):
    paper, toys = (expand(table, Selection(scale)) for scale in ("paper", "rehearsal"))
    for real, toy in zip(paper, toys, strict=True):
        assert real.name == toy.name
        assert real.config.layouts() == toy.config.layouts()
        for key in ("prefill_microbatch", "decode_microbatch"):
            assert getattr(real.config.generation, key) == getattr(toy.config.generation, key)


def test_a_node_has_as_deep_models_as_its_devices_hold(table):
    for devices, layers in (
        (8, {"7B": 16, "13B": 16, "33B": 16, "350M": 16}),
        (2, dict.fromkeys(("7B", "350M"), 4)),
    ):
        for experiment in expand(table, Selection("node", devices=devices)):
            models = resolve(experiment.config).models
            for role, name in (
                ("actor", experiment.config.log.actor),
                ("critic", experiment.config.log.critic),
            ):
                assert models[role].spec.num_layers == layers.get(name, 4)
    assert resolve(expand(table, Selection("paper"))[0].config).actor.spec.num_layers == 32


def test_iterations_of_the_request_win(table):
    assert {e.config.iterations for e in expand(table, Selection("cpu", iterations=2))} == {2}


def test_repeats_differ_in_seed_and_number_alone(table):
    twice = expand(table, Selection("cpu", only=("figure9",), repeats=2))
    assert len(twice) == 2 * len(expand(table, Selection("cpu", only=("figure9",))))
    first, second = twice[:2]
    assert (second.config.seed, second.config.log.repeat) == (1, 1)
    log = second.config.log.model_copy(update={"repeat": 0})
    assert second.config.model_copy(update={"seed": 0, "log": log}) == first.config


def test_only_chooses_figures(table):
    some = expand(table, Selection("cpu", only=("figure12", "table3")))
    assert {figure for e in some for figure in e.config.log.figures} == {"figure12", "table3"}
    for selection, words in [
        (Selection("cpu", only=("figure99",)), "figure99 is unknown; did you mean figure9"),
        (Selection("big"), "big is unknown; there are cpu, node, paper, rehearsal"),
    ]:
        with pytest.raises(UserError, match=words):
            expand(table, selection)


def test_jobs_shrink_to_the_devices():
    job = Job(train=(2, 8, 2), generate=(4, 8, 1), microbatch=4, batch=256, prefill=4, decode=(16, 64))
    shapes = {devices: fitted(job, devices) for devices in (32, 16, 8, 4, 1)}
    assert {d: j.train for d, j in shapes.items()} == {
        32: (2, 8, 2), 16: (2, 4, 2), 8: (2, 2, 2), 4: (2, 1, 2), 1: (1, 1, 1),
    }  # fmt: skip
    assert [j.batch for j in shapes.values()] == [256, 128, 64, 32, 8]
    assert shapes[1].generate == (1, 1, 1)
    assert fitted(job, 64) == job


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("decode: small}", "decode: tiny}", "decode: input should be 'small', 'large' or 'rows'"),
        ("devices: 4", "devices: none", "scales.cpu.devices: input should be a valid integer"),
        ("pairs: [7B/7B]", "pears: [7B/7B]", "figures.figure12.pears: extra inputs are not permitted"),
        ("pairs: [7B/7B]", "pairs: [7B/8B]", "pair: 7B/8B is unknown; did you mean 7B/7B"),
        ("variants: [wo_bulk, w_bulk]", "variants: [w_blk]", "w_blk is unknown; did you mean w_bulk"),
        ("iterations: 4", "iteration: 4", "iteration: unknown key; did you mean iterations"),
    ],
)
def test_mistakes_in_the_table_are_named(tmp_path, old, new, words):
    text = (ROOT / "experiments.yaml").read_text()
    assert old in text
    (tmp_path / "table.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError) as raised:
        expand(read_table(tmp_path / "table.yaml"), Selection("cpu"))
    assert words in str(raised.value)
