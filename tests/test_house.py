"""The rules of the tree: who imports whom, and documents that match what is there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alpaca.cli import VERBS

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    "convert",
    "training",
    "plan",
    "serving",
    "web",
    "dataset",
    "evaluation",
    "release",
    "doctor",
)
# training plans before it starts; an export is a conversion run backwards, by the same tables
NEIGHBOURS = {
    "training": {"plan"},
    "release": {"convert"},
    "web": {"serving"},
    "evaluation": {"serving", "dataset"},
}
GROUND = ("errors", "prompt", "atomic", "ram", "heap", "layout")
# each may import those before it
SHARED = (
    "address", "rounding", "quantization", "stored", "folder", "datafile", "records", "pairs",
    "passport", "adapter", "card", "tokens", "recipe", "description", "shards", "model", "merging",
    "golden", "proof", "verify",
)  # fmt: skip
DOORS = (
    "predict.py",
    "train.py",
    "alpaca/cli.py",
    "alpaca/demo.py",
    "alpaca/__main__.py",
    "bench",
)


def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.split() if (ROOT / name).exists()]


def imports(path: Path) -> set[str]:
    """Dotted names a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def package_parts(names: set[str]) -> set[str]:
    """First part below `alpaca` of each import of our own package."""
    return {name.split(".")[1] for name in names if name.startswith("alpaca.")} - {"__version__"}


def allowed(path: Path) -> set[str]:
    """Which parts of `alpaca` the module at `path` may import."""
    name = path.relative_to(ROOT).as_posix()
    if name.startswith((*DOORS, "tests/")):
        return {*GROUND, *SHARED, *ROOMS, "cli"}
    if name == "alpaca/__init__.py":
        return set()
    part = path.relative_to(ROOT / "alpaca").parts[0].removesuffix(".py")
    if part in GROUND:
        return set()
    if part in SHARED:
        return {*GROUND, *SHARED[: SHARED.index(part) + (part == "recipe")]}
    assert part in ROOMS, f"{name} belongs to no floor of the house"
    return {*GROUND, *SHARED, part} | NEIGHBOURS.get(part, set())


def test_each_module_imports_only_from_floors_below_it() -> None:
    files = sources()
    assert len(files) > 15
    for path in files:
        wrong = package_parts(imports(path)) - allowed(path)
        assert not wrong, f"{path.relative_to(ROOT)} must not import {sorted(wrong)}"


# The teacher's; the doctor's, which asks a server it has started; the runner's, which asks its own;
# the web server and the voters' page, which listen; engines and models of other servers.
CONNECTING = (
    "alpaca/dataset/teacher.py",
    "alpaca/doctor/asking.py",
    "alpaca/serving/listeners.py",
    "alpaca/serving/remote.py",
    "alpaca/serving/elsewhere.py",
    "alpaca/serving/vllm.py",
    "alpaca/web/server.py",
    "alpaca/web/remote.py",
    "alpaca/evaluation/booth.py",
    "alpaca/evaluation/endpoint.py",
)


def test_only_the_doors_import_cog_and_few_modules_open_connections() -> None:
    cog_users = {"predict.py", "train.py", "alpaca/serving/schema.py"}
    network = {"socket", "urllib", "http", "requests", "httpx", "openai", "aiohttp"}
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("tests/", "bench/", "script/")):
            continue
        tops = {name.split(".")[0] for name in imports(path) if "urllib.parse" not in name}
        assert "cog" not in tops or name in cog_users, f"{name} imports cog"
        assert name in CONNECTING or not tops & network, f"{name} imports {tops & network}"


def test_every_module_starts_with_what_it_is_for() -> None:
    for path in sources():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), (
            f"{path} says nothing"
        )


def test_readme_file_map_matches_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n") <= 160
    section = readme.partition("## File map")[2].partition("\n## ")[0]
    named = set()
    for first, others in re.findall(r"^    ([\w./-]+)((?:, [\w./-]+)*) ", section, re.MULTILINE):
        folder = first.rpartition("/")[0] if not first.endswith("/") else ""
        rest = [name for name in others.split(", ") if name]
        named |= {first, *(f"{folder}/{name}" if folder else name for name in rest)}
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), f"README's file map names {name}, which is not there"
    for entry in sorted((ROOT / "alpaca").iterdir()):
        if entry.is_dir() and not entry.name.startswith("__"):
            assert f"alpaca/{entry.name}/" in named, f"README's file map lacks alpaca/{entry.name}/"


def test_the_architecture_page_names_every_part() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for part in ROOMS:
        assert f'["{part}/<br/>' in page, f"docs/architecture.md does not show {part}/"
    for layer, parts in (("shared", SHARED), ("base", GROUND)):
        listed = re.search(rf'{layer}\["{layer}: ([^"]+)"\]', page)
        assert listed is not None
        assert [part.rstrip("/") for part in listed.group(1).split(", ")] == list(parts)
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", page):
        places = [
            ROOT / name,
            ROOT / "alpaca" / name,
            *(ROOT / "alpaca" / r / name for r in (*ROOMS, "recipe")),
        ]
        assert any(place.is_file() for place in places), f"{name} is not there"


def test_scripts_stay_short() -> None:
    for path in (ROOT / "script").iterdir():
        assert path.read_text().count("\n") <= 25, f"{path.name} is longer than 25 lines"


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "alpaca"],
        [sys.executable, "train.py"],
        ["./convert_weights.sh"],
        *([sys.executable, "-m", "alpaca", verb] for verb in VERBS),
    ],
    ids=lambda command: " ".join(command[-2:]),
)
def test_help_is_one_screen(command: list[str]) -> None:
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert 5 < done.stdout.count("\n") <= 72
    assert not done.stderr


# Every other module takes the group of flags that it reads (`recipe/arguments.py`).
ALL_FLAGS = {
    "recipe/fsdp_config.py", "training/command.py", "training/identity.py",
    "plan/plan.py", "plan/planner.py", "plan/remedies.py",
}  # fmt: skip


def test_few_modules_take_all_flags() -> None:
    name = "alpaca.recipe.arguments.Arguments"
    found = {
        path.relative_to(ROOT / "alpaca").as_posix()
        for path in sources()
        if path.is_relative_to(ROOT / "alpaca") and name in imports(path)
    }
    assert found == ALL_FLAGS
