"""The command of the figures, as tests call it."""

from puzzle.plotting.__main__ import main


def draw(*arguments):
    return main([str(argument) for argument in arguments])


def refused(capsys, *words):
    """The one line on stderr; nothing was printed besides."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    return err


def raw(folder, data):
    path = folder / "figure8/orion/llama_7b_350m_opt_2024-04-29T20:35:57+0800.log"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return folder
