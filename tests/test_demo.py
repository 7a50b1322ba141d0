"""The demo leaves the folders of one's own model alone: where it writes is its own."""

import importlib
from pathlib import Path

from alpaca.cli import VERBS
from alpaca.convert import command, download
from alpaca.recipe.arguments import Arguments
from alpaca.serving import weights

ROOT = Path(__file__).resolve().parent.parent


def test_the_demo_fetches_and_trains_into_a_folder_of_its_own() -> None:
    demo = importlib.import_module(VERBS["demo"][0])
    mine = command.parser().get_default("input_dir")
    before = sorted((ROOT / mine).iterdir())
    demo.Demo(5000, None).fetch()
    assert (ROOT / demo.FOLDER / download.FOLDER / Path(download.MEMBER).name).is_file()
    assert sorted((ROOT / mine).iterdir()) == before
    assert demo.RECIPE["--output_dir"] == demo.OUT
    assert demo.OUT not in (Arguments().output_dir, Path(weights.TRAINED))
