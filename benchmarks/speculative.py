"""How much faster a teacher writes with its student as the draft (speculative decoding), and how often they agree.

    python benchmarks/speculative.py TEACHER STUDENT [TEXT] [DRAFTED]

TEACHER and STUDENT are folders of transformers. Prompts of 32 tokens are cut from TEXT, a file or a folder of files, by
default data/debian-handbook; the teacher goes on by 48 tokens, greedily, alone and with the student, which drafts
DRAFTED tokens at a time (4). Both write the same, but for ties of rounding. Leviathan et al., arXiv:2211.17192.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyfusion_llm.documents import find_files, lines

PROMPTS, PROMPT, WRITTEN = 8, 32, 48


class Counted(NamedTuple):
    """What a teacher has written with a draft.

    Attributes:
        tokens: (1, tokens) the prompt and what follows.
        accepted: tokens of the student's that the teacher has taken.
        drafted: tokens that the student has written.
    """

    tokens: Tensor
    accepted: int
    drafted: int


def speculate(teacher: Any, student: Any, prompt: Tensor, drafted: int, written: int) -> Counted:
    """Let a teacher go on with a prompt, and its student draft: each call of the teacher adds a token of its own.

    Args:
        teacher: a language model of transformers.
        student: the draft, with the same tokens.
        prompt: (1, tokens).
        drafted: tokens to draft at a time.
        written: tokens to write.
    """
    settings = student.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = drafted, "constant"
    settings.assistant_confidence_threshold = 0.0
    calls = {teacher: 0, student: 0}

    def count(module: nn.Module, *_: Any) -> None:
        calls[module] += 1

    hooks = [model.register_forward_hook(count) for model in calls]
    try:
        tokens = alone(teacher, prompt, written, assistant_model=student)
    finally:
        for hook in hooks:
            hook.remove()
    return Counted(tokens, tokens.shape[1] - prompt.shape[1] - calls[teacher], calls[student])


def alone(teacher: Any, prompt: Tensor, written: int, **more: Any) -> Tensor:
    """Let a teacher go on with a prompt, (1, tokens), greedily, and return both, (1, tokens)."""
    options = {"max_new_tokens": written, "min_new_tokens": written, "do_sample": False, "pad_token_id": 0}
    found: Tensor = teacher.generate(prompt, attention_mask=torch.ones_like(prompt), **options, **more)
    return found


def main() -> None:
    """Print agreement and ratio of speeds, over all prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher_folder, student_folder, *further = sys.argv[1:]
    text = "".join(lines(find_files([further[0] if further else "data/debian-handbook"])[0]))
    drafted = int(further[1]) if len(further) > 1 else 4
    tokens = AutoTokenizer.from_pretrained(teacher_folder)(text, return_tensors="pt")["input_ids"]
    prompts = tokens[:, : tokens.shape[1] // PROMPTS * PROMPTS].view(PROMPTS, -1)[:, -PROMPT:]
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (teacher_folder, student_folder)
    )
    seconds, accepted, written, same = [0.0, 0.0], 0, 0, 0
    for prompt in prompts.split(1):
        began = time.perf_counter()
        plain = alone(teacher, prompt, WRITTEN)
        between = time.perf_counter()
        counted = speculate(teacher, student, prompt, drafted, WRITTEN)
        seconds[0] += between - began
        seconds[1] += time.perf_counter() - between
        accepted, written = accepted + counted.accepted, written + counted.drafted
        same += torch.equal(plain, counted.tokens)
    print(f"{Path(student_folder)}: {drafted} tokens at a time, {PROMPTS} prompts, {same} continued as without a draft")
    print(f"accepted {accepted} of {written} drafted tokens, {accepted / written:.0%}")
    print(f"tokens a second: {seconds[0] / seconds[1]:.2f} times those of the teacher alone")


if __name__ == "__main__":
    main()
