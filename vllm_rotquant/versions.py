"""Which vLLM the plugin runs in, and which rotquant this is. Imports nothing but what Python has."""

from __future__ import annotations

# From, up to and not including; `run.py` and `rotquant doctor` read it here. A version belongs in it when
# tests/plugin/test_vllm_api.py holds the plugin against its record (tools/record_vllm_api.py) and the plugin's tests
# pass in it: in its build for CPUs, or in its Python sources on the extensions of an older one (tools/graft_vllm.py).
# A patch release is taken to be like its release.
SUPPORTED_VLLM = ((0, 28), (0, 34))


def unsupported_vllm() -> str | None:
    """Why this vLLM is not supported, None where it is."""
    import vllm
    from packaging.version import Version

    low, high = SUPPORTED_VLLM
    if low <= Version(vllm.__version__).release[:2] < high:
        return None
    return (
        f"rotquant {version()} runs in vLLM {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}, this is vLLM "
        f"{vllm.__version__}: install a vLLM of that range, or another rotquant"
    )


def vllm_requirement() -> str:
    """The supported versions as pip wants them."""
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED_VLLM)
    return f"vllm>={low},<{high}"


def version() -> str:
    """Version of the installed rotquant."""
    from importlib.metadata import version as installed

    return installed("rotquant")
