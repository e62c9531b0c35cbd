"""Calibration samples over devices. Two workers on the CPU stand for two GPUs."""

import threading
import time

import pytest
import torch

from rotquant.common.devices import Devices
from rotquant.errors import RotQuantError

STORE = torch.arange(15.0).view(5, 3)


@pytest.mark.parametrize("names", ["cpu", "cpu,cpu", "cpu, cpu,cpu,cpu,cpu,cpu,cpu"])
def test_every_sample_once_and_in_its_place(names):
    devices = Devices(names)
    seen = []

    def work(worker, i, x, y):
        seen.append(i)
        assert not torch.is_grad_enabled()
        assert torch.equal(x, STORE[i])
        return x + y * 10

    with torch.no_grad():
        out = devices.map(work, STORE, STORE * 2, out=torch.empty_like(STORE))
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert torch.equal(out, STORE * 21)


def test_a_store_may_be_moved_in_place():
    store = STORE.clone()
    Devices("cpu,cpu").map(lambda worker, i, x: x + 1, store, out=store)
    assert torch.equal(store, STORE + 1)


def test_shares_are_contiguous_in_order_and_side_by_side():
    both = threading.Barrier(2, timeout=60)  # passed only where two threads meet

    def work(worker, share):
        both.wait()
        return [i for i, _ in share]

    assert Devices("cpu,cpu").each(work, STORE) == [[0, 1], [2, 3, 4]]


def test_a_failure_is_the_first_devices_own_and_stops_the_others():
    done = []
    failed = threading.Event()

    def work(worker, share):
        for i, _ in share:
            if worker == 1:
                failed.set()
                raise ValueError("broken sample")
            failed.wait(60)
            time.sleep(0.01)  # the other thread's turn
            done.append(i)

    with pytest.raises(ValueError, match="broken sample"):
        Devices("cpu,cpu").each(work, torch.zeros(1000, 1))
    assert len(done) < 500


@pytest.mark.parametrize("names", ["warp", "cuda:99", "cpu,", "cpu,cuda:77"])
def test_a_device_that_is_not_there_is_refused(names):
    with pytest.raises(RotQuantError, match=r"^--device .* cannot be used here"):
        Devices(names)
