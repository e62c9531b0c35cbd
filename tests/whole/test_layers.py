"""The order of the house: who may import whom. What stands lower knows nothing of what stands on it."""

from __future__ import annotations

from collections.abc import Mapping

from imports import arrows, circles, imports, sources

# From the ground up. A module belongs to the longest name that it begins with, and imports from its own line or lower
# ones. A new module of a wing needs no line; a new wing does, or it counts as the top of its package.
FLOORS = """
rotquant_kernels
rotquant.errors
rotquant.common
rotquant.data
rotquant.text
rotquant.learn.options          rotquant.choose.options
rotquant.recipe
rotquant.recipes
rotquant.transforms
rotquant.models
rotquant.transforms.fold
rotquant.checkpoint
rotquant.transforms.gains
rotquant.weights
rotquant.basis
rotquant.gate
rotquant.resources
rotquant.fitting
rotquant.learn
rotquant.choose
rotquant.run
rotquant.choose.tuning
rotquant.pipeline
rotquant.measure
rotquant.service
rotquant.cli
rotquant
vllm_rotquant.versions        vllm_rotquant.origin   vllm_rotquant.settings   vllm_rotquant.refusal
vllm_rotquant.features
vllm_rotquant.compat
vllm_rotquant.environment     vllm_rotquant.names    vllm_rotquant.holders    vllm_rotquant.intake
vllm_rotquant.rotation        vllm_rotquant.low_rank vllm_rotquant.adapters   vllm_rotquant.boundary
vllm_rotquant.windows         vllm_rotquant.steps    vllm_rotquant.recurrent vllm_rotquant.large_pages
vllm_rotquant.pages           vllm_rotquant.key_feedback
vllm_rotquant.warmup          vllm_rotquant.witness  vllm_rotquant.reading    vllm_rotquant.agreement
vllm_rotquant.fusion          vllm_rotquant.collector vllm_rotquant.positions
vllm_rotquant.window_proof
vllm_rotquant.linear          vllm_rotquant.kv_cache vllm_rotquant.experts
vllm_rotquant.proof           vllm_rotquant.reload
vllm_rotquant.experts_proof
vllm_rotquant.startup
vllm_rotquant.config
vllm_rotquant
benchmarks
"""
FLOOR = {name: floor for floor, line in enumerate(FLOORS.split("\n")) for name in line.split()}

# vLLM belongs to those who serve or measure with it.
MAY_IMPORT_VLLM = ("vllm_rotquant", "benchmarks", "rotquant.measure.evaluate", "rotquant.service.doctor")
# What vLLM documents for plugins; all other names may move in any release, so that they stand in `compat` alone.
PROMISED = (
    "vllm",
    "vllm.logger",
    "vllm.model_executor.layers.quantization",
    "vllm.model_executor.layers.quantization.base_config",
)


def floor_of(module: str) -> int:
    parts = module.split(".")
    names = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
    return FLOOR[next(name for name in names if name in FLOOR)]


def upward(graph: Mapping[str, set[str]]) -> list[str]:
    steps = ((module, target) for module, targets in graph.items() for target in targets)
    return sorted(f"{module} imports {target}" for module, target in steps if floor_of(target) > floor_of(module))


def vllm_where_it_should_not_be(modules: Mapping[str, str]) -> list[str]:
    found = []
    for module, source in modules.items():
        for name, _, line in imports(source, module):
            if name.split(".")[0] != "vllm":
                continue
            allowed = module.startswith(MAY_IMPORT_VLLM)
            private = module.startswith("vllm_rotquant.") and not module.startswith("vllm_rotquant.compat.")
            if not allowed or (private and name not in PROMISED):
                found.append(f"{module}:{line} imports {name}")
    return found


def test_nothing_imports_upward() -> None:
    assert upward(arrows(sources())) == []


def test_no_module_needs_itself() -> None:
    assert circles(arrows(sources())) == []


def test_vllm_stays_where_it_belongs() -> None:
    assert vllm_where_it_should_not_be(sources()) == []


def test_every_line_of_the_floors_has_modules() -> None:
    modules = sources()
    assert [name for name in FLOOR if not any(f"{one}.".startswith(f"{name}.") for one in modules)] == []


def test_what_is_wrong_is_seen() -> None:
    """At the top of a module, inside a function, for type checkers alone, by a relative name, beside a script."""
    modules = {
        "rotquant.errors": "if TYPE_CHECKING:\n    from rotquant.common.signals import Signals",
        "rotquant.common.signals": "def f():\n    import rotquant.learn.plan",
        "rotquant.learn.plan": "from . import steps\nfrom vllm import LLM",
        "rotquant.learn.steps": "from .plan import learn",
        "rotquant.learn.__init__": "",
        "rotquant.service.doctor": "import vllm_rotquant\nfrom vllm.platforms import current_platform",
        "vllm_rotquant.__init__": "from vllm.logger import init_logger",
        "vllm_rotquant.linear": "from vllm.model_executor.layers.linear import LinearBase",
        "vllm_rotquant.compat.__init__": "from vllm.model_executor.layers.linear import LinearBase",
        "benchmarks.lanes": "import peers",
        "benchmarks.peers": "from lanes import Lane",
    }
    graph = arrows(modules)
    assert upward(graph) == [
        "rotquant.common.signals imports rotquant.learn.plan",
        "rotquant.errors imports rotquant.common.signals",
        "rotquant.service.doctor imports vllm_rotquant.__init__",
    ]
    assert circles(graph) == [
        ["benchmarks.lanes", "benchmarks.peers"],
        ["rotquant.learn.plan", "rotquant.learn.steps"],
    ]
    assert vllm_where_it_should_not_be(modules) == [
        "rotquant.learn.plan:2 imports vllm",
        "vllm_rotquant.linear:1 imports vllm.model_executor.layers.linear",
    ]
