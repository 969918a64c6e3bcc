"""Which labels are probably wrong? Audit preference pairs, and print the most suspect ones.

python examples/audit.py MODEL PAIRS TRUSTED
"""

import sys

from softpref import audit

model, pairs, trusted = sys.argv[1:]  # model: directory or hub id; pairs and trusted: files
result = audit(model, pairs, trusted)
found = result.summary
print(f"wrong labels: {found.noise_rate_low:.0%} to {found.noise_rate_high:.0%} of {found.pairs}")
if not found.evidence_speaks:
    sys.exit("Nothing in these pairs distinguishes right labels from wrong ones.")
for pair in result.pairs.sort("rank").select(range(5)):
    print(f"row {pair['row']}: {pair['p_correct']:.0%} likely to be right; {pair['why']}")
