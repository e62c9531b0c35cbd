"""What vLLM's sources say about the classes and functions that the plugin uses: names, signatures, fields.

Facts are read from the sources without importing them, so that the plugin can be held against a vLLM that is not
installed, or whose extensions do not load here. `tools/record_vllm_api.py` keeps them in `tests/data/vllm_api`, one
file for each supported version; `test_vllm_api` compares.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

RECORDS = Path(__file__).resolve().parents[1] / "data" / "vllm_api"


class Name(NamedTuple):
    """A name of a module, such as ("vllm.v1.attention.backend", "AttentionImpl")."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


@dataclass
class Facts:
    """The facts of one version; "module:name" stands for a definition."""

    places: dict[str, str] = field(default_factory=dict)  # name that the plugin asks for: where it is defined
    absent: list[str] = field(default_factory=list)  # names that are nowhere
    functions: dict[str, str] = field(default_factory=dict)  # their signatures
    classes: dict[str, dict[str, Any]] = field(default_factory=dict)  # see `class_facts`


class Sources:
    """The modules of one vLLM as syntax trees; those of other packages are left out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = cache(self._tree)

    def _tree(self, module: str) -> ast.Module | None:
        path = self.root.joinpath(*module.split("."))
        if not module.startswith("vllm."):
            return None
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return ast.parse(file.read_text())
        return None

    def definition(self, wanted: Name) -> tuple[Name, ast.stmt] | None:
        """Where a name is defined, through any number of imports, and the statement; None where it is not."""
        tree = self.tree(wanted.module)
        for node in statements(tree.body if tree else ()):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == wanted.name:
                return wanted, node
            if isinstance(node, ast.Assign | ast.AnnAssign) and wanted.name in assigned(node):
                return wanted, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) in (wanted.name, "*"):
                        found = self.definition(
                            Name(self._imported(wanted.module, node), alias.name.replace("*", wanted.name))
                        )
                        if found or alias.name != "*":
                            return found
        return None

    def _imported(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = module.split(".")
        if not self.root.joinpath(*package).is_dir():
            package = package[:-1]
        return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, also those under an `if` or `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from statements(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def extract(root: Path, names: Iterable[Name]) -> Facts:
    """The facts about `names`, and about the classes that they derive from.

    Args:
        root: the folder that holds `vllm`, such as site-packages.
    """
    sources, facts = Sources(root), Facts()
    for name in sorted(set(names)):
        place = record(sources, facts, name)
        if place is None:
            facts.absent.append(str(name))
        else:
            facts.places[str(name)] = place
    return facts


def record(sources: Sources, facts: Facts, name: Name) -> str | None:
    """Adds one definition to the facts; returns its place."""
    defined = sources.definition(name)
    if defined is None:
        return None
    (module, _), node = place, node = defined
    if isinstance(node, ast.FunctionDef):
        facts.functions[str(place)] = signature(node)
    elif isinstance(node, ast.ClassDef) and str(place) not in facts.classes:
        facts.classes[str(place)] = described = class_facts(node)
        tree = sources.tree(module)
        described["attributes"] = sorted({*described["attributes"], *(set_on_layers(tree) if tree else ())})
        bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
        found = [record(sources, facts, Name(module, base.id)) for base in bases if isinstance(base, ast.Name)]
        described["bases"] = [base for base in found if base is not None]
    return str(place)


def class_facts(node: ast.ClassDef) -> dict[str, Any]:
    """Methods with their signatures, fields of the class, attributes that methods set, what `forward` reads of self."""
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    fields = [name for item in node.body if isinstance(item, ast.Assign | ast.AnnAssign) for name in assigned(item)]
    of_self = [
        (item.lineno, item.col_offset, item.attr, isinstance(item.ctx, ast.Store), method.name)
        for method in methods
        for item in ast.walk(method)
        if isinstance(item, ast.Attribute) and isinstance(item.value, ast.Name) and item.value.id == "self"
    ]
    facts = {
        "bases": [],
        "methods": {method.name: signature(method) for method in methods},
        "fields": sorted(set(fields)),
        "attributes": sorted({name for _, _, name, stored, _ in of_self if stored}),
    }
    reads = [name for *_, name, stored, method in sorted(of_self) if method == "forward" and not stored]
    return facts | ({"forward_reads": list(dict.fromkeys(reads))} if reads else {})


def set_on_layers(tree: ast.Module) -> Iterator[str]:
    """Attributes that functions of a module set on their argument `layer`, such as `layer.quant_method`."""
    for function in tree.body:
        for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and isinstance(node.value, ast.Name) and node.value.id == "layer":
                yield node.attr


KINDS = {"staticmethod": "static", "classmethod": "class", "property": "property", "abstractmethod": "abstract"}


def signature(node: ast.FunctionDef) -> str:
    """Kinds and parameters without types; a default is "...": `class abstract (cls, size, more=...)`."""
    decorators = [d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "") for d in node.decorator_list]
    arguments = ast.parse(ast.unparse(node.args).join(("def f(", "): ..."))).body[0]
    assert isinstance(arguments, ast.FunctionDef)
    for item in ast.walk(arguments.args):
        if isinstance(item, ast.arg):
            item.annotation = None
    arguments.args.defaults = [ast.Constant(...) for _ in arguments.args.defaults]
    arguments.args.kw_defaults = [default and ast.Constant(...) for default in arguments.args.kw_defaults]
    kinds = [KINDS[name] for name in decorators if name in KINDS]
    return " ".join([*kinds, f"({ast.unparse(arguments.args)})"])


def as_json(facts: Facts) -> str:
    """One definition a line, for short differences between versions."""
    sections = []
    for section, content in asdict(facts).items():
        rows = [f'  "{name}": {json.dumps(row)}' for name, row in content.items()] if isinstance(content, dict) else []
        body = "{\n" + ",\n".join(rows) + "\n }" if isinstance(content, dict) else json.dumps(content)
        sections.append(f' "{section}": {body}')
    return "{\n" + ",\n".join(sections) + "\n}\n"


def recorded(version: str) -> Facts:
    return Facts(**json.loads((RECORDS / f"{version}.json").read_text()))


def lineage(facts: Facts, place: str) -> list[str]:
    """A class and its recorded bases, as Python orders them."""
    order = [place]
    for base in facts.classes[place]["bases"]:
        order += lineage(facts, base) if base in facts.classes else []
    return [name for i, name in enumerate(order) if name not in order[i + 1 :]]


def method(facts: Facts, place: str, name: str) -> str | None:
    """The signature of the method that a class has or inherits, None without one."""
    found = (facts.classes[owner]["methods"].get(name) for owner in lineage(facts, place))
    return next((found for found in found if found), None)


def has(facts: Facts, place: str, name: str) -> bool:
    """Whether objects of a class have an attribute, as far as its sources say."""
    parts = (facts.classes[owner] for owner in lineage(facts, place))
    return any(name in part[kind] for part in parts for kind in ("methods", "fields", "attributes"))


def parameters(text: str) -> ast.arguments:
    """The parameters of a recorded signature."""
    function = ast.parse(f"def f{text[text.index('(') :]}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


def accepts(signatures: Iterable[str], positional: int, keywords: Iterable[str], bound: bool) -> bool:
    """Whether a call fits; a `**kwargs` hands the rest on to the next of `signatures`, as constructors do.

    Args:
        bound: the first parameter is self or cls, which no call names.
    """
    rest = set(keywords)
    for text in signatures:
        given = parameters(text)
        names = [item.arg for item in (*given.posonlyargs, *given.args)][bound:]
        if positional > len(names):
            return given.vararg is not None
        required = names[positional : len(names) - len(given.defaults)]
        required += [item.arg for item, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if not default]
        taken = rest & {*names[positional:], *(item.arg for item in given.kwonlyargs)}
        if set(required) - taken:
            return False
        rest, positional = rest - taken, 0
        if given.kwarg is None:
            break
    return not rest
