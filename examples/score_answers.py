"""Score two sets of answers and say what changed, from Python: no files but the two results.

python examples/score_answers.py pope base.jsonl trained.jsonl
"""

import sys

from silkie.evaluation import score
from silkie.evaluation.compare import compare_scores
from silkie.evaluation.text import comparison_text

benchmark, base_file, trained_file = sys.argv[1:]
base, trained = score(benchmark, base_file), score(benchmark, trained_file)
comparison = compare_scores(base, trained)
print(comparison_text(comparison, shown_flips=3))

worst = [b for a, b in comparison.broken if not b.answer.strip()]
print(f"\n{len(worst)} of the {len(comparison.broken)} newly wrong answers are empty")
