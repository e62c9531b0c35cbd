"""What rotations are for: on a model with outliers, rounding collapses and a rotated model does not."""

from rotquant.evaluate import evaluate
from source_models import HELDOUT


def perplexity(folder):
    return evaluate(str(folder), HELDOUT, tokens=6000, seq_len=512).perplexity


def test_rtn_collapses_and_quarot_recovers(demo):
    full, rtn, quarot = (perplexity(folder) for folder in (demo.hard, demo.rtn, demo.quarot))
    print(f"full precision {full:.3f}, rtn {rtn:.3f} ({rtn / full:.2f}x), quarot {quarot:.3f} ({quarot / full:.3f}x)")
    assert rtn >= 5 * full
    assert quarot <= 1.25 * full
