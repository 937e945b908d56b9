"""The choice of the next token."""

import torch

from pq_ao.sampling import Sampling


def test_sampling_follows_the_cut_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, -1)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        drawn = Sampling(do_sample=True, **options).choose(logits, generator)
        return torch.bincount(drawn, minlength=4) / len(drawn)

    softmax = logits[0].softmax(-1)
    torch.testing.assert_close(frequencies(), softmax, rtol=0, atol=0.02)
    torch.testing.assert_close(frequencies(temperature=2.0), (logits[0] / 2).softmax(-1), rtol=0, atol=0.02)
    two = softmax[:2] / softmax[:2].sum()
    for options in ({"top_k": 2}, {"top_p": 0.8}, {"top_k": 3, "top_p": 0.8}):
        torch.testing.assert_close(frequencies(**options)[:2], two, rtol=0, atol=0.02)
    assert frequencies(top_p=1e-6)[0] == 1 and frequencies(top_k=1)[0] == 1
    assert Sampling().choose(logits[:1]).item() == 0
