"""Small tensors that outlive a call; what needs a GPU is in test_gpu.py."""

import threading
from types import SimpleNamespace

import pytest
import torch

from qlae_kernels.gpu_tensors import kept


def test_what_is_kept_is_made_by_another_thread_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    stream = SimpleNamespace(synchronize=lambda: events.append(("waited", threading.get_ident())))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    kept(torch.device("cuda", 0), lambda: events.append(("made", threading.get_ident())))
    (first, maker), (second, waiter) = events
    assert (first, second) == ("made", "waited")
    assert maker == waiter != threading.get_ident()


def test_an_error_while_making_reaches_the_caller() -> None:
    def fail() -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        kept(torch.device("cuda", 0), fail)
