"""``instructions``: is an instruction about form followed? The checks of IFEval and IFBench, from a package.

References
----------
Zhou et al. (2023), Instruction-Following Evaluation for Large Language Models, arXiv 2311.07911.
Pyatkin et al. (2025), Generalizing Verifiable Instruction Following, arXiv 2507.02833.
"""

from __future__ import annotations

import importlib
import random
from types import ModuleType
from typing import Any

from trainer.verify import Verifier

# The benchmark, the instruction's name there, and what is fixed of it; the rest is drawn.
INSTRUCTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "no_comma": ("ifeval", "punctuation:no_comma", {}),
    "lowercase": ("ifeval", "change_case:english_lowercase", {}),
    "few_words": ("ifeval", "length_constraints:number_words", {"num_words": 40, "relation": "less than"}),
    "end_phrase": ("ifeval", "startend:end_checker", {}),
    "title": ("ifeval", "detectable_format:title", {}),
    "keywords": ("ifeval", "keywords:existence", {}),
    "quotation": ("ifeval", "startend:quotation", {}),
    "bullets": ("ifeval", "detectable_format:number_bullet_lists", {"num_bullets": 3}),
    "numbers": ("ifbench", "count:numbers", {"N": 1}),
    "word_range": ("ifbench", "count:word_count_range", {"min_words": 20, "max_words": 50}),
}
QUESTIONS = (
    "Why is the sea salty?",
    "What does a baker do all day?",
    "How does a bicycle stay upright?",
    "Why do leaves change colour?",
    "What makes a good friend?",
    "How do magnets work?",
    "Why do people keep cats?",
    "What is a volcano?",
    "How is paper made?",
    "Why do we dream?",
    "What is a map good for?",
    "How do birds find their way?",
    "Why is the grass green?",
    "How does a clock keep time?",
    "What does a nurse do at night?",
    "Why do cats purr?",
    "How is cheese made?",
    "What is a compass for?",
    "Why does bread rise?",
    "How do fish breathe?",
    "What makes a story exciting?",
    "Why do we have seasons?",
    "How does soap clean?",
    "What is a rainbow?",
    "Why do people tell jokes?",
    "How do seeds become trees?",
    "What does a librarian do?",
    "Why do boats float?",
    "How does a kite fly?",
    "What is honey made of?",
    "Why do stars twinkle?",
    "How do mountains form?",
    "What makes music sad?",
    "Why do we need sleep?",
    "How does a candle burn?",
    "What is the wind?",
    "Why do dogs bark?",
    "How is glass made?",
    "What does a farmer do in winter?",
    "Why do people collect stamps?",
    "How do bees make honey?",
    "What is a desert like?",
    "Why does ice float?",
    "How does a bridge carry weight?",
    "What makes a good teacher?",
    "Why do we yawn?",
    "How do rivers begin?",
    "What is a library good for?",
    "Why do people dance?",
    "How does rain form?",
    "What is chocolate made of?",
    "Why do onions make us cry?",
    "How do spiders build webs?",
    "What does a sailor need to know?",
    "Why is the moon bright?",
    "How does a mirror work?",
    "What makes a town pleasant?",
    "Why do birds sing?",
    "How do glaciers move?",
    "What is a friend for?",
)
KEYWORDS = ("water", "morning", "people", "small", "light", "because", "often", "world", "simple", "time")


class Instructions(Verifier):
    """Instructions about form."""

    skills = tuple(INSTRUCTIONS)

    def warm_up(self) -> None:
        """Import both benchmarks, and have their detector read its languages, which takes seconds."""
        for benchmark, _, _ in INSTRUCTIONS.values():
            _registry(benchmark)
        import langdetect

        langdetect.detect("The sea is salty.")

    def task(self, skill: str, seed: int) -> tuple[str, dict[str, Any]]:
        """Return a question with an instruction, and what the instruction asks for."""
        benchmark, name, fixed = INSTRUCTIONS[skill]
        chance = random.Random(seed)
        random.seed(seed)  # the package draws from the global generator; this process is ours alone
        if skill == "keywords":
            fixed = {"keywords": chance.sample(KEYWORDS, 2)}
        check = _registry(benchmark).INSTRUCTION_DICT[name](name)
        asked = check.build_description(**fixed)
        return f"{chance.choice(QUESTIONS)} {asked}", {"asked": check.get_instruction_args() or {}}

    def judge(self, skill: str, key: dict[str, Any], answer: str) -> float:
        """Return 1 where the instruction is followed, else 0."""
        benchmark, name, _ = INSTRUCTIONS[skill]
        check = _registry(benchmark).INSTRUCTION_DICT[name](name)
        check.build_description(**key["asked"])
        return float(bool(answer.strip()) and bool(check.check_following(answer)))


def _registry(benchmark: str) -> ModuleType:
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    nltk.download = lambda *_, **__: False  # corpora that our instructions do not need; nothing is fetched
    return importlib.import_module(f"if_verifiable.{benchmark}.instructions_registry")


VERIFIER = Instructions()
