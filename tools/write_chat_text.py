"""Writes offline/rotquant/data/chat-calibration.txt: what SmolLM2-135M-Instruct, not quantized, says when it is asked.

    python tools/write_chat_text.py [--out FILE]

Calibration text should look like the use, and the use of a chat model is conversations in its template. These are its
own (sampled at temperature 0.7), so that no other text is needed, behind as much prose. The demo's questions are not
among them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rotquant.data import DATA
from rotquant.service.smollm2 import smollm2
from rotquant_kernels.native import cache_root

BATCH, TOKENS, SEED = 64, 128, 0
PROSE = 45_000  # characters
PROMPTS = """
Which river is the longest in Africa?
What is the capital of Japan?
Name the planets of the solar system.
Explain what photosynthesis is.
Write a short story about a lighthouse keeper.
How do I boil an egg?
What is the difference between a lake and a sea?
Give me three tips for sleeping better.
Who wrote Romeo and Juliet?
What is 12 times 7?
Write a poem about rain.
How does a bicycle stay upright?
Translate "good morning" into Spanish.
What causes earthquakes?
Describe a sunset over the mountains.
What is the boiling point of water?
List five kinds of fruit.
Why do leaves fall in autumn?
What is a prime number? Give examples.
Write an email asking for a day off.
How many continents are there, and what are they called?
What do bees make, and how?
Explain gravity to a child.
Which country has the largest population?
What is the opposite of generous?
Summarize the story of Cinderella in three sentences.
What is the capital of Egypt?
How do vaccines work?
Give me a recipe for pancakes.
What is the largest ocean?
Write a birthday wish for a friend.
What does a compass do?
Why is exercise healthy?
What are the states of matter?
Who painted the Mona Lisa?
Name four musical instruments.
How do I learn a new language?
What is the currency of Brazil?
Describe your favourite animal.
Why does ice float on water?
What is machine learning?
Give a synonym for happy and use it in a sentence.
What happens during an eclipse?
How long does the Earth take to go around the Sun?
Write a dialogue between a teacher and a pupil about honesty.
What is the capital of Canada?
What should I pack for a week at the beach?
How is paper made?
What is the square root of 81?
Explain how a rainbow forms.
What was the Renaissance?
Tell me a joke about cats.
How do plants drink?
Which metal is liquid at room temperature?
Write the opening of a detective novel.
What is a noun?
How does a refrigerator keep food cold?
What is the tallest mountain in the world?
Give me advice for a job interview.
What is the difference between weather and climate?
Count from one to ten in French.
Why do we have seasons?
What is an island?
How can I save money every month?
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA / "chat-calibration.txt")
    folder = smollm2(cache_root())
    out = parser.parse_args().out
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    torch.manual_seed(SEED)
    prompts, texts = PROMPTS.strip().split("\n"), []
    for start in range(0, len(prompts), BATCH):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + BATCH]]
        given = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        inputs = tokenizer(given, return_tensors="pt", padding=True)
        settings = {"max_new_tokens": TOKENS, "do_sample": True, "temperature": 0.7, "top_p": 0.95}
        made = model.generate(**inputs, **settings, pad_token_id=tokenizer.pad_token_id)
        answers = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts += [f"{ask}{answer}<|im_end|>\n" for ask, answer in zip(given, answers, strict=True)]
    out.write_text((DATA / "prose-calibration.txt").read_text()[:PROSE] + "".join(texts))


if __name__ == "__main__":
    main()
