from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from puzzle.campaign.experiments import (
    ROOM,
    Experiment,
    Job,
    Selection,
    Table,
    every_layout,
    expand,
    fitted,
    read_table,
)
from puzzle.config.memory_report import estimate
from puzzle.config.resolve import resolve
from puzzle.config.run import LayoutConfig
from puzzle.errors import UserError
from puzzle.plotting.selection import SAME
from puzzle.runlog import load_runs
from puzzle.spec.published import published

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


def by_run(table: Table, experiments: list[Experiment]) -> dict[tuple, Experiment]:
    """Keyed by figure, pair and the figure's name of the variant; a run of several figures several times."""
    found: dict[tuple, Experiment] = {}
    for experiment in experiments:
        log, layout = experiment.config.log, experiment.config.actor.layout
        for figure in log.figures:
            names = [
                name
                for name in table.figures[figure].variants
                if table.same.get(name, name) == experiment.variant
            ]
            assert len(names) == 1
            key = (figure, f"{log.actor}/{log.critic}", names[0])
            if figure == "figure10":
                key += (experiment.config.batch, layout.tp, layout.pp, layout.dp)
            assert key not in found
            found[key] = experiment
    return found


@pytest.mark.parametrize("cluster", ["orion", "phoenix"])
def test_the_paper_scale_is_the_published_runs(table, cluster):
    ours = by_run(table, expand(table, Selection("paper", cluster=cluster)))
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
    [("cpu", None), ("gpu", 1), ("node", 8), ("node", 4), ("node", 1), ("paper", None), ("rehearsal", None)],
)
def test_every_run_is_possible_and_named_once(table, scale, devices):
    experiments = expand(table, Selection(scale, devices=devices))
    assert len({experiment.name for experiment in experiments}) == len(experiments)
    figures = {"figure8", "figure12", "ablation"} if scale == "gpu" else FIGURES
    assert {figure for e in experiments for figure in e.config.log.figures} == figures
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


def peak(experiment: Experiment) -> int:
    return max(rank.peak for rank in estimate(resolve(experiment.config), True))


def test_models_are_cut_where_memory_does_not_hold_them_and_say_so(table):
    """Of one layer more per stage one of the pair's runs would not fit; all its runs have the same depth."""
    memory = 80 << 30
    figures = ("figure8", "figure11")
    found = expand(table, Selection("node", only=figures, devices=4, memory=memory))
    whole = {(e.config.log.actor, e.config.log.critic) for e in found if not e.cut}
    cut = {(e.config.log.actor, e.config.log.critic) for e in found if e.cut}
    assert whole == {("7B", "7B"), ("7B", "350M"), ("13B", "350M")}
    assert cut == {("13B-28L", "7B-28L"), ("33B-16L", "7B-16L")}
    assert [e.cut for e in found] == sorted(e.cut for e in found)
    for experiment in found:
        models = resolve(experiment.config).models
        for role, name in (("actor", experiment.config.log.actor), ("critic", experiment.config.log.critic)):
            size, _, layers = (name or "").partition("-")
            shape = published(size)
            if layers:
                shape = replace(shape, num_layers=int(layers.removesuffix("L")))
            head = "value" if role == "critic" else "lm"
            assert models[role].spec == replace(shape, head=head)
        if not experiment.options:
            assert peak(experiment) <= ROOM * memory
    deeper = []
    for e in (e for e in found if e.config.log.actor == "33B-16L" and not e.options):
        pp = e.config.actor.layout.pp
        roles = ("actor", "critic", "reference", "reward")
        models = {
            role: getattr(e.config, role).model_copy(
                update={
                    "init": getattr(e.config, role).init.model_copy(update={"num_hidden_layers": 16 + pp})
                }
            )
            for role in roles
        }
        deeper.append(replace(e, config=e.config.model_copy(update=models)))
    assert max(map(peak, deeper)) > ROOM * memory
    assert not any(e.cut for e in expand(table, Selection("node", devices=4)))


def test_every_layout_of_the_devices_is_there_once(table):
    assert every_layout(1) == [(1, 1, 1)]
    assert every_layout(4)[0] == (1, 4, 1)
    for devices in (2, 4, 6, 8):
        found = every_layout(devices)
        axes = {
            (tp, pp, dp) for tp, pp, dp in product(range(1, devices + 1), repeat=3) if tp * pp * dp == devices
        }
        assert len(found) == len(set(found))
        assert set(found) == axes
    swept = expand(table, Selection("node", only=("figure10",), devices=4))
    assert {e.config.batch for e in swept if e.config.log.actor == "7B"} == {128, 256}
    assert len({str(e.config.actor.layout) for e in swept}) == 6


def test_what_is_worth_most_comes_first(table):
    found = expand(table, Selection("node", devices=4, repeats=3))
    assert [e.config.log.repeat for e in found] == sorted(e.config.log.repeat for e in found)
    assert [e.variant for e in found[:4]] == ["base", "opt", "dschat_best", "dschat"]
    assert all("figure8" in e.config.log.figures for e in found[:4])


def test_figures_know_the_other_names_of_a_run(table):
    assert table.same == SAME
    runs = [e for e in expand(table, Selection("cpu")) if e.variant == "base"]
    assert any({"figure8", "figure9", "figure11"} <= set(e.config.log.figures) for e in runs)


def test_iterations_of_the_request_win(table):
    assert {e.config.iterations for e in expand(table, Selection("cpu", iterations=2))} == {2}


def test_repeats_differ_in_seed_and_number_alone(table):
    twice = expand(table, Selection("cpu", only=("figure9",), repeats=2))
    once = expand(table, Selection("cpu", only=("figure9",)))
    assert [e.name for e in twice] == [e.name for e in once] + [f"{e.name}_r1" for e in once]
    first, second = twice[0], twice[len(once)]
    assert first == once[0]
    assert second.job == first.job
    assert (second.config.seed, second.config.log.repeat) == (1, 1)
    log = second.config.log.model_copy(update={"repeat": 0})
    assert second.config.model_copy(update={"seed": 0, "log": log}) == first.config


def test_only_chooses_figures(table):
    some = expand(table, Selection("cpu", only=("figure12", "table3")))
    assert {figure for e in some for figure in e.config.log.figures} == {"figure12", "table3"}
    for selection, words in [
        (Selection("cpu", only=("figure99",)), "figure99 is unknown; did you mean figure9"),
        (Selection("big"), "big is unknown; there are cpu, gpu, node, paper, rehearsal"),
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
        (
            "generation: train, decode: small}",
            "generation: train, decode: tiny}",
            "decode: input should be 'small', 'large' or 'rows'",
        ),
        ("devices: 4", "devices: none", "scales.cpu.devices: input should be a valid integer"),
        ("pairs: [7B/7B]", "pears: [7B/7B]", "figures.figure12.pears: extra inputs are not permitted"),
        ("pairs: [7B/7B]", "pairs: [7B/8B]", "pair: 7B/8B is unknown; did you mean 7B/7B"),
        ("variants: [wo_bulk, w_bulk]", "variants: [w_blk]", "w_blk is unknown; did you mean w_bulk"),
        ("wo_bulk: base}", "wo_bulk: bass}", "bass is unknown; did you mean base"),
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
