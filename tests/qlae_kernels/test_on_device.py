"""The transfer by which CPU tests reach a GPU: it keeps how a tensor lies in memory, and is differentiable."""

import pytest
import torch
from latent_quantize_statement import assert_same_bits
from on_device import CPU, Transfer, copied, device_of, storage_bytes
from torch import Tensor

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
devices = pytest.mark.parametrize("device", DEVICES)


def layouts() -> dict[str, Tensor]:
    values = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    return {
        "contiguous": values,
        "permuted": values.permute(2, 0, 1),
        "gaps": values[:, 1::2, ::3],
        "expanded": values[:, :1].expand(4, 9, 5),
        "offset": values.flatten()[7:],
        "half": values.bfloat16()[1:],
        "negated": torch._neg_view(values[1:]),
        "imaginary part": torch.complex(values, 2 * values).conj().imag,
        "empty": values[:0],
        "number": values[0, 0, 0],
    }


@devices
@pytest.mark.parametrize("name", layouts())
def test_a_copy_lies_in_memory_as_the_original(name: str, device: str) -> None:
    original = layouts()[name]
    copy = copied(original, torch.device(device))
    assert copy.device.type == device
    assert copy.untyped_storage().data_ptr() != original.untyped_storage().data_ptr() or original.numel() == 0
    assert (copy.stride(), copy.storage_offset()) == (original.stride(), original.storage_offset())
    assert copy.is_neg() == original.is_neg()
    assert torch.equal(storage_bytes(copy).cpu(), storage_bytes(original))
    assert_same_bits(copy.cpu(), original)


@devices
def test_gradients_of_every_order_pass_the_transfer(device: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: Tensor) -> Tensor:
        return Transfer.apply(Transfer.apply(x.T, torch.device(device)).pow(3), CPU)

    assert torch.autograd.gradcheck(there_and_back, x)
    assert torch.autograd.gradgradcheck(there_and_back, x)


def test_a_backend_that_serves_the_cpu_is_called_there() -> None:
    assert device_of("cpu") == device_of("reference") == device_of("auto") == device_of("no backend") == CPU
