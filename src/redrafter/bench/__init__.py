"""Plain and speculative decoding through the same engine, interleaved: one JSON per run, figures and a page from it.

No prompt and no answer is stored: ids, categories, counts, times and SHA-256 of answers are.
"""
