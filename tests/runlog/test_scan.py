"""The measurements in published texts: what is found, what is mended, what is refused."""

import pytest

from puzzle.runlog.published import scan as scanning
from tests.runlog import texts


def scan(data):
    """What the scanner finds; every report is a text and names a line that is there, or none."""
    found = scanning.scan(data)
    for line, what in found.reports:
        assert isinstance(what, str)
        assert line is None or 1 <= line <= data.count(b"\n") + data.count(b"\r") + 1
    return found


def numbers(data):
    return [(block.iteration, block.values) for block in scan(data).blocks]


def reports(lines):
    return [what for _, what in scan(texts.as_bytes(lines)).reports]


def test_puzzle_lines_behind_prefixes_and_colours():
    found = scan(texts.as_bytes(texts.puzzle_lines()))
    assert found.reports == []
    assert [block.iteration for block in found.blocks] == [0, 1, 2, 3]
    for block, times, reshard in zip(found.blocks, texts.PUZZLE_TIMES, texts.RESHARDS, strict=True):
        names = ("stage1_gen", "stage2_infer", "stage3_train")
        assert tuple(block.values[name] for name in names) == tuple([time] for time in times)
        assert block.values["e2e_time"] == [pytest.approx(sum(times), abs=1e-9)]
        assert block.values["apply_shadow_model_time"] == [reshard]
    assert {name: found.arguments[name] for name in texts.ARGUMENTS} == {
        name: str(value) for name, value in texts.ARGUMENTS.items()
    }


def test_puzzle_metrics():
    values = dict(numbers(texts.as_bytes([texts.puzzle_line(3, 7.5, 2.5, 1.25)])))[3]
    assert values["average_reward"] == [2.25]
    assert values["actor_loss"] == [5.3]
    assert values["critic_loss"] == [7.35]
    assert values["global_batch_size"] == [128]


def test_later_epochs_go_on_counting():
    line = texts.puzzle_line(3, 7.5, 2.5, 1.25).replace("epoch: 0", "epoch: 2")
    assert numbers(texts.as_bytes([line]))[0][0] == 2 * 239 + 3


@pytest.mark.parametrize(
    "second", ["stage 12infer.)", "stage 2(inf(Role pid=3) hello er.)", "stage 2(infer.) x"]
)
def test_foreign_text_in_a_puzzle_line_is_mended_and_reported(second):
    line = texts.puzzle_line(11, 10657.76, 1329.438, 4525.213, second)
    found = scan(texts.as_bytes([line]))
    assert found.blocks[0].iteration == 11
    assert found.blocks[0].values["stage2_infer"] == [1329.438]
    assert found.blocks[0].values["e2e_time"] == [16512.411]
    assert [note.kind for note in found.notes] == ["repaired"]
    assert "repaired" in found.reports[0][1]


@pytest.mark.parametrize("place", range(60, 330, 7))
def test_foreign_text_never_changes_a_number_silently(place):
    line = texts.puzzle_line(11, 10657.76, 1329.438, 4525.213)
    clean = numbers(texts.as_bytes([line]))[0]
    found = scan(texts.as_bytes([line[:place] + "(Role pid=24389) 7 layers" + line[place:]]))
    assert found.reports
    for block in found.blocks:
        assert block.iteration == clean[0]
        assert {name: clean[1][name] for name in block.values} == block.values


def test_stages_that_do_not_add_up_are_kept_and_noted():
    line = texts.puzzle_line(4, 7830.421, 4876.259, 11357.272).replace("24063.952", "24163.952")
    found = scan(texts.as_bytes([line]))
    assert found.blocks[0].values["e2e_time"] == [24163.952]
    assert found.notes[0].kind == "sum"
    assert found.notes[0].seconds == pytest.approx(0.1)
    assert "100.000 ms" in found.reports[0][1]


def test_a_broken_puzzle_line_is_dropped_and_reported():
    line = texts.puzzle_line(4, 7830.421, 4876.259, 11357.272)
    for broken in (line[:-2], line.replace("7830", "78x30"), line.replace("4876.259", "9.259 hello")):
        found = scan(texts.as_bytes([broken]))
        assert found.blocks == []
        assert "dropped" in found.reports[0][1]


def test_the_reshard_of_several_ranks():
    lines = [texts.reshard_line(0.08), texts.reshard_line(0.09), texts.puzzle_line(0, 7.5, 2.5, 1.25)]
    found = scan(texts.as_bytes(lines))
    assert found.blocks[0].values["apply_shadow_model_time"] == [0.08, 0.09]
    assert "2 re-shard times" in found.reports[0][1]


def test_chat_lines():
    found = scan(texts.as_bytes(texts.chat_lines()))
    assert [what for _, what in found.reports] == [
        "1 lines hold several training times; figure 12's script reads the last of each"
    ]
    assert [block.iteration for block in found.blocks] == [0, 1, 2]
    for block, (generation, experience, ranks, e2e, gather) in zip(
        found.blocks, texts.CHAT_TIMES, strict=True
    ):
        assert block.values["generation_time"] == [generation]
        assert block.values["exp_gen_time"] == [experience]
        assert block.values["training_time_rank_print"] == list(ranks)
        assert block.values["perf_generation_bw"] == [-152.74]
        assert block.values.get("e2e_latency") == (None if block.iteration == 2 else [e2e])
        assert block.values.get("gather_latency") == (None if block.iteration == 2 else [gather])
    ranks = [times[2] for times in texts.CHAT_TIMES]
    # Of the two times that share a line, the published script reads the last.
    assert found.training == [*ranks[0], *ranks[1][1:], *ranks[2]]
    assert found.arguments["world_size"] == "8"
    assert found.arguments["train_micro_batch_size_per_gpu"] == "16"


def test_a_training_line_glued_to_the_epoch_line():
    lines = texts.chat_lines()
    place = lines.index(texts.step_line(1))
    lines[place - 3 : place + 1] = [lines[place - 3] + texts.step_line(1)]
    found = scan(texts.as_bytes(lines))
    ranks = [times[2] for times in texts.CHAT_TIMES]
    assert found.blocks[1].values["training_time_rank_print"] == list(ranks[1])
    assert found.training == [*ranks[0], 0.0, ranks[1][2], *ranks[2]]
    assert found.notes[0].kind == "glued"
    assert found.notes[0].indices == (3,)
    assert found.notes[0].values == list(ranks[1][:2])


def test_training_times_of_another_node_before_the_first_iteration():
    lines = texts.chat_lines()
    others = [f"Training time: {5 + number / 8}" for number in range(6)]
    found = scan(texts.as_bytes(lines[:4] + others + lines[4:]))
    assert [block.values["training_time_other_node_print"] for block in found.blocks] == [
        [5.0, 5.125],
        [5.25, 5.375],
        [5.5, 5.625],
    ]
    assert found.training[:6] == [5 + number / 8 for number in range(6)]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Training time: 9.47x", "repaired: other text right behind"),
        ("Training time: 9.472024-04-29 INFO", "number dropped"),
        ("Training time: nine", "no number"),
        ("Average reward score: 0.25.5", "number dropped"),
        ("Generation time: 9.47, exp gen time: ", "cannot be read"),
        ("|E2E latency=38.46s |Gather latency=1.69s (4.40", "cannot be read"),
        ("apply shadow model time: 0.0812:15", "number dropped"),
    ],
)
def test_numbers_that_may_be_torn_are_reported(text, what):
    assert any(what in report for report in reports([*texts.chat_lines(), text]))


def test_a_number_that_may_be_torn_hides_none_behind_it():
    """Three ranks print into one line; the first number runs into other digits."""
    lines = texts.chat_lines()
    place = lines.index(texts.step_line(0))
    lines[place - 2 : place] = ["Training time: 5.4.7 Training time: 5.45788431167603 Training time: 5.46"]
    found = scan(texts.as_bytes(lines))
    assert found.blocks[0].values["training_time_rank_print"] == [5.45788431167603, 5.46, 5.45796966552734]
    assert sum("number dropped" in what for _, what in found.reports) == 1


def test_an_engine_line_that_contradicts_itself_is_reported():
    lines = [line.replace("latency=27.89s", "latency=27.49s") for line in texts.chat_lines()]
    assert any("of 27.49 s" in report for report in reports(lines))


@pytest.mark.parametrize(
    "kind", ["Generation time", "Training time: 5", "Average", "|E2E", "Epoch: 0", "Training   =>"]
)
def test_a_lost_doubled_or_moved_chat_line_is_reported(kind):
    lines = texts.chat_lines()
    usual = reports(lines)
    places = [place for place, line in enumerate(lines) if line.startswith(kind)]
    lost = [line for place, line in enumerate(lines) if place != places[0]]
    doubled = lines[: places[0]] + lines[places[0] :][:1] + lines[places[0] :]
    moved = [*lost, lines[places[0]]]
    for changed in (lost, doubled, moved):
        assert len(reports(changed)) > len(usual), changed


def test_empty_binary_and_torn_logs():
    assert reports([""]) == ["empty log"]
    binary = scan(b"\x00\xff\xfe\n" + texts.as_bytes(texts.puzzle_lines()) + b"\x80\n")
    assert len(binary.blocks) == 4
    assert "in 2 lines in all" in binary.reports[0][1]
    torn = scan(texts.as_bytes(texts.chat_lines())[:-1])
    assert "may be torn" in torn.reports[0][1]


def test_carriage_returns_end_lines():
    data = texts.as_bytes(["progress 10%\rprogress 20%\r" + texts.puzzle_line(0, 7.5, 2.5, 1.25)])
    assert len(scan(data).blocks) == 1
    assert len(scan(texts.as_bytes(texts.puzzle_lines()).replace(b"\n", b"\r\n")).blocks) == 4


def test_numbers_without_end_do_not_break_the_scan():
    for text in ("epoch: " + "9" * 5000 + " | step: 1/2 |", "Training time: " + "9" * 5000 + ".5"):
        assert reports([text])
