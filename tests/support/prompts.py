"""Twenty prompts for comparing greedy tokens: beginnings that the demo model's training text is made of."""

PROMPTS = [
    "def ", "import ", "class ", "for i in range(", "return self.", "try:\n    ", "if not isinstance(",
    "    def __init__(self", "raise ValueError(", "with open(", '"""', "from collections import ",
    "@property\n    def ", "assert ", "while True:\n", "print(", "x = [", "lambda ", "except OSError", "# This ",
]  # fmt: skip
