"""The check that precedes every benchmark: contenders pass it, and wrong results do not."""

import pytest
import torch
from latent_quantize_agreement import check_agreement
from latent_quantize_cases import Case, make_inputs
from latent_quantize_peers import CONTENDERS, unavailable_reason

CASE = Case(64, 12, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONTENDERS)
def test_contender_agrees(name, dtype):
    case = Case(64, 12, 10, dtype)
    reason = unavailable_reason(name, case, torch.device("cpu"))
    if reason is not None:
        # Without the fused op there is nothing to compare with.
        assert name != "fused", reason
        pytest.skip(f"{name}: {reason}")
    contender = CONTENDERS[name](make_inputs(case))
    check_agreement(name, contender.results(), contender.inputs)


@pytest.mark.parametrize("field", ["quantized", "indices", "loss", "grad_z", "grad_codebook"])
def test_wrong_result_is_refused(field):
    inputs = make_inputs(CASE)
    results = CONTENDERS["fused"](inputs).results()
    value = getattr(results, field)
    # One code further, or one part in a thousand: far more than rounding explains.
    change = 1 if field == "indices" else 1e-3 * value.abs().max()
    wrong = value.clone()
    wrong.view(-1)[0] += change
    with pytest.raises(AssertionError, match=f"fused: {field} is off"):
        check_agreement("fused", results._replace(**{field: wrong}), inputs)


def test_nan_is_refused():
    inputs = make_inputs(CASE)
    results = CONTENDERS["fused"](inputs).results()
    with pytest.raises(AssertionError, match="loss is off by nan"):
        check_agreement("fused", results._replace(loss=results.loss * torch.nan), inputs)


def test_traffic_counts_the_bytes_that_must_move():
    float32, bfloat16 = Case(10, 2, 4), Case(10, 2, 4, torch.bfloat16)
    assert [case.traffic("forward") for case in (float32, bfloat16)] == [20 * (4 + 4 + 4), 20 * (2 + 2 + 4)]
    assert [case.traffic("backward") for case in (float32, bfloat16)] == [20 * (4 + 4 + 4), 20 * (2 + 2 + 2)]
    # In float32 both directions move what three copies of z move.
    assert float32.traffic("forward + backward") == 3 * 2 * 20 * 4
