"""The command that records the speed of `latent_quantize` on a GPU, on tiny sizes; no figure is looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from latent_quantize_agreement import check_agreement_in_part
from latent_quantize_cases import Case, make_inputs
from latent_quantize_peers import CONTENDERS

COMMAND = Path(__file__).parents[2] / "benchmarks" / "latent_quantize_gpu.py"


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_a_quick_record_holds_every_row_and_its_floors(tmp_path, device):
    command = [sys.executable, COMMAND, "--quick", "--device", device, "--output", tmp_path / "record"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "record" / "report.json").read_text())
    assert results["versions"]["torch"] == torch.__version__
    assert {row["direction"] for row in results["rows"]} == {"forward", "backward", "forward + backward"}
    assert {row["case"]["dtype"] for row in results["rows"]} == {"float32", "bfloat16"}
    for row in results["rows"]:
        assert {"copy", "empty kernel", "eager", results["auto"]} <= set(row["contenders"])
        assert all(entry["seconds"] > 0 for entry in row["contenders"].values())
        assert row["contenders"]["copy"]["percent_of_copy"] == pytest.approx(100)
        # Compiling needs a C++ compiler, which a machine may lack.
        assert set(row["skipped"]) <= {"torch.compile"}, row["skipped"]
    assert [row["quantizer"] for row in results["train_step"]][:2] == ["auto", "reference"]
    table = (tmp_path / "record" / "table.md").read_text()
    assert "| direction | N x D | dtype | K | contender | median, us | IQR, us |" in table
    assert "its figures mean nothing" in table
    assert (tmp_path / "record" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("field", ["quantized", "indices", "loss", "grad_z", "grad_codebook"])
def test_a_wrong_result_is_refused_where_a_part_is_checked(field, monkeypatch):
    monkeypatch.setattr("latent_quantize_agreement.MAX_DISTANCES", 12 * 10 * 20)
    inputs = make_inputs(Case(64, 12, 10))
    results = CONTENDERS["fused"](inputs).results()
    check_agreement_in_part("fused", results, inputs)
    wrong = getattr(results, field).clone()
    wrong.view(-1)[0] += 1 if field == "indices" else 1e-3 * wrong.abs().max()
    with pytest.raises(AssertionError, match=f"fused: {field} (is|are) off"):
        check_agreement_in_part("fused", results._replace(**{field: wrong}), inputs)
