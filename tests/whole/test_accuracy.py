"""What rotations are for: rounding breaks a model with outliers, Hadamards mend it, `best` mends it further."""

from __future__ import annotations

from rotquant.measure.compare_run import Distance, measure
from rotquant.measure.evaluate import load_any, safe_exp, text_windows
from rotquant.pipeline import quantize
from source_models import HELDOUT, SMALL


def test_rtn_collapses_and_rotations_recover(demo, tmp_path):
    full, batch = load_any(demo.hard), text_windows(HELDOUT, demo.hard, 512, 6000)
    made = quantize(str(demo.hard), tmp_path / "best", recipe="best", settings=["choose.effort=0.5"], **SMALL)
    rtn, quarot, best = (measure(full, load_any(folder), batch) for folder in (demo.rtn, demo.quarot, made))
    for name, one in (("rtn", rtn), ("quarot", quarot), ("best", best)):
        print(f"{name}: perplexity {ratio(one):.3f} times the original's, KL {one.kl:.4f}")
    assert ratio(rtn) >= 5
    assert ratio(quarot) <= 1.25
    assert ratio(best) <= 1.05
    assert best.kl <= 0.85 * quarot.kl


def ratio(found: Distance) -> float:
    return safe_exp(found.nll - found.full_nll)
