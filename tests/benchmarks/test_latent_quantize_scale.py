"""The command that records many codes and odd shapes, on tiny sizes; no figure is looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from latent_quantize_scale import Bucketize, Shape, check, encode, make_inputs, plain

from qlae_kernels import latent_quantize

COMMAND = Path(__file__).parents[2] / "benchmarks" / "latent_quantize_scale.py"
SHAPES = [
    Shape(40, 3, 10),
    Shape(2, 12, 5, (7, 7)),
    Shape(2, 12, 5, (7, 7), channels_last=True),
    Shape(9, 4, 300, dtype=torch.bfloat16),
]


def test_a_quick_record_holds_shapes_small_calls_and_the_search(tmp_path):
    command = [sys.executable, COMMAND, "--quick", "--output", tmp_path / "record"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "record" / "scale.json").read_text())
    assert {row["layout"] for row in results["shapes"]} == {"contiguous", "channels_last"}
    for row in results["shapes"] + results["small"]:
        assert row["nanoseconds_per_element"] > 0
        assert row["compared_batch"] == row["batch"]
    assert {row["direction"] for row in results["search"]} == {"forward", "forward + backward"}
    text = (tmp_path / "record" / "scale.md").read_text()
    assert "| K | latents | layout | dtype | batch | codes per element |" in text
    assert "Slower than eager:" in text
    assert "its figures mean nothing" in text


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_contenders_agree(shape):
    inputs = make_inputs(shape)
    check("fused", latent_quantize, inputs)
    check("eager", plain, inputs)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_wrong_result_is_refused(place):
    def wrong(z, codebook):
        results = list(latent_quantize(z, codebook))
        results[place] = results[place] + 1
        return results

    with pytest.raises(AssertionError, match="wrong: "):
        check("wrong", wrong, make_inputs(Shape(40, 3, 10)))


@pytest.mark.parametrize("num_latents", [1, 3])
def test_bucketize_finds_the_same_codes_and_gradients(num_latents):
    inputs = make_inputs(Shape(500, num_latents, 64))
    other = Bucketize(inputs)
    assert torch.equal(other.encode(), encode(inputs))
    quantized, loss, grad_z, grad_codebook = other.step()
    output = latent_quantize(inputs.z, inputs.codebook)
    torch.autograd.backward((output.quantized, output.loss), (inputs.grad_quantized, None))
    torch.testing.assert_close(quantized, output.quantized.detach())
    torch.testing.assert_close(loss, output.loss.detach())
    torch.testing.assert_close(grad_z, inputs.z.grad)
    torch.testing.assert_close(grad_codebook, inputs.codebook.grad)
