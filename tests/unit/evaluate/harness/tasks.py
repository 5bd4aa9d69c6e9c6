"""Small local tasks of lm-evaluation-harness: three shapes of questions, on made-up documents."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = (
    *("red", "green", "blue", "the", "square", "circle", "is", "which", "colour", "picture", "of"),
    *("a", "in", "on", "left", "right", "near", "small", "large"),
)


def _words(number: int, count: int) -> str:
    return " ".join(WORDS[(number * 7 + step * (3 + number % 5)) % len(WORDS)] for step in range(count))


def write_tasks(folder: Path, *, documents: int = 12) -> Path:
    """A folder for --include-path: endings, letters with examples, rolling texts and generation until a stop."""
    folder.mkdir(parents=True, exist_ok=True)
    docs = []
    for number in range(documents):
        docs.append(
            {
                "ctx": f"A {_words(number, 9)}.",
                "endings": [f"{_words(number + step, 3 + step)}." for step in range(1, 5)],
                "label": number % 4,
                "question": f"{_words(number, 6)}?",
                "choices": [_words(number + step, 2) for step in range(10, 14)],
                "answer": (number + 1) % 4,
                "page": _words(number, 30 + 40 * (number % 3)),
            }
        )
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    head = (
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    validation: {json.dumps(str(data))}\n"
        "validation_split: validation\n"
    )
    letters = "{{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. {{choices[3]}}"
    tasks = {
        # HellaSwag: the ending of highest probability, also by byte.
        "local_endings": 'output_type: multiple_choice\ndoc_to_text: "{{ctx}}"\ndoc_to_target: "{{label}}"\n'
        'doc_to_choice: "{{endings}}"\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n',
        # MMLU: letters, with examples in front.
        "local_letters": f'output_type: multiple_choice\ndoc_to_text: "{{{{question}}}}\\nA. {letters}\\nAnswer:"\n'
        'doc_to_choice: ["A", "B", "C", "D"]\ndoc_to_target: answer\nfewshot_split: validation\n'
        "fewshot_config:\n  sampler: first_n\nnum_fewshot: 2\nmetric_list:\n  - metric: acc\n",
        "local_pages": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{page}}"\nmetric_list:\n'
        "  - metric: bits_per_byte\n",
        "local_answers": 'output_type: generate_until\ndoc_to_text: "Question: {{question}}\\nAnswer:"\n'
        'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs:\n  until: ["e", "\\n\\n"]\n  max_gen_toks: 16\n'
        "metric_list:\n  - metric: exact_match\n",
    }
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}{text}", encoding="utf-8")
    return folder
