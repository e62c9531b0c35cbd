"""The command line: what it prints, where, and its exit codes; doctor; the demo's server."""

from __future__ import annotations

import errno
import inspect
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rotquant.measure.evaluate
import rotquant.pipeline
import rotquant.service.demo
import rotquant.service.doctor
from rotquant import cli
from rotquant.errors import RotQuantError
from rotquant.service.server import Server

VERBS = ("quantize", "eval", "inspect", "compare", "recipes", "doctor", "demo")
QUANTIZE = ["quantize", "model", "-o", "out"]
Capture = pytest.CaptureFixture[str]


def test_every_verb_has_help_with_examples(capsys: Capture) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as left:
            cli.main([verb, "--help"])
        text = capsys.readouterr().out
        assert left.value.code == 0
        assert f"examples:\n  rotquant {verb}" in text
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)


def test_help_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for verb in ([], *([name] for name in VERBS)):
        with pytest.raises(SystemExit):
            cli.main([*verb, "--help"])
        lines = capsys.readouterr().out.splitlines()
        broken = [line for line in lines if len(line) > 80 and not line.lstrip().startswith(("rotquant ", "vllm "))]
        assert broken == [], verb  # a command may be longer: it is there to be copied


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"rotquant {rotquant.__version__}\n"


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = "import sys, rotquant.cli as c; c.parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    done = subprocess.run([sys.executable, "-m", "rotquant", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "first steps" in done.stdout


def test_usage_errors(capsys: Capture) -> None:
    for arguments in ([], ["fly"], ["quantize", "model"], [*QUANTIZE, "--samples", "0"], ["eval", "m"]):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert left.value.code == 2
        assert "error:" in capsys.readouterr().err


def test_defaults_are_those_of_the_python_call() -> None:
    args = vars(cli.parser().parse_args(QUANTIZE))
    for name, parameter in inspect.signature(rotquant.pipeline.quantize).parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            assert (
                list(args[name]) == list(parameter.default) if name == "settings" else args[name] == parameter.default
            )


def test_quantize_passes_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    given: dict[str, Any] = {}

    def quantize(model: str, output: str, **settings: Any) -> Path:
        given.update(settings, model=model, output=output)
        return Path(output)

    monkeypatch.setattr(rotquant.pipeline, "quantize", quantize)
    options = "--recipe rtn --calibration c.txt --samples 3 --seq-len 9 --device cpu --profile portable --tp-max 2"
    more = "--seed 7 --resume --max-memory 1.5 --effort 2 --scheme w4a8kv4 --set kv.bits=16 --set weights.bits=8"
    more += " --target sm_86"
    assert cli.main([*QUANTIZE, *options.split(), *more.split()]) == 0
    assert given == {
        "model": "model", "output": "out", "recipe": "rtn", "calibration": "c.txt", "samples": 3, "seq_len": 9,
        "device": "cpu", "profile": "portable", "tp_max": 2, "seed": 7, "resume": True, "max_memory": 1.5,
        "settings": ["kv.bits=16", "weights.bits=8", "choose.effort=2.0"], "scheme": "w4a8kv4", "budget": None,
        "target": "sm_86",
    }  # fmt: skip
    assert "vllm serve out --quantization rotquant" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RotQuantError("config.json: bad"), 2, "rotquant: error: config.json: bad"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 2, "rotquant: error: the disk is full (out/x); "),
        (RuntimeError("I/O: No space left on device (os error 28)"), 2, "rotquant: error: the disk is full; "),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "rotquant: error: [Errno 13] Permission"),
        (KeyError("x"), 1, "rotquant: error: KeyError: 'x' (this is a bug"),
        (
            KeyboardInterrupt(),
            130,
            "rotquant: interrupted: go on where it stopped with: rotquant quantize model -o out",
        ),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, BaseException) else None,
)
def test_errors_are_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(*arguments: Any, **settings: Any) -> Path:
        raise error

    monkeypatch.setattr(rotquant.pipeline, "quantize", fail)
    assert cli.main(QUANTIZE) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(line)
    assert shown.err.count("\n") == 1
    if code == 130:
        assert shown.err.rstrip().endswith(" --resume")
    assert cli.main([*QUANTIZE, "--resume", "--debug"]) == code
    shown = capsys.readouterr()
    assert "Traceback" in shown.err
    assert shown.err.splitlines()[-1].count("--resume") == (1 if code == 130 else 0)


def test_recipes_are_listed(capsys: Capture) -> None:
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in listed} >= {"rtn", "quarot"}


def test_eval_prints_one_json_object(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    score = rotquant.measure.evaluate.Score("m", "torch", 2.0, 0.69, 30, 2, 16, 0.1)
    monkeypatch.setattr(rotquant.measure.evaluate, "evaluate", lambda *arguments, **settings: score)
    assert cli.main(["eval", "m", "--text", "t.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == score.as_dict()
    assert cli.main(["eval", "m", "--text", "t.txt"]) == 0
    assert "perplexity 2.0000" in capsys.readouterr().out


# ---- doctor -----------------------------------------------------------------------------------------


def test_doctor_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    healthy = rotquant.service.doctor.examine()
    assert not any("`import rotquant" in p.what for p in healthy.problems)
    assert healthy.facts["scheme that pays"]["cpu"].startswith("w4a8kv4")
    assert healthy.facts["kernels"].keys() >= {"int_linear (cpu)", "kv4_attention (cpu)"}
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    broken = rotquant.service.doctor.examine()
    found = {p.what for p in broken.problems} - {p.what for p in healthy.problems}
    assert any("C++ compiler" in what for what in found)
    assert rotquant.service.doctor.version_of("vllm") is None or any("VLLM_PLUGINS" in what for what in found)

    monkeypatch.setattr(rotquant.service.doctor, "examine", lambda: broken)
    assert cli.main(["doctor", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == len(broken.problems)
    broken.problems.clear()
    assert cli.main(["doctor"]) == 0
    assert "everything is in order" in capsys.readouterr().out


# ---- the demo's server ------------------------------------------------------------------------------

STUB = """
import http.server, json, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN if {stubborn} else signal.SIG_DFL)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("(Worker pid=1) INFO 11-22 18:13:12 [proof.py:1] rotquant start-up check, rank 0")
print("(Worker pid=1) INFO 11-22 18:13:12 [proof.py:1]   qkv_proj W4")
print("(Worker pid=1) INFO 11-22 18:13:12 [x.py:1] child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200); self.end_headers()
        for event in ({{"choices": [{{"text": body["prompt"]}}]}}, {{"choices": [{{"delta": {{"content": "!"}}}}]}},
                      {{"choices": [], "usage": {{"completion_tokens": 2}}}}):
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
        self.wfile.write(b"data: [DONE]\\n\\n")
    def log_message(self, *arguments): pass
http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""


def stub_server(tmp_path: Path, stubborn: bool = False, code: str = STUB) -> Server:
    server = Server(tmp_path, 0, tmp_path / "server.log")
    program = code.format(port=server.port, stubborn=stubborn) if code == STUB else code
    server.command = lambda: [sys.executable, "-c", program]  # type: ignore[method-assign]
    return server


def gone(pid: int) -> bool:
    """True when no such process runs; a zombie nobody has waited for counts as gone."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("stubborn", [False, True])
def test_server_answers_and_leaves_no_process(
    stubborn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("rotquant.service.server.STOP_SECONDS", 1)
    pieces: list[str] = []

    def talk() -> None:
        with stub_server(tmp_path, stubborn) as server:
            server.wait()
            answer = server.ask("/v1/completions", {"prompt": "hello"}, pieces.append)
            assert (answer.text, answer.tokens) == ("hello!", 2)
            assert pieces == ["hello", "!"]
            assert server.proof() == ["rotquant start-up check, rank 0", "  qkv_proj W4"]
            raise RuntimeError(str(server.process.pid))

    with pytest.raises(RuntimeError) as left:
        talk()
    child = int((tmp_path / "server.log").read_text().split()[-1])
    assert gone(int(str(left.value)))
    assert gone(child)


def test_server_that_dies_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(RotQuantError, match=r"exit code 3(?s:.*)out of luck"):
        die(stub_server(tmp_path, code="print('out of luck'); raise SystemExit(3)"))


def die(server: Server) -> None:
    with server:
        server.wait()


def test_demo_work_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def quantize(model: str, output: Path, **settings: Any) -> Path:
        calls.append(settings["recipe"])
        output.mkdir()
        return output

    def evaluate(model: str, *arguments: Any, **settings: Any) -> rotquant.measure.evaluate.Score:
        calls.append(f"eval {Path(model).name}")
        return rotquant.measure.evaluate.Score(model, "torch", 10.0 + len(calls), 2.3, 30, 2, 16, 0.1)

    harden: Callable[..., None] = lambda source, target: target.mkdir()  # noqa: E731
    monkeypatch.setattr("rotquant.models.harden.harden_folder", harden)
    monkeypatch.setattr(rotquant.pipeline, "quantize", quantize)
    monkeypatch.setattr(rotquant.measure.evaluate, "evaluate", evaluate)
    toy = rotquant.service.demo.TOY
    for _ in range(2):
        scores = rotquant.service.demo.perplexities(tmp_path, toy, toy.make(tmp_path))
    assert sorted(calls) == ["best", "eval best", "eval hardened", "eval quarot", "eval rtn", "quarot", "rtn"]
    text = rotquant.service.demo.table(scores, toy)
    assert "full precision" in text
    assert "1.00x" in text


def test_demo_takes_the_toy_where_the_model_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(cache: Path) -> Path:
        raise RotQuantError("SmolLM2-135M-Instruct: pip cannot download it: no network")

    harden: Callable[..., None] = lambda source, target: target.mkdir()  # noqa: E731
    monkeypatch.setattr("rotquant.models.harden.harden_folder", harden)
    monkeypatch.setattr(rotquant.service.demo, "smollm2", refused)
    subject, folder = rotquant.service.demo.subject_of(tmp_path, offline=False)
    assert (subject, folder.name) == (rotquant.service.demo.TOY, "hardened")
    assert "no network" in capsys.readouterr().err
    monkeypatch.setattr(rotquant.service.demo, "smollm2", lambda cache: tmp_path)
    assert rotquant.service.demo.subject_of(tmp_path, offline=False) == (rotquant.service.demo.SMOLLM2, tmp_path)
    assert rotquant.service.demo.subject_of(tmp_path, offline=True)[0] is rotquant.service.demo.TOY
