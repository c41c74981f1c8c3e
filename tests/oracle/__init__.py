"""What an independent program (transformers, fp32) answers for the same weights, stored for tests.

`make_random_answers.py` and `make_smollm2_answers.py` wrote `answers/`; README.md says how.
"""
