"""Score two sets of answers and say what changed, from Python: no files but the two results.

python examples/score_answers.py pope base.jsonl trained.jsonl
"""

import argparse

from silkie.evaluation import score
from silkie.evaluation.compare import compare_scores
from silkie.evaluation.text import comparison_text

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("benchmark", help="pope, mme, ... or the path of a YAML definition")
parser.add_argument("base", help="results of the base model")
parser.add_argument("trained", help="results of the trained model")
args = parser.parse_args()

base, trained = score(args.benchmark, args.base), score(args.benchmark, args.trained)
comparison = compare_scores(base, trained)
print(comparison_text(comparison, shown_flips=3))

worst = [b for a, b in comparison.broken if not b.answer.strip()]
print(f"\n{len(worst)} of the {len(comparison.broken)} newly wrong answers are empty")
