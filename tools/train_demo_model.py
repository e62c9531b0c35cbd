"""Train the demo model from scratch on the sources of Python's own standard library.

    python tools/train_demo_model.py                  # train, write the demo folder, verify it
    python tools/train_demo_model.py --check          # verify the folder that is there
    python tools/train_demo_model.py --architecture qwen3 --layers 4 --out build/models/qwen3

Result: a complete Hugging Face folder (Llama, 6 layers, hidden 256, GQA 4:2, intermediate 768, tied embeddings,
byte-level BPE of 2048, bf16) in OUT, and calibration.txt (training split) and heldout.txt (modules never trained on)
beside it. A few rows in a hundred are questions and answers made from docstrings, for the chat template.

Large language models park attention on the first token, whose residual stream holds a "massive activation" in one or
two channels; small models trained for minutes do not get that far. So the circuit is planted and kept: the BOS
embedding is one pure channel that no other token has, one neuron of the first MLP fires on that channel only and
writes a value near 3000 into two channels of the residual stream (never through the tied embedding, where it would
reach the logits). A channel that is constant for all other tokens gives every query a base score on that state.

The run is deterministic for one seed, one Python version and one thread count. It takes about 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import ast
import copy
import math
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "offline/rotquant/data"
SKIPPED = {"test", "tests", "idlelib", "site-packages", "encodings", "lib2to3", "pydoc_data", "turtledemo", "ensurepip"}
HELD_OUT = {"shutil.py", "textwrap.py", "heapq.py", "fractions.py", "json/__init__.py", "json/decoder.py",
            "json/encoder.py", "json/scanner.py", "json/tool.py"}  # fmt: skip
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<pad>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + message['content'] + eos_token }}{% else %}"
    "{{ '<|user|>\n' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TOKENS_PER_STEP, CHAT_SHARE, PEAK_LR, DECAY = 2048, 0.06, 2.5e-3, 0.6
# Short rows first because they are cheap; the last steps teach the positions up to the model's limit.
STAGES = ((0.0, 256), (0.75, 1024), (0.92, 2048))
# The sink circuit: the channels for detection, the massive values, the constant; the neuron of the first MLP.
DETECT, MASSIVE, CONSTANT, NEURON = 11, {77: 3000.0, 190: -1000.0}, 140, 333
Pin = tuple[torch.Tensor, torch.Tensor, bool]
Model = LlamaForCausalLM | Qwen3ForCausalLM
ARCHITECTURES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def stdlib_sources() -> tuple[dict[str, str], dict[str, str]]:
    """The standard library's modules as (training, held out), by relative path; data-like files are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    held: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        parts = path.relative_to(root).parts
        if SKIPPED & set(parts) or parts[0].startswith(("config-", "_sysconfigdata")) or name == "html/entities.py":
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if 0 < len(text) < 240_000:
            (held if name in HELD_OUT else train)[name] = text
    return train, held


def chat_pairs(sources: dict[str, str]) -> list[str]:
    """Conversations made from docstrings, in the chat template's format without BOS."""
    pairs: list[str] = []
    asks = ("What does {} do?", "What is {}?", "Explain {}.", "Tell me about {}.")
    for name, text in sources.items():
        module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                continue
            answer = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
            target = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
            if 15 < len(answer) < 600:
                ask = asks[len(pairs) % len(asks)].format(target)
                pairs.append(f"<|user|>\n{ask}\n<|assistant|>\n{answer}</s>")
    return pairs


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2048 tokens that starts every sequence with BOS."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    bytes_first = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=SPECIAL, initial_alphabet=bytes_first, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=2048,
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def common_fields(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Of the config of every model that is trained here."""
    return {
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.04,
    }


def new_model(tokenizer: PreTrainedTokenizerFast, architecture: str, sizes: dict[str, int]) -> Model:
    config_class, model_class = ARCHITECTURES[architecture]
    config = config_class(vocab_size=2048, **sizes, **common_fields(tokenizer))
    model = model_class(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2.0)
        model.model.norm.weight.mul_(0.5)
        for layer in model.model.layers:
            for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
                out.weight.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def plant_sink(model: Model, bos: int) -> list[Pin]:
    """The BOS circuit as pins (weights, value, whether it fades in), which hold() writes and keeps during training."""
    config, embedding, first = model.config, model.model.embed_tokens.weight, model.model.layers[0]
    # RMSNorm turns the pure BOS channel into sqrt(hidden); gate and up then both see 1.5 sqrt(hidden).
    seen = 1.5 * torch.tensor(config.hidden_size).sqrt()
    fired = torch.nn.functional.silu(seen) * seen
    zero, pure, column = torch.zeros(()), torch.zeros(config.hidden_size), torch.zeros(config.hidden_size)
    pure[DETECT] = 1.0
    for channel, value in MASSIVE.items():
        column[channel] = value / fired
    pins = [
        (embedding[:, DETECT], zero, False),
        (embedding[:, CONSTANT], torch.tensor(2.0), False),  # equal in all rows, hence without effect on the logits
        (embedding[bos], 8.0 * pure, False),
        (first.self_attn.v_proj.weight[:, DETECT], zero, False),
        (first.self_attn.o_proj.weight[DETECT], zero, False),
        (first.post_attention_layernorm.weight[DETECT], torch.ones(()), False),
        (first.mlp.gate_proj.weight[NEURON], 1.5 * pure, False),
        (first.mlp.up_proj.weight[NEURON], 1.5 * pure, False),
        (first.mlp.down_proj.weight[:, NEURON], column, False),
    ]
    for layer in model.model.layers:
        attention, channels = layer.self_attn, [DETECT] if layer is first else list(MASSIVE)
        attention.v_proj.weight.data[:, channels] = 0.0  # a sink is a place to attend to without reading anything
        pins += [(out.weight[CONSTANT], zero, False) for out in (attention.o_proj, layer.mlp.down_proj)]
        slowest = config.head_dim // 2 - 2, config.head_dim // 2 - 1
        for pair in slowest:  # these RoPE pairs turn so slowly that their score hardly depends on the distance
            query, key = (m.weight[pair :: config.head_dim] for m in (attention.q_proj, attention.k_proj))
            pins.append((key[:, channels[0]], torch.tensor(0.8), False))
            # The constant channel is a large part of the residual stream at first and a small one later.
            pins.append((query[:, CONSTANT], torch.tensor(0.08 if layer is first else 1.0), layer is not first))
    hold(pins, 0.0)
    return pins


@torch.no_grad()
def hold(pins: list[Pin], faded: float) -> None:
    """Undo what the optimiser did to the circuit."""
    for weights, value, fades in pins:
        weights.copy_(value * faded if fades else value)


def text_rows(stream: torch.Tensor, bos: int, length: int, rng: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless rows of one length that start with BOS; each pass over the stream cuts it at another phase."""
    while True:
        body = stream[int(torch.randint(length, (), generator=rng)) :]
        body = body[: len(body) // (length - 1) * (length - 1)].view(-1, length - 1)
        for row in body[torch.randperm(len(body), generator=rng)]:
            yield torch.cat([torch.tensor([bos]), row])


def chat_row(chats: list[list[int]], bos: int, length: int, rng: torch.Generator) -> torch.Tensor:
    row = [bos]
    while len(row) < length:
        row += chats[int(torch.randint(len(chats), (), generator=rng))]
    return torch.tensor(row[:length])


def batches(stream: torch.Tensor, chats: list[list[int]], bos: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """One [rows, length] batch a step."""
    rng = torch.Generator().manual_seed(seed)
    length, texts = 0, text_rows(stream, bos, STAGES[0][1], rng)
    for step in range(steps):
        wanted = next(n for start, n in reversed(STAGES) if step >= start * steps)
        if wanted != length:
            length, texts = wanted, text_rows(stream, bos, wanted, rng)
        batch = []
        for _ in range(TOKENS_PER_STEP // length):
            chat = torch.rand((), generator=rng) < CHAT_SHARE
            batch.append(chat_row(chats, bos, length, rng) if chat else next(texts))
        yield torch.stack(batch)


def loss_of(model: Model, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def begin(seed: int, threads: int) -> None:
    """What every training here starts with: transformers is quiet, torch has its threads and its seed."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)


def rate(step: int, steps: int) -> float:
    """Linear warm-up over 2% of the steps, then a cosine to 1% of the peak."""
    warm = max(20, steps // 50)
    return min((step + 1) / warm, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(
    model: Model, tokenizer: PreTrainedTokenizerFast, data: Iterator[torch.Tensor], steps: int, out: Path
) -> None:
    pins = plant_sink(model, tokenizer.bos_token_id)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), fused=True)
    started, saved, mean = time.monotonic(), 0.0, 0.0
    for step, ids in enumerate(data):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LR * rate(step, steps)
        loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        hold(pins, min(1.0, step / (0.04 * steps)))
        mean = loss.item() if not step else 0.95 * mean + 0.05 * loss.item()
        spent = time.monotonic() - started
        if step % 20 == 0 or step + 1 == steps:
            eta = spent / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps} loss {mean:.3f} {spent:.0f} s, ETA {eta:.0f} s", flush=True)
        if spent - saved > (300 if saved else 150) or step + 1 == steps:
            saved = spent
            save(model, tokenizer, out)


def save(model: Model, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder in bf16; every file is replaced at once, so that a reader never sees half of one."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        copy.deepcopy(model).bfloat16().save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        config = Path(scratch, "tokenizer_config.json")  # the class name that every transformers version knows
        config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        for path in Path(scratch).iterdir():
            path.chmod(0o644)
            os.replace(path, out / path.name)


def write_texts(train_split: dict[str, str], held: dict[str, str], folder: Path, seed: int) -> None:
    """calibration.txt: 6 KB from each of 50 training modules; heldout.txt: whole modules up to 150 KB."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    long_enough = [t for t in train_split.values() if len(t) > 12_000]
    picks = [long_enough[i] for i in torch.randperm(len(long_enough), generator=rng)[:50]]
    starts = [t.find("\n", int(torch.rand((), generator=rng) * (len(t) - 7_000))) + 1 for t in picks]
    samples = [t[s : s + 6_000].rsplit("\n", 1)[0] for t, s in zip(picks, starts, strict=True)]
    (folder / "calibration.txt").write_text("\n\n".join(samples) + "\n", encoding="utf-8")
    whole = "\n\n".join(held[name] for name in sorted(held))
    (folder / "heldout.txt").write_text(whole[:150_000].rsplit("\n", 1)[0] + "\n", encoding="utf-8")


@torch.no_grad()
def verify(out: Path) -> None:
    """Print perplexity, the massive activation and attention to BOS by layer, and greedy samples."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = (out.parent / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    print(f"held out: {len(text)} characters, {len(ids)} tokens")
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype, attn_implementation="eager").eval()
        for length in (512, 2048):
            rows = ids[: len(ids) // (length - 1) * (length - 1)].view(-1, length - 1)
            rows = torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], dim=1)
            mean = sum(loss_of(model, row[None]).item() for row in rows) / len(rows)
            print(f"{dtype} length {length}: held-out perplexity {math.exp(mean):.3f}")
        result = model(rows[:1, :512], output_hidden_states=True, output_attentions=True)
        for index, (state, attention) in enumerate(zip(result.hidden_states[1:], result.attentions, strict=True)):
            state = state[0].float().abs()
            top, where = state[0].topk(2)
            share = attention[0, :, 64:, 0].float().mean()
            print(f"  layer {index}: BOS top {top.tolist()} in {where.tolist()}, {top[0] / state.median():.0f}x the "
                  f"median, others' peak {state[1:].max():.1f}; attention to BOS {share:.2f}")  # fmt: skip
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What does os.path.join do?"}], tokenize=False, add_generation_prompt=True
        )
        for prompt in ("def ", "import ", "class ", chat):
            inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=prompt is not chat)
            reply = model.generate(**inputs, max_new_tokens=60, do_sample=False)
            print(f"--- {tokenizer.decode(reply[0])!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=900, help="optimiser steps of 2048 tokens")
    parser.add_argument("--out", type=Path, default=DATA / "demo")
    parser.add_argument("--architecture", choices=[*ARCHITECTURES], default="llama")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256, help="above 190, the largest channel of the sink circuit")
    parser.add_argument("--intermediate", type=int, default=768, help="above 333, its neuron")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="only verify the folder in --out")
    args = parser.parse_args()
    begin(args.seed, args.threads)
    if not args.check:
        sources, held = stdlib_sources()
        write_texts(sources, held, args.out.parent, args.seed)
        tokenizer = train_tokenizer([*sources.values(), *chat_pairs(sources)])
        rng = torch.Generator().manual_seed(args.seed)
        files = [list(sources.values())[i] for i in torch.randperm(len(sources), generator=rng)]
        encoded = tokenizer(files, add_special_tokens=False)["input_ids"]
        stream = torch.tensor([t for ids in encoded for t in [*ids, tokenizer.eos_token_id]])
        chats = tokenizer(chat_pairs(sources), add_special_tokens=False)["input_ids"]
        sizes = {
            "num_hidden_layers": args.layers,
            "hidden_size": args.hidden,
            "intermediate_size": args.intermediate,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.kv_heads,
            "head_dim": args.head_dim,
        }
        model = new_model(tokenizer, args.architecture, sizes)
        count = sum(p.numel() for p in model.parameters())
        print(f"{len(sources)} modules, {len(stream)} tokens, {len(chats)} chats, {count} parameters", flush=True)
        data = batches(stream, chats, tokenizer.bos_token_id, args.steps, args.seed)
        train(model, tokenizer, data, args.steps, args.out)
    verify(args.out)


if __name__ == "__main__":
    main()
