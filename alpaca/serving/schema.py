"""Writes the `.cog/openapi_schema.json` of `cog build` without the cog program.

Cog's server validates inputs, answers `/openapi.json` and streams only if it finds that file
(format: the cog repository, architecture/02-schema.md and pkg/schema/openapi_spec.go). Like
`cog build`, this module parses the source without importing it. So it also refuses what cannot be
read statically, and says why, before an image build fails on it.
"""

import ast
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alpaca import atomic
from alpaca.serving import envelope

PATH = Path(".cog/openapi_schema.json")
PRIMITIVES: dict[str, dict[str, Any]] = {
    "bool": {"type": "boolean"},
    "float": {"type": "number"},
    "int": {"type": "integer"},
    "str": {"type": "string"},
    "Path": {"type": "string", "format": "uri"},
    "Secret": {
        "type": "string", "format": "password", "writeOnly": True, "x-cog-secret": True,
    },
}  # fmt: skip
# keyword of Input(): its name in a JSON schema
CONSTRAINTS = {
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "regex": "pattern",
    "deprecated": "deprecated",
}
ITERATORS = ("Iterator", "AsyncIterator")


class SchemaError(ValueError):
    """`cog build` cannot read the signature; the message names file, line and reason."""


@dataclass(frozen=True)
class Entry:
    """The `run()` or `train()` function: the schema is made from its signature and decorators."""

    source: "RunnerSource"
    function: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def streams(self) -> bool:
        """Whether it is marked `@cog.streaming`, so that Cog answers with server-sent events."""
        return any(_last_name(mark) == "streaming" for mark in self.function.decorator_list)

    @property
    def concurrency(self) -> int:
        """The `max` of `@cog.concurrent(max=...)`, which `cog build` stores in the image."""
        for mark in self.function.decorator_list:
            if isinstance(mark, ast.Call) and _last_name(mark) == "concurrent":
                return int(ast.literal_eval(mark.keywords[0].value))
        return 1

    def input_schema(self) -> dict[str, Any]:
        """JSON schema of the inputs: one property per parameter, in the order of the signature."""
        arguments = self.function.args
        parameters = [arg for arg in arguments.args if arg.arg != "self"]
        missing = len(parameters) - len(arguments.defaults)
        defaults: list[ast.expr | None] = [*[None] * missing, *arguments.defaults]
        schema: dict[str, Any] = {"type": "object", "properties": {}}
        for order, (parameter, default) in enumerate(zip(parameters, defaults, strict=True)):
            field, required = self.source.field(parameter, default)
            schema["properties"][parameter.arg] = {"x-order": order, **field}
            if required:
                schema.setdefault("required", []).append(parameter.arg)
        return schema

    def output_schema(self) -> dict[str, Any]:
        """JSON schema of the return value."""
        if self.function.returns is None:
            raise self.source.error(self.function, "the return type is not annotated")
        return {**self.source.output(self.function.returns), "title": "Output"}


class RunnerSource:
    """One parsed Python file."""

    def __init__(self, path: Path) -> None:
        """Parse `path`; raises OSError or SyntaxError."""
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.constants = {
            node.targets[0].id: node.value
            for node in self.tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }

    def entry(self, name: str, method: str) -> Entry:
        """Find `method` of class `name`, or function `name`."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                for child in node.body:
                    if isinstance(child, FUNCTIONS) and child.name == method:
                        return Entry(self, child)
            if isinstance(node, FUNCTIONS) and node.name == name:
                return Entry(self, node)
        raise SchemaError(f"{self.path}: there is no {name} with a {method}()")

    def error(self, node: ast.AST, reason: str) -> SchemaError:
        """A SchemaError with the file and line of `node`."""
        return SchemaError(f"{self.path}:{getattr(node, 'lineno', '?')}: {reason}")

    def field(self, parameter: ast.arg, default: ast.expr | None) -> tuple[dict[str, Any], bool]:
        """One input's schema, and whether a request must name it."""
        if parameter.annotation is None:
            raise self.error(parameter, f"{parameter.arg} is not annotated")
        schema, optional = self.input_type(parameter.annotation)
        schema["title"] = _title(parameter.arg)
        keywords = self.input_call(default)
        has_default = "default" in keywords and (optional or keywords["default"] is not None)
        if has_default:
            schema["default"] = keywords["default"]
        if optional:
            schema["nullable"] = True
        if "description" in keywords:
            schema["description"] = keywords["description"]
        for keyword, key in CONSTRAINTS.items():
            if keywords.get(keyword) is not None:
                schema[key] = keywords[keyword]
        return schema, not has_default and not optional

    def input_call(self, default: ast.expr | None) -> dict[str, Any]:
        """The keywords of `Input(...)` and their values; a plain default counts as `default`."""
        if default is None:
            return {}
        if not isinstance(default, ast.Call) or _last_name(default) != "Input":
            return {"default": self.literal(default)}
        unknown = {str(k.arg) for k in default.keywords} - {"default", "description", *CONSTRAINTS}
        if unknown or default.args:
            raise self.error(default, f"Input() with {sorted(unknown) or 'positional arguments'}")
        return {str(k.arg): self.literal(k.value) for k in default.keywords}

    def literal(self, node: ast.expr) -> Any:
        """The value of a literal or of a module constant, as Go prints it in JSON."""
        if isinstance(node, ast.Name) and node.id in self.constants:
            node = self.constants[node.id]
        try:
            value = ast.literal_eval(node)
        except ValueError:
            raise self.error(node, "is neither a literal nor a constant of this module") from None
        segment = ast.get_source_segment(self.text, node) or ""
        if isinstance(value, str) and segment[1:-1] != value:
            raise self.error(node, "cog build reads only one plain string literal here")
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def input_type(self, node: ast.expr) -> tuple[dict[str, Any], bool]:
        """The schema of an annotation, and whether it allows None."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            if ast.unparse(node.right) != "None":
                raise self.error(node, f"{ast.unparse(node)} is not T or T | None")
            return self.input_type(node.left)[0], True
        if isinstance(node, ast.Subscript) and _last_name(node.value) == "list":
            return {"type": "array", "items": self.input_type(node.slice)[0]}, False
        return dict(self.primitive(node)), False

    def primitive(self, node: ast.expr) -> dict[str, Any]:
        """The schema of a simple type; only the last part of a dotted name counts."""
        name = _last_name(node)
        if name not in PRIMITIVES:
            raise self.error(node, f"{ast.unparse(node)} is not a supported type")
        return PRIMITIVES[name]

    def output(self, node: ast.expr) -> dict[str, Any]:
        """The schema of a return annotation."""
        if isinstance(node, ast.Subscript):
            items = {"type": "array", "items": self.output(node.slice)}
            if _last_name(node.value) in ITERATORS:
                return {**items, "x-cog-array-type": "iterator"}
            if _last_name(node.value) == "list":
                return items
        for model in self.tree.body:
            if isinstance(model, ast.ClassDef) and model.name == _last_name(node):
                if "BaseModel" not in map(_last_name, model.bases):
                    raise self.error(model, f"{model.name} is not a cog.BaseModel")
                return self.model(model)
        return dict(self.primitive(node))

    def model(self, node: ast.ClassDef) -> dict[str, Any]:
        """The schema of a cog.BaseModel of this file."""
        properties, required = {}, []
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                schema, optional = self.input_type(field.annotation)
                nullable = {"nullable": True} if optional else {}
                name = field.target.id
                properties[name] = {**schema, "title": _title(name), **nullable}
                if field.value is None and not optional:
                    required.append(name)
        schema = {"type": "object", "properties": properties}
        return {**schema, "required": required} if required else schema


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _last_name(node: ast.expr) -> str:
    """`Path` of `cog.Path`, `Input` of `Input(...)`."""
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _title(name: str) -> str:
    """`top_p` -> `Top P`."""
    return " ".join(part[:1].upper() + part[1:] for part in name.split("_"))


def find(root: Path, reference: str, method: str) -> Entry:
    """The entry behind `predict.py:Runner` or `train.py:train`, as cog.yaml names them."""
    file, _, name = reference.partition(":")
    return RunnerSource(root / file).entry(name, method)


def document(run: Entry, train: Entry | None = None) -> dict[str, Any]:
    """The whole OpenAPI 3.0.2 document."""
    paths = envelope.paths(envelope.RUN, streams=run.streams)
    schemas = envelope.components(envelope.RUN, run.input_schema(), run.output_schema())
    if train is not None:
        inputs, output = train.input_schema(), train.output_schema()
        paths = {**envelope.paths(envelope.TRAIN), **paths}
        schemas = {**envelope.components(envelope.TRAIN, inputs, output), **schemas}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": version("cog")},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def write(root: Path, run: Entry, train: Entry | None = None) -> Path:
    """Write the document below `root`, where Cog's server looks for it; returns its path."""
    text = json.dumps(document(run, train), indent=2, sort_keys=True, ensure_ascii=False)
    atomic.write_text(root / PATH, text)
    return root / PATH
