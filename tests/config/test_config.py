from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.config.document import read_yaml
from puzzle.config.load import build, keys, load_config, merge, parse_overrides
from puzzle.config.run import TRAINED, LayoutConfig, TrainConfig, TrainedConfig
from puzzle.errors import UserError

BYTES = ["--data.tokenizer", "bytes"]
BASE = """\
seed: 3
layout: {dp: 2}
actor:
  model: some/actor
  layers: 4
  optimizer:
    lr: 5e-5
reward: {function: "scorers:length"}
data: {prompts: prompts.jsonl}
algorithm:
generation: {max_new_tokens: 20}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def test_command_line_over_file_over_defaults(config_file):
    config = load_config(
        config_file, ["--seed", "7", "--actor.optimizer.betas", "0.8,0.9", "--algorithm.kl.coef=2e-2"]
    )
    assert config.seed == 7
    assert config.actor.optimizer.lr == 5e-5
    assert config.actor.optimizer.betas == (0.8, 0.9)
    assert config.algorithm.kl.coef == 0.02
    assert config.algorithm.clip == 0.2
    assert load_config(config_file).seed == 3


def test_models_and_layouts_are_inherited(config_file):
    config = load_config(config_file, ["--critic.layout.dp", "1", "--critic.layout.tp", "2"])
    assert config.critic is not None
    assert (config.critic.model, config.critic.layers) == ("some/actor", None)
    assert (config.reference.model, config.reference.layers) == ("some/actor", 4)
    assert config.generation.layout == config.actor.layout == LayoutConfig(dp=2)
    assert config.critic.layout == LayoutConfig(tp=2)
    assert config.world == 2
    assert set(config.layouts()) == {"actor", "critic", "reference", "generation"}
    switched = load_config(config_file, ["--actor.layout.tp", "2", "--actor.layout.dp", "1"])
    assert switched.generation.layout == LayoutConfig(tp=2)


def test_a_source_on_the_command_line_replaces_the_files(config_file):
    config = load_config(config_file, ["--reward.model", "some/reward", "--actor.init.preset", "7b", *BYTES])
    assert (config.reward.model, config.reward.function) == ("some/reward", None)
    assert config.actor.model is None
    assert config.actor.init is not None
    assert config.actor.init.preset == "7b"


@pytest.mark.parametrize("name", list(TRAINED))
@pytest.mark.parametrize("free", ["true", "True", "yes", "1", "false"])
def test_words_of_a_command_line_choose_defaults_as_a_file_does(tmp_path, config_file, name, free):
    options = ["--algorithm.name", name, "--algorithm.reference_free", free, "--generation.samples", "4"]
    text = BASE.replace("max_new_tokens: 20", "max_new_tokens: 20, samples: 4")
    written = tmp_path / "written.yaml"
    written.write_text(text.replace("algorithm:", f"algorithm: {{name: {name}, reference_free: {free}}}"))
    assert load_config(config_file, [*options, *BYTES]) == load_config(written, BYTES)


def test_the_resolved_run_is_the_run(config_file):
    config = load_config(config_file, ["--layout.stages", "balanced"])
    assert TrainConfig.model_validate(config.resolved()) == config
    other = TrainConfig(
        actor=TrainedConfig(model="a", layout=LayoutConfig(dp=2)),
        layout=LayoutConfig(dp=2),
        **{key: config.resolved()[key] for key in ("reward", "data")},
    )
    assert other.critic is not None
    assert other.critic.model == "a"
    assert other.generation.layout.dp == 2


WRONG = [
    (["--algorithm.cilp", "0.3"], "--algorithm.cilp: unknown option; did you mean algorithm.clip?"),
    (["--lr", "1"], "--lr: unknown option; did you mean actor.optimizer.lr?"),
    (["--sead=1"], "--sead: unknown option; did you mean seed?"),
    (
        ["--data.examples", "chats.jsonl"],
        "--data.examples: unknown option; it is a key of puzzle sft, puzzle reward-model, puzzle dpo",
    ),
    (["stray"], "unrecognized arguments: stray"),
    (["--batch"], "argument --batch: expected one argument"),
    (["--batch", "many"], "command line: batch: expected a whole number, got 'many'"),
    (["--batch", "null"], "command line: batch: expected a whole number, got None"),
    (["--layout.tp=null"], "command line: layout.tp: expected a whole number, got None"),
    (["--launch", '{"skip_memory_check": null}'], "command line: launch.skip_memory_check: expected true or"),
    (["--batch", "1.5"], "command line: batch: expected a whole number, got '1.5'"),
    (["--batch", "0"], "command line: batch: expected at least 1, got '0'"),
    (["--seed", "-1"], "command line: seed: expected at least 0, got '-1'"),
    (["--algorithm.clip", "nan"], "command line: algorithm.clip: expected a finite number, got 'nan'"),
    (
        ["--algorithm.whiten", "perhaps"],
        "command line: algorithm.whiten: expected true or false, got 'perhaps'",
    ),
    (
        ["--algorithm.kl.estimator", "k4"],
        "command line: algorithm.kl.estimator: expected 'k1', 'k2' or 'k3', got 'k4'",
    ),
    (["--actor.optimizer.betas", "0.9"], "command line: actor.optimizer.betas: a value is missing"),
    (
        ["--dtype", "fp16"],
        "command line: dtype: fp16 is not supported (it needs loss scaling)",
    ),
    (["--generation.top_p", "0"], "command line: generation.top_p: expected more than 0"),
    (["--generation.min_new_tokens", "30"], "min_new_tokens 30 exceeds max_new_tokens 20"),
    (["--layout.stages", "uneven"], "layout.stages: expected even, balanced or a list of layers per stage"),
    (["--layout.stages", "2,2"], "layout: stages lists 2 stages but pp is 1"),
    (["--critic.layout.tp", "3"], "critic.layout: tp x pp x dp = 3 x 1 x 2 = 6 but the run has 2 processes"),
    (["--algorithm.minibatch", "7"], "algorithm.minibatch 7 does not divide batch x generation.samples = 32"),
    (
        ["--algorithm.microbatch=2", "--algorithm.microbatch_tokens=9"],
        "give microbatch or microbatch_tokens, not both",
    ),
    (
        ["--algorithm.overlong.buffer", "21"],
        "algorithm.overlong.buffer 21 exceeds generation.max_new_tokens 20",
    ),
    (["--algorithm.overlong.penalty", "1"], "algorithm.overlong.buffer: a value is missing"),
    (
        ["--algorithm.dynamic_sampling.rounds", "2"],
        "algorithm: dynamic_sampling: ppo learns from equal scores, too; leave it out, or take grpo",
    ),
    (["--algorithm.dual_clip", "1"], "command line: algorithm.dual_clip: expected more than 1"),
    (
        ["--algorithm.dual_clip=3", "--algorithm.policy_loss", "cispo"],
        "algorithm: dual_clip: policy_loss cispo bounds every weight by clip_high; leave it out",
    ),
    (["--reward.function", "null"], "reward: no model; give reward.model, reward.init or reward.function"),
    (["--actor.model", "a", "--actor.init.preset", "7b"], "actor: give model or init, not both"),
    (["--actor.init.hidden_size", "8"], "actor.init: give preset, or also vocab_size, intermediate_size"),
    (["--data.prompts", "null"], "data: give prompts (a file) or random_tokens"),
    (["--data.system", "Be kind."], "data.system needs data.chat_template"),
    (
        ["--algorithm.reference_free", "true", "--algorithm.kl_stop", "1"],
        "there is no KL for algorithm.kl_stop",
    ),
    (
        ["--algorithm.reference_free", "true", "--algorithm.kl.place", "loss"],
        "there is no KL for algorithm.kl.place loss",
    ),
    (["--algorithm.kl.place", "loss"], "algorithm.kl.place loss needs estimator k2 or k3"),
    (["--recompute", "true", "--intra.split_backward", "true"], "set one of them to false"),
    (["--numerics", "exact"], "numerics: expected"),
    (["--numerics_parts", "2"], "numerics_parts: only numerics invariant cuts sums"),
    (["--numerics", "invariant", "--numerics_parts", "3"], "numerics_parts: is 3; use 1, 2, 4 or 8"),
    (["--numerics", "invariant", "--layout.tp", "3"], "layout.tp is 3; use 1, 2, 4 or 8"),
    (["--numerics", "invariant", "--numerics_parts", "2", "--generation.layout.tp", "4"], "2 is less than"),
    (["--numerics", "invariant", "--compile", "true"], "set compile to false"),
    (["--numerics", "invariant", "--actor.lora.rank", "2"], "sums of adapters (lora) are not cut"),
    (["--numerics", "invariant", "--generation.tp_sums", "peer"], "generation.tp_sums peer: a GPU sums so"),
    (["--device", "cpu", "--generation.tp_sums", "peer"], "generation.tp_sums peer: a GPU sums so"),
    (["--generation.keep_graphs", "maybe"], "keep_graphs: expected true or false or 'auto', got 'maybe'"),
    (["--intra.overlap_rollout", "2"], "overlap_rollout: expected true or false or 'auto', got '2'"),
    (
        ["--generation.keep_graphs", "true", "--generation.graphs", "false"],
        "generation.keep_graphs: generation.graphs false leaves none to keep",
    ),
    (["--intra.split_backward", "true"], "intra.split_backward: one stage has nothing to fill"),
    (
        ["--switch.source", "zero_shards", "--layout.dp=1"],
        "switch.source zero_shards: one replica has all rows",
    ),
    (["--generation.keep_graphs", "true", "--device", "cpu"], "keep_graphs: a CPU has no graphs; use auto"),
    (["--switch.overlap", "prefill", "--device", "cpu"], "switch.overlap prefill: a CPU does one thing"),
    (["--switch.overlap", "prefill"], "the actor generates as it trains, nothing is filled"),
    (["--actor.lora.rank", "0"], "command line: actor.lora.rank: expected at least 1, got '0'"),
    (["--actor.lora.rank", "4", "--actor.lora.alpha", "0"], "actor.lora.alpha: expected more than 0"),
    (["--actor.lora.targets", "q_prj"], "'q_prj' is no projection of a layer; did you mean q_proj?"),
    (
        ["--actor.lora.targets", "c_attn"],
        "'c_attn' is no projection of a layer; use all, or of q_proj, k_proj",
    ),
    (["--actor.lora.targets", ""], "actor.lora.targets: '' is no projection of a layer"),
    (["--actor.lora.targets", "[[q_proj]]"], "--actor.lora.targets '[[q_proj]]': neither JSON nor names"),
    *(
        (
            ["--batch", "4", "--generation.stop", value, "--actor.model=[m"],
            f"--generation.stop {value!r}: neither JSON nor names between commas",
        )
        for value in ("[{", '"a', 'a,"b', "a,[b", '["a', '[{"a":1},', '{"a')
    ),
    (["--layout", "abc"], "--layout 'abc': a section of keys; give one as --layout.tp VALUE, or JSON such"),
    (["--layout", "{tp: 2}"], "--layout '{tp: 2}': a section of keys; give one as --layout.tp VALUE"),
    (["--layout=[2]"], "--layout '[2]': a section of keys"),
    (["--layout"], "--layout '': a section of keys"),
    (
        ["--actor.lora", "yes", "--seed", "1"],
        'as --actor.lora.rank VALUE, or JSON such as {"rank": VALUE}',
    ),
    (["--algorithm.kl", "0.1"], "--algorithm.kl '0.1': a section of keys; give one as --algorithm.kl.coef"),
    (["--actor.lora.targets", "[]"], "actor.lora.targets: expected all, or names of projections"),
    (["--actor.lora.rank=4", "--offload.reference=true"], "the reference is the actor without adapters"),
    (
        ["--critic.lora.rank=4", "--intra.split_backward=true", "--layout.pp=2"],
        "intra.split_backward: critic.lora leaves hardly any gradients of weights",
    ),
    (
        ["--actor.lora.rank=4", "--switch.source=zero_shards", "--generation.layout.dp=1"],
        "switch.source zero_shards: of actor.lora only adapters are stepped",
    ),
    (["--eval.every", "2"], "eval.every needs data.eval_prompts"),
    (["--checkpoint.best", "true"], "checkpoint.best needs checkpoint.save, eval.every"),
]


def test_targets_are_put_in_order(config_file: Path) -> None:
    def targets(*words: str) -> tuple[str, ...]:
        lora = load_config(config_file, ["--actor.lora.rank", "8", *words]).actor.lora
        assert lora is not None
        return lora.targets

    assert load_config(config_file).actor.lora is None
    assert targets() == targets("--actor.lora.targets", "all")
    assert targets("--actor.lora.targets", "down_proj,q_proj") == ("q_proj", "down_proj")
    assert targets("--actor.lora.targets", "up_proj") == ("up_proj",)


def test_the_reference_shares_where_it_is_the_actor(config_file: Path) -> None:
    def shares(*words: str) -> str | None:
        return load_config(config_file, words).shares("reference")

    assert shares() is None
    assert shares("--actor.lora.rank=8") == "actor"
    assert shares("--actor.lora.rank=8", "--reference.model=some/other") is None
    assert shares("--actor.lora.rank=8", "--reference.layers=3") is None
    assert shares("--actor.lora.rank=8", "--reference.layout.dp=1", "--reference.layout.tp=2") is None


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_wrong_options_get_one_line(config_file, arguments, words):
    with pytest.raises(UserError) as raised:
        load_config(config_file, arguments)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


WRONG_FILES = [
    ("sed: 3\n", ":1: sed: unknown key; did you mean seed?"),
    (
        "ppo:\n  clip: 0.2\n  kl:\n    coeff: 1\n",
        ":4: algorithm.kl.coeff: unknown key; did you mean algorithm.kl.coef?",
    ),
    ("seed: 1\nbatch: 2\nseed: 3\n", ":3: seed is given twice, first in line 1"),
    ("algorithm: {clip: 0.1, clip: 0.2}\n", ":1: algorithm.clip is given twice"),
    ("seed: [1\n", ":2: not valid YAML"),
    ("seed: !!python/object/apply:os.system ['true']\n", ":1: not valid YAML"),
    ("- seed\n", ": expected sections of keys, found list"),
    ("algorithm: 5\n", ":1: algorithm: expected a section of keys, got 5"),
    ("batch: true\n", ":1: batch: a truth value has no meaning here, got True"),
    ("actor: {model: 5}\n", ":1: actor.model: expected text, got 5"),
    ("layout: {stages: [4, 0], pp: 2}\n", ":1: layout.stages: expected even, balanced or a list"),
    ("", ": actor: no model; give actor.model, actor.init"),
    ("seed: 1\x00\n", ": not valid YAML"),
    ("a: &a [*a]\n", ":1: not valid YAML: an alias of what it stands in"),
    ("a: 1\nb: " + "[" * 3000 + "]" * 3000, ": not valid YAML: nested deeper than 64 levels"),
    (
        "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{f'*a{n},' * 4}]\n" for n in range(20)),
        "more than 100000",
    ),
    ("seed: " + "9" * 5000, "... is no int"),
    ("seed: 0x" + "f" * 5000, "... is no int"),
    ("seed: 1\nbatch: 2020-99-99\n", ":2: not valid YAML: '2020-99-99' is no timestamp"),
    ("seed: !!bool x\n", ":1: not valid YAML: 'x' is no bool"),
    ("seed: !!float x\n", ":1: not valid YAML: 'x' is no float"),
    ('data: {system: "\\UFFFFFFFF"}\n', ": not valid YAML: an escape in it is no character"),
    ("seed: 1\n5: 6\n", ":2: '5' is no text, and keys are"),
    ("? [a]\n: b\n", ":1: "),
    ("seed: -1\n", ":1: seed: expected at least 0, got -1"),
    ("seed: 18446744073709551616\n", ":1: seed: expected at most 9223372036854775807"),
    ("layout: {tp: 1000000000}\n", ":1: layout.tp: expected at most 1024"),
    ("layout: {tp: 64, dp: 64}\n", ":1: layout: tp x pp x dp = 64 x 1 x 64 = 4096 processes; at most 1024"),
    ("batch: 1000000000\n", ":1: batch: expected at most 1048576"),
    ("actor: {optimizer: {lr: .inf}}\n", ":1: actor.optimizer.lr: expected a finite number"),
    ("actor: {optimizer: {lr: 1.0e+300}}\n", ":1: actor.optimizer.lr: expected at most"),
    ("generation: {temperature: 1.0e-300}\n", ":1: generation.temperature: expected at least 1e-30"),
    ("data: {field: ''}\n", ":1: data.field: expected text that is not empty"),
]


@pytest.mark.parametrize(("text", "words"), WRONG_FILES)
def test_wrong_files_get_their_line(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert str(raised.value).startswith(str(path))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path):
    for path, words in [(tmp_path / "absent", "no such file"), (tmp_path, "cannot be read")]:
        with pytest.raises(UserError, match=words):
            load_config(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_config(tmp_path / "binary")


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
NAMES = st.sampled_from([key[-1] for key, _ in keys()])


@given(st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES, v, max_size=4)))
def test_any_value_is_a_run_or_a_user_error(value):
    data = value if isinstance(value, dict) else {"actor": value, "layout": value, "algorithm": {"kl": value}}
    with pytest.raises(UserError):
        build(data, lambda key: "here")


def test_every_scalar_key_is_an_option():
    samples = {"layout.stages": "even", "actor.optimizer.betas": "0.9,0.99", "log.figures": "a,b"}
    for key, is_section in keys():
        if not is_section:
            name = ".".join(key)
            nested = parse_overrides([f"--{name}", samples.get(name, "1")])
            for part in key[:-1]:
                nested = nested[part]
            assert key[-1] in nested


def test_merge_is_deep_and_leaves_its_arguments():
    low, high = {"a": {"b": 1, "c": 2}, "d": 1}, {"a": {"b": 3}, "d": {"e": 1}}
    assert merge(low, high) == {"a": {"b": 3, "c": 2}, "d": {"e": 1}}
    assert low == {"a": {"b": 1, "c": 2}, "d": 1}


def test_lines_of_keys(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a:\n  b: 1\nc: {d: 2}\n")
    document = read_yaml(path)
    assert document.data == {"a": {"b": 1}, "c": {"d": 2}}
    assert document.lines == {("a",): 1, ("a", "b"): 2, ("c",): 3, ("c", "d"): 3}
    assert isinstance(document.path, Path)
