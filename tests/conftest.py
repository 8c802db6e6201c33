"""Shared by all tests: one thread, so that sums have one order, and the same examples in every run."""

from __future__ import annotations

import hypothesis
import torch

torch.set_num_threads(1)
# A failure must come back when the test is run again; new examples come with every change of a test.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")
