"""A sample of `fuzz_inputs`: no wrong input of a folder ends in anything but a right run or one clear line."""

import random

import pytest

import fuzz_inputs

SAMPLE = {"config": 40, "tokenizer": 8, "generation": 6, "index": 8, "header": 20}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    fuzz_inputs.prepare(folder)
    return folder


@pytest.mark.parametrize("name", fuzz_inputs.NAMES)
def test_the_good_folders_are_right(root, name):
    case = fuzz_inputs.Case("", name, "nothing", "", "", lambda folder: None)
    assert fuzz_inputs.outcome(case, root, "quantize") == "right"
    assert fuzz_inputs.outcome(case, root, "eval") == "right"


@pytest.mark.parametrize("part", SAMPLE)
def test_wrong_inputs(root, part):
    cases = random.Random(14).sample(list(fuzz_inputs.PARTS[part]()), SAMPLE[part])
    found = {case.what: fuzz_inputs.outcome(case, root, "quantize") for case in cases}
    found |= {case.what: fuzz_inputs.outcome(case, root, "eval") for case in cases[::4]}
    assert not [(what, line) for what, line in found.items() if line.startswith("ELSE")]
    assert any(line != "right" for line in found.values())
