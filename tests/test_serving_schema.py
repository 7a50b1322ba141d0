"""The schema file: made from the signature, statically, as `cog build` makes it."""

from pathlib import Path

import pytest

from alpaca.serving import schema

ROOT = Path(__file__).resolve().parent.parent
HEAD = "import cog\nfrom collections.abc import Iterator\n"


def written(folder: Path, body: str) -> schema.Entry:
    (folder / "predict.py").write_text(HEAD + body)
    return schema.find(folder, "predict.py:run", "run")


def test_our_own_runner_has_the_inputs_of_2023() -> None:
    inputs = schema.find(ROOT, "predict.py:Runner", "run").input_schema()
    facts = {
        name: [field.get(key) for key in ("type", "default", "minimum", "maximum")]
        for name, field in inputs["properties"].items()
    }
    assert inputs["required"] == ["prompt"]
    wanted = {
        "prompt": ["string", None, None, None],
        "n": ["integer", 1, 1, 5],
        "total_tokens": ["integer", 2000, 1, None],
        "temperature": ["number", 0.75, 0, 5],
        "top_p": ["number", 1, 0.01, 1],
        "repetition_penalty": ["number", 1, 0.01, 5],
    }
    assert {name: facts[name] for name in wanted} == wanted
    assert [f["x-order"] for f in inputs["properties"].values()] == list(range(len(facts)))


def test_each_input_is_described_in_a_sentence_of_its_own() -> None:
    inputs = schema.find(ROOT, "predict.py:Runner", "run").input_schema()["properties"]
    described = {name: field["description"] for name, field in inputs.items()}
    assert len(set(described.values())) == len(described)
    for name, text in described.items():
        assert len(text.split()) >= 8, name
        assert text[0].isupper(), name
        assert text[-1] == ".", name


def test_our_output_is_a_list_that_clients_do_not_join() -> None:
    """Joined, the answers of a request for several could not be told apart."""
    output = schema.find(ROOT, "predict.py:Runner", "run").output_schema()
    assert output == {
        "type": "array",
        "items": {"type": "string"},
        "x-cog-array-type": "iterator",
        "title": "Output",
    }


def test_optional_constants_lists_and_models(tmp_path: Path) -> None:
    entry = written(
        tmp_path,
        "LIMIT = 7\n"
        "class Out(cog.BaseModel):\n    weights: cog.Path\n    note: str | None\n"
        "async def run(a: str, b: int | None = cog.Input(default=None, le=LIMIT),"
        " c: list[str] = cog.Input(default=[]), d: cog.Path = None) -> Out: ...\n",
    )
    document = schema.document(entry)
    inputs = document["components"]["schemas"]["Input"]
    assert inputs["required"] == ["a", "d"]
    assert inputs["properties"]["b"] == {
        "x-order": 1,
        "type": "integer",
        "title": "B",
        "default": None,
        "nullable": True,
        "maximum": 7,
    }
    assert inputs["properties"]["c"]["items"] == {"type": "string"}
    assert document["components"]["schemas"]["Output"]["required"] == ["weights"]
    assert "x-cog-streaming" not in document["paths"]["/predictions"]["post"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def run(a) -> str: ...", "a is not annotated"),
        ("def run(a: str): ...", "return type"),
        ("def run(a: str = cog.Input(default=int())) -> str: ...", "neither a literal"),
        ("def run(a: str | int) -> str: ...", "is not T or T | None"),
        ("def run(a: complex) -> str: ...", "complex is not a supported type"),
        (
            "def run(a: str = cog.Input(description='x' 'y')) -> str: ...",
            "one plain string literal",
        ),
        ("def run(a: str = cog.Input(choices=['b'])) -> str: ...", "choices"),
        ("def other() -> str: ...", "there is no run"),
        ("class Out:\n    a: str\ndef run() -> Out: ...", "Out is not a cog.BaseModel"),
    ],
)
def test_what_cog_build_could_not_read_is_refused(tmp_path: Path, body: str, reason: str) -> None:
    with pytest.raises(schema.SchemaError, match=reason):
        schema.document(written(tmp_path, body))


def test_the_concurrency_that_cog_build_would_bake_in(tmp_path: Path) -> None:
    assert schema.find(ROOT, "predict.py:Runner", "run").concurrency >= 64
    assert written(tmp_path, "def run() -> str: ...").concurrency == 1
