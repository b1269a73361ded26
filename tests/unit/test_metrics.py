import torch

from silkie.training.metrics import DeviceMeans


def test_sums_and_counts_until_popped():
    means = DeviceMeans()
    means.add("a", torch.tensor(3.0), 2)
    means.add("a", torch.tensor(1.0), torch.tensor(2))
    means.add("b", torch.tensor(5.0), 0)
    assert means.pop(lambda t: t * 2) == {"a": (8.0, 8.0), "b": (10.0, 0.0)}
    assert means.pop(lambda t: t) == {}


def test_peeking_forgets_nothing():
    means = DeviceMeans()
    means.add("a", torch.tensor(3.0), 2)
    assert means.peek("a", lambda t: t.mul_(2), torch.device("cpu")) == (
        6.0,
        4.0,
    )  # a reduction in place, as some backends do
    assert means.peek("b", lambda t: t, torch.device("cpu")) == (0.0, 0.0)
    assert means.pop(lambda t: t) == {"a": (3.0, 2.0)}
