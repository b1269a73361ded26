"""`silkie.inference.Nucleus` keeps what transformers' own top-p keeps, and sorts only where it must."""

from __future__ import annotations

import pytest
import torch
from transformers import TopPLogitsWarper

from silkie.inference import Nucleus


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_it_keeps_what_transformers_keeps(top_p, sharpness):
    scores = sharpness * torch.randn(16, 5_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[:, 7] = -torch.inf
    ids = torch.zeros(16, 1, dtype=torch.long)
    assert torch.equal(Nucleus(top_p)(ids, scores), TopPLogitsWarper(top_p)(ids, scores))


def test_a_nucleus_among_the_likeliest_is_not_sorted_for(monkeypatch):
    nucleus = Nucleus(0.9, likeliest=8)
    monkeypatch.setattr(nucleus, "sorting", lambda ids, scores: pytest.fail("sorted"))
    scores = torch.zeros(2, 1_000)
    scores[:, 3] = 20.0
    assert (nucleus(torch.zeros(2, 1), scores) > -torch.inf).sum() == 2
    scores[1, 3] = 0.0  # a flat row: 8 tokens hold less than .9
    with pytest.raises(pytest.fail.Exception, match="sorted"):
        nucleus(torch.zeros(2, 1), scores)


def test_a_vocabulary_smaller_than_the_first_look_works():
    scores = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    assert torch.equal(Nucleus(0.8)(torch.zeros(1, 1), scores), TopPLogitsWarper(0.8)(torch.zeros(1, 1), scores))
