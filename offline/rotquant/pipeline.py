"""The main path, top to bottom: a Hugging Face checkpoint becomes a served 4-bit checkpoint.

    check the source  ->  calibration tokens  ->  choose among the recipe's candidates
      ->  learn the transforms  ->  equivalence gate  ->  sites at 8 bits  ->  embeddings
      ->  each decoder layer: read, fold, quantize, write, note in the journal  ->  lm_head  ->  config, card

One layer is in memory at a time; what a layer needs of the ones before it is the calibration chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rotquant.basis.sidecar import Basis
from rotquant.checkpoint import writer
from rotquant.checkpoint.card import write_card
from rotquant.checkpoint.companions import copy_companions
from rotquant.checkpoint.journal import Journal, Slot
from rotquant.checkpoint.layers import read_gain, read_layer
from rotquant.checkpoint.packed import joined, pack
from rotquant.checkpoint.source import Source
from rotquant.checkpoint.spool import Spool
from rotquant.choose.choice import Choice
from rotquant.choose.kl_budget import affordable
from rotquant.choose.search import Search, learned
from rotquant.choose.tuning import aside, judged, too_large
from rotquant.common.faults import is_disk_full
from rotquant.common.progress import Progress, say
from rotquant.errors import RotQuantError
from rotquant.gate import check_equivalence
from rotquant.learn.initial import generator
from rotquant.learn.plan import learn
from rotquant.learn.tune import NORM, layer_of, tune
from rotquant.learn.tuned_layer import with_gains
from rotquant.models import Tensors
from rotquant.models.decoder import decoders
from rotquant.recipes.schemes import scheme_settings, target_settings
from rotquant.resources import check_disk, check_memory
from rotquant.run import Run, Settings, begin, fingerprint, finished, learner, prepare, provenance, tuner, with_choice
from rotquant.transforms.fold import by_rows
from rotquant.transforms.gains import norm_gains, scale_to
from rotquant.transforms.space import Transforms
from rotquant.weights import rtn
from rotquant.weights.experts import ExpertsQuantizer
from rotquant.weights.precision import DamageMeter, widen

GATE_TOKENS = 64


def quantize(
    model: str,
    output: str | Path,
    *,
    recipe: str = "best",
    calibration: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    device: str = "auto",
    profile: str = "full",
    tp_max: int = 1,
    seed: int = 0,
    resume: bool = False,
    settings: Sequence[str] = (),
    max_memory: float | None = None,
    scheme: str | None = None,
    budget: str | None = None,
    target: str | None = None,
) -> Path:
    """Quantizes a model.

    Args:
        model: local folder or hub id of a model of a known family (`models.registry`) in safetensors.
        output: folder to make.
        recipe: name of a shipped recipe or path of a YAML file; settings: `key=value` changes to it.
        calibration: text for learning and GPTQ: a .txt or .jsonl file, or a Hugging Face dataset; None: bundled text.
        samples, seq_len: calibration windows and their tokens, the recipe's where None.
        device: "auto", "cpu", "cuda", or several, over which the calibration windows are spread: "cuda:0,cuda:1".
        profile: "full", or "portable" (no online transforms, 16-bit KV: loads anywhere).
        tp_max: largest tensor-parallel size that the checkpoint is to be served with.
        seed: of everything random: rotations, calibration windows, learning.
        resume: continue an unfinished run of the same settings; the result has the same bytes.
        max_memory: refuse, before any work, a run that is estimated to need more GB.
        scheme: "w4a4kv4", "w4a8kv4" or "auto" (`recipes.schemes`), the recipe's where None; budget: of "auto".
        target: device to serve on, such as "sm_86", whose kernels' wishes become settings; scheme and settings win.
    Returns:
        the output folder.
    Raises:
        RotQuantError: bad input or a failed gate; one line that says what, where, and what to do.
    """
    output = Path(output)
    settings = [*target_settings(target, scheme), *scheme_settings(scheme, budget), *settings]
    asked = Settings(recipe, settings, calibration, samples, seq_len, device, profile, tp_max, seed)
    run = prepare(model, asked)
    if max_memory is not None:
        for one in run.recipe.possible:
            check_memory(one, run.arch, run.windows, run.dtype, max_memory)
    check_disk(run.recipe, run.arch, run.windows, run.dtype, output)
    digest = run.source.digest()
    if resume and finished(run, output, digest):
        say(f"{output}: already finished")
        return output
    journal = Journal(output, fingerprint(run, digest), resume)
    try:
        with clear_disk_errors(journal.folder):
            run = choose(run, journal, max_memory)
            run = replace(run, transforms=learn_transforms(run, journal))
            pass_gate(run, journal)
            run = replace(run, transforms=widen_sites(run, journal))
            write_embedding(run, journal)
            write_layers(run, journal)
            run = tune_layers(run, journal)
            write_head(run, journal)
            write_companions(run, journal, digest)
            journal.publish()
    except BaseException:
        journal.abandon()
        raise
    return output


def choose(run: Run, journal: Journal, max_memory: float | None) -> Run:
    """The run with those of its recipe's candidates that its model takes; the gate comes before this work, too."""
    options = run.recipe.choose
    if not options or not run.recipe.chooses or run.calibrated is None or run.calibrated.aside is None:
        return run
    if not journal.done("choice"):
        pass_gate(run, journal, "gate of the base")
        found = Search(run.recipe, partial(begin, run), run.calibrated.aside, journal)()
        if options.tuning:
            found = replace(found, tuned=too_large(run, options.tuning, max_memory))
        journal.finish("choice", **found.as_dict())
    return with_choice(run, Choice.from_dict(journal.facts("choice")))


@contextmanager
def clear_disk_errors(folder: Path) -> Iterator[None]:
    """Says in one line that the disk is full, and that the finished layers are kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise RotQuantError(f"{folder}: disk full; free some space and run again with --resume") from error
        raise


def learn_transforms(run: Run, journal: Journal) -> Transforms:
    """The run's transforms, with the values of those that depend on the model."""
    if not run.recipe.needs_learning:
        return run.transforms
    job = learner(run)
    learn(job, learned(journal, run.recipe) if run.choice else journal)
    return job.transforms


def pass_gate(run: Run, journal: Journal, step: str = "gate") -> None:
    """The folded model must equal the original before anything is quantized."""
    if journal.done(step):
        return
    if run.calibrated:
        tokens = run.calibrated.tokens[0, :GATE_TOKENS]
    else:
        tokens = torch.randint(run.arch.vocab_size, (GATE_TOKENS,), generator=generator(run.seed, "gate"))
    with Progress("equivalence gate", run.arch.layers, short=True) as progress:
        distance = check_equivalence(run.source, run.arch, run.fold, tokens, lambda _: progress.step())
    say(f"equivalence gate: logits of the folded model differ by {distance:.1e} (limit 1e-4)")
    journal.finish(step, distance=f"{distance:.0e}")


def widen_sites(run: Run, journal: Journal) -> Transforms:
    """The run's transforms, with 8-bit activations at the sites that need them most, if the recipe has a budget."""
    step, count, recipe, arch = "precision", "sites at 8 bits", run.recipe, run.arch
    if not recipe.activations.mixed:
        return run.transforms
    assert run.calibrated is not None
    known = journal.kept(step)
    if known is None:
        tokens = run.calibrated.tokens
        meter = DamageMeter(recipe, arch, run.source, run.transforms, tokens, run.dtype, run.devices)
        known = {"damage": meter(Slot(journal, step))}
        journal.keep(step, known, [Slot.name(step)])
    damage = known["damage"]
    if recipe.activations.most_kl is None:
        return widen(arch, run.transforms, damage, recipe.activations.wide(len(damage)))
    if not journal.done(count):
        found = affordable(learner(run), run.calibrated.aside, damage, Slot(journal, count))
        journal.keep(count, {"count": torch.tensor(found)}, [Slot.name(count)])
    return widen(arch, run.transforms, damage, int((journal.kept(count) or {})["count"]))


def write_embedding(run: Run, journal: Journal) -> None:
    """The rotated embeddings, and the chain that enters layer 0."""
    if journal.done("embedding"):
        return
    name = run.arch.names.embedding
    weight = by_rows(run.source.get(name), lambda rows: run.fold.embedding(rows).to(run.dtype))
    if run.calibrated and run.recipe.needs_inputs:
        chain = weight[run.calibrated.tokens] * run.arch.embedding_factor(run.dtype)
        journal.save_chain(0, chain, chain[:1].to(torch.float32, copy=True) if run.arch.mixtures else None)
    journal.finish("embedding", run.shard(1), {name: weight})


def write_layers(run: Run, journal: Journal) -> None:
    """Folds, quantizes and writes the decoder layers that are not written yet."""
    arch, fold = run.arch, run.fold
    first = next((i for i in range(arch.layers) if not journal.done(f"layer {i}")), arch.layers)
    if first == arch.layers:
        return
    if first:
        say(f"resuming at layer {first}")
    computed = decoders(arch, run.calibrated.tokens.shape[1] if run.calibrated else 1)
    quantizer = ExpertsQuantizer(run.recipe, run.transforms, computed, run.dtype, run.devices)
    chain, quantizer.exact = journal.load_chain(first) if run.recipe.needs_inputs else (None, None)
    with Progress(f"{run.recipe.name}: layer", arch.layers, first) as progress, torch.no_grad():
        for index in range(first, arch.layers):
            quantizer.spool = None  # tuning has all layers in memory at once
            if index in arch.mixtures and not run.recipe.tune:
                quantizer.spool = Spool(journal.folder, arch.layer_prefix(index))
            stored, chain = quantizer(index, fold.layer(read_layer(run.source, arch, index), index), chain)
            if chain is not None:
                journal.save_chain(index + 1, chain, quantizer.exact)
            report = quantizer.report
            facts: dict[str, Any] = {"errors": quantizer.errors} | ({"experts": report.facts()} if report else {})
            if run.recipe.tune:
                journal.keep(f"layer {index}", stored, **facts)
            else:
                write_layer(run, journal, f"layer {index}", index, stored, spool=quantizer.spool, **facts)
            journal.drop_chain(index)
            note = report.note() if report else ""
            progress.step(f"rounding error {sum(quantizer.errors) / len(quantizer.errors):.3f}{note}")


def write_layer(
    run: Run, journal: Journal, step: str, index: int, quantized: Tensors, spool: Spool | None = None, **facts: Any
) -> None:
    """The shard of a layer, from its tensors by the names of its kind and those in the spool."""
    kind, prefix = run.arch.kinds[index], run.arch.layer_prefix(index)
    kept = {name: run.source.get(prefix + name) for name in kind.kept}
    weights = run.recipe.weights
    forms = {site: run.transforms.layers[index].weights(site, weights) for site in kind.sites}
    stored = joined(quantized, kind, forms, weights.subtracts) | kept
    tensors = writer.layer_tensors(stored, kind, run.transforms, index)
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    journal.finish(step, run.shard(index + 2), named, spool, **facts)


def tune_layers(run: Run, journal: Journal) -> Run:
    """Tunes the quantized layers together, if the recipe says so, and writes them.

    Returns:
        the run, with the tuned clips, and with the tuned gains as S_n: what an adapter reads is divided by them. All is
        as it was, and written so, where tuning was on trial and lost.
    """
    if not run.recipe.tune:
        return run
    layers, tuned = range(run.arch.layers), journal.kept("tune")
    if tuned is None:
        quantized = [journal.kept(f"layer {index}") or {} for index in layers]
        tuned = tune(tuner(run), quantized, Slot(journal, "tune"), aside(run))
        journal.keep("tune", tuned, [Slot.name("tune")])
    run = judged(run, tuned)
    run = replace(run, transforms=deepcopy(run.transforms))
    for index in layers:
        tensors = journal.kept(f"layer {index}") or {}
        if run.recipe.tune:
            before, layer = tensors, run.transforms.layers[index]
            tensors, clips = layer_of(tuned, index)
            s_attn, s_mlp = tuned_scales(run, index, tensors)
            inputs = with_gains(layer.inputs, run.arch.kinds[index], before, tensors)
            moved = replace(layer, clips=clips, s_attn=s_attn, s_mlp=s_mlp, inputs=inputs)
            run.transforms.layers[index] = moved
        if not journal.done(f"tuned layer {index}"):
            write_layer(run, journal, f"tuned layer {index}", index, tensors)
    return run


def tuned_scales(run: Run, index: int, tensors: Tensors) -> list[torch.Tensor]:
    """The tuned gains of the norms of attention and MLP as S_n: R1 has taken the original's into the linears."""
    tuned = [tensors[f"{norm}.weight"].double() for norm in run.arch.kinds[index].norms.values()]
    if run.transforms.r1:
        return tuned
    own = norm_gains(run.source, run.arch, index).values()
    return [scale_to(gain, original) for gain, original in zip(tuned, own, strict=True)]


def write_head(run: Run, journal: Journal) -> None:
    """Final norm and lm_head, untied from the embeddings where vLLM allows it and quantized if the recipe says so; what
    is copied."""
    if journal.done("head"):
        return
    names = run.arch.names
    head = run.source.get(names.embedding if run.arch.tied else names.head)
    gain = read_gain(run.source, run.arch)
    tuned = journal.kept("tune") if run.recipe.tune else None
    folded_gain = tuned[NORM] if tuned else run.fold.head(head[:1], gain)[1]
    tensors = {names.norm: (folded_gain.double() - run.arch.offset).to(run.dtype)}
    if form := run.recipe.lm_head.form:
        folded = by_rows(head, lambda rows: run.fold.head(rows, gain)[0].float())
        scale = rtn.weight_scale(folded, form, run.dtype)
        packed = pack(form.quantize(folded, scale), scale, form)
        tensors |= packed.tensors(names.head.removesuffix(".weight"), run.dtype)
    elif not run.arch.stays_tied:
        tensors[names.head] = by_rows(head, lambda rows: run.fold.head(rows, gain)[0].to(run.dtype))
    if left := run.source.beginning(run.arch.left):
        say(
            f"left out, the result is a model of text: {len(left)} tensors that begin with {' or '.join(run.arch.left)}"
        )
    if copied := run.source.beginning(run.arch.beside):
        say(f"copied as they are: {len(copied)} tensors that begin with {' or '.join(run.arch.beside)}")
        tensors |= {name: run.source.get(name) for name in copied}
    journal.finish("head", run.shard(run.arch.layers + 2), tensors)


def write_companions(run: Run, journal: Journal, digest: str) -> None:
    """Basis sidecar, config.json, index, tokenizer and model card; read back before they count."""
    quantization = writer.quantization_config(run.recipe, run.arch, run.transforms)
    copy_companions(run.model, journal.folder)
    basis = Basis.of(run.source, run.arch, run.transforms).write(journal.folder)
    extension = writer.extension(run.recipe, run.arch, run.transforms, run.profile, basis, provenance(run, digest))
    writer.write_config(run.model, journal.folder, run.arch, quantization, extension)
    written: dict[str, str] = {}
    for shard in journal.files():
        for name in Source.names(journal.folder / shard):
            written[name] = shard
    size = writer.write_index(journal.folder, written)
    before = sum(file.stat().st_size for file in set(run.source.files.values()))
    write_card(
        journal.output, journal, run.recipe, run.arch, run.transforms, run.profile, run.calibrated, size, before,
        run.choice.markdown() if run.choice else "",
    )  # fmt: skip
